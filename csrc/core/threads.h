/* Threads. The only home of OpenMP.

   Work is cut into the same tasks whatever the number of threads, and a task writes only
   what is its own, so results never depend on the number of threads. */
#ifndef NF_THREADS_H
#define NF_THREADS_H
#include <stddef.h>

#include "core/status.h"

/* `scratch` belongs to the running thread: 64-byte aligned, its contents undefined. */
typedef void (*nf_task)(size_t index, void *work, void *scratch);

/* Runs task(0 .. count-1), each with `scratch_bytes` of scratch memory.

   Tasks start in ascending order, but for where they end nothing is promised. `cost` is
   about how many cycles one core needs for all of it: what is too short to be worth waking
   a thread runs in the calling thread. NF_NO_MEMORY where there is no room for scratch. */
nf_status nf_parallel(size_t count, double cost, size_t scratch_bytes, nf_task task,
                      void *work);

/* The same, but each thread begins with a share of its own, the same at every call of so many
   tasks: what it read and wrote then it finds in its own cache. In no order. */
nf_status nf_parallel_apart(size_t count, double cost, size_t scratch_bytes, nf_task task,
                            void *work);

/* Threads that nf_parallel uses: what was set, or else what OpenMP says (OMP_NUM_THREADS,
   threadpoolctl). In a forked child it is 1, since OpenMP's threads do not survive there. */
void nf_set_num_threads(int threads);
int nf_get_num_threads(void);

#endif
