/* AVX-512 (F, BW, DQ, VL) with FMA: 32 registers of 64 bytes. */
#ifdef NF_EMULATE
#include "isa/emulate_avx512.h"
#else
#include <immintrin.h>
#define NF_OPAQUE(v) __asm__("" : "+v"(v))
#endif

/* 28 sums, 2 of B and a broadcast: 16 loads for 28 FMAs. Two steps at once: what counts them is
   one instruction in 50, not in 25, where 4 a cycle are fetched. */
enum { NF_TILE_ROWS = 14, NF_TILE_VECTORS = 2, NF_TILE_STEPS = 2 };
/* A panel of B, 384 x 32 floats, streams from L2 past a strip of A, 384 x 14, in L1; 224 rows of
   A are a third of L2. */
enum { NF_GEMM_DEPTH = 384, NF_GEMM_ROWS = 224 };

#define NF_MASK16(n) ((__mmask16)((1u << (n)) - 1))
#define NF_MASK8(n)  ((__mmask8)((1u << (n)) - 1))

NF_INLINE vf32
nf_loadn_f32(const float *p, size_t n)
{
    return (vf32)_mm512_maskz_loadu_ps(NF_MASK16(n), p);
}

NF_INLINE vf64
nf_loadn_f64(const double *p, size_t n)
{
    return (vf64)_mm512_maskz_loadu_pd(NF_MASK8(n), p);
}

NF_INLINE void
nf_storen_f32(float *p, vf32 v, size_t n)
{
    _mm512_mask_storeu_ps(p, NF_MASK16(n), (__m512)v);
}

NF_INLINE void
nf_storen_f64(double *p, vf64 v, size_t n)
{
    _mm512_mask_storeu_pd(p, NF_MASK8(n), (__m512d)v);
}

NF_INLINE vf32
nf_fma_f32(vf32 a, vf32 b, vf32 c)
{
    return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

NF_INLINE vf64
nf_fma_f64(vf64 a, vf64 b, vf64 c)
{
    return (vf64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

NF_INLINE vf32
nf_fms_f32(vf32 a, vf32 b, vf32 c)
{
    return (vf32)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
}

NF_INLINE vf64
nf_fms_f64(vf64 a, vf64 b, vf64 c)
{
    return (vf64)_mm512_fmsub_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

#ifndef NF_EMULATE
/* The compiler would spread a number once for all products that take it. */
NF_INLINE vf32
nf_add_product_at_f32(vf32 sum, const float *p, vf32 b)
{
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*p));
    return sum;
}

NF_INLINE vf64
nf_add_product_at_f64(vf64 sum, const double *p, vf64 b)
{
    __asm__("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*p));
    return sum;
}
#endif

NF_INLINE vf32
nf_max_f32(vf32 a, vf32 b)
{
    return (vf32)_mm512_max_ps((__m512)b, (__m512)a);
}

NF_INLINE vf64
nf_max_f64(vf64 a, vf64 b)
{
    return (vf64)_mm512_max_pd((__m512d)b, (__m512d)a);
}

NF_INLINE vf32
nf_min_f32(vf32 a, vf32 b)
{
    return (vf32)_mm512_min_ps((__m512)b, (__m512)a);
}

NF_INLINE vf64
nf_min_f64(vf64 a, vf64 b)
{
    return (vf64)_mm512_min_pd((__m512d)b, (__m512d)a);
}

NF_INLINE vf32
nf_add_beyond_f32(vu32 a, vu32 b, vf32 x, vf32 limit)
{
    return (vf32)_mm512_maskz_add_epi32(
        _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_NLE_UQ), (__m512i)a, (__m512i)b);
}

NF_INLINE vf64
nf_add_beyond_f64(vu64 a, vu64 b, vf64 x, vf64 limit)
{
    return (vf64)_mm512_maskz_add_epi64(
        _mm512_cmp_pd_mask((__m512d)x, (__m512d)limit, _CMP_NLE_UQ), (__m512i)a,
        (__m512i)b);
}

NF_INLINE vf32
nf_add_mask_f32(vf32 score, vf32 mask)
{
    const __m512 least = _mm512_set1_ps(-__builtin_inff());
    return (vf32)_mm512_mask_add_ps((__m512)mask,
                                    _mm512_cmp_ps_mask((__m512)mask, least, _CMP_NEQ_UQ),
                                    (__m512)score, (__m512)mask);
}

NF_INLINE vf64
nf_add_mask_f64(vf64 score, vf64 mask)
{
    const __m512d least = _mm512_set1_pd(-__builtin_inf());
    return (vf64)_mm512_mask_add_pd((__m512d)mask,
                                    _mm512_cmp_pd_mask((__m512d)mask, least, _CMP_NEQ_UQ),
                                    (__m512d)score, (__m512d)mask);
}

NF_INLINE int
nf_any_less_f32(vf32 a, vf32 b)
{
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) != 0;
}

NF_INLINE int
nf_any_less_f64(vf64 a, vf64 b)
{
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ) != 0;
}

NF_INLINE int
nf_any_negative(vf32 sign)
{
    return _mm512_movepi32_mask((__m512i)sign) != 0;
}

NF_INLINE vf32
nf_where_negative(vf32 sign, vf32 a, vf32 b)
{
    return (vf32)_mm512_mask_mov_ps((__m512)b, _mm512_movepi32_mask((__m512i)sign),
                                    (__m512)a);
}

NF_INLINE unsigned
nf_less_f32(vf32 a, vf32 b)
{
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
}

/* In a register first: straight to memory it takes AMD's processors a hundred cycles. */
NF_INLINE void
nf_compress_f32(float *p, unsigned lanes, vf32 a)
{
    *(vf32 *)p = (vf32)_mm512_maskz_compress_ps((__mmask16)lanes, (__m512)a);
}

NF_INLINE vf32
nf_expand_f32(const float *p, unsigned lanes, vf32 a)
{
    return (vf32)_mm512_mask_expand_ps((__m512)a, (__mmask16)lanes, _mm512_loadu_ps(p));
}

NF_INLINE vf32
nf_sqrt_f32(vf32 a)
{
    return (vf32)_mm512_sqrt_ps((__m512)a);
}

NF_INLINE vf64
nf_sqrt_f64(vf64 a)
{
    return (vf64)_mm512_sqrt_pd((__m512d)a);
}

NF_INLINE vu64
nf_product_low_u32(vu32 a, uint32_t b)
{
    return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)b));
}

NF_INLINE vf32
nf_scale_f32(vf32 v, vf32 n)
{
    return (vf32)_mm512_scalef_ps((__m512)v, (__m512)n);
}

NF_INLINE vf64
nf_scale_f64(vf64 v, vf64 n)
{
    return (vf64)_mm512_scalef_pd((__m512d)v, (__m512d)n);
}

NF_INLINE vf32
nf_load_blocks_f32(const float *p, ptrdiff_t step)
{
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(p + step));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(p + 2 * step));
    return (vf32)_mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(p + 3 * step));
}

NF_INLINE vf64
nf_load_blocks_f64(const double *p, ptrdiff_t step)
{
    __m512d v = _mm512_castpd128_pd512(_mm_loadu_pd(p));
    v = _mm512_mask_broadcast_f64x2(v, 0x0c, _mm_loadu_pd(p + step));
    v = _mm512_mask_broadcast_f64x2(v, 0x30, _mm_loadu_pd(p + 2 * step));
    return (vf64)_mm512_mask_broadcast_f64x2(v, 0xc0, _mm_loadu_pd(p + 3 * step));
}

NF_INLINE vf32
nf_load_halves_f32(const float *p, ptrdiff_t step)
{
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(p));
    return (vf32)_mm512_insertf32x8(low, _mm256_loadu_ps(p + step), 1);
}

NF_INLINE vf64
nf_load_halves_f64(const double *p, ptrdiff_t step)
{
    const __m512d low = _mm512_castpd256_pd512(_mm256_loadu_pd(p));
    return (vf64)_mm512_insertf64x4(low, _mm256_loadu_pd(p + step), 1);
}

NF_INLINE vf32
nf_load_half(const uint16_t *p)
{
    return (vf32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

NF_INLINE void
nf_split_halves(vi32 pairs, vf32 *low, vf32 *high)
{
    *low = (vf32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)pairs));
    *high = (vf32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(pairs >> 16)));
}

NF_INLINE void
nf_store_half(uint16_t *p, vf32 v)
{
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

NF_INLINE vf32
nf_load_bfloat(const uint16_t *p)
{
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vf32)_mm512_slli_epi32(bits, 16);
}

NF_INLINE vf32
nf_load_int8(const int8_t *p)
{
    return (vf32)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

NF_INLINE vf32
nf_byte_of(vi32 words, int e)
{
    const __m512i where = _mm512_set4_epi32(0x0c808080 + (e << 24), 0x08808080 + (e << 24),
                                            0x04808080 + (e << 24), 0x00808080 + (e << 24));
    const __m512i top = e == 0   ? (__m512i)(words << 24)
                        : e == 3 ? (__m512i)(words & -0x1000000)
                                 : _mm512_shuffle_epi8((__m512i)words, where);
    return (vf32)_mm512_cvtepi32_ps(top);
}

NF_INLINE void
nf_store_low_bytes(void *p, vi32 v)
{
    _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)v));
}

#ifdef NF_VNNI
#define NF_HAS_DOT 1

NF_INLINE vi32
nf_dot_u8s8(vi32 sum, vi32 a, vi32 b)
{
    return (vi32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

NF_INLINE vi32
nf_dot_u8s8_at(vi32 sum, vi32 a, const void *p)
{
#ifdef NF_EMULATE
    int32_t four;
    memcpy(&four, p, sizeof four);
    return nf_dot_u8s8(sum, a, four - (vi32){0});
#else
    __asm__("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum)
            : "v"(a), "m"(*(const char (*)[sizeof(int32_t)])p));
    return sum;
#endif
}
#else
#define NF_HAS_DOT 0

NF_INLINE vi16
nf_pairs_u8s8(vi32 a, vi32 b)
{
    return (vi16)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
}

NF_INLINE vi32
nf_sum_pairs(vi16 p)
{
    return (vi32)_mm512_madd_epi16((__m512i)p, _mm512_set1_epi16(1));
}

NF_INLINE vi32
nf_dot_s16(vi32 sum, vi16 a, vi16 b)
{
    return sum + (vi32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}
#endif
