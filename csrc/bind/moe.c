/* Mixture of experts. The order in which slots are sorted comes as one tuple,
   (offsets, source, row): see ops/moe.h. */
#include "ops/moe.h"

#include <string.h>

#include "bind/arguments.h"
#include "bind/families.h"

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

static PyArrayObject *
new_integers(int ndim, npy_intp a, npy_intp b)
{
    return nf_new(ndim, (npy_intp[]){a, b}, NPY_INT64);
}

/* (chosen, counts, offsets, source, row) of the choice (T, k): a new tuple. */
static PyObject *
sorted_slots(PyArrayObject *expert, npy_intp experts, Py_ssize_t capacity)
{
    const npy_intp tokens = PyArray_DIM(expert, 0), k = PyArray_DIM(expert, 1);
    PyArrayObject *next = NULL, *source = NULL;
    PyArrayObject *chosen = new_integers(1, experts, 0);
    PyArrayObject *counts = new_integers(1, experts, 0);
    PyArrayObject *offsets = new_integers(1, experts + 1, 0);
    PyArrayObject *row = new_integers(2, tokens, k);
    PyObject *result = NULL;
    if (chosen == NULL || counts == NULL || offsets == NULL || row == NULL) {
        goto fail;
    }
    const size_t rows =
        nf_moe_count(PyArray_DATA(expert), (size_t)tokens, (size_t)k, (size_t)experts,
                     capacity < 0 ? SIZE_MAX : (size_t)capacity, PyArray_DATA(chosen),
                     PyArray_DATA(counts), PyArray_DATA(offsets), PyArray_DATA(row));
    source = new_integers(1, (npy_intp)rows, 0);
    next = new_integers(1, experts, 0);
    if (source == NULL || next == NULL) {
        goto fail;
    }
    nf_moe_place(PyArray_DATA(expert), (size_t)tokens, (size_t)k, (size_t)experts,
                 PyArray_DATA(offsets), PyArray_DATA(next), PyArray_DATA(source),
                 PyArray_DATA(row));
    result = PyTuple_Pack(5, chosen, counts, offsets, source, row);
fail:
    Py_XDECREF(chosen);
    Py_XDECREF(counts);
    Py_XDECREF(offsets);
    Py_XDECREF(source);
    Py_XDECREF(row);
    Py_XDECREF(next);
    return result;
}

static PyObject *
moe_sort(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "route";
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    PyArrayObject *expert = nf_needed(args[0], NPY_INT64, 2, op, "expert_index");
    const Py_ssize_t experts = PyLong_AsSsize_t(args[1]);
    const Py_ssize_t capacity = PyLong_AsSsize_t(args[2]);
    if (expert == NULL || PyErr_Occurred() || (expert = nf_contiguous(expert)) == NULL) {
        return NULL;
    }
    PyObject *result = NULL;
    const int64_t *const e = PyArray_DATA(expert);
    for (npy_intp i = 0; i < PyArray_SIZE(expert); i++) {
        if (e[i] < -1 || e[i] >= experts) {
            PyErr_Format(PyExc_ValueError, "%s: expert_index must lie in -1..%zd, got %lld",
                         op, experts - 1, (long long)e[i]);
            goto fail;
        }
    }
    result = sorted_slots(expert, experts, capacity);
fail:
    Py_DECREF(expert);
    return result;
}

/* -1 with ValueError where the options contradict the number of experts. */
static int
check_router(const nf_moe_router *r, Py_ssize_t top_k, Py_ssize_t groups,
             Py_ssize_t top_groups)
{
    const Py_ssize_t experts = (Py_ssize_t)r->experts;
    if (top_k < 1 || top_k > experts) {
        PyErr_Format(PyExc_ValueError,
                     "route: top_k must be 1 to the number of experts, %zd, got %zd",
                     experts, top_k);
        return -1;
    }
    if (groups < 1 || experts % groups != 0) {
        PyErr_Format(PyExc_ValueError,
                     "route: num_groups must divide the number of experts, %zd, got %zd",
                     experts, groups);
        return -1;
    }
    if (top_groups < 1 || top_groups > groups || top_groups * (experts / groups) < top_k) {
        PyErr_Format(PyExc_ValueError,
                     "route: top_groups must be 1 to num_groups, %zd, and hold top_k = %zd "
                     "experts, got %zd",
                     groups, top_k, top_groups);
        return -1;
    }
    return 0;
}

/* `args`: top_k, groups, top_groups, sigmoid, normalize, scale. */
static int
read_router(PyObject *const *args, npy_intp experts, nf_moe_router *r)
{
    Py_ssize_t n[3];
    for (int i = 0; i < 3; i++) {
        n[i] = PyLong_AsSsize_t(args[i]);
        if (n[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    const double scale = PyFloat_AsDouble(args[5]);
    if (scale == -1 && PyErr_Occurred()) {
        return -1;
    }
    *r = (nf_moe_router){
        .experts = (size_t)experts,
        .top_k = (size_t)n[0],
        .groups = (size_t)n[1],
        .top_groups = (size_t)n[2],
        .sigmoid = PyObject_IsTrue(args[3]),
        .normalize = PyObject_IsTrue(args[4]),
        .scale = scale,
    };
    return check_router(r, n[0], n[1], n[2]);
}

static PyObject *
moe_route(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "route";
    PyArrayObject *logits = NULL, *bias = NULL, *mask = NULL, *scores = NULL,
                  *expert = NULL, *weight = NULL;
    PyObject *order = NULL, *result = NULL;
    if (nf_check_count(op, count, 10) < 0
        || (logits = nf_needed(args[0], NPY_NOTYPE, 2, op, "logits")) == NULL) {
        return NULL;
    }
    const npy_intp tokens = PyArray_DIM(logits, 0), experts = PyArray_DIM(logits, 1);
    const int type = PyArray_TYPE(logits);
    nf_moe_router router;
    if ((logits = nf_contiguous(logits)) == NULL
        || read_router(args + 1, experts, &router) < 0) {
        goto fail;
    }
    if (nf_given(args[7])) {
        bias = nf_array(args[7], type, 1, op, "bias");
        if (bias == NULL || nf_check_shape(bias, 1, &experts, op, "bias") < 0) {
            bias = NULL;
            goto fail;
        }
        if ((bias = nf_contiguous(bias)) == NULL) {
            goto fail;
        }
        router.bias = PyArray_DATA(bias);
    }
    if (nf_given(args[8])) {
        mask = nf_array(args[8], NPY_BOOL, 1, op, "token_mask");
        if (mask == NULL || nf_check_shape(mask, 1, &tokens, op, "token_mask") < 0) {
            mask = NULL;
            goto fail;
        }
        if ((mask = nf_contiguous(mask)) == NULL) {
            goto fail;
        }
    }
    const Py_ssize_t capacity = nf_given(args[9]) ? PyLong_AsSsize_t(args[9]) : -1;
    if (nf_given(args[9]) && capacity < 0) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "route: capacity must be 0 or more, got %zd",
                         capacity);
        }
        goto fail;
    }
    const npy_intp k = (npy_intp)router.top_k;
    scores = nf_new(2, (npy_intp[]){tokens, experts}, type);
    weight = nf_new(2, (npy_intp[]){tokens, k}, type);
    expert = new_integers(2, tokens, k);
    if (scores == NULL || weight == NULL || expert == NULL) {
        goto fail;
    }
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_moe_route(&router, (size_t)PyArray_ITEMSIZE(logits), (size_t)tokens,
                          PyArray_DATA(logits), mask == NULL ? NULL : PyArray_DATA(mask),
                          PyArray_DATA(scores), PyArray_DATA(expert), PyArray_DATA(weight));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) == 0
        && (order = sorted_slots(expert, experts, capacity)) != NULL) {
        result = PyTuple_Pack(4, weight, scores, expert, order);
    }
fail:
    Py_XDECREF(logits);
    Py_XDECREF(bias);
    Py_XDECREF(mask);
    Py_XDECREF(scores);
    Py_XDECREF(weight);
    Py_XDECREF(expert);
    Py_XDECREF(order);
    return result;
}

/* A gradient that may be missing: contiguous, a new reference, or NULL; -1 with an error. */
static int
read_gradient(PyObject *object, int type, const npy_intp *shape, const char *op,
              const char *name, PyArrayObject **gradient)
{
    *gradient = NULL;
    if (!nf_given(object)) {
        return 0;
    }
    PyArrayObject *array = nf_array(object, type, 2, op, name);
    if (array == NULL || nf_check_shape(array, 2, shape, op, name) < 0) {
        return -1;
    }
    *gradient = nf_contiguous(array);
    return *gradient == NULL ? -1 : 0;
}

static PyObject *
moe_route_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "route_backward";
    PyArrayObject *scores = NULL, *expert = NULL, *dweight = NULL, *dscores = NULL,
                  *dlogits = NULL;
    if (nf_check_count(op, count, 10) < 0
        || (scores = nf_needed(args[0], NPY_NOTYPE, 2, op, "scores")) == NULL
        || (expert = nf_needed(args[7], NPY_INT64, 2, op, "expert_index")) == NULL) {
        return NULL;
    }
    const npy_intp *const shape = PyArray_DIMS(scores);
    const int type = PyArray_TYPE(scores);
    nf_moe_router router;
    Py_INCREF(scores);
    Py_INCREF(expert);
    if (read_router(args + 1, shape[1], &router) < 0) {
        goto fail;
    }
    const npy_intp slots[2] = {shape[0], (npy_intp)router.top_k};
    if (!PyArray_IS_C_CONTIGUOUS(scores) || !PyArray_IS_C_CONTIGUOUS(expert)
        || nf_check_shape(expert, 2, slots, op, "expert_index") < 0
        || read_gradient(args[8], type, slots, op, "dweight", &dweight) < 0
        || read_gradient(args[9], type, shape, op, "dprobabilities", &dscores) < 0) {
        goto fail;
    }
    dlogits = nf_new_like(scores);
    if (dlogits == NULL) {
        goto fail;
    }
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_moe_route_backward(
        &router, (size_t)PyArray_ITEMSIZE(scores), (size_t)shape[0], PyArray_DATA(scores),
        PyArray_DATA(expert), dweight == NULL ? NULL : PyArray_DATA(dweight),
        dscores == NULL ? NULL : PyArray_DATA(dscores), PyArray_DATA(dlogits));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(dlogits);
    }
fail:
    Py_XDECREF(scores);
    Py_XDECREF(expert);
    Py_XDECREF(dweight);
    Py_XDECREF(dscores);
    return (PyObject *)dlogits;
}

/* x[source], or the sum over the slots where `weight` (an array or None) is there to take. */
typedef enum { DISPATCH, COMBINE } direction;

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
        || read_gradient(weights, PyArray_TYPE(x), slots, op, "weight", &weight) < 0
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
    if (read_gradient(args[0], type, tokens, op, "dy", &dy) < 0
        || read_gradient(args[2], type, slots, op, "weight", &weight) < 0) {
        goto fail;
    }
    if (dy == NULL || weight == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: dy and weight must be arrays", op);
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
    if (read_gradient(args[0], type, wide, op, "hidden", &hidden) < 0
        || read_gradient(args[2], type, slots, op, "weight", &weight) < 0) {
        goto fail;
    }
    if (hidden == NULL || weight == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: hidden and weight must be arrays", op);
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
    METHOD(moe_route,
           "(logits, top_k, groups, top_groups, sigmoid, normalize, scale, bias, "
           "token_mask, capacity) ->\n(weight, probabilities, expert_index, "
           "(chosen, counts, offsets, source, row))"),
    METHOD(moe_route_backward,
           "(probabilities, top_k, groups, top_groups, sigmoid, normalize, scale, "
           "expert_index, dweight, dprobabilities) -> dlogits"),
    METHOD(moe_sort, "(expert_index, experts, capacity or -1) -> (chosen, counts, offsets, "
                     "source, row)"),
    METHOD(moe_dispatch, "(x, order) -> x[source]"),
    METHOD(moe_dispatch_backward, "(dy, order) -> dx"),
    METHOD(moe_combine, "(y, weight, order) -> (T, d)"),
    METHOD(moe_combine_backward, "(dy, y, weight, order) -> (dy, dweight)"),
    METHOD(moe_swiglu_backward,
           "(hidden, dacted, weight, order) -> (acted, dhidden, dweight)"),
    {NULL, NULL, 0, NULL},
};

int
nf_add_moe(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
