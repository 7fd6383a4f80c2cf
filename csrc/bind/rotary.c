/* Rotary position embedding. */
#include "bind/families.h"
#include "bind/rows.h"

/* The steps of cos or sin along the three leading axes of x, 0 where it is broadcast; -1 with
   ValueError where it cannot be. */
static int
angle_steps(PyArrayObject *angles, PyArrayObject *x, npy_intp half, const char *name,
            ptrdiff_t steps[3])
{
    const int lead = PyArray_NDIM(angles) - 1, x_lead = PyArray_NDIM(x) - 1;
    const npy_intp item = PyArray_ITEMSIZE(angles);
    int fits = lead >= 1 && lead <= x_lead && PyArray_DIM(angles, lead) == half;
    steps[0] = steps[1] = steps[2] = 0;
    for (int i = 0; fits && i < lead; i++) {
        const npy_intp length = PyArray_DIM(angles, i);
        fits = length == 1 || length == PyArray_DIM(x, x_lead - lead + i);
        if (length != 1) {
            steps[3 - lead + i] = PyArray_STRIDE(angles, i) / item;
        }
    }
    if (!fits) {
        PyErr_Format(PyExc_ValueError,
                     "rotary_embedding: %s must have shape (S, %zd), one row for each "
                     "position of x, or broadcast so against (B, H, S)",
                     name, (Py_ssize_t)half);
        return -1;
    }
    return 0;
}

/* An array whose last axis is contiguous and whose strides are whole elements. */
static PyArrayObject *
stepped(PyArrayObject *array)
{
    for (int i = 0; i < PyArray_NDIM(array); i++) {
        if (PyArray_STRIDE(array, i) % PyArray_ITEMSIZE(array) != 0) {
            return nf_contiguous(array);
        }
    }
    return nf_rows_contiguous(array);
}

/* (x, cos, sin, rotary, interleaved, inverse, out or None) -> out; cos and sin have rotary/2
   columns; out may be x, whatever its strides */
static PyObject *
rotary(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "rotary_embedding";
    PyArrayObject *x = NULL, *cosine = NULL, *sine = NULL, *out = NULL;
    if (nf_check_count(op, count, 7) < 0) {
        return NULL;
    }
    PyArrayObject *given = nf_needed(args[0], NPY_NOTYPE, -1, op, "x");
    if (given == NULL) {
        return NULL;
    }
    const int type = PyArray_TYPE(given), ndim = PyArray_NDIM(given);
    const Py_ssize_t turned = PyLong_AsSsize_t(args[3]);
    const int interleaved = PyObject_IsTrue(args[4]), inverse = PyObject_IsTrue(args[5]);
    PyArrayObject *c = nf_needed(args[1], type, -1, op, "cos");
    PyArrayObject *s = c == NULL ? NULL : nf_needed(args[2], type, -1, op, "sin");
    if (s == NULL || PyErr_Occurred()) {
        return NULL;
    }
    if (ndim < 2 || ndim > 4) {
        PyErr_Format(PyExc_ValueError,
                     "%s: x must have shape (B, H, S, D), (H, S, D) or (S, D), got %d "
                     "dimensions",
                     op, ndim);
        return NULL;
    }
    const npy_intp dim = PyArray_DIM(given, ndim - 1);
    if (turned < 0 || turned > dim || turned % 2 != 0) {
        PyErr_Format(PyExc_ValueError,
                     "%s: rotary_dim must be even and at most %zd, got %zd", op,
                     (Py_ssize_t)dim, turned);
        return NULL;
    }
    nf_rotary a = {.dim = (size_t)dim,
                   .rotary = (size_t)turned,
                   .interleaved = interleaved,
                   .inverse = inverse,
                   .shape = {1, 1, 1}};
    cosine = stepped(c);
    sine = stepped(s);
    x = stepped(given);
    if (cosine == NULL || sine == NULL || x == NULL
        || angle_steps(cosine, x, turned / 2, "cos", a.cos_step) < 0
        || angle_steps(sine, x, turned / 2, "sin", a.sin_step) < 0) {
        goto fail;
    }
    for (int i = 0; i < ndim - 1; i++) {
        a.shape[4 - ndim + i] = (size_t)PyArray_DIM(x, i);
        a.x_step[4 - ndim + i] = PyArray_STRIDE(x, i) / PyArray_ITEMSIZE(x);
    }
    if (args[6] == args[0] && x == given && PyArray_ISWRITEABLE(given)) {
        out = given;
        Py_INCREF(out);
    }
    else {
        PyArrayObject *const inputs[] = {given, c, s};
        out = nf_take_out(args[6], ndim, PyArray_DIMS(x), type, inputs, 3, op);
    }
    if (out == NULL) {
        goto fail;
    }
    for (int i = 0; i < ndim - 1; i++) {
        a.out_step[4 - ndim + i] = PyArray_STRIDE(out, i) / PyArray_ITEMSIZE(out);
    }
    a.x = PyArray_DATA(x);
    a.cos = PyArray_DATA(cosine);
    a.sin = PyArray_DATA(sine);
    a.out = PyArray_DATA(out);
    const npy_intp rows = PyArray_MultiplyList(PyArray_DIMS(x), ndim - 1);
    if (nf_run_rows(PICK(rotary, type), &a, rows, (double)dim + 20, op) < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(x);
    Py_XDECREF(cosine);
    Py_XDECREF(sine);
    return (PyObject *)out;
}

static PyMethodDef methods[] = {
    METHOD(rotary, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_rotary(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
