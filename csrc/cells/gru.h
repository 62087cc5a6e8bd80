// h_t = (1 - z) n + z h_{t-1} with r = σ(u_r + W_r h_{t-1}), z = σ(u_z + W_z h_{t-1}), n = tanh(u_n + r q) and
// q = W_n h_{t-1} + bias. Blocks of three are in the order r, z, n; r, z, n and q are kept.
#pragma once

#include "cell.h"
#include "gates.h"

namespace tpk::TPK_ISA {

struct Gru {
    static constexpr int gates = 3, states = 1, kept = 4;
    static constexpr bool passes_by = true, into_is_delta = false;
    static constexpr bool has(Inverse inverse) { return inverse != Inverse::difference && inverse != Inverse::direct; }
    static constexpr Form form(Inverse inverse) {
        return inverse == Inverse::weight ? Form{1, true, true} : Form{3, true, false};
    }

    template <class T, class V>
    static Forward<Gru, V> forward(const Several<V, 3>& u, const Several<V, 3>& product, V bias,
                                   const Several<V, 1>& before) {
        const V r = sigmoid<T>(u[0] + product[0]), z = sigmoid<T>(u[1] + product[1]), q = product[2] + bias;
        const V n = tanh<T>(u[2] + r * q);
        return {several(n + z * (before[0] - n)), several(r, z, n, q)};
    }

    template <class T, class V>
    static Adjoint<Gru, V> back(const Several<V, 1>& adjoint, const Step<Gru, V>& step) {
        const V mu = adjoint[0], r = step.kept[0], z = step.kept[1], n = step.kept[2], q = step.kept[3];
        const V of_n = (1 - z) * (1 - n * n) * mu, of_z = (step.before[0] - n) * z * (1 - z) * mu;
        const V of_r = of_n * q * r * (1 - r);
        return {several(of_r, of_z, of_n), several(of_r, of_z, r * of_n), z * mu};
    }

    // "weight" goes through n's block alone, "layer" through all three.
    template <Inverse inverse, class T, class V>
    static Term<Gru, V> term(const Several<V, 1>& displacement, const Step<Gru, V>& step, T clip) {
        const V lambda = displacement[0], r = step.kept[0], z = step.kept[1], n = step.kept[2], q = step.kept[3];
        if constexpr (inverse == Inverse::weight) {
            const V part = root_of(1 - z);
            return {several(part * r * lambda, V{}, V{}), several(z * lambda), part};
        }
        const T low = clip, high = 1 - clip;
        const V r_in = clamp(r, low, high), z_in = clamp(z, low, high);
        const V inner = (1 - z_in) * (1 - n * n) * lambda;
        const V of_r = q * inner / (r_in * (1 - r_in)), of_z = (step.before[0] - n) * lambda / (z_in * (1 - z_in));
        return {several(of_r, of_z, r_in * inner), several(lambda * z_in), V{}};
    }

    template <class T, class V>
    static Linear<Gru, V> linear(const Step<Gru, V>& step) {
        const V r = step.kept[0], z = step.kept[1], n = step.kept[2], q = step.kept[3];
        const V inner = (1 - z) * (1 - n * n);
        return {z, several(inner * q * r * (1 - r), (step.before[0] - n) * z * (1 - z), inner * r)};
    }
};

}  // namespace tpk::TPK_ISA
