/* AdamW and the global norm over lists of arrays. */
#include "bind/arguments.h"
#include "bind/families.h"

#include "ops/optimizer.h"

typedef struct {
    Py_ssize_t count;
    nf_parameter *parameters;
    PyObject *copies; /* list: gradients that were not contiguous, as they are read */
} parameter_list;

static void
release(parameter_list *list)
{
    PyMem_Free(list->parameters);
    Py_XDECREF(list->copies);
}

static int
make(parameter_list *list, Py_ssize_t count)
{
    list->count = count;
    list->parameters = PyMem_Calloc((size_t)count + 1, sizeof *list->parameters);
    list->copies = PyList_New(0);
    if (list->parameters == NULL) {
        PyErr_NoMemory();
    }
    return list->parameters == NULL || list->copies == NULL ? -1 : 0;
}

/* Enters `gradient` in place i. */
static int
read_gradient(parameter_list *list, Py_ssize_t i, PyObject *gradient, const char *op)
{
    PyArrayObject *array = nf_array(gradient, NPY_NOTYPE, -1, op, "every gradient");
    if (array == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_Format(
                PyExc_TypeError,
                "%s: every gradient must be an array, got None; leave the parameter "
                "out of the lists",
                op);
        }
        return -1;
    }
    PyArrayObject *const whole = nf_contiguous(array);
    if (whole == NULL) {
        return -1;
    }
    nf_parameter *const p = &list->parameters[i];
    p->g = PyArray_DATA(whole);
    p->n = (size_t)PyArray_SIZE(whole);
    p->is_double = PyArray_TYPE(whole) == NPY_DOUBLE;
    const int failed = whole != array ? PyList_Append(list->copies, (PyObject *)whole) : 0;
    Py_DECREF(whole);
    return failed;
}

/* The memory of an array that is changed in place and must look as `like` does. */
static void *
in_place(PyObject *object, PyArrayObject *like, const char *name)
{
    const char *const op = "adamw_step";
    PyArrayObject *array = nf_needed(object, PyArray_TYPE(like), -1, op, name);
    if (array == NULL) {
        return NULL;
    }
    if (nf_check_shape(array, PyArray_NDIM(like), PyArray_DIMS(like), op, name) < 0) {
        return NULL;
    }
    if (!PyArray_ISCARRAY(array)) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: %s must be writeable and C-contiguous, as it is changed in place; "
            "make it numpy.ascontiguousarray once",
            op, name);
        return NULL;
    }
    return PyArray_DATA(array);
}

/* adamw_step(params, grads, m, v, decays, lr, beta1, beta2, eps, count, scale) */
static PyObject *
adamw_step(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    static const char *const names[] = {"params", "grads", "m", "v", "weight_decay"};
    PyObject *lists[5] = {NULL}, *result = NULL;
    parameter_list list = {0};
    if (nf_check_count("adamw_step", count, 11) < 0) {
        return NULL;
    }
    nf_adamw_options o;
    double *const numbers[] = {&o.lr, &o.beta1, &o.beta2, &o.eps, &o.count, &o.scale};
    for (int k = 0; k < 6; k++) {
        *numbers[k] = PyFloat_AsDouble(args[5 + k]);
        if (*numbers[k] == -1 && PyErr_Occurred()) {
            goto fail;
        }
    }
    for (int k = 0; k < 5; k++) {
        lists[k] = PySequence_Fast(args[k], "adamw_step: expected lists of arrays");
        if (lists[k] == NULL) {
            goto fail;
        }
        const Py_ssize_t got = PySequence_Fast_GET_SIZE(lists[k]);
        const Py_ssize_t want = PySequence_Fast_GET_SIZE(lists[0]);
        if (got != want) {
            PyErr_Format(PyExc_ValueError,
                         "adamw_step: %s must have one entry a parameter, %zd, got %zd",
                         names[k], want, got);
            goto fail;
        }
    }
    if (make(&list, PySequence_Fast_GET_SIZE(lists[0])) < 0) {
        goto fail;
    }
    for (Py_ssize_t i = 0; i < list.count; i++) {
        PyObject *const gradient = PySequence_Fast_GET_ITEM(lists[1], i);
        if (read_gradient(&list, i, gradient, "adamw_step") < 0) {
            goto fail;
        }
        nf_parameter *const p = &list.parameters[i];
        PyArrayObject *const like = (PyArrayObject *)gradient;
        p->p = in_place(PySequence_Fast_GET_ITEM(lists[0], i), like, "every parameter");
        p->m =
            p->p ? in_place(PySequence_Fast_GET_ITEM(lists[2], i), like, "every m") : NULL;
        p->v =
            p->m ? in_place(PySequence_Fast_GET_ITEM(lists[3], i), like, "every v") : NULL;
        p->decay = PyFloat_AsDouble(PySequence_Fast_GET_ITEM(lists[4], i));
        if (p->v == NULL || (p->decay == -1 && PyErr_Occurred())) {
            goto fail;
        }
    }
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_adamw_step(list.parameters, (size_t)list.count, &o);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, "adamw_step") == 0) {
        result = Py_NewRef(Py_None);
    }
fail:
    release(&list);
    for (int k = 0; k < 5; k++) {
        Py_XDECREF(lists[k]);
    }
    return result;
}

static PyObject *
global_norm(PyObject *module, PyObject *arg)
{
    (void)module;
    PyObject *result = NULL;
    parameter_list list = {0};
    PyObject *const arrays = PySequence_Fast(arg, "global_norm: expected a list of arrays");
    if (arrays == NULL || make(&list, PySequence_Fast_GET_SIZE(arrays)) < 0) {
        goto fail;
    }
    for (Py_ssize_t i = 0; i < list.count; i++) {
        if (read_gradient(&list, i, PySequence_Fast_GET_ITEM(arrays, i), "global_norm")
            < 0) {
            goto fail;
        }
    }
    double norm = 0;
    nf_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = nf_global_norm(list.parameters, (size_t)list.count, &norm);
    Py_END_ALLOW_THREADS;
    if (nf_check_status(status, "global_norm") == 0) {
        result = PyFloat_FromDouble(norm);
    }
fail:
    release(&list);
    Py_XDECREF(arrays);
    return result;
}

static PyMethodDef methods[] = {
    METHOD(adamw_step, "adamw_step(params, grads, m, v, decays, lr, beta1, beta2, eps, "
                       "count, scale)\n--\n\n"
                       "One step of AdamW over lists of arrays, in place."),
    {"global_norm", global_norm, METH_O,
     "global_norm(arrays)\n--\n\nThe Euclidean norm of all elements of all arrays."},
    {NULL, NULL, 0, NULL},
};

int
nf_add_optimizer(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
