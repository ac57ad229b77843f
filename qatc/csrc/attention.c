/* Decode attention over a KV cache in floats: one query per row, every row at its own length.
 *
 * What it costs is the sum of the rows' lengths. The heads of a group share what is read of keys and
 * values. Sums and softmax are in fp32, whatever the cache; a (row, group) pair is computed by one
 * thread in one order, so that a row's result depends on nothing but that row.
 */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define CHUNK 64 /* slots whose keys, then values, are held as fp32 in a core's first cache */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

/* Whether the loop over rows and groups is shared by threads. */
int qatc_is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static inline vec load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, vec value) { memcpy(to, &value, sizeof value); }

static inline vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

#if defined(__clang__) || __GNUC__ >= 12
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#else
#define EVEN(a, b) \
    __builtin_shuffle(a, b, (ivec){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30})
#define ODD(a, b) \
    __builtin_shuffle(a, b, (ivec){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31})
#endif

/* Lane i of the result is the sum of all lanes of parts[i]. */
static inline vec sums(vec parts[LANES]) {
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count / 2; i++) {
            vec a = parts[2 * i], b = parts[2 * i + 1];
            parts[i] = EVEN(a, b) + ODD(a, b);
        }
    return parts[0];
}

/* exp(x) for x <= 0, to some units of the last place; below -87, where it is 1e-38, as there. */
static inline vec exponential(vec x) {
    const float shift = 12582912.f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec low = (vec){0} - 87.f;
    ivec below = x < low; /* not of a NaN, which stays one */
    x = (vec)(((ivec)low & below) | ((ivec)x & ~below));
    vec n = (x * 1.44269504f + shift) - shift;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + .5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}

static void widen_values(const void *from, float *restrict to, int64_t count, int bf16) {
    if (!bf16) {
        memcpy(to, from, 4 * (size_t)count);
        return;
    }
    const uint16_t *restrict source = from;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)source[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

/* `count` rows of `width` values as fp32, padded with zeros to `padded` values a row. */
static void widen(const void *from, float *restrict to, int64_t count, int64_t width,
                  int64_t padded, int bf16) {
    if (width == padded) {
        widen_values(from, to, count * width, bf16);
        return;
    }
    for (int64_t s = 0; s < count; s++) {
        float *row = to + s * padded;
        widen_values((const char *)from + (bf16 ? 2 : 4) * s * width, row, width, bf16);
        for (int64_t d = width; d < padded; d++) row[d] = 0;
    }
}

/* The nearest bf16, ties to even; NaN stays NaN. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* scores[s] = q . keys[s] for `count` slots, rounded up to LANES. q: [padded], keys: [CHUNK, padded],
 * scores: [CHUNK]; what lies beyond `count` is masked by weigh. */
INLINE void multiply_keys(const float *q, const float *keys, float *scores, int64_t count,
                                 int64_t padded) {
    for (int64_t s = 0; s < count; s += LANES) {
        vec parts[LANES];
        for (int i = 0; i < LANES; i++) {
            const float *key = keys + (s + i) * padded;
            vec sum = load(q) * load(key);
            for (int64_t d = LANES; d < padded; d += LANES) sum += load(q + d) * load(key + d);
            parts[i] = sum;
        }
        store(scores + s, sums(parts));
    }
}

/* out[h] = out[h] * factor[h] + weights[h] @ values for one or two heads: sums of several vectors at
 * once, since each waits for its own last value. weights: [heads, CHUNK], values: [CHUNK, padded],
 * out: [heads, padded], factor: [heads]. */
INLINE void add_values(const float *weights, const float *values, float *out, int64_t count,
                              int64_t padded, const float *factor, int heads) {
    for (int64_t start = 0; start < padded; start += 4 * LANES) {
        int64_t left = (padded - start) / LANES, parts = left < 4 ? left : 4;
        vec sums[2][4];
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < parts; i++)
                sums[h][i] = load(out + h * padded + start + i * LANES) * factor[h];
        for (int64_t s = 0; s < count; s++)
            for (int i = 0; i < parts; i++) {
                vec value = load(values + s * padded + start + i * LANES);
                for (int h = 0; h < heads; h++) sums[h][i] += weights[h * CHUNK + s] * value;
            }
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < parts; i++)
                store(out + h * padded + start + i * LANES, sums[h][i]);
    }
}

INLINE void keys_of(const float *q, const float *keys, float *scores, int64_t heads,
                           int64_t count, int64_t padded) {
    for (int64_t h = 0; h < heads; h++)
        multiply_keys(q + h * padded, keys, scores + h * CHUNK, count, padded);
}

INLINE void values_of(const float *weights, const float *values, float *out, int64_t heads,
                             int64_t count, int64_t padded, const float *factor) {
    int64_t h = 0;
    for (; h + 2 <= heads; h += 2)
        add_values(weights + h * CHUNK, values, out + h * padded, count, padded, factor + h, 2);
    if (h < heads)
        add_values(weights + h * CHUNK, values, out + h * padded, count, padded, factor + h, 1);
}

/* The usual head dimensions are constants to the compiler, which unrolls the loops over them. */
static void all_keys(const float *q, const float *keys, float *scores, int64_t heads, int64_t count,
                     int64_t padded) {
    switch (padded) {
    case 64: keys_of(q, keys, scores, heads, count, 64); break;
    case 128: keys_of(q, keys, scores, heads, count, 128); break;
    default: keys_of(q, keys, scores, heads, count, padded);
    }
}

static void all_values(const float *weights, const float *values, float *out, int64_t heads,
                       int64_t count, int64_t padded, const float *factor) {
    switch (padded) {
    case 64: values_of(weights, values, out, heads, count, 64, factor); break;
    case 128: values_of(weights, values, out, heads, count, 128, factor); break;
    default: values_of(weights, values, out, heads, count, padded, factor);
    }
}

/* Ask memory for what is read next, while this is computed: chunks are too short for the processor
 * to foresee it. */
static inline void prefetch(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* Scores [CHUNK] of a chunk of `count` slots become weights relative to the largest score so far; their sum is returned, and
 * in `factor` what the weights before them are to be multiplied by. */
static float weigh(float *scores, int64_t count, float *largest, float *factor) {
    for (int64_t s = count; s < CHUNK; s++) scores[s] = -__builtin_inff();
    vec top = load(scores);
    for (int64_t s = LANES; s < CHUNK; s += LANES) top = larger(top, load(scores + s));
    float most = *largest;
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    vec change = {*largest - most};
    *factor = exponential(change)[0];
    *largest = most;
    for (int64_t s = 0; s < count; s += LANES)
        store(scores + s, exponential(load(scores + s) - most));
    for (int64_t s = count; s < CHUNK; s++) scores[s] = 0;
    vec total = load(scores);
    for (int64_t s = LANES; s < CHUNK; s += LANES) total += load(scores + s);
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    return sum;
}

/* Write the new key and value of every row into its slot, then attend to all slots up to that one.
 *
 * A group is a head of keys and values, and `heads` the query heads that share it.
 *
 * query: [rows, groups * heads, width]; key: [rows, groups, width]; value: [rows, groups, deep];
 * out: [rows, groups * heads, deep]; all dense, of fp32 or bf16
 * caches: [rows, groups, slots, width or deep] of the same kind; a row and a group begin every so
 * many elements, given as row and group strides; slots are dense
 * positions: [rows]
 */
void qatc_row_attention(const void *query, const void *key, const void *value, void *key_cache,
                        void *value_cache, const int64_t *positions, void *out, int64_t rows,
                        int64_t groups, int64_t heads, int64_t width, int64_t deep,
                        int64_t key_row, int64_t key_group, int64_t value_row, int64_t value_group,
                        float scale, int bf16, int threads) {
    int64_t size = bf16 ? 2 : 4;
    int64_t wide = (width + LANES - 1) / LANES * LANES, high = (deep + LANES - 1) / LANES * LANES;
    int64_t widest = wide > high ? wide : high;
#pragma omp parallel num_threads(threads)
    {
        /* Of one (row, group): q [heads, wide], held [CHUNK, wide or high], weights [heads, CHUNK] and
         * sum [heads, high]; wide and high are width and deep rounded up to LANES. */
        float q[heads * wide], held[CHUNK * widest], weights[heads * CHUNK], sum[heads * high];
        float largest[heads], total[heads], factor[heads];
        /* The last group of LANES slots of a chunk is multiplied whole. */
        memset(held, 0, sizeof held);
#pragma omp for schedule(dynamic)
        for (int64_t pair = 0; pair < rows * groups; pair++) {
            int64_t row = pair / groups, group = pair % groups, last = positions[row];
            char *keys = (char *)key_cache + size * (row * key_row + group * key_group);
            char *values = (char *)value_cache + size * (row * value_row + group * value_group);
            memcpy(keys + size * last * width, (const char *)key + size * pair * width,
                   (size_t)(size * width));
            memcpy(values + size * last * deep, (const char *)value + size * pair * deep,
                   (size_t)(size * deep));
            widen((const char *)query + size * pair * heads * width, q, heads, width, wide, bf16);
            for (int64_t i = 0; i < heads * wide; i++) q[i] *= scale;
            memset(sum, 0, sizeof sum);
            for (int64_t h = 0; h < heads; h++) largest[h] = -__builtin_inff(), total[h] = 0;
            for (int64_t start = 0; start <= last; start += CHUNK) {
                int64_t left = last + 1 - start, count = left < CHUNK ? left : CHUNK;
                widen(keys + size * start * width, held, count, width, wide, bf16);
                prefetch(values + size * start * deep, size * count * deep);
                all_keys(q, held, weights, heads, count, wide);
                for (int64_t h = 0; h < heads; h++) {
                    float added = weigh(weights + h * CHUNK, count, largest + h, factor + h);
                    total[h] = total[h] * factor[h] + added;
                }
                widen(values + size * start * deep, held, count, deep, high, bf16);
                if (left > CHUNK)
                    prefetch(keys + size * (start + CHUNK) * width,
                             size * (left - CHUNK < CHUNK ? left - CHUNK : CHUNK) * width);
                all_values(weights, held, sum, heads, count, high, factor);
            }
            for (int64_t h = 0; h < heads; h++)
                for (int64_t e = 0; e < deep; e++) {
                    float result = sum[h * high + e] / total[h];
                    int64_t place = (pair * heads + h) * deep + e;
                    if (bf16)
                        ((uint16_t *)out)[place] = to_bf16(result);
                    else
                        ((float *)out)[place] = result;
                }
        }
    }
}
