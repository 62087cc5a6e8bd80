// What tanh is made of, on every device.
#pragma once

#include <stdint.h>

namespace tpk {

template <class T>
struct TanhConstants;

// coefficients: of q in expm1(2r) / 2 ≈ r + r² q(r) on |r| <= ln2/4, highest power first; minimax fits.
template <>
struct TanhConstants<float> {
    typedef int32_t bits;
    static constexpr float saturation = 9.1f;                             // tanh rounds to 1 from here
    static constexpr float round_magic = 12582912.0f;                     // 1.5 · 2^23
    static constexpr float half_ln2[] = {0x1.62e4p-2f, 0x1.7f7d1cp-21f};  // n times the first is exact
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

}  // namespace tpk
