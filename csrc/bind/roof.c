/* The machine's limits for the benchmarks: each function does a known amount of work on all
   threads and returns that amount; the caller takes the time. */
#include <string.h>

#include "bind/arguments.h"
#include "bind/families.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum { TASKS = 32, PIECE = 1 << 18 };

/* Large enough for every thread to be worth waking. */
#define ALL_THREADS 1e9

typedef struct {
    nf_roof_registers *kernel;
    size_t rounds, ahead;
    const char *from;
    char *to;
    volatile float sink;
} roof_work;

static void
run_registers(size_t index, void *pointer, void *scratch)
{
    (void)index, (void)scratch;
    roof_work *w = pointer;
    w->sink = w->kernel(w->rounds);
}

static void
run_read(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    roof_work *w = pointer;
    w->sink = nf_kernels.roof_read(w->from + index * PIECE, PIECE, w->ahead);
}

static void
run_copy(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const roof_work *w = pointer;
    memcpy(w->to + index * PIECE, w->from + index * PIECE, PIECE);
}

/* Each task's share of `arg` rounds; the operations done, `each` an FMA sum and lane. */
static PyObject *
registers(nf_roof_registers *kernel, PyObject *arg, double each)
{
    const size_t rounds = PyLong_AsSize_t(arg) / TASKS;
    if (PyErr_Occurred()) {
        return NULL;
    }
    roof_work w = {.kernel = kernel, .rounds = rounds};
    Py_BEGIN_ALLOW_THREADS;
    (void)nf_parallel(TASKS, ALL_THREADS, 0, run_registers, &w);
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(each * TASKS * (double)rounds * NF_ROOF_SUMS
                              * *nf_kernels.roof_lanes);
}

static PyObject *
roof_fma(PyObject *module, PyObject *arg)
{
    (void)module;
    return registers(nf_kernels.roof_fma, arg, 2);
}

static PyObject *
roof_dot(PyObject *module, PyObject *arg)
{
    (void)module;
    return registers(nf_kernels.roof_dot, arg, 8);
}

static PyObject *
roof_read(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (nf_check_count("roof_read", count, 2) < 0) {
        return NULL;
    }
    const size_t ahead = PyLong_AsSize_t(args[1]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    PyArrayObject *x = nf_needed(args[0], NPY_FLOAT, 1, "roof_read", "x");
    if (x == NULL || (x = nf_contiguous(x)) == NULL) {
        return NULL;
    }
    const size_t pieces = (size_t)PyArray_NBYTES(x) / PIECE;
    roof_work w = {.from = PyArray_DATA(x), .ahead = ahead};
    Py_BEGIN_ALLOW_THREADS;
    (void)nf_parallel_apart(pieces, ALL_THREADS, 0, run_read, &w);
    Py_END_ALLOW_THREADS;
    Py_DECREF(x);
    return PyFloat_FromDouble((double)pieces * PIECE);
}

static PyObject *
roof_copy(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (nf_check_count("roof_copy", count, 2) < 0) {
        return NULL;
    }
    PyArrayObject *x = nf_needed(args[0], NPY_FLOAT, 1, "roof_copy", "x");
    PyArrayObject *out =
        x == NULL ? NULL : nf_needed(args[1], NPY_FLOAT, 1, "roof_copy", "out");
    if (out == NULL || !PyArray_IS_C_CONTIGUOUS(x)
        || nf_check_out(out, 1, PyArray_DIMS(x), NPY_FLOAT, x, "roof_copy") < 0) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "roof_copy: expected two contiguous arrays");
        }
        return NULL;
    }
    const size_t pieces = (size_t)PyArray_NBYTES(x) / PIECE;
    roof_work w = {.from = PyArray_DATA(x), .to = PyArray_DATA(out)};
    Py_BEGIN_ALLOW_THREADS;
    (void)nf_parallel_apart(pieces, ALL_THREADS, 0, run_copy, &w);
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(2.0 * (double)pieces * PIECE);
}

static PyMethodDef methods[] = {
    {"roof_fma", roof_fma, METH_O,
     "roof_fma(rounds)\n--\n\nFused multiply-adds from registers; the float operations "
     "done."},
    {"roof_dot", roof_dot, METH_O,
     "roof_dot(rounds)\n--\n\nDot products of bytes from registers; the operations done."},
    METHOD(
        roof_read,
        "roof_read(x, ahead)\n--\n\nRead a float32 array, asking for what is so many bytes "
        "ahead; the bytes read."),
    METHOD(roof_copy,
           "roof_copy(x, out)\n--\n\nCopy a float32 array; the bytes read and written."),
    {NULL, NULL, 0, NULL},
};

int
nf_add_roof(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
