/* The AVX-512 intrinsics of vec_avx512.h on a processor that has only AVX2, for tests
   (NUMFORMER_EMULATE=1 in setup.py). The bodies are those of SIMDe, a library of headers, but
   for what it lacks (masked loads and stores: here a mask is that of the first lanes) or
   rounds otherwise than the processor does (fused multiply-add, scaling by 2^n). */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define NF_OPAQUE(v) __asm__("" : "+m"(v))

#undef _mm512_madd_epi16
#undef _mm512_fmadd_ps
#undef _mm512_fmadd_pd
#undef _mm512_fmsub_ps
#undef _mm512_fmsub_pd
#undef _mm512_scalef_ps
#undef _mm512_scalef_pd
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi8(v)  ((__m128i) __builtin_convertvector((vi32)(v), nf_bytes))
#define _mm512_cvtepi32_epi16(v) ((__m256i) __builtin_convertvector((vi32)(v), nf_shorts))
#define _mm512_cvtph_ps(a)       nf_emulate_half(a)
#define _mm512_cvtps_ph(a, rounding) nf_emulate_to_half(a)
#define _mm512_cvtepu16_epi32(a)                                                           \
    ((__m512i) __builtin_convertvector((nf_unsigned_shorts)(a), vi32))
#define _mm512_cvtepi8_epi32(a) ((__m512i) __builtin_convertvector((nf_bytes)(a), vi32))
#define _mm512_cvtepi32_ps(a)   ((__m512) __builtin_convertvector((vi32)(a), vf32))
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b) /* misspelt there */
#define _mm512_mask_expand_ps(v, mask, a) ((__m512)nf_emulate_expand(v, mask, (vi32)(a)))
#define _mm512_fmadd_ps(a, b, c)          nf_emulate_fma_f32(a, b, c)
#define _mm512_fmadd_pd(a, b, c)          nf_emulate_fma_f64(a, b, c)
#define _mm512_fmsub_ps(a, b, c)          nf_emulate_fma_f32(a, b, -(c))
#define _mm512_fmsub_pd(a, b, c)          nf_emulate_fma_f64(a, b, -(c))
#define _mm512_scalef_ps(v, n)            nf_emulate_scale_f32(v, n)
#define _mm512_scalef_pd(v, n)            nf_emulate_scale_f64(v, n)
#define _mm512_maskz_loadu_ps(mask, p)    ((__m512)nf_emulate_load(p, 4, mask))
#define _mm512_maskz_loadu_pd(mask, p)    ((__m512d)nf_emulate_load(p, 8, mask))
#define _mm512_mask_storeu_ps(p, mask, v) nf_emulate_store(p, 4, mask, (vi32)(v))
#define _mm512_mask_storeu_pd(p, mask, v) nf_emulate_store(p, 8, mask, (vi32)(v))

typedef int8_t nf_bytes __attribute__((vector_size(16)));
typedef int16_t nf_shorts __attribute__((vector_size(32)));
typedef uint16_t nf_unsigned_shorts __attribute__((vector_size(32)));

NF_INLINE vi32
nf_emulate_expand(__m512 v, unsigned mask, vi32 a)
{
    vi32 r = (vi32)v;
    for (int i = 0, k = 0; i < 16; i++) {
        r[i] = mask >> i & 1 ? a[k++] : r[i];
    }
    return r;
}

NF_INLINE __m512
nf_emulate_half(__m256i a)
{
    union {
        __m256 half[2];
        __m512 whole;
    } v = {{_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
    return v.whole;
}

NF_INLINE __m256i
nf_emulate_to_half(__m512 a)
{
    union {
        __m512 whole;
        __m256 half[2];
    } v = {a};
    return _mm256_set_m128i(_mm256_cvtps_ph(v.half[1], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(v.half[0], _MM_FROUND_TO_NEAREST_INT));
}

NF_INLINE __m512
nf_emulate_fma_f32(__m512 a, __m512 b, __m512 c)
{
    for (int i = 0; i < 16; i++) {
        c[i] = fmaf(a[i], b[i], c[i]);
    }
    return c;
}

NF_INLINE __m512d
nf_emulate_fma_f64(__m512d a, __m512d b, __m512d c)
{
    for (int i = 0; i < 8; i++) {
        c[i] = fma(a[i], b[i], c[i]);
    }
    return c;
}

NF_INLINE __m512
nf_emulate_scale_f32(__m512 v, __m512 n)
{
    for (int i = 0; i < 16; i++) {
        v[i] = ldexpf(v[i], (int)n[i]);
    }
    return v;
}

NF_INLINE __m512d
nf_emulate_scale_f64(__m512d v, __m512d n)
{
    for (int i = 0; i < 8; i++) {
        v[i] = ldexp(v[i], (int)n[i]);
    }
    return v;
}

NF_INLINE vi32
nf_emulate_load(const void *p, size_t size, unsigned mask)
{
    vi32 v = {0};
    memcpy(&v, p, size * (size_t)__builtin_popcount(mask));
    return v;
}

NF_INLINE void
nf_emulate_store(void *p, size_t size, unsigned mask, vi32 v)
{
    memcpy(p, &v, size * (size_t)__builtin_popcount(mask));
}
