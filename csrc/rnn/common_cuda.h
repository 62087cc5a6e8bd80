// What every CUDA kernel of the recurrent layer does between two products, and how it is launched.
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

// Whether displacements go through P.
inline bool carries(Inverse inverse) { return inverse == Inverse::weight || inverse == Inverse::layer; }

template <class T>
void check_rule(const RnnBackward<T, float>& f) {
    if (!carries(f.inverse) && f.inverse != Inverse::none && f.inverse != Inverse::identity)
        throw std::invalid_argument("rnn_bwd: there is no such inverse on a CUDA device");
    if (carries(f.inverse) && !f.feedback) throw std::invalid_argument("rnn_bwd: feedback is missing");
}

inline ptrdiff_t blocks_of(const char* what, ptrdiff_t B, ptrdiff_t H, int rows) {
    const ptrdiff_t blocks = (B + rows - 1) / rows * H;
    if (blocks > 0x7fffffff) throw std::invalid_argument(std::string(what) + ": too many sequences for one launch");
    return blocks;
}

template <int value>
struct Constant {
    static constexpr int of = value;
};

}  // namespace tpk
