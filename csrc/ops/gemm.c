/* The plan of matrix products: cut a list of them into tasks.

   A task is a block of one C of at most ROWS x block_columns. ROWS is how often a packed element of
   B is used, and hides the packing. A product of few rows has nothing to hide: its tasks are
   narrow, and packed is nothing. The tasks are the same for every number of threads. */
#include "ops/gemm.h"

#include "core/pool.h"
#include "core/threads.h"

enum {
    ROWS = 1024,
    FEW_BYTES = 1 << 16, /* of B to a task of few rows */
    ENOUGH_TASKS = 8,    /* so that two to four threads end at about one time */
};

typedef struct {
    size_t first; /* number of the product's first task */
    size_t row_parts, column_parts, column_unit;
    nf_gemm_task *run;
} cut;

typedef struct {
    const nf_gemm *products;
    const cut *cuts;
    size_t count, row_unit;
} gemm_work;

static inline size_t
parts(size_t n, size_t most)
{
    return (n + most - 1) / most;
}

/* Where part i of `count` begins, on a multiple of `unit`. */
static inline size_t
boundary(size_t n, size_t unit, size_t i, size_t count)
{
    const size_t at = parts(n, unit) * i / count * unit;
    return at < n ? at : n;
}

static cut
cut_product(const nf_gemm *p, const nf_gemm_kernels *kernels, size_t products)
{
    if (p->m <= kernels->few_rows) {
        const size_t columns = FEW_BYTES / (4 * (p->k + 1)) + kernels->columns;
        return (cut){.row_parts = p->m > 0,
                     .column_parts = parts(p->n, columns),
                     .column_unit = kernels->columns,
                     .run = kernels->few};
    }
    cut c = {.row_parts = parts(p->m, ROWS),
             .column_parts = parts(p->n, kernels->block_columns),
             .column_unit = kernels->columns,
             .run = kernels->block};
    while (products * c.row_parts * c.column_parts < ENOUGH_TASKS
           && p->m / c.row_parts > 8 * kernels->rows) {
        c.row_parts++;
    }
    return c;
}

static void
run_task(size_t index, void *pointer, void *scratch)
{
    const gemm_work *w = pointer;
    size_t low = 0, high = w->count; /* cuts[low].first <= index < cuts[high].first */
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        *(w->cuts[middle].first <= index ? &low : &high) = middle;
    }
    const nf_gemm *const p = &w->products[low];
    const cut *const c = &w->cuts[low];
    const size_t task = index - c->first;
    const size_t row = task % c->row_parts, column = task / c->row_parts;
    c->run(p, boundary(p->m, w->row_unit, row, c->row_parts),
           boundary(p->m, w->row_unit, row + 1, c->row_parts),
           boundary(p->n, c->column_unit, column, c->column_parts),
           boundary(p->n, c->column_unit, column + 1, c->column_parts), scratch);
}

nf_status
nf_products(const nf_gemm_kernels *kernels, const nf_gemm *products, size_t count)
{
    cut one;
    cut *const cuts = count <= 1 ? &one : nf_pool_allocate(count * sizeof *cuts);
    if (cuts == NULL) {
        return NF_NO_MEMORY;
    }
    size_t tasks = 0, scratch = 0;
    double cost = 0;
    for (size_t i = 0; i < count; i++) {
        const nf_gemm *const p = &products[i];
        cuts[i] = cut_product(p, kernels, count);
        cuts[i].first = tasks;
        tasks += cuts[i].row_parts * cuts[i].column_parts;
        scratch = cuts[i].run == kernels->block ? kernels->scratch : scratch;
        /* 16 multiply-adds a cycle, and reading or packing B */
        cost += (double)p->n * (double)p->k * ((double)p->m / 16 + 0.5);
    }
    gemm_work w = {products, cuts, count, kernels->rows};
    const nf_status status = nf_parallel(tasks, cost, scratch, run_task, &w);
    if (cuts != &one) {
        nf_pool_free(cuts);
    }
    return status;
}
