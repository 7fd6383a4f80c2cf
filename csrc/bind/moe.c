/* Mixture of experts: rows to their experts and back. The order in which slots are sorted comes
   as one tuple, (offsets, source, row): see ops/moe.h. */
#include "bind/arguments.h"
#include "bind/families.h"
#include "ops/moe.h"

/* Names `order`'s arrays in `routing`, which borrows them. -1 with an error. */
static int
read_order(PyObject *order, nf_moe_routing *routing, const char *op)
{
    PyArrayObject *array[3];
    static const char *const names[3] = {"offsets", "source", "row"};
    if (!PyTuple_Check(order) || PyTuple_GET_SIZE(order) != 3) {
        PyErr_Format(PyExc_TypeError, "%s: routing must be what route() returned", op);
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        PyObject *const item = PyTuple_GET_ITEM(order, i);
        array[i] = nf_array(item, NPY_INT64, i == 2 ? 2 : 1, op, names[i]);
        if (array[i] == NULL || !PyArray_IS_C_CONTIGUOUS(array[i])) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_ValueError, "%s: routing.%s must be contiguous", op,
                             names[i]);
            }
            return -1;
        }
    }
    *routing = (nf_moe_routing){
        .tokens = (size_t)PyArray_DIM(array[2], 0),
        .top_k = (size_t)PyArray_DIM(array[2], 1),
        .experts = (size_t)PyArray_DIM(array[0], 0) - 1,
        .rows = (size_t)PyArray_DIM(array[1], 0),
        .offsets = PyArray_DATA(array[0]),
        .source = PyArray_DATA(array[1]),
        .row = PyArray_DATA(array[2]),
    };
    if (PyArray_DIM(array[0], 0) < 1 || !nf_moe_is_sound(routing)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: the arrays of routing contradict each other; they must stay as "
                     "route() made them",
                     op);
        return -1;
    }
    return 0;
}

typedef enum { DISPATCH, COMBINE } direction;

/* The rows x[source]; or the sum of each token's rows, times `weights` unless that is None. */
static PyObject *
move(direction way, PyObject *object, PyObject *weights, PyObject *order, const char *op,
     const char *name)
{
    nf_moe_routing routing;
    PyArrayObject *x = NULL, *weight = NULL, *out = NULL;
    if (read_order(order, &routing, op) < 0
        || (x = nf_needed(object, NPY_NOTYPE, 2, op, name)) == NULL) {
        return NULL;
    }
    const npy_intp width = PyArray_DIM(x, 1), rows = (npy_intp)routing.rows;
    const npy_intp tokens = (npy_intp)routing.tokens;
    const npy_intp shape[2] = {way == DISPATCH ? tokens : rows, width};
    const npy_intp slots[2] = {tokens, (npy_intp)routing.top_k};
    if (nf_check_shape(x, 2, shape, op, name) < 0
        || nf_read_optional(weights, PyArray_TYPE(x), 2, slots, op, "weight", &weight) < 0
        || (x = nf_contiguous(x)) == NULL) {
        Py_XDECREF(weight);
        return NULL;
    }
    out = nf_new(2, (npy_intp[]){way == DISPATCH ? rows : tokens, width}, PyArray_TYPE(x));
    if (out == NULL) {
        goto fail;
    }
    nf_status status;
    const size_t size = (size_t)PyArray_ITEMSIZE(x);
    Py_BEGIN_ALLOW_THREADS;
    if (way == DISPATCH) {
        status = nf_moe_dispatch(&routing, size, PyArray_DATA(x), (size_t)width,
                                 PyArray_DATA(out));
    }
    else {
        status = nf_moe_combine(&routing, size, PyArray_DATA(x),
                                weight == NULL ? NULL : PyArray_DATA(weight), (size_t)width,
                                PyArray_DATA(out));
    }
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_DECREF(x);
    Py_XDECREF(weight);
    return (PyObject *)out;
}

static PyObject *
moe_dispatch(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return nf_check_count("dispatch", count, 2) < 0
               ? NULL
               : move(DISPATCH, args[0], Py_None, args[1], "dispatch", "x");
}

static PyObject *
moe_dispatch_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return nf_check_count("dispatch_backward", count, 2) < 0
               ? NULL
               : move(COMBINE, args[0], Py_None, args[1], "dispatch_backward", "dy");
}

static PyObject *
moe_combine(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return nf_check_count("combine", count, 3) < 0
               ? NULL
               : move(COMBINE, args[0], args[1], args[2], "combine", "y");
}

static PyObject *
moe_combine_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "combine_backward";
    nf_moe_routing routing;
    PyArrayObject *y = NULL, *dy = NULL, *weight = NULL, *drows = NULL, *dweight = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 4) < 0 || read_order(args[3], &routing, op) < 0
        || (y = nf_needed(args[1], NPY_NOTYPE, 2, op, "y")) == NULL) {
        return NULL;
    }
    const int type = PyArray_TYPE(y);
    const npy_intp width = PyArray_DIM(y, 1);
    const npy_intp rows[2] = {(npy_intp)routing.rows, width};
    const npy_intp tokens[2] = {(npy_intp)routing.tokens, width};
    const npy_intp slots[2] = {tokens[0], (npy_intp)routing.top_k};
    if (nf_check_shape(y, 2, rows, op, "y") < 0 || (y = nf_contiguous(y)) == NULL) {
        return NULL;
    }
    dy = nf_read(args[0], type, 2, tokens, op, "dy");
    weight = dy == NULL ? NULL : nf_read(args[2], type, 2, slots, op, "weight");
    if (weight == NULL) {
        goto fail;
    }
    drows = nf_new(2, rows, type);
    dweight = nf_new(2, slots, type);
    if (drows == NULL || dweight == NULL) {
        goto fail;
    }
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_moe_combine_backward(
        &routing, (size_t)PyArray_ITEMSIZE(y), PyArray_DATA(dy), PyArray_DATA(y),
        PyArray_DATA(weight), (size_t)width, PyArray_DATA(drows), PyArray_DATA(dweight));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) == 0) {
        result = PyTuple_Pack(2, drows, dweight);
    }
fail:
    Py_XDECREF(y);
    Py_XDECREF(dy);
    Py_XDECREF(weight);
    Py_XDECREF(drows);
    Py_XDECREF(dweight);
    return result;
}

static PyObject *
moe_swiglu_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "mlp_backward";
    nf_moe_routing routing;
    PyArrayObject *hidden = NULL, *dacted = NULL, *weight = NULL;
    PyArrayObject *acted = NULL, *dhidden = NULL, *dweight = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 4) < 0 || read_order(args[3], &routing, op) < 0
        || (dacted = nf_needed(args[1], NPY_NOTYPE, 2, op, "dacted")) == NULL) {
        return NULL;
    }
    const int type = PyArray_TYPE(dacted);
    const npy_intp width = PyArray_DIM(dacted, 1);
    const npy_intp rows[2] = {(npy_intp)routing.rows, width};
    const npy_intp wide[2] = {rows[0], 2 * width};
    const npy_intp slots[2] = {(npy_intp)routing.tokens, (npy_intp)routing.top_k};
    if (nf_check_shape(dacted, 2, rows, op, "dacted") < 0
        || (dacted = nf_contiguous(dacted)) == NULL) {
        return NULL;
    }
    hidden = nf_read(args[0], type, 2, wide, op, "hidden");
    weight = hidden == NULL ? NULL : nf_read(args[2], type, 2, slots, op, "weight");
    if (weight == NULL) {
        goto fail;
    }
    acted = nf_new(2, rows, type);
    dhidden = nf_new(2, wide, type);
    dweight = nf_new(2, slots, type);
    if (acted == NULL || dhidden == NULL || dweight == NULL) {
        goto fail;
    }
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_moe_swiglu_backward(
        &routing, (size_t)PyArray_ITEMSIZE(dacted), PyArray_DATA(hidden),
        PyArray_DATA(dacted), PyArray_DATA(weight), (size_t)width, PyArray_DATA(acted),
        PyArray_DATA(dhidden), PyArray_DATA(dweight));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) == 0) {
        result = PyTuple_Pack(3, acted, dhidden, dweight);
    }
fail:
    Py_XDECREF(hidden);
    Py_XDECREF(dacted);
    Py_XDECREF(weight);
    Py_XDECREF(acted);
    Py_XDECREF(dhidden);
    Py_XDECREF(dweight);
    return result;
}

static PyMethodDef methods[] = {
    METHOD(moe_dispatch, "(x, order) -> x[source]"),
    METHOD(moe_dispatch_backward, "(dy, order) -> dx"),
    METHOD(moe_combine, "(y, weight, order) -> (T, d)"),
    METHOD(moe_combine_backward, "(dy, y, weight, order) -> (drows, dweight)"),
    METHOD(moe_swiglu_backward,
           "(hidden, dacted, weight, order) -> (acted, dhidden, dweight)"),
    {NULL, NULL, 0, NULL},
};

int
nf_add_moe(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
