/* Matrix products: linear layers, and plain products for their gradients. */
#include "bind/families.h"
#include "bind/matrix.h"

/* linear(x, weight, bias, residual, activation, out, keep) -> y, or (y, what entered the
   activation) where keep is true */
static PyObject *
linear(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "linear";
    nf_matrix x = {0}, w = {0}, residual = {0};
    PyArrayObject *bias = NULL, *y = NULL, *pre = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 7) < 0) {
        return NULL;
    }
    x = nf_read_matrix(args[0], NPY_NOTYPE, -1, op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const int type = PyArray_TYPE(x.array), ndim = PyArray_NDIM(x.array);
    w = nf_read_matrix(args[1], type, 2, op, "weight");
    if (w.array == NULL) {
        goto fail;
    }
    if (w.columns != x.columns) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: weight must have shape (N, %zd) as x has %zd features, got (%zd, %zd)", op,
            (Py_ssize_t)x.columns, (Py_ssize_t)x.columns, (Py_ssize_t)w.rows,
            (Py_ssize_t)w.columns);
        goto fail;
    }
    if (nf_check_product(op, x.rows, w.rows, x.columns) < 0) {
        goto fail;
    }
    npy_intp shape[NPY_MAXDIMS];
    for (int i = 0; i < ndim - 1; i++) {
        shape[i] = PyArray_DIM(x.array, i);
    }
    shape[ndim - 1] = w.rows;
    if (nf_read_optional(args[2], type, 1, &w.rows, op, "bias", &bias) < 0) {
        goto fail;
    }
    if (nf_given(args[3])) {
        PyArrayObject *given = nf_array(args[3], type, -1, op, "residual");
        if (given == NULL || nf_check_shape(given, ndim, shape, op, "residual") < 0) {
            goto fail;
        }
        residual = nf_matrix_of(given, op, "residual");
        if (residual.array != NULL && residual.column != 1) {
            PyArrayObject *copy = nf_contiguous(given);
            Py_SETREF(residual.array, copy);
            residual = nf_whole(copy, residual.rows, residual.columns);
        }
        if (residual.array == NULL) {
            goto fail;
        }
    }
    const long activation = PyLong_AsLong(args[4]);
    const int keep = PyObject_IsTrue(args[6]);
    if (PyErr_Occurred()) {
        goto fail;
    }
    if (activation < 0 || activation >= NF_ACTIVATIONS) {
        PyErr_Format(PyExc_ValueError, "%s: unknown activation %ld", op, activation);
        goto fail;
    }
    PyArrayObject *const inputs[] = {x.array, w.array, bias, residual.array};
    y = nf_take_out(args[5], ndim, shape, type, inputs, 4, op);
    if (y == NULL || (keep && (pre = nf_new(ndim, shape, type)) == NULL)) {
        goto fail;
    }
    nf_gemm p = nf_product_of(x, nf_transposed(w), nf_whole(y, x.rows, w.rows));
    p.activation = (nf_activation)activation;
    p.bias = bias == NULL ? NULL : PyArray_DATA(bias);
    p.pre = pre == NULL ? NULL : PyArray_DATA(pre);
    p.residual = residual.data;
    p.residual_row = residual.row;
    if (nf_run_products(type, &p, 1, op) == 0) {
        result = keep ? PyTuple_Pack(2, y, pre) : Py_NewRef((PyObject *)y);
    }
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(w.array);
    Py_XDECREF(residual.array);
    Py_XDECREF(bias);
    Py_XDECREF(y);
    Py_XDECREF(pre);
    return result;
}

/* product(a, b, out or None, accumulate) -> a @ b of two matrices, or out += a @ b */
static PyObject *
product(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "product";
    nf_matrix a = {0}, b = {0};
    PyArrayObject *out = NULL;
    if (nf_check_count(op, count, 4) < 0) {
        return NULL;
    }
    const int type = nf_read_matrices(args, &a, &b, op),
              accumulate = PyObject_IsTrue(args[3]);
    if (type < 0 || accumulate < 0) {
        goto fail;
    }
    if (a.columns != b.rows) {
        PyErr_Format(PyExc_ValueError, "%s: a (%zd, %zd) and b (%zd, %zd) do not fit", op,
                     (Py_ssize_t)a.rows, (Py_ssize_t)a.columns, (Py_ssize_t)b.rows,
                     (Py_ssize_t)b.columns);
        goto fail;
    }
    if (nf_check_product(op, a.rows, b.columns, a.columns) < 0) {
        goto fail;
    }
    const npy_intp shape[2] = {a.rows, b.columns};
    PyArrayObject *const inputs[] = {a.array, b.array};
    out = nf_take_out(args[2], 2, shape, type, inputs, 2, op);
    if (out == NULL) {
        goto fail;
    }
    nf_gemm p = nf_product_of(a, b, nf_whole(out, a.rows, b.columns));
    p.accumulate = accumulate && nf_given(args[2]);
    if (nf_run_products(type, &p, 1, op) < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(a.array);
    Py_XDECREF(b.array);
    return (PyObject *)out;
}

static PyMethodDef methods[] = {
    METHOD(linear, NULL),
    METHOD(product, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_gemm(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
