// Differences of inverse hyperbolic tangents, within a few ulp however near the two are: no cancellation.
#pragma once

#include "tanh.h"

namespace tpk::TPK_ISA {

template <class T>
struct AtanhConstants;

// coefficients: of q in atanh s = s + s³ q(s²) on 0 <= s <= 1/3, highest power first; minimax fits.
template <>
struct AtanhConstants<float> {
    static constexpr float coefficients[] = {0x1.dba260p-4f, 0x1.bc8cf8p-4f, 0x1.24c926p-3f, 0x1.9998d4p-3f,
                                             0x1.555556p-2f};
};

template <>
struct AtanhConstants<double> {
    static constexpr double coefficients[] = {0x1.401d3e65cdc48p-4, 0x1.32e0d25c9c761p-5, 0x1.bc37f0140c19ep-5,
                                              0x1.e0a2d581ab68fp-5, 0x1.111abdc8abe16p-4, 0x1.3b13515f6f9efp-4,
                                              0x1.745d19937b1fcp-4, 0x1.c71c71bedea97p-4, 0x1.2492492499d46p-3,
                                              0x1.9999999999944p-3, 0x1.5555555555555p-2};
};

// atanh a - atanh b for |a|, |b| < 1: ½ log A/B with A = (1 + high)(1 - low), B = (1 - high)(1 + low), of which
// A - B = 2 (high - low). difference: a - b, perhaps to more digits than a and b have.
template <class T, class V>
inline V atanh_difference(V a, V b, V difference) {
    using C = TanhConstants<T>;
    typedef typename Vector<typename C::bits, sizeof(V) / sizeof(T)>::type Bits;
    constexpr typename C::bits sign_bit = static_cast<typename C::bits>(1ull << (8 * sizeof(T) - 1));
    const Bits sign = reinterpret_cast<Bits>(difference) & sign_bit;
    const V magnitude = reinterpret_cast<V>(reinterpret_cast<Bits>(difference) & ~sign_bit);
    const V high = a < b ? b : a, low = a < b ? a : b;
    const V larger = (1 + high) * (1 - low), smaller = (1 - high) * (1 + low);
    // larger / smaller = 2^n · larger / scaled, the last one between 1 and 2
    Bits n =
        (reinterpret_cast<Bits>(larger) >> C::mantissa_bits) - (reinterpret_cast<Bits>(smaller) >> C::mantissa_bits);
    V scaled = reinterpret_cast<V>(reinterpret_cast<Bits>(smaller) + (n << C::mantissa_bits));
    const Bits beyond = scaled > larger;  // -1 where it is
    n += beyond;
    scaled = beyond ? scaled * T(0.5) : scaled;
    const V s = (n == 0 ? 2 * magnitude : larger - scaled) / (larger + scaled), z = s * s;
    V q = broadcast<V>(AtanhConstants<T>::coefficients[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof(AtanhConstants<T>::coefficients) / sizeof(T); ++i)
        q = q * z + AtanhConstants<T>::coefficients[i];
    const V power = __builtin_convertvector(n, V);
    const V result = power * C::half_ln2[0] + (power * C::half_ln2[1] + (s + s * z * q));
    return reinterpret_cast<V>(reinterpret_cast<Bits>(result) | sign);
}

}  // namespace tpk::TPK_ISA
