/* The one list of kernels. All that must know every kernel (the table, its filling for each
   instruction set, the ufuncs, the tests) is made from this list.

   A family is one file kernels/<family>.inc with its two lists here:
       NF_KERNELS_<family>(K)         K(name, type): a kernel for each element type,
                                      name_f32 and name_f64 in the table
       NF_PLAIN_KERNELS_<family>(K)   K(name, type): a kernel with types of its own, `name`
                                      in the table; its template stands under #if NF_SINGLE
   where type is the type of a function, or `const` and the struct that describes a kernel.

   A kernel allocates nothing and cannot fail: a plan in ops/ gives it memory, and bind/ has
   checked what it is given. */
#ifndef NF_KERNELS_H
#define NF_KERNELS_H
#include <stddef.h>
#include <stdint.h>

#include "kernels/rowwise.h"

/* ---- elementwise: contiguous arrays, out[i] = f(in[0][i], in[1][i], ...) ---- */

typedef void nf_elementwise_kernel(const void *const *in, void *out, size_t n);
/* The same with two outputs. */
typedef void nf_elementwise_pair_kernel(const void *const *in, void *const out[2],
                                        size_t n);

/* One step of AdamW, the numbers that all elements share. The update is
       m += (g - m) gain1,  v += (g^2 - v) gain2,  p = p keep - rate m / (sqrt(v) root + eps)
   where g is the given gradient times scale. */
typedef struct {
    double gain1, gain2, keep, rate, root, eps, scale;
} nf_adamw;

typedef void nf_adamw_kernel(void *p, const void *g, void *m, void *v, size_t n,
                             const nf_adamw *step);
/* The sum of squares. */
typedef double nf_squares_kernel(const void *x, size_t n);
/* total[i] += row[i] */
typedef void nf_add_row_kernel(void *total, const void *row, size_t n);
/* y[i] = x[i] scale, or 0 where the random number of element `first` + i is below threshold.
   `first` is a multiple of NF_PHILOX_BLOCK. */
typedef void nf_dropout_kernel(const void *x, void *y, size_t n, uint64_t key,
                               uint64_t first, uint32_t threshold, double scale);

/* Those of one output are ufuncs too. K(name, type, inputs) */
#define NF_UFUNCS(K)                                                                       \
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
    K(gelu_quick_backward, nf_elementwise_kernel, 2)                                       \
    K(bias_gelu_erf, nf_elementwise_kernel, 2)                                             \
    K(bias_gelu_erf_backward, nf_elementwise_kernel, 3)                                    \
    K(bias_gelu_tanh, nf_elementwise_kernel, 2)                                            \
    K(bias_gelu_tanh_backward, nf_elementwise_kernel, 3)                                   \
    K(bias_gelu_quick, nf_elementwise_kernel, 2)                                           \
    K(bias_gelu_quick_backward, nf_elementwise_kernel, 3)                                  \
    K(swiglu, nf_elementwise_kernel, 2)                                                    \
    K(geglu_erf, nf_elementwise_kernel, 2)                                                 \
    K(geglu_tanh, nf_elementwise_kernel, 2)                                                \
    K(geglu_quick, nf_elementwise_kernel, 2)

#define NF_KERNELS_elementwise(K)                                                          \
    NF_UFUNCS(K)                                                                           \
    K(swiglu_backward, nf_elementwise_pair_kernel)                                         \
    K(geglu_erf_backward, nf_elementwise_pair_kernel)                                      \
    K(geglu_tanh_backward, nf_elementwise_pair_kernel)                                     \
    K(geglu_quick_backward, nf_elementwise_pair_kernel)                                    \
    K(adamw, nf_adamw_kernel)                                                              \
    K(squares, nf_squares_kernel)                                                          \
    K(add_row, nf_add_row_kernel)                                                          \
    K(dropout, nf_dropout_kernel)
#define NF_PLAIN_KERNELS_elementwise(K)

/* ---- rowwise: norms, softmaxes, losses, draws, embedding, rotary ---- */

/* Rows begin .. end-1 of an op: kernels/rowwise.h has the structs that args points to. */
#define NF_KERNELS_rowwise(K)                                                              \
    K(layer_norm, nf_row_kernel)                                                           \
    K(layer_norm_backward, nf_row_kernel)                                                  \
    K(rms_norm, nf_row_kernel)                                                             \
    K(rms_norm_backward, nf_row_kernel)                                                    \
    K(column_sums, nf_row_kernel)                                                          \
    K(softmax, nf_row_kernel)                                                              \
    K(softmax_backward, nf_row_kernel)                                                     \
    K(log_softmax, nf_row_kernel)                                                          \
    K(log_softmax_backward, nf_row_kernel)                                                 \
    K(cross_entropy, nf_row_kernel)                                                        \
    K(cross_entropy_backward, nf_row_kernel)                                               \
    K(softmax_entropy, nf_row_kernel)                                                      \
    K(softmax_entropy_backward, nf_row_kernel)                                             \
    K(categorical, nf_row_kernel)                                                          \
    K(embedding, nf_row_kernel)                                                            \
    K(embedding_backward, nf_row_kernel)                                                   \
    K(rotary, nf_row_kernel)
#define NF_PLAIN_KERNELS_rowwise(K)

/* ---- gemm: matrix products ---- */

typedef enum {
    NF_LINEAR,
    NF_RELU,
    NF_SILU,
    NF_GELU_ERF,
    NF_GELU_TANH,
    NF_GELU_QUICK
} nf_activation;
enum { NF_ACTIVATIONS = NF_GELU_QUICK + 1 };

/* C(M,N) = activation(A(M,K) . B(K,N) + bias) + residual. Steps are in elements. */
typedef struct {
    size_t m, n, k;
    const void *a, *b; /* of each pair of steps one is 1 */
    ptrdiff_t a_row, a_col, b_row, b_col;
    void *c; /* columns are contiguous; shares no memory with an input */
    ptrdiff_t c_row;
    int accumulate;   /* C += */
    const void *bias; /* (N) or NULL */
    nf_activation activation;
    void *pre;            /* (M,N) or NULL: gets what enters the activation */
    const void *residual; /* (M,N) or NULL */
    ptrdiff_t residual_row;
} nf_gemm;

/* Columns first .. first + width - 1 of B as panels; width is padded to whole tiles. */
typedef struct {
    void *data;
    size_t first, width;
} nf_gemm_panels;

typedef struct {
    size_t rows, columns; /* of a register tile: where a task may be cut */
    size_t block_rows;    /* of a task at most, a multiple of rows */
    size_t shared_rows;   /* so many rows of a block of K stay in L2, all of them strips */
    size_t depth;         /* of a block of K, at most */
    size_t itemsize;
    size_t scratch; /* bytes that a block needs, and so many more of a C of some shapes: */
    size_t (*aside)(const nf_gemm *p, size_t rows, size_t columns);
    /* Few rows, where few_fits, and nothing is packed: columns n0 .. n1 - 1. */
    int (*few_fits)(const nf_gemm *p);
    void (*few)(const nf_gemm *p, size_t n0, size_t n1);
    /* Columns n0 .. n1 - 1 of B to `packed`. */
    void (*pack)(const nf_gemm *p, const nf_gemm_panels *packed, size_t n0, size_t n1);
    /* Block i of K of all rows of A to `strips`, which takes so many bytes. */
    size_t (*strips_bytes)(const nf_gemm *p);
    void (*pack_all_rows)(const nf_gemm *p, void *strips, size_t i);
    /* C[m0:m1, n0:n1]; `packed` NULL: it packs B for itself, `strips` NULL: A. */
    void (*block)(const nf_gemm *p, const nf_gemm_panels *packed, const void *strips,
                  size_t m0, size_t m1, size_t n0, size_t n1, void *scratch);
} nf_gemm_kernels;

#define NF_KERNELS_gemm(K) K(gemm, const nf_gemm_kernels)
#define NF_PLAIN_KERNELS_gemm(K)

/* ---- attention: scaled-dot-product attention ---- */

/* What lies in memory: the element type of the kernels, or one that those of float32 widen as
   they read and round as they write. */
typedef enum { NF_AS_COMPUTED, NF_FLOAT16, NF_BFLOAT16, NF_INT8 } nf_storage;

/* (B, H, S, D) of one element type: strides in elements, the last axis contiguous. */
typedef struct {
    void *data;
    ptrdiff_t batch, head, row;
    nf_storage storage;
    const float *scales; /* NF_INT8: what each row is multiplied by, at these strides */
    ptrdiff_t scales_batch, scales_head, scales_row;
} nf_heads;

typedef enum { NF_NO_MASK, NF_BOOLEAN_MASK, NF_ADDED_MASK } nf_mask_kind;

/* What the gradient of an added mask is summed to. */
typedef enum {
    NF_NO_MASK_GRADIENT,
    NF_WHOLE_MASK, /* (B, H, Sq, Sk) by mask_strides of its own, the first two may be 0 */
    NF_MASK_ROWS,  /* (B, H, Sq): over keys */
    NF_MASK_KEYS   /* (B, H, Sk): over queries */
} nf_mask_gradient;

/* How decode is cut: a task is `heads` KV heads of a sequence, a part, or one of `splits` of their
   groups of keys. */
typedef struct {
    ptrdiff_t heads, parts, splits; /* parts: of a sequence */
    ptrdiff_t rows, groups;         /* of a part, at most */
    ptrdiff_t ldo;                  /* rows of the output are whole vectors */
    ptrdiff_t tasks;
    size_t scratch, workspace; /* workspace 0: none is needed */
} nf_decode_plan;

/* One attention: `batch` sequences, each of them queries against keys of its own. They lie in
   the batch axis of the arrays; or packed, one behind the other along the row axis, the batch
   strides 0; or keys and values lie in blocks anywhere, the batch axis counts blocks. Query i
   stands at position i + offset among its keys, where offset is 0 or leaves the last query
   beside the last key, and sees those from position - left to position + right that the
   mask leaves it. A score is scale q.k, then softcap tanh(score / softcap), then plus slope
   (key - position), then plus the mask. */
typedef struct {
    ptrdiff_t batch, heads, kv_heads, dim, value_dim;
    ptrdiff_t queries, keys; /* of a sequence; of the longest */
    const int64_t *q_starts; /* (B + 1): packed, where each sequence begins; or NULL */
    const int64_t *k_starts;
    const int64_t *block_table; /* (B, table_width): the blocks of each sequence; or NULL */
    ptrdiff_t table_width, block_size;
    /* (B + 1): tasks of a head before each sequence, by queries and by keys; NULL where each has
       those of the longest */
    const ptrdiff_t *q_blocks, *k_blocks;
    int top_left; /* offset 0 */
    ptrdiff_t left, right;
    double scale, softcap; /* softcap 0: none */
    nf_heads q, k, v, out;
    nf_heads exact; /* what was rounded to `out` of a short type, or no data */
    nf_mask_kind mask_kind;
    nf_storage mask_storage;
    const void *mask; /* (B, H, Sq, Sk) by these strides, in elements */
    ptrdiff_t mask_strides[4];
    const void *slopes; /* of head h of sequence b at b * slopes_batch + h; or NULL */
    ptrdiff_t slopes_batch;
    const void *sinks; /* (H): one more score of every row, without a value; or NULL */
    const int64_t *kv_lengths; /* (B): keys of each sequence; or NULL */
    /* Weights are dropped where their random number is below the threshold; dropout_scale 0:
       dropout is off. */
    uint64_t dropout_key;
    uint32_t dropout_threshold;
    double dropout_scale;
    /* (B, H, Sq), packed (H, Tq): row i of head h of sequence b at b * rows_batch +
       h * rows_head + its row in the arrays; so are stats, dlse and dsinks */
    ptrdiff_t rows_batch, rows_head;
    void *lse;       /* the natural logarithm of the sum; or NULL */
    void *stats;     /* (rows, 2): for the backward pass; or NULL */
    void *workspace; /* 64-byte aligned; of the backward pass and of decode */
    const nf_decode_plan *plan;
    /* of the backward pass alone */
    nf_heads dout, dq, dk, dv;
    const void *dlse; /* or NULL */
    nf_mask_gradient mask_gradient;
    void *dmask; /* zeros */
    ptrdiff_t dmask_strides[4];
    void *dslopes;     /* (B, H, blocks of keys): the sum of each; or NULL */
    void *dsinks;      /* of each row; or NULL */
    ptrdiff_t abreast; /* KV heads whose tasks alternate: about as many as threads */
} nf_attention;

/* A task: the index-th of its pass. Every count and size follows from the shapes alone. */
typedef void nf_attention_task(const nf_attention *p, size_t index, void *scratch);
typedef size_t nf_attention_size(const nf_attention *p);

typedef struct {
    ptrdiff_t block_queries, block_keys;
    /* a task: forward_queries of one head, some blocks */
    ptrdiff_t (*forward_queries)(const nf_attention *p);
    nf_attention_size *forward_scratch;
    nf_attention_task *forward;
    /* the same for sequences of at most decode_most queries by p->plan, which decode_plan makes;
       decode_begin comes before the tasks where there is a workspace.
       Where sequences are packed, the tasks of each pass leave out what is the other's. */
    ptrdiff_t (*decode_most)(const nf_attention *p);
    nf_decode_plan (*decode_plan)(const nf_attention *p);
    void (*decode_begin)(const nf_attention *p);
    nf_attention_task *decode;
    /* backward_begin comes before the tasks, which must start in ascending order: a later one
       waits for an earlier one. */
    nf_attention_size *backward_workspace, *backward_scratch;
    void (*backward_begin)(const nf_attention *p);
    ptrdiff_t (*backward_tasks)(const nf_attention *p);
    nf_attention_task *backward;
} nf_attention_kernels;

#define NF_KERNELS_attention(K) K(attention, const nf_attention_kernels)
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

/* The way back through weight * silu(gate) * up, where hidden (2 n) is gate and then up, and
   dacted the gradient that comes back through the product behind it, weight left out:
   acted = weight * silu(gate) * up, its gradient dhidden, *dweight = sum(dacted * silu(gate) * up). */
typedef void nf_moe_swiglu_backward_kernel(const void *hidden, const void *dacted,
                                           const void *weight, void *acted, void *dhidden,
                                           void *dweight, size_t n);

#define NF_KERNELS_moe(K)                                                                  \
    K(moe_route, nf_moe_route_kernel)                                                      \
    K(moe_route_backward, nf_moe_route_backward_kernel)                                    \
    K(moe_gather_sum, nf_moe_gather_sum_kernel)                                            \
    K(moe_scatter, nf_moe_scatter_kernel)                                                  \
    K(moe_swiglu_backward, nf_moe_swiglu_backward_kernel)
#define NF_PLAIN_KERNELS_moe(K)

/* ---- quant: quantized weights ---- */

enum { NF_QUANT_PANEL = 16 }; /* columns: the int32 lanes of the widest vector */

/* Weights w = s (u - z) as the kernels read them: panels of columns, each contiguous along K,
   every group of K filled up to a multiple of 8 with anything.
   4 bits: byte (e, c, j) of a panel holds k = 8e + j low and k = 8e + 4 + j high.
   8 bits: byte (e, c, j) holds k = 4e + j. */
typedef struct {
    size_t n, k;          /* columns of the product, and its depth */
    size_t group, groups; /* the last group may be shorter */
    size_t step, depth;   /* a group's length in the layout, and that of all of K */
    size_t panels;
    int bits, half;       /* half: scales are float16, else float32 */
    const uint8_t *u;     /* (panels, depth * bits / 8, NF_QUANT_PANEL) */
    const void *scale;    /* (panels, groups, NF_QUANT_PANEL) */
    const uint16_t *zero; /* the same shape; NULL: all 1 << (bits - 1) */
} nf_quant_weights;

/* Rows of bytes, or of activations x = scale q with q in [-127, 127]. */
typedef struct {
    char *q;      /* `pitch` bytes from a row to the next; groups lie as in the weights */
    size_t pitch; /* an odd multiple of 64: rows begin on different sets of a cache */
    size_t rows;
    float *scale;   /* (rows) */
    int32_t *minus; /* (groups, rows): minus sums of q, times 8 or 128 without zeros */
} nf_quant_rows;

/* Rows `row` .. by panels `panel` .., all of K: y[i, n] of the whole product is written, or,
   of weights in one group, integers[i, n] = d, without scales. Meanwhile the cache is asked for
   `next`, `ask` bytes for 8 depths. Weights are read at `u`, where panel `panel` lies. */
typedef struct {
    const nf_quant_weights *w;
    const nf_quant_rows *x;
    const uint8_t *u;
    size_t row, rows, panel, panels;
    const float *bias; /* (n) or NULL */
    float *y;
    int32_t *integers; /* NULL: y is wanted */
    const uint8_t *next;
    size_t ask;
} nf_quant_tile;

typedef struct {
    size_t rows;       /* of the largest tile */
    size_t panels[12]; /* of a tile of 1, 2, ... rows, at most */
    size_t float_rows; /* of the largest tile of floats */
    size_t width[2];   /* bytes of a q that meets weights of 4 bits, and of 8 */
    /* Row `row` of x: from floats, and from bytes as they are. */
    void (*quantize)(const nf_quant_weights *w, const float *in, const nf_quant_rows *x,
                     size_t row);
    void (*copy)(const nf_quant_weights *w, const int8_t *in, const nf_quant_rows *x,
                 size_t row);
    void (*multiply)(const nf_quant_tile *tile);
    /* Words of 32 bits, `words` of each of NF_QUANT_PANEL rows that lie `pitch` bytes apart as
       files hold them, to a panel; `flip` is added to each byte without carry. */
    void (*pack)(const uint8_t *u, size_t pitch, size_t words, int bits, uint8_t flip,
                 uint8_t *panel);
    /* Depths begin .. end-1 of a panel as floats, (end - begin, NF_QUANT_PANEL). begin is a
       multiple of 8 from the first of its group, and end lies in that group. */
    void (*dequantize)(const nf_quant_weights *w, size_t panel, size_t begin, size_t end,
                       float *out);
    /* y[i][n] = sum of x[i][k] w[k][n] over k < depth, added to what is there unless `first`;
       n < columns <= NF_QUANT_PANEL. */
    void (*multiply_floats)(const float *x, size_t x_pitch, const float *w, size_t depth,
                            float *y, size_t y_pitch, size_t rows, size_t columns,
                            int first);
} nf_quant_kernels;

#define NF_KERNELS_quant(K)
#define NF_PLAIN_KERNELS_quant(K) K(quant, const nf_quant_kernels)

/* ---- roof: the machine's own limits, for the benchmarks ---- */

/* Runs `rounds` times through registers, or once through n bytes, asking for those `ahead` of
   what is read. The result keeps the compiler from leaving the work out. */
typedef float nf_roof_registers(size_t rounds);
typedef float nf_roof_read(const void *p, size_t bytes, size_t ahead);

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
