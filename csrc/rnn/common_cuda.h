// What every CUDA kernel of the recurrent layer does between two products.
#pragma once

#include "../common/cuda.h"
#include "../common/tanh_cuda.h"
#include "kernel.h"

namespace tpk {

__device__ inline float activation(Nonlinearity a, float z) {
    if (a == Nonlinearity::tanh) return tanh_of(z);
    if (a == Nonlinearity::relu) return z < 0 ? 0 : z;  // NaN stays
    return z;
}

__device__ inline float through_activation(Nonlinearity a, float adjoint, float h) {
    if (a == Nonlinearity::tanh) return adjoint * fmaf(-h, h, 1.0f);
    if (a == Nonlinearity::relu) return h <= 0 ? 0 : adjoint;
    return adjoint;
}

// The linearized inverse of the activation, at h; that of relu is relu.
__device__ inline float through_inverse(Nonlinearity a, float lambda, float h, float clip) {
    if (a != Nonlinearity::tanh) return through_activation(a, lambda, h);
    const float raised = h < clip - 1 ? clip - 1 : h;
    const float clipped = raised > 1 - clip ? 1 - clip : raised;  // NaN stays
    return lambda / fmaf(-clipped, clipped, 1.0f);
}

}  // namespace tpk
