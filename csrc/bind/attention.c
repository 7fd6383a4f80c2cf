/* scaled_dot_product_attention: the checks, and arrays into strides. */
#include <math.h>

#include "bind/arguments.h"
#include "bind/families.h"
#include "ops/attention.h"

#define OP "scaled_dot_product_attention"

/* What a call owns. */
typedef struct {
    PyArrayObject *q, *k, *v; /* rows contiguous */
    PyArrayObject *out, *lse, *stats;
    PyArrayObject *dout, *dlse, *dq, *dk, *dv;
    nf_attention p;
    const nf_attention_kernels *kernels;
    int type;
} call;

static void
release(call *c)
{
    Py_XDECREF(c->q);
    Py_XDECREF(c->k);
    Py_XDECREF(c->v);
    Py_XDECREF(c->out);
    Py_XDECREF(c->lse);
    Py_XDECREF(c->stats);
    Py_XDECREF(c->dout);
    Py_XDECREF(c->dlse);
    Py_XDECREF(c->dq);
    Py_XDECREF(c->dk);
    Py_XDECREF(c->dv);
}

static nf_heads
heads_of(PyArrayObject *array)
{
    const npy_intp item = PyArray_ITEMSIZE(array), *strides = PyArray_STRIDES(array);
    return (nf_heads){PyArray_DATA(array), strides[0] / item, strides[1] / item,
                      strides[2] / item};
}

/* `object` with its last axis contiguous and its strides whole elements: itself where it is so,
   else a copy. */
static PyArrayObject *
take(PyObject *object, int type, const char *name)
{
    PyArrayObject *array = nf_array(object, type, 4, OP, name);
    if (array == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "%s: %s must be an array, got None", OP, name);
        }
        return NULL;
    }
    const npy_intp item = PyArray_ITEMSIZE(array);
    for (int i = 0; i < 3; i++) {
        if (PyArray_STRIDE(array, i) % item) {
            PyArrayObject *copy = nf_new_like(array);
            if (copy != NULL && PyArray_CopyInto(copy, array) < 0) {
                Py_CLEAR(copy);
            }
            return copy;
        }
    }
    return nf_rows_contiguous(array);
}

/* A new (B, H, S, D) array: in memory (B, S, H, D) where `like` has its heads inside its
   rows, so that a view of joined heads has neighbours of the same layout. */
static PyArrayObject *
new_heads(const npy_intp *shape, int type, PyArrayObject *like)
{
    const npy_intp *strides = PyArray_STRIDES(like);
    if (shape[1] < 2 || strides[1] >= strides[2]) {
        return nf_new(4, shape, type);
    }
    const npy_intp memory[4] = {shape[0], shape[2], shape[1], shape[3]};
    PyArrayObject *array = nf_new(4, memory, type);
    if (array == NULL) {
        return NULL;
    }
    PyArrayObject *view = (PyArrayObject *)PyArray_SwapAxes(array, 1, 2);
    Py_DECREF(array);
    return view;
}

/* The mask, broadcast from the right to (B, H, Sq, Sk). Borrowed. */
static int
take_mask(call *c, PyObject *object)
{
    nf_attention *p = &c->p;
    p->mask_kind = NF_NO_MASK;
    if (!nf_given(object)) {
        return 0;
    }
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: attn_mask must be an array, got %s", OP,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyArrayObject *mask = (PyArrayObject *)object;
    const int boolean = PyArray_TYPE(mask) == NPY_BOOL;
    if (!boolean && nf_array(object, c->type, -1, OP, "attn_mask") == NULL) {
        PyErr_Clear();
        PyErr_Format(
            PyExc_TypeError,
            "%s: attn_mask must be boolean (True: attend) or have the dtype of query "
            "and native, aligned memory, got %S",
            OP, PyArray_DESCR(mask));
        return -1;
    }
    const npy_intp shape[4] = {p->batch, p->heads, p->queries, p->keys};
    const int ndim = PyArray_NDIM(mask), missing = 4 - ndim;
    int fits = ndim <= 4;
    for (int i = 0; fits && i < 4; i++) {
        const npy_intp n = i < missing ? 1 : PyArray_DIM(mask, i - missing);
        const npy_intp stride = i < missing ? 0 : PyArray_STRIDE(mask, i - missing);
        const npy_intp item = PyArray_ITEMSIZE(mask);
        fits = n == 1 || n == shape[i];
        if (n != 1 && stride % item) {
            PyErr_Format(PyExc_ValueError,
                         "%s: attn_mask must have strides of whole elements; give a copy",
                         OP);
            return -1;
        }
        p->mask_strides[i] = n == 1 ? 0 : stride / item;
    }
    if (!fits) {
        PyObject *got = PyObject_GetAttrString(object, "shape");
        if (got != NULL) {
            PyErr_Format(PyExc_ValueError,
                         "%s: attn_mask must broadcast to (B, H, Sq, Sk) = (%zd, %zd, %zd, "
                         "%zd), got %R",
                         OP, shape[0], shape[1], shape[2], shape[3], got);
            Py_DECREF(got);
        }
        return -1;
    }
    p->mask = PyArray_DATA(mask);
    p->mask_kind = boolean ? NF_BOOLEAN_MASK : NF_ADDED_MASK;
    return 0;
}

static int
check_lengths(const call *c)
{
    const npy_intp *q = PyArray_DIMS(c->q), *k = PyArray_DIMS(c->k),
                   *v = PyArray_DIMS(c->v);
    if (k[0] != q[0] || k[3] != q[3]) {
        PyErr_Format(PyExc_ValueError,
                     "%s: key must have shape (%zd, Hkv, Sk, %zd) as query says, got (%zd, "
                     "%zd, %zd, %zd)",
                     OP, q[0], q[3], k[0], k[1], k[2], k[3]);
        return -1;
    }
    if (v[0] != k[0] || v[1] != k[1] || v[2] != k[2]) {
        PyErr_Format(PyExc_ValueError,
                     "%s: value must have shape (%zd, %zd, %zd, Dv) as key says, got (%zd, "
                     "%zd, %zd, %zd)",
                     OP, k[0], k[1], k[2], v[0], v[1], v[2], v[3]);
        return -1;
    }
    if (k[1] == 0 ? q[1] != 0 : q[1] % k[1] != 0) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: the heads of query must be a multiple of those of key, got %zd and "
            "%zd",
            OP, q[1], k[1]);
        return -1;
    }
    return 0;
}

enum { NOT_CAUSAL, BOTTOM_RIGHT, TOP_LEFT };

/* query, key, value, mask, scale (None: 1/sqrt(D)), causal. */
static int
take_inputs(call *c, PyObject *const *args)
{
    nf_attention *p = &c->p;
    if ((c->q = take(args[0], NPY_NOTYPE, "query")) == NULL) {
        return -1;
    }
    c->type = PyArray_TYPE(c->q);
    c->kernels = c->type == NPY_FLOAT ? nf_kernels.attention_f32 : nf_kernels.attention_f64;
    if ((c->k = take(args[1], c->type, "key")) == NULL
        || (c->v = take(args[2], c->type, "value")) == NULL || check_lengths(c) < 0) {
        return -1;
    }
    const npy_intp *q = PyArray_DIMS(c->q), *k = PyArray_DIMS(c->k);
    p->batch = q[0], p->heads = q[1], p->queries = q[2], p->dim = q[3];
    p->kv_heads = k[1], p->keys = k[2], p->value_dim = PyArray_DIM(c->v, 3);
    p->q = heads_of(c->q), p->k = heads_of(c->k), p->v = heads_of(c->v);
    if (p->queries > 1 << 30 || p->keys > 1 << 30) {
        PyErr_Format(PyExc_ValueError, "%s: at most 2^30 queries and keys, got %zd and %zd",
                     OP, p->queries, p->keys);
        return -1;
    }
    p->scale = 1 / sqrt(p->dim > 0 ? (double)p->dim : 1.0);
    if (nf_given(args[4])) {
        p->scale = PyFloat_AsDouble(args[4]);
        if (p->scale == -1.0 && PyErr_Occurred()) {
            return -1;
        }
    }
    const long causal = PyLong_AsLong(args[5]);
    if (causal == -1 && PyErr_Occurred()) {
        return -1;
    }
    p->left = NF_UNBOUNDED;
    p->right = causal == NOT_CAUSAL ? NF_UNBOUNDED : 0;
    p->offset = causal == TOP_LEFT ? 0 : p->keys - p->queries;
    return take_mask(c, args[3]);
}

/* out given by the caller, or new. */
static PyArrayObject *
take_out(call *c, PyObject *object)
{
    const nf_attention *p = &c->p;
    const npy_intp shape[4] = {p->batch, p->heads, p->queries, p->value_dim};
    if (!nf_given(object)) {
        return new_heads(shape, c->type, c->q);
    }
    PyArrayObject *const out = nf_array(object, c->type, 4, OP, "out");
    PyArrayObject *const inputs[] = {c->q, c->k, c->v};
    for (int i = 0; i < 3; i++) {
        if (out == NULL || nf_check_out(out, 4, shape, c->type, inputs[i], OP) < 0) {
            return NULL;
        }
    }
    Py_INCREF(out);
    return out;
}

/* attention_forward(query, key, value, mask, scale, causal, out, want) -> out, where want is 0;
   (out, lse) where it is 1; (out, lse, stats) where it is 2. */
static PyObject *
attention_forward(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    call c = {0};
    PyObject *result = NULL;
    if (nf_check_count(OP, count, 8) < 0 || take_inputs(&c, args) < 0) {
        goto fail;
    }
    const long want = PyLong_AsLong(args[7]);
    if ((want == -1 && PyErr_Occurred()) || (c.out = take_out(&c, args[6])) == NULL) {
        goto fail;
    }
    nf_attention *const p = &c.p;
    const npy_intp rows[4] = {p->batch, p->heads, p->queries, 2};
    if ((want >= 1 && (c.lse = nf_new(3, rows, c.type)) == NULL)
        || (want >= 2 && (c.stats = nf_new(4, rows, c.type)) == NULL)) {
        goto fail;
    }
    p->out = heads_of(c.out);
    p->lse = c.lse ? PyArray_DATA(c.lse) : NULL;
    p->stats = c.stats ? PyArray_DATA(c.stats) : NULL;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_attention_forward(c.kernels, p);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, OP) < 0) {
        goto fail;
    }
    if (want == 0) {
        result = Py_NewRef((PyObject *)c.out);
    }
    else if (want == 1) {
        result = PyTuple_Pack(2, c.out, c.lse);
    }
    else {
        result = PyTuple_Pack(3, c.out, c.lse, c.stats);
    }
fail:
    release(&c);
    return result;
}

/* dq, dk and dv as views of one new (B, S, (H + 2 Hkv) D) array, which is returned. */
static PyArrayObject *
new_packed(call *c)
{
    const nf_attention *p = &c->p;
    if (p->queries != p->keys || p->dim != p->value_dim) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: packed gradients need query, key and value of one length and head "
            "size",
            OP);
        return NULL;
    }
    const npy_intp heads[3] = {p->heads, p->kv_heads, p->kv_heads};
    const npy_intp item = PyArray_ITEMSIZE(c->q);
    const npy_intp width = (p->heads + 2 * p->kv_heads) * p->dim;
    const npy_intp shape[3] = {p->batch, p->queries, width};
    PyArrayObject *packed = nf_new(3, shape, c->type);
    PyArrayObject **const parts[3] = {&c->dq, &c->dk, &c->dv};
    npy_intp first = 0;
    for (int i = 0; packed != NULL && i < 3; i++) {
        npy_intp view[4] = {p->batch, heads[i], p->queries, p->dim};
        npy_intp strides[4] = {p->queries * width * item, p->dim * item, width * item,
                               item};
        *parts[i] = (PyArrayObject *)PyArray_New(
            &PyArray_Type, 4, view, c->type, strides, PyArray_BYTES(packed) + first * item,
            0, NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED, NULL);
        if (*parts[i] == NULL) {
            Py_CLEAR(packed);
        }
        first += heads[i] * p->dim;
    }
    return packed;
}

/* The gradient of one of the outputs, or zeros where it is None. */
static PyArrayObject *
take_gradient(call *c, PyObject *object, int ndim, const npy_intp *shape, const char *name)
{
    if (!nf_given(object)) {
        return nf_new_zeroed(ndim, shape, c->type);
    }
    if (nf_array(object, c->type, ndim, OP, name) == NULL
        || nf_check_shape((PyArrayObject *)object, ndim, shape, OP, name) < 0) {
        return NULL;
    }
    return ndim == 4 ? take(object, c->type, name) : nf_contiguous((PyArrayObject *)object);
}

/* attention_backward(query, key, value, mask, scale, causal, out, stats, dout, dlse, packed)
   -> (dq, dk, dv); one array that holds all three where packed is true. */
static PyObject *
attention_backward(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    call c = {0};
    PyArrayObject *packed = NULL;
    PyObject *result = NULL;
    if (nf_check_count(OP, count, 11) < 0 || take_inputs(&c, args) < 0) {
        goto fail;
    }
    nf_attention *const p = &c.p;
    const npy_intp rows[4] = {p->batch, p->heads, p->queries, 2};
    const npy_intp out_shape[4] = {p->batch, p->heads, p->queries, p->value_dim};
    if ((c.out = take(args[6], c.type, "out")) == NULL
        || nf_check_shape(c.out, 4, out_shape, OP, "out") < 0
        || (c.stats = take(args[7], c.type, "stats")) == NULL
        || nf_check_shape(c.stats, 4, rows, OP, "stats") < 0
        || (c.dout = take_gradient(&c, args[8], 4, out_shape, "the gradient of out"))
               == NULL) {
        goto fail;
    }
    if (nf_given(args[9])
        && (c.dlse = take_gradient(&c, args[9], 3, rows, "the gradient of lse")) == NULL) {
        goto fail;
    }
    const int wants_packed = PyObject_IsTrue(args[10]);
    if (wants_packed < 0) {
        goto fail;
    }
    if (wants_packed) {
        if ((packed = new_packed(&c)) == NULL) {
            goto fail;
        }
    }
    else if ((c.dq = new_heads(PyArray_DIMS(c.q), c.type, c.q)) == NULL
             || (c.dk = new_heads(PyArray_DIMS(c.k), c.type, c.k)) == NULL
             || (c.dv = new_heads(PyArray_DIMS(c.v), c.type, c.v)) == NULL) {
        goto fail;
    }
    p->out = heads_of(c.out), p->dout = heads_of(c.dout);
    p->dq = heads_of(c.dq), p->dk = heads_of(c.dk), p->dv = heads_of(c.dv);
    p->stats = PyArray_DATA(c.stats);
    p->dlse = c.dlse ? PyArray_DATA(c.dlse) : NULL;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_attention_backward(c.kernels, p);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, OP) < 0) {
        goto fail;
    }
    result =
        wants_packed ? Py_NewRef((PyObject *)packed) : PyTuple_Pack(3, c.dq, c.dk, c.dv);
fail:
    Py_XDECREF(packed);
    release(&c);
    return result;
}

static PyMethodDef methods[] = {
    {"attention_forward", (PyCFunction)(void (*)(void))attention_forward, METH_FASTCALL,
     NULL},
    {"attention_backward", (PyCFunction)(void (*)(void))attention_backward, METH_FASTCALL,
     NULL},
    {NULL, NULL, 0, NULL},
};

int
nf_add_attention(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
