/* Dropout by counter-based random numbers. */
#include "bind/arguments.h"
#include "bind/families.h"

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
    const int is_double = PyArray_TYPE(x) == NPY_DOUBLE;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_dropout(is_double ? nf_kernels.dropout_f64 : nf_kernels.dropout_f32,
                        (size_t)PyArray_ITEMSIZE(x), PyArray_DATA(x), PyArray_DATA(y),
                        (size_t)PyArray_SIZE(x), p, key);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, "dropout") < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(x);
    return (PyObject *)y;
}

static PyMethodDef methods[] = {
    {"dropout", (PyCFunction)(void (*)(void))dropout, METH_FASTCALL,
     "dropout(x, p, key)\n--\n\n"
     "x / (1 - p), or 0 with probability p: a function of key and the element's index."},
    {NULL, NULL, 0, NULL},
};

int
nf_add_random(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
