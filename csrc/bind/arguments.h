/* What every binding does with its arguments.

   Bindings are METH_FASTCALL and take positional arguments only: numformer.ops gives them
   names, defaults and documentation. Each begins everything it owns as NULL, has one `fail:`
   label, and releases with Py_XDECREF. */
#ifndef NF_BIND_ARGUMENTS_H
#define NF_BIND_ARGUMENTS_H
#include "bind/numpy.h"

#include "core/status.h"

/* A line of a method table: the function and its name are one. */
#define METHOD(name, text) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, text}

/* -1 with TypeError where `got` arguments came and not `want`. */
int nf_check_count(const char *op, Py_ssize_t got, Py_ssize_t want);

/* `object` as an array that kernels can read: float32 or float64 (`type` NPY_NOTYPE), or just
   `type`; aligned, native, of `ndim` dimensions (-1: any). A borrowed reference; NULL with
   TypeError or ValueError that names op and name. None gives NULL too, without an error: ask
   nf_given() for an argument that may be left out. */
PyArrayObject *nf_array(PyObject *object, int type, int ndim, const char *op,
                        const char *name);

/* The same, but None is an error. */
PyArrayObject *nf_needed(PyObject *object, int type, int ndim, const char *op,
                         const char *name);

static inline int
nf_given(PyObject *object)
{
    return object != Py_None;
}

/* `object` as a C-contiguous array of this type and shape: a new reference, NULL with an error. */
PyArrayObject *nf_read(PyObject *object, int type, int ndim, const npy_intp *shape,
                       const char *op, const char *name);

/* The same of an argument that may be left out, which leaves `to` NULL; -1 with an error. */
int nf_read_optional(PyObject *object, int type, int ndim, const npy_intp *shape,
                     const char *op, const char *name, PyArrayObject **to);

/* What a forward gave for its backward: never copied, so a borrowed reference. */
PyArrayObject *nf_saved(PyObject *object, int type, int ndim, const npy_intp *shape,
                        const char *op, const char *name);

/* A new reference: the array itself where it is C-contiguous (and aligned, native), else a
   contiguous copy from the pool. */
PyArrayObject *nf_contiguous(PyArrayObject *array);

/* The same where only the last axis must be contiguous. */
PyArrayObject *nf_rows_contiguous(PyArrayObject *array);

/* A new C-contiguous array from the pool, not initialized. */
PyArrayObject *nf_new(int ndim, const npy_intp *shape, int type);
PyArrayObject *nf_new_zeroed(int ndim, const npy_intp *shape, int type);
PyArrayObject *nf_new_like(PyArrayObject *array);

/* -1 with ValueError that names op, name, what was wanted and what came. */
int nf_check_shape(PyArrayObject *array, int ndim, const npy_intp *shape, const char *op,
                   const char *name);

/* -1 with ValueError unless `out` can be written: writeable, C-contiguous, of the shape and
   type, and sharing no memory with `other` (NULL: nothing). */
int nf_check_out(PyArrayObject *out, int ndim, const npy_intp *shape, int type,
                 PyArrayObject *other, const char *op);

/* The result of an op: `object`, which must share no memory with any of the inputs (some may be
   NULL), or a new array where it is None. A new reference, NULL with an error. */
PyArrayObject *nf_take_out(PyObject *object, int ndim, const npy_intp *shape, int type,
                           PyArrayObject *const *inputs, int count, const char *op);

/* -1 with MemoryError where the op had no memory. */
int nf_check_status(nf_status status, const char *op);

/* From now until nf_pool_leave, arrays that NumPy makes in this thread come from the pool. */
PyObject *nf_pool_enter(void); /* NULL with an error set */
void nf_pool_leave(PyObject *before);

#endif
