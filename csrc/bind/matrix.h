/* What the bindings of matrix products share. Arrays are read by their strides where rows or columns
   are contiguous, else copied. */
#ifndef NF_BIND_MATRIX_H
#define NF_BIND_MATRIX_H
#include "bind/arguments.h"
#include "ops/gemm.h"

/* An array seen as a matrix: all axes but the last are its rows. Steps are in elements, one of them
   is 1. `array` is a new reference, NULL with an error set. */
typedef struct {
    PyArrayObject *array;
    void *data;
    npy_intp rows, columns;
    ptrdiff_t row, column;
} nf_matrix;

nf_matrix nf_matrix_of(PyArrayObject *array, const char *op, const char *name);

/* An argument as a matrix; type NPY_NOTYPE: float32 or float64. */
nf_matrix nf_read_matrix(PyObject *object, int type, int ndim, const char *op,
                         const char *name);

/* args[0] and args[1] as matrices of one type, which is returned; -1 with an error. Both are the
   caller's to release in any case. */
int nf_read_matrices(PyObject *const *args, nf_matrix *a, nf_matrix *b, const char *op);

/* The kernels' arithmetic of places is sound up to 2^33: -1 with ValueError beyond. Memory of
   that size is not needed to get here: an axis may have stride 0. */
int nf_check_product(const char *op, npy_intp m, npy_intp n, npy_intp k);

/* Of a C-contiguous array that we made or checked; borrowed. */
static inline nf_matrix
nf_whole(PyArrayObject *array, npy_intp rows, npy_intp columns)
{
    return (nf_matrix){
        array, array == NULL ? NULL : PyArray_DATA(array), rows, columns, columns, 1};
}

static inline nf_matrix
nf_transposed(nf_matrix m)
{
    return (nf_matrix){m.array, m.data, m.columns, m.rows, m.column, m.row};
}

/* C = A . B, all else NULL and 0. */
nf_gemm nf_product_of(nf_matrix a, nf_matrix b, nf_matrix c);

/* Runs them without the GIL; -1 with an error. */
int nf_run_products(int type, const nf_gemm *products, size_t count, const char *op);

#endif
