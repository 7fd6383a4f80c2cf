/* The one list of kernels. All that must know every kernel (the table, its filling for each
   instruction set, the ufuncs, the tests) is made from this list.

   A family is one file kernels/<family>.inc with its two lists here:
       NF_KERNELS_<family>(K)         K(name, type): a kernel for each element type,
                                      name_f32 and name_f64 in the table
       NF_PLAIN_KERNELS_<family>(K)   K(name, type): a kernel with types of its own, `name`
                                      in the table; its template stands under #if NF_SINGLE
   where type is the type of a function, or `const` and the struct that describes a kernel.

   A kernel returns nothing, allocates nothing and cannot fail: a plan in ops/ gives it memory
   and asserts what it needs. */
#ifndef NF_KERNELS_H
#define NF_KERNELS_H
#include <stddef.h>
#include <stdint.h>

/* ---- elementwise: out[i] = f(in[0][i], in[1][i], ...). K(name, type, inputs) ---- */

typedef void nf_elementwise_kernel(const void *const *in, void *out, size_t n);

#define NF_KERNELS_elementwise(K)                                                          \
    K(exp, nf_elementwise_kernel, 1)                                                       \
    K(expm1, nf_elementwise_kernel, 1)                                                     \
    K(log, nf_elementwise_kernel, 1)                                                       \
    K(tanh, nf_elementwise_kernel, 1)                                                      \
    K(sigmoid, nf_elementwise_kernel, 1)                                                   \
    K(relu, nf_elementwise_kernel, 1)                                                      \
    K(relu_backward, nf_elementwise_kernel, 2)                                             \
    K(silu, nf_elementwise_kernel, 1)                                                      \
    K(silu_backward, nf_elementwise_kernel, 2)                                             \
    K(gelu_erf, nf_elementwise_kernel, 1)                                                  \
    K(gelu_erf_backward, nf_elementwise_kernel, 2)                                         \
    K(gelu_tanh, nf_elementwise_kernel, 1)                                                 \
    K(gelu_tanh_backward, nf_elementwise_kernel, 2)                                        \
    K(gelu_quick, nf_elementwise_kernel, 1)                                                \
    K(gelu_quick_backward, nf_elementwise_kernel, 2)
#define NF_PLAIN_KERNELS_elementwise(K)

/* ---- rowwise: norms, softmaxes, losses, embedding, rotary ---- */

#define NF_KERNELS_rowwise(K)
#define NF_PLAIN_KERNELS_rowwise(K)

/* ---- gemm: matrix products ---- */

#define NF_KERNELS_gemm(K)
#define NF_PLAIN_KERNELS_gemm(K)

/* ---- attention: scaled-dot-product attention ---- */

#define NF_KERNELS_attention(K)
#define NF_PLAIN_KERNELS_attention(K)

/* ---- moe: routing, and the sums over a token's experts ---- */

typedef struct {
    size_t experts, top_k;
    size_t groups, top_groups; /* experts / groups to a group; the best groups stay */
    int sigmoid;               /* scores are sigmoids, else a softmax */
    int normalize;             /* the chosen scores are divided by their sum */
    double scale;
    const void *bias; /* (experts), added to the scores for the choice alone; or NULL */
} nf_moe_router;

/* One token: logits (experts) to scores (experts), expert (top_k), weight (top_k).
   `scratch`: 4 * experts elements. */
typedef void nf_moe_route_kernel(const nf_moe_router *router, const void *logits,
                                 void *scores, int64_t *expert, void *weight,
                                 void *scratch);

/* Its gradient; dscores may be NULL. */
typedef void nf_moe_route_backward_kernel(const nf_moe_router *router, const void *scores,
                                          const int64_t *expert, const void *dweight,
                                          const void *dscores, void *dlogits);

/* out[i] = sum_j weight[j] rows[j][i] in ascending j, j < count; weight NULL: all 1. */
typedef void nf_moe_gather_sum_kernel(const void *const *rows, const void *weight,
                                      size_t count, void *out, size_t n);

/* drow = weight * dy, *dweight = sum(dy * row). */
typedef void nf_moe_scatter_kernel(const void *dy, const void *row, const void *weight,
                                   void *drow, void *dweight, size_t n);

#define NF_KERNELS_moe(K)                                                                  \
    K(moe_route, nf_moe_route_kernel)                                                      \
    K(moe_route_backward, nf_moe_route_backward_kernel)                                    \
    K(moe_gather_sum, nf_moe_gather_sum_kernel)                                            \
    K(moe_scatter, nf_moe_scatter_kernel)
#define NF_PLAIN_KERNELS_moe(K)

/* ---- quant: quantized weights ---- */

#define NF_KERNELS_quant(K)
#define NF_PLAIN_KERNELS_quant(K)

/* ---- roof: the machine's own limits, for the benchmarks ---- */

/* Runs `rounds` times through registers, or once through n bytes. The result keeps the
   compiler from leaving the work out. */
typedef float nf_roof_registers(size_t rounds);
typedef float nf_roof_read(const void *p, size_t bytes);

enum { NF_ROOF_SUMS = 12 }; /* independent chains: the latency of an FMA times two pipes */

#define NF_KERNELS_roof(K)
#define NF_PLAIN_KERNELS_roof(K)                                                           \
    K(roof_fma, nf_roof_registers)                                                         \
    K(roof_dot, nf_roof_registers)                                                         \
    K(roof_read, nf_roof_read)                                                             \
    K(roof_lanes, const int)

/* ---- the table ---- */

/* Every family, for an instruction set. */
#define NF_FAMILIES(F, isa)                                                                \
    F(elementwise, isa)                                                                    \
    F(rowwise, isa)                                                                        \
    F(gemm, isa)                                                                           \
    F(attention, isa)                                                                      \
    F(moe, isa)                                                                            \
    F(quant, isa)                                                                          \
    F(roof, isa)

/* The families that gain from VNNI beyond AVX-512. */
#define NF_VNNI_FAMILIES(F, isa) F(quant, isa) F(roof, isa)

typedef struct {
#define NF_FIELD(name, type, ...)       type *name##_f32, *name##_f64;
#define NF_PLAIN_FIELD(name, type, ...) type *name;
#define NF_FIELDS(family, isa)                                                             \
    NF_KERNELS_##family(NF_FIELD) NF_PLAIN_KERNELS_##family(NF_PLAIN_FIELD)
    NF_FAMILIES(NF_FIELDS, )
#undef NF_FIELD
#undef NF_PLAIN_FIELD
#undef NF_FIELDS
} nf_kernel_table;

/* The table in use: each entry from the strongest instruction set that has it. */
extern nf_kernel_table nf_kernels;

#endif
