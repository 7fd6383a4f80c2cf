/* Dropout by counter-based random numbers, and draws of one element a row. */
#include "bind/arguments.h"
#include "bind/families.h"
#include "bind/rows.h"

#include "ops/elementwise.h"

/* dropout(x, p, key) */
static PyObject *
dropout(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    PyArrayObject *x = NULL, *y = NULL;
    if (nf_check_count("dropout", count, 3) < 0) {
        return NULL;
    }
    PyArrayObject *const given = nf_needed(args[0], NPY_NOTYPE, -1, "dropout", "x");
    if (given == NULL) {
        return NULL;
    }
    const double p = PyFloat_AsDouble(args[1]);
    if (p == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (!(p >= 0 && p <= 1)) {
        return PyErr_Format(PyExc_ValueError, "dropout: p must be between 0 and 1, got %R",
                            args[1]);
    }
    const uint64_t key = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    x = nf_contiguous(given);
    y = x != NULL ? nf_new_like(x) : NULL;
    if (y == NULL) {
        goto fail;
    }
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_dropout(PICK(dropout, PyArray_TYPE(x)), (size_t)PyArray_ITEMSIZE(x),
                        PyArray_DATA(x), PyArray_DATA(y), (size_t)PyArray_SIZE(x), p, key);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, "dropout") < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(x);
    return (PyObject *)y;
}

/* categorical(weights, u). About a cycle an element. */
static PyObject *
categorical(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "categorical";
    PyArrayObject *u = NULL, *chosen = NULL;
    nf_row_view weights = {0};
    if (nf_check_count(op, count, 2) < 0) {
        return NULL;
    }
    PyArrayObject *const given = nf_needed(args[0], NPY_NOTYPE, 2, op, "weights");
    if (given == NULL) {
        return NULL;
    }
    if (PyArray_DIM(given, 1) == 0) {
        return PyErr_Format(PyExc_ValueError,
                            "categorical: weights must have an element to choose in each "
                            "row, got shape (%zd, 0)",
                            PyArray_DIM(given, 0));
    }
    u = nf_read(args[1], NPY_DOUBLE, 1, PyArray_DIMS(given), op, "u");
    weights = u == NULL ? weights : nf_rows_of(given, op, "weights");
    chosen = weights.array == NULL ? NULL : nf_new(1, PyArray_DIMS(u), NPY_INT64);
    if (chosen == NULL) {
        goto fail;
    }
    const nf_categorical a = {weights.data, PyArray_DATA(u), PyArray_DATA(chosen),
                              weights.step, (size_t)weights.n};
    if (nf_run_rows(PICK(categorical, PyArray_TYPE(given)), &a, weights.rows,
                    (double)weights.n, op)
        < 0) {
        Py_CLEAR(chosen);
    }
fail:
    Py_XDECREF(weights.array);
    Py_XDECREF(u);
    return (PyObject *)chosen;
}

static PyMethodDef methods[] = {
    METHOD(
        dropout,
        "dropout(x, p, key)\n--\n\n"
        "x / (1 - p), or 0 with probability p: a function of key and the element's index."),
    METHOD(
        categorical,
        "categorical(weights, u)\n--\n\n"
        "Of each row the first element at which the running sum of weights exceeds u times "
        "their sum."),
    {NULL, NULL, 0, NULL},
};

int
nf_add_random(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
