/* The plans of attention. Forward: a task is a block of queries of a head. Backward: transposes
   of every block of queries, then a task for each block of keys of each KV head, then dQ out of
   its transpose. The bits do not depend on the cut. */
#include "ops/attention.h"

#include "core/pool.h"
#include "core/threads.h"

typedef struct {
    nf_attention_task *task;
    const nf_attention *p;
} attention_work;

static void
run_task(size_t index, void *pointer, void *scratch)
{
    const attention_work *w = pointer;
    w->task(w->p, index, scratch);
}

static nf_status
run(nf_attention_task *task, const nf_attention *p, ptrdiff_t count, double cost,
    size_t scratch)
{
    attention_work w = {task, p};
    return nf_parallel((size_t)count, cost, scratch, run_task, &w);
}

static ptrdiff_t
blocks_of(ptrdiff_t n, ptrdiff_t block)
{
    return (n + block - 1) / block;
}

/* Cycles of the forward pass: two products at some 16 multiply-adds a cycle. */
static double
cycles(const nf_attention *p)
{
    return (double)p->batch * (double)p->heads * (double)p->queries * (double)p->keys
           * (double)(p->dim + p->value_dim + 16) / 16;
}

nf_status
nf_attention_forward(const nf_attention_kernels *kernels, const nf_attention *p)
{
    if (kernels->decode_fits(p)) {
        return run(kernels->decode, p, p->batch * p->kv_heads, cycles(p),
                   kernels->decode_scratch(p));
    }
    const ptrdiff_t count =
        p->batch * p->heads * blocks_of(p->queries, kernels->block_queries);
    return run(kernels->forward, p, count, cycles(p), kernels->forward_scratch(p));
}

nf_status
nf_attention_backward(const nf_attention_kernels *kernels, const nf_attention *shape)
{
    nf_attention p = *shape;
    const ptrdiff_t q_blocks =
        p.batch * p.heads * blocks_of(p.queries, kernels->block_queries);
    const ptrdiff_t k_blocks =
        p.batch * p.kv_heads * blocks_of(p.keys, kernels->block_keys);
    const double elements =
        (double)(q_blocks * kernels->block_queries * (p.dim + p.value_dim));
    p.workspace = nf_pool_allocate(kernels->backward_workspace(&p));
    if (p.workspace == NULL) {
        return NF_NO_MEMORY;
    }
    nf_status status = run(kernels->backward_prepare, &p, q_blocks, elements, 0);
    if (status == NF_OK) {
        status = run(kernels->backward_keys, &p, k_blocks, 2.5 * cycles(&p),
                     kernels->backward_scratch(&p));
    }
    if (status == NF_OK) {
        status = run(kernels->backward_finish, &p, q_blocks, elements, 0);
    }
    nf_pool_free(p.workspace);
    return status;
}
