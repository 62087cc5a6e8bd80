// Half precision to and from float32, on a CUDA device.
#pragma once

#include <stdint.h>

#include "cuda.h"
#include "half.h"

namespace tpk {

#if defined(__CUDACC__) || defined(TPK_EMULATE)

#ifndef TPK_EMULATE
__device__ inline uint16_t bfloat16_bits(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ inline uint16_t float16_bits(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ inline float float16_value(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
#endif

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(bfloat16 x) { return __int_as_float(static_cast<int>(uint32_t{x.bits} << 16)); }
__device__ inline float widened(float16 x) { return float16_value(x.bits); }

// To the nearest, ties to even.
template <class T>
__device__ T rounded(float x);
template <>
__device__ inline float rounded<float>(float x) {
    return x;
}
template <>
__device__ inline bfloat16 rounded<bfloat16>(float x) {
    return {bfloat16_bits(x)};
}
template <>
__device__ inline float16 rounded<float16>(float x) {
    return {float16_bits(x)};
}

#endif

}  // namespace tpk
