/* Ops over rows of contiguous elements, as the halves of one array are: SwiGLU and GEGLU in one
   pass forward and one backward, and GeLU after a bias. */
#include "bind/families.h"
#include "bind/rows.h"

#include "ops/elementwise.h"

/* One entry a form; the numbers are those of numformer.ops.gated. */
#define FORMS(F)       F(swiglu) F(geglu_erf) F(geglu_tanh) F(geglu_quick)
#define FORWARD(name)  {&nf_kernels.name##_f32, &nf_kernels.name##_f64},
#define BACKWARD(name) {&nf_kernels.name##_backward_f32, &nf_kernels.name##_backward_f64},
static nf_elementwise_kernel **const gated_forward[][2] = {FORMS(FORWARD)};
static nf_elementwise_pair_kernel **const gated_backward_kernels[][2] = {FORMS(BACKWARD)};

#define BIAS_FORMS(F) F(bias_gelu_erf) F(bias_gelu_tanh) F(bias_gelu_quick)
static nf_elementwise_kernel **const bias_forward[][2] = {BIAS_FORMS(FORWARD)};
static nf_elementwise_kernel **const bias_backward[][2] = {BIAS_FORMS(BACKWARD)};

/* The form that a number names; -1 with ValueError. */
static Py_ssize_t
form_of(PyObject *number, Py_ssize_t count, const char *op)
{
    const Py_ssize_t form = PyLong_AsSsize_t(number);
    if (form >= 0 && form < count) {
        return form;
    }
    if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "%s: unknown form %zd", op, form);
    }
    return -1;
}

static size_t
columns_of(PyArrayObject *array)
{
    const int ndim = PyArray_NDIM(array);
    return ndim == 0 ? 1 : (size_t)PyArray_DIM(array, ndim - 1);
}

/* Whether the array is rows of contiguous elements, one stride apart. */
static int
rows_view(PyArrayObject *array, nf_rows *rows)
{
    rows->data = PyArray_BYTES(array);
    return nf_row_stride(array, &rows->stride);
}

/* A new reference to what `rows` shows: the array, or a copy where it has no rows. */
static PyArrayObject *
as_rows(PyArrayObject *array, nf_rows *rows)
{
    if (rows_view(array, rows)) {
        Py_INCREF(array);
        return array;
    }
    PyArrayObject *copy = nf_contiguous(array);
    if (copy != NULL) {
        (void)rows_view(copy, rows);
    }
    return copy;
}

/* As as_rows, of an argument: -1 with an error unless it looks as `like` does (NULL: anything). */
static int
read_rows(PyObject *object, PyArrayObject *like, const char *op, const char *name,
          PyArrayObject **held, nf_rows *rows)
{
    const int type = like == NULL ? NPY_NOTYPE : PyArray_TYPE(like);
    PyArrayObject *array = nf_needed(object, type, -1, op, name);
    if (array == NULL) {
        return -1;
    }
    if (like != NULL
        && nf_check_shape(array, PyArray_NDIM(like), PyArray_DIMS(like), op, name) < 0) {
        return -1;
    }
    *held = as_rows(array, rows);
    return *held == NULL ? -1 : 0;
}

/* Of a fresh array. */
static nf_rows
rows_of_new(PyArrayObject *array)
{
    return (nf_rows){PyArray_BYTES(array),
                     (ptrdiff_t)columns_of(array) * PyArray_ITEMSIZE(array)};
}

/* What shape and type the plan needs, and the call itself, without the GIL. */
static int
run(nf_elementwise_kernel *kernel, nf_elementwise_pair_kernel *pair, int inputs,
    PyArrayObject *like, const nf_rows *in, const nf_rows *out, const char *op)
{
    const size_t columns = columns_of(like), size = (size_t)PyArray_SIZE(like);
    const size_t rows = columns > 0 ? size / columns : 0;
    const size_t itemsize = (size_t)PyArray_ITEMSIZE(like);
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_elementwise_rows(kernel, pair, inputs, itemsize, in, out, rows, columns);
    Py_END_ALLOW_THREADS;
    return nf_check_status(status, op);
}

/* gated(form, gate, up) */
static PyObject *
gated(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const char *const op = "gated";
    PyArrayObject *held[2] = {NULL}, *y = NULL;
    nf_rows in[2], out;
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t form = form_of(args[0], 4, op);
    if (form < 0 || read_rows(args[1], NULL, op, "gate", &held[0], &in[0]) < 0
        || read_rows(args[2], held[0], op, "up", &held[1], &in[1]) < 0) {
        goto fail;
    }
    y = nf_new_like(held[0]);
    if (y == NULL) {
        goto fail;
    }
    out = rows_of_new(y);
    const int is_double = PyArray_TYPE(y) == NPY_DOUBLE;
    if (run(*gated_forward[form][is_double], NULL, 2, y, in, &out, op) < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(held[0]);
    Py_XDECREF(held[1]);
    return (PyObject *)y;
}

/* gated_backward(form, gate, up, dy) -> (dgate, dup) */
static PyObject *
gated_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const char *const op = "gated_backward";
    PyArrayObject *held[3] = {NULL}, *gradient[2] = {NULL};
    PyObject *result = NULL;
    nf_rows in[3], out[2];
    if (nf_check_count(op, count, 4) < 0) {
        return NULL;
    }
    const Py_ssize_t form = form_of(args[0], 4, op);
    if (form < 0 || read_rows(args[1], NULL, op, "gate", &held[0], &in[0]) < 0
        || read_rows(args[2], held[0], op, "up", &held[1], &in[1]) < 0
        || read_rows(args[3], held[0], op, "dy", &held[2], &in[2]) < 0) {
        goto fail;
    }
    for (int k = 0; k < 2; k++) {
        gradient[k] = nf_new_like(held[0]);
        if (gradient[k] == NULL) {
            goto fail;
        }
        out[k] = rows_of_new(gradient[k]);
    }
    const int is_double = PyArray_TYPE(held[0]) == NPY_DOUBLE;
    if (run(NULL, *gated_backward_kernels[form][is_double], 3, held[0], in, out, op) == 0) {
        result = PyTuple_Pack(2, gradient[0], gradient[1]);
    }
fail:
    for (int k = 0; k < 3; k++) {
        Py_XDECREF(held[k]);
    }
    Py_XDECREF(gradient[0]);
    Py_XDECREF(gradient[1]);
    return result;
}

/* The two halves of the last axis of `whole`, as rows. */
static void
halves(nf_rows whole, size_t columns, int itemsize, nf_rows half[2])
{
    half[0] = half[1] = whole;
    half[1].data = (char *)whole.data + columns * (size_t)itemsize;
}

/* `h` as rows, with its shape halved in `shape`; -1 with an error where it has no halves. */
static int
read_halves(PyObject *object, const char *op, PyArrayObject **held, nf_rows in[2],
            npy_intp shape[NPY_MAXDIMS])
{
    nf_rows whole;
    if (read_rows(object, NULL, op, "h", held, &whole) < 0) {
        return -1;
    }
    const int ndim = PyArray_NDIM(*held);
    if (ndim == 0 || PyArray_DIM(*held, ndim - 1) % 2 != 0) {
        PyErr_Format(PyExc_ValueError, "%s: the last axis of h must be even", op);
        return -1;
    }
    for (int i = 0; i < ndim; i++) {
        shape[i] = PyArray_DIM(*held, i) / (i == ndim - 1 ? 2 : 1);
    }
    halves(whole, (size_t)shape[ndim - 1], PyArray_ITEMSIZE(*held), in);
    return 0;
}

/* gated_halves(form, h): of the halves of the last axis, gate first */
static PyObject *
gated_halves(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const char *const op = "gated_halves";
    PyArrayObject *held = NULL, *y = NULL;
    nf_rows in[2], out;
    npy_intp shape[NPY_MAXDIMS];
    if (nf_check_count(op, count, 2) < 0) {
        return NULL;
    }
    const Py_ssize_t form = form_of(args[0], 4, op);
    if (form < 0 || read_halves(args[1], op, &held, in, shape) < 0) {
        goto fail;
    }
    y = nf_new(PyArray_NDIM(held), shape, PyArray_TYPE(held));
    if (y == NULL) {
        goto fail;
    }
    out = rows_of_new(y);
    const int is_double = PyArray_TYPE(y) == NPY_DOUBLE;
    if (run(*gated_forward[form][is_double], NULL, 2, y, in, &out, op) < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(held);
    return (PyObject *)y;
}

/* gated_halves_backward(form, h, dy) -> dh */
static PyObject *
gated_halves_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const char *const op = "gated_halves_backward";
    PyArrayObject *held = NULL, *gradient = NULL, *dh = NULL;
    nf_rows in[3], out[2];
    npy_intp shape[NPY_MAXDIMS];
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t form = form_of(args[0], 4, op);
    if (form < 0 || read_halves(args[1], op, &held, in, shape) < 0) {
        goto fail;
    }
    const int type = PyArray_TYPE(held), ndim = PyArray_NDIM(held);
    PyArrayObject *dy = nf_needed(args[2], type, -1, op, "dy");
    if (dy == NULL || nf_check_shape(dy, ndim, shape, op, "dy") < 0) {
        goto fail;
    }
    gradient = as_rows(dy, &in[2]);
    dh = gradient == NULL ? NULL : nf_new_like(held);
    if (dh == NULL) {
        goto fail;
    }
    halves(rows_of_new(dh), (size_t)shape[ndim - 1], PyArray_ITEMSIZE(dh), out);
    if (run(NULL, *gated_backward_kernels[form][type == NPY_DOUBLE], 3, gradient, in, out,
            op)
        < 0) {
        Py_CLEAR(dh);
    }
fail:
    Py_XDECREF(held);
    Py_XDECREF(gradient);
    return (PyObject *)dh;
}

/* x, and bias as the one row that serves all rows of x. */
static int
read_biased(PyObject *const *args, const char *op, PyArrayObject *held[2], nf_rows in[2])
{
    if (read_rows(args[0], NULL, op, "x", &held[0], &in[0]) < 0) {
        return -1;
    }
    PyArrayObject *bias = nf_needed(args[1], PyArray_TYPE(held[0]), 1, op, "bias");
    const npy_intp columns = (npy_intp)columns_of(held[0]);
    if (bias == NULL || nf_check_shape(bias, 1, &columns, op, "bias") < 0) {
        return -1;
    }
    held[1] = nf_contiguous(bias);
    if (held[1] == NULL) {
        return -1;
    }
    in[1] = (nf_rows){PyArray_BYTES(held[1]), 0};
    return 0;
}

/* bias_gelu(form, x, bias) */
static PyObject *
bias_gelu(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const char *const op = "bias_gelu";
    PyArrayObject *held[2] = {NULL}, *y = NULL;
    nf_rows in[2], out;
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t form = form_of(args[0], 3, op);
    if (form < 0 || read_biased(args + 1, op, held, in) < 0) {
        goto fail;
    }
    y = nf_new_like(held[0]);
    if (y == NULL) {
        goto fail;
    }
    out = rows_of_new(y);
    const int is_double = PyArray_TYPE(y) == NPY_DOUBLE;
    if (run(*bias_forward[form][is_double], NULL, 2, y, in, &out, op) < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(held[0]);
    Py_XDECREF(held[1]);
    return (PyObject *)y;
}

/* x, seen as `rows`, summed over all axes but the last; NULL with an error. */
static PyArrayObject *
sum_rows(PyArrayObject *x, nf_rows of_x, const char *op)
{
    const npy_intp columns = (npy_intp)columns_of(x);
    PyArrayObject *sum = nf_new(1, &columns, PyArray_TYPE(x));
    if (sum == NULL) {
        return NULL;
    }
    const size_t rows = columns > 0 ? (size_t)(PyArray_SIZE(x) / columns) : 0;
    const int is_double = PyArray_TYPE(x) == NPY_DOUBLE;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_sum_rows(is_double ? nf_kernels.add_row_f64 : nf_kernels.add_row_f32,
                         (size_t)PyArray_ITEMSIZE(x), of_x, rows, (size_t)columns,
                         PyArray_DATA(sum));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(sum);
    }
    return sum;
}

/* bias_gelu_backward(form, x, bias, dy) -> (dx, dbias) */
static PyObject *
bias_gelu_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const char *const op = "bias_gelu_backward";
    PyArrayObject *held[3] = {NULL}, *dx = NULL, *dbias = NULL;
    PyObject *result = NULL;
    nf_rows in[3], out;
    if (nf_check_count(op, count, 4) < 0) {
        return NULL;
    }
    const Py_ssize_t form = form_of(args[0], 3, op);
    if (form < 0 || read_biased(args + 1, op, held, in) < 0
        || read_rows(args[3], held[0], op, "dy", &held[2], &in[2]) < 0) {
        goto fail;
    }
    dx = nf_new_like(held[0]);
    if (dx == NULL) {
        goto fail;
    }
    out = rows_of_new(dx);
    const int is_double = PyArray_TYPE(dx) == NPY_DOUBLE;
    if (run(*bias_backward[form][is_double], NULL, 3, dx, in, &out, op) < 0) {
        goto fail;
    }
    dbias = sum_rows(dx, rows_of_new(dx), op);
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

/* sum_rows(x): x summed over all axes but the last */
static PyObject *
sum_all_rows(PyObject *module, PyObject *object)
{
    (void)module;
    PyArrayObject *held = NULL, *sum = NULL;
    nf_rows rows;
    if (read_rows(object, NULL, "sum_rows", "x", &held, &rows) == 0) {
        sum = sum_rows(held, rows, "sum_rows");
    }
    Py_XDECREF(held);
    return (PyObject *)sum;
}

static PyMethodDef methods[] = {
    {"gated", (PyCFunction)(void (*)(void))gated, METH_FASTCALL,
     "gated(form, gate, up)\n--\n\nSwiGLU (0) or GEGLU (1 erf, 2 tanh, 3 quick)."},
    {"gated_backward", (PyCFunction)(void (*)(void))gated_backward, METH_FASTCALL,
     "gated_backward(form, gate, up, dy)\n--\n\nThe gradients of gate and up."},
    {"gated_halves", (PyCFunction)(void (*)(void))gated_halves, METH_FASTCALL,
     "gated_halves(form, h)\n--\n\nThe same of the halves of the last axis, gate first."},
    {"gated_halves_backward", (PyCFunction)(void (*)(void))gated_halves_backward,
     METH_FASTCALL, "gated_halves_backward(form, h, dy)\n--\n\nThe gradient of h."},
    {"bias_gelu", (PyCFunction)(void (*)(void))bias_gelu, METH_FASTCALL,
     "bias_gelu(form, x, bias)\n--\n\nGeLU (0 erf, 1 tanh, 2 quick) of x + bias."},
    {"sum_rows", sum_all_rows, METH_O,
     "sum_rows(x)\n--\n\nThe sum over all axes but the last, in one order."},
    {"bias_gelu_backward", (PyCFunction)(void (*)(void))bias_gelu_backward, METH_FASTCALL,
     "bias_gelu_backward(form, x, bias, dy)\n--\n\nThe gradients of x and bias."},
    {NULL, NULL, 0, NULL},
};

int
nf_add_gated(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
