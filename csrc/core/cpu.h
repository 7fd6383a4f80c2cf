/* Which instruction sets this processor and operating system have, and what it does with prefetches
   and denormal numbers. */
#ifndef NF_CPU_H
#define NF_CPU_H

typedef enum { NF_BASELINE, NF_AVX2, NF_AVX512, NF_AVX512VNNI, NF_ISA_COUNT } nf_isa;

extern const char *const nf_isa_names[NF_ISA_COUNT];

/* The strongest one that is present. */
nf_isa nf_cpu_isa(void);

/* The one called `name`, or NF_ISA_COUNT where there is none of that name. */
nf_isa nf_isa_of_name(const char *name);

/* What becomes of a prefetch, an ask, that finds all buffers for lines on the way taken. It waits in
   Intel's processors. AMD's drop it: then what a kernel that waits for memory asks for early it asks
   for again, nearer to its use, and into L2 only, which has more buffers. From Zen 5 on, which
   foresees by itself what is read in one order, one ask into L1 does more there. A kernel that waits
   for its products asks into L1 wherever asks are dropped: what came into L2 alone is soon driven
   out there. */
typedef enum { NF_WAITS, NF_DROPS, NF_FORESEES } nf_ask_kind;

extern nf_ask_kind nf_asks;

/* From here on to nf_denormals_as_before, which takes what this returns, results of this thread
   that would be denormal are 0: on many processors each costs some 150 cycles. Elsewhere than on
   x86 nothing changes. */
static inline unsigned
nf_denormals_to_zero(void)
{
#ifdef __SSE__
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8000);
    return before;
#else
    return 0;
#endif
}

static inline void
nf_denormals_as_before(unsigned before)
{
#ifdef __SSE__
    __builtin_ia32_ldmxcsr(before);
#else
    (void)before;
#endif
}

#endif
