/* What the bindings of attention share: its inputs, checked and as the kernels want them. */
#ifndef NF_BIND_ATTENTION_H
#define NF_BIND_ATTENTION_H
#include "bind/arguments.h"
#include "ops/attention.h"

/* Who calls, in messages. */
#define SDPA   "scaled_dot_product_attention"
#define VARLEN "attention_varlen"
#define PAGED  "paged_attention"

/* What a call owns. */
typedef struct {
    const char *op;
    PyArrayObject *q, *k, *v; /* rows contiguous */
    PyArrayObject *mask;      /* borrowed */
    PyArrayObject *out, *exact, *lse, *stats;
    PyArrayObject *dout, *dlse, *dq, *dk, *dv;
    PyArrayObject *slopes, *sinks, *kv_lengths, *q_starts, *k_starts, *block_table;
    PyArrayObject *k_scales, *v_scales;
    PyArrayObject *dmask, *dslopes, *dsinks;
    nf_attention p;
    const nf_attention_kernels *kernels;
    int type;    /* of query, out and their gradients */
    int numbers; /* of all that is computed: type, or float32 where that is a short one */
} nf_attention_call;

void nf_attention_release(nf_attention_call *c);

/* `object` with its last axis contiguous and its strides whole elements: itself where it is so,
   else a copy. A new reference; NULL with an error. */
PyArrayObject *nf_attention_take(PyObject *object, int type, const char *op,
                                 const char *name);

/* Of a type that nf_attention_inputs has let through: the only one that is not NumPy's own is
   bfloat16. */
static inline nf_storage
nf_storage_of(PyArrayObject *array)
{
    const int type = PyArray_TYPE(array);
    return type == NPY_HALF            ? NF_FLOAT16
           : type == NPY_INT8          ? NF_INT8
           : PyTypeNum_ISUSERDEF(type) ? NF_BFLOAT16
                                       : NF_AS_COMPUTED;
}

static inline nf_heads
nf_heads_of(PyArrayObject *array)
{
    const npy_intp item = PyArray_ITEMSIZE(array), *strides = PyArray_STRIDES(array);
    return (nf_heads){.data = PyArray_DATA(array),
                      .batch = strides[0] / item,
                      .head = strides[1] / item,
                      .row = strides[2] / item,
                      .storage = nf_storage_of(array)};
}

/* The same, without a batch axis where sequences are packed. */
static inline nf_heads
nf_heads_in(const nf_attention *p, PyArrayObject *array)
{
    nf_heads h = nf_heads_of(array);
    h.batch = p->q_starts ? 0 : h.batch;
    return h;
}

/* Where things stand in the tuple of features. */
enum {
    LEFT,
    RIGHT,
    SOFTCAP,
    SLOPES,
    SINKS,
    KV_LENGTHS,
    DROPOUT,
    DROPOUT_KEY,
    Q_STARTS,
    K_STARTS,
    BLOCK_TABLE,
    K_SCALES,
    V_SCALES,
    FEATURES
};

/* The batch: its sequences may be packed, keys and values in blocks. -1 with an error. */
int nf_attention_sequences(nf_attention_call *c, PyObject *const *features);

/* args: query, key, value (B, heads, S, D), mask, scale (None: 1/sqrt(D)), the sum of CAUSAL
   and TOP_LEFT, features: None, or the tuple (left, right, softcap, alibi_slopes, sinks,
   kv_lengths, dropout_p, key, cu_seqlens_q, cu_seqlens_k, block_table, key_scale,
   value_scale).
   With cu_seqlens the arrays are packed, B is 1. With a block table key and value are
   (blocks, Hkv, block_size, D). -1 with an error. */
int nf_attention_inputs(nf_attention_call *c, PyObject *const *args);

#endif
