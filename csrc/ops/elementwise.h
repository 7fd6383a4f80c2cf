/* The plans of elementwise ops: elements or rows, cut into chunks, run on threads. */
#ifndef NF_OPS_ELEMENTWISE_H
#define NF_OPS_ELEMENTWISE_H
#include "core/status.h"
#include "kernels/kernels.h"

/* Of any elementwise kernel. */
enum { NF_MAX_INPUTS = 3 };

/* n contiguous elements. */
nf_status nf_elementwise(nf_elementwise_kernel *kernel, int inputs, size_t itemsize,
                         const void *const *in, void *out, size_t n);

/* Rows of contiguous elements, `stride` bytes apart: 0 for one row that serves all. */
typedef struct {
    char *data;
    ptrdiff_t stride;
} nf_rows;

/* One of the two kernels is NULL; out[1] goes with `pair`. An output may be an input. */
nf_status nf_elementwise_rows(nf_elementwise_kernel *kernel,
                              nf_elementwise_pair_kernel *pair, int inputs, size_t itemsize,
                              const nf_rows *in, const nf_rows *out, size_t rows,
                              size_t columns);

/* sum[j] = the sum of x[i][j] over all rows i. Rows are added up in blocks whose size the shape
   alone gives, and the blocks in ascending order. */
nf_status nf_sum_rows(nf_add_row_kernel *add, size_t itemsize, nf_rows x, size_t rows,
                      size_t columns, void *sum);

/* y[i] = x[i] / (1 - p), or 0 with probability p; which, is a function of key and i. */
nf_status nf_dropout(nf_dropout_kernel *kernel, size_t itemsize, const void *x, void *y,
                     size_t n, double p, uint64_t key);

#endif
