/* SwiGLU and GEGLU in one pass forward and one backward, of two arrays or of the halves of one. */
#include "bind/elementwise.h"
#include "bind/families.h"

/* One entry a form; the numbers are those of numformer.ops.gated. */
enum { FORMS = 4 };
static const nf_elementwise_kernels forward[FORMS] = {
    NF_BOTH_TYPES(swiglu), NF_BOTH_TYPES(geglu_erf), NF_BOTH_TYPES(geglu_tanh),
    NF_BOTH_TYPES(geglu_quick)};
static const nf_elementwise_pair_kernels backward[FORMS] = {
    NF_BOTH_TYPES(swiglu_backward), NF_BOTH_TYPES(geglu_erf_backward),
    NF_BOTH_TYPES(geglu_tanh_backward), NF_BOTH_TYPES(geglu_quick_backward)};

static PyObject *
gated(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "gated";
    PyArrayObject *held[2] = {NULL}, *y = NULL;
    nf_rows in[2];
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t form = nf_form_of(args[0], FORMS, op);
    if (form < 0 || nf_hold_rows(args[1], NULL, op, "gate", &held[0], &in[0]) < 0
        || nf_hold_rows(args[2], held[0], op, "up", &held[1], &in[1]) < 0) {
        goto fail;
    }
    y = nf_elementwise_new(forward[form], 2, in, PyArray_NDIM(held[0]),
                           PyArray_DIMS(held[0]), PyArray_TYPE(held[0]), op);
fail:
    Py_XDECREF(held[0]);
    Py_XDECREF(held[1]);
    return (PyObject *)y;
}

static PyObject *
gated_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "gated_backward";
    PyArrayObject *held[3] = {NULL}, *gradient[2] = {NULL};
    PyObject *result = NULL;
    nf_rows in[3], out[2];
    if (nf_check_count(op, count, 4) < 0) {
        return NULL;
    }
    const Py_ssize_t form = nf_form_of(args[0], FORMS, op);
    if (form < 0 || nf_hold_rows(args[1], NULL, op, "gate", &held[0], &in[0]) < 0
        || nf_hold_rows(args[2], held[0], op, "up", &held[1], &in[1]) < 0
        || nf_hold_rows(args[3], held[0], op, "dy", &held[2], &in[2]) < 0) {
        goto fail;
    }
    for (int k = 0; k < 2; k++) {
        gradient[k] = nf_new_like(held[0]);
        if (gradient[k] == NULL) {
            goto fail;
        }
        out[k] = nf_rows_of_new(gradient[k]);
    }
    if (nf_elementwise_pair(backward[form], 3, held[0], in, out, op) == 0) {
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
halves(nf_rows whole, npy_intp columns, npy_intp itemsize, nf_rows half[2])
{
    half[0] = half[1] = whole;
    half[1].data = whole.data + columns * itemsize;
}

/* `h` as rows, with its shape halved in `shape`; -1 with an error where it has no halves. */
static int
read_halves(PyObject *object, const char *op, PyArrayObject **held, nf_rows in[2],
            npy_intp shape[NPY_MAXDIMS])
{
    nf_rows whole;
    if (nf_hold_rows(object, NULL, op, "h", held, &whole) < 0) {
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
    halves(whole, shape[ndim - 1], PyArray_ITEMSIZE(*held), in);
    return 0;
}

static PyObject *
gated_halves(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "gated_halves";
    PyArrayObject *held = NULL, *y = NULL;
    nf_rows in[2];
    npy_intp shape[NPY_MAXDIMS];
    if (nf_check_count(op, count, 2) < 0) {
        return NULL;
    }
    const Py_ssize_t form = nf_form_of(args[0], FORMS, op);
    if (form >= 0 && read_halves(args[1], op, &held, in, shape) == 0) {
        y = nf_elementwise_new(forward[form], 2, in, PyArray_NDIM(held), shape,
                               PyArray_TYPE(held), op);
    }
    Py_XDECREF(held);
    return (PyObject *)y;
}

static PyObject *
gated_halves_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "gated_halves_backward";
    PyArrayObject *held = NULL, *dy = NULL, *dh = NULL;
    nf_rows in[3], out[2];
    npy_intp shape[NPY_MAXDIMS];
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t form = nf_form_of(args[0], FORMS, op);
    if (form < 0 || read_halves(args[1], op, &held, in, shape) < 0) {
        goto fail;
    }
    const int ndim = PyArray_NDIM(held);
    PyArrayObject *given = nf_needed(args[2], PyArray_TYPE(held), -1, op, "dy");
    if (given == NULL || nf_check_shape(given, ndim, shape, op, "dy") < 0
        || nf_hold_rows(args[2], NULL, op, "dy", &dy, &in[2]) < 0) {
        goto fail;
    }
    dh = nf_new_like(held);
    if (dh == NULL) {
        goto fail;
    }
    halves(nf_rows_of_new(dh), shape[ndim - 1], PyArray_ITEMSIZE(dh), out);
    if (nf_elementwise_pair(backward[form], 3, dy, in, out, op) < 0) {
        Py_CLEAR(dh);
    }
fail:
    Py_XDECREF(held);
    Py_XDECREF(dy);
    return (PyObject *)dh;
}

static PyMethodDef methods[] = {
    METHOD(gated,
           "gated(form, gate, up)\n--\n\nSwiGLU (0) or GEGLU (1 erf, 2 tanh, 3 quick)."),
    METHOD(gated_backward,
           "gated_backward(form, gate, up, dy)\n--\n\nThe gradients of gate and up."),
    METHOD(gated_halves, "gated_halves(form, h)\n--\n\nThe same of the halves of the last "
                         "axis, gate first."),
    METHOD(gated_halves_backward,
           "gated_halves_backward(form, h, dy)\n--\n\nThe gradient of h."),
    {NULL, NULL, 0, NULL},
};

int
nf_add_gated(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
