#include "core/cpu.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

const char *const nf_isa_names[NF_ISA_COUNT] = {"baseline", "avx2", "avx512", "avx512vnni"};

nf_ask_kind nf_asks;

#if defined(__x86_64__) && !defined(NF_EMULATE)
#define ZEN_5 0x1a

static unsigned
family(void)
{
    unsigned a, b, c, d;
    __cpuid(1, a, b, c, d);
    return (a >> 8 & 0xf) + (a >> 20 & 0xff);
}

__attribute__((constructor)) static void
know_asks(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) {
        nf_asks = family() < ZEN_5 ? NF_DROPS : NF_FORESEES;
    }
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
