/* The plans of an optimizer's step over many arrays at once. */
#ifndef NF_OPS_OPTIMIZER_H
#define NF_OPS_OPTIMIZER_H
#include "core/status.h"
#include "kernels/kernels.h"

/* A parameter, its gradient and its two moments: n contiguous elements each. */
typedef struct {
    void *p;
    const void *g;
    void *m, *v;
    size_t n;
    int is_double;
    double decay;
} nf_parameter;

typedef struct {
    double lr, beta1, beta2, eps;
    double scale; /* of every gradient */
    double count; /* of steps, this one included */
} nf_adamw_options;

nf_status nf_adamw_step(const nf_parameter *parameters, size_t count,
                        const nf_adamw_options *options);

/* The root of the sum of squares of all elements g, added up in float64 in one order. */
nf_status nf_global_norm(const nf_parameter *parameters, size_t count, double *norm);

#endif
