/* The sequences of attention: padded, packed, or with their keys and values in blocks of a cache. */
#include "bind/attention.h"

/* A new (B, ...) array of int64. */
static PyArrayObject *
take_integers(PyObject *object, int ndim, const char *op, const char *name)
{
    PyArrayObject *const given = (PyArrayObject *)PyArray_FROM_O(object);
    PyArrayObject *array = NULL;
    if (given != NULL && (!PyArray_ISINTEGER(given) || PyArray_NDIM(given) != ndim)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be integers in %d dimension%s, got %S in %d", op, name,
                     ndim, ndim == 1 ? "" : "s", PyArray_DESCR(given), PyArray_NDIM(given));
    }
    else if (given != NULL) {
        /* A uint64 beyond int64 becomes negative, which no caller takes. */
        array = (PyArrayObject *)PyArray_FROMANY((PyObject *)given, NPY_INT64, 0, 0,
                                                 NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    }
    Py_XDECREF(given);
    return array;
}

static int
take_kv_lengths(nf_attention_call *c, PyObject *object, npy_intp most, const char *op,
                const char *name)
{
    if ((c->kv_lengths = take_integers(object, 1, op, name)) == NULL
        || nf_check_shape(c->kv_lengths, 1, &c->p.batch, op, name) < 0) {
        return -1;
    }
    const int64_t *const length = PyArray_DATA(c->kv_lengths);
    const int64_t *const start = c->p.k_starts;
    for (ptrdiff_t b = 0; b < c->p.batch; b++) {
        const npy_intp held = start ? (npy_intp)(start[b + 1] - start[b]) : most;
        if (length[b] < 0 || length[b] > held) {
            PyErr_Format(PyExc_ValueError,
                         "%s: %s must lie between 0 and Sk = %zd, got %lld", op, name, held,
                         (long long)length[b]);
            return -1;
        }
    }
    c->p.kv_lengths = length;
    return 0;
}

/* (B + 1) from 0 to `total`, not falling; the longest sequence, or -1. */
static npy_intp
take_starts(PyObject *object, npy_intp total, const char *op, const char *name,
            PyArrayObject **to)
{
    if ((*to = take_integers(object, 1, op, name)) == NULL) {
        return -1;
    }
    const int64_t *const start = PyArray_DATA(*to);
    const npy_intp n = PyArray_DIM(*to, 0);
    int right = n > 0 && start[0] == 0 && start[n - 1] == total;
    npy_intp longest = 0;
    for (npy_intp b = 1; right && b < n; b++) {
        const npy_intp length = start[b] - start[b - 1];
        right = length >= 0;
        longest = length > longest ? length : longest;
    }
    if (!right) {
        PyErr_Format(PyExc_ValueError,
                     "%s: %s must rise from 0 to the number of tokens, %zd, got %R", op,
                     name, total, *to);
        return -1;
    }
    return longest;
}

/* Each of the blocks that a sequence has tokens in must be there. */
static int
take_block_table(nf_attention_call *c, PyObject *object, PyObject *lengths)
{
    nf_attention *p = &c->p;
    const npy_intp blocks = PyArray_DIM(c->k, 0), size = PyArray_DIM(c->k, 2);
    if ((c->block_table = take_integers(object, 2, PAGED, "block_table")) == NULL) {
        return -1;
    }
    p->table_width = PyArray_DIM(c->block_table, 1), p->block_size = size;
    if (PyArray_DIM(c->block_table, 0) != p->batch) {
        PyErr_Format(PyExc_ValueError,
                     "%s: block_table must have a row for each of %zd sequences, got %zd",
                     PAGED, p->batch, PyArray_DIM(c->block_table, 0));
        return -1;
    }
    if (take_kv_lengths(c, lengths, p->table_width * size, PAGED, "cache_seqlens") < 0) {
        return -1;
    }
    p->block_table = PyArray_DATA(c->block_table);
    p->keys = 0;
    for (ptrdiff_t b = 0; b < p->batch; b++) {
        const ptrdiff_t length = (ptrdiff_t)p->kv_lengths[b];
        p->keys = length > p->keys ? length : p->keys;
        for (ptrdiff_t i = 0; i * size < length; i++) {
            const int64_t block = p->block_table[b * p->table_width + i];
            if (block < 0 || block >= blocks) {
                PyErr_Format(PyExc_ValueError,
                             "%s: block_table must name blocks below %zd, got %lld", PAGED,
                             blocks, (long long)block);
                return -1;
            }
        }
    }
    return 0;
}

/* What the rows of an int8 cache are times: float32, (blocks, block_size, Hkv), or without
   the last axis. */
static int
take_scales(nf_heads *x, PyArrayObject *cache, PyObject *object, const char *name,
            PyArrayObject **to)
{
    const int needed = PyArray_TYPE(cache) == NPY_INT8;
    if (needed != nf_given(object)) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: %s must be given where the cache is int8, and only there; it is %S", PAGED,
            name, PyArray_DESCR(cache));
        return -1;
    }
    if (!needed) {
        return 0;
    }
    PyArrayObject *const scales = nf_array(object, NPY_FLOAT, -1, PAGED, name);
    const npy_intp shape[3] = {PyArray_DIM(cache, 0), PyArray_DIM(cache, 2),
                               PyArray_DIM(cache, 1)};
    const int ndim = scales != NULL && PyArray_NDIM(scales) == 2 ? 2 : 3;
    if (scales == NULL || nf_check_shape(scales, ndim, shape, PAGED, name) < 0
        || (*to = nf_contiguous(scales)) == NULL) {
        return -1;
    }
    x->scales = PyArray_DATA(*to);
    x->scales_head = ndim == 3;
    x->scales_row = ndim == 3 ? shape[2] : 1;
    x->scales_batch = shape[1] * x->scales_row;
    return 0;
}

int
nf_attention_sequences(nf_attention_call *c, PyObject *const *f)
{
    nf_attention *p = &c->p;
    if (nf_given(f[Q_STARTS])) {
        p->queries = take_starts(f[Q_STARTS], PyArray_DIM(c->q, 2), c->op, "cu_seqlens_q",
                                 &c->q_starts);
        if (p->queries < 0) {
            return -1;
        }
        p->q_starts = PyArray_DATA(c->q_starts);
        p->batch = PyArray_DIM(c->q_starts, 0) - 1;
        p->rows_batch = 0, p->q.batch = 0;
    }
    if (nf_given(f[K_STARTS])) {
        p->keys = take_starts(f[K_STARTS], PyArray_DIM(c->k, 2), VARLEN, "cu_seqlens_k",
                              &c->k_starts);
        if (p->keys < 0) {
            return -1;
        }
        if (PyArray_DIM(c->k_starts, 0) != p->batch + 1) {
            PyErr_Format(PyExc_ValueError,
                         "%s: cu_seqlens_q and cu_seqlens_k must have one length, got %zd "
                         "and %zd",
                         VARLEN, p->batch + 1, PyArray_DIM(c->k_starts, 0));
            return -1;
        }
        p->k_starts = PyArray_DATA(c->k_starts);
        p->k.batch = p->v.batch = 0;
    }
    if (nf_given(f[BLOCK_TABLE])) {
        return take_scales(&p->k, c->k, f[K_SCALES], "key_scale", &c->k_scales) < 0
                       || take_scales(&p->v, c->v, f[V_SCALES], "value_scale", &c->v_scales)
                              < 0
                   ? -1
                   : take_block_table(c, f[BLOCK_TABLE], f[KV_LENGTHS]);
    }
    return nf_given(f[KV_LENGTHS])
               ? take_kv_lengths(c, f[KV_LENGTHS], p->keys, c->op, "kv_lengths")
               : 0;
}
