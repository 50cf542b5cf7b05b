/* A thread pool, whose threads sleep between calls, and teams of threads that work on the same image.
 *
 * A barrier spins briefly, because the other threads are usually microseconds away, and then sleeps: on a machine that
 * is busy with other work a late thread may not be running at all, and spinning would keep a core from it. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "vector.h"

#define MAX_THREADS 64
#define SPINS 2000 /* some tens of microseconds */

ALWAYS_INLINE void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct barrier {
    int size;
    atomic_int arrived, sleeping;
    atomic_uint generation; /* number of times that the barrier has opened */
    pthread_mutex_t lock;
    pthread_cond_t opened;
};

static void barrier_init(struct barrier *b) {
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->opened, NULL);
}

static void barrier_destroy(struct barrier *b) {
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->opened);
}

static void barrier_await(struct barrier *b, unsigned generation) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load(&b->generation) != generation) return;
        cpu_pause();
    }
    pthread_mutex_lock(&b->lock);
    atomic_fetch_add(&b->sleeping, 1);
    while (atomic_load(&b->generation) == generation) pthread_cond_wait(&b->opened, &b->lock);
    atomic_fetch_sub(&b->sleeping, 1);
    pthread_mutex_unlock(&b->lock);
}

/* No wake-up is lost: a waiter increments `sleeping` before its last look at the generation, and the opener reads
 * `sleeping` after it has changed the generation, so at least one of the two sees the other's write. */
static void barrier_open(struct barrier *b) {
    atomic_fetch_add(&b->generation, 1);
    if (atomic_load(&b->sleeping)) {
        pthread_mutex_lock(&b->lock);
        pthread_cond_broadcast(&b->opened);
        pthread_mutex_unlock(&b->lock);
    }
}

/* Threads that work through a list of items. Each thread takes the next item until none is left, so that a slow core
 * takes fewer. */
struct team {
    struct barrier barrier;
    atomic_int next;
};

ALWAYS_INLINE int next_item(struct team *team) { return atomic_fetch_add(&team->next, 1); }

/* Waits until all threads of the team have finished their items. Their writes are visible to the team afterwards, and
 * items are counted from 0 again. */
static void synchronise(struct team *team) {
    struct barrier *b = &team->barrier;
    unsigned generation = atomic_load(&b->generation);
    if (b->size == 1) {
        team->next = 0;
    } else if (atomic_fetch_add(&b->arrived, 1) == b->size - 1) {
        atomic_store(&b->arrived, 0);
        atomic_store(&team->next, 0);
        barrier_open(b);
    } else {
        barrier_await(b, generation);
    }
}

struct pool {
    int threads; /* including the caller */
    pid_t process;
    void (*work)(void *context, int thread);
    void *context;
    bool ending;
    struct barrier start;
    struct team all; /* synchronised at the end of the work, and wherever the work does so */
    pthread_t handles[MAX_THREADS];
};

struct pool_thread {
    struct pool *pool;
    int thread;
};

static void *pool_loop(void *argument) {
    struct pool_thread self = *(struct pool_thread *)argument;
    free(argument);
    struct pool *pool = self.pool;
    for (unsigned generation = 0;; generation++) {
        barrier_await(&pool->start, generation);
        if (pool->ending) return NULL;
        pool->work(pool->context, self.thread);
        synchronise(&pool->all);
    }
}

/* Creates a pool of `threads` threads, or fewer if the system allows no more. */
static struct pool *pool_create(int threads) {
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    barrier_init(&pool->start);
    barrier_init(&pool->all.barrier);
    pool->process = getpid();
    pool->threads = 1;
    while (pool->threads < threads) {
        struct pool_thread *self = malloc(sizeof *self);
        if (!self) break;
        *self = (struct pool_thread){pool, pool->threads};
        if (pthread_create(&pool->handles[pool->threads], NULL, pool_loop, self)) {
            free(self);
            break;
        }
        pool->threads++;
    }
    pool->all.barrier.size = pool->threads;
    return pool;
}

/* False in a forked child, which has none of its parent's threads. */
static bool pool_alive(const struct pool *pool) { return pool->process == getpid(); }

/* Runs work(context, thread) on every thread and waits for all of them. Returns false, without any work done, if the
 * pool is not alive. */
static bool pool_run(struct pool *pool, void (*work)(void *, int), void *context) {
    if (!pool_alive(pool)) return false;
    pool->work = work, pool->context = context;
    barrier_open(&pool->start);
    work(context, 0);
    synchronise(&pool->all);
    return true;
}

static void pool_destroy(struct pool *pool) {
    if (pool_alive(pool)) {
        pool->ending = true;
        barrier_open(&pool->start);
        for (int t = 1; t < pool->threads; t++) pthread_join(pool->handles[t], NULL);
        barrier_destroy(&pool->start);
        barrier_destroy(&pool->all.barrier);
    }
    free(pool);
}
