#include "ops/rowwise.h"

#include "core/pool.h"
#include "core/threads.h"
#include "ops/parts.h"

/* Long against the cost of handing out a task, short against all rows. */
#define TASK_CYCLES 16e3

typedef struct {
    nf_row_kernel *kernel;
    const void *args;
    size_t rows, block;
} row_work;

static void
run_block(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const row_work *w = pointer;
    const size_t begin = index * w->block;
    w->kernel(w->args, begin, begin + nf_least(w->block, w->rows - begin));
}

static nf_status
run_blocks(nf_row_kernel *kernel, const void *args, size_t rows, size_t block, double cost)
{
    row_work w = {kernel, args, rows, block};
    return nf_parallel_apart(nf_parts(rows, block), cost, 0, run_block, &w);
}

nf_status
nf_rowwise(nf_row_kernel *kernel, const void *args, size_t rows, double row_cost)
{
    const double block = TASK_CYCLES / (row_cost + 1);
    return run_blocks(kernel, args, rows, block < 1 ? 1 : (size_t)block,
                      row_cost * (double)rows);
}

nf_status
nf_norm_sums(nf_row_kernel *kernel, nf_row_kernel *column_sums, nf_norm_backward *args,
             size_t rows, int outputs, size_t itemsize, void *sums)
{
    const size_t blocks = nf_parts(rows, NF_NORM_BLOCK);
    const size_t columns = (size_t)outputs * args->n;
    void *part = nf_pool_allocate((blocks > 0 ? blocks : 1) * columns * itemsize);
    if (part == NULL) {
        return NF_NO_MEMORY;
    }
    args->part = part;
    nf_status status =
        run_blocks(kernel, args, rows, NF_NORM_BLOCK, (double)rows * (double)args->n);
    const nf_column_sums c = {part, sums, blocks, columns};
    if (status == NF_OK) {
        status =
            run_blocks(column_sums, &c, columns, 128, (double)blocks * (double)columns / 4);
    }
    nf_pool_free(part);
    return status;
}

double
nf_total(const void *x, size_t n, size_t itemsize)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += itemsize == 4 ? (double)((const float *)x)[i] : ((const double *)x)[i];
    }
    return sum;
}

size_t
nf_first_outside(const int64_t *ids, size_t n, int64_t limit, int64_t except)
{
    size_t i = 0;
    while (i < n && ((ids[i] >= 0 && ids[i] < limit) || ids[i] == except)) {
        i++;
    }
    return i;
}

size_t
nf_count_other(const int64_t *ids, size_t n, int64_t except)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        count += ids[i] != except;
    }
    return count;
}

nf_status
nf_embedding_sums(nf_row_kernel *kernel, nf_embedding_backward *args, const int64_t *ids,
                  size_t count, size_t table)
{
    int64_t *lists = nf_pool_allocate((table + count) * sizeof *lists);
    if (lists == NULL) {
        return NF_NO_MEMORY;
    }
    int64_t *head = lists, *next = lists + table;
    for (size_t row = 0; row < table; row++) {
        head[row] = -1;
    }
    /* From the last to the first, so that each list ascends. */
    for (size_t t = count; t-- > 0;) {
        next[t] = head[ids[t]];
        head[ids[t]] = (int64_t)t;
    }
    args->head = head;
    args->next = next;
    const double cost = (double)(table + count) * (double)args->n / 4;
    const nf_status status = run_blocks(kernel, args, table, 32, cost);
    nf_pool_free(lists);
    return status;
}
