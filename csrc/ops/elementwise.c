#include "ops/elementwise.h"

#include "core/threads.h"

/* Long against the cost of handing out a task, short against a cache. */
enum { CHUNK = 16384 };

typedef struct {
    nf_elementwise_kernel *kernel;
    int inputs;
    size_t itemsize;
    const void *const *in;
    char *out;
    size_t n;
} elementwise_work;

static void
run_chunk(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const elementwise_work *w = pointer;
    const size_t begin = index * CHUNK;
    const size_t n = w->n - begin < CHUNK ? w->n - begin : CHUNK;
    const void *in[NF_MAX_INPUTS];
    for (int k = 0; k < w->inputs; k++) {
        in[k] = (const char *)w->in[k] + begin * w->itemsize;
    }
    w->kernel(in, w->out + begin * w->itemsize, n);
}

nf_status
nf_elementwise(nf_elementwise_kernel *kernel, int inputs, size_t itemsize,
               const void *const *in, void *out, size_t n)
{
    elementwise_work w = {kernel, inputs, itemsize, in, out, n};
    /* About a cycle an element from cache. */
    return nf_parallel((n + CHUNK - 1) / CHUNK, (double)n, 0, run_chunk, &w);
}
