#include "bind/arguments.h"
#include "bind/families.h"

static PyMethodDef methods[] = {
    {NULL, NULL, 0, NULL},
};

int
nf_add_quant(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
