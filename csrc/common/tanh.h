// tanh within 2 ulp, and never beyond ±1.
#pragma once

#include "vector.h"

namespace tpk::TPK_ISA {

template <class T>
struct TanhConstants;

// coefficients: of q in expm1(r) ≈ r + r² q(r) on |r| <= ln2/2, highest power first; minimax fits.
template <>
struct TanhConstants<float> {
    typedef int32_t bits;
    static constexpr float saturation = 9.1f;  // tanh rounds to 1 from here
    static constexpr float round_magic =
        12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
    static constexpr int mantissa_bits = 23;
    static constexpr int exponent_bias = 127;
    static constexpr float coefficients[] = {1.3882516650482e-3f, 8.3665475249290e-3f, 4.1667200624943e-2f,
                                             1.6666543483734e-1f, 4.9999997019768e-1f};
};

template <>
struct TanhConstants<double> {
    typedef int64_t bits;
    static constexpr double saturation = 19.1;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 · 2^52
    static constexpr int mantissa_bits = 52;
    static constexpr int exponent_bias = 1023;
    static constexpr double coefficients[] = {0x1.78283c15501b5p-30,
                                              0x1.aad8f0f6330dap-26,
                                              0x1.280d56f987206p-22,
                                              0x1.71e0698a51e35p-19,
                                              0x1.a019fc3929e3ep-16,
                                              0x1.a01a00d84b402p-13,
                                              0x1.6c16c16a240ddp-10,
                                              0x1.11111111285aep-7,
                                              0x1.555555555603fp-5,
                                              0x1.5555555555534p-3,
                                              0x1.0p-1};
};

template <class V>
inline V reciprocal(V d) {
    return 1 / d;
}

#ifdef __AVX512F__
// A division costs 16 cycles a vector; this estimate and one Newton step cost three, to within 2 ulp.
inline Vec<float, 16> reciprocal(Vec<float, 16> d) {
    const Vec<float, 16> estimate = __builtin_ia32_rcp14ps512_mask(d, d, static_cast<uint16_t>(-1));
    return estimate + estimate * (1 - d * estimate);
}
#endif

// tanh |x| = E / (E + 2) with E = expm1(2|x|), in which small |x| keeps its relative precision.
template <class T, class V>
inline V tanh(V x) {
    using C = TanhConstants<T>;
    typedef typename Vector<typename C::bits, sizeof(V) / sizeof(T)>::type B;
    constexpr typename C::bits sign_bit = static_cast<typename C::bits>(1ull << (8 * sizeof(T) - 1));
    const B sign = reinterpret_cast<B>(x) & sign_bit;
    V y = reinterpret_cast<V>(reinterpret_cast<B>(x) ^ sign);
    y = y > C::saturation ? V{} + C::saturation : y;  // NaN stays
    y = y + y;
    const V rounded = y * T(1.4426950408889634) + C::round_magic;
    const V n = rounded - C::round_magic;
    const V r = y - n * T(0.6931471805599453);
    V q = V{} + C::coefficients[0];
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof(C::coefficients) / sizeof(T); ++i) q = q * r + C::coefficients[i];
    const V p = (r * r) * q + r;
    const B exponent = (reinterpret_cast<B>(rounded) + C::exponent_bias) << C::mantissa_bits;
    const V scale = reinterpret_cast<V>(exponent);  // 2^n
    const V e = scale * p + (scale - 1);
    // One correction step from the exact remainder e - t (e + 2): it takes back the rounding of e + 2 as well.
    const V inverse = reciprocal(e + 2);
    const V t = e * inverse;
    const V corrected = t + inverse * ((e - 2 * t) - t * e);
    return reinterpret_cast<V>(reinterpret_cast<B>(corrected) | sign);
}

}  // namespace tpk::TPK_ISA
