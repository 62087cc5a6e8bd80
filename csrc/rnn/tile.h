// What happens to the elements of a tile of batch rows.
#pragma once

#include "../common/atanh.h"
#include "../common/tanh.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

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

// The linearized inverse of the activation, at h; that of relu is relu.
template <Nonlinearity a, class V, class T>
inline V through_inverse(V lambda, V h, T low, T high) {
    if constexpr (a != Nonlinearity::tanh) return through_activation<a>(lambda, h);
    const V clipped = clamp(h, low, high);
    return lambda / (1 - clipped * clipped);
}

// The inverse of the activation, at the target v; that of relu is relu.
template <Nonlinearity a, class T, class V>
inline V inverse_activation(V v, T low, T high) {
    if constexpr (a != Nonlinearity::tanh) return activation<a, T>(v);
    const V clipped = clamp(v, low, high);
    return atanh_difference<T>(clipped, V{}, clipped);
}

// The inverse of the activation at h less that at the target h - λ, however small λ is.
template <Nonlinearity a, class T, class V>
inline V inverse_difference(V lambda, V h, T low, T high) {
    if constexpr (a == Nonlinearity::identity) return lambda;
    if constexpr (a == Nonlinearity::relu) return h < lambda ? h : h == h ? lambda : h;  // h >= 0 or NaN
    const V target = h - lambda, from = clamp(h, low, high), to = clamp(target, low, high);
    const V exact = from == h ? lambda : from - to;
    return atanh_difference<T>(from, to, to == target ? exact : from - to);
}

}  // namespace tpk::TPK_ISA
