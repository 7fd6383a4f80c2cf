/* Mixture of experts: which experts a token goes to, and the order of its slots among theirs. */
#include "bind/arguments.h"
#include "bind/families.h"
#include "ops/moe.h"

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
    if (nf_read_optional(args[7], type, 1, &experts, op, "bias", &bias) < 0
        || nf_read_optional(args[8], NPY_BOOL, 1, &tokens, op, "token_mask", &mask) < 0) {
        goto fail;
    }
    router.bias = bias == NULL ? NULL : PyArray_DATA(bias);
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

static PyObject *
moe_route_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "route_backward";
    PyArrayObject *dweight = NULL, *dscores = NULL, *dlogits = NULL;
    if (nf_check_count(op, count, 10) < 0) {
        return NULL;
    }
    PyArrayObject *scores = nf_needed(args[0], NPY_NOTYPE, 2, op, "probabilities");
    if (scores == NULL) {
        return NULL;
    }
    const npy_intp *const shape = PyArray_DIMS(scores);
    const int type = PyArray_TYPE(scores);
    nf_moe_router router;
    if (nf_saved(args[0], type, 2, shape, op, "probabilities") == NULL
        || read_router(args + 1, shape[1], &router) < 0) {
        return NULL;
    }
    const npy_intp slots[2] = {shape[0], (npy_intp)router.top_k};
    PyArrayObject *expert = nf_saved(args[7], NPY_INT64, 2, slots, op, "expert_index");
    if (expert == NULL
        || nf_read_optional(args[8], type, 2, slots, op, "dweight", &dweight) < 0
        || nf_read_optional(args[9], type, 2, shape, op, "dprobabilities", &dscores) < 0) {
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
    Py_XDECREF(dweight);
    Py_XDECREF(dscores);
    return (PyObject *)dlogits;
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
    {NULL, NULL, 0, NULL},
};

int
nf_add_moe_route(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
