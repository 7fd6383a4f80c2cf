#include "core/cpu.h"

#include <string.h>

const char *const nf_isa_names[NF_ISA_COUNT] = {"baseline", "avx2", "avx512", "avx512vnni"};

int nf_drops_prefetches;

#if defined(__x86_64__) && !defined(NF_EMULATE)
__attribute__((constructor)) static void
know_maker(void)
{
    __builtin_cpu_init();
    nf_drops_prefetches = __builtin_cpu_is("amd");
}
#endif

nf_isa
nf_cpu_isa(void)
{
#if defined(NF_EMULATE)
    return NF_AVX512VNNI;
#elif defined(__x86_64__)
    /* The builtins ask the operating system too (XGETBV). */
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                     && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return __builtin_cpu_supports("avx512vnni") ? NF_AVX512VNNI : NF_AVX512;
    }
    if (avx2) {
        return NF_AVX2;
    }
#endif
    return NF_BASELINE;
}

nf_isa
nf_isa_of_name(const char *name)
{
    int isa = 0;
    while (isa < NF_ISA_COUNT && strcmp(name, nf_isa_names[isa]) != 0) {
        isa++;
    }
    return (nf_isa)isa;
}
