// What the CUDA kernels of the recurrent layer share: what happens to a number between two products, and launching.
#pragma once

#include <type_traits>

#include "../common/cuda.h"
#include "../common/tanh_cuda.h"
#include "call.h"

namespace tpk {

// Adds up over groups of `lanes` neighbours. While there are several sums, each of two lanes goes on with half of them;
// at last lane l has, of count >= lanes, those from l count / lanes on, of fewer the one numbered l count / lanes.
template <int count, int lanes, int mask = lanes / 2>
__device__ inline void reduce(float* sums, int lane) {
    if constexpr (mask > 0) {
        constexpr int half = count > 1 ? count / 2 : 1;
        const bool upper = count > 1 && (lane & mask);
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float other = sums[count > 1 ? half + i : i];
            const float mine = upper ? other : sums[i], theirs = upper ? sums[i] : other;
            sums[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, mask);
        }
        reduce<half, lanes, mask / 2>(sums, lane);
    }
}

// Of the first three cells: those that there are on a CUDA device.
__device__ inline Nonlinearity nonlinearity_of(CellName cell) { return static_cast<Nonlinearity>(cell); }

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
void check_rule(const RecurrenceBackward<T, float>& f) {
    if (f.inverse == Inverse::difference || f.inverse == Inverse::direct ||
        (f.inverse == Inverse::jacobian && !std::is_same_v<T, float>))
        throw std::invalid_argument("recurrence_bwd: there is no such inverse on a CUDA device");
    if (carries(f.inverse) && !f.feedback) throw std::invalid_argument("recurrence_bwd: feedback is missing");
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
