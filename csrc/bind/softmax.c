/* Softmax and log-softmax. */
#include "bind/families.h"
#include "bind/rows.h"

/* (x) -> y, or (dy, y) -> dx. About 4 cycles for 4 bytes: the exponentials. */
static PyObject *
softmax_rows(PyObject *const *args, Py_ssize_t count, int backward,
             nf_row_kernel *kernel[2], const char *op)
{
    nf_row_view x = {0}, dy = {0};
    PyArrayObject *out = NULL;
    if (nf_check_count(op, count, backward ? 2 : 1) < 0) {
        return NULL;
    }
    x = nf_read_rows(args[backward], op, backward ? "y" : "x");
    if (x.array == NULL) {
        goto fail;
    }
    if (backward) {
        dy = nf_rows_like(args[0], x.array, op, "dy");
        if (dy.array == NULL) {
            goto fail;
        }
    }
    out = nf_new_like(x.array);
    if (out == NULL) {
        goto fail;
    }
    const nf_softmax a = {x.data, dy.data, PyArray_DATA(out), x.step, dy.step, (size_t)x.n};
    if (x.n > 0
        && nf_run_rows(kernel[PyArray_TYPE(out) == NPY_DOUBLE], &a, x.rows, 2 * (double)x.n,
                       op)
               < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(dy.array);
    return (PyObject *)out;
}

#define BOTH(kernel)                                                                       \
    ((nf_row_kernel *[2]){nf_kernels.kernel##_f32, nf_kernels.kernel##_f64})

static PyObject *
softmax(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 0, BOTH(softmax), "softmax");
}

static PyObject *
softmax_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 1, BOTH(softmax_backward), "softmax_backward");
}

static PyObject *
log_softmax(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 0, BOTH(log_softmax), "log_softmax");
}

static PyObject *
log_softmax_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 1, BOTH(log_softmax_backward), "log_softmax_backward");
}

static PyMethodDef methods[] = {
    METHOD(softmax, NULL),     METHOD(softmax_backward, NULL),
    METHOD(log_softmax, NULL), METHOD(log_softmax_backward, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_softmax(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
