/* What the bindings over rows share. An array is taken as rows of its last axis: in place where
   one step leads from each row to the next, else copied. */
#ifndef NF_BIND_ROWS_H
#define NF_BIND_ROWS_H
#include "bind/arguments.h"
#include "ops/rowwise.h"

#define PICK(kernel, type)                                                                 \
    ((type) == NPY_FLOAT ? nf_kernels.kernel##_f32 : nf_kernels.kernel##_f64)

/* Whether the elements of each row are contiguous and one stride, set in bytes, leads from each
   row to the next; a 0-d array is one row. */
int nf_row_stride(PyArrayObject *array, ptrdiff_t *stride);

/* Rows of the last axis. `array` is a new reference, NULL with an error set. */
typedef struct {
    PyArrayObject *array;
    void *data;
    npy_intp rows, n;
    ptrdiff_t step; /* elements */
} nf_row_view;

nf_row_view nf_rows_of(PyArrayObject *array, const char *op, const char *name);

/* `object`, float32 or float64, as rows; the array has its shape and type. */
nf_row_view nf_read_rows(PyObject *object, const char *op, const char *name);

/* `object` as rows of the shape of `like`. */
nf_row_view nf_rows_like(PyObject *object, PyArrayObject *like, const char *op,
                         const char *name);

/* Runs a kernel over rows; without the GIL where there is much to do. */
int nf_run_rows(nf_row_kernel *kernel, const void *args, npy_intp rows, double row_cost,
                const char *op);

/* Integers as contiguous int64: a new reference. */
PyArrayObject *nf_integers_of(PyObject *object, const char *op, const char *name);

/* -1 with ValueError that names the first id outside 0 .. limit-1 (`except` may stand). */
int nf_check_ids(PyArrayObject *ids, npy_intp limit, int64_t except, const char *op,
                 const char *name);

#endif
