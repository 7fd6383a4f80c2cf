#include "core/table.h"

#include "kernels/kernels.h"

nf_kernel_table nf_kernels;

static nf_isa filled;

#define NF_DECLARE(family, isa) void nf_fill_##family##_##isa(nf_kernel_table *table);
#define NF_CALL(family, isa)    nf_fill_##family##_##isa(&nf_kernels);

NF_FAMILIES(NF_DECLARE, baseline)
#ifdef NF_HAVE_AVX2
NF_FAMILIES(NF_DECLARE, avx2)
#endif
#ifdef NF_HAVE_AVX512
NF_FAMILIES(NF_DECLARE, avx512)
#endif
#ifdef NF_HAVE_AVX512VNNI
NF_VNNI_FAMILIES(NF_DECLARE, avx512vnni)
#endif

void
nf_table_fill(nf_isa strongest)
{
    filled = strongest;
    NF_FAMILIES(NF_CALL, baseline)
#ifdef NF_HAVE_AVX2
    if (strongest >= NF_AVX2) {
        NF_FAMILIES(NF_CALL, avx2)
    }
#endif
#ifdef NF_HAVE_AVX512
    if (strongest >= NF_AVX512) {
        NF_FAMILIES(NF_CALL, avx512)
    }
#endif
#ifdef NF_HAVE_AVX512VNNI
    if (strongest >= NF_AVX512VNNI) {
        NF_VNNI_FAMILIES(NF_CALL, avx512vnni)
    }
#endif
}

nf_isa
nf_table_isa(void)
{
    return filled;
}
