/* Products with packed integer codes: the codes are unpacked in registers, or a row at a time in the
 * cache of a core, and no more than that is ever written to memory.
 *
 * The layout is that of qatc/numerics/packing.py: a code of b bits, made unsigned by adding 2^(b-1), is cut
 * into planes of 4, 2 and 1 bits, the low bits first; a plane of p bits holds, in byte j, the j-th
 * value of each of the 8 / p equal parts of the row. 8 bits are plain int8. A row of K codes of 6 bits
 * is [ceil(K / 2) bytes of plane 4 | ceil(K / 4) bytes of plane 2], and with n = ceil(K / 2) byte j of
 * the first holds the low 4 bits of the codes j and n + j.
 *
 * The loops are plain C that compilers turn into dot-product instructions (VNNI, i8mm) where the
 * processor has them. All integer sums are exact. qatc_unpack alone writes all codes, for others.
 */

#include <stdint.h>
#include <string.h>

#include "packed.h"

/* Whether the loops over outputs are shared by threads. */
int qatc_is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* The sum of u[j] * x[j] over one part of a plane, for u the p bits at `shift` of every byte. */
#define PART(bytes, x, count, shift, mask, sum)                        \
    for (int64_t j = 0; j < (count); j++)                              \
        (sum) += (int32_t)(uint8_t)(((bytes)[j] >> (shift)) & (mask)) * (int32_t)(x)[j];

/* The same over whole planes of `count` bytes: w: uint8 [count], x: int8 [8 / p * count]. */
static int32_t dot_plane4(const uint8_t *restrict w, const int8_t *restrict x, int64_t count) {
    int32_t low = 0, high = 0;
    for (int64_t j = 0; j < count; j++) {
        low += (int32_t)(uint8_t)(w[j] & 15) * (int32_t)x[j];
        high += (int32_t)(uint8_t)(w[j] >> 4) * (int32_t)x[count + j];
    }
    return low + high;
}

static int32_t dot_plane2(const uint8_t *restrict w, const int8_t *restrict x, int64_t count) {
    int32_t sum = 0;
    PART(w, x, count, 0, 3, sum)
    PART(w, x + count, count, 2, 3, sum)
    PART(w, x + 2 * count, count, 4, 3, sum)
    PART(w, x + 3 * count, count, 6, 3, sum)
    return sum;
}

static int32_t dot_plane1(const uint8_t *restrict w, const int8_t *restrict x, int64_t count) {
    int32_t sum = 0;
    for (int part = 0; part < 8; part++) PART(w, x + part * count, count, part, 1, sum)
    return sum;
}

/* Codes of 8 bits are stored as they are; made unsigned, they fit the same instructions.
 * w, x: [count]. */
static int32_t dot_bytes(const uint8_t *restrict w, const int8_t *restrict x, int64_t count) {
    int32_t sum = 0;
    for (int64_t j = 0; j < count; j++)
        sum += (int32_t)(uint8_t)(w[j] ^ 128) * (int32_t)x[j];
    return sum;
}

/* The sum of code * x over a row of `width` codes of 2 to 8 bits; x is padded to 8 with zeros.
 *
 * The planes hold u = code + 2^(bits-1), so that the sum of u * x is too large by x_sum times that.
 */
int32_t dot_row(const uint8_t *w, const int8_t *x, int64_t width, int bits, int32_t x_sum) {
    int32_t sum = 0;
    int low = 0;
    if (bits == 8) return dot_bytes(w, x, width) - x_sum * 128;
    if (bits & 4) {
        int64_t count = (width + 1) / 2;
        sum += dot_plane4(w, x, count);
        w += count;
        low = 4;
    }
    if (bits & 2) {
        int64_t count = (width + 3) / 4;
        sum += dot_plane2(w, x, count) * (1 << low);
        w += count;
        low += 2;
    }
    if (bits & 1) sum += dot_plane1(w, x, (width + 7) / 8) * (1 << low);
    return sum - x_sum * (1 << (bits - 1));
}

/* The codes of one packed row of 2 to 7 bits, as int8 [width]. */
void unpack_row(const uint8_t *restrict plane, int8_t *restrict row, int64_t width, int bits) {
    int low = 0;
    for (int p = 4; p; p >>= 1) {
        if (!(bits & p)) continue;
        int64_t parts = 8 / p, count = (width + parts - 1) / parts;
        uint8_t mask = (uint8_t)((1 << p) - 1);
        for (int64_t part = 0; part < parts; part++) {
            int64_t left = width - part * count, end = left < count ? left : count;
            int8_t *restrict out = row + part * count;
            int shift = (int)part * p;
            if (low == 0)
                for (int64_t j = 0; j < end; j++)
                    out[j] = (int8_t)(((plane[j] >> shift) & mask) - (1 << (bits - 1)));
            else
                for (int64_t j = 0; j < end; j++)
                    out[j] += (int8_t)(((plane[j] >> shift) & mask) << low);
        }
        plane += count;
        low += p;
    }
}

/* out[m, n] = sum over k of x[m, k] * code[n, k].
 *
 * x: int8 [rows, stride], zero from `width` on, stride a multiple of 8
 * w: uint8 [outputs, bytes], or int8 for 8 bits
 * out: int32 [rows, outputs]
 */
void qatc_packed_product(const int8_t *x, const uint8_t *w, int32_t *out, int64_t rows,
                         int64_t stride, int64_t outputs, int64_t width, int64_t bytes, int bits,
                         int threads) {
    int32_t sums[16]; /* MAX_ROWS of qatc/kernels/native.py */
    for (int64_t m = 0; m < rows; m++) {
        sums[m] = 0;
        for (int64_t k = 0; k < width; k++) sums[m] += x[m * stride + k];
    }
    /* Planes of single bits are slow to multiply: several rows of x share a row unpacked. */
    int unpacks = bits & 1 && rows > 1 && width <= 1 << 16;
#pragma omp parallel num_threads(threads)
    {
        int8_t codes[unpacks ? width : 1];
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n++) {
            const uint8_t *row = w + n * bytes;
            for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + bytes + j);
            if (unpacks) unpack_row(row, codes, width, bits);
            for (int64_t m = 0; m < rows; m++)
                out[m * outputs + n] =
                    unpacks ? dot_row((const uint8_t *)codes, x + m * stride, width, 8, sums[m])
                            : dot_row(row, x + m * stride, width, bits, sums[m]);
        }
    }
}

/* codes[n, k] of packed rows, as int8 [outputs, width]. */
void qatc_unpack(const uint8_t *w, int8_t *codes, int64_t outputs, int64_t width, int64_t bytes,
                 int bits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < outputs; n++)
        unpack_row(w + n * bytes, codes + n * width, width, bits);
}

static float dot_float(const float *restrict a, const float *restrict b, int64_t count) {
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0; /* each waits for its own last value only */
    int64_t part = count / 4;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t j = 0; j < part; j++) {
        sum0 += a[j] * b[j];
        sum1 += a[part + j] * b[part + j];
        sum2 += a[2 * part + j] * b[2 * part + j];
        sum3 += a[3 * part + j] * b[3 * part + j];
    }
    for (int64_t j = 4 * part; j < count; j++) sum0 += a[j] * b[j];
    return (sum0 + sum1) + (sum2 + sum3);
}

/* The nearest bf16, ties to even, of a finite float. */
static float round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    memcpy(&value, &bits, 4);
    return value;
}

/* out[m, n] = sum over k of x[m, k] * (code[n, k] * scale[n, group of k]).
 *
 * One row of the weight at a time is dequantized, into the cache of a core, for all rows of x. With
 * `bf16` its values are rounded as those of a bf16 weight are.
 *
 * x: float [rows, width]
 * w: uint8 [outputs, bytes], or int8 for 8 bits
 * scale: float [outputs, groups]
 * out: float [rows, outputs]
 */
void qatc_scaled_product(const float *x, const uint8_t *w, const float *scale, float *out,
                         int64_t rows, int64_t outputs, int64_t width, int64_t bytes,
                         int64_t groups, int bits, int bf16, int threads) {
    int64_t group = width / groups;
#pragma omp parallel num_threads(threads)
    {
        int8_t unpacked[width];
        float row[width];
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n++) {
            const int8_t *codes = (const int8_t *)(w + n * bytes);
            if (bits < 8) {
                unpack_row(w + n * bytes, unpacked, width, bits);
                codes = unpacked;
            }
            for (int64_t g = 0; g < groups; g++) {
                float own = scale[n * groups + g];
                for (int64_t k = g * group; k < (g + 1) * group; k++) row[k] = own * (float)codes[k];
                if (bf16)
                    for (int64_t k = g * group; k < (g + 1) * group; k++)
                        row[k] = round_to_bf16(row[k]);
            }
            for (int64_t m = 0; m < rows; m++)
                out[m * outputs + n] = dot_float(row, x + m * width, width);
        }
    }
}
