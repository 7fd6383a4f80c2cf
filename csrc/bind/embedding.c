/* Rows of a table by their numbers. */
#include "bind/families.h"
#include "bind/rows.h"

/* (ids, weight) -> weight[ids] */
static PyObject *
embedding(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "embedding";
    PyArrayObject *ids = NULL, *out = NULL;
    nf_row_view table = {0};
    if (nf_check_count(op, count, 2) < 0) {
        return NULL;
    }
    ids = nf_integers_of(args[0], op, "ids");
    PyArrayObject *weight =
        ids == NULL ? NULL : nf_needed(args[1], NPY_NOTYPE, 2, op, "weight");
    if (weight == NULL) {
        goto fail;
    }
    table = nf_rows_of(weight, op, "weight");
    const int ndim = PyArray_NDIM(ids);
    npy_intp shape[NPY_MAXDIMS];
    if (table.array == NULL || nf_check_ids(ids, table.rows, 0, op, "ids") < 0) {
        goto fail;
    }
    if (table.rows == 0 && PyArray_SIZE(ids) > 0) {
        PyErr_Format(PyExc_ValueError, "%s: weight must have rows, got an empty table", op);
        goto fail;
    }
    if (ndim >= NPY_MAXDIMS) {
        PyErr_Format(PyExc_ValueError, "%s: ids must have fewer than %d dimensions", op,
                     NPY_MAXDIMS);
        goto fail;
    }
    for (int i = 0; i < ndim; i++) {
        shape[i] = PyArray_DIM(ids, i);
    }
    shape[ndim] = table.n;
    out = nf_new(ndim + 1, shape, PyArray_TYPE(weight));
    if (out == NULL) {
        goto fail;
    }
    const nf_embedding a = {PyArray_DATA(ids), table.data, PyArray_DATA(out), table.step,
                            (size_t)table.n};
    if (nf_run_rows(PICK(embedding, PyArray_TYPE(weight)), &a, PyArray_SIZE(ids),
                    (double)table.n / 2, op)
        < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(ids);
    Py_XDECREF(table.array);
    return (PyObject *)out;
}

/* (dy, ids, rows of the table) -> dweight */
static PyObject *
embedding_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "embedding_backward";
    PyArrayObject *ids = NULL, *dweight = NULL;
    nf_row_view dy = {0};
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t rows = PyLong_AsSsize_t(args[2]);
    if (rows == -1 && PyErr_Occurred()) {
        return NULL;
    }
    dy = nf_read_rows(args[0], op, "dy");
    ids = dy.array == NULL ? NULL : nf_integers_of(args[1], op, "ids");
    if (ids == NULL) {
        goto fail;
    }
    if (PyArray_NDIM(dy.array) != PyArray_NDIM(ids) + 1
        || !PyArray_CompareLists(PyArray_DIMS(dy.array), PyArray_DIMS(ids),
                                 PyArray_NDIM(ids))) {
        PyErr_Format(PyExc_ValueError,
                     "%s: dy must have the shape of ids and one axis more", op);
        goto fail;
    }
    if (nf_check_ids(ids, rows, 0, op, "ids") < 0) {
        goto fail;
    }
    const npy_intp shape[2] = {rows, dy.n};
    const int type = PyArray_TYPE(dy.array);
    dweight = nf_new(2, shape, type);
    if (dweight == NULL) {
        goto fail;
    }
    nf_embedding_backward a = {NULL,    NULL,        dy.data, PyArray_DATA(dweight),
                               dy.step, (size_t)dy.n};
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_embedding_sums(PICK(embedding_backward, type), &a, PyArray_DATA(ids),
                               (size_t)dy.rows, (size_t)rows);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(dweight);
    }
fail:
    Py_XDECREF(ids);
    Py_XDECREF(dy.array);
    return (PyObject *)dweight;
}

static PyMethodDef methods[] = {
    METHOD(embedding, NULL),
    METHOD(embedding_backward, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_embedding(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
