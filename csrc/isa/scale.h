/* nf_scale for the instruction sets that have no such instruction: v 2^n in two steps, the first
   of which is exact, so that a denormal result is rounded once. |n| <= 2 (bias - 1). */

NF_INLINE vf32
nf_scale_f32(vf32 v, vf32 n)
{
    const vf32 rounder = (vf32){0} + 0x1.8p23f;
    const vf32 first = n * 0.5f + rounder, second = (n - (first - rounder)) + rounder;
    return v * (vf32)(((vi32)first + 127) << 23) * (vf32)(((vi32)second + 127) << 23);
}

NF_INLINE vf64
nf_scale_f64(vf64 v, vf64 n)
{
    const vf64 rounder = (vf64){0} + 0x1.8p52;
    const vf64 first = n * 0.5 + rounder, second = (n - (first - rounder)) + rounder;
    return v * (vf64)(((vi64)first + 1023) << 52) * (vf64)(((vi64)second + 1023) << 52);
}
