// tanh within 2 ulp, and never beyond ±1.
#pragma once

#include "tanh_constants.h"
#include "vector.h"

namespace tpk::TPK_ISA {

#ifdef __FP_FAST_FMA
// 1/d to at least 14 bits: the correction below doubles them.
template <class V>
inline V estimated_reciprocal(V d) {
    return 1 / d;
}

#ifdef __AVX512F__
inline Vec<float, 16> estimated_reciprocal(Vec<float, 16> d) {  // a division takes 16 cycles
    return __builtin_ia32_rcp14ps512_mask(d, d, static_cast<uint16_t>(-1));
}
#endif

// e / (e + 1) from an estimate: the exact remainder e - t (e + 1) corrects it, the rounding of e + 1 included.
template <class V>
inline V ratio(V e, V) {
    const V inverse = estimated_reciprocal(e + 1);
    const V t = e * inverse;
    return t + inverse * ((e - t) - t * e);
}
#else
// (e + rest) / (e + rest + 1), to first order in the rest of e and in that of e + 1; 1/(e + 1) is 1 - t.
template <class V>
inline V ratio(V e, V rest) {
    const V d = e + 1, rest_of_d = e < 1 ? e - (d - 1) : 1 - (d - e);
    const V t = e / d;
    return t + (rest * (1 - t) - t * rest_of_d) * (1 - t);
}
#endif

// tanh |x| = e / (e + 1) with e = expm1(2|x|) / 2, in which small |x| keeps its relative precision.
template <class T, class V>
inline V tanh(V x) {
    using C = TanhConstants<T>;
    typedef typename Vector<typename C::bits, sizeof(V) / sizeof(T)>::type B;
    constexpr typename C::bits sign_bit = static_cast<typename C::bits>(1ull << (8 * sizeof(T) - 1));
    // Adding it rounds to an integer, which the low bits then hold with the exponent's bias added.
    constexpr T magic = C::round_magic + C::exponent_bias;
    const B sign = reinterpret_cast<B>(x) & sign_bit;
    const V magnitude = reinterpret_cast<V>(reinterpret_cast<B>(x) & ~sign_bit);
    const V saturation = broadcast<V>(C::saturation);
    const V y = saturation < magnitude ? saturation : magnitude;  // NaN stays
    // y = n ln2/2 + r, and expm1(2r) / 2 = r + r² q(r)
    const V rounded = y * T(2 * 1.4426950408889634) + magic;
    const V n = rounded - magic;
    const V r = (y - n * C::half_ln2[0]) - n * C::half_ln2[1];
    V q = broadcast<V>(C::coefficients[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof(C::coefficients) / sizeof(T); ++i) q = q * r + C::coefficients[i];
    const V square = (r * r) * q, p = square + r;
    const V scale = reinterpret_cast<V>(reinterpret_cast<B>(rounded) << C::mantissa_bits);  // 2^n
    const V e = scale * p + (scale * T(0.5) - T(0.5));
    const V rest = scale * (square - (p - r));  // what the rounding of p left out
    return reinterpret_cast<V>(reinterpret_cast<B>(ratio(e, rest)) | sign);
}

}  // namespace tpk::TPK_ISA
