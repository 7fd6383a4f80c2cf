#include "bind/rows.h"

int
nf_row_stride(PyArrayObject *array, ptrdiff_t *stride)
{
    const int last = PyArray_NDIM(array) - 1;
    const npy_intp *shape = PyArray_DIMS(array), *strides = PyArray_STRIDES(array);
    npy_intp reach = 0; /* rows of the axes seen so far; 0: none */
    *stride = 0;
    if (last >= 0 && shape[last] > 1 && strides[last] != PyArray_ITEMSIZE(array)) {
        return 0;
    }
    for (int i = last - 1; i >= 0; i--) {
        if (shape[i] == 1) {
            continue;
        }
        if (reach == 0) {
            *stride = strides[i];
        }
        else if (strides[i] != *stride * reach) {
            return 0;
        }
        reach = (reach == 0 ? 1 : reach) * shape[i];
    }
    return 1;
}

nf_row_view
nf_rows_of(PyArrayObject *array, const char *op, const char *name)
{
    nf_row_view v = {NULL, NULL, 0, 0, 0};
    const int ndim = PyArray_NDIM(array);
    if (ndim < 1) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have at least one dimension, got ()",
                     op, name);
        return v;
    }
    v.n = PyArray_DIM(array, ndim - 1);
    v.step = v.n;
    ptrdiff_t stride;
    const npy_intp item = PyArray_ITEMSIZE(array);
    if (!PyArray_IS_C_CONTIGUOUS(array) && nf_row_stride(array, &stride)
        && stride % item == 0) {
        Py_INCREF(array);
        v.array = array;
        v.step = stride / item;
    }
    else {
        v.array = nf_contiguous(array);
    }
    if (v.array != NULL) {
        v.data = PyArray_DATA(v.array);
        v.rows = PyArray_MultiplyList(PyArray_DIMS(array), ndim - 1);
    }
    return v;
}

nf_row_view
nf_read_rows(PyObject *object, const char *op, const char *name)
{
    PyArrayObject *array = nf_needed(object, NPY_NOTYPE, -1, op, name);
    return array == NULL ? (nf_row_view){0} : nf_rows_of(array, op, name);
}

nf_row_view
nf_rows_like(PyObject *object, PyArrayObject *like, const char *op, const char *name)
{
    PyArrayObject *array = nf_needed(object, PyArray_TYPE(like), -1, op, name);
    if (array == NULL
        || nf_check_shape(array, PyArray_NDIM(like), PyArray_DIMS(like), op, name) < 0) {
        return (nf_row_view){0};
    }
    return nf_rows_of(array, op, name);
}

int
nf_run_rows(nf_row_kernel *kernel, const void *args, npy_intp rows, double row_cost,
            const char *op)
{
    nf_status status;
    NPY_BEGIN_THREADS_DEF;
    if (row_cost * (double)rows > 4e3) {
        NPY_BEGIN_THREADS;
    }
    status = nf_rowwise(kernel, args, (size_t)rows, row_cost);
    NPY_END_THREADS;
    return nf_check_status(status, op);
}

PyArrayObject *
nf_integers_of(PyObject *object, const char *op, const char *name)
{
    if (!PyArray_Check(object) || !PyArray_ISINTEGER((PyArrayObject *)object)) {
        PyErr_Format(
            PyExc_TypeError, "%s: %s must be an array of integers, got %S", op, name,
            PyArray_Check(object) ? (PyObject *)PyArray_DESCR((PyArrayObject *)object)
                                  : (PyObject *)Py_TYPE(object));
        return NULL;
    }
    PyArrayObject *ids = (PyArrayObject *)PyArray_FROM_OTF(
        object, NPY_INT64, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    if (ids != NULL && PyArray_ISUNSIGNED((PyArrayObject *)object)) {
        /* What wrapped around might be the id that is ignored. */
        const size_t n = (size_t)PyArray_SIZE(ids);
        if (nf_first_outside(PyArray_DATA(ids), n, INT64_MAX, 0) < n) {
            PyErr_Format(PyExc_ValueError, "%s: %s must be below 2^63 - 1", op, name);
            Py_CLEAR(ids);
        }
    }
    return ids;
}

int
nf_check_ids(PyArrayObject *ids, npy_intp limit, int64_t except, const char *op,
             const char *name)
{
    const int64_t *data = PyArray_DATA(ids);
    const size_t n = (size_t)PyArray_SIZE(ids);
    const size_t bad = nf_first_outside(data, n, limit, except);
    if (bad == n) {
        return 0;
    }
    PyErr_Format(
        PyExc_ValueError,
        "%s: %s must be within 0 .. %zd, got %lld at position %zd (counted through "
        "the flattened array)",
        op, name, (Py_ssize_t)limit - 1, (long long)data[bad], (Py_ssize_t)bad);
    return -1;
}
