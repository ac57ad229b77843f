/* Products with a row of codes or floats, whose outputs the threads share out. */

#ifndef QATC_PRODUCT_STEPS_H
#define QATC_PRODUCT_STEPS_H

#include <stdint.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "numbers.h"
#include "packed.h"
#include "steps.h"
#include "threads.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

/* The sums of the lanes of four accumulators. */
static inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* dot_row of four rows at once; bits 4 or 8. A short row leaves no time to add up lanes alone.
 *
 * w: [4, bytes]; x: int8, zero from K on. At 4 bits the low halves of w's bytes belong to x[0 .. bytes)
 * and the high ones to x[bytes .. 2 * bytes). Codes are made unsigned, as dpbusd takes them, which
 * adds 2^(bits-1) to each: x_sum times that is taken off the four sums in the end.
 */
static inline void dot_rows(const uint8_t *w, int64_t bytes, const int8_t *x, int bits,
                            int32_t x_sum, int32_t *out) {
    __m512i low[4], high[4];
    for (int r = 0; r < 4; r++) low[r] = high[r] = _mm512_setzero_si512();
    const __m512i nibbles = _mm512_set1_epi8(15), sign = _mm512_set1_epi8((char)128);
    int64_t whole = bytes / 64 * 64;
    if (bits == 4) {
        for (int64_t j = 0; j < whole; j += 64) {
            __m512i x0 = _mm512_loadu_si512(x + j), x1 = _mm512_loadu_si512(x + bytes + j);
            for (int r = 0; r < 4; r++) {
                __m512i v = _mm512_loadu_si512(w + r * bytes + j);
                low[r] = _mm512_dpbusd_epi32(low[r], _mm512_and_si512(v, nibbles), x0);
                v = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles);
                high[r] = _mm512_dpbusd_epi32(high[r], v, x1);
            }
        }
        if (whole < bytes) {
            __mmask64 rest = ~0ull >> (64 - (bytes - whole));
            __m512i x0 = _mm512_loadu_si512(x + whole), x1 = _mm512_loadu_si512(x + bytes + whole);
            for (int r = 0; r < 4; r++) {
                __m512i v = _mm512_maskz_loadu_epi8(rest, w + r * bytes + whole);
                low[r] = _mm512_dpbusd_epi32(low[r], _mm512_and_si512(v, nibbles), x0);
                v = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles);
                high[r] = _mm512_dpbusd_epi32(high[r], v, x1);
            }
        }
        for (int r = 0; r < 4; r++) low[r] = _mm512_add_epi32(low[r], high[r]);
    } else {
        for (int64_t j = 0; j < whole; j += 64) {
            __m512i x0 = _mm512_loadu_si512(x + j);
            for (int r = 0; r < 4; r++) {
                __m512i v = _mm512_xor_si512(_mm512_loadu_si512(w + r * bytes + j), sign);
                low[r] = _mm512_dpbusd_epi32(low[r], v, x0);
            }
        }
        if (whole < bytes) { /* x is zero beyond its width, whatever the weights there */
            __mmask64 rest = ~0ull >> (64 - (bytes - whole));
            __m512i x0 = _mm512_loadu_si512(x + whole);
            for (int r = 0; r < 4; r++) {
                __m512i v = _mm512_maskz_loadu_epi8(rest, w + r * bytes + whole);
                low[r] = _mm512_dpbusd_epi32(low[r], _mm512_xor_si512(v, sign), x0);
            }
        }
    }
    __m128i sums = sums_of(low[0], low[1], low[2], low[3]);
    sums = _mm_sub_epi32(sums, _mm_set1_epi32(x_sum * (1 << (bits - 1))));
    _mm_storeu_si128((__m128i *)out, sums);
}

#endif

/* out[n] = sum over k of code[n, k] * x[k], exact in int32, times both scales; see PRODUCT. Each thread
 * has rows n .. end of the weight. */
static void product(const step *s, const place_of *here) {
    const quantized *x = at(here, s->a);
    const uint8_t *w = at(here, s->b);
    const float *scale = at(here, s->c), *bias = s->d ? at(here, s->d) : 0;
    float *out = at(here, s->out);
    int bits = (int)s->kind;
    int64_t bytes = s->i0, width = s->cols;
    int64_t n = share(s->rows, here->number, here->team);
    int64_t end = share(s->rows, here->number + 1, here->team);
    while (n < end) {
        int32_t sums[4];
        int64_t count = 1;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        if (end - n >= 4 && (bits == 4 || bits == 8)) {
            count = 4;
            for (int r = 0; r < 4; r++)
                for (int64_t j = 0; j < bytes; j += 64)
                    __builtin_prefetch(w + (n + 8 + r) * bytes + j);
            dot_rows(w + n * bytes, bytes, x->codes, bits, x->sum, sums);
        } else
#endif
            sums[0] = dot_row(w + n * bytes, x->codes, width, bits, x->sum);
        for (int64_t r = 0; r < count; r++) {
            float value = (float)sums[r] * x->scale * scale[n + r];
            if (bias) value += bias[n + r];
            out[n + r] = s->rounds ? to_bf16(value) : value;
        }
        n += count;
    }
}

/* A linear in float: out[n] = w[n, :] . x, see LINEAR. */
static void linear(const step *s, const place_of *here) {
    const float *x = at(here, s->a), *bias = s->d ? at(here, s->d) : 0;
    const char *w = at(here, s->b);
    float *out = at(here, s->out);
    int64_t width = s->cols, end = share(s->rows, here->number + 1, here->team);
    for (int64_t n = share(s->rows, here->number, here->team); n < end; n++) {
        float value = s->kind ? dot_bf16(x, (const uint16_t *)w + n * width, width)
                              : dot_floats(x, (const float *)w + n * width, width);
        if (bias) value += bias[n];
        out[n] = s->rounds ? to_bf16(value) : value;
    }
}

#endif
