/* The plans of the row ops: rows are cut into blocks, blocks run on threads. `itemsize` is 4 for
   float32, 8 for float64. */
#ifndef NF_OPS_ROWWISE_H
#define NF_OPS_ROWWISE_H
#include "core/status.h"
#include "kernels/kernels.h"

/* kernel(args, ...) over all rows; `row_cost` is about how many cycles a row takes. */
nf_status nf_rowwise(nf_row_kernel *kernel, const void *args, size_t rows, double row_cost);

/* layer_norm_backward (outputs 2: weight, bias) or rms_norm_backward (1) over all rows: a sum
   for each block of rows, then the sums in ascending order. `sums` is (outputs, n). Sets
   args->part. */
nf_status nf_norm_sums(nf_row_kernel *kernel, nf_row_kernel *column_sums,
                       nf_norm_backward *args, size_t rows, int outputs, size_t itemsize,
                       void *sums);

/* The sum of x[0] .. x[n-1] in ascending order, as float64. */
double nf_total(const void *x, size_t n, size_t itemsize);

/* The first i with ids[i] outside 0 .. limit-1 and not `except`; n where there is none. */
size_t nf_first_outside(const int64_t *ids, size_t n, int64_t limit, int64_t except);

/* How many ids are not `except`. */
size_t nf_count_other(const int64_t *ids, size_t n, int64_t except);

/* dweight (table, n) of embedding for `count` ids. Sets args->head and args->next. */
nf_status nf_embedding_sums(nf_row_kernel *kernel, nf_embedding_backward *args,
                            const int64_t *ids, size_t count, size_t table);

#endif
