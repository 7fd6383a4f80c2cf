/* attention_forward, attention_backward: memory for the results, and the call. */
#include "bind/attention.h"
#include "bind/families.h"

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

/* out given by the caller, in memory (B, H, S, D) or (B, S, H, D); or new. */
static PyArrayObject *
take_out(nf_attention_call *c, PyObject *object)
{
    const nf_attention *p = &c->p;
    const npy_intp shape[4] = {PyArray_DIM(c->q, 0), p->heads, PyArray_DIM(c->q, 2),
                               p->value_dim};
    if (!nf_given(object)) {
        return new_heads(shape, c->type, c->q);
    }
    PyArrayObject *const out = nf_array(object, c->type, 4, c->op, "out");
    PyArrayObject *const inputs[] = {c->q,      c->k,     c->v,        c->mask,
                                     c->slopes, c->sinks, c->k_scales, c->v_scales};
    const int count = sizeof inputs / sizeof *inputs;
    if (out == NULL || nf_check_shape(out, 4, shape, c->op, "out") < 0) {
        return NULL;
    }
    if (PyArray_IS_C_CONTIGUOUS(out)) {
        return nf_take_out(object, 4, shape, c->type, inputs, count, c->op);
    }
    PyObject *const turned = PyArray_SwapAxes(out, 1, 2);
    PyArrayObject *const checked =
        turned == NULL ? NULL
                       : nf_take_out(turned, 4, PyArray_DIMS((PyArrayObject *)turned),
                                     c->type, inputs, count, c->op);
    Py_XDECREF(turned);
    if (checked == NULL) {
        return NULL;
    }
    Py_DECREF(checked);
    Py_INCREF(out);
    return out;
}

/* attention_forward(query, key, value, mask, scale, causal, features, out, want)
   -> out, where want is 0; (out, lse) where it is 1; (out, lse, stats, exact) where it is 2: exact
   is out, or where that is of a short type, what was rounded to it. */
static PyObject *
attention_forward(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    nf_attention_call c = {0};
    PyObject *result = NULL;
    if (nf_check_count(SDPA, count, 9) < 0 || nf_attention_inputs(&c, args) < 0) {
        goto fail;
    }
    const long want = PyLong_AsLong(args[8]);
    if ((want == -1 && PyErr_Occurred()) || (c.out = take_out(&c, args[7])) == NULL) {
        goto fail;
    }
    nf_attention *const p = &c.p;
    const npy_intp rows[4] = {PyArray_DIM(c.q, 0), p->heads, PyArray_DIM(c.q, 2), 2};
    if ((want >= 1 && (c.lse = nf_new(3, rows, c.numbers)) == NULL)
        || (want >= 2 && (c.stats = nf_new(4, rows, c.numbers)) == NULL)) {
        goto fail;
    }
    if (want >= 2 && c.type != c.numbers) {
        if ((c.exact = new_heads(PyArray_DIMS(c.out), c.numbers, c.q)) == NULL) {
            goto fail;
        }
        p->exact = nf_heads_in(p, c.exact);
    }
    p->out = nf_heads_in(p, c.out);
    p->lse = c.lse ? PyArray_DATA(c.lse) : NULL;
    p->stats = c.stats ? PyArray_DATA(c.stats) : NULL;
    nf_status status = NF_OK;
    /* Without an element of out there is nothing to do, for any number of rows. */
    if (want > 0 || PyArray_SIZE(c.out) > 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = nf_attention_forward(c.kernels, p);
        Py_END_ALLOW_THREADS;
    }
    if (nf_check_status(status, c.op) < 0) {
        goto fail;
    }
    if (want == 0) {
        result = Py_NewRef((PyObject *)c.out);
    }
    else if (want == 1) {
        result = PyTuple_Pack(2, c.out, c.lse);
    }
    else {
        result = PyTuple_Pack(4, c.out, c.lse, c.stats, c.exact ? c.exact : c.out);
    }
fail:
    nf_attention_release(&c);
    return result;
}

enum { PACKED = 1, WANT_MASK = 2, WANT_SLOPES = 4, WANT_SINKS = 8 };

/* dq, dk and dv as views of one new (B, S, (H + 2 Hkv) D) array, which is returned. */
static PyArrayObject *
new_packed(nf_attention_call *c)
{
    const nf_attention *p = &c->p;
    if (p->queries != p->keys || p->dim != p->value_dim) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: packed gradients need query, key and value of one length and head "
            "size",
            c->op);
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
take_gradient(PyObject *object, int type, int ndim, const npy_intp *shape, const char *op,
              const char *name)
{
    if (!nf_given(object)) {
        return nf_new_zeroed(ndim, shape, type);
    }
    if (nf_array(object, type, ndim, op, name) == NULL
        || nf_check_shape((PyArrayObject *)object, ndim, shape, op, name) < 0) {
        return NULL;
    }
    return ndim == 4 ? nf_attention_take(object, type, op, name)
                     : nf_contiguous((PyArrayObject *)object);
}

/* Memory for the gradients of the mask, the slopes and the sinks, where they are wanted; the
   first is summed over keys or queries where the mask has one of them. */
static int
new_side_gradients(nf_attention_call *c, PyObject *mask, long wants)
{
    nf_attention *p = &c->p;
    const npy_intp rows[3] = {PyArray_DIM(c->q, 0), p->heads, PyArray_DIM(c->q, 2)};
    const npy_intp keys[3] = {p->batch, p->heads, p->keys};
    const npy_intp blocks[3] = {p->batch, p->heads,
                                (p->keys + c->kernels->block_keys - 1)
                                    / c->kernels->block_keys};
    if (wants & WANT_MASK && p->mask_kind == NF_ADDED_MASK) {
        PyArrayObject *const given = (PyArrayObject *)mask;
        const int ndim = PyArray_NDIM(given);
        p->mask_gradient = ndim < 1 || PyArray_DIM(given, ndim - 1) == 1   ? NF_MASK_ROWS
                           : ndim < 2 || PyArray_DIM(given, ndim - 2) == 1 ? NF_MASK_KEYS
                                                                           : NF_WHOLE_MASK;
        c->dmask = p->mask_gradient == NF_MASK_ROWS ? nf_new_zeroed(3, rows, c->numbers)
                   : p->mask_gradient == NF_MASK_KEYS
                       ? nf_new_zeroed(3, keys, c->numbers)
                       : nf_new_zeroed(ndim, PyArray_DIMS(given), c->numbers);
        if (c->dmask == NULL) {
            return -1;
        }
        p->dmask = PyArray_DATA(c->dmask);
        const int missing = 4 - PyArray_NDIM(c->dmask);
        for (int i = 0; p->mask_gradient == NF_WHOLE_MASK && i < 4; i++) {
            p->dmask_strides[i] =
                i < missing || PyArray_DIM(c->dmask, i - missing) == 1
                    ? 0
                    : PyArray_STRIDE(c->dmask, i - missing) / PyArray_ITEMSIZE(c->dmask);
        }
    }
    if (wants & WANT_SLOPES && c->slopes) {
        if ((c->dslopes = nf_new_zeroed(3, blocks, c->numbers)) == NULL) {
            return -1;
        }
        p->dslopes = PyArray_DATA(c->dslopes);
    }
    if (wants & WANT_SINKS && c->sinks) {
        if ((c->dsinks = nf_new_zeroed(3, rows, c->numbers)) == NULL) {
            return -1;
        }
        p->dsinks = PyArray_DATA(c->dsinks);
    }
    return 0;
}

static PyObject *
or_none(PyArrayObject *array)
{
    return array ? (PyObject *)array : Py_None;
}

/* attention_backward(query, key, value, mask, scale, causal, features, exact, stats, dout, dlse,
   wants) -> (dq, dk, dv, dmask, dslopes, dsinks); one array that holds the first three where
   PACKED is wanted. */
static PyObject *
attention_backward(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    nf_attention_call c = {0};
    PyArrayObject *packed = NULL;
    PyObject *result = NULL;
    if (nf_check_count(SDPA, count, 12) < 0 || nf_attention_inputs(&c, args) < 0) {
        goto fail;
    }
    nf_attention *const p = &c.p;
    const npy_intp rows[4] = {PyArray_DIM(c.q, 0), p->heads, PyArray_DIM(c.q, 2), 2};
    const npy_intp out_shape[4] = {PyArray_DIM(c.q, 0), p->heads, PyArray_DIM(c.q, 2),
                                   p->value_dim};
    if ((c.out = nf_attention_take(args[7], c.numbers, c.op, "out")) == NULL
        || nf_check_shape(c.out, 4, out_shape, c.op, "out") < 0
        || (c.stats = nf_attention_take(args[8], c.numbers, c.op, "stats")) == NULL
        || nf_check_shape(c.stats, 4, rows, c.op, "stats") < 0
        || (c.dout =
                take_gradient(args[9], c.type, 4, out_shape, c.op, "the gradient of out"))
               == NULL) {
        goto fail;
    }
    if (nf_given(args[10])
        && (c.dlse =
                take_gradient(args[10], c.numbers, 3, rows, c.op, "the gradient of lse"))
               == NULL) {
        goto fail;
    }
    const long wants = PyLong_AsLong(args[11]);
    if ((wants == -1 && PyErr_Occurred()) || new_side_gradients(&c, args[3], wants) < 0) {
        goto fail;
    }
    if (wants & PACKED) {
        if ((packed = new_packed(&c)) == NULL) {
            goto fail;
        }
    }
    else if ((c.dq = new_heads(PyArray_DIMS(c.q), c.type, c.q)) == NULL
             || (c.dk = new_heads(PyArray_DIMS(c.k), c.type, c.k)) == NULL
             || (c.dv = new_heads(PyArray_DIMS(c.v), c.type, c.v)) == NULL) {
        goto fail;
    }
    p->out = nf_heads_in(p, c.out), p->dout = nf_heads_in(p, c.dout);
    p->dq = nf_heads_in(p, c.dq), p->dk = nf_heads_in(p, c.dk),
    p->dv = nf_heads_in(p, c.dv);
    p->stats = PyArray_DATA(c.stats);
    p->dlse = c.dlse ? PyArray_DATA(c.dlse) : NULL;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_attention_backward(c.kernels, p);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, c.op) < 0) {
        goto fail;
    }
    result = wants & PACKED ? Py_NewRef((PyObject *)packed)
                            : PyTuple_Pack(6, c.dq, c.dk, c.dv, or_none(c.dmask),
                                           or_none(c.dslopes), or_none(c.dsinks));
fail:
    Py_XDECREF(packed);
    nf_attention_release(&c);
    return result;
}

static PyMethodDef methods[] = {
    METHOD(attention_forward, NULL),
    METHOD(attention_backward, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_attention(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
