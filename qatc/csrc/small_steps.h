/* Steps that every thread runs for itself, in memory of its own. */

#ifndef QATC_SMALL_STEPS_H
#define QATC_SMALL_STEPS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"
#include "packed.h"
#include "steps.h"

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

/* A row of a table of packed codes: one scale for each of the i1 groups of width / i1 values. */
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

/* Sums and differences of rows that are 1, 2, 4 .. P / 2 apart, over the root of P, after a product of
 * every row with the matrix of the odd factor M. */
static void hadamard_row(const float *restrict a, const float *restrict odd, float *restrict out,
                         int64_t rows, int64_t cols) {
    float factor = 1.0f / sqrtf((float)rows);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < cols; j++) {
            float x = a[r * cols + j] * factor;
            for (int64_t k = 0; k < cols; k++)
                out[r * cols + k] = (j ? out[r * cols + k] : 0) + x * odd[j * cols + k];
        }
    for (int64_t apart = cols; apart < rows * cols; apart *= 2)
        for (int64_t block = 0; block < rows * cols; block += 2 * apart) {
            float *restrict low = out + block, *restrict high = out + block + apart;
            for (int64_t j = 0; j < apart; j++) {
                float x = low[j], y = high[j];
                low[j] = x + y;
                high[j] = x - y;
            }
        }
}

static void hadamard(const step *s, const place_of *here) {
    int64_t width = s->rows * s->cols;
    float *out = at(here, s->out);
    const float *a = at(here, s->a), *odd = at(here, s->b);
    for (int64_t i = 0; i < s->i0; i++)
        hadamard_row(a + i * width, odd, out + i * width, s->rows, s->cols);
    if (s->rounds) round_all(out, s->i0 * width);
}

enum rule { BY_DIVISION, BY_RECIPROCAL, SIGNED };

/* The contract of qatc/numerics/minmax.py: scale = max|x| / steps, 1 below 2^-124; code = round(x / scale).
 * By reciprocal: scale of at least 2^-23; code = round(x * (1 / scale)). Signed: the scale is negative
 * where the largest value is positive. A factor other than 1 makes a learned scale of it. */
static void quantize_row(const float *restrict x, int8_t *restrict codes, float *scale_out,
                         int64_t count, float steps, float low, float high, enum rule rule,
                         float factor) {
    int by_reciprocal = rule == BY_RECIPROCAL;
    uint32_t largest = 0;
    int32_t highest = INT32_MIN; /* of the bits as integers, which order what is not negative */
    for (int64_t j = 0; j < count; j++) {
        uint32_t bits = as_bits(x[j]) & 0x7fffffffu; /* ordered as the values are */
        largest = bits > largest ? bits : largest;
        highest = (int32_t)as_bits(x[j]) > highest ? (int32_t)as_bits(x[j]) : highest;
    }
    double exact = (double)as_float(largest) / (double)steps;
    float scale = exact < 0x1p-124 ? 1 : (float)exact;
    if (by_reciprocal) scale = exact < 0x1p-23 ? 0x1p-23f : (float)exact;
    /* As minmax.py has it: where the greatest value is as large as the largest magnitude. */
    if (rule == SIGNED && (highest == (int32_t)largest || largest == 0)) scale = -scale;
    scale *= factor;
    *scale_out = scale;
    float reciprocal = 1 / scale;
    for (int64_t j = 0; j < count; j++) {
        float code = rintf(by_reciprocal ? x[j] * reciprocal : x[j] / scale);
        code = code < low ? low : code;
        code = code > high ? high : code;
        codes[j] = (int8_t)(int32_t)code;
    }
}

/* The contract of qatc/numerics/asymmetric.py; what it finds is a scale and, behind it, an offset. */
static void quantize_row_asymmetric(const float *restrict x, int8_t *restrict codes,
                                    float *parameters, int64_t count, float steps, float low,
                                    float high, float factor) {
    float least = x[0], greatest = x[0];
    for (int64_t j = 0; j < count; j++) {
        /* What is no number compares with nothing, and goes on into the scale. */
        least = x[j] < least || x[j] != x[j] ? x[j] : least;
        greatest = x[j] > greatest || x[j] != x[j] ? x[j] : greatest;
    }
    double exact = ((double)greatest - (double)least) / (double)steps;
    int equal = exact < 0x1p-124;
    float scale = (equal ? 1 : (float)exact) * factor;
    float middle = (float)(((double)least + (double)greatest) / 2);
    float offset = equal ? middle : middle + scale * 0.5f;
    parameters[0] = scale;
    parameters[1] = offset;
    for (int64_t j = 0; j < count; j++) {
        float code = rintf((x[j] - offset) / scale);
        code = code < low ? low : code;
        code = code > high ? high : code;
        codes[j] = (int8_t)(int32_t)code;
    }
}

static void quantize(const step *s, const place_of *here) {
    quantized *out = at(here, s->out);
    quantize_row(at(here, s->a), out->codes, &out->scale, s->cols, (float)s->f0, (float)s->i0,
                 (float)s->i1, (enum rule)s->kind, 1);
    memset(out->codes + s->cols, 0, 512);
    int32_t sum = 0;
    for (int64_t j = 0; j < s->cols; j++) sum += out->codes[j];
    out->sum = sum;
}

#endif
