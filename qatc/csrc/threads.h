/* The team that runs a program: how its threads meet, and share work out. */

#ifndef QATC_THREADS_H
#define QATC_THREADS_H

#include <stdint.h>

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

#endif
