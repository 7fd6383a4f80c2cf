/* Python's and NumPy's headers, shared by all of bind/. module.c alone defines
   NF_IMPORTS_NUMPY. */
#ifndef NF_BIND_NUMPY_H
#define NF_BIND_NUMPY_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL nf_array_api
#define PY_UFUNC_UNIQUE_SYMBOL nf_ufunc_api
#ifndef NF_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#define NO_IMPORT_UFUNC
#endif
#include <numpy/ndarrayobject.h>
#include <numpy/ufuncobject.h>

#endif
