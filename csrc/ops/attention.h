/* Scaled-dot-product attention: the plans. */
#ifndef NF_OPS_ATTENTION_H
#define NF_OPS_ATTENTION_H
#include "core/status.h"
#include "kernels/kernels.h"

/* No bound to what a query sees. */
#define NF_UNBOUNDED ((ptrdiff_t)1 << 40)

/* Fills out, and lse and stats where they are given. */
nf_status nf_attention_forward(const nf_attention_kernels *kernels, const nf_attention *p);

/* Fills dq, dk and dv, and dmask, dslopes and dsinks where they are given, from dout and what
   the forward pass left in out and stats. */
nf_status nf_attention_backward(const nf_attention_kernels *kernels, const nf_attention *p);

#endif
