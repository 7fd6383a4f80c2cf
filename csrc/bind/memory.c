/* NumPy's memory handler (NEP 49) over the pool: a result of our ops is allocated here, and
   goes back here whoever frees it. */
#include "bind/arguments.h"
#include "bind/families.h"

#include "core/pool.h"

static void *
handler_malloc(void *context, size_t bytes)
{
    (void)context;
    return nf_pool_allocate(bytes);
}

static void *
handler_calloc(void *context, size_t count, size_t size)
{
    (void)context;
    if (size != 0 && count > SIZE_MAX / size) {
        return NULL;
    }
    return nf_pool_allocate_zeroed(count * size);
}

static void *
handler_realloc(void *context, void *block, size_t bytes)
{
    (void)context;
    return nf_pool_reallocate(block, bytes);
}

static void
handler_free(void *context, void *block, size_t bytes)
{
    (void)context, (void)bytes;
    nf_pool_free(block);
}

static PyDataMem_Handler handler = {
    .name = "numformer_pool",
    .version = 1,
    .allocator = {NULL, handler_malloc, handler_calloc, handler_realloc, handler_free},
};

/* Of the handler. Arrays hold references to it after the module is gone: never released. */
static PyObject *capsule;

PyObject *
nf_pool_enter(void)
{
    return PyDataMem_SetHandler(capsule);
}

void
nf_pool_leave(PyObject *before)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *ours = PyDataMem_SetHandler(before);
    if (ours == NULL) {
        PyErr_WriteUnraisable(NULL);
    }
    Py_XDECREF(ours);
    Py_DECREF(before);
    PyErr_Restore(type, value, traceback);
}

static PyObject *
pooled(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    (void)module;
    if (count < 1) {
        PyErr_SetString(PyExc_TypeError, "pooled: expected a callable");
        return NULL;
    }
    PyObject *before = nf_pool_enter();
    if (before == NULL) {
        return NULL;
    }
    PyObject *result = PyObject_Vectorcall(args[0], args + 1, (size_t)(count - 1), names);
    nf_pool_leave(before);
    return result;
}

static PyObject *
memory_stats(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const nf_pool_stats s = nf_pool_get_stats();
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n}", "in_use", (Py_ssize_t)s.in_use,
                         "in_use_peak", (Py_ssize_t)s.in_use_peak, "kept",
                         (Py_ssize_t)s.kept, "kept_limit", (Py_ssize_t)s.kept_limit,
                         "reused", (Py_ssize_t)s.reused, "fresh", (Py_ssize_t)s.fresh);
}

static PyObject *
empty_cache(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    nf_pool_empty();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"pooled", (PyCFunction)(void (*)(void))pooled, METH_FASTCALL | METH_KEYWORDS,
     "pooled(function, /, *args, **kwargs)\n--\n\n"
     "Call function; arrays that it makes come from the pool."},
    {"memory_stats", memory_stats, METH_NOARGS,
     "memory_stats()\n--\n\n"
     "Bytes and counts of the memory pool, as a dict: in_use, in_use_peak, kept (freed, "
     "waiting to be\nused again), kept_limit, reused and fresh (how often a kept block "
     "served, and how often the\nsystem)."},
    {"empty_cache", empty_cache, METH_NOARGS,
     "empty_cache()\n--\n\nGive the pool's kept blocks back to the system."},
    {NULL, NULL, 0, NULL},
};

int
nf_add_memory(PyObject *module)
{
    if (capsule == NULL) {
        capsule = PyCapsule_New(&handler, "mem_handler", NULL);
        if (capsule == NULL) {
            return -1;
        }
    }
    return PyModule_AddFunctions(module, methods);
}
