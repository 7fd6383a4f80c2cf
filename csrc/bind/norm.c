/* Layer norm and RMS norm, with or without the sum of a residual before them. */
#include "bind/families.h"
#include "bind/rows.h"

/* (x, weight, bias or None, eps, residual or None) -> (y, stats) or (y, sum, stats) */
static PyObject *
norm(PyObject *const *args, Py_ssize_t count, int centered, const char *op)
{
    nf_row_view x = {0}, residual = {0};
    PyArrayObject *weight = NULL, *bias = NULL, *y = NULL, *sum = NULL, *stats = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 5) < 0) {
        return NULL;
    }
    const double eps = PyFloat_AsDouble(args[3]);
    if (eps == -1 && PyErr_Occurred()) {
        return NULL;
    }
    x = nf_read_rows(args[0], op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const int type = PyArray_TYPE(x.array);
    weight = nf_read(args[1], type, 1, &x.n, op, "weight");
    if (weight == NULL || nf_read_optional(args[2], type, 1, &x.n, op, "bias", &bias) < 0) {
        goto fail;
    }
    if (nf_given(args[4])) {
        residual = nf_rows_like(args[4], x.array, op, "residual");
        sum = residual.array == NULL ? NULL : nf_new_like(x.array);
        if (sum == NULL) {
            goto fail;
        }
    }
    const npy_intp stats_shape[2] = {x.rows, 2};
    y = nf_new_like(x.array);
    stats = nf_new(centered ? 2 : 1, stats_shape, type);
    if (y == NULL || stats == NULL) {
        goto fail;
    }
    const nf_norm a = {.x = x.data,
                       .residual = residual.data,
                       .weight = PyArray_DATA(weight),
                       .bias = bias ? PyArray_DATA(bias) : NULL,
                       .y = PyArray_DATA(y),
                       .sum = sum ? PyArray_DATA(sum) : NULL,
                       .stats = PyArray_DATA(stats),
                       .x_step = x.step,
                       .residual_step = residual.step,
                       .n = (size_t)x.n,
                       .eps = eps};
    if (x.n > 0
        && nf_run_rows(centered ? PICK(layer_norm, type) : PICK(rms_norm, type), &a, x.rows,
                       (double)x.n, op)
               < 0) {
        goto fail;
    }
    result = sum ? PyTuple_Pack(3, y, sum, stats) : PyTuple_Pack(2, y, stats);
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(residual.array);
    Py_XDECREF(weight);
    Py_XDECREF(bias);
    Py_XDECREF(y);
    Py_XDECREF(sum);
    Py_XDECREF(stats);
    return result;
}

/* (dy, x, weight, stats, dsum or None) -> (dx, dsums), dsums (2, n) or (1, n) */
static PyObject *
norm_backward(PyObject *const *args, Py_ssize_t count, int centered, const char *op)
{
    nf_row_view x = {0}, dy = {0}, dsum = {0};
    PyArrayObject *weight = NULL, *dx = NULL, *sums = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 5) < 0) {
        return NULL;
    }
    x = nf_read_rows(args[1], op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const int type = PyArray_TYPE(x.array);
    const npy_intp stats_shape[2] = {x.rows, 2};
    const npy_intp sums_shape[2] = {centered ? 2 : 1, x.n};
    PyArrayObject *stats =
        nf_saved(args[3], type, centered ? 2 : 1, stats_shape, op, "stats");
    if (stats == NULL) {
        goto fail;
    }
    dy = nf_rows_like(args[0], x.array, op, "dy");
    if (dy.array == NULL) {
        goto fail;
    }
    weight = nf_read(args[2], type, 1, &x.n, op, "weight");
    if (weight == NULL) {
        goto fail;
    }
    if (nf_given(args[4])) {
        dsum = nf_rows_like(args[4], x.array, op, "dsum");
        if (dsum.array == NULL) {
            goto fail;
        }
    }
    dx = nf_new_like(x.array);
    sums = nf_new(2, sums_shape, type);
    if (dx == NULL || sums == NULL) {
        goto fail;
    }
    nf_norm_backward a = {.x = x.data,
                          .dy = dy.data,
                          .dsum = dsum.data,
                          .weight = PyArray_DATA(weight),
                          .stats = PyArray_DATA(stats),
                          .dx = PyArray_DATA(dx),
                          .x_step = x.step,
                          .dy_step = dy.step,
                          .dsum_step = dsum.step,
                          .n = (size_t)x.n};
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_norm_sums(centered ? PICK(layer_norm_backward, type)
                                   : PICK(rms_norm_backward, type),
                          PICK(column_sums, type), &a, (size_t)x.rows, centered ? 2 : 1,
                          (size_t)PyArray_ITEMSIZE(x.array), PyArray_DATA(sums));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        goto fail;
    }
    result = PyTuple_Pack(2, dx, sums);
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(dy.array);
    Py_XDECREF(dsum.array);
    Py_XDECREF(weight);
    Py_XDECREF(dx);
    Py_XDECREF(sums);
    return result;
}

static PyObject *
layer_norm(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm(args, count, 1, "layer_norm");
}

static PyObject *
layer_norm_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm_backward(args, count, 1, "layer_norm_backward");
}

static PyObject *
rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm(args, count, 0, "rms_norm");
}

static PyObject *
rms_norm_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm_backward(args, count, 0, "rms_norm_backward");
}

static PyMethodDef methods[] = {
    METHOD(layer_norm, NULL), METHOD(layer_norm_backward, NULL),
    METHOD(rms_norm, NULL),   METHOD(rms_norm_backward, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_norm(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
