/* Which instruction sets this processor and operating system have. */
#ifndef NF_CPU_H
#define NF_CPU_H

typedef enum { NF_BASELINE, NF_AVX2, NF_AVX512, NF_AVX512VNNI, NF_ISA_COUNT } nf_isa;

extern const char *const nf_isa_names[NF_ISA_COUNT];

/* The strongest one that is present. */
nf_isa nf_cpu_isa(void);

/* The one called `name`, or NF_ISA_COUNT where there is none of that name. */
nf_isa nf_isa_of_name(const char *name);

#endif
