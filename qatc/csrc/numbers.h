/* Arithmetic on single values and dense rows. */

#ifndef QATC_NUMBERS_H
#define QATC_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

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

static float sum_of(const float *a, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) sum += a[j];
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

#endif
