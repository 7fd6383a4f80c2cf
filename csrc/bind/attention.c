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
    PyArrayObject *slopes, *sinks, *kv_lengths, *dmask, *dslopes, *dsinks;
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
    Py_XDECREF(c->slopes);
    Py_XDECREF(c->sinks);
    Py_XDECREF(c->kv_lengths);
    Py_XDECREF(c->dmask);
    Py_XDECREF(c->dslopes);
    Py_XDECREF(c->dsinks);
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

/* A finite number in [least, most). */
static int
take_number(PyObject *object, double least, double most, const char *name, double *to)
{
    *to = PyFloat_AsDouble(object);
    if (*to == -1.0 && PyErr_Occurred()) {
        return -1;
    }
    if (!(*to >= least && *to < most)) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be %s, got %R", OP, name,
                     most <= 1 ? "at least 0 and below 1" : "finite and not negative",
                     object);
        return -1;
    }
    return 0;
}

static int
take_window(nf_attention *p, PyObject *left, PyObject *right)
{
    const Py_ssize_t l = PyNumber_AsSsize_t(left, PyExc_OverflowError);
    if (l == -1 && PyErr_Occurred()) {
        return -1;
    }
    const Py_ssize_t r = PyNumber_AsSsize_t(right, PyExc_OverflowError);
    if (r == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (l < -1 || r < -1) {
        PyErr_Format(PyExc_ValueError,
                     "%s: window_size must be two numbers of keys, -1 for no bound, got "
                     "(%zd, %zd)",
                     OP, l, r);
        return -1;
    }
    p->left = l < 0 || l > NF_UNBOUNDED ? NF_UNBOUNDED : l;
    const ptrdiff_t bound = r < 0 || r > NF_UNBOUNDED ? NF_UNBOUNDED : r;
    p->right = bound < p->right ? bound : p->right;
    return 0;
}

/* (H,) or, where `batched`, (B, H). */
static PyArrayObject *
take_per_head(const call *c, PyObject *object, int batched, const char *name)
{
    PyArrayObject *const array = nf_array(object, c->type, -1, OP, name);
    if (array == NULL) {
        return NULL;
    }
    const npy_intp shape[2] = {c->p.batch, c->p.heads};
    const int two = batched && PyArray_NDIM(array) == 2;
    return nf_check_shape(array, two ? 2 : 1, two ? shape : shape + 1, OP, name) < 0
               ? NULL
               : nf_contiguous(array);
}

static int
take_kv_lengths(call *c, PyObject *object)
{
    PyObject *const given = PyArray_FROM_O(object);
    if (given != NULL && !PyArray_ISINTEGER((PyArrayObject *)given)) {
        PyErr_Format(PyExc_TypeError, "%s: kv_lengths must be integers, got %S", OP,
                     PyArray_DESCR((PyArrayObject *)given));
    }
    else if (given != NULL) {
        c->kv_lengths =
            (PyArrayObject *)PyArray_FROMANY(given, NPY_INT64, 0, 0, NPY_ARRAY_IN_ARRAY);
    }
    Py_XDECREF(given);
    if (c->kv_lengths == NULL
        || nf_check_shape(c->kv_lengths, 1, &c->p.batch, OP, "kv_lengths") < 0) {
        return -1;
    }
    const int64_t *const length = PyArray_DATA(c->kv_lengths);
    for (ptrdiff_t b = 0; b < c->p.batch; b++) {
        if (length[b] < 0 || length[b] > c->p.keys) {
            PyErr_Format(PyExc_ValueError,
                         "%s: kv_lengths must lie between 0 and Sk = %zd, got %lld", OP,
                         c->p.keys, (long long)length[b]);
            return -1;
        }
    }
    c->p.kv_lengths = length;
    return 0;
}

enum { LEFT, RIGHT, SOFTCAP, SLOPES, SINKS, KV_LENGTHS, DROPOUT, DROPOUT_KEY, FEATURES };

/* None, or (left, right, softcap, alibi_slopes, sinks, kv_lengths, dropout_p, key). */
static int
take_features(call *c, PyObject *object)
{
    nf_attention *p = &c->p;
    if (!nf_given(object)) {
        return 0;
    }
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != FEATURES) {
        PyErr_Format(PyExc_TypeError, "%s: features must be a tuple of %d, got %R", OP,
                     FEATURES, object);
        return -1;
    }
    PyObject *const *const f = &PyTuple_GET_ITEM(object, 0);
    double dropout;
    if (take_window(p, f[LEFT], f[RIGHT]) < 0
        || take_number(f[SOFTCAP], 0, HUGE_VAL, "softcap", &p->softcap) < 0
        || take_number(f[DROPOUT], 0, 1, "dropout_p", &dropout) < 0) {
        return -1;
    }
    if (dropout > 0) {
        p->dropout_key = PyLong_AsUnsignedLongLong(f[DROPOUT_KEY]);
        if (PyErr_Occurred()) {
            return -1;
        }
        p->dropout_threshold = (uint32_t)(dropout * 0x1p32);
        p->dropout_scale = 1 / (1 - dropout);
    }
    if (nf_given(f[SLOPES])) {
        if ((c->slopes = take_per_head(c, f[SLOPES], 1, "alibi_slopes")) == NULL) {
            return -1;
        }
        p->slopes = PyArray_DATA(c->slopes);
        p->slopes_batch = PyArray_NDIM(c->slopes) == 2 ? p->heads : 0;
    }
    if (nf_given(f[SINKS])) {
        if ((c->sinks = take_per_head(c, f[SINKS], 0, "sinks")) == NULL) {
            return -1;
        }
        p->sinks = PyArray_DATA(c->sinks);
    }
    return nf_given(f[KV_LENGTHS]) ? take_kv_lengths(c, f[KV_LENGTHS]) : 0;
}

enum { CAUSAL = 1, TOP_LEFT = 2 };

/* query, key, value, mask, scale (None: 1/sqrt(D)), the sum of CAUSAL and TOP_LEFT, features. */
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
    p->right = causal & CAUSAL ? 0 : NF_UNBOUNDED;
    p->top_left = (causal & TOP_LEFT) != 0;
    return take_mask(c, args[3]) < 0 ? -1 : take_features(c, args[6]);
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

/* attention_forward(query, key, value, mask, scale, causal, features, out, want)
   -> out, where want is 0; (out, lse) where it is 1; (out, lse, stats) where it is 2. */
static PyObject *
attention_forward(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    call c = {0};
    PyObject *result = NULL;
    if (nf_check_count(OP, count, 9) < 0 || take_inputs(&c, args) < 0) {
        goto fail;
    }
    const long want = PyLong_AsLong(args[8]);
    if ((want == -1 && PyErr_Occurred()) || (c.out = take_out(&c, args[7])) == NULL) {
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

enum { PACKED = 1, WANT_MASK = 2, WANT_SLOPES = 4, WANT_SINKS = 8 };

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

/* Memory for the gradients of the mask, the slopes and the sinks, where they are wanted; the
   first is summed over keys or queries where the mask has one of them. */
static int
new_side_gradients(call *c, PyObject *mask, long wants)
{
    nf_attention *p = &c->p;
    const npy_intp rows[3] = {p->batch, p->heads, p->queries};
    const npy_intp keys[3] = {p->batch, p->heads, p->keys};
    const npy_intp blocks[3] = {p->batch, p->heads,
                                (p->keys + c->kernels->block_keys - 1)
                                    / c->kernels->block_keys};
    if (wants & WANT_MASK && p->mask_kind == NF_ADDED_MASK) {
        const npy_intp *const step = p->mask_strides;
        p->mask_gradient = step[3] == 0   ? NF_MASK_ROWS
                           : step[2] == 0 ? NF_MASK_KEYS
                                          : NF_WHOLE_MASK;
        c->dmask = p->mask_gradient == NF_MASK_ROWS ? nf_new_zeroed(3, rows, c->type)
                   : p->mask_gradient == NF_MASK_KEYS
                       ? nf_new_zeroed(3, keys, c->type)
                       : nf_new_zeroed(PyArray_NDIM((PyArrayObject *)mask),
                                       PyArray_DIMS((PyArrayObject *)mask), c->type);
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
        if ((c->dslopes = nf_new_zeroed(3, blocks, c->type)) == NULL) {
            return -1;
        }
        p->dslopes = PyArray_DATA(c->dslopes);
    }
    if (wants & WANT_SINKS && c->sinks) {
        if ((c->dsinks = nf_new_zeroed(3, rows, c->type)) == NULL) {
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

/* attention_backward(query, key, value, mask, scale, causal, features, out, stats, dout, dlse,
   wants) -> (dq, dk, dv, dmask, dslopes, dsinks); one array that holds the first three where
   PACKED is wanted. */
static PyObject *
attention_backward(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    call c = {0};
    PyArrayObject *packed = NULL;
    PyObject *result = NULL;
    if (nf_check_count(OP, count, 12) < 0 || take_inputs(&c, args) < 0) {
        goto fail;
    }
    nf_attention *const p = &c.p;
    const npy_intp rows[4] = {p->batch, p->heads, p->queries, 2};
    const npy_intp out_shape[4] = {p->batch, p->heads, p->queries, p->value_dim};
    if ((c.out = take(args[7], c.type, "out")) == NULL
        || nf_check_shape(c.out, 4, out_shape, OP, "out") < 0
        || (c.stats = take(args[8], c.type, "stats")) == NULL
        || nf_check_shape(c.stats, 4, rows, OP, "stats") < 0
        || (c.dout = take_gradient(&c, args[9], 4, out_shape, "the gradient of out"))
               == NULL) {
        goto fail;
    }
    if (nf_given(args[10])
        && (c.dlse = take_gradient(&c, args[10], 3, rows, "the gradient of lse")) == NULL) {
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
    result = wants & PACKED ? Py_NewRef((PyObject *)packed)
                            : PyTuple_Pack(6, c.dq, c.dk, c.dv, or_none(c.dmask),
                                           or_none(c.dslopes), or_none(c.dsinks));
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
