/* Quantized weights. What kernels read of one is a capsule that quant_pack makes; its names,
   and all that files hold, are numformer.quant's. */
#include "ops/quant.h"

#include "bind/arguments.h"
#include "bind/families.h"

static const char capsule_name[] = "numformer.quant_weights";

static void
free_capsule(PyObject *capsule)
{
    nf_quant_free(PyCapsule_GetPointer(capsule, capsule_name));
}

static PyObject *
quant_pack(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "quant_pack";
    PyArrayObject *data = NULL, *scales = NULL, *zeros = NULL;
    if (nf_check_count(op, count, 6) < 0
        || (data = nf_needed(args[0], NPY_UBYTE, 2, op, "data")) == NULL) {
        return NULL;
    }
    const int half =
        PyArray_Check(args[1]) && PyArray_TYPE((PyArrayObject *)args[1]) == NPY_HALF;
    scales = nf_needed(args[1], half ? NPY_HALF : NPY_FLOAT, 2, op, "scales");
    const Py_ssize_t bits = PyLong_AsSsize_t(args[3]), k = PyLong_AsSsize_t(args[4]);
    const Py_ssize_t group = PyLong_AsSsize_t(args[5]);
    if (scales == NULL || PyErr_Occurred()) {
        return NULL;
    }
    if ((bits != 4 && bits != 8) || k < 1 || group < 1) {
        PyErr_Format(PyExc_ValueError,
                     "%s: bits must be 4 or 8, K and group 1 or more, got %zd, %zd, %zd",
                     op, bits, k, group);
        return NULL;
    }
    const Py_ssize_t n = PyArray_DIM(data, 0), depth = group < k ? group : k;
    if (depth > NF_QUANT_DEPTH_LIMIT) {
        PyErr_Format(PyExc_ValueError,
                     "%s: a group may have %d values at most, got %zd; choose a smaller "
                     "group_size",
                     op, NF_QUANT_DEPTH_LIMIT, depth);
        return NULL;
    }
    const npy_intp shape[2] = {n, bits == 8 ? k : (k + 1) / 2};
    const npy_intp groups[2] = {n, (k + depth - 1) / depth};
    if (nf_check_shape(data, 2, shape, op, "data") < 0
        || nf_check_shape(scales, 2, groups, op, "scales") < 0) {
        return NULL;
    }
    if (nf_given(args[2])) {
        zeros = nf_array(args[2], NPY_UBYTE, 2, op, "zeros");
        if (zeros == NULL || nf_check_shape(zeros, 2, groups, op, "zeros") < 0) {
            return NULL;
        }
    }
    if (!PyArray_IS_C_CONTIGUOUS(data) || !PyArray_IS_C_CONTIGUOUS(scales)
        || (zeros != NULL && !PyArray_IS_C_CONTIGUOUS(zeros))) {
        PyErr_Format(PyExc_ValueError, "%s: data, scales and zeros must be C-contiguous",
                     op);
        return NULL;
    }
    nf_quant_weights *weights;
    Py_BEGIN_ALLOW_THREADS;
    weights = nf_quant_pack(PyArray_DATA(data), PyArray_DATA(scales),
                            zeros == NULL ? NULL : PyArray_DATA(zeros), (size_t)n,
                            (size_t)k, (size_t)group, (int)bits, half);
    Py_END_ALLOW_THREADS;
    if (weights == NULL) {
        return PyErr_NoMemory();
    }
    PyObject *capsule = PyCapsule_New(weights, capsule_name, free_capsule);
    if (capsule == NULL) {
        nf_quant_free(weights);
    }
    return capsule;
}

/* The activation that follows: 0 none, then as numformer.ops.quant lists them. -1 with an
   error. */
static int
read_activation(PyObject *object, nf_elementwise_kernel **kernel)
{
    nf_elementwise_kernel *const kernels[] = {NULL,
                                              nf_kernels.gelu_erf_f32,
                                              nf_kernels.gelu_tanh_f32,
                                              nf_kernels.gelu_quick_f32,
                                              nf_kernels.silu_f32,
                                              nf_kernels.relu_f32};
    const long number = PyLong_AsLong(object);
    if (number < 0 || number >= (long)(sizeof kernels / sizeof *kernels)) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "quant.linear: unknown activation %ld", number);
        }
        return -1;
    }
    *kernel = kernels[number];
    return 0;
}

static PyObject *
quant_linear(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "quant.linear";
    PyArrayObject *x = NULL, *bias = NULL, *out = NULL;
    nf_elementwise_kernel *activation;
    if (nf_check_count(op, count, 6) < 0
        || (x = nf_needed(args[0], NPY_FLOAT, -1, op, "x")) == NULL) {
        return NULL;
    }
    const nf_quant_weights *const w = PyCapsule_GetPointer(args[1], capsule_name);
    const int integers = PyObject_IsTrue(args[3]), ndim = PyArray_NDIM(x);
    if (w == NULL || integers < 0 || read_activation(args[4], &activation) < 0) {
        return NULL;
    }
    if (ndim < 1 || PyArray_DIM(x, ndim - 1) != (npy_intp)w->k) {
        PyObject *shape = PyObject_GetAttrString((PyObject *)x, "shape");
        if (shape != NULL) {
            PyErr_Format(
                PyExc_ValueError,
                "%s: x must have shape (..., %zd) for a weight of shape (%zd, %zd), "
                "got %R",
                op, (Py_ssize_t)w->k, (Py_ssize_t)w->n, (Py_ssize_t)w->k, shape);
            Py_DECREF(shape);
        }
        return NULL;
    }
    npy_intp shape[NPY_MAXDIMS], rows = 1;
    for (int i = 0; i < ndim - 1; i++) {
        shape[i] = PyArray_DIM(x, i);
        rows *= shape[i];
    }
    shape[ndim - 1] = (npy_intp)w->n;
    if ((x = nf_contiguous(x)) == NULL) {
        return NULL;
    }
    if (nf_read_optional(args[2], NPY_FLOAT, 1, shape + ndim - 1, op, "bias", &bias) < 0) {
        goto fail;
    }
    PyArrayObject *const inputs[] = {x, bias};
    if ((out = nf_take_out(args[5], ndim, shape, NPY_FLOAT, inputs, 2, op)) == NULL) {
        goto fail;
    }
    nf_status status;
    const float *const b = bias == NULL ? NULL : PyArray_DATA(bias);
    Py_BEGIN_ALLOW_THREADS;
    status = (integers ? nf_quant_linear : nf_quant_linear_floats)(
        w, PyArray_DATA(x), (size_t)rows, b, activation, PyArray_DATA(out));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_DECREF(x);
    Py_XDECREF(bias);
    return (PyObject *)out;
}

static PyObject *
int8_matmul(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "int8_matmul";
    PyArrayObject *a = NULL, *b = NULL, *out = NULL;
    if (nf_check_count(op, count, 2) < 0
        || (a = nf_needed(args[0], NPY_BYTE, 2, op, "a")) == NULL
        || (b = nf_needed(args[1], NPY_BYTE, 2, op, "b")) == NULL) {
        return NULL;
    }
    const npy_intp m = PyArray_DIM(a, 0), k = PyArray_DIM(a, 1), n = PyArray_DIM(b, 0);
    const npy_intp shape[2] = {n, k};
    if (nf_check_shape(b, 2, shape, op, "b") < 0) {
        return NULL;
    }
    if (k > NF_QUANT_DEPTH_LIMIT) {
        PyErr_Format(PyExc_ValueError,
                     "%s: K may be %d at most, for sums within 32 bits, got %zd; add the "
                     "products of parts in int64",
                     op, NF_QUANT_DEPTH_LIMIT, (Py_ssize_t)k);
        return NULL;
    }
    if (m == 0 || n == 0 || k == 0) {
        return (PyObject *)nf_new_zeroed(2, (npy_intp[]){m, n}, NPY_INT32);
    }
    a = nf_contiguous(a);
    b = nf_contiguous(b);
    out = a == NULL || b == NULL ? NULL : nf_new(2, (npy_intp[]){m, n}, NPY_INT32);
    if (out != NULL) {
        nf_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = nf_int8_matmul(PyArray_DATA(a), PyArray_DATA(b), (size_t)m, (size_t)n,
                                (size_t)k, PyArray_DATA(out));
        Py_END_ALLOW_THREADS;
        if (nf_check_status(status, op) < 0) {
            Py_CLEAR(out);
        }
    }
    Py_XDECREF(a);
    Py_XDECREF(b);
    return (PyObject *)out;
}

static PyMethodDef methods[] = {
    METHOD(quant_pack, "(data, scales, zeros, bits, K, group) -> weights for quant_linear"),
    METHOD(quant_linear, "(x, weights, bias, integers, activation, out) -> y"),
    METHOD(int8_matmul, "(a, b) -> a b^T as int32"),
    {NULL, NULL, 0, NULL},
};

int
nf_add_quant(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
