// tanh within 2 ulp, and never beyond ±1.
#pragma once

#include "vector.h"

namespace tpk::TPK_ISA {

template <class T>
struct TanhConstants;

// coefficients: of q in expm1(2r) / 2 ≈ r + r² q(r) on |r| <= ln2/4, highest power first; minimax fits.
template <>
struct TanhConstants<float> {
    typedef int32_t bits;
    static constexpr float saturation = 9.1f;                                    // tanh rounds to 1 from here
    static constexpr float round_magic = 12582912.0f;                            // 1.5 · 2^23
    static constexpr float half_ln2[] = {0x1.62e4p-2f, 0x1.7f7d1cf79abcap-21f};  // n times the first is exact
    static constexpr int mantissa_bits = 23;
    static constexpr int exponent_bias = 127;
    static constexpr float coefficients[] = {0x1.6bebfe0000000p-5f, 0x1.1227b00000000p-3f, 0x1.5556740000000p-2f,
                                             0x1.5554b00000000p-1f, 0x1.fffffe0000000p-1f};
};

template <>
struct TanhConstants<double> {
    typedef int64_t bits;
    static constexpr double saturation = 19.1;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 · 2^52
    static constexpr double half_ln2[] = {0x1.62e42fefa0000p-2, 0x1.cf79abc9e3b3ap-41};
    static constexpr int mantissa_bits = 52;
    static constexpr int exponent_bias = 1023;
    static constexpr double coefficients[] = {0x1.78283c15501b5p-19, 0x1.aad8f0f6330dap-16, 0x1.280d56f987206p-13,
                                              0x1.71e0698a51e35p-11, 0x1.a019fc3929e3ep-9,  0x1.a01a00d84b402p-7,
                                              0x1.6c16c16a240ddp-5,  0x1.11111111285aep-3,  0x1.555555555603fp-2,
                                              0x1.5555555555534p-1,  0x1.0000000000000p+0};
};

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
