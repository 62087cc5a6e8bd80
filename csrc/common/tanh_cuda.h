// tanh within 2 ulp on a CUDA device, and never beyond ±1: common/tanh.h for one number. Every fused multiply-add is
// written as one, so that the bits do not depend on the compiler.
#pragma once

#include "cuda.h"
#include "tanh_constants.h"

namespace tpk {

__device__ inline float tanh_of(float x) {
    using C = TanhConstants<float>;
    // Read as elements of an array they would have to be in the device's memory.
    constexpr float high = C::half_ln2[0], low = C::half_ln2[1], c0 = C::coefficients[0], c1 = C::coefficients[1],
                    c2 = C::coefficients[2], c3 = C::coefficients[3], c4 = C::coefficients[4];
    static_assert(sizeof(C::coefficients) == 5 * sizeof(float));
    constexpr float magic = C::round_magic + C::exponent_bias;
    const float magnitude = fabsf(x);
    const float y = C::saturation < magnitude ? C::saturation : magnitude;  // NaN stays
    const float rounded = fmaf(y, 2 * 1.4426950408889634f, magic);
    const float n = rounded - magic;
    const float r = fmaf(-n, low, fmaf(-n, high, y));
    const float q = fmaf(fmaf(fmaf(fmaf(c0, r, c1), r, c2), r, c3), r, c4);
    const float scale =
        __int_as_float(static_cast<int>(static_cast<unsigned>(__float_as_int(rounded)) << C::mantissa_bits));  // 2^n
    const float e = fmaf(scale, fmaf(r * r, q, r), fmaf(scale, 0.5f, -0.5f));  // expm1(2y) / 2
    // e / (e + 1) from an estimate, corrected by the exact remainder e - t (e + 1)
    const float inverse = estimated_reciprocal(e + 1);
    const float t = e * inverse;
    return copysignf(fmaf(inverse, fmaf(-t, e, e - t), t), x);
}

}  // namespace tpk
