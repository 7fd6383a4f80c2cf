/* GeLU after a bias, and the sum over rows that is the bias's gradient. */
#include "bind/elementwise.h"
#include "bind/families.h"

/* One entry a form; the numbers are those of numformer.ops.gelu. */
enum { FORMS = 3 };
static const nf_elementwise_kernels forward[FORMS] = {NF_BOTH_TYPES(bias_gelu_erf),
                                                      NF_BOTH_TYPES(bias_gelu_tanh),
                                                      NF_BOTH_TYPES(bias_gelu_quick)};
static const nf_elementwise_kernels backward[FORMS] = {
    NF_BOTH_TYPES(bias_gelu_erf_backward), NF_BOTH_TYPES(bias_gelu_tanh_backward),
    NF_BOTH_TYPES(bias_gelu_quick_backward)};

/* x, and bias as the one row that serves all rows of x. */
static int
read_biased(PyObject *const *args, const char *op, PyArrayObject *held[2], nf_rows in[2])
{
    if (nf_hold_rows(args[0], NULL, op, "x", &held[0], &in[0]) < 0) {
        return -1;
    }
    const npy_intp columns = (npy_intp)nf_columns_of(held[0]);
    held[1] = nf_read(args[1], PyArray_TYPE(held[0]), 1, &columns, op, "bias");
    if (held[1] == NULL) {
        return -1;
    }
    in[1] = (nf_rows){PyArray_BYTES(held[1]), 0};
    return 0;
}

static PyObject *
bias_gelu(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "bias_gelu";
    PyArrayObject *held[2] = {NULL}, *y = NULL;
    nf_rows in[2];
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t form = nf_form_of(args[0], FORMS, op);
    if (form >= 0 && read_biased(args + 1, op, held, in) == 0) {
        y = nf_elementwise_new(forward[form], 2, in, PyArray_NDIM(held[0]),
                               PyArray_DIMS(held[0]), PyArray_TYPE(held[0]), op);
    }
    Py_XDECREF(held[0]);
    Py_XDECREF(held[1]);
    return (PyObject *)y;
}

/* x, seen as `rows`, summed over all axes but the last; NULL with an error. */
static PyArrayObject *
summed(PyArrayObject *x, nf_rows of_x, const char *op)
{
    const npy_intp columns = (npy_intp)nf_columns_of(x);
    PyArrayObject *sum = nf_new(1, &columns, PyArray_TYPE(x));
    if (sum == NULL) {
        return NULL;
    }
    const size_t rows = columns > 0 ? (size_t)(PyArray_SIZE(x) / columns) : 0;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_sum_rows(PICK(add_row, PyArray_TYPE(x)), (size_t)PyArray_ITEMSIZE(x), of_x,
                         rows, (size_t)columns, PyArray_DATA(sum));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(sum);
    }
    return sum;
}

static PyObject *
bias_gelu_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "bias_gelu_backward";
    PyArrayObject *held[3] = {NULL}, *dx = NULL, *dbias = NULL;
    PyObject *result = NULL;
    nf_rows in[3];
    if (nf_check_count(op, count, 4) < 0) {
        return NULL;
    }
    const Py_ssize_t form = nf_form_of(args[0], FORMS, op);
    if (form < 0 || read_biased(args + 1, op, held, in) < 0
        || nf_hold_rows(args[3], held[0], op, "dy", &held[2], &in[2]) < 0) {
        goto fail;
    }
    dx = nf_elementwise_new(backward[form], 3, in, PyArray_NDIM(held[0]),
                            PyArray_DIMS(held[0]), PyArray_TYPE(held[0]), op);
    dbias = dx == NULL ? NULL : summed(dx, nf_rows_of_new(dx), op);
    if (dbias != NULL) {
        result = PyTuple_Pack(2, dx, dbias);
    }
fail:
    for (int k = 0; k < 3; k++) {
        Py_XDECREF(held[k]);
    }
    Py_XDECREF(dx);
    Py_XDECREF(dbias);
    return result;
}

static PyObject *
sum_rows(PyObject *module, PyObject *object)
{
    (void)module;
    PyArrayObject *held = NULL, *sum = NULL;
    nf_rows rows;
    if (nf_hold_rows(object, NULL, "sum_rows", "x", &held, &rows) == 0) {
        sum = summed(held, rows, "sum_rows");
    }
    Py_XDECREF(held);
    return (PyObject *)sum;
}

static PyMethodDef methods[] = {
    METHOD(bias_gelu,
           "bias_gelu(form, x, bias)\n--\n\nGeLU (0 erf, 1 tanh, 2 quick) of x + bias."),
    METHOD(bias_gelu_backward,
           "bias_gelu_backward(form, x, bias, dy)\n--\n\nThe gradients of x and bias."),
    {"sum_rows", sum_rows, METH_O,
     "sum_rows(x)\n--\n\nThe sum over all axes but the last, in one order."},
    {NULL, NULL, 0, NULL},
};

int
nf_add_bias_gelu(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
