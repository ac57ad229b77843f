/* What a program is made of, and where its values lie; for program.c alone. */

#ifndef QATC_STEPS_H
#define QATC_STEPS_H

#include <stdint.h>

enum op {
    BARRIER, LOAD, UNARY, BINARY, MEAN, LAYER_NORM, EMBED, EMBED_PACKED, TO_FLOAT, QUANTIZE,
    PRODUCT, LINEAR, ATTEND, MERGE, STORE, HADAMARD
};
enum unary { COPY, NEG, SILU, GELU, GELU_TANH, RSQRT, SQRT, TANH, RELU, EXP, SIGMOID, COS, SIN, SQUARE };
enum binary { ADD, SUB, MUL, DIV };
enum place { ABSOLUTE, PRIVATE, SHARED, CALL };

/* A step. Addresses are an offset or a pointer times 8, plus a place; 0 is none. Strides count values,
 * and one of 0 repeats a value. With `rounds` the results, fp32 in memory, are rounded to bf16.
 *
 * All values are fp32 where nothing else is said; N outputs, K inputs, V tokens, H query heads, G key
 * and value heads, D and E values of a key and of a value.
 *
 *   LOAD          out[cols] = a[cols], which is bf16 where kind is 1
 *   UNARY         out[rows, cols] = f(a[rows, cols]); a by strides, out dense; kind: f
 *   BINARY        out[rows, cols] = f(a[rows, cols], b[rows, cols]); a and b by strides
 *   MEAN          out[rows] = means of a[rows, cols]
 *   LAYER_NORM    out[rows, cols]; b, c: weight and bias [cols], or none; f0: epsilon
 *   EMBED         out[cols] = a[token, :] of a[V, cols], bf16 where kind is 1; c: the token, int64
 *   EMBED_PACKED  the same of codes a[V, i0 bytes] of `kind` bits, with scales b[V, i1]
 *   TO_FLOAT      out[1] = c[1], int64
 *   QUANTIZE      out: `quantized` from a[cols]; f0: steps, i0 and i1: least and greatest code;
 *                 kind is 1 where the scale's reciprocal is multiplied with
 *   PRODUCT       out[N = rows] from a: `quantized` of K = cols, b: codes [N, i0 bytes] of `kind` bits,
 *                 c: scales [N], d: bias [N] or none
 *   LINEAR        out[N = rows] from a[K = cols], b[N, K], bf16 where kind is 1, d: bias [N] or none
 *   ATTEND        out[team, H, E + 2] from a: query [H = rows, D = cols], b: key [G, D], c: value
 *                 [G, E]; see attention_steps.h
 *   MERGE         out[H = rows, E = cols] from a: the result of ATTEND
 *   STORE         out[cols] = a[cols], out being bf16 where kind is 1
 *   HADAMARD      for i0 rows: out[P = rows, M = cols] = Hadamard matrix of P . a[P, M] . b[M, M], P
 *                 a power of two
 */
typedef struct {
    int64_t op, kind, rounds, out, a, b, c, d; /* kind: function, dtype or bits */
    int64_t rows, cols, a_row, a_col, b_row, b_col;
    int64_t i0, i1, i2, i3;
    double f0;
} step;

typedef struct {
    char *own, *shared, **call;
    int64_t number, team;
} place_of;

/* What a quantized input is in memory: x = codes * scale, the sum of the K codes, and behind those
 * 512 zeros, which products with whole vectors of codes read. */
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

#endif
