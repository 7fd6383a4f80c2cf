/* numformer._core: fills the kernel table and registers what bind/ offers. */
#define NF_IMPORTS_NUMPY
#include "bind/numpy.h"

#include <stdlib.h>

#include "bind/families.h"
#include "core/table.h"
#include "core/threads.h"

static PyObject *
set_num_threads(PyObject *module, PyObject *args, PyObject *keywords)
{
    (void)module;
    static char *names[] = {"n", NULL};
    PyObject *n;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:set_num_threads", names, &n)) {
        return NULL;
    }
    if (!PyIndex_Check(n)) {
        return PyErr_Format(PyExc_TypeError,
                            "set_num_threads: n must be an integer, got %R", n);
    }
    int beyond = 0;
    const long threads = PyLong_AsLongAndOverflow(n, &beyond);
    if (threads == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (beyond || threads < 1 || threads > 4096) {
        return PyErr_Format(PyExc_ValueError,
                            "set_num_threads: expected 1 to 4096 threads, got %R", n);
    }
    nf_set_num_threads((int)threads);
    Py_RETURN_NONE;
}

static PyObject *
get_num_threads(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(nf_get_num_threads());
}

/* The level called `name`, at most what the processor has; -1 with ValueError. */
static int
level_of(const char *name, const char *who)
{
    const nf_isa isa = nf_isa_of_name(name), best = nf_cpu_isa();
    if (isa == NF_ISA_COUNT) {
        PyErr_Format(PyExc_ValueError,
                     "%s must be one of baseline, avx2, avx512, avx512vnni, got \"%s\"",
                     who, name);
        return -1;
    }
    return isa < best ? (int)isa : (int)best;
}

static PyObject *
get_isa(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyUnicode_FromString(nf_isa_names[nf_table_isa()]);
}

static PyObject *
cap_isa(PyObject *module, PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8(arg);
    const int isa = name == NULL ? -1 : level_of(name, "cap_isa: the level");
    if (isa < 0) {
        return NULL;
    }
    nf_table_fill((nf_isa)isa);
    return get_isa(module, NULL);
}

static int
exec_module(PyObject *module)
{
    import_array1(-1);
    import_umath1(-1);
    const char *wanted = getenv("NUMFORMER_ISA");
    int isa = (int)nf_cpu_isa();
    if (wanted != NULL && *wanted != '\0') {
        isa = level_of(wanted, "NUMFORMER_ISA");
    }
    if (isa < 0) {
        return -1;
    }
    nf_table_fill((nf_isa)isa);
    if (PyModule_AddStringConstant(module, "cpu_isa", nf_isa_names[nf_cpu_isa()]) < 0) {
        return -1;
    }
    int (*const add[])(PyObject *) = {
        nf_add_memory, nf_add_ufuncs,  nf_add_gated,         nf_add_bias_gelu,
        nf_add_norm,   nf_add_softmax, nf_add_cross_entropy, nf_add_embedding,
        nf_add_rotary, nf_add_gemm,    nf_add_grouped,       nf_add_attention,
        nf_add_quant,  nf_add_moe,     nf_add_moe_route,     nf_add_optimizer,
        nf_add_random, nf_add_roof,
    };
    for (size_t i = 0; i < sizeof add / sizeof *add; i++) {
        if (add[i](module) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyMethodDef methods[] = {
    {"set_num_threads", (PyCFunction)(void (*)(void))set_num_threads,
     METH_VARARGS | METH_KEYWORDS,
     "set_num_threads(n)\n--\n\nUse n threads in every kernel from now on."},
    {"get_num_threads", get_num_threads, METH_NOARGS,
     "get_num_threads()\n--\n\nThreads that kernels use."},
    {"get_isa", get_isa, METH_NOARGS,
     "get_isa()\n--\n\nThe instruction set whose kernels are in use."},
    {"cap_isa", cap_isa, METH_O,
     "cap_isa(name)\n--\n\nUse kernels of this instruction set and below; return the one "
     "in "
     "use. For tests: no kernel\nmay be running, and memory packed before must not be used "
     "after."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "numformer._core",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
