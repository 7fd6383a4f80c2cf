/* Losses over rows of logits: cross entropy, and the entropy of their softmax. */
#include "bind/families.h"
#include "bind/rows.h"

/* Logits (..., n) and what goes with each of their rows. */
typedef struct {
    nf_row_view logits;
    PyArrayObject *targets;
} loss_rows;

static int
loss_rows_of(PyObject *logits, PyObject *targets, const char *op, loss_rows *r)
{
    r->logits = nf_read_rows(logits, op, "logits");
    if (r->logits.array == NULL) {
        return -1;
    }
    if (targets == NULL) {
        return 0;
    }
    PyArrayObject *array = r->logits.array;
    r->targets = nf_integers_of(targets, op, "targets");
    return r->targets == NULL ? -1
                              : nf_check_shape(r->targets, PyArray_NDIM(array) - 1,
                                               PyArray_DIMS(array), op, "targets");
}

static void
loss_rows_free(loss_rows *r)
{
    Py_XDECREF(r->logits.array);
    Py_XDECREF(r->targets);
}

/* A float argument; 0 and an error set where it is none. */
static double
number(PyObject *object)
{
    const double value = PyFloat_AsDouble(object);
    return value == -1 && PyErr_Occurred() ? 0 : value;
}

enum { MEAN, SUM, NONE }; /* how losses are reduced */

/* `args`: ignore_index, smoothing, z_loss, scale, sign. What both ways of the loss read of them and
   of the rows; -1 with an error. */
static int
read_loss(PyObject *const *args, const loss_rows *r, const char *op, nf_cross_entropy *a)
{
    *a = (nf_cross_entropy){.logits = r->logits.data,
                            .targets = PyArray_DATA(r->targets),
                            .logits_step = r->logits.step,
                            .ignore_index = PyLong_AsLongLong(args[0]),
                            .smoothing = number(args[1]),
                            .z_loss = number(args[2]),
                            .scale = number(args[3]),
                            .sign = number(args[4]),
                            .n = (size_t)r->logits.n};
    return PyErr_Occurred()
               ? -1
               : nf_check_ids(r->targets, r->logits.n, a->ignore_index, op, "targets");
}

/* Runs a kernel over the rows, whose cost is that of exponentials. */
static int
run(nf_row_kernel *kernel, const void *args, const loss_rows *r, const char *op)
{
    return nf_run_rows(kernel, args, r->logits.rows, 2 * (double)r->logits.n + 100, op);
}

/* (logits, targets, ignore_index, smoothing, z_loss, scale, sign, reduction)
   -> (loss, lse, targets as int64, count): loss () or the shape of targets. sign is -1 for
   token_log_probs, which errors name. */
static PyObject *
cross_entropy(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    const int negative = count == 8 && number(args[6]) < 0;
    const char *const op = negative ? "token_log_probs" : "cross_entropy";
    loss_rows r = {0};
    PyArrayObject *loss = NULL, *lse = NULL, *sum = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 8) < 0 || loss_rows_of(args[0], args[1], op, &r) < 0) {
        goto fail;
    }
    const long reduction = PyLong_AsLong(args[7]);
    nf_cross_entropy a;
    if (read_loss(args + 2, &r, op, &a) < 0) {
        goto fail;
    }
    const int type = PyArray_TYPE(r.logits.array);
    loss = nf_new(PyArray_NDIM(r.targets), PyArray_DIMS(r.targets), type);
    lse = nf_new(2, (npy_intp[]){r.logits.rows, 2}, type);
    if (loss == NULL || lse == NULL) {
        goto fail;
    }
    a.loss = PyArray_DATA(loss);
    a.lse = PyArray_DATA(lse);
    if (run(PICK(cross_entropy, type), &a, &r, op) < 0) {
        goto fail;
    }
    const size_t rows = (size_t)r.logits.rows;
    size_t counted = rows;
    if (reduction != NONE) {
        counted = nf_count_other(a.targets, rows, a.ignore_index);
        double value = nf_total(a.loss, rows, (size_t)PyArray_ITEMSIZE(loss));
        value = reduction == MEAN && counted > 0 ? value / (double)counted : value;
        sum = nf_new(0, NULL, type);
        if (sum == NULL) {
            goto fail;
        }
        if (type == NPY_FLOAT) {
            *(float *)PyArray_DATA(sum) = (float)value;
        }
        else {
            *(double *)PyArray_DATA(sum) = value;
        }
    }
    result = Py_BuildValue("OOOn", sum ? sum : loss, lse, r.targets, (Py_ssize_t)counted);
fail:
    loss_rows_free(&r);
    Py_XDECREF(loss);
    Py_XDECREF(lse);
    Py_XDECREF(sum);
    return result;
}

/* A number for each row of the logits, or one for all (0-d): a new reference. */
static PyArrayObject *
of_rows(PyObject *object, PyArrayObject *logits, int single, const char *op,
        const char *name)
{
    return nf_read(object, PyArray_TYPE(logits), single ? 0 : PyArray_NDIM(logits) - 1,
                   PyArray_DIMS(logits), op, name);
}

/* (dy, logits, targets, lse, ignore_index, smoothing, z_loss, scale, sign, dy_scale, single)
   -> dlogits; dy is () where single, else the shape of targets */
static PyObject *
cross_entropy_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "cross_entropy_backward";
    loss_rows r = {0};
    PyArrayObject *dy = NULL, *dlogits = NULL;
    if (nf_check_count(op, count, 11) < 0 || loss_rows_of(args[1], args[2], op, &r) < 0) {
        goto fail;
    }
    const int type = PyArray_TYPE(r.logits.array);
    PyArrayObject *lse =
        nf_saved(args[3], type, 2, (npy_intp[]){r.logits.rows, 2}, op, "lse");
    if (lse == NULL) {
        goto fail;
    }
    nf_cross_entropy a;
    if (read_loss(args + 4, &r, op, &a) < 0) {
        goto fail;
    }
    a.dy_scale = number(args[9]);
    const int single = PyObject_IsTrue(args[10]);
    if (PyErr_Occurred()) {
        goto fail;
    }
    dy = of_rows(args[0], r.logits.array, single, op, "dy");
    dlogits = dy == NULL ? NULL : nf_new_like(r.logits.array);
    if (dlogits == NULL) {
        goto fail;
    }
    a.lse = PyArray_DATA(lse);
    a.dy = PyArray_DATA(dy);
    a.dlogits = PyArray_DATA(dlogits);
    a.dy_step = !single;
    if (run(PICK(cross_entropy_backward, type), &a, &r, op) < 0) {
        Py_CLEAR(dlogits);
    }
fail:
    loss_rows_free(&r);
    Py_XDECREF(dy);
    return (PyObject *)dlogits;
}

/* (logits, scale) -> (entropy, lse) */
static PyObject *
softmax_entropy(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "softmax_entropy";
    loss_rows r = {0};
    PyArrayObject *entropy = NULL, *lse = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 2) < 0 || loss_rows_of(args[0], NULL, op, &r) < 0) {
        goto fail;
    }
    const double scale = number(args[1]);
    if (PyErr_Occurred()) {
        goto fail;
    }
    PyArrayObject *logits = r.logits.array;
    const int type = PyArray_TYPE(logits);
    entropy = nf_new(PyArray_NDIM(logits) - 1, PyArray_DIMS(logits), type);
    lse = nf_new(2, (npy_intp[]){r.logits.rows, 2}, type);
    if (entropy == NULL || lse == NULL) {
        goto fail;
    }
    const nf_entropy a = {.logits = r.logits.data,
                          .entropy = PyArray_DATA(entropy),
                          .lse = PyArray_DATA(lse),
                          .logits_step = r.logits.step,
                          .scale = scale,
                          .n = (size_t)r.logits.n};
    if (run(PICK(softmax_entropy, type), &a, &r, op) < 0) {
        goto fail;
    }
    result = PyTuple_Pack(2, entropy, lse);
fail:
    loss_rows_free(&r);
    Py_XDECREF(entropy);
    Py_XDECREF(lse);
    return result;
}

/* (dy, logits, entropy, lse, scale) -> dlogits */
static PyObject *
softmax_entropy_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "softmax_entropy_backward";
    loss_rows r = {0};
    PyArrayObject *dy = NULL, *entropy = NULL, *dlogits = NULL;
    if (nf_check_count(op, count, 5) < 0 || loss_rows_of(args[1], NULL, op, &r) < 0) {
        goto fail;
    }
    const int type = PyArray_TYPE(r.logits.array);
    PyArrayObject *lse =
        nf_saved(args[3], type, 2, (npy_intp[]){r.logits.rows, 2}, op, "lse");
    const double scale = number(args[4]);
    if (PyErr_Occurred()) {
        goto fail;
    }
    dy = of_rows(args[0], r.logits.array, 0, op, "dy");
    entropy = dy == NULL ? NULL : of_rows(args[2], r.logits.array, 0, op, "entropy");
    dlogits = entropy == NULL ? NULL : nf_new_like(r.logits.array);
    if (dlogits == NULL) {
        goto fail;
    }
    const nf_entropy a = {.logits = r.logits.data,
                          .entropy = PyArray_DATA(entropy),
                          .lse = PyArray_DATA(lse),
                          .dy = PyArray_DATA(dy),
                          .dlogits = PyArray_DATA(dlogits),
                          .logits_step = r.logits.step,
                          .dy_step = 1,
                          .scale = scale,
                          .n = (size_t)r.logits.n};
    if (run(PICK(softmax_entropy_backward, type), &a, &r, op) < 0) {
        Py_CLEAR(dlogits);
    }
fail:
    loss_rows_free(&r);
    Py_XDECREF(dy);
    Py_XDECREF(entropy);
    return (PyObject *)dlogits;
}

static PyMethodDef methods[] = {
    METHOD(cross_entropy, NULL),   METHOD(cross_entropy_backward, NULL),
    METHOD(softmax_entropy, NULL), METHOD(softmax_entropy_backward, NULL),
    {NULL, NULL, 0, NULL},
};

int
nf_add_cross_entropy(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
