/* Products with quantized weights: the plans. See kernels/quant.inc for what is computed and
   kernels.h for the layouts. */
#ifndef NF_OPS_QUANT_H
#define NF_OPS_QUANT_H
#include "core/status.h"
#include "kernels/kernels.h"

/* Depths of a group, and of an integer product: its sums stay within 32 bits. */
enum { NF_QUANT_DEPTH_LIMIT = 1 << 16 };

/* Weights as files hold them: u (N, K), or two to a byte, the even k low, (N, (K + 1) / 2);
   scales (N, groups) float16 or float32; zeros (N, groups) or NULL. NULL where there is no
   memory. */
nf_quant_weights *nf_quant_pack(const uint8_t *u, const void *scale, const uint8_t *zero,
                                size_t n, size_t k, size_t group, int bits, int half);
void nf_quant_free(nf_quant_weights *w); /* NULL is nothing */

/* y (rows, N) = activation(x (rows, K) W^T + bias): x quantized by row and integer products,
   or weights turned into floats, each once for all rows of a task. `activation` and `bias`
   may be NULL. */
nf_status nf_quant_linear(const nf_quant_weights *w, const float *x, size_t rows,
                          const float *bias, nf_elementwise_kernel *activation, float *y);
nf_status nf_quant_linear_floats(const nf_quant_weights *w, const float *x, size_t rows,
                                 const float *bias, nf_elementwise_kernel *activation,
                                 float *y);

/* y (M, N) = a (M, K) b (N, K)^T, exact. */
nf_status nf_int8_matmul(const int8_t *a, const int8_t *b, size_t m, size_t n, size_t k,
                         int32_t *y);

#endif
