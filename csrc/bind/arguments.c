#include "bind/arguments.h"

#include <string.h>

int
nf_check_count(const char *op, Py_ssize_t got, Py_ssize_t want)
{
    if (got != want) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", op, want, got);
        return -1;
    }
    return 0;
}

static void
raise_type(PyArrayObject *array, int type, const char *op, const char *name)
{
    if (type == NPY_NOTYPE) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be float32 or float64, got %S; convert it with "
                     ".astype(numpy.float32)",
                     op, name, PyArray_DESCR(array));
        return;
    }
    PyArray_Descr *wanted = PyArray_DescrFromType(type);
    if (wanted != NULL) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be %S, got %S; convert it with .astype(%s.%S)", op, name,
                     wanted, PyArray_DESCR(array),
                     PyTypeNum_ISUSERDEF(type) ? "ml_dtypes" : "numpy", wanted);
        Py_DECREF(wanted);
    }
}

/* The shape as a tuple of Python's, for a message. */
static PyObject *
shape_tuple(int ndim, const npy_intp *shape)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple != NULL && i < ndim; i++) {
        PyObject *length = PyLong_FromSsize_t(shape[i]);
        if (length == NULL) {
            Py_CLEAR(tuple);
            break;
        }
        PyTuple_SET_ITEM(tuple, i, length);
    }
    return tuple;
}

PyArrayObject *
nf_array(PyObject *object, int type, int ndim, const char *op, const char *name)
{
    if (object == Py_None) {
        return NULL;
    }
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be an array, got %s", op, name,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    const int got = PyArray_TYPE(array);
    if (type == NPY_NOTYPE ? got != NPY_FLOAT && got != NPY_DOUBLE
                           : !PyArray_EquivTypenums(got, type)) {
        raise_type(array, type, op, name);
        return NULL;
    }
    if (!PyArray_ISBEHAVED_RO(array)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be aligned and in native byte order; convert it with "
                     "x.astype(x.dtype.newbyteorder('='))",
                     op, name);
        return NULL;
    }
    if (ndim >= 0 && PyArray_NDIM(array) != ndim) {
        PyObject *shape = shape_tuple(PyArray_NDIM(array), PyArray_DIMS(array));
        if (shape != NULL) {
            PyErr_Format(PyExc_ValueError, "%s: %s must have %d dimensions, got shape %R",
                         op, name, ndim, shape);
            Py_DECREF(shape);
        }
        return NULL;
    }
    return array;
}

PyArrayObject *
nf_needed(PyObject *object, int type, int ndim, const char *op, const char *name)
{
    PyArrayObject *array = nf_array(object, type, ndim, op, name);
    if (array == NULL && !PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be an array, got None", op, name);
    }
    return array;
}

/* `object` as an array of this type and shape, borrowed. */
static PyArrayObject *
shaped(PyObject *object, int type, int ndim, const npy_intp *shape, const char *op,
       const char *name)
{
    PyArrayObject *array = nf_needed(object, type, -1, op, name);
    return array == NULL || nf_check_shape(array, ndim, shape, op, name) < 0 ? NULL : array;
}

PyArrayObject *
nf_read(PyObject *object, int type, int ndim, const npy_intp *shape, const char *op,
        const char *name)
{
    PyArrayObject *array = shaped(object, type, ndim, shape, op, name);
    return array == NULL ? NULL : nf_contiguous(array);
}

int
nf_read_optional(PyObject *object, int type, int ndim, const npy_intp *shape,
                 const char *op, const char *name, PyArrayObject **to)
{
    *to = nf_given(object) ? nf_read(object, type, ndim, shape, op, name) : NULL;
    return *to == NULL && nf_given(object) ? -1 : 0;
}

PyArrayObject *
nf_saved(PyObject *object, int type, int ndim, const npy_intp *shape, const char *op,
         const char *name)
{
    PyArrayObject *array = shaped(object, type, ndim, shape, op, name);
    if (array != NULL && !PyArray_IS_C_CONTIGUOUS(array)) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be as the forward gave it", op, name);
        return NULL;
    }
    return array;
}

PyArrayObject *
nf_contiguous(PyArrayObject *array)
{
    if (PyArray_IS_C_CONTIGUOUS(array)) {
        Py_INCREF(array);
        return array;
    }
    PyArrayObject *copy = nf_new_like(array);
    if (copy != NULL && PyArray_CopyInto(copy, array) < 0) {
        Py_CLEAR(copy);
    }
    return copy;
}

PyArrayObject *
nf_rows_contiguous(PyArrayObject *array)
{
    const int last = PyArray_NDIM(array) - 1;
    if (last >= 0
        && (PyArray_DIM(array, last) < 2
            || PyArray_STRIDE(array, last) == PyArray_ITEMSIZE(array))) {
        Py_INCREF(array);
        return array;
    }
    return nf_contiguous(array);
}

PyArrayObject *
nf_new(int ndim, const npy_intp *shape, int type)
{
    /* Below, NumPy's own cache of small blocks is quicker than changing the handler. */
    const npy_intp pool_pays = 1 << 13;
    if (PyArray_OverflowMultiplyList((npy_intp *)shape, ndim) >= 0
        && PyArray_MultiplyList((npy_intp *)shape, ndim) < pool_pays) {
        return (PyArrayObject *)PyArray_SimpleNew(ndim, (npy_intp *)shape, type);
    }
    PyObject *before = nf_pool_enter();
    if (before == NULL) {
        return NULL;
    }
    PyObject *array = PyArray_SimpleNew(ndim, (npy_intp *)shape, type);
    nf_pool_leave(before);
    return (PyArrayObject *)array;
}

PyArrayObject *
nf_new_zeroed(int ndim, const npy_intp *shape, int type)
{
    PyArrayObject *array = nf_new(ndim, shape, type);
    if (array != NULL) {
        memset(PyArray_DATA(array), 0, (size_t)PyArray_NBYTES(array));
    }
    return array;
}

PyArrayObject *
nf_new_like(PyArrayObject *array)
{
    return nf_new(PyArray_NDIM(array), PyArray_DIMS(array), PyArray_TYPE(array));
}

int
nf_check_shape(PyArrayObject *array, int ndim, const npy_intp *shape, const char *op,
               const char *name)
{
    if (PyArray_NDIM(array) == ndim
        && PyArray_CompareLists(PyArray_DIMS(array), shape, ndim)) {
        return 0;
    }
    PyObject *want = shape_tuple(ndim, shape);
    PyObject *got = shape_tuple(PyArray_NDIM(array), PyArray_DIMS(array));
    if (want != NULL && got != NULL) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have shape %R, got %R", op, name, want,
                     got);
    }
    Py_XDECREF(want);
    Py_XDECREF(got);
    return -1;
}

/* The first byte of an array and the byte after its last. */
static void
memory_of(PyArrayObject *array, const char **begin, const char **end)
{
    const char *low = PyArray_BYTES(array), *high = low + PyArray_ITEMSIZE(array);
    for (int i = 0; i < PyArray_NDIM(array); i++) {
        const npy_intp reach = (PyArray_DIM(array, i) - 1) * PyArray_STRIDE(array, i);
        *(reach < 0 ? &low : &high) += reach;
    }
    *begin = low;
    *end = PyArray_SIZE(array) > 0 ? high : low;
}

int
nf_check_out(PyArrayObject *out, int ndim, const npy_intp *shape, int type,
             PyArrayObject *other, const char *op)
{
    if (PyArray_TYPE(out) != type) {
        raise_type(out, type, op, "out");
        return -1;
    }
    if (nf_check_shape(out, ndim, shape, op, "out") < 0) {
        return -1;
    }
    if (!PyArray_ISCARRAY(out)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: out must be writeable and C-contiguous; give a fresh array and "
                     "copy from it",
                     op);
        return -1;
    }
    if (other != NULL) {
        const char *begin, *end, *out_begin, *out_end;
        memory_of(other, &begin, &end);
        memory_of(out, &out_begin, &out_end);
        if (begin < out_end && out_begin < end) {
            PyErr_Format(PyExc_ValueError,
                         "%s: out must not share memory with an input; give a fresh array",
                         op);
            return -1;
        }
    }
    return 0;
}

PyArrayObject *
nf_take_out(PyObject *object, int ndim, const npy_intp *shape, int type,
            PyArrayObject *const *inputs, int count, const char *op)
{
    if (!nf_given(object)) {
        return nf_new(ndim, shape, type);
    }
    PyArrayObject *out = nf_array(object, type, -1, op, "out");
    if (out == NULL) {
        return NULL;
    }
    for (int i = 0; i < count; i++) {
        if (nf_check_out(out, ndim, shape, type, inputs[i], op) < 0) {
            return NULL;
        }
    }
    Py_INCREF(out);
    return out;
}

int
nf_check_status(nf_status status, const char *op)
{
    if (status == NF_OK) {
        return 0;
    }
    PyErr_Format(PyExc_MemoryError, "%s: no memory for its workspace", op);
    return -1;
}
