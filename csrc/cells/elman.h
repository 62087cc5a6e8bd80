// h_t = a(u_t + W h_{t-1})
#pragma once

#include "../common/atanh.h"
#include "../common/tanh.h"
#include "../recurrence/call.h"
#include "cell.h"

namespace tpk::TPK_ISA {

template <Nonlinearity a>
struct Elman {
    static constexpr int gates = 1, states = 1, kept = 0;
    static constexpr bool passes_by = false, into_is_delta = true;
    static constexpr bool has(Inverse) { return true; }
    static constexpr Form form(Inverse inverse) { return {1, inverse == Inverse::direct, inverse == Inverse::direct}; }

    template <class T, class V>
    static Forward<Elman, V> forward(const Several<V, 1>& u, const Several<V, 1>& product, V, const Several<V, 1>&) {
        return {several(activation<T>(u[0] + product[0])), {}};
    }

    template <class T, class V>
    static Adjoint<Elman, V> back(const Several<V, 1>& mu, const Step<Elman, V>& step) {
        const V delta = through_activation(mu[0], step.after);
        return {several(delta), several(delta), V{}};
    }

    template <Inverse inverse, class T, class V>
    static Term<Elman, V> term(const Several<V, 1>& displacement, const Step<Elman, V>& step, T clip) {
        const T low = clip - 1, high = 1 - clip;
        const V lambda = displacement[0], h = step.after;
        if constexpr (inverse == Inverse::layer) return {several(through_inverse(lambda, h, low, high)), {}, V{}};
        if constexpr (inverse == Inverse::difference)
            return {several(inverse_difference<T>(lambda, h, low, high)), {}, V{}};
        if constexpr (inverse == Inverse::direct)
            return {several(step.u[0] - inverse_activation<T>(h - lambda, low, high)), step.before, broadcast<V>(T(1))};
        return {several(lambda), {}, V{}};
    }

    template <class T, class V>
    static Linear<Elman, V> linear(const Step<Elman, V>& step) {
        return {V{}, several(through_activation(broadcast<V>(T(1)), step.after))};
    }

private:
    template <class T, class V>
    static V activation(V z) {
        if constexpr (a == Nonlinearity::tanh) return tanh<T>(z);
        if constexpr (a == Nonlinearity::relu) return z < 0 ? V{} : z;  // NaN stays
        return z;
    }

    template <class V>
    static V through_activation(V adjoint, V h) {
        if constexpr (a == Nonlinearity::tanh) return adjoint * (1 - h * h);
        if constexpr (a == Nonlinearity::relu) return h <= 0 ? V{} : adjoint;
        return adjoint;
    }

    // The linearized inverse of the activation, at h; that of relu is relu.
    template <class V, class T>
    static V through_inverse(V lambda, V h, T low, T high) {
        if constexpr (a != Nonlinearity::tanh) return through_activation(lambda, h);
        const V clipped = clamp(h, low, high);
        return lambda / (1 - clipped * clipped);
    }

    // The inverse of the activation, at the target v; that of relu is relu.
    template <class T, class V>
    static V inverse_activation(V v, T low, T high) {
        if constexpr (a != Nonlinearity::tanh) return activation<T>(v);
        const V clipped = clamp(v, low, high);
        return atanh_difference<T>(clipped, V{}, clipped);
    }

    // The inverse of the activation at h less that at the target h - λ, however small λ is.
    template <class T, class V>
    static V inverse_difference(V lambda, V h, T low, T high) {
        if constexpr (a == Nonlinearity::identity) return lambda;
        if constexpr (a == Nonlinearity::relu) return h < lambda ? h : h == h ? lambda : h;  // h >= 0 or NaN
        const V target = h - lambda, from = clamp(h, low, high), to = clamp(target, low, high);
        const V exact = from == h ? lambda : from - to;
        return atanh_difference<T>(from, to, to == target ? exact : from - to);
    }
};

}  // namespace tpk::TPK_ISA
