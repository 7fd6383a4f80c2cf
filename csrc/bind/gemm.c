/* Matrix products: linear layers, plain products for their gradients, and products by group. Arrays are
   read by their strides where rows or columns are contiguous, else copied. */
#include "bind/arguments.h"
#include "bind/families.h"
#include "core/pool.h"
#include "ops/gemm.h"

/* An array seen as a matrix: all axes but the last are its rows. Steps are in elements, one of them
   is 1. `array` is a new reference, NULL with an error set. */
typedef struct {
    PyArrayObject *array;
    void *data;
    npy_intp rows, columns;
    ptrdiff_t row, column;
} matrix;

static const nf_gemm_kernels *
kernels_of(int type)
{
    return type == NPY_FLOAT ? nf_kernels.gemm_f32 : nf_kernels.gemm_f64;
}

/* Finds the steps: 0 where there are none. */
static int
steps_of(PyArrayObject *array, matrix *m)
{
    const int last = PyArray_NDIM(array) - 1;
    const npy_intp item = PyArray_ITEMSIZE(array);
    npy_intp row = 0, reach = 0; /* of the axes seen so far; 0: none */
    for (int i = last - 1; i >= 0; i--) {
        const npy_intp length = PyArray_DIM(array, i), stride = PyArray_STRIDE(array, i);
        if (length == 1) {
            continue;
        }
        if (reach == 0) {
            row = stride;
        }
        else if (stride != row * reach) {
            return 0;
        }
        reach = (reach == 0 ? 1 : reach) * length;
    }
    const npy_intp column = m->columns == 1 ? item : PyArray_STRIDE(array, last);
    m->row = reach == 0 ? 1 : row / item;
    m->column = column / item;
    return row % item == 0 && column % item == 0 && (m->row == 1 || m->column == 1);
}

static matrix
matrix_of(PyArrayObject *array, const char *op, const char *name)
{
    matrix m = {NULL, NULL, 1, 1, 1, 1};
    const int ndim = PyArray_NDIM(array);
    if (ndim == 0) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have at least one dimension, got ()",
                     op, name);
        return m;
    }
    m.columns = PyArray_DIM(array, ndim - 1);
    m.rows = PyArray_MultiplyList(PyArray_DIMS(array), ndim - 1);
    if (steps_of(array, &m)) {
        Py_INCREF(array);
        m.array = array;
    }
    else {
        m.array = nf_contiguous(array);
        m.row = m.columns;
        m.column = 1;
    }
    m.data = m.array == NULL ? NULL : PyArray_DATA(m.array);
    return m;
}

/* An argument as a matrix; type NPY_NOTYPE: float32 or float64. .array NULL with an error. */
static matrix
read_matrix(PyObject *object, int type, int ndim, const char *op, const char *name)
{
    PyArrayObject *array = nf_needed(object, type, ndim, op, name);
    if (array == NULL) {
        return (matrix){0};
    }
    return matrix_of(array, op, name);
}

/* args[0] and args[1] as matrices of one type, which is returned; -1 with an error. Both are the
   caller's to release in any case. */
static int
read_pair(PyObject *const *args, matrix *a, matrix *b, const char *op)
{
    *a = read_matrix(args[0], NPY_NOTYPE, 2, op, "a");
    if (a->array == NULL) {
        return -1;
    }
    const int type = PyArray_TYPE(a->array);
    *b = read_matrix(args[1], type, 2, op, "b");
    return b->array == NULL ? -1 : type;
}

/* The kernels' arithmetic of places is sound up to 2^33. Memory of that size is not needed to get
   here: an axis may have stride 0. */
static int
check_size(const char *op, npy_intp m, npy_intp n, npy_intp k)
{
    const npy_intp most = (npy_intp)1 << 33;
    if (m > most || n > most || k > most) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: a product may have at most 2^33 rows, columns and terms of a sum, "
            "got %zd, %zd and %zd; cut it into pieces",
            op, (Py_ssize_t)m, (Py_ssize_t)n, (Py_ssize_t)k);
        return -1;
    }
    return 0;
}

/* Of a C-contiguous array that we made or checked. */
static matrix
whole(PyArrayObject *array, npy_intp rows, npy_intp columns)
{
    return (matrix){
        array, array == NULL ? NULL : PyArray_DATA(array), rows, columns, columns, 1};
}

static matrix
transposed(matrix m)
{
    return (matrix){m.array, m.data, m.columns, m.rows, m.column, m.row};
}

/* C = A . B, all else NULL and 0. */
static nf_gemm
product_of(matrix a, matrix b, matrix c)
{
    return (nf_gemm){.m = (size_t)a.rows,
                     .n = (size_t)b.columns,
                     .k = (size_t)a.columns,
                     .a = a.data,
                     .b = b.data,
                     .c = c.data,
                     .a_row = a.row,
                     .a_col = a.column,
                     .b_row = b.row,
                     .b_col = b.column,
                     .c_row = c.row};
}

static int
run(int type, const nf_gemm *products, size_t count, const char *op)
{
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_products(kernels_of(type), products, count);
    Py_END_ALLOW_THREADS;
    return nf_check_status(status, op);
}

/* ---- linear ---- */

/* linear(x, weight, bias, residual, activation, out, keep) -> y, or (y, what entered the
   activation) where keep is true */
static PyObject *
linear(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "linear";
    matrix x = {0}, w = {0}, residual = {0};
    PyArrayObject *bias = NULL, *y = NULL, *pre = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 7) < 0) {
        return NULL;
    }
    x = read_matrix(args[0], NPY_NOTYPE, -1, op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const int type = PyArray_TYPE(x.array), ndim = PyArray_NDIM(x.array);
    w = read_matrix(args[1], type, 2, op, "weight");
    if (w.array == NULL) {
        goto fail;
    }
    if (w.columns != x.columns) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: weight must have shape (N, %zd) as x has %zd features, got (%zd, %zd)", op,
            (Py_ssize_t)x.columns, (Py_ssize_t)x.columns, (Py_ssize_t)w.rows,
            (Py_ssize_t)w.columns);
        goto fail;
    }
    if (check_size(op, x.rows, w.rows, x.columns) < 0) {
        goto fail;
    }
    npy_intp shape[NPY_MAXDIMS];
    for (int i = 0; i < ndim - 1; i++) {
        shape[i] = PyArray_DIM(x.array, i);
    }
    shape[ndim - 1] = w.rows;
    if (nf_given(args[2])) {
        PyArrayObject *given = nf_array(args[2], type, 1, op, "bias");
        if (given == NULL || nf_check_shape(given, 1, &w.rows, op, "bias") < 0) {
            goto fail;
        }
        bias = nf_contiguous(given);
        if (bias == NULL) {
            goto fail;
        }
    }
    if (nf_given(args[3])) {
        PyArrayObject *given = nf_array(args[3], type, -1, op, "residual");
        if (given == NULL || nf_check_shape(given, ndim, shape, op, "residual") < 0) {
            goto fail;
        }
        residual = matrix_of(given, op, "residual");
        if (residual.array != NULL && residual.column != 1) {
            PyArrayObject *copy = nf_contiguous(given);
            Py_SETREF(residual.array, copy);
            residual = whole(copy, residual.rows, residual.columns);
        }
        if (residual.array == NULL) {
            goto fail;
        }
    }
    const long activation = PyLong_AsLong(args[4]);
    const int keep = PyObject_IsTrue(args[6]);
    if (PyErr_Occurred()) {
        goto fail;
    }
    if (activation < 0 || activation >= NF_ACTIVATIONS) {
        PyErr_Format(PyExc_ValueError, "%s: unknown activation %ld", op, activation);
        goto fail;
    }
    if (nf_given(args[5])) {
        PyArrayObject *given = nf_array(args[5], type, -1, op, "out");
        if (given == NULL || nf_check_out(given, ndim, shape, type, x.array, op) < 0
            || nf_check_out(given, ndim, shape, type, w.array, op) < 0
            || (bias && nf_check_out(given, ndim, shape, type, bias, op) < 0)
            || (residual.array
                && nf_check_out(given, ndim, shape, type, residual.array, op) < 0)) {
            goto fail;
        }
        Py_INCREF(given);
        y = given;
    }
    else {
        y = nf_new(ndim, shape, type);
    }
    if (y == NULL || (keep && (pre = nf_new(ndim, shape, type)) == NULL)) {
        goto fail;
    }
    nf_gemm p = product_of(x, transposed(w), whole(y, x.rows, w.rows));
    p.activation = (nf_activation)activation;
    p.bias = bias == NULL ? NULL : PyArray_DATA(bias);
    p.pre = pre == NULL ? NULL : PyArray_DATA(pre);
    p.residual = residual.data;
    p.residual_row = residual.row;
    if (run(type, &p, 1, op) == 0) {
        result = keep ? PyTuple_Pack(2, y, pre) : Py_NewRef((PyObject *)y);
    }
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(w.array);
    Py_XDECREF(residual.array);
    Py_XDECREF(bias);
    Py_XDECREF(y);
    Py_XDECREF(pre);
    return result;
}

/* product(a, b, out or None, accumulate) -> a @ b of two matrices, or out += a @ b */
static PyObject *
product(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "product";
    matrix a = {0}, b = {0};
    PyArrayObject *out = NULL;
    if (nf_check_count(op, count, 4) < 0) {
        return NULL;
    }
    const int type = read_pair(args, &a, &b, op), accumulate = PyObject_IsTrue(args[3]);
    if (type < 0 || accumulate < 0) {
        goto fail;
    }
    if (a.columns != b.rows) {
        PyErr_Format(PyExc_ValueError, "%s: a (%zd, %zd) and b (%zd, %zd) do not fit", op,
                     (Py_ssize_t)a.rows, (Py_ssize_t)a.columns, (Py_ssize_t)b.rows,
                     (Py_ssize_t)b.columns);
        goto fail;
    }
    if (check_size(op, a.rows, b.columns, a.columns) < 0) {
        goto fail;
    }
    const npy_intp shape[2] = {a.rows, b.columns};
    if (nf_given(args[2])) {
        PyArrayObject *given = nf_array(args[2], type, -1, op, "out");
        if (given == NULL || nf_check_out(given, 2, shape, type, a.array, op) < 0
            || nf_check_out(given, 2, shape, type, b.array, op) < 0) {
            goto fail;
        }
        Py_INCREF(given);
        out = given;
    }
    else {
        out = accumulate ? nf_new_zeroed(2, shape, type) : nf_new(2, shape, type);
        if (out == NULL) {
            goto fail;
        }
    }
    nf_gemm p = product_of(a, b, whole(out, a.rows, b.columns));
    p.accumulate = accumulate;
    if (run(type, &p, 1, op) < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(a.array);
    Py_XDECREF(b.array);
    return (PyObject *)out;
}

/* ---- by group: rows offsets[e] .. offsets[e + 1] - 1 belong to group e ---- */

/* offsets (E + 1) that ascend from 0 to `rows`; a borrowed reference, NULL with an error. */
static const int64_t *
read_offsets(PyObject *object, npy_intp groups, npy_intp rows, const char *op)
{
    PyArrayObject *array = nf_needed(object, NPY_INT64, 1, op, "offsets");
    const npy_intp length = groups + 1;
    if (array == NULL || nf_check_shape(array, 1, &length, op, "offsets") < 0) {
        return NULL;
    }
    const int64_t *const offsets = PyArray_DATA(array);
    int sound =
        PyArray_IS_C_CONTIGUOUS(array) && offsets[0] == 0 && offsets[groups] == rows;
    for (npy_intp e = 0; sound && e < groups; e++) {
        sound = offsets[e] <= offsets[e + 1];
    }
    if (!sound) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: offsets must be contiguous and ascend from 0 to the number of rows, %zd",
            op, (Py_ssize_t)rows);
        return NULL;
    }
    return offsets;
}

static matrix
rows_between(matrix m, int64_t begin, int64_t end, npy_intp itemsize)
{
    m.data = (char *)m.data + begin * m.row * itemsize;
    m.rows = end - begin;
    return m;
}

/* Matrix e of a C-contiguous (E, rows, columns) array. */
static matrix
matrix_at(PyArrayObject *array, npy_intp e)
{
    const npy_intp rows = PyArray_DIM(array, 1), columns = PyArray_DIM(array, 2);
    matrix m = whole(array, rows, columns);
    m.data = PyArray_BYTES(array) + e * rows * columns * PyArray_ITEMSIZE(array);
    return m;
}

static int
run_groups(int type, nf_gemm *products, npy_intp groups, const char *op)
{
    const int failed = run(type, products, (size_t)groups, op);
    nf_pool_free(products);
    return failed;
}

/* grouped_linear(x, weight, offsets, bias, backward) -> x (T,K) by weight (E,N,K) to (T,N), plus
   bias (E,N); or, backward, x (T,N) to (T,K) */
static PyObject *
grouped_linear(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "grouped_linear";
    matrix x = {0};
    PyArrayObject *w = NULL, *bias = NULL, *y = NULL;
    if (nf_check_count(op, count, 5) < 0) {
        return NULL;
    }
    x = read_matrix(args[0], NPY_NOTYPE, 2, op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const int type = PyArray_TYPE(x.array), backward = PyObject_IsTrue(args[4]);
    PyArrayObject *weight = nf_array(args[1], type, 3, op, "weight");
    if (weight == NULL || (w = nf_contiguous(weight)) == NULL) {
        goto fail;
    }
    const npy_intp groups = PyArray_DIM(w, 0), in = PyArray_DIM(w, backward ? 1 : 2),
                   out = PyArray_DIM(w, backward ? 2 : 1);
    if (in != x.columns) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: weight must have shape (E, N, %zd) as x has %zd features, got (%zd, "
            "%zd, %zd)",
            op, (Py_ssize_t)x.columns, (Py_ssize_t)x.columns, (Py_ssize_t)groups,
            (Py_ssize_t)PyArray_DIM(w, 1), (Py_ssize_t)PyArray_DIM(w, 2));
        goto fail;
    }
    const int64_t *const offsets = read_offsets(args[2], groups, x.rows, op);
    if (offsets == NULL) {
        goto fail;
    }
    if (nf_given(args[3])) {
        PyArrayObject *given = nf_array(args[3], type, 2, op, "bias");
        const npy_intp shape[2] = {groups, out};
        if (given == NULL || nf_check_shape(given, 2, shape, op, "bias") < 0
            || (bias = nf_contiguous(given)) == NULL) {
            goto fail;
        }
    }
    if (check_size(op, x.rows, out, in) < 0) {
        goto fail;
    }
    const npy_intp shape[2] = {x.rows, out};
    y = nf_new(2, shape, type);
    nf_gemm *products = nf_pool_allocate((size_t)(groups + 1) * sizeof *products);
    if (y == NULL || products == NULL) {
        nf_pool_free(products);
        Py_CLEAR(y);
        goto fail;
    }
    const npy_intp item = PyArray_ITEMSIZE(y);
    for (npy_intp e = 0; e < groups; e++) {
        const matrix of_group = matrix_at(w, e);
        products[e] = product_of(
            rows_between(x, offsets[e], offsets[e + 1], item),
            backward ? of_group : transposed(of_group),
            rows_between(whole(y, x.rows, out), offsets[e], offsets[e + 1], item));
        products[e].bias = bias == NULL ? NULL : PyArray_BYTES(bias) + e * out * item;
    }
    if (run_groups(type, products, groups, op) < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(w);
    Py_XDECREF(bias);
    return (PyObject *)y;
}

/* grouped_outer(a, b, offsets) -> (E,N,K) of a (T,N) and b (T,K): a^T b of each group's rows */
static PyObject *
grouped_outer(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "grouped_outer";
    matrix a = {0}, b = {0};
    PyArrayObject *y = NULL;
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const int type = read_pair(args, &a, &b, op);
    if (type < 0) {
        goto fail;
    }
    if (a.rows != b.rows) {
        PyErr_Format(PyExc_ValueError, "%s: a has %zd rows, b %zd", op, (Py_ssize_t)a.rows,
                     (Py_ssize_t)b.rows);
        goto fail;
    }
    const Py_ssize_t groups = PyObject_Length(args[2]) - 1;
    if (groups < 0) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "%s: offsets must not be empty", op);
        }
        goto fail;
    }
    const int64_t *const offsets = read_offsets(args[2], groups, a.rows, op);
    if (offsets == NULL) {
        goto fail;
    }
    if (check_size(op, a.columns, b.columns, a.rows) < 0) {
        goto fail;
    }
    const npy_intp shape[3] = {groups, a.columns, b.columns};
    y = nf_new(3, shape, type);
    nf_gemm *products = nf_pool_allocate((size_t)(groups + 1) * sizeof *products);
    if (y == NULL || products == NULL) {
        nf_pool_free(products);
        Py_CLEAR(y);
        goto fail;
    }
    const npy_intp item = PyArray_ITEMSIZE(y);
    for (npy_intp e = 0; e < groups; e++) {
        products[e] =
            product_of(transposed(rows_between(a, offsets[e], offsets[e + 1], item)),
                       rows_between(b, offsets[e], offsets[e + 1], item), matrix_at(y, e));
    }
    if (run_groups(type, products, groups, op) < 0) {
        Py_CLEAR(y);
    }
fail:
    Py_XDECREF(a.array);
    Py_XDECREF(b.array);
    return (PyObject *)y;
}

static PyMethodDef methods[] = {
    METHOD(linear, NULL),        METHOD(product, NULL), METHOD(grouped_linear, NULL),
    METHOD(grouped_outer, NULL), {NULL, NULL, 0, NULL},
};

int
nf_add_gemm(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
