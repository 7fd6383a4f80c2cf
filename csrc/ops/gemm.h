/* Matrix products: the plan. */
#ifndef NF_OPS_GEMM_H
#define NF_OPS_GEMM_H
#include "core/status.h"
#include "kernels/kernels.h"

/* Computes every one of `count` products, in one parallel region: a linear layer is one, a layer of
   experts a list. Each element is reduced over K in an order that K alone fixes. */
nf_status nf_products(const nf_gemm_kernels *kernels, const nf_gemm *products,
                      size_t count);

#endif
