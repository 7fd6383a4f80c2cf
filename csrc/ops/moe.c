#include "ops/moe.h"

#include <string.h>

#include "core/threads.h"
#include "ops/parts.h"

/* Tokens are independent; a task has about this many bytes of them. */
enum { TASK_BYTES = 1 << 17 };

typedef struct {
    size_t itemsize, tokens, tokens_of_task;
    const nf_moe_router *router;
    const nf_moe_routing *routing;
    const char *in, *weight, *other;
    const uint8_t *mask;
    const int64_t *expert_in;
    int64_t *expert;
    char *out, *out_weight;
    size_t width;
} moe_work;

/* Runs `task` over the tokens, each of which touches `bytes`. */
static nf_status
over_tokens(moe_work *w, size_t bytes, double cost, size_t scratch, nf_task task)
{
    w->tokens_of_task = TASK_BYTES / (bytes + 1) + 1;
    const size_t tasks = nf_parts(w->tokens, w->tokens_of_task);
    return nf_parallel_apart(tasks, cost * (double)w->tokens, scratch, task, w);
}

#define FOR_TOKENS(w, t)                                                                   \
    for (size_t t = index * (w)->tokens_of_task,                                           \
                t##_end = nf_least((w)->tokens, t + (w)->tokens_of_task);                  \
         t < t##_end; t++)

static void
route_tokens(size_t index, void *pointer, void *scratch)
{
    const moe_work *w = pointer;
    const size_t experts = w->router->experts, k = w->router->top_k, size = w->itemsize;
    nf_moe_route_kernel *const kernel =
        size == 8 ? nf_kernels.moe_route_f64 : nf_kernels.moe_route_f32;
    FOR_TOKENS(w, t)
    {
        char *const scores = w->out + t * experts * size;
        char *const weight = w->out_weight + t * k * size;
        if (w->mask == NULL || w->mask[t]) {
            kernel(w->router, w->in + t * experts * size, scores, w->expert + t * k, weight,
                   scratch);
            continue;
        }
        memset(scores, 0, experts * size);
        memset(weight, 0, k * size);
        for (size_t j = 0; j < k; j++) {
            w->expert[t * k + j] = -1;
        }
    }
}

nf_status
nf_moe_route(const nf_moe_router *router, size_t itemsize, size_t tokens,
             const void *logits, const uint8_t *mask, void *scores, int64_t *expert,
             void *weight)
{
    moe_work w = {.itemsize = itemsize,
                  .tokens = tokens,
                  .router = router,
                  .in = logits,
                  .mask = mask,
                  .expert = expert,
                  .out = scores,
                  .out_weight = weight};
    /* About 10 cycles an exp, one or two a comparison. */
    const double cost = (double)router->experts * (15.0 + 2.0 * (double)router->top_k);
    return over_tokens(&w, 8 * (size_t)cost, cost, 4 * router->experts * itemsize,
                       route_tokens);
}

static void
route_backward_tokens(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const moe_work *w = pointer;
    const size_t experts = w->router->experts, k = w->router->top_k, size = w->itemsize;
    nf_moe_route_backward_kernel *const kernel =
        size == 8 ? nf_kernels.moe_route_backward_f64 : nf_kernels.moe_route_backward_f32;
    FOR_TOKENS(w, t)
    {
        const size_t at = t * experts * size;
        kernel(w->router, w->in + at, w->expert_in + t * k,
               w->weight == NULL ? NULL : w->weight + t * k * size,
               w->other == NULL ? NULL : w->other + at, w->out + at);
    }
}

nf_status
nf_moe_route_backward(const nf_moe_router *router, size_t itemsize, size_t tokens,
                      const void *scores, const int64_t *expert, const void *dweight,
                      const void *dscores, void *dlogits)
{
    moe_work w = {.itemsize = itemsize,
                  .tokens = tokens,
                  .router = router,
                  .in = scores,
                  .expert_in = expert,
                  .weight = dweight,
                  .other = dscores,
                  .out = dlogits};
    const double cost = 6.0 * (double)router->experts;
    return over_tokens(&w, 8 * (size_t)cost, cost, 0, route_backward_tokens);
}

/* Drops what exceeds the capacity: row -1. */
static void
drop(const int64_t *expert, size_t tokens, size_t top_k, int64_t capacity, int64_t *counts,
     int64_t *row)
{
    for (size_t j = 0; j < top_k; j++) {
        for (size_t t = 0; t < tokens; t++) {
            const int64_t e = expert[t * top_k + j];
            if (e < 0) {
                continue;
            }
            if (counts[e] >= capacity) {
                row[t * top_k + j] = -1;
            }
            else {
                counts[e]++;
            }
        }
    }
}

size_t
nf_moe_count(const int64_t *expert, size_t tokens, size_t top_k, size_t experts,
             size_t capacity, int64_t *chosen, int64_t *counts, int64_t *offsets,
             int64_t *row)
{
    memset(chosen, 0, experts * sizeof *chosen);
    for (size_t i = 0; i < tokens * top_k; i++) {
        row[i] = expert[i] < 0 ? -1 : 0;
        if (expert[i] >= 0) {
            chosen[expert[i]]++;
        }
    }
    if (capacity < tokens * top_k) {
        memset(counts, 0, experts * sizeof *counts);
        drop(expert, tokens, top_k, (int64_t)capacity, counts, row);
    }
    else {
        memcpy(counts, chosen, experts * sizeof *counts);
    }
    offsets[0] = 0;
    for (size_t e = 0; e < experts; e++) {
        offsets[e + 1] = offsets[e] + counts[e];
    }
    return (size_t)offsets[experts];
}

void
nf_moe_place(const int64_t *expert, size_t tokens, size_t top_k, size_t experts,
             const int64_t *offsets, int64_t *next, int64_t *source, int64_t *row)
{
    memcpy(next, offsets, experts * sizeof *next);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t j = 0; j < top_k; j++) {
            const size_t i = t * top_k + j;
            if (row[i] >= 0) {
                row[i] = next[expert[i]]++;
                source[row[i]] = (int64_t)t;
            }
        }
    }
}

int
nf_moe_is_sound(const nf_moe_routing *r)
{
    size_t used = 0;
    for (size_t i = 0; i < r->tokens * r->top_k; i++) {
        if (r->row[i] >= 0) {
            used++;
            if ((size_t)r->row[i] >= r->rows
                || (size_t)r->source[r->row[i]] != i / r->top_k) {
                return 0;
            }
        }
    }
    if (used != r->rows || r->offsets[0] != 0
        || (size_t)r->offsets[r->experts] != r->rows) {
        return 0;
    }
    for (size_t e = 0; e < r->experts; e++) {
        if (r->offsets[e] > r->offsets[e + 1]) {
            return 0;
        }
    }
    return 1;
}

static void
dispatch_rows(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const moe_work *w = pointer;
    const size_t bytes = w->width * w->itemsize;
    FOR_TOKENS(w, r)
    {
        memcpy(w->out + r * bytes, w->in + (size_t)w->routing->source[r] * bytes, bytes);
    }
}

nf_status
nf_moe_dispatch(const nf_moe_routing *routing, size_t itemsize, const void *x, size_t width,
                void *out)
{
    moe_work w = {.itemsize = itemsize,
                  .tokens = routing->rows,
                  .routing = routing,
                  .in = x,
                  .out = out,
                  .width = width};
    return over_tokens(&w, 2 * width * itemsize, (double)(width * itemsize) / 8, 0,
                       dispatch_rows);
}

static void
combine_tokens(size_t index, void *pointer, void *scratch)
{
    const moe_work *w = pointer;
    const size_t k = w->routing->top_k, size = w->itemsize, bytes = w->width * size;
    const void **const rows = scratch;
    char *const weight = (char *)(rows + k);
    nf_moe_gather_sum_kernel *const kernel =
        size == 8 ? nf_kernels.moe_gather_sum_f64 : nf_kernels.moe_gather_sum_f32;
    FOR_TOKENS(w, t)
    {
        size_t count = 0;
        for (size_t j = 0; j < k; j++) {
            const int64_t row = w->routing->row[t * k + j];
            if (row >= 0) {
                rows[count] = w->in + (size_t)row * bytes;
                if (w->weight != NULL) {
                    memcpy(weight + count * size, w->weight + (t * k + j) * size, size);
                }
                count++;
            }
        }
        kernel(rows, w->weight == NULL ? NULL : weight, count, w->out + t * bytes,
               w->width);
    }
}

nf_status
nf_moe_combine(const nf_moe_routing *routing, size_t itemsize, const void *y,
               const void *weight, size_t width, void *out)
{
    moe_work w = {.itemsize = itemsize,
                  .tokens = routing->tokens,
                  .routing = routing,
                  .in = y,
                  .weight = weight,
                  .out = out,
                  .width = width};
    const size_t bytes = (routing->top_k + 1) * width * itemsize;
    return over_tokens(&w, bytes, (double)bytes / 16,
                       routing->top_k * (sizeof(void *) + itemsize), combine_tokens);
}

/* The row of slot i; -1 of one that was dropped, whose weight has no gradient. */
static int64_t
row_of_slot(const moe_work *w, size_t i)
{
    const int64_t row = w->routing->row[i];
    if (row < 0) {
        memset(w->out_weight + i * w->itemsize, 0, w->itemsize);
    }
    return row;
}

static void
combine_backward_tokens(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const moe_work *w = pointer;
    const size_t k = w->routing->top_k, size = w->itemsize, bytes = w->width * size;
    nf_moe_scatter_kernel *const kernel =
        size == 8 ? nf_kernels.moe_scatter_f64 : nf_kernels.moe_scatter_f32;
    FOR_TOKENS(w, t)
    {
        for (size_t j = 0; j < k; j++) {
            const size_t i = t * k + j;
            const int64_t row = row_of_slot(w, i);
            if (row >= 0) {
                const size_t at = (size_t)row * bytes;
                kernel(w->in + t * bytes, w->other + at, w->weight + i * size, w->out + at,
                       w->out_weight + i * size, w->width);
            }
        }
    }
}

nf_status
nf_moe_combine_backward(const nf_moe_routing *routing, size_t itemsize, const void *dy,
                        const void *y, const void *weight, size_t width, void *drows,
                        void *dweight)
{
    moe_work w = {.itemsize = itemsize,
                  .tokens = routing->tokens,
                  .routing = routing,
                  .in = dy,
                  .other = y,
                  .weight = weight,
                  .out = drows,
                  .out_weight = dweight,
                  .width = width};
    const size_t bytes = (2 * routing->top_k + 1) * width * itemsize;
    return over_tokens(&w, bytes, (double)bytes / 16, 0, combine_backward_tokens);
}

typedef struct {
    moe_work tokens;
    char *acted, *dhidden;
} swiglu_work;

static void
swiglu_backward_tokens(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const swiglu_work *s = pointer;
    const moe_work *w = &s->tokens;
    const size_t k = w->routing->top_k, size = w->itemsize, bytes = w->width * size;
    nf_moe_swiglu_backward_kernel *const kernel =
        size == 8 ? nf_kernels.moe_swiglu_backward_f64 : nf_kernels.moe_swiglu_backward_f32;
    FOR_TOKENS(w, t)
    {
        for (size_t j = 0; j < k; j++) {
            const size_t i = t * k + j;
            const int64_t row = row_of_slot(w, i);
            if (row >= 0) {
                const size_t at = (size_t)row * bytes;
                kernel(w->in + 2 * at, w->other + at, w->weight + i * size, s->acted + at,
                       s->dhidden + 2 * at, w->out_weight + i * size, w->width);
            }
        }
    }
}

nf_status
nf_moe_swiglu_backward(const nf_moe_routing *routing, size_t itemsize, const void *hidden,
                       const void *dacted, const void *weight, size_t width, void *acted,
                       void *dhidden, void *dweight)
{
    swiglu_work s = {.tokens = {.itemsize = itemsize,
                                .tokens = routing->tokens,
                                .routing = routing,
                                .in = hidden,
                                .other = dacted,
                                .weight = weight,
                                .out_weight = dweight,
                                .width = width},
                     .acted = acted,
                     .dhidden = dhidden};
    const size_t bytes = 6 * routing->top_k * width * itemsize;
    return over_tokens(&s.tokens, bytes, (double)bytes / 2, 0, swiglu_backward_tokens);
}
