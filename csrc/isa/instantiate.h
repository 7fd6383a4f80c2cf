/* Compiles the templates of one family of kernels for NF_ISA, once for each element type, and
   exports nf_fill_<family>_<isa>, which enters them in the table.

   The build compiles each isa_<isa>.c once per family, with NF_FAMILY, its name, and
   NF_TEMPLATES, its file, defined: a change to one family costs one family's time, and
   families compile side by side. No include guard:
   included once by each isa_<isa>.c. */
#include "isa/vec.h"
#include "kernels/kernels.h"

#define T         float
#define I         int32_t
#define vT        vf32
#define vI        vi32
#define vU        vu32
#define NF_TYPE   f32
#define NF_SINGLE 1
#define NF_LANES  (NF_BYTES / 4)
#if NF_BYTES == 64
#define NF_IOTA ((vI){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#elif NF_BYTES == 32
#define NF_IOTA ((vI){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define NF_IOTA ((vI){0, 1, 2, 3})
#endif
#include NF_TEMPLATES
#undef T
#undef I
#undef vT
#undef vI
#undef vU
#undef NF_TYPE
#undef NF_SINGLE
#undef NF_LANES
#undef NF_IOTA

#define T         double
#define I         int64_t
#define vT        vf64
#define vI        vi64
#define vU        vu64
#define NF_TYPE   f64
#define NF_SINGLE 0
#define NF_LANES  (NF_BYTES / 8)
#if NF_BYTES == 64
#define NF_IOTA ((vI){0, 1, 2, 3, 4, 5, 6, 7})
#elif NF_BYTES == 32
#define NF_IOTA ((vI){0, 1, 2, 3})
#else
#define NF_IOTA ((vI){0, 1})
#endif
#include NF_TEMPLATES
#undef T
#undef I
#undef vT
#undef vI
#undef vU
#undef NF_TYPE
#undef NF_SINGLE
#undef NF_LANES
#undef NF_IOTA

#define NF_FILL(name, ...)                                                                 \
    table->name##_f32 = &NF_CAT3(name, f32, NF_ISA);                                       \
    table->name##_f64 = &NF_CAT3(name, f64, NF_ISA);
#define NF_FILL_PLAIN(name, ...) table->name = &NF_CAT2(name, NF_ISA);

void NF_CAT3(nf_fill, NF_FAMILY, NF_ISA)(nf_kernel_table *table);

void
NF_CAT3(nf_fill, NF_FAMILY, NF_ISA)(nf_kernel_table *table)
{
    (void)table;
    NF_CAT2(NF_KERNELS, NF_FAMILY)(NF_FILL)
        NF_CAT2(NF_PLAIN_KERNELS, NF_FAMILY)(NF_FILL_PLAIN)
}
