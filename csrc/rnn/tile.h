// A tile of batch rows: how large it may be, and what happens to its elements.
#pragma once

#include "../common/tanh.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

// Rows at most: enough to hide the weights' trip from the second-level cache.
constexpr ptrdiff_t largest_tile = 48;

template <Nonlinearity a, class T, class V>
inline V activation(V z) {
    if constexpr (a == Nonlinearity::tanh) return tanh<T>(z);
    if constexpr (a == Nonlinearity::relu) return z < 0 ? V{} : z;  // NaN stays
    return z;
}

template <Nonlinearity a, class V>
inline V through_activation(V adjoint, V h) {
    if constexpr (a == Nonlinearity::tanh) return adjoint * (1 - h * h);
    if constexpr (a == Nonlinearity::relu) return h <= 0 ? V{} : adjoint;
    return adjoint;
}

template <class V, class T>
inline V clamp(V x, T low, T high) {
    const V raised = x < low ? broadcast<V>(low) : x;
    return raised > high ? broadcast<V>(high) : raised;  // NaN stays
}

// The linearized inverse of the activation, at h; that of relu is relu.
template <Nonlinearity a, class V, class T>
inline V through_inverse(V lambda, V h, T low, T high) {
    if constexpr (a != Nonlinearity::tanh) return through_activation<a>(lambda, h);
    const V clipped = clamp(h, low, high);
    return lambda / (1 - clipped * clipped);
}

}  // namespace tpk::TPK_ISA
