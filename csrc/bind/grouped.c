/* Products by group: rows offsets[e] .. offsets[e + 1] - 1 belong to group e. */
#include "bind/families.h"
#include "bind/matrix.h"
#include "core/pool.h"

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

/* The rows of group e. */
static nf_matrix
rows_of(nf_matrix m, const int64_t *offsets, npy_intp e)
{
    m.data = (char *)m.data + offsets[e] * m.row * PyArray_ITEMSIZE(m.array);
    m.rows = offsets[e + 1] - offsets[e];
    return m;
}

/* Matrix e of a C-contiguous (E, rows, columns) array. */
static nf_matrix
matrix_at(PyArrayObject *array, npy_intp e)
{
    const npy_intp rows = PyArray_DIM(array, 1), columns = PyArray_DIM(array, 2);
    nf_matrix m = nf_whole(array, rows, columns);
    m.data = PyArray_BYTES(array) + e * rows * columns * PyArray_ITEMSIZE(array);
    return m;
}

/* An array for the result, and room for the product of each group; NULL with an error. */
static nf_gemm *
new_products(npy_intp groups, int ndim, const npy_intp *shape, int type, PyArrayObject **y,
             const char *op)
{
    nf_gemm *products = nf_pool_allocate((size_t)(groups + 1) * sizeof *products);
    if (nf_check_status(products == NULL ? NF_NO_MEMORY : NF_OK, op) == 0
        && (*y = nf_new(ndim, shape, type)) == NULL) {
        nf_pool_free(products);
        products = NULL;
    }
    return products;
}

/* Runs the products and frees them; the result, or NULL with an error. */
static PyArrayObject *
run_products(nf_gemm *products, npy_intp groups, PyArrayObject *y, const char *op)
{
    if (nf_run_products(PyArray_TYPE(y), products, (size_t)groups, op) < 0) {
        Py_CLEAR(y);
    }
    nf_pool_free(products);
    return y;
}

/* grouped_linear(x, weight, offsets, bias, backward) -> x (T,K) by weight (E,N,K) to (T,N), plus
   bias (E,N); or, backward, x (T,N) to (T,K) */
static PyObject *
grouped_linear(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "grouped_linear";
    nf_matrix x = {0};
    PyArrayObject *w = NULL, *bias = NULL, *y = NULL;
    if (nf_check_count(op, count, 5) < 0) {
        return NULL;
    }
    x = nf_read_matrix(args[0], NPY_NOTYPE, 2, op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const int type = PyArray_TYPE(x.array), backward = PyObject_IsTrue(args[4]);
    PyArrayObject *weight = nf_needed(args[1], type, 3, op, "weight");
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
    if (nf_read_optional(args[3], type, 2, (npy_intp[]){groups, out}, op, "bias", &bias) < 0
        || nf_check_product(op, x.rows, out, in) < 0) {
        goto fail;
    }
    const npy_intp shape[2] = {x.rows, out};
    nf_gemm *const products = new_products(groups, 2, shape, type, &y, op);
    if (products == NULL) {
        goto fail;
    }
    for (npy_intp e = 0; e < groups; e++) {
        const nf_matrix of_group = matrix_at(w, e);
        products[e] = nf_product_of(rows_of(x, offsets, e),
                                    backward ? of_group : nf_transposed(of_group),
                                    rows_of(nf_whole(y, x.rows, out), offsets, e));
        products[e].bias =
            bias == NULL ? NULL : PyArray_BYTES(bias) + e * PyArray_STRIDE(bias, 0);
    }
    y = run_products(products, groups, y, op);
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
    nf_matrix a = {0}, b = {0};
    PyArrayObject *y = NULL;
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const int type = nf_read_matrices(args, &a, &b, op);
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
    if (nf_check_product(op, a.columns, b.columns, a.rows) < 0) {
        goto fail;
    }
    const npy_intp shape[3] = {groups, a.columns, b.columns};
    nf_gemm *const products = new_products(groups, 3, shape, type, &y, op);
    if (products == NULL) {
        goto fail;
    }
    for (npy_intp e = 0; e < groups; e++) {
        products[e] = nf_product_of(nf_transposed(rows_of(a, offsets, e)),
                                    rows_of(b, offsets, e), matrix_at(y, e));
    }
    y = run_products(products, groups, y, op);
fail:
    Py_XDECREF(a.array);
    Py_XDECREF(b.array);
    return (PyObject *)y;
}

static PyMethodDef methods[] = {
    METHOD(grouped_linear, NULL),
    METHOD(grouped_outer, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_grouped(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
