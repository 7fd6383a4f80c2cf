/* Any machine with 128-bit vectors (SSE2, NEON): no intrinsics, only what the compiler makes
   of vector extensions. */

#if defined(__x86_64__)
#define NF_OPAQUE(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define NF_OPAQUE(v) __asm__("" : "+w"(v))
#else
#define NF_OPAQUE(v) __asm__("" : "+m"(v))
#endif

/* 12 sums of 16 registers. */
enum { NF_TILE_ROWS = 6, NF_TILE_VECTORS = 2, NF_TILE_STEPS = 1 };
/* A panel of B, 256 x 8 floats, is a quarter of L1. */
enum { NF_GEMM_DEPTH = 256, NF_GEMM_ROWS = 96 };

NF_INLINE vf32
nf_loadn_f32(const float *p, size_t n)
{
    vf32 v = {0};
    memcpy(&v, p, n * sizeof *p);
    return v;
}

NF_INLINE vf64
nf_loadn_f64(const double *p, size_t n)
{
    vf64 v = {0};
    memcpy(&v, p, n * sizeof *p);
    return v;
}

NF_INLINE void
nf_storen_f32(float *p, vf32 v, size_t n)
{
    memcpy(p, &v, n * sizeof *p);
}

NF_INLINE void
nf_storen_f64(double *p, vf64 v, size_t n)
{
    memcpy(p, &v, n * sizeof *p);
}

NF_INLINE int
nf_any_less_f32(vf32 a, vf32 b)
{
    const vi64 both = (vi64)(a < b);
    return (both[0] | both[1]) != 0;
}

NF_INLINE int
nf_any_less_f64(vf64 a, vf64 b)
{
    const vi64 both = (vi64)(a < b);
    return (both[0] | both[1]) != 0;
}

NF_INLINE int
nf_any_negative(vf32 sign)
{
    const vi64 both = (vi64)((vi32)sign >> 31);
    return (both[0] | both[1]) != 0;
}

NF_INLINE vf32
nf_where_negative(vf32 sign, vf32 a, vf32 b)
{
    const vi32 where = (vi32)sign >> 31;
    return (vf32)(((vi32)a & where) | ((vi32)b & ~where));
}

NF_INLINE size_t
nf_pack_f32(float *p, int32_t *places, vf32 sign, vf32 a, int32_t first)
{
    size_t count = 0;
    for (int i = 0; i < 4; i++) {
        p[count] = a[i];
        places[count] = first + i;
        count += ((vi32)sign)[i] < 0;
    }
    return count;
}

/* One rounding is what these are for: float32 goes through float64, which is exact but for a
   second rounding in rare ties; float64 takes libm's. */
NF_INLINE vf32
nf_fma_f32(vf32 a, vf32 b, vf32 c)
{
    vf32 v;
    for (int i = 0; i < 4; i++) {
        v[i] = (float)((double)a[i] * (double)b[i] + (double)c[i]);
    }
    return v;
}

NF_INLINE vf64
nf_fma_f64(vf64 a, vf64 b, vf64 c)
{
    return (vf64){fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1])};
}

NF_INLINE vf32
nf_fms_f32(vf32 a, vf32 b, vf32 c)
{
    return nf_fma_f32(a, b, -c);
}

NF_INLINE vf64
nf_fms_f64(vf64 a, vf64 b, vf64 c)
{
    return nf_fma_f64(a, b, -c);
}

NF_INLINE vf32
nf_max_f32(vf32 a, vf32 b)
{
    const vi32 where = b > a;
    return (vf32)(((vi32)b & where) | ((vi32)a & ~where));
}

NF_INLINE vf64
nf_max_f64(vf64 a, vf64 b)
{
    const vi64 where = b > a;
    return (vf64)(((vi64)b & where) | ((vi64)a & ~where));
}

NF_INLINE vf32
nf_min_f32(vf32 a, vf32 b)
{
    const vi32 where = b < a;
    return (vf32)(((vi32)b & where) | ((vi32)a & ~where));
}

NF_INLINE vf64
nf_min_f64(vf64 a, vf64 b)
{
    const vi64 where = b < a;
    return (vf64)(((vi64)b & where) | ((vi64)a & ~where));
}

NF_INLINE vf32
nf_sqrt_f32(vf32 a)
{
    return (vf32){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])};
}

NF_INLINE vf64
nf_sqrt_f64(vf64 a)
{
    return (vf64){sqrt(a[0]), sqrt(a[1])};
}

NF_INLINE vu64
nf_product_low_u32(vu32 a, uint32_t b)
{
    return ((vu64)a & 0xffffffff) * b;
}

#include "isa/scale.h"

NF_INLINE vf32
nf_load_blocks_f32(const float *p, ptrdiff_t step)
{
    (void)step;
    return *(const vf32 *)p;
}

NF_INLINE vf64
nf_load_blocks_f64(const double *p, ptrdiff_t step)
{
    (void)step;
    return *(const vf64 *)p;
}

/* Their bits moved to float32's place, times 2^(127 - 15): exact, subnormal numbers too. The
   exponent of inf and NaN is all ones in both. */
NF_INLINE vf32
nf_widen_half(vu32 bits)
{
    const vf32 size = (vf32)((bits & 0x7fff) << 13) * 0x1p112f;
    const vu32 odd = (vu32)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vf32)((vu32)size | odd | (bits & 0x8000) << 16);
}

NF_INLINE vf32
nf_load_half(const uint16_t *p)
{
    return nf_widen_half((vu32){p[0], p[1], p[2], p[3]});
}

NF_INLINE void
nf_split_halves(vi32 pairs, vf32 *low, vf32 *high)
{
    *low = nf_widen_half((vu32)pairs & 0xffff);
    *high = nf_widen_half((vu32)pairs >> 16);
}

/* Below 2^-14 the sum with 1/2 rounds to float16's last place, 2^-24. */
NF_INLINE void
nf_store_half(uint16_t *p, vf32 v)
{
    const vu32 bits = (vu32)v, sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    const vu32 normal = (size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13;
    const vu32 small = (vu32)((vf32)size + 0.5f) - 0x3f000000;
    const vu32 is_small = (vu32)(size < 0x38800000), is_large = (vu32)(size >= 0x47800000),
               is_nan = (vu32)(size > 0x7f800000);
    vu32 half = (small & is_small) | (normal & ~is_small);
    half = (half & ~is_large) | (is_large & (0x7c00 | (is_nan & 0x0200))) | sign;
    for (int i = 0; i < 4; i++) {
        p[i] = (uint16_t)half[i];
    }
}

NF_INLINE vf32
nf_load_bfloat(const uint16_t *p)
{
    return (vf32)((vu32){p[0], p[1], p[2], p[3]} << 16);
}

NF_INLINE vf32
nf_load_int8(const int8_t *p)
{
    return (vf32){p[0], p[1], p[2], p[3]};
}

NF_INLINE vf32
nf_byte_of(vi32 words, int e)
{
    return __builtin_convertvector((words << (24 - 8 * e)) & -0x1000000, vf32);
}

NF_INLINE void
nf_store_low_bytes(void *p, vi32 v)
{
    const uint8_t bytes[4] = {(uint8_t)v[0], (uint8_t)v[1], (uint8_t)v[2], (uint8_t)v[3]};
    memcpy(p, bytes, sizeof bytes);
}

#define NF_HAS_DOT 0

NF_INLINE vi16
nf_pairs_u8s8(vi32 a, vi32 b)
{
    const vi16 even = ((vi16)a & 0xff) * ((vi16)((vu16)b << 8) >> 8);
    return even + (vi16)((vu16)a >> 8) * ((vi16)b >> 8);
}

NF_INLINE vi32
nf_sum_pairs(vi16 p)
{
    return ((vi32)((vu32)p << 16) >> 16) + ((vi32)p >> 16);
}

NF_INLINE vi32
nf_dot_s16(vi32 sum, vi16 a, vi16 b)
{
    return sum + nf_sum_pairs(a * b);
}
