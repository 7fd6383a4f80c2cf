/* The inputs of attention: checks, and arrays into strides. */
#include "bind/attention.h"

#include <math.h>
#include <string.h>

void
nf_attention_release(nf_attention_call *c)
{
    Py_XDECREF(c->q);
    Py_XDECREF(c->k);
    Py_XDECREF(c->v);
    Py_XDECREF(c->out);
    Py_XDECREF(c->exact);
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
    Py_XDECREF(c->q_starts);
    Py_XDECREF(c->k_starts);
    Py_XDECREF(c->block_table);
    Py_XDECREF(c->k_scales);
    Py_XDECREF(c->v_scales);
    Py_XDECREF(c->dmask);
    Py_XDECREF(c->dslopes);
    Py_XDECREF(c->dsinks);
}

PyArrayObject *
nf_attention_take(PyObject *object, int type, const char *op, const char *name)
{
    PyArrayObject *array = nf_needed(object, type, 4, op, name);
    if (array == NULL) {
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

/* The mask, broadcast from the right to (B, H, Sq, Sk). Borrowed. */
static int
take_mask(nf_attention_call *c, PyObject *object)
{
    nf_attention *p = &c->p;
    p->mask_kind = NF_NO_MASK;
    if (!nf_given(object)) {
        return 0;
    }
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: attn_mask must be an array, got %s", c->op,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    PyArrayObject *mask = (PyArrayObject *)object;
    const int boolean = PyArray_TYPE(mask) == NPY_BOOL;
    const int type = PyArray_TYPE(mask) == c->numbers ? c->numbers : c->type;
    if (!boolean && nf_array(object, type, -1, c->op, "attn_mask") == NULL) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError,
                     "%s: attn_mask must be boolean (True: attend) or have the dtype of "
                     "query%s and native, aligned memory, got %S",
                     c->op, c->type == c->numbers ? "" : ", or float32,",
                     PyArray_DESCR(mask));
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
                         c->op);
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
                         c->op, shape[0], shape[1], shape[2], shape[3], got);
            Py_DECREF(got);
        }
        return -1;
    }
    c->mask = mask;
    p->mask = PyArray_DATA(mask);
    p->mask_storage = boolean ? NF_AS_COMPUTED : nf_storage_of(mask);
    p->mask_kind = boolean ? NF_BOOLEAN_MASK : NF_ADDED_MASK;
    return 0;
}

static int
check_lengths(const nf_attention_call *c, int paged)
{
    const npy_intp *q = PyArray_DIMS(c->q), *k = PyArray_DIMS(c->k),
                   *v = PyArray_DIMS(c->v);
    if ((k[0] != q[0] && !paged) || k[3] != q[3]) {
        PyErr_Format(PyExc_ValueError,
                     "%s: key must have shape (%zd, Hkv, Sk, %zd) as query says, got (%zd, "
                     "%zd, %zd, %zd)",
                     c->op, q[0], q[3], k[0], k[1], k[2], k[3]);
        return -1;
    }
    if (v[0] != k[0] || v[1] != k[1] || v[2] != k[2]) {
        PyErr_Format(PyExc_ValueError,
                     "%s: value must have shape (%zd, %zd, %zd, Dv) as key says, got (%zd, "
                     "%zd, %zd, %zd)",
                     c->op, k[0], k[1], k[2], v[0], v[1], v[2], v[3]);
        return -1;
    }
    if (k[1] == 0 ? q[1] != 0 : q[1] % k[1] != 0) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: the heads of query must be a multiple of those of key, got %zd and "
            "%zd",
            c->op, q[1], k[1]);
        return -1;
    }
    return 0;
}

/* A finite number, at least 0 and below `most`. */
static int
take_number(PyObject *object, double most, const char *op, const char *name, double *to)
{
    *to = PyFloat_AsDouble(object);
    if (*to == -1.0 && PyErr_Occurred()) {
        return -1;
    }
    if (!(*to >= 0 && *to < most)) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be %s, got %R", op, name,
                     most <= 1 ? "at least 0 and below 1" : "finite and not negative",
                     object);
        return -1;
    }
    return 0;
}

static int
take_window(nf_attention_call *c, PyObject *left, PyObject *right)
{
    nf_attention *const p = &c->p;
    /* Clipped where it is beyond Py_ssize_t. */
    const Py_ssize_t l = PyNumber_AsSsize_t(left, NULL);
    if (l == -1 && PyErr_Occurred()) {
        return -1;
    }
    const Py_ssize_t r = PyNumber_AsSsize_t(right, NULL);
    if (r == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (l < -1 || r < -1) {
        PyErr_Format(PyExc_ValueError,
                     "%s: window_size must be two numbers of keys, -1 for no bound, got "
                     "(%S, %S)",
                     c->op, left, right);
        return -1;
    }
    p->left = l < 0 || l > NF_UNBOUNDED ? NF_UNBOUNDED : l;
    const ptrdiff_t bound = r < 0 || r > NF_UNBOUNDED ? NF_UNBOUNDED : r;
    p->right = bound < p->right ? bound : p->right;
    return 0;
}

/* (H,) or, where `batched`, (B, H); of the numbers' type, or of a short type of query. */
static PyArrayObject *
take_per_head(const nf_attention_call *c, PyObject *object, int batched, const char *name)
{
    const int is_short = c->type != c->numbers && PyArray_Check(object)
                         && PyArray_TYPE((PyArrayObject *)object) == c->type;
    PyArrayObject *const array =
        nf_array(object, is_short ? c->type : c->numbers, -1, c->op, name);
    if (array == NULL) {
        return NULL;
    }
    const npy_intp shape[2] = {c->p.batch, c->p.heads};
    const int two = batched && PyArray_NDIM(array) == 2;
    if (nf_check_shape(array, two ? 2 : 1, two ? shape : shape + 1, c->op, name) < 0) {
        return NULL;
    }
    return is_short ? (PyArrayObject *)PyArray_Cast(array, c->numbers)
                    : nf_contiguous(array);
}

static int
take_features(nf_attention_call *c, PyObject *object)
{
    nf_attention *p = &c->p;
    if (!nf_given(object)) {
        return 0;
    }
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != FEATURES) {
        PyErr_Format(PyExc_TypeError, "%s: features must be a tuple of %d, got %R", c->op,
                     FEATURES, object);
        return -1;
    }
    PyObject *const *const f = &PyTuple_GET_ITEM(object, 0);
    double dropout;
    if (nf_attention_sequences(c, f) < 0 || take_window(c, f[LEFT], f[RIGHT]) < 0
        || take_number(f[SOFTCAP], HUGE_VAL, c->op, "softcap", &p->softcap) < 0
        || take_number(f[DROPOUT], 1, c->op, "dropout_p", &dropout) < 0) {
        return -1;
    }
    if (p->softcap > (c->numbers == NPY_DOUBLE ? 0x1p900 : 0x1p90)) {
        p->softcap = 0; /* changes no score, but scores times its inverse would be 0 */
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
    return 0;
}

enum { CAUSAL = 1, TOP_LEFT = 2 };

/* Who calls, as the features tell. */
static const char *
caller(PyObject *features)
{
    if (!PyTuple_Check(features) || PyTuple_GET_SIZE(features) != FEATURES) {
        return SDPA;
    }
    return nf_given(PyTuple_GET_ITEM(features, BLOCK_TABLE)) ? PAGED
           : nf_given(PyTuple_GET_ITEM(features, Q_STARTS))  ? VARLEN
                                                             : SDPA;
}

static int
is_bfloat16(PyArrayObject *array)
{
    PyArray_Descr *const type = PyArray_DESCR(array);
    return PyTypeNum_ISUSERDEF(type->type_num) && PyDataType_ELSIZE(type) == 2
           && strcmp(type->typeobj->tp_name, "ml_dtypes.bfloat16") == 0;
}

/* The type of query, or that of a cache, which may be another one than query's. */
static int
type_of(PyObject *object, int cache, const char *op, const char *name)
{
    if (!PyArray_Check(object)) {
        return NPY_NOTYPE; /* nf_array has the message */
    }
    PyArrayObject *const array = (PyArrayObject *)object;
    const int type = PyArray_TYPE(array);
    if (type == NPY_FLOAT || type == NPY_HALF || type == (cache ? NPY_INT8 : NPY_DOUBLE)
        || is_bfloat16(array)) {
        return type;
    }
    PyErr_Format(PyExc_TypeError,
                 "%s: %s must be float32, float16, bfloat16 (of ml_dtypes) or %s, got %S; "
                 "convert it with .astype(numpy.float32)",
                 op, name, cache ? "int8" : "float64", PyArray_DESCR(array));
    return -1;
}

/* An int8 cache beside what it does not go with: a conversion would lose the scales. */
static int
check_int8(PyArrayObject *query, PyArrayObject *keys, PyArrayObject *values, const char *op)
{
    const int bytes = PyArray_TYPE(keys) == NPY_INT8;
    if (bytes == (PyArray_TYPE(values) == NPY_INT8)
        && !(bytes && PyArray_TYPE(query) == NPY_DOUBLE)) {
        return 0;
    }
    PyErr_Format(
        PyExc_TypeError,
        "%s: int8 is for key_cache and value_cache together, with their scales, and "
        "for a query of float32, float16 or bfloat16, got %S, %S and %S",
        op, PyArray_DESCR(keys), PyArray_DESCR(values), PyArray_DESCR(query));
    return -1;
}

static int
take_arrays(nf_attention_call *c, PyObject *const *args, int paged)
{
    const int type = type_of(args[0], 0, c->op, "query");
    if (type < 0 || (c->q = nf_attention_take(args[0], type, c->op, "query")) == NULL) {
        return -1;
    }
    if (paged
        && check_int8(c->q, (PyArrayObject *)args[1], (PyArrayObject *)args[2], c->op)) {
        return -1;
    }
    c->type = type;
    c->numbers = type == NPY_DOUBLE ? NPY_DOUBLE : NPY_FLOAT;
    c->kernels = type == NPY_DOUBLE ? nf_kernels.attention_f64 : nf_kernels.attention_f32;
    const int cached =
        paged && type != NPY_DOUBLE ? type_of(args[1], 1, c->op, "key_cache") : type;
    if (cached < 0
        || (c->k = nf_attention_take(args[1], cached, c->op, paged ? "key_cache" : "key"))
               == NULL
        || (c->v =
                nf_attention_take(args[2], cached, c->op, paged ? "value_cache" : "value"))
               == NULL) {
        return -1;
    }
    return check_lengths(c, paged);
}

int
nf_attention_inputs(nf_attention_call *c, PyObject *const *args)
{
    nf_attention *p = &c->p;
    c->op = caller(args[6]);
    if (take_arrays(c, args, strcmp(c->op, PAGED) == 0) < 0) {
        return -1;
    }
    const npy_intp *q = PyArray_DIMS(c->q), *k = PyArray_DIMS(c->k);
    p->batch = q[0], p->heads = q[1], p->queries = q[2], p->dim = q[3];
    p->kv_heads = k[1], p->keys = k[2], p->value_dim = PyArray_DIM(c->v, 3);
    p->q = nf_heads_of(c->q), p->k = nf_heads_of(c->k), p->v = nf_heads_of(c->v);
    if (p->queries > 1 << 30 || p->keys > 1 << 30) {
        PyErr_Format(PyExc_ValueError, "%s: at most 2^30 queries and keys, got %zd and %zd",
                     c->op, p->queries, p->keys);
        return -1;
    }
    p->rows_batch = p->heads * p->queries, p->rows_head = p->queries;
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
