/* Threads that compute one thing together: they take its items one by one and wait for each other where one part needs
 * all of the part before.
 *
 * Waiting threads spin for a little while, because parts last microseconds, and then sleep: beside other programs a
 * thread may have lost its core, and spinning for it would take the core that it waits for.
 */
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPINS = 2000 }; /* pauses, some 50 us */

struct team { /* zeros, before its threads enter */
    _Atomic int threads;
    _Atomic int64_t taken __attribute__((aligned(64)));
    _Atomic int waiting __attribute__((aligned(64))), sleeping;
    _Atomic uint32_t meetings __attribute__((aligned(64)));
};

/* What each thread of a parallel region does first. */
static inline void enter(struct team *team) {
    atomic_store_explicit(&team->threads, omp_get_num_threads(), memory_order_relaxed); /* the same from all */
}

/* The number of an item that nobody else has, from 0. */
static inline int64_t take(struct team *team) {
    return atomic_fetch_add_explicit(&team->taken, 1, memory_order_relaxed);
}

/* Returns when all threads of the team are here.  They see what the others wrote before, and items count from 0 again. */
static inline void meet(struct team *team) {
    int threads = atomic_load_explicit(&team->threads, memory_order_relaxed);
    uint32_t before = atomic_load(&team->meetings);
    if (atomic_fetch_add(&team->waiting, 1) + 1 == threads) {
        atomic_store_explicit(&team->taken, 0, memory_order_relaxed);
        atomic_store_explicit(&team->waiting, 0, memory_order_relaxed);
        atomic_store(&team->meetings, before + 1);
        if (atomic_load(&team->sleeping)) syscall(SYS_futex, &team->meetings, FUTEX_WAKE_PRIVATE, threads, 0, 0, 0);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&team->meetings) != before) return;
        _mm_pause();
    }
    atomic_fetch_add(&team->sleeping, 1);
    while (atomic_load(&team->meetings) == before)
        syscall(SYS_futex, &team->meetings, FUTEX_WAIT_PRIVATE, before, 0, 0, 0);
    atomic_fetch_sub(&team->sleeping, 1);
}
