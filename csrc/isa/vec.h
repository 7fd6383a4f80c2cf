/* The vector vocabulary. A kernel template is written once, on the names below,
   and compiled for every instruction set and element type.

   Before including a template, a file defines
       NF_ISA      suffix of the instruction set, e.g. avx512
       NF_BYTES    width of a vector: 16, 32 or 64
   and, per element type (see instantiate.h),
       T, I        element type and the signed integer of its width
       vT, vI, vU  vectors of NF_LANES of them, and of unsigned integers
       NF_LANES    how many those are
       NF_TYPE     suffix of the element type: f32 or f64
       NF_SINGLE   1 for f32, 0 for f64
       NF_IOTA     the vI of lane numbers

   A template then speaks of vT with the ordinary operators (GCC and Clang vector
   extensions; a*b + c contracts to a fused multiply-add where the machine has one) and of
   the operations in kernels/vector.inc. What needs an intrinsic is named in vec_<isa>.h,
   once per instruction set, and nowhere else. */
#ifndef NF_VEC_H
#define NF_VEC_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NF_CAT2_(a, b)    a##_##b
#define NF_CAT2(a, b)     NF_CAT2_(a, b)
#define NF_CAT3_(a, b, c) a##_##b##_##c
#define NF_CAT3(a, b, c)  NF_CAT3_(a, b, c)

/* NF_NAME(gelu_tanh) is gelu_tanh_f32_avx512: readable in a profile. */
#define NF_NAME(kernel) NF_CAT3(kernel, NF_TYPE, NF_ISA)
/* For what has no element type of its own: NF_ISA_NAME(qgemm_s8s8) is qgemm_s8s8_avx2. */
#define NF_ISA_NAME(kernel) NF_CAT2(kernel, NF_ISA)

#define NF_INLINE static inline __attribute__((always_inline))
#define NF_UNROLL _Pragma("GCC unroll 16")
#define NF_ROLLED _Pragma("GCC unroll 1")
/* From here on the compiler knows nothing of the pointer p, so keeps it in a register. */
#define NF_POINTER(p) __asm__("" : "+r"(p))
/* What was loaded before is not remembered behind it. */
#define NF_MEMORY __asm__ volatile("" : : : "memory")

/* Unaligned, and free to alias. */
typedef float vf32 __attribute__((vector_size(NF_BYTES), aligned(4), may_alias));
typedef int32_t vi32 __attribute__((vector_size(NF_BYTES), aligned(4), may_alias));
typedef uint32_t vu32 __attribute__((vector_size(NF_BYTES), aligned(4), may_alias));
typedef int16_t vi16 __attribute__((vector_size(NF_BYTES), aligned(2), may_alias));
typedef uint16_t vu16 __attribute__((vector_size(NF_BYTES), aligned(2), may_alias));
typedef double vf64 __attribute__((vector_size(NF_BYTES), aligned(8), may_alias));
typedef int64_t vi64 __attribute__((vector_size(NF_BYTES), aligned(8), may_alias));
typedef uint64_t vu64 __attribute__((vector_size(NF_BYTES), aligned(8), may_alias));

/* What each vec_<isa>.h gives (f32 stands for f64 too):
       nf_loadn_f32(p, n), nf_storen_f32(p, v, n)    the first n < lanes; other lanes 0
       nf_fma_f32(a, b, c), nf_fms_f32(a, b, c)      a*b +- c in one rounding, also where the
                                                     compiler would share a*b
       nf_add_product_f32(sum, a, b)                 sum + a * b, with its bits, for sums that
                                                     fill the registers
       nf_add_product_at_f32(sum, p, b)              the same of *p, a number, and b; AVX-512
                                                     spreads it in the same instruction
       nf_max_f32(a, b), nf_min_f32(a, b)            a where either is NaN
       nf_scale_f32(v, n)                            v 2^n in one rounding, n whole, as floats
       nf_sqrt_f32(a)                                the square root
       nf_add_beyond_f32(a, b, x, limit)             the integers a + b as floats, but 0 in lanes
                                                     where x <= limit
       nf_add_mask_f32(score, mask)                  their sum, but mask in lanes where that is
                                                     -inf
       nf_any_less_f32(a, b)                         whether a lane of a is less than that of b
       nf_any_negative(sign)                         whether the sign bit of a lane is set
       nf_where_negative(sign, a, b)                 a in lanes whose sign bit is set, else b
       nf_pack_f32(p, places, sign, a, first)        of vectors of 16 and 32: stores the lanes of a
                                                     whose sign bit is set in `sign` side by side,
                                                     and at `places` their numbers plus `first`;
                                                     how many they are. Of both a whole vector is
                                                     written
       nf_less_f32(a, b)                             of vectors of 64: bit i is set where lane i of
                                                     a is less than that of b
       nf_compress_f32(p, lanes, a)                  of vectors of 64: stores the lanes of a whose
                                                     bit is set side by side, and zeros after
       nf_expand_f32(p, lanes, a)                    a, but in the lanes whose bit is set the
                                                     numbers at p in their order
       nf_product_low_u32(a, b)                      the lower halves of 64-bit lanes times a
                                                     number
       nf_load_blocks_f32(p, step)                   16 bytes from each of p, p + step, ...
       nf_load_halves_f32(p, step)                   32 bytes from each of p and p + step, of
                                                     vectors of 64
       NF_OPAQUE(v)                                  from here on the compiler knows nothing
                                                     of the vector v
       nf_load_half(p)                               float16 numbers as floats
       nf_split_halves(pairs, &low, &high)           the two float16 numbers of each lane as
                                                     floats
       nf_store_half(p, v)                           floats as float16, ties to even
       nf_load_bfloat(p)                             bfloat16 numbers as floats
       nf_load_int8(p)                               signed bytes as floats
       nf_byte_of(words, e)                          signed byte e of each lane times 2^24 as
                                                     floats: exact
       nf_store_low_bytes(p, v)                      the lowest byte of every 32-bit lane
       nf_dot_u8s8(sum, a, b)                        where NF_HAS_DOT is 1: sum plus four
                                                     products of bytes of any value, a unsigned,
                                                     b signed
       nf_dot_u8s8_at(sum, a, p)                     there: the same of the four bytes at p, which
                                                     the instruction spreads
       nf_pairs_u8s8(a, b)                           where it is 0, and so the next two: sums of
                                                     two products of bytes, as 16 bits; a
                                                     unsigned, b signed; they must fit
       nf_sum_pairs(p)                               sums of two 16-bit numbers
       nf_dot_s16(sum, a, b)                         sum plus two products of 16-bit numbers,
                                                     each of which must fit 16 bits
   and the sizes of the register tile of a matrix product, rows by vectors, and how many steps
   of it come at once:
       NF_TILE_ROWS, NF_TILE_VECTORS, NF_TILE_STEPS
   and of its blocks, the longest of K and the rows of a task:
       NF_GEMM_DEPTH, NF_GEMM_ROWS */
#if NF_BYTES == 64
#include "isa/vec_avx512.h"
#elif NF_BYTES == 32
#include "isa/vec_avx2.h"
#else
#include "isa/vec_baseline.h"
#endif

/* a*b rounded by itself, also where it is added to something. */
NF_INLINE vf32
nf_times_f32(vf32 a, vf32 b)
{
    vf32 product = a * b;
    NF_OPAQUE(product);
    return product;
}

#if NF_BYTES != 32 /* AVX2 names the instruction */
NF_INLINE vf32
nf_add_product_f32(vf32 sum, vf32 a, vf32 b)
{
    return sum + a * b;
}

NF_INLINE vf64
nf_add_product_f64(vf64 sum, vf64 a, vf64 b)
{
    return sum + a * b;
}
#endif

#if NF_BYTES != 64 || defined(NF_EMULATE)
NF_INLINE vf32
nf_add_product_at_f32(vf32 sum, const float *p, vf32 b)
{
    return nf_add_product_f32(sum, *p - (vf32){0}, b);
}

NF_INLINE vf64
nf_add_product_at_f64(vf64 sum, const double *p, vf64 b)
{
    return nf_add_product_f64(sum, *p - (vf64){0}, b);
}
#endif

#if NF_BYTES != 64 /* AVX-512 has registers of their own for what a comparison gives */
NF_INLINE vf32
nf_add_beyond_f32(vu32 a, vu32 b, vf32 x, vf32 limit)
{
    return (vf32)((a + b) & ~(vu32)(x <= limit));
}

NF_INLINE vf64
nf_add_beyond_f64(vu64 a, vu64 b, vf64 x, vf64 limit)
{
    return (vf64)((a + b) & ~(vu64)(x <= limit));
}

NF_INLINE vf32
nf_add_mask_f32(vf32 score, vf32 mask)
{
    const vi32 masked = mask == -__builtin_inff();
    return (vf32)(((vi32)mask & masked) | ((vi32)(score + mask) & ~masked));
}

NF_INLINE vf64
nf_add_mask_f64(vf64 score, vf64 mask)
{
    const vi64 masked = mask == -__builtin_inf();
    return (vf64)(((vi64)mask & masked) | ((vi64)(score + mask) & ~masked));
}
#endif

#endif
