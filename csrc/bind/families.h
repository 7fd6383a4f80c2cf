/* What each file of bind/ adds to the module: -1 with a Python error set on failure. */
#ifndef NF_BIND_FAMILIES_H
#define NF_BIND_FAMILIES_H
#include "bind/numpy.h"

int nf_add_memory(PyObject *module);
int nf_add_ufuncs(PyObject *module);
int nf_add_gated(PyObject *module);
int nf_add_bias_gelu(PyObject *module);
int nf_add_norm(PyObject *module);
int nf_add_softmax(PyObject *module);
int nf_add_cross_entropy(PyObject *module);
int nf_add_embedding(PyObject *module);
int nf_add_rotary(PyObject *module);
int nf_add_gemm(PyObject *module);
int nf_add_grouped(PyObject *module);
int nf_add_attention(PyObject *module);
int nf_add_quant(PyObject *module);
int nf_add_moe(PyObject *module);
int nf_add_moe_route(PyObject *module);
int nf_add_optimizer(PyObject *module);
int nf_add_random(PyObject *module);
int nf_add_roof(PyObject *module);

#endif
