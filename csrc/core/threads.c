#include "core/threads.h"

#include <omp.h>
#include <pthread.h>

#include "core/pool.h"

/* Waking a thread and meeting it again takes some 3 us, 10 000 cycles. */
#define WORTH_A_THREAD 40e3

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

nf_status
nf_parallel(size_t count, double cost, size_t scratch_bytes, nf_task task, void *work)
{
    int threads = nf_get_num_threads();
    if (count < (size_t)threads) {
        threads = (int)count;
    }
    if (cost < WORTH_A_THREAD || omp_in_parallel()) {
        threads = 1;
    }
    const size_t stride = (scratch_bytes + 63) / 64 * 64;
    char *scratch = NULL;
    if (stride > 0 && threads > 0) {
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
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (size_t i = 0; i < count; i++) {
            task(i, work, scratch ? scratch + stride * (size_t)omp_get_thread_num() : NULL);
        }
    }
    nf_pool_free(scratch);
    return NF_OK;
}
