#include "ops/elementwise.h"

#include <string.h>

#include "core/philox.h"
#include "core/pool.h"
#include "core/threads.h"
#include "ops/parts.h"

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
    const void *in[NF_MAX_INPUTS];
    for (int k = 0; k < w->inputs; k++) {
        in[k] = (const char *)w->in[k] + begin * w->itemsize;
    }
    w->kernel(in, w->out + begin * w->itemsize, nf_least(CHUNK, w->n - begin));
}

nf_status
nf_elementwise(nf_elementwise_kernel *kernel, int inputs, size_t itemsize,
               const void *const *in, void *out, size_t n)
{
    elementwise_work w = {kernel, inputs, itemsize, in, out, n};
    /* About a cycle an element from cache. */
    return nf_parallel_apart(nf_parts(n, CHUNK), (double)n, 0, run_chunk, &w);
}

typedef struct {
    nf_elementwise_kernel *kernel;
    nf_elementwise_pair_kernel *pair;
    int inputs;
    size_t itemsize;
    const nf_rows *in, *out;
    size_t rows, columns;
    size_t rows_of_task, columns_of_task, tasks_across;
} rows_work;

static char *
place(nf_rows x, size_t row, size_t offset)
{
    return x.data + (ptrdiff_t)row * x.stride + offset;
}

static void
run_rows(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const rows_work *w = pointer;
    const size_t first = index / w->tasks_across * w->rows_of_task;
    const size_t column = index % w->tasks_across * w->columns_of_task;
    const size_t n = nf_least(w->columns_of_task, w->columns - column);
    const size_t offset = column * w->itemsize;
    for (size_t row = first; row < nf_least(first + w->rows_of_task, w->rows); row++) {
        const void *in[NF_MAX_INPUTS];
        for (int k = 0; k < w->inputs; k++) {
            in[k] = place(w->in[k], row, offset);
        }
        void *const out = place(w->out[0], row, offset);
        if (w->kernel != NULL) {
            w->kernel(in, out, n);
        }
        else {
            w->pair(in, (void *const[]){out, place(w->out[1], row, offset)}, n);
        }
    }
}

/* Whether x is one piece, rows and all. */
static int
is_whole(nf_rows x, size_t row_bytes)
{
    return x.stride == (ptrdiff_t)row_bytes;
}

nf_status
nf_elementwise_rows(nf_elementwise_kernel *kernel, nf_elementwise_pair_kernel *pair,
                    int inputs, size_t itemsize, const nf_rows *in, const nf_rows *out,
                    size_t rows, size_t columns)
{
    const size_t bytes = columns * itemsize;
    int whole = is_whole(out[0], bytes) && (pair == NULL || is_whole(out[1], bytes));
    for (int k = 0; k < inputs; k++) {
        whole = whole && is_whole(in[k], bytes);
    }
    if (whole) {
        columns *= rows;
        rows = columns > 0;
    }
    rows_work w = {kernel, pair, inputs, itemsize, in, out, rows, columns, 1, CHUNK, 1};
    if (columns == 0) {
        return NF_OK;
    }
    if (columns < CHUNK) {
        w.columns_of_task = columns;
        w.rows_of_task = CHUNK / columns;
    }
    else {
        w.tasks_across = nf_parts(columns, CHUNK);
    }
    const size_t down = nf_parts(rows, w.rows_of_task);
    return nf_parallel_apart(down * w.tasks_across, (double)rows * (double)columns, 0,
                             run_rows, &w);
}

/* ---- sums of rows ---- */

enum { ROWS_OF_BLOCK = 64 };

typedef struct {
    nf_add_row_kernel *add;
    size_t itemsize;
    nf_rows x;
    size_t rows, columns;
    char *sums; /* a row for each block of rows */
} sum_work;

static void
sum_block(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const sum_work *w = pointer;
    const size_t bytes = w->columns * w->itemsize;
    const size_t first = index * ROWS_OF_BLOCK,
                 end = nf_least(first + ROWS_OF_BLOCK, w->rows);
    char *const sum = w->sums + index * bytes;
    memcpy(sum, place(w->x, first, 0), bytes);
    for (size_t row = first + 1; row < end; row++) {
        w->add(sum, place(w->x, row, 0), w->columns);
    }
}

nf_status
nf_sum_rows(nf_add_row_kernel *add, size_t itemsize, nf_rows x, size_t rows, size_t columns,
            void *sum)
{
    const size_t bytes = columns * itemsize;
    const size_t blocks = nf_parts(rows, ROWS_OF_BLOCK);
    if (blocks == 0 || bytes == 0) {
        memset(sum, 0, bytes);
        return NF_OK;
    }
    char *const sums = blocks == 1 ? sum : nf_pool_allocate(blocks * bytes);
    if (sums == NULL) {
        return NF_NO_MEMORY;
    }
    sum_work w = {add, itemsize, x, rows, columns, sums};
    const nf_status status =
        nf_parallel_apart(blocks, (double)rows * (double)columns, 0, sum_block, &w);
    if (blocks > 1) {
        /* Sums of 64 sums, until one is left: the error grows with their number's logarithm. */
        nf_status above = status;
        if (status == NF_OK) {
            above = nf_sum_rows(add, itemsize, (nf_rows){sums, (ptrdiff_t)bytes}, blocks,
                                columns, sum);
        }
        nf_pool_free(sums);
        return above;
    }
    return status;
}

/* ---- dropout ---- */

typedef struct {
    nf_dropout_kernel *kernel;
    size_t itemsize;
    const char *x;
    char *y;
    size_t n;
    uint64_t key;
    uint32_t threshold;
    double scale;
} dropout_work;

_Static_assert(CHUNK % NF_PHILOX_BLOCK == 0, "a task begins with a block of numbers");

static void
run_dropout(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const dropout_work *w = pointer;
    const size_t begin = index * CHUNK, offset = begin * w->itemsize;
    w->kernel(w->x + offset, w->y + offset, nf_least(CHUNK, w->n - begin), w->key, begin,
              w->threshold, w->scale);
}

nf_status
nf_dropout(nf_dropout_kernel *kernel, size_t itemsize, const void *x, void *y, size_t n,
           double p, uint64_t key)
{
    if (p >= 1) {
        memset(y, 0, n * itemsize);
        return NF_OK;
    }
    dropout_work w = {kernel, itemsize, x, y, n, key, (uint32_t)(p * 0x1p32), 1 / (1 - p)};
    return nf_parallel_apart(nf_parts(n, CHUNK), 3 * (double)n, 0, run_dropout, &w);
}
