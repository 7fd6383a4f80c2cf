/* What the row kernels are told. A kernel of the family `rowwise` is
       kernel(args, begin, end)
   and computes rows begin .. end-1 of the op that args (one of the structs below) describes.
   A row's result depends on that row alone.

   T is the element type of the kernel. A `_step` counts elements from one row to the next (0
   repeats one row, negative runs backwards); what has no step is contiguous. */
#ifndef NF_KERNELS_ROWWISE_H
#define NF_KERNELS_ROWWISE_H
#include <stddef.h>
#include <stdint.h>

typedef void nf_row_kernel(const void *args, size_t begin, size_t end);

/* layer_norm, rms_norm: y of x, or of sum = x + residual. */
typedef struct {
    const void *x;        /* T (rows, n) */
    const void *residual; /* T (rows, n) or NULL */
    const void *weight;   /* T (n) */
    const void *bias;     /* T (n) or NULL */
    void *y;              /* T (rows, n) */
    void *sum;            /* T (rows, n) where there is a residual */
    void *stats;          /* T (rows, 2) mean, 1/deviation; of rms_norm (rows) 1/rms */
    ptrdiff_t x_step, residual_step;
    size_t n;
    double eps;
} nf_norm;

/* layer_norm_backward, rms_norm_backward. begin is a multiple of NF_NORM_BLOCK: each block of
   rows has a sum of its own for weight and bias. */
enum { NF_NORM_BLOCK = 32 };

typedef struct {
    const void *x;      /* T (rows, n): what was normalized */
    const void *dy;     /* T (rows, n) */
    const void *dsum;   /* T (rows, n), added to dx, or NULL */
    const void *weight; /* T (n) */
    const void *stats;
    void *dx;   /* T (rows, n) */
    void *part; /* T (blocks, 1 or 2, n): dweight, then dbias (layer_norm) */
    ptrdiff_t x_step, dy_step, dsum_step;
    size_t n;
} nf_norm_backward;

/* column_sums: here `rows` begin .. end-1 are columns; out[i] = sum over r of x[r][i]. */
typedef struct {
    const void *x; /* T (rows, step) */
    void *out;     /* T (columns) */
    size_t rows, step;
} nf_column_sums;

/* softmax, log_softmax (of x; dy is NULL) and their backward kernels (x is then the y of the
   forward). */
typedef struct {
    const void *x;
    const void *dy;
    void *out;
    ptrdiff_t x_step, dy_step;
    size_t n;
} nf_softmax;

/* cross_entropy and token_log_probs (sign -1, smoothing and z_loss 0). */
typedef struct {
    const void *logits;     /* T (rows, n) */
    const int64_t *targets; /* (rows), each within 0 .. n-1 or ignore_index */
    void *loss;             /* T (rows); NULL in the backward */
    void *lse;       /* T (rows, 2): m = max logits, log sum exp(scale (logits - m)) */
    const void *dy;  /* T (rows); backward alone, as are the next two */
    void *dlogits;   /* T (rows, n) */
    double dy_scale; /* dy counts times this */
    ptrdiff_t logits_step, dy_step;
    int64_t ignore_index;
    double scale, smoothing, z_loss, sign;
    size_t n;
} nf_cross_entropy;

/* softmax_entropy. */
typedef struct {
    const void *logits; /* T (rows, n) */
    void *entropy;      /* T (rows) */
    void *lse;          /* T (rows, 2): as above */
    const void *dy;     /* T (rows); backward alone, as is dlogits */
    void *dlogits;      /* T (rows, n) */
    ptrdiff_t logits_step, dy_step;
    double scale;
    size_t n;
} nf_entropy;

/* categorical: an element of each row by its weight. */
typedef struct {
    const void *weights; /* T (rows, n) */
    const double *u;     /* (rows), each in [0, 1) */
    int64_t *chosen;     /* (rows) */
    ptrdiff_t step;
    size_t n;
} nf_categorical;

/* embedding: out[row] = weight[ids[row]]. */
typedef struct {
    const int64_t *ids; /* (rows), each a row of weight */
    const void *weight; /* T (*, n) */
    void *out;          /* T (rows, n) */
    ptrdiff_t weight_step;
    size_t n;
} nf_embedding;

/* embedding_backward: dweight[row] = sum of dy[t] over the list head[row], next[head[row]] ...
   in that order, until -1. */
typedef struct {
    const int64_t *head, *next;
    const void *dy; /* T (*, n) */
    void *dweight;  /* T (rows, n) */
    ptrdiff_t dy_step;
    size_t n;
} nf_embedding_backward;

/* rotary: rows are those of (B, H, S). */
typedef struct {
    const void *x;         /* T (B, H, S, dim) with these steps */
    const void *cos, *sin; /* T (B, H, S, rotary / 2) with these steps */
    void *out;             /* T (B, H, S, dim) with these steps; may be x */
    ptrdiff_t x_step[3], cos_step[3], sin_step[3], out_step[3];
    size_t shape[3], dim, rotary;
    int interleaved; /* pairs are (2i, 2i+1), not (i, i + rotary/2) */
    int inverse;     /* by the negative angle */
} nf_rotary;

#endif
