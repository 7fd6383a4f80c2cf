#ifdef __linux__
#define _GNU_SOURCE /* the CPUs of a thread */
#include <sched.h>
#endif

#include "core/threads.h"

#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>

#include "core/pool.h"

/* Waking a thread and meeting it again takes some 3 us, 10 000 cycles. */
#define WORTH_A_THREAD 40e3

/* Tasks next .. end-1 are not begun. Each has a line of the cache to itself. */
typedef struct {
    _Alignas(64) atomic_size_t next;
    size_t end;
} share;

enum {
    MOST_SHARES = 64,
    SMALL_SCRATCH = 1 << 14, /* that of one thread lies on its stack */
};

static int requested; /* 0: as OpenMP says */
static int forked;

static void
in_forked_child(void)
{
    forked = 1;
}

__attribute__((constructor)) static void
watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_forked_child);
}

void
nf_set_num_threads(int threads)
{
    requested = threads;
}

int
nf_get_num_threads(void)
{
    if (forked) {
        return 1;
    }
    return requested > 0 ? requested : omp_get_max_threads();
}

#ifdef __linux__
/* The CPU that the caller runs on; -1 where it is not for us to say who runs where. */
static int
cpu_of_caller(void)
{
    return omp_get_proc_bind() == omp_proc_bind_false ? sched_getcpu() : -1;
}

/* A helper keeps off the CPU of its caller. Else the kernel may wake it right there, where it
   waits for the caller's time slice to end, 1.5 ms, with the other CPUs idle. */
static void
keep_off(int cpu)
{
    static _Thread_local int kept_off = -1;
    static _Thread_local cpu_set_t all, others;
    cpu_set_t now;
    if (cpu == kept_off || cpu < 0 || sched_getaffinity(0, sizeof now, &now) != 0) {
        return;
    }
    if (kept_off < 0 || !CPU_EQUAL(&now, &others)) {
        all = now; /* first of all, or since somebody else has set them */
    }
    others = all;
    CPU_CLR((size_t)cpu, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
        kept_off = cpu;
    }
}
#else
static int
cpu_of_caller(void)
{
    return -1;
}

static void
keep_off(int cpu)
{
    (void)cpu;
}
#endif

/* A thread runs its share, then what is left of the others'; with one share it is all in order. */
static nf_status
run(size_t count, double cost, size_t scratch_bytes, nf_task task, void *work, int apart)
{
    int threads = nf_get_num_threads();
    if (count < (size_t)threads) {
        threads = (int)count;
    }
    if (cost < WORTH_A_THREAD || omp_in_parallel()) {
        threads = 1;
    }
    const size_t stride = (scratch_bytes + 63) / 64 * 64;
    _Alignas(64) char room_of_one[SMALL_SCRATCH];
    const int is_small = threads <= 1 && stride <= SMALL_SCRATCH;
    char *scratch = is_small ? room_of_one : NULL;
    if (stride > 0 && threads > 0 && !is_small) {
        scratch = nf_pool_allocate(stride * (size_t)threads);
        if (scratch == NULL) {
            return NF_NO_MEMORY;
        }
    }
    if (threads <= 1) {
        for (size_t i = 0; i < count; i++) {
            task(i, work, scratch);
        }
    }
    else {
        share shares[MOST_SHARES];
        const size_t most = threads < MOST_SHARES ? (size_t)threads : MOST_SHARES;
        const size_t n = apart ? most : 1;
        for (size_t k = 0; k < n; k++) {
            atomic_init(&shares[k].next, count * k / n);
            shares[k].end = count * (k + 1) / n;
        }
        const int cpu = cpu_of_caller();
#pragma omp parallel num_threads(threads)
        {
            const size_t own = (size_t)omp_get_thread_num();
            if (own > 0) {
                keep_off(cpu);
            }
            char *const room = scratch != NULL ? scratch + stride * own : NULL;
            for (size_t k = 0; k < n; k++) {
                share *const from = &shares[(own + k) % n];
                for (size_t i; (i = atomic_fetch_add(&from->next, 1)) < from->end;) {
                    task(i, work, room);
                }
            }
        }
    }
    nf_pool_free(is_small ? NULL : scratch);
    return NF_OK;
}

nf_status
nf_parallel(size_t count, double cost, size_t scratch_bytes, nf_task task, void *work)
{
    return run(count, cost, scratch_bytes, task, work, 0);
}

nf_status
nf_parallel_apart(size_t count, double cost, size_t scratch_bytes, nf_task task, void *work)
{
    return run(count, cost, scratch_bytes, task, work, 1);
}
