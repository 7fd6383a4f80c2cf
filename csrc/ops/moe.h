/* Mixture of experts: the plans.

   A token t has top_k slots j. Slot (t, j) that is not dropped is one row of the sorted
   arrays: rows of expert e lie at offsets[e] .. offsets[e + 1], in ascending (t, j);
   row[t, j] is its number, or -1 where the slot was dropped; source[row] is t. */
#ifndef NF_OPS_MOE_H
#define NF_OPS_MOE_H
#include "core/status.h"
#include "kernels/kernels.h"

typedef struct {
    size_t tokens, top_k, experts, rows;
    const int64_t *offsets; /* (experts + 1) */
    const int64_t *source;  /* (rows) */
    const int64_t *row;     /* (tokens, top_k) */
} nf_moe_routing;

/* `itemsize`, here and below: 4 for float32, 8 for float64. A token whose `mask` is 0 (NULL:
   none) is padding: scores and weights 0, experts -1. */
nf_status nf_moe_route(const nf_moe_router *router, size_t itemsize, size_t tokens,
                       const void *logits, const uint8_t *mask, void *scores,
                       int64_t *expert, void *weight);
/* dweight or dscores may be NULL. */
nf_status nf_moe_route_backward(const nf_moe_router *router, size_t itemsize, size_t tokens,
                                const void *scores, const int64_t *expert,
                                const void *dweight, const void *dscores, void *dlogits);

/* Rows of each expert, at most `capacity`; `chosen` counts them before capacity. Where it
   drops, first choices of all tokens come before second ones, earlier tokens before later
   (GShard, Lepikhin et al. 2020). Writes row as 0 or -1, offsets, and returns the rows. */
size_t nf_moe_count(const int64_t *expert, size_t tokens, size_t top_k, size_t experts,
                    size_t capacity, int64_t *chosen, int64_t *counts, int64_t *offsets,
                    int64_t *row);
/* Then numbers them. `next` (experts): scratch. */
void nf_moe_place(const int64_t *expert, size_t tokens, size_t top_k, size_t experts,
                  const int64_t *offsets, int64_t *next, int64_t *source, int64_t *row);

/* Whether every index lies where it must. */
int nf_moe_is_sound(const nf_moe_routing *routing);

/* out[r] = x[source[r]];  out[t] = sum_j weight[t,j] y[row[t,j]] (weight NULL: 1). */
nf_status nf_moe_dispatch(const nf_moe_routing *routing, size_t itemsize, const void *x,
                          size_t width, void *out);
nf_status nf_moe_combine(const nf_moe_routing *routing, size_t itemsize, const void *y,
                         const void *weight, size_t width, void *out);
/* drows[row[t,j]] = weight[t,j] dy[t];  dweight[t,j] = dy[t] . y[row[t,j]]. */
nf_status nf_moe_combine_backward(const nf_moe_routing *routing, size_t itemsize,
                                  const void *dy, const void *y, const void *weight,
                                  size_t width, void *drows, void *dweight);
/* The same for weight * silu(gate) * up of rows hidden (rows, 2 width), gate first. */
nf_status nf_moe_swiglu_backward(const nf_moe_routing *routing, size_t itemsize,
                                 const void *hidden, const void *dacted, const void *weight,
                                 size_t width, void *acted, void *dhidden, void *dweight);

#endif
