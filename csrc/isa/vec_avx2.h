/* AVX2 with FMA and F16C: 16 registers of 32 bytes. */
#include <immintrin.h>

#define NF_OPAQUE(v) __asm__("" : "+x"(v))

/* 12 sums, 2 of B and a broadcast. */
enum { NF_TILE_ROWS = 6, NF_TILE_VECTORS = 2 };
/* So many steps of a tile at once: a loop counts with an eighth of its instructions, and where
   another thread has half of the core it is instructions that run short. */
enum { NF_TILE_STEPS = 4 };
/* A panel of B, 256 x 16 floats, is half of L1; 96 rows of A are a fifth of L2. */
enum { NF_GEMM_DEPTH = 256, NF_GEMM_ROWS = 96 };

#define NF_MASK8(n) ((__m256i)((vi32){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)(n)))
#define NF_MASK4(n) ((__m256i)((vi64){0, 1, 2, 3} < (int64_t)(n)))

NF_INLINE vf32
nf_loadn_f32(const float *p, size_t n)
{
    return (vf32)_mm256_maskload_ps(p, NF_MASK8(n));
}

NF_INLINE vf64
nf_loadn_f64(const double *p, size_t n)
{
    return (vf64)_mm256_maskload_pd(p, NF_MASK4(n));
}

NF_INLINE void
nf_storen_f32(float *p, vf32 v, size_t n)
{
    _mm256_maskstore_ps(p, NF_MASK8(n), (__m256)v);
}

NF_INLINE void
nf_storen_f64(double *p, vf64 v, size_t n)
{
    _mm256_maskstore_pd(p, NF_MASK4(n), (__m256d)v);
}

NF_INLINE vf32
nf_fma_f32(vf32 a, vf32 b, vf32 c)
{
    return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

NF_INLINE vf64
nf_fma_f64(vf64 a, vf64 b, vf64 c)
{
    return (vf64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

NF_INLINE vf32
nf_fms_f32(vf32 a, vf32 b, vf32 c)
{
    return (vf32)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c);
}

NF_INLINE vf64
nf_fms_f64(vf64 a, vf64 b, vf64 c)
{
    return (vf64)_mm256_fmsub_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

/* By the form of the instruction that changes the sum alone: where a tile takes all registers,
   the compiler chooses others and pays with moves and spills. */
NF_INLINE vf32
nf_add_product_f32(vf32 sum, vf32 a, vf32 b)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}

NF_INLINE vf64
nf_add_product_f64(vf64 sum, vf64 a, vf64 b)
{
    __asm__("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}

NF_INLINE vf32
nf_max_f32(vf32 a, vf32 b)
{
    return (vf32)_mm256_max_ps((__m256)b, (__m256)a);
}

NF_INLINE vf64
nf_max_f64(vf64 a, vf64 b)
{
    return (vf64)_mm256_max_pd((__m256d)b, (__m256d)a);
}

NF_INLINE vf32
nf_min_f32(vf32 a, vf32 b)
{
    return (vf32)_mm256_min_ps((__m256)b, (__m256)a);
}

NF_INLINE vf64
nf_min_f64(vf64 a, vf64 b)
{
    return (vf64)_mm256_min_pd((__m256d)b, (__m256d)a);
}

NF_INLINE vf32
nf_sqrt_f32(vf32 a)
{
    return (vf32)_mm256_sqrt_ps((__m256)a);
}

NF_INLINE vf64
nf_sqrt_f64(vf64 a)
{
    return (vf64)_mm256_sqrt_pd((__m256d)a);
}

NF_INLINE int
nf_any_less_f32(vf32 a, vf32 b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)) != 0;
}

NF_INLINE int
nf_any_less_f64(vf64 a, vf64 b)
{
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LT_OQ)) != 0;
}

NF_INLINE int
nf_any_negative(vf32 sign)
{
    return _mm256_movemask_ps((__m256)sign) != 0;
}

NF_INLINE vf32
nf_where_negative(vf32 sign, vf32 a, vf32 b)
{
    return (vf32)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)sign);
}

/* Byte i of row m is the number of the i-th bit that is set in m. */
#define NF_BEFORE(m, i) __builtin_popcount((m) & ((1 << (i)) - 1))
#define NF_BYTE(m, i)   ((uint64_t)((m) >> (i) & 1) * (i) << 8 * NF_BEFORE(m, i))
#define NF_ROW(m)                                                                          \
    NF_BYTE(m, 1) | NF_BYTE(m, 2) | NF_BYTE(m, 3) | NF_BYTE(m, 4) | NF_BYTE(m, 5)          \
        | NF_BYTE(m, 6) | NF_BYTE(m, 7)
#define NF_ROWS4(m)  NF_ROW(m), NF_ROW(m + 1), NF_ROW(m + 2), NF_ROW(m + 3)
#define NF_ROWS16(m) NF_ROWS4(m), NF_ROWS4(m + 4), NF_ROWS4(m + 8), NF_ROWS4(m + 12)
#define NF_ROWS64(m) NF_ROWS16(m), NF_ROWS16(m + 16), NF_ROWS16(m + 32), NF_ROWS16(m + 48)
static const uint64_t nf_set_bits[256] = {NF_ROWS64(0), NF_ROWS64(64), NF_ROWS64(128),
                                          NF_ROWS64(192)};
#undef NF_BEFORE
#undef NF_BYTE
#undef NF_ROW
#undef NF_ROWS4
#undef NF_ROWS16
#undef NF_ROWS64

NF_INLINE size_t
nf_pack_f32(float *p, int32_t *places, vf32 sign, vf32 a, int32_t first)
{
    const int mask = _mm256_movemask_ps((__m256)sign);
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&nf_set_bits[mask]));
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps((__m256)a, lanes));
    *(vi32 *)places = (vi32)lanes + first;
    return (size_t)__builtin_popcount((unsigned)mask);
}

NF_INLINE vu64
nf_product_low_u32(vu32 a, uint32_t b)
{
    return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)b));
}

#include "isa/scale.h"

NF_INLINE vf32
nf_load_blocks_f32(const float *p, ptrdiff_t step)
{
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(p));
    return (vf32)_mm256_insertf128_ps(low, _mm_loadu_ps(p + step), 1);
}

NF_INLINE vf64
nf_load_blocks_f64(const double *p, ptrdiff_t step)
{
    const __m256d low = _mm256_castpd128_pd256(_mm_loadu_pd(p));
    return (vf64)_mm256_insertf128_pd(low, _mm_loadu_pd(p + step), 1);
}

NF_INLINE vf32
nf_load_half(const uint16_t *p)
{
    return (vf32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

NF_INLINE void
nf_split_halves(vi32 pairs, vf32 *low, vf32 *high)
{
    const __m256i apart =
        _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5,
                         8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i x =
        _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)pairs, apart), 0xd8);
    *low = (vf32)_mm256_cvtph_ps(_mm256_castsi256_si128(x));
    *high = (vf32)_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
}

NF_INLINE void
nf_store_half(uint16_t *p, vf32 v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

NF_INLINE vf32
nf_load_bfloat(const uint16_t *p)
{
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (vf32)_mm256_slli_epi32(bits, 16);
}

NF_INLINE vf32
nf_load_int8(const int8_t *p)
{
    return (vf32)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

NF_INLINE vf32
nf_byte_of(vi32 words, int e)
{
    const vi32 last = {0x00808080, 0x04808080, 0x08808080, 0x0c808080,
                       0x00808080, 0x04808080, 0x08808080, 0x0c808080};
    const __m256i where = (__m256i)(last + (e << 24));
    const __m256i top = e == 0   ? (__m256i)(words << 24)
                        : e == 3 ? (__m256i)(words & -0x1000000)
                                 : _mm256_shuffle_epi8((__m256i)words, where);
    return (vf32)_mm256_cvtepi32_ps(top);
}

NF_INLINE void
nf_store_low_bytes(void *p, vi32 v)
{
    const __m256i low = _mm256_set1_epi32(0x0c080400);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, low); /* in both halves */
    const __m128i pair = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                            _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(p, pair);
}

#define NF_HAS_DOT 0

NF_INLINE vi16
nf_pairs_u8s8(vi32 a, vi32 b)
{
    return (vi16)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
}

NF_INLINE vi32
nf_sum_pairs(vi16 p)
{
    return (vi32)_mm256_madd_epi16((__m256i)p, _mm256_set1_epi16(1));
}

NF_INLINE vi32
nf_dot_s16(vi32 sum, vi16 a, vi16 b)
{
    return sum + (vi32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
