#include "bind/elementwise.h"

Py_ssize_t
nf_form_of(PyObject *number, Py_ssize_t count, const char *op)
{
    const Py_ssize_t form = PyLong_AsSsize_t(number);
    if (form >= 0 && form < count) {
        return form;
    }
    if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "%s: unknown form %zd", op, form);
    }
    return -1;
}

size_t
nf_columns_of(PyArrayObject *array)
{
    const int ndim = PyArray_NDIM(array);
    return ndim == 0 ? 1 : (size_t)PyArray_DIM(array, ndim - 1);
}

nf_rows
nf_rows_of_new(PyArrayObject *array)
{
    return (nf_rows){PyArray_BYTES(array),
                     (ptrdiff_t)nf_columns_of(array) * PyArray_ITEMSIZE(array)};
}

int
nf_hold_rows(PyObject *object, PyArrayObject *like, const char *op, const char *name,
             PyArrayObject **held, nf_rows *rows)
{
    const int type = like == NULL ? NPY_NOTYPE : PyArray_TYPE(like);
    PyArrayObject *array = nf_needed(object, type, -1, op, name);
    if (array == NULL
        || (like != NULL
            && nf_check_shape(array, PyArray_NDIM(like), PyArray_DIMS(like), op, name)
                   < 0)) {
        return -1;
    }
    ptrdiff_t stride;
    if (nf_row_stride(array, &stride)) {
        Py_INCREF(array);
        *held = array;
        *rows = (nf_rows){PyArray_BYTES(array), stride};
        return 0;
    }
    *held = nf_contiguous(array);
    if (*held == NULL) {
        return -1;
    }
    *rows = nf_rows_of_new(*held);
    return 0;
}

/* One of the kernels is NULL. */
static int
run(nf_elementwise_kernel *kernel, nf_elementwise_pair_kernel *pair, int inputs,
    PyArrayObject *like, const nf_rows *in, const nf_rows *out, const char *op)
{
    const size_t columns = nf_columns_of(like), size = (size_t)PyArray_SIZE(like);
    const size_t rows = columns > 0 ? size / columns : 0;
    const size_t itemsize = (size_t)PyArray_ITEMSIZE(like);
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_elementwise_rows(kernel, pair, inputs, itemsize, in, out, rows, columns);
    Py_END_ALLOW_THREADS;
    return nf_check_status(status, op);
}

PyArrayObject *
nf_elementwise_new(nf_elementwise_kernels kernel, int inputs, const nf_rows *in, int ndim,
                   const npy_intp *shape, int type, const char *op)
{
    PyArrayObject *y = nf_new(ndim, shape, type);
    if (y == NULL) {
        return NULL;
    }
    const nf_rows out = nf_rows_of_new(y);
    if (run(*kernel[type == NPY_DOUBLE], NULL, inputs, y, in, &out, op) < 0) {
        Py_CLEAR(y);
    }
    return y;
}

int
nf_elementwise_pair(nf_elementwise_pair_kernels kernel, int inputs, PyArrayObject *like,
                    const nf_rows *in, const nf_rows *out, const char *op)
{
    const int is_double = PyArray_TYPE(like) == NPY_DOUBLE;
    return run(NULL, *kernel[is_double], inputs, like, in, out, op);
}
