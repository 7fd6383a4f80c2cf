/* What the bindings of ops over rows of contiguous elements share: the halves of one array are
   such rows, so both are read where they are. */
#ifndef NF_BIND_ELEMENTWISE_H
#define NF_BIND_ELEMENTWISE_H
#include "bind/rows.h"
#include "ops/elementwise.h"

/* The two types of a kernel in the table, float32 first. */
typedef nf_elementwise_kernel **const nf_elementwise_kernels[2];
typedef nf_elementwise_pair_kernel **const nf_elementwise_pair_kernels[2];
#define NF_BOTH_TYPES(name) {&nf_kernels.name##_f32, &nf_kernels.name##_f64}

/* The form that a number names, of `count`; -1 with ValueError. */
Py_ssize_t nf_form_of(PyObject *number, Py_ssize_t count, const char *op);

/* Elements of the last axis; 1 of a 0-d array. */
size_t nf_columns_of(PyArrayObject *array);

/* An argument as rows, with `held` a new reference to what they are of: the array, or a copy where
   it has no rows. `like` NULL: any array; else of its shape and type. -1 with an error. */
int nf_hold_rows(PyObject *object, PyArrayObject *like, const char *op, const char *name,
                 PyArrayObject **held, nf_rows *rows);

/* Of a fresh array. */
nf_rows nf_rows_of_new(PyArrayObject *array);

/* The kernel's values of rows of `inputs` inputs in a new array of this shape and type; NULL with
   an error. */
PyArrayObject *nf_elementwise_new(nf_elementwise_kernels kernel, int inputs,
                                  const nf_rows *in, int ndim, const npy_intp *shape,
                                  int type, const char *op);

/* The same where the kernel has two results, in rows that the caller gives; `like` has the shape
   and type of each. -1 with an error. */
int nf_elementwise_pair(nf_elementwise_pair_kernels kernel, int inputs, PyArrayObject *like,
                        const nf_rows *in, const nf_rows *out, const char *op);

#endif
