/* One decoding step of a whole model: a list of steps, run by a team of threads in one call.
 *
 * qatc/runtime/program.py makes the list from the graphs of a model; its opcodes and fields are those here.
 * All values are fp32 in memory, rounded to bf16 where a graph of that dtype rounds.
 *
 * Small steps are run by every thread for itself, in memory of its own: that costs less than to
 * wait for one another. Products and attention are shared out, and write to memory that all see; a
 * barrier stands before the first step that reads it.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "packed.h"

enum op {
    BARRIER, LOAD, UNARY, BINARY, MEAN, LAYER_NORM, EMBED, EMBED_PACKED, TO_FLOAT, QUANTIZE,
    PRODUCT, LINEAR, ATTEND, MERGE, STORE
};
enum unary { COPY, NEG, SILU, GELU, GELU_TANH, RSQRT, SQRT, TANH, RELU, EXP, SIGMOID, COS, SIN, SQUARE };
enum binary { ADD, SUB, MUL, DIV };
enum place { ABSOLUTE, PRIVATE, SHARED, CALL };

/* Addresses are an offset or a pointer times 8, plus a place. Strides count values. */
typedef struct {
    int64_t op, kind, rounds, out, a, b, c, d; /* kind: function, dtype or bits */
    int64_t rows, cols, a_row, a_col, b_row, b_col;
    int64_t i0, i1, i2, i3;
    double f0, f1;
} step;

typedef struct {
    char *own, *shared, **call;
    int64_t number, team;
} place_of;

/* What a quantized input is in memory, followed by its codes and 512 zeros. */
typedef struct {
    float scale;
    int32_t sum;
    char unused[56];
    int8_t codes[];
} quantized;

static void *at(const place_of *here, int64_t address) {
    int64_t offset = address >> 3;
    switch (address & 7) {
    case ABSOLUTE: return (void *)(intptr_t)offset;
    case PRIVATE: return here->own + offset;
    case SHARED: return here->shared + offset;
    default: return here->call[offset];
    }
}

/* ---------------------------------------------------------------- threads */

typedef struct {
    int64_t arrived;
    char apart[56];
    int64_t turn;
} barrier;

static void pause_(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

extern int sched_yield(void);

/* Threads meet some five times a layer, mostly within a microsecond: they wait awake, but give way
 * where there are more threads than cores. */
static void meet(barrier *all, int64_t team) {
    if (team == 1) return;
    int64_t turn = __atomic_load_n(&all->turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&all->arrived, 1, __ATOMIC_ACQ_REL) == team) {
        __atomic_store_n(&all->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&all->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t spins = 0; __atomic_load_n(&all->turn, __ATOMIC_ACQUIRE) == turn; spins++) {
        if (spins < 20000)
            pause_();
        else
            sched_yield();
    }
}

static int64_t share(int64_t count, int64_t number, int64_t team) { return count * number / team; }

/* ---------------------------------------------------------------- numbers */

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* The nearest bf16, ties to even. */
static inline float to_bf16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return as_float((bits & 0x7fffffffu) > 0x7f800000u ? bits : rounded);
}

/* e^x to an ulp or two, in a form that compilers vectorize (Cephes' polynomial). */
static inline float exp_(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.7f ? 88.7f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t)n; /* 2^128 is no float: half of it twice */
    int32_t half = power >> 1;
    return p * as_float((uint32_t)(half + 127) << 23) * as_float((uint32_t)(power - half + 127) << 23);
}

static inline float gelu_tanh(float x) {
    float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    float e = exp_(2.0f * inner); /* tanh(y) = 1 - 2 / (e^2y + 1) */
    return 0.5f * x * (2.0f - 2.0f / (e + 1.0f));
}

static inline __attribute__((always_inline)) float dot_floats(const float *restrict a, const float *restrict b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) sum += a[j] * b[j];
    return sum;
}

static float dot_bf16(const float *restrict a, const uint16_t *restrict b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) sum += a[j] * as_float((uint32_t)b[j] << 16);
    return sum;
}

static void load(float *restrict out, const void *from, int64_t count, int bf16) {
    const uint16_t *half = from;
    if (!bf16)
        memcpy(out, from, (size_t)count * 4);
    else
        for (int64_t j = 0; j < count; j++) out[j] = as_float((uint32_t)half[j] << 16);
}

static void round_all(float *out, int64_t count) {
    for (int64_t j = 0; j < count; j++) out[j] = to_bf16(out[j]);
}

/* ---------------------------------------------------------------- small steps */

#define EACH(expression)                       \
    for (int64_t j = 0; j < cols; j++) {       \
        float x = a[j * stride];               \
        out[j] = (expression);                 \
    }                                          \
    break;

static inline __attribute__((always_inline)) void unary_row(float *restrict out,
                                                            const float *restrict a, int64_t stride,
                                                            int64_t cols, int function) {
    switch (function) {
    case COPY: EACH(x)
    case NEG: EACH(-x)
    case SILU: EACH(x / (1.0f + exp_(-x)))
    case GELU: EACH(0.5f * x * (1.0f + erff(x * 0.70710678118654752f)))
    case GELU_TANH: EACH(gelu_tanh(x))
    case RSQRT: EACH(1.0f / sqrtf(x))
    case SQRT: EACH(sqrtf(x))
    case TANH: EACH(tanhf(x))
    case RELU: EACH(x > 0 ? x : 0)
    case EXP: EACH(expf(x))
    case SIGMOID: EACH(1.0f / (1.0f + exp_(-x)))
    case COS: EACH(cosf(x))
    case SIN: EACH(sinf(x))
    case SQUARE: EACH(x * x)
    }
}

static void unary(const step *s, const place_of *here) {
    float *out = at(here, s->out);
    const float *a = at(here, s->a);
    for (int64_t r = 0; r < s->rows; r++) {
        float *to = out + r * s->cols;
        const float *from = a + r * s->a_row;
        if (s->a_col == 1)
            unary_row(to, from, 1, s->cols, (int)s->kind);
        else
            unary_row(to, from, s->a_col, s->cols, (int)s->kind);
        if (s->rounds) round_all(to, s->cols);
    }
}

#define PAIRS(expression)                             \
    for (int64_t j = 0; j < cols; j++) {              \
        float x = a[j * a_col], y = b[j * b_col];     \
        out[j] = (expression);                        \
    }                                                 \
    break;

static inline __attribute__((always_inline)) void binary_row(
    float *restrict out, const float *restrict a, int64_t a_col, const float *restrict b,
    int64_t b_col, int64_t cols, int function) {
    switch (function) {
    case ADD: PAIRS(x + y)
    case SUB: PAIRS(x - y)
    case MUL: PAIRS(x * y)
    case DIV: PAIRS(x / y)
    }
}

static void binary(const step *s, const place_of *here) {
    float *out = at(here, s->out);
    const float *a = at(here, s->a), *b = at(here, s->b);
    for (int64_t r = 0; r < s->rows; r++) {
        float *to = out + r * s->cols;
        const float *x = a + r * s->a_row, *y = b + r * s->b_row;
        if (s->a_col == 1 && s->b_col == 1)
            binary_row(to, x, 1, y, 1, s->cols, (int)s->kind);
        else if (s->a_col == 1 && s->b_col == 0)
            binary_row(to, x, 1, y, 0, s->cols, (int)s->kind);
        else
            binary_row(to, x, s->a_col, y, s->b_col, s->cols, (int)s->kind);
        if (s->rounds) round_all(to, s->cols);
    }
}

static float sum_of(const float *a, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) sum += a[j];
    return sum;
}

static void mean(const step *s, const place_of *here) {
    float *out = at(here, s->out);
    const float *a = at(here, s->a);
    for (int64_t r = 0; r < s->rows; r++)
        out[r] = sum_of(a + r * s->a_row, s->cols) / (float)s->cols;
    if (s->rounds) round_all(out, s->rows);
}

static void layer_norm(const step *s, const place_of *here) {
    float *out = at(here, s->out);
    const float *a = at(here, s->a), *weight = s->b ? at(here, s->b) : 0,
                *bias = s->c ? at(here, s->c) : 0;
    int64_t cols = s->cols;
    for (int64_t r = 0; r < s->rows; r++) {
        const float *x = a + r * s->a_row;
        float *y = out + r * cols;
        float middle = sum_of(x, cols) / (float)cols, spread = 0;
#pragma omp simd reduction(+ : spread)
        for (int64_t j = 0; j < cols; j++) spread += (x[j] - middle) * (x[j] - middle);
        float factor = 1.0f / sqrtf(spread / (float)cols + (float)s->f0);
        for (int64_t j = 0; j < cols; j++) {
            float value = (x[j] - middle) * factor;
            if (weight) value *= weight[j];
            if (bias) value += bias[j];
            y[j] = value;
        }
        if (s->rounds) round_all(y, cols);
    }
}

/* A row of a table of floats, for a token. */
static void embed(const step *s, const place_of *here) {
    int64_t width = s->cols, row = *(int64_t *)at(here, s->c);
    const char *table = at(here, s->a);
    load(at(here, s->out), table + row * width * (s->kind ? 2 : 4), width, (int)s->kind);
}

/* A row of a table of packed codes: one scale for each group of values. */
static void embed_packed(const step *s, const place_of *here) {
    int64_t width = s->cols, bytes = s->i0, groups = s->i1, row = *(int64_t *)at(here, s->c);
    const uint8_t *packed = (const uint8_t *)at(here, s->a) + row * bytes;
    const float *scale = (const float *)at(here, s->b) + row * groups;
    float *out = at(here, s->out);
    int8_t unpacked[width];
    const int8_t *codes = (const int8_t *)packed;
    if (s->kind < 8) {
        unpack_row(packed, unpacked, width, (int)s->kind);
        codes = unpacked;
    }
    for (int64_t j = 0; j < width; j++) out[j] = (float)codes[j] * scale[j / (width / groups)];
    if (s->rounds) round_all(out, width);
}

/* The contract of qatc/numerics/minmax.py: scale = max|x| / steps, 1 for zeros; code = round(x / scale). */
static void quantize_row(const float *restrict x, int8_t *restrict codes, float *scale_out,
                         int64_t count, float steps, float low, float high) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < count; j++) {
        uint32_t bits = as_bits(x[j]) & 0x7fffffffu; /* ordered as the values are */
        largest = bits > largest ? bits : largest;
    }
    float scale = (float)((double)as_float(largest) / (double)steps);
    if (scale == 0) scale = 1;
    *scale_out = scale;
    for (int64_t j = 0; j < count; j++) {
        float code = rintf(x[j] / scale);
        code = code < low ? low : code;
        code = code > high ? high : code;
        codes[j] = (int8_t)(int32_t)code;
    }
}

static void quantize(const step *s, const place_of *here) {
    quantized *out = at(here, s->out);
    quantize_row(at(here, s->a), out->codes, &out->scale, s->cols, (float)s->f0, (float)s->i0,
                 (float)s->i1);
    memset(out->codes + s->cols, 0, 512);
    int32_t sum = 0;
    for (int64_t j = 0; j < s->cols; j++) sum += out->codes[j];
    out->sum = sum;
}

/* ---------------------------------------------------------------- products */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

/* The sums of the lanes of four accumulators. */
static inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* dot_row of four rows at once; bits 4 or 8. A short row leaves no time to add up lanes alone. */
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

/* A linear in float. */
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

/* ---------------------------------------------------------------- attention */

enum { BLOCK = 64 }; /* slots whose scores are known before their values are read */

/* The codes of a slot as floats. */
static inline __attribute__((always_inline)) void unpack_floats(const uint8_t *restrict packed,
                                                                float *restrict out,
                                                                int64_t width, int bits) {
    if (bits == 4 && width % 2 == 0) {
        int64_t half = width / 2;
        for (int64_t j = 0; j < half; j++) {
            out[j] = (float)((packed[j] & 15) - 8);
            out[half + j] = (float)((packed[j] >> 4) - 8);
        }
    } else {
        int8_t unpacked[width];
        const int8_t *codes = (const int8_t *)packed;
        if (bits < 8) {
            unpack_row(packed, unpacked, width, bits);
            codes = unpacked;
        }
        for (int64_t j = 0; j < width; j++) out[j] = (float)codes[j];
    }
}

/* The layout of qatc/numerics/packing.py. */
static void pack_row(const int8_t *codes, uint8_t *plane, int64_t width, int bits) {
    if (bits == 8) {
        memcpy(plane, codes, (size_t)width);
        return;
    }
    int low = 0;
    for (int p = 4; p; p >>= 1) {
        if (!(bits & p)) continue;
        int64_t parts = 8 / p, count = (width + parts - 1) / parts;
        memset(plane, 0, (size_t)count);
        for (int64_t k = 0; k < width; k++) {
            int value = ((codes[k] + (1 << (bits - 1))) >> low) & ((1 << p) - 1);
            plane[k % count] = (uint8_t)(plane[k % count] | value << (k / count * p));
        }
        plane += count;
        low += p;
    }
}

static inline int64_t packed_bytes(int64_t width, int bits) {
    int64_t bytes = 0;
    if (bits == 8) return width;
    for (int p = 4; p; p >>= 1)
        if (bits & p) bytes += (width * p + 7) / 8;
    return bytes;
}

typedef struct {
    const float *query;
    const uint8_t *key_codes, *value_codes;
    const float *key_scale, *value_scale;
    float *found; /* for every head: the largest score, the sum of weights, that of values */
    int64_t kv_heads, group, capacity, begin, end;
    float factor;
} seen;

/* Attention of all heads over the slots from `begin` to `end`. */
static inline __attribute__((always_inline)) void look(const seen *s, int64_t width,
                                                       int64_t value_width, int bits) {
    int64_t key_bytes = packed_bytes(width, bits), value_bytes = packed_bytes(value_width, bits);
    int64_t group = s->group, record = value_width + 2;
    float scaled[group * width], sums[group * value_width], scores[group * BLOCK];
    float floats[width > value_width ? width : value_width], largest[group], total[group];
    for (int64_t h = 0; h < s->kv_heads; h++) {
        const float *key_scale = s->key_scale + h * s->capacity;
        const float *value_scale = s->value_scale + h * s->capacity;
        for (int64_t j = 0; j < group * width; j++)
            scaled[j] = s->query[h * group * width + j] * s->factor;
        memset(sums, 0, sizeof sums);
        for (int64_t g = 0; g < group; g++) largest[g] = -INFINITY, total[g] = 0;
        for (int64_t block = s->begin; block < s->end; block += BLOCK) {
            int64_t count = s->end - block < BLOCK ? s->end - block : BLOCK;
            const uint8_t *codes = s->key_codes + (h * s->capacity + block) * key_bytes;
            for (int64_t i = 0; i < count; i++) {
                unpack_floats(codes + i * key_bytes, floats, width, bits);
                for (int64_t g = 0; g < group; g++)
                    scores[g * BLOCK + i] =
                        dot_floats(scaled + g * width, floats, width) * key_scale[block + i];
            }
            for (int64_t g = 0; g < group; g++) {
                float *score = scores + g * BLOCK, most = largest[g];
                for (int64_t i = 0; i < count; i++) most = score[i] > most ? score[i] : most;
                if (most > largest[g]) {
                    float shrink = exp_(largest[g] - most);
                    for (int64_t j = 0; j < value_width; j++) sums[g * value_width + j] *= shrink;
                    total[g] *= shrink;
                    largest[g] = most;
                }
                for (int64_t i = 0; i < count; i++) score[i] = exp_(score[i] - most);
                total[g] += sum_of(score, count);
                for (int64_t i = 0; i < count; i++) score[i] *= value_scale[block + i];
            }
            codes = s->value_codes + (h * s->capacity + block) * value_bytes;
            for (int64_t i = 0; i < count; i++) {
                unpack_floats(codes + i * value_bytes, floats, value_width, bits);
                for (int64_t g = 0; g < group; g++) {
                    float weight = scores[g * BLOCK + i], *to = sums + g * value_width;
#pragma omp simd
                    for (int64_t j = 0; j < value_width; j++) to[j] += weight * floats[j];
                }
            }
        }
        for (int64_t g = 0; g < group; g++) {
            float *found = s->found + (h * group + g) * record;
            found[0] = largest[g];
            found[1] = total[g];
            memcpy(found + 2, sums + g * value_width, (size_t)value_width * 4);
        }
    }
}

/* Attention of one query over codes: each thread sees some of the slots, and leaves for every head
 * the largest score, the sum of the weights and the weighted sum of the values. The last thread
 * sees the slot that this step writes, and writes it.
 *
 * call: pointers to key codes, key scales, value codes and value scales [Hkv, S, ...] from i0 on
 * ints: slots held before, the first one that is seen, and S, at d
 */
static void attend(const step *s, const place_of *here) {
    const float *query = at(here, s->a);
    const int64_t *ints = (const int64_t *)at(here, s->d);
    int64_t heads = s->rows, width = s->cols, kv_heads = s->i1, value_width = s->i2;
    int64_t held = ints[0], first = ints[1], capacity = ints[2];
    int64_t group = heads / kv_heads;
    int bits = (int)s->kind;
    int64_t key_bytes = packed_bytes(width, bits), value_bytes = packed_bytes(value_width, bits);
    uint8_t *key_codes = (uint8_t *)here->call[s->i0];
    float *key_scale = (float *)here->call[s->i0 + 1];
    uint8_t *value_codes = (uint8_t *)here->call[s->i0 + 2];
    float *value_scale = (float *)here->call[s->i0 + 3];
    if (here->number == here->team - 1) {
        const float *key = at(here, s->b), *value = at(here, s->c);
        float steps = (float)s->f1, low = (float)s->b_row, high = (float)s->b_col;
        int8_t codes[width > value_width ? width : value_width];
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t slot = h * capacity + held;
            quantize_row(key + h * width, codes, key_scale + slot, width, steps, low, high);
            pack_row(codes, key_codes + slot * key_bytes, width, bits);
            quantize_row(value + h * value_width, codes, value_scale + slot, value_width, steps,
                         low, high);
            pack_row(codes, value_codes + slot * value_bytes, value_width, bits);
        }
    }
    int64_t slots = held + 1 - first;
    seen here_seen = {
        query, key_codes, value_codes, key_scale, value_scale,
        (float *)at(here, s->out) + here->number * heads * (value_width + 2),
        kv_heads, group, capacity, first + share(slots, here->number, here->team),
        first + share(slots, here->number + 1, here->team), (float)s->f0
    };
    /* The usual sizes as constants: loops over a head are then unrolled, which halves the time. */
    if (bits == 4 && width == 64 && value_width == 64)
        look(&here_seen, 64, 64, 4);
    else if (bits == 8 && width == 64 && value_width == 64)
        look(&here_seen, 64, 64, 8);
    else if (bits == 4 && width == 128 && value_width == 128)
        look(&here_seen, 128, 128, 4);
    else if (bits == 8 && width == 128 && value_width == 128)
        look(&here_seen, 128, 128, 8);
    else
        look(&here_seen, width, value_width, bits);
}

/* What the threads found in their slots becomes the result of attention. */
static void merge(const step *s, const place_of *here) {
    int64_t heads = s->rows, width = s->cols, record = width + 2;
    const float *partial = at(here, s->a);
    float *out = at(here, s->out);
    for (int64_t h = 0; h < heads; h++) {
        float largest = -INFINITY, total = 0, *restrict to = out + h * width;
        for (int64_t t = 0; t < here->team; t++) {
            float own = partial[(t * heads + h) * record];
            largest = own > largest ? own : largest;
        }
        memset(to, 0, (size_t)width * 4);
        for (int64_t t = 0; t < here->team; t++) {
            const float *found = partial + (t * heads + h) * record;
            if (found[0] == -INFINITY) continue;
            float factor = exp_(found[0] - largest);
            total += found[1] * factor;
            for (int64_t j = 0; j < width; j++) to[j] += found[2 + j] * factor;
        }
        for (int64_t j = 0; j < width; j++) to[j] /= total;
    }
    if (s->rounds) round_all(out, heads * width);
}

/* A result, in the dtype of the model. */
static void store(const step *s, const place_of *here) {
    const float *a = at(here, s->a);
    int64_t begin = share(s->cols, here->number, here->team);
    int64_t end = share(s->cols, here->number + 1, here->team);
    if (!s->kind)
        memcpy((float *)at(here, s->out) + begin, a + begin, (size_t)(end - begin) * 4);
    else
        for (int64_t j = begin; j < end; j++)
            ((uint16_t *)at(here, s->out))[j] = (uint16_t)(as_bits(a[j]) >> 16);
}

static void run_step(const step *s, const place_of *here, barrier *all) {
    switch (s->op) {
    case BARRIER: meet(all, here->team); break;
    case LOAD: load(at(here, s->out), at(here, s->a), s->cols, (int)s->kind); break;
    case UNARY: unary(s, here); break;
    case BINARY: binary(s, here); break;
    case MEAN: mean(s, here); break;
    case LAYER_NORM: layer_norm(s, here); break;
    case EMBED: embed(s, here); break;
    case EMBED_PACKED: embed_packed(s, here); break;
    case TO_FLOAT: *(float *)at(here, s->out) = (float)*(int64_t *)at(here, s->c); break;
    case QUANTIZE: quantize(s, here); break;
    case PRODUCT: product(s, here); break;
    case LINEAR: linear(s, here); break;
    case ATTEND: attend(s, here); break;
    case MERGE: merge(s, here); break;
    case STORE: store(s, here); break;
    }
}

/* Run all steps.
 *
 * scratch: `shared` bytes that all threads see, then `own` bytes for each of the threads
 * call: pointers to what belongs to this call
 */
void qatc_run_program(const void *steps, char *scratch, char **call, int64_t count, int64_t shared,
                      int64_t own, int threads) {
    barrier all = {0};
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        int64_t number = omp_get_thread_num(), team = omp_get_num_threads();
#else
        int64_t number = 0, team = 1;
#endif
        place_of here = {scratch + shared + number * own, scratch, call, number, team};
        for (int64_t i = 0; i < count; i++) run_step((const step *)steps + i, &here, &all);
    }
}
