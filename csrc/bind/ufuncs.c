/* Every elementwise kernel as a NumPy ufunc: broadcasting, casting, out=, where=, strides and
   overlapping arrays are NumPy's work, not ours. */
#include <fenv.h>
#include <string.h>

#include "bind/families.h"
#include "ops/elementwise.h"

/* What NumPy hands back to a loop. The kernel is named by its place in the table, which may be
   filled again. */
typedef struct {
    nf_elementwise_kernel **kernel;
    int inputs;
    size_t itemsize;
} loop_data;

/* Strided operands pass through this many elements of contiguous memory at a time. */
enum { BLOCK = 512 };

static void
copy_strided(char *to, npy_intp to_step, const char *from, npy_intp from_step,
             size_t itemsize, npy_intp n)
{
    for (npy_intp i = 0; i < n; i++) {
        memcpy(to + i * to_step, from + i * from_step, itemsize);
    }
}

static void
strided_loop(const loop_data *d, char **args, npy_intp n, const npy_intp *steps)
{
    double buffer[NF_MAX_INPUTS + 1][BLOCK];
    const npy_intp item = (npy_intp)d->itemsize;
    for (npy_intp begin = 0; begin < n; begin += BLOCK) {
        const npy_intp count = n - begin < BLOCK ? n - begin : BLOCK;
        const void *in[NF_MAX_INPUTS];
        for (int k = 0; k < d->inputs; k++) {
            copy_strided((char *)buffer[k], item, args[k] + begin * steps[k], steps[k],
                         d->itemsize, count);
            in[k] = buffer[k];
        }
        char *out = (char *)buffer[NF_MAX_INPUTS];
        (*d->kernel)(in, out, (size_t)count);
        copy_strided(args[d->inputs] + begin * steps[d->inputs], steps[d->inputs], out,
                     item, d->itemsize, count);
    }
}

/* NumPy holds no GIL here and has already dealt with overlap. */
static void
loop(char **args, const npy_intp *dimensions, const npy_intp *steps, void *data)
{
    const loop_data *d = data;
    int contiguous = 1;
    for (int k = 0; k <= d->inputs; k++) {
        contiguous &= steps[k] == (npy_intp)d->itemsize;
    }
    if (contiguous) {
        /* No scratch memory is asked for, so this cannot fail. */
        (void)nf_elementwise(*d->kernel, d->inputs, d->itemsize, (const void *const *)args,
                             args[d->inputs], (size_t)dimensions[0]);
    }
    else {
        strided_loop(d, args, dimensions[0], steps);
    }
    /* Lanes whose result is not taken raise flags too, and other threads' flags are not seen
       here: NumPy would warn by chance. */
    feclearexcept(FE_ALL_EXCEPT);
}

typedef struct {
    const char *name;
    int inputs;
    loop_data data[2];
    void *data_pointers[2];
} ufunc_spec;

#define NF_SPEC(name, type, inputs)                                                        \
    {#name,                                                                                \
     inputs,                                                                               \
     {{&nf_kernels.name##_f32, inputs, 4}, {&nf_kernels.name##_f64, inputs, 8}},           \
     {NULL, NULL}},
static ufunc_spec specs[] = {NF_UFUNCS(NF_SPEC)};

int
nf_add_ufuncs(PyObject *module)
{
    static PyUFuncGenericFunction loops[2] = {loop, loop};
    /* Two signatures of up to NF_MAX_INPUTS + 1 operands, all of one type. */
    static char types[NF_MAX_INPUTS + 1][2 * (NF_MAX_INPUTS + 1)];
    for (size_t operands = 2; operands <= NF_MAX_INPUTS + 1; operands++) {
        memset(types[operands - 1], NPY_FLOAT, operands);
        memset(types[operands - 1] + operands, NPY_DOUBLE, operands);
    }
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        ufunc_spec *s = &specs[i];
        s->data_pointers[0] = &s->data[0];
        s->data_pointers[1] = &s->data[1];
        PyObject *ufunc =
            PyUFunc_FromFuncAndData(loops, s->data_pointers, types[s->inputs], 2, s->inputs,
                                    1, PyUFunc_None, s->name, NULL, 0);
        if (ufunc == NULL || PyModule_AddObjectRef(module, s->name, ufunc) < 0) {
            Py_XDECREF(ufunc);
            return -1;
        }
        Py_DECREF(ufunc);
    }
    return 0;
}
