/* One decoding step of a whole model: a list of steps, run by a team of threads in one call.
 *
 * qatc/runtime/program.py makes the list from the graphs of a model; its opcodes and fields are those of steps.h.
 * All values are fp32 in memory, rounded to bf16 where a graph of that dtype rounds.
 *
 * Small steps are run by every thread for itself, in memory of its own: that costs less than to
 * wait for one another. Products and attention are shared out, and write to memory that all see; a
 * barrier stands before the first step that reads it.
 */

#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* One unit for the compiler, which unrolls and inlines across all of it. */
#include "attention_steps.h"
#include "numbers.h"
#include "product_steps.h"
#include "small_steps.h"
#include "steps.h"
#include "threads.h"

/* A result, in the dtype of the model: each thread writes its share of the values. */
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
    case HADAMARD: hadamard(s, here); break;
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
