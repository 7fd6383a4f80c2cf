/* The plan of every elementwise op: contiguous elements, cut into chunks, run on threads. */
#ifndef NF_OPS_ELEMENTWISE_H
#define NF_OPS_ELEMENTWISE_H
#include "core/status.h"
#include "kernels/kernels.h"

enum { NF_MAX_INPUTS = 4 };

nf_status nf_elementwise(nf_elementwise_kernel *kernel, int inputs, size_t itemsize,
                         const void *const *in, void *out, size_t n);

#endif
