/* Attention of one query over a cache of codes, whose slots the threads share out. */

#ifndef QATC_ATTENTION_STEPS_H
#define QATC_ATTENTION_STEPS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"
#include "packed.h"
#include "small_steps.h"
#include "steps.h"
#include "threads.h"

enum { BLOCK = 64 }; /* slots whose scores are known before their values are read */

/* The codes of a slot as floats [width]. At 4 bits the low halves of the bytes are its first half. */
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

/* The inverse of unpack_row: int8 [width] into planes of bytes, as qatc/numerics/packing.py has them. */
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
    float *found; /* for every head: the largest score, the sum of weights, that of values [E] */
    int64_t kv_heads, group, capacity, begin, end;
    int64_t numbers; /* of a slot: its scale and, if there are two, its offset */
    float factor;
} seen;

/* Attention of all heads over the slots from `begin` to `end`: softmax in one pass, by blocks.
 *
 * Query heads [H, D] are G groups of H / G, which share a key head: scaled [group, D], sums [group, E],
 * scores [group, BLOCK], and largest and total [group] are of one group at a time; floats holds the
 * key or the value of one slot. A scale is one number for a slot of a head: that of the key goes onto
 * its score, that of the value onto its weight. An offset is the same in every value of a slot: that
 * of the key meets the sum of the query, total_of [group], and those of the values, weighted, are one
 * number for a head, shift [group]. Sums are relative to the largest score so far, and shrink when a
 * larger one is met.
 */
static inline __attribute__((always_inline)) void look(const seen *s, int64_t width,
                                                       int64_t value_width, int bits,
                                                       int value_bits) {
    int64_t key_bytes = packed_bytes(width, bits);
    int64_t value_bytes = packed_bytes(value_width, value_bits);
    int64_t group = s->group, record = value_width + 2;
    float scaled[group * width], sums[group * value_width], scores[group * BLOCK];
    float floats[width > value_width ? width : value_width], largest[group], total[group];
    float total_of[group], shift[group];
    int64_t numbers = s->numbers;
    for (int64_t h = 0; h < s->kv_heads; h++) {
        const float *key_scale = s->key_scale + h * s->capacity * numbers;
        const float *value_scale = s->value_scale + h * s->capacity * numbers;
        for (int64_t j = 0; j < group * width; j++)
            scaled[j] = s->query[h * group * width + j] * s->factor;
        memset(sums, 0, sizeof sums);
        for (int64_t g = 0; g < group; g++) {
            largest[g] = -INFINITY, total[g] = shift[g] = 0;
            total_of[g] = numbers == 2 ? sum_of(scaled + g * width, width) : 0;
        }
        for (int64_t block = s->begin; block < s->end; block += BLOCK) {
            int64_t count = s->end - block < BLOCK ? s->end - block : BLOCK;
            const uint8_t *codes = s->key_codes + (h * s->capacity + block) * key_bytes;
            for (int64_t i = 0; i < count; i++) {
                unpack_floats(codes + i * key_bytes, floats, width, bits);
                for (int64_t g = 0; g < group; g++)
                    scores[g * BLOCK + i] = dot_floats(scaled + g * width, floats, width) *
                                            key_scale[(block + i) * numbers];
            }
            for (int64_t i = 0; numbers == 2 && i < count; i++)
                for (int64_t g = 0; g < group; g++)
                    scores[g * BLOCK + i] += total_of[g] * key_scale[(block + i) * 2 + 1];
            for (int64_t g = 0; g < group; g++) {
                float *score = scores + g * BLOCK, most = largest[g];
                for (int64_t i = 0; i < count; i++) most = score[i] > most ? score[i] : most;
                if (most > largest[g]) {
                    float shrink = exp_(largest[g] - most);
                    for (int64_t j = 0; j < value_width; j++) sums[g * value_width + j] *= shrink;
                    total[g] *= shrink, shift[g] *= shrink;
                    largest[g] = most;
                }
                for (int64_t i = 0; i < count; i++) score[i] = exp_(score[i] - most);
                total[g] += sum_of(score, count);
                for (int64_t i = 0; numbers == 2 && i < count; i++)
                    shift[g] += score[i] * value_scale[(block + i) * 2 + 1];
                for (int64_t i = 0; i < count; i++) score[i] *= value_scale[(block + i) * numbers];
            }
            codes = s->value_codes + (h * s->capacity + block) * value_bytes;
            for (int64_t i = 0; i < count; i++) {
                unpack_floats(codes + i * value_bytes, floats, value_width, value_bits);
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
            for (int64_t j = 0; j < value_width; j++)
                found[2 + j] = sums[g * value_width + j] + shift[g];
        }
    }
}

enum { RESTRICTED_RANGE, FULL_RANGE, SIGNED_RANGE, ASYMMETRIC_RANGE }; /* of keys and values */

/* One key or value goes into its slot: its codes, and its scale, or its scale and offset. Least and
 * greatest code, and the steps of a scale, are those of qatc/recipe/spec.py. */
static void write_slot(const float *x, uint8_t *slot, float *parameters, int64_t width, int bits,
                       int range, float factor) {
    int8_t codes[width];
    float half = (float)(1 << (bits - 1)), high = half - 1;
    float low = range == RESTRICTED_RANGE ? -high : -half;
    if (range == ASYMMETRIC_RANGE)
        quantize_row_asymmetric(x, codes, parameters, width, 2 * half - 1, low, high, factor);
    else
        quantize_row(x, codes, parameters, width, range == FULL_RANGE ? half - .5f : -low, low,
                     high, range == SIGNED_RANGE ? SIGNED : BY_DIVISION, factor);
    pack_row(codes, slot, width, bits);
}

/* Attention of one query over codes: each thread sees some of the slots, and leaves for every head
 * the largest score, the sum of the weights and the weighted sum of the values. The last thread
 * sees the slot that this step writes, and writes it.
 *
 * call: from i0 on, pointers to key codes [G, S, bytes of D codes], key scales [G, S], value codes and
 * value scales; G is i1, E is i2, f0 the factor on scores
 * kind, i3: bits of keys and of values; b_row: their range, of which the asymmetric one has scales
 * [G, S, 2]; a_row, a_col: addresses of factors [G] on the scales of keys and of values, or none
 * ints: slots held before, the first one that is seen, and S, at d
 */
static void attend(const step *s, const place_of *here) {
    const float *query = at(here, s->a);
    const int64_t *ints = (const int64_t *)at(here, s->d);
    int64_t heads = s->rows, width = s->cols, kv_heads = s->i1, value_width = s->i2;
    int64_t held = ints[0], first = ints[1], capacity = ints[2];
    int64_t group = heads / kv_heads;
    int bits = (int)s->kind, value_bits = (int)s->i3, range = (int)s->b_row;
    int64_t numbers = range == ASYMMETRIC_RANGE ? 2 : 1;
    int64_t key_bytes = packed_bytes(width, bits);
    int64_t value_bytes = packed_bytes(value_width, value_bits);
    uint8_t *key_codes = (uint8_t *)here->call[s->i0];
    float *key_scale = (float *)here->call[s->i0 + 1];
    uint8_t *value_codes = (uint8_t *)here->call[s->i0 + 2];
    float *value_scale = (float *)here->call[s->i0 + 3];
    if (here->number == here->team - 1) {
        const float *key = at(here, s->b), *value = at(here, s->c);
        const float *key_factor = at(here, s->a_row), *value_factor = at(here, s->a_col);
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t slot = h * capacity + held;
            write_slot(key + h * width, key_codes + slot * key_bytes, key_scale + slot * numbers,
                       width, bits, range, key_factor ? key_factor[h] : 1);
            write_slot(value + h * value_width, value_codes + slot * value_bytes,
                       value_scale + slot * numbers, value_width, value_bits, range,
                       value_factor ? value_factor[h] : 1);
        }
    }
    int64_t slots = held + 1 - first;
    seen here_seen = {
        query, key_codes, value_codes, key_scale, value_scale,
        (float *)at(here, s->out) + here->number * heads * (value_width + 2),
        kv_heads, group, capacity, first + share(slots, here->number, here->team),
        first + share(slots, here->number + 1, here->team), numbers, (float)s->f0
    };
    /* The usual sizes as constants: loops over a head are then unrolled, which halves the time. */
    int64_t usual = width == value_width && (width == 64 || width == 128) ? width : 0;
    int pair = usual ? 10 * bits + value_bits : 0;
    if (pair == 44 && usual == 64)
        look(&here_seen, 64, 64, 4, 4);
    else if (pair == 88 && usual == 64)
        look(&here_seen, 64, 64, 8, 8);
    else if (pair == 84 && usual == 64)
        look(&here_seen, 64, 64, 8, 4);
    else if (pair == 44)
        look(&here_seen, 128, 128, 4, 4);
    else if (pair == 88)
        look(&here_seen, 128, 128, 8, 8);
    else if (pair == 84)
        look(&here_seen, 128, 128, 8, 4);
    else
        look(&here_seen, width, value_width, bits, value_bits);
}

/* What the threads found in their slots, partial [team, H, E + 2], becomes the result [H, E]: their sums
 * are brought to the largest score of all. A thread that had no slots found -inf. */
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

#endif
