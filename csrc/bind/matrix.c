#include "bind/matrix.h"

static const nf_gemm_kernels *
kernels_of(int type)
{
    return type == NPY_FLOAT ? nf_kernels.gemm_f32 : nf_kernels.gemm_f64;
}

/* Finds the steps: 0 where there are none. */
static int
steps_of(PyArrayObject *array, nf_matrix *m)
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

nf_matrix
nf_matrix_of(PyArrayObject *array, const char *op, const char *name)
{
    nf_matrix m = {NULL, NULL, 1, 1, 1, 1};
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

nf_matrix
nf_read_matrix(PyObject *object, int type, int ndim, const char *op, const char *name)
{
    PyArrayObject *array = nf_needed(object, type, ndim, op, name);
    if (array == NULL) {
        return (nf_matrix){0};
    }
    return nf_matrix_of(array, op, name);
}

int
nf_read_matrices(PyObject *const *args, nf_matrix *a, nf_matrix *b, const char *op)
{
    *a = nf_read_matrix(args[0], NPY_NOTYPE, 2, op, "a");
    if (a->array == NULL) {
        return -1;
    }
    const int type = PyArray_TYPE(a->array);
    *b = nf_read_matrix(args[1], type, 2, op, "b");
    return b->array == NULL ? -1 : type;
}

int
nf_check_product(const char *op, npy_intp m, npy_intp n, npy_intp k)
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

nf_gemm
nf_product_of(nf_matrix a, nf_matrix b, nf_matrix c)
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

int
nf_run_products(int type, const nf_gemm *products, size_t count, const char *op)
{
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_products(kernels_of(type), products, count);
    Py_END_ALLOW_THREADS;
    return nf_check_status(status, op);
}
