/* Norms, softmaxes, losses over rows, embedding, rotary. An array is taken as rows of its last
   axis: in place where one step leads from each row to the next, else copied. */
#include "bind/arguments.h"
#include "bind/families.h"
#include "ops/rowwise.h"

#define PICK(kernel, type)                                                                 \
    ((type) == NPY_FLOAT ? nf_kernels.kernel##_f32 : nf_kernels.kernel##_f64)

/* Rows of the last axis. `array` is a new reference, NULL with an error set. */
typedef struct {
    PyArrayObject *array;
    void *data;
    npy_intp rows, n;
    ptrdiff_t step; /* elements */
} row_view;

/* The step that leads from each row to the next, or 0 with *found 0. */
static ptrdiff_t
common_step(PyArrayObject *array, int *found)
{
    const int last = PyArray_NDIM(array) - 1;
    const npy_intp *shape = PyArray_DIMS(array), *strides = PyArray_STRIDES(array);
    const npy_intp item = PyArray_ITEMSIZE(array);
    npy_intp step = 0, reach = 0;
    *found = shape[last] < 2 || strides[last] == item;
    for (int i = last - 1; i >= 0; i--) {
        if (shape[i] == 1) {
            continue;
        }
        if (reach == 0) {
            step = strides[i];
        }
        else if (strides[i] != step * reach) {
            *found = 0;
        }
        reach = (reach == 0 ? 1 : reach) * shape[i];
    }
    if (step % item != 0) {
        *found = 0;
    }
    return step / item;
}

static row_view
rows_of(PyArrayObject *array, const char *op, const char *name)
{
    row_view v = {NULL, NULL, 0, 0, 0};
    const int ndim = PyArray_NDIM(array);
    if (ndim < 1) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have at least one dimension, got ()",
                     op, name);
        return v;
    }
    int found = 0;
    v.n = PyArray_DIM(array, ndim - 1);
    if (PyArray_IS_C_CONTIGUOUS(array)) {
        v.step = v.n;
        found = 1;
    }
    else {
        v.step = common_step(array, &found);
    }
    if (found) {
        Py_INCREF(array);
        v.array = array;
    }
    else {
        v.array = nf_contiguous(array);
        v.step = v.n;
    }
    if (v.array != NULL) {
        v.data = PyArray_DATA(v.array);
        v.rows = PyArray_MultiplyList(PyArray_DIMS(array), ndim - 1);
    }
    return v;
}

/* `object` as rows of the shape of `like`. */
static row_view
rows_like(PyObject *object, PyArrayObject *like, const char *op, const char *name)
{
    const row_view none = {NULL, NULL, 0, 0, 0};
    PyArrayObject *array = nf_array(object, PyArray_TYPE(like), -1, op, name);
    if (array == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "%s: %s must be an array, got None", op, name);
        }
        return none;
    }
    if (nf_check_shape(array, PyArray_NDIM(like), PyArray_DIMS(like), op, name) < 0) {
        return none;
    }
    return rows_of(array, op, name);
}

/* An argument that must be an array: as nf_array, but None is an error. */
static PyArrayObject *
needed(PyObject *object, int type, const char *op, const char *name)
{
    PyArrayObject *array = nf_array(object, type, -1, op, name);
    if (array == NULL && !PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be an array, got None", op, name);
    }
    return array;
}

/* Runs a kernel over rows; without the GIL where there is much to do. */
static int
run(nf_row_kernel *kernel, const void *args, npy_intp rows, double row_cost, const char *op)
{
    nf_status status;
    NPY_BEGIN_THREADS_DEF;
    if (row_cost * (double)rows > 4e3) {
        NPY_BEGIN_THREADS;
    }
    status = nf_rowwise(kernel, args, (size_t)rows, row_cost);
    NPY_END_THREADS;
    return nf_check_status(status, op);
}

/* ---- norms ---- */

/* A vector of n elements, contiguous: a new reference. */
static PyArrayObject *
vector_of(PyObject *object, int type, npy_intp n, const char *op, const char *name)
{
    PyArrayObject *array = needed(object, type, op, name);
    if (array == NULL || nf_check_shape(array, 1, &n, op, name) < 0) {
        return NULL;
    }
    return nf_contiguous(array);
}

/* (x, weight, bias or None, eps, residual or None) -> (y, stats) or (y, sum, stats) */
static PyObject *
norm(PyObject *const *args, Py_ssize_t count, int centered, const char *op)
{
    row_view x = {0}, residual = {0};
    PyArrayObject *weight = NULL, *bias = NULL, *y = NULL, *sum = NULL, *stats = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 5) < 0) {
        return NULL;
    }
    PyArrayObject *given = needed(args[0], NPY_NOTYPE, op, "x");
    if (given == NULL) {
        return NULL;
    }
    const int type = PyArray_TYPE(given), ndim = PyArray_NDIM(given);
    const double eps = PyFloat_AsDouble(args[3]);
    if (eps == -1 && PyErr_Occurred()) {
        return NULL;
    }
    x = rows_of(given, op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    weight = vector_of(args[1], type, x.n, op, "weight");
    if (weight == NULL) {
        goto fail;
    }
    if (nf_given(args[2])) {
        bias = vector_of(args[2], type, x.n, op, "bias");
        if (bias == NULL) {
            goto fail;
        }
    }
    if (nf_given(args[4])) {
        residual = rows_like(args[4], given, op, "residual");
        sum = residual.array == NULL ? NULL : nf_new(ndim, PyArray_DIMS(given), type);
        if (sum == NULL) {
            goto fail;
        }
    }
    const npy_intp stats_shape[2] = {x.rows, 2};
    y = nf_new(ndim, PyArray_DIMS(given), type);
    stats = nf_new(centered ? 2 : 1, stats_shape, type);
    if (y == NULL || stats == NULL) {
        goto fail;
    }
    const nf_norm a = {.x = x.data,
                       .residual = residual.data,
                       .weight = PyArray_DATA(weight),
                       .bias = bias ? PyArray_DATA(bias) : NULL,
                       .y = PyArray_DATA(y),
                       .sum = sum ? PyArray_DATA(sum) : NULL,
                       .stats = PyArray_DATA(stats),
                       .x_step = x.step,
                       .residual_step = residual.step,
                       .n = (size_t)x.n,
                       .eps = eps};
    if (x.n > 0
        && run(centered ? PICK(layer_norm, type) : PICK(rms_norm, type), &a, x.rows,
               (double)x.n, op)
               < 0) {
        goto fail;
    }
    result = sum ? PyTuple_Pack(3, y, sum, stats) : PyTuple_Pack(2, y, stats);
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(residual.array);
    Py_XDECREF(weight);
    Py_XDECREF(bias);
    Py_XDECREF(y);
    Py_XDECREF(sum);
    Py_XDECREF(stats);
    return result;
}

/* (dy, x, weight, stats, dsum or None) -> (dx, dsums), dsums (2, n) or (1, n) */
static PyObject *
norm_backward(PyObject *const *args, Py_ssize_t count, int centered, const char *op)
{
    row_view x = {0}, dy = {0}, dsum = {0};
    PyArrayObject *weight = NULL, *dx = NULL, *sums = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 5) < 0) {
        return NULL;
    }
    PyArrayObject *given = needed(args[1], NPY_NOTYPE, op, "x");
    if (given == NULL) {
        return NULL;
    }
    const int type = PyArray_TYPE(given);
    PyArrayObject *stats = needed(args[3], type, op, "stats");
    if (stats == NULL) {
        return NULL;
    }
    x = rows_of(given, op, "x");
    if (x.array == NULL) {
        goto fail;
    }
    const npy_intp stats_shape[2] = {x.rows, 2};
    const npy_intp sums_shape[2] = {centered ? 2 : 1, x.n};
    if (nf_check_shape(stats, centered ? 2 : 1, stats_shape, op, "stats") < 0
        || !PyArray_IS_C_CONTIGUOUS(stats)) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "%s: stats must be as the forward gave them",
                         op);
        }
        goto fail;
    }
    dy = rows_like(args[0], given, op, "dy");
    weight = vector_of(args[2], type, x.n, op, "weight");
    if (dy.array == NULL || weight == NULL) {
        goto fail;
    }
    if (nf_given(args[4])) {
        dsum = rows_like(args[4], given, op, "dsum");
        if (dsum.array == NULL) {
            goto fail;
        }
    }
    dx = nf_new_like(given);
    sums = nf_new(2, sums_shape, type);
    if (dx == NULL || sums == NULL) {
        goto fail;
    }
    nf_norm_backward a = {.x = x.data,
                          .dy = dy.data,
                          .dsum = dsum.data,
                          .weight = PyArray_DATA(weight),
                          .stats = PyArray_DATA(stats),
                          .dx = PyArray_DATA(dx),
                          .x_step = x.step,
                          .dy_step = dy.step,
                          .dsum_step = dsum.step,
                          .n = (size_t)x.n};
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_norm_sums(centered ? PICK(layer_norm_backward, type)
                                   : PICK(rms_norm_backward, type),
                          PICK(column_sums, type), &a, (size_t)x.rows, centered ? 2 : 1,
                          (size_t)PyArray_ITEMSIZE(given), PyArray_DATA(sums));
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        goto fail;
    }
    result = PyTuple_Pack(2, dx, sums);
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(dy.array);
    Py_XDECREF(dsum.array);
    Py_XDECREF(weight);
    Py_XDECREF(dx);
    Py_XDECREF(sums);
    return result;
}

static PyObject *
layer_norm(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm(args, count, 1, "layer_norm");
}

static PyObject *
layer_norm_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm_backward(args, count, 1, "layer_norm_backward");
}

static PyObject *
rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm(args, count, 0, "rms_norm");
}

static PyObject *
rms_norm_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return norm_backward(args, count, 0, "rms_norm_backward");
}

/* ---- softmaxes ---- */

/* (x) -> y, or (dy, y) -> dx. About 4 cycles for 4 bytes: the exponentials. */
static PyObject *
softmax_rows(PyObject *const *args, Py_ssize_t count, int backward,
             nf_row_kernel *kernel[2], const char *op)
{
    row_view x = {0}, dy = {0};
    PyArrayObject *out = NULL;
    if (nf_check_count(op, count, backward ? 2 : 1) < 0) {
        return NULL;
    }
    PyArrayObject *given = needed(args[backward], NPY_NOTYPE, op, backward ? "y" : "x");
    if (given == NULL) {
        return NULL;
    }
    x = rows_of(given, op, backward ? "y" : "x");
    if (x.array == NULL) {
        goto fail;
    }
    if (backward) {
        dy = rows_like(args[0], given, op, "dy");
        if (dy.array == NULL) {
            goto fail;
        }
    }
    out = nf_new_like(given);
    if (out == NULL) {
        goto fail;
    }
    const nf_softmax a = {x.data, dy.data, PyArray_DATA(out), x.step, dy.step, (size_t)x.n};
    if (x.n > 0
        && run(kernel[PyArray_TYPE(given) == NPY_DOUBLE], &a, x.rows, 2 * (double)x.n, op)
               < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(x.array);
    Py_XDECREF(dy.array);
    return (PyObject *)out;
}

#define BOTH(kernel)                                                                       \
    ((nf_row_kernel *[2]){nf_kernels.kernel##_f32, nf_kernels.kernel##_f64})

static PyObject *
softmax(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 0, BOTH(softmax), "softmax");
}

static PyObject *
softmax_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 1, BOTH(softmax_backward), "softmax_backward");
}

static PyObject *
log_softmax(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 0, BOTH(log_softmax), "log_softmax");
}

static PyObject *
log_softmax_backward(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    return softmax_rows(args, count, 1, BOTH(log_softmax_backward), "log_softmax_backward");
}

/* ---- losses ---- */

/* Integers as contiguous int64: a new reference. */
static PyArrayObject *
integers_of(PyObject *object, const char *op, const char *name)
{
    if (!PyArray_Check(object) || !PyArray_ISINTEGER((PyArrayObject *)object)) {
        PyErr_Format(
            PyExc_TypeError, "%s: %s must be an array of integers, got %S", op, name,
            PyArray_Check(object) ? (PyObject *)PyArray_DESCR((PyArrayObject *)object)
                                  : (PyObject *)Py_TYPE(object));
        return NULL;
    }
    PyArrayObject *ids = (PyArrayObject *)PyArray_FROM_OTF(
        object, NPY_INT64, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    if (ids != NULL && PyArray_ISUNSIGNED((PyArrayObject *)object)) {
        /* What wrapped around might be the id that is ignored. */
        const size_t n = (size_t)PyArray_SIZE(ids);
        if (nf_first_outside(PyArray_DATA(ids), n, INT64_MAX, 0) < n) {
            PyErr_Format(PyExc_ValueError, "%s: %s must be below 2^63 - 1", op, name);
            Py_CLEAR(ids);
        }
    }
    return ids;
}

/* -1 with ValueError that names the first id outside 0 .. limit-1 (`except` may stand). */
static int
check_ids(PyArrayObject *ids, npy_intp limit, int64_t except, const char *op,
          const char *name)
{
    const int64_t *data = PyArray_DATA(ids);
    const size_t n = (size_t)PyArray_SIZE(ids);
    const size_t bad = nf_first_outside(data, n, limit, except);
    if (bad == n) {
        return 0;
    }
    PyErr_Format(
        PyExc_ValueError,
        "%s: %s must be within 0 .. %zd, got %lld at position %zd (counted through "
        "the flattened array)",
        op, name, (Py_ssize_t)limit - 1, (long long)data[bad], (Py_ssize_t)bad);
    return -1;
}

/* Logits (..., n) and what goes with each of their rows. */
typedef struct {
    row_view logits;
    PyArrayObject *targets;
} loss_rows;

static int
loss_rows_of(PyObject *logits, PyObject *targets, const char *op, loss_rows *r)
{
    PyArrayObject *given = needed(logits, NPY_NOTYPE, op, "logits");
    if (given == NULL) {
        return -1;
    }
    r->logits = rows_of(given, op, "logits");
    if (r->logits.array == NULL) {
        return -1;
    }
    if (targets == NULL) {
        return 0;
    }
    r->targets = integers_of(targets, op, "targets");
    return r->targets == NULL ? -1
                              : nf_check_shape(r->targets, PyArray_NDIM(given) - 1,
                                               PyArray_DIMS(given), op, "targets");
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

/* Exponentials of a row. */
static double
loss_cost(npy_intp n)
{
    return 2 * (double)n + 100;
}

/* (logits, targets, ignore_index, smoothing, z_loss, scale, sign, reduction)
   -> (loss, lse, targets as int64, count): loss () or the shape of targets */
static PyObject *
cross_entropy(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "cross_entropy";
    loss_rows r = {0};
    PyArrayObject *loss = NULL, *lse = NULL, *sum = NULL;
    PyObject *result = NULL;
    if (nf_check_count(op, count, 8) < 0 || loss_rows_of(args[0], args[1], op, &r) < 0) {
        goto fail;
    }
    const int64_t ignore = PyLong_AsLongLong(args[2]);
    const double smoothing = number(args[3]), z_loss = number(args[4]);
    const double scale = number(args[5]), sign = number(args[6]);
    const long reduction = PyLong_AsLong(args[7]);
    if (PyErr_Occurred() || check_ids(r.targets, r.logits.n, ignore, op, "targets") < 0) {
        goto fail;
    }
    const int type = PyArray_TYPE(r.logits.array);
    loss = nf_new(PyArray_NDIM(r.targets), PyArray_DIMS(r.targets), type);
    lse = nf_new(1, &r.logits.rows, type);
    if (loss == NULL || lse == NULL) {
        goto fail;
    }
    const nf_cross_entropy a = {.logits = r.logits.data,
                                .targets = PyArray_DATA(r.targets),
                                .loss = PyArray_DATA(loss),
                                .lse = PyArray_DATA(lse),
                                .logits_step = r.logits.step,
                                .ignore_index = ignore,
                                .scale = scale,
                                .smoothing = smoothing,
                                .z_loss = z_loss,
                                .sign = sign,
                                .n = (size_t)r.logits.n};
    if (run(PICK(cross_entropy, type), &a, r.logits.rows, loss_cost(r.logits.n), op) < 0) {
        goto fail;
    }
    const size_t rows = (size_t)r.logits.rows;
    size_t counted = rows;
    if (reduction != NONE) {
        counted = nf_count_other(a.targets, rows, ignore);
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

/* A gradient for each row, or one for all (0-d): a new reference and its step. */
static PyArrayObject *
row_gradient(PyObject *object, PyArrayObject *logits, int single, const char *op,
             ptrdiff_t *step)
{
    PyArrayObject *dy = needed(object, PyArray_TYPE(logits), op, "dy");
    if (dy == NULL
        || nf_check_shape(dy, single ? 0 : PyArray_NDIM(logits) - 1, PyArray_DIMS(logits),
                          op, "dy")
               < 0) {
        return NULL;
    }
    *step = !single;
    return nf_contiguous(dy);
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
    PyArrayObject *lse = needed(args[3], type, op, "lse");
    if (lse == NULL || nf_check_shape(lse, 1, &r.logits.rows, op, "lse") < 0) {
        goto fail;
    }
    if (!PyArray_IS_C_CONTIGUOUS(lse)) {
        PyErr_Format(PyExc_ValueError, "%s: lse must be as the forward gave it", op);
        goto fail;
    }
    const int64_t ignore = PyLong_AsLongLong(args[4]);
    const double smoothing = number(args[5]), z_loss = number(args[6]);
    const double scale = number(args[7]), sign = number(args[8]),
                 dy_scale = number(args[9]);
    const int single = PyObject_IsTrue(args[10]);
    if (PyErr_Occurred() || check_ids(r.targets, r.logits.n, ignore, op, "targets") < 0) {
        goto fail;
    }
    ptrdiff_t dy_step = 0;
    dy = row_gradient(args[0], r.logits.array, single, op, &dy_step);
    if (dy == NULL) {
        goto fail;
    }
    dlogits = nf_new_like(r.logits.array);
    if (dlogits == NULL) {
        goto fail;
    }
    const nf_cross_entropy a = {.logits = r.logits.data,
                                .targets = PyArray_DATA(r.targets),
                                .lse = PyArray_DATA(lse),
                                .dy = PyArray_DATA(dy),
                                .dlogits = PyArray_DATA(dlogits),
                                .dy_scale = dy_scale,
                                .logits_step = r.logits.step,
                                .dy_step = dy_step,
                                .ignore_index = ignore,
                                .scale = scale,
                                .smoothing = smoothing,
                                .z_loss = z_loss,
                                .sign = sign,
                                .n = (size_t)r.logits.n};
    if (run(PICK(cross_entropy_backward, type), &a, r.logits.rows, loss_cost(r.logits.n),
            op)
        < 0) {
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
    lse = nf_new(1, &r.logits.rows, type);
    if (entropy == NULL || lse == NULL) {
        goto fail;
    }
    const nf_entropy a = {.logits = r.logits.data,
                          .entropy = PyArray_DATA(entropy),
                          .lse = PyArray_DATA(lse),
                          .logits_step = r.logits.step,
                          .scale = scale,
                          .n = (size_t)r.logits.n};
    if (run(PICK(softmax_entropy, type), &a, r.logits.rows, loss_cost(r.logits.n), op)
        < 0) {
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
    ptrdiff_t dy_step = 0, entropy_step = 0;
    PyArrayObject *lse = needed(args[3], type, op, "lse");
    const double scale = number(args[4]);
    if (lse == NULL || PyErr_Occurred()
        || nf_check_shape(lse, 1, &r.logits.rows, op, "lse") < 0) {
        goto fail;
    }
    if (!PyArray_IS_C_CONTIGUOUS(lse)) {
        PyErr_Format(PyExc_ValueError, "%s: lse must be as the forward gave it", op);
        goto fail;
    }
    dy = row_gradient(args[0], r.logits.array, 0, op, &dy_step);
    entropy =
        dy == NULL ? NULL : row_gradient(args[2], r.logits.array, 0, op, &entropy_step);
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
                          .dy_step = dy_step,
                          .scale = scale,
                          .n = (size_t)r.logits.n};
    if (run(PICK(softmax_entropy_backward, type), &a, r.logits.rows, loss_cost(r.logits.n),
            op)
        < 0) {
        Py_CLEAR(dlogits);
    }
fail:
    loss_rows_free(&r);
    Py_XDECREF(dy);
    Py_XDECREF(entropy);
    return (PyObject *)dlogits;
}

/* ---- embedding ---- */

/* (ids, weight) -> weight[ids] */
static PyObject *
embedding(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "embedding";
    PyArrayObject *ids = NULL, *out = NULL;
    row_view table = {0};
    if (nf_check_count(op, count, 2) < 0) {
        return NULL;
    }
    ids = integers_of(args[0], op, "ids");
    PyArrayObject *weight =
        ids == NULL ? NULL : nf_array(args[1], NPY_NOTYPE, 2, op, "weight");
    if (weight == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "%s: weight must be an array, got None", op);
        }
        goto fail;
    }
    table = rows_of(weight, op, "weight");
    const int ndim = PyArray_NDIM(ids);
    npy_intp shape[NPY_MAXDIMS];
    if (table.array == NULL || check_ids(ids, table.rows, 0, op, "ids") < 0) {
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
    if (run(PICK(embedding, PyArray_TYPE(weight)), &a, PyArray_SIZE(ids),
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
    row_view dy = {0};
    if (nf_check_count(op, count, 3) < 0) {
        return NULL;
    }
    const Py_ssize_t rows = PyLong_AsSsize_t(args[2]);
    if (rows == -1 && PyErr_Occurred()) {
        return NULL;
    }
    PyArrayObject *given = needed(args[0], NPY_NOTYPE, op, "dy");
    ids = given == NULL ? NULL : integers_of(args[1], op, "ids");
    if (ids == NULL) {
        goto fail;
    }
    if (PyArray_NDIM(given) != PyArray_NDIM(ids) + 1
        || !PyArray_CompareLists(PyArray_DIMS(given), PyArray_DIMS(ids),
                                 PyArray_NDIM(ids))) {
        PyErr_Format(PyExc_ValueError,
                     "%s: dy must have the shape of ids and one axis more", op);
        goto fail;
    }
    dy = rows_of(given, op, "dy");
    if (dy.array == NULL || check_ids(ids, rows, 0, op, "ids") < 0) {
        goto fail;
    }
    const npy_intp shape[2] = {rows, dy.n};
    dweight = nf_new(2, shape, PyArray_TYPE(given));
    if (dweight == NULL) {
        goto fail;
    }
    nf_embedding_backward a = {NULL,    NULL,        dy.data, PyArray_DATA(dweight),
                               dy.step, (size_t)dy.n};
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_embedding_sums(PICK(embedding_backward, PyArray_TYPE(given)), &a,
                               PyArray_DATA(ids), (size_t)dy.rows, (size_t)rows);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, op) < 0) {
        Py_CLEAR(dweight);
    }
fail:
    Py_XDECREF(ids);
    Py_XDECREF(dy.array);
    return (PyObject *)dweight;
}

/* ---- rotary ---- */

/* The steps of cos or sin along the three leading axes of x, 0 where it is broadcast; -1 with
   ValueError where it cannot be. */
static int
angle_steps(PyArrayObject *angles, PyArrayObject *x, npy_intp half, const char *name,
            ptrdiff_t steps[3])
{
    const int lead = PyArray_NDIM(angles) - 1, x_lead = PyArray_NDIM(x) - 1;
    const npy_intp item = PyArray_ITEMSIZE(angles);
    int fits = lead >= 1 && lead <= x_lead && PyArray_DIM(angles, lead) == half;
    steps[0] = steps[1] = steps[2] = 0;
    for (int i = 0; fits && i < lead; i++) {
        const npy_intp length = PyArray_DIM(angles, i);
        fits = length == 1 || length == PyArray_DIM(x, x_lead - lead + i);
        if (length != 1) {
            steps[3 - lead + i] = PyArray_STRIDE(angles, i) / item;
        }
    }
    if (!fits) {
        PyErr_Format(PyExc_ValueError,
                     "rotary_embedding: %s must have shape (S, %zd), one row for each "
                     "position of x, or broadcast so against (B, H, S)",
                     name, (Py_ssize_t)half);
        return -1;
    }
    return 0;
}

/* An array whose last axis is contiguous and whose strides are whole elements. */
static PyArrayObject *
stepped(PyArrayObject *array)
{
    for (int i = 0; i < PyArray_NDIM(array); i++) {
        if (PyArray_STRIDE(array, i) % PyArray_ITEMSIZE(array) != 0) {
            return nf_contiguous(array);
        }
    }
    return nf_rows_contiguous(array);
}

/* (x, cos, sin, rotary, interleaved, inverse, out or None) -> out; cos and sin have rotary/2
   columns; out may be x, whatever its strides */
static PyObject *
rotary(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char op[] = "rotary_embedding";
    PyArrayObject *x = NULL, *cosine = NULL, *sine = NULL, *out = NULL;
    if (nf_check_count(op, count, 7) < 0) {
        return NULL;
    }
    PyArrayObject *given = needed(args[0], NPY_NOTYPE, op, "x");
    if (given == NULL) {
        return NULL;
    }
    const int type = PyArray_TYPE(given), ndim = PyArray_NDIM(given);
    const Py_ssize_t turned = PyLong_AsSsize_t(args[3]);
    const int interleaved = PyObject_IsTrue(args[4]), inverse = PyObject_IsTrue(args[5]);
    PyArrayObject *c = needed(args[1], type, op, "cos");
    PyArrayObject *s = c == NULL ? NULL : needed(args[2], type, op, "sin");
    if (s == NULL || PyErr_Occurred()) {
        return NULL;
    }
    if (ndim < 2 || ndim > 4) {
        PyErr_Format(PyExc_ValueError,
                     "%s: x must have shape (B, H, S, D), (H, S, D) or (S, D), got %d "
                     "dimensions",
                     op, ndim);
        return NULL;
    }
    const npy_intp dim = PyArray_DIM(given, ndim - 1);
    if (turned < 0 || turned > dim || turned % 2 != 0) {
        PyErr_Format(PyExc_ValueError,
                     "%s: rotary_dim must be even and at most %zd, got %zd", op,
                     (Py_ssize_t)dim, turned);
        return NULL;
    }
    nf_rotary a = {.dim = (size_t)dim,
                   .rotary = (size_t)turned,
                   .interleaved = interleaved,
                   .inverse = inverse,
                   .shape = {1, 1, 1}};
    cosine = stepped(c);
    sine = stepped(s);
    x = stepped(given);
    if (cosine == NULL || sine == NULL || x == NULL
        || angle_steps(cosine, x, turned / 2, "cos", a.cos_step) < 0
        || angle_steps(sine, x, turned / 2, "sin", a.sin_step) < 0) {
        goto fail;
    }
    for (int i = 0; i < ndim - 1; i++) {
        a.shape[4 - ndim + i] = (size_t)PyArray_DIM(x, i);
        a.x_step[4 - ndim + i] = PyArray_STRIDE(x, i) / PyArray_ITEMSIZE(x);
    }
    if (args[6] == args[0] && x == given && PyArray_ISWRITEABLE(given)) {
        out = given;
        Py_INCREF(out);
    }
    else if (nf_given(args[6])) {
        out = nf_array(args[6], type, -1, op, "out");
        Py_XINCREF(out);
        if (out == NULL || nf_check_out(out, ndim, PyArray_DIMS(x), type, given, op) < 0
            || nf_check_out(out, ndim, PyArray_DIMS(x), type, c, op) < 0
            || nf_check_out(out, ndim, PyArray_DIMS(x), type, s, op) < 0) {
            Py_CLEAR(out);
        }
    }
    else {
        out = nf_new(ndim, PyArray_DIMS(x), type);
    }
    if (out == NULL) {
        goto fail;
    }
    for (int i = 0; i < ndim - 1; i++) {
        a.out_step[4 - ndim + i] = PyArray_STRIDE(out, i) / PyArray_ITEMSIZE(out);
    }
    a.x = PyArray_DATA(x);
    a.cos = PyArray_DATA(cosine);
    a.sin = PyArray_DATA(sine);
    a.out = PyArray_DATA(out);
    const npy_intp rows = PyArray_MultiplyList(PyArray_DIMS(x), ndim - 1);
    if (run(PICK(rotary, type), &a, rows, (double)dim + 20, op) < 0) {
        Py_CLEAR(out);
    }
fail:
    Py_XDECREF(x);
    Py_XDECREF(cosine);
    Py_XDECREF(sine);
    return (PyObject *)out;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(layer_norm),      METHOD(layer_norm_backward),
    METHOD(rms_norm),        METHOD(rms_norm_backward),
    METHOD(softmax),         METHOD(softmax_backward),
    METHOD(log_softmax),     METHOD(log_softmax_backward),
    METHOD(cross_entropy),   METHOD(cross_entropy_backward),
    METHOD(softmax_entropy), METHOD(softmax_entropy_backward),
    METHOD(embedding),       METHOD(embedding_backward),
    METHOD(rotary),          {NULL, NULL, 0, NULL},
};

int
nf_add_rowwise(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
