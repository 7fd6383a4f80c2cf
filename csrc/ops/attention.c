/* The plans of attention. Forward: a task is some blocks of queries of a head. Backward: for each KV
   head, tasks that prepare the blocks of queries, then one for each block of its keys. The bits
   do not depend on the cut.

   Results that would be denormal are 0. The weights of keys that stand far behind under ALiBi
   are just above 2^-126: a product with one was denormal, and a pass took up to 6.8 times as
   long. */
#include "ops/attention.h"

#include "core/cpu.h"
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
    const unsigned mode = nf_denormals_to_zero();
    w->task(w->p, index, scratch);
    nf_denormals_as_before(mode);
}

static nf_status
run(nf_attention_task *task, const nf_attention *p, ptrdiff_t count, double cost,
    size_t scratch)
{
    attention_work w = {task, p};
    return nf_parallel_apart((size_t)count, cost, scratch, run_task, &w);
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

/* Of decode: keys and values come at some 2 numbers a cycle, and a head has to be set up. */
static double
decode_cycles(const nf_attention *p)
{
    enum { SET_UP = 500 };
    return cycles(p)
           + (double)p->batch * (double)p->kv_heads
                 * ((double)p->keys * (double)(p->dim + p->value_dim) / 2 + SET_UP);
}

/* (B + 1): blocks before each sequence; the last is the count of all. */
static void
count_blocks(const int64_t *starts, ptrdiff_t batch, ptrdiff_t block, ptrdiff_t *before)
{
    before[0] = 0;
    for (ptrdiff_t b = 0; b < batch; b++) {
        before[b + 1] =
            before[b] + blocks_of((ptrdiff_t)(starts[b + 1] - starts[b]), block);
    }
}

/* Counts the blocks of packed sequences, `queries` and block_keys long, in memory that *blocks
   owns. */
static nf_status
lay_out(const nf_attention_kernels *kernels, nf_attention *p, ptrdiff_t queries,
        ptrdiff_t **blocks)
{
    *blocks = NULL;
    if (p->q_starts == NULL && p->k_starts == NULL) {
        return NF_OK;
    }
    const size_t n = (size_t)p->batch + 1;
    *blocks = nf_pool_allocate(2 * n * sizeof **blocks);
    if (*blocks == NULL) {
        return NF_NO_MEMORY;
    }
    if (p->q_starts) {
        count_blocks(p->q_starts, p->batch, queries, *blocks);
        p->q_blocks = *blocks;
    }
    if (p->k_starts) {
        count_blocks(p->k_starts, p->batch, kernels->block_keys, *blocks + n);
        p->k_blocks = *blocks + n;
    }
    return NF_OK;
}

static ptrdiff_t
count_q_blocks(const nf_attention *p, ptrdiff_t queries)
{
    return p->heads
           * (p->q_blocks ? p->q_blocks[p->batch]
                          : p->batch * blocks_of(p->queries, queries));
}

static nf_status
decode(const nf_attention_kernels *kernels, nf_attention *p)
{
    if (p->kv_heads == 0) {
        return NF_OK;
    }
    const nf_decode_plan plan = kernels->decode_plan(p);
    p->plan = &plan;
    if (plan.workspace > 0) {
        p->workspace = nf_pool_allocate(plan.workspace);
        if (p->workspace == NULL) {
            return NF_NO_MEMORY;
        }
        kernels->decode_begin(p);
    }
    const nf_status status =
        run(kernels->decode, p, plan.tasks, decode_cycles(p), plan.scratch);
    nf_pool_free(p->workspace);
    return status;
}

nf_status
nf_attention_forward(const nf_attention_kernels *kernels, const nf_attention *shape)
{
    nf_attention p = *shape;
    ptrdiff_t *blocks;
    const ptrdiff_t queries = kernels->forward_queries(&p);
    nf_status status = lay_out(kernels, &p, queries, &blocks);
    const ptrdiff_t most = kernels->decode_most(&p);
    if (status == NF_OK && most > 0 && (p.q_starts || p.queries <= most)) {
        status = decode(kernels, &p);
    }
    if (status == NF_OK && p.queries > most) {
        status = run(kernels->forward, &p, count_q_blocks(&p, queries), cycles(&p),
                     kernels->forward_scratch(&p));
    }
    nf_pool_free(blocks);
    return status;
}

nf_status
nf_attention_backward(const nf_attention_kernels *kernels, const nf_attention *shape)
{
    nf_attention p = *shape;
    ptrdiff_t *blocks;
    p.abreast = nf_get_num_threads();
    nf_status status = lay_out(kernels, &p, kernels->block_queries, &blocks);
    if (status != NF_OK) {
        return status;
    }
    p.workspace = nf_pool_allocate(kernels->backward_workspace(&p));
    if (p.workspace == NULL) {
        nf_pool_free(blocks);
        return NF_NO_MEMORY;
    }
    kernels->backward_begin(&p);
    attention_work w = {kernels->backward, &p};
    /* In order: a task may wait for one that comes before it. */
    status = nf_parallel((size_t)kernels->backward_tasks(&p), 2.5 * cycles(&p),
                         kernels->backward_scratch(&p), run_task, &w);
    nf_pool_free(p.workspace);
    nf_pool_free(blocks);
    return status;
}
