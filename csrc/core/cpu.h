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

/* Whether a prefetch is dropped that finds all buffers for lines on the way taken, as AMD's
   processors do, where Intel's let it wait. Then what a kernel that waits for memory asks for early it
   asks for again, nearer to its use, and into L2 only, which has more buffers. One that waits for
   its products asks into L1: what came into L2 alone is soon driven out there. */
extern int nf_drops_prefetches;

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
