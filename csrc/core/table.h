/* The kernel table: filled when the module is loaded. */
#ifndef NF_TABLE_H
#define NF_TABLE_H
#include "core/cpu.h"

/* Fills nf_kernels for `strongest` and below: weakest first, so that a stronger
   instruction set replaces what it has. Tests call it again to go through the levels;
   it must not run beside a kernel. */
void nf_table_fill(nf_isa strongest);

/* The level that the table was last filled for. */
nf_isa nf_table_isa(void);

#endif
