// c_t = f c_{t-1} + i g and h_t = o tanh(c_t) with i, f, o = σ(u + W h_{t-1}) and g = tanh(u_g + W_g h_{t-1}). Blocks
// of four are in the order i, f, g, o; they and c are kept.
#pragma once

#include "cell.h"
#include "gates.h"

namespace tpk::TPK_ISA {

struct Lstm {
    static constexpr int gates = 4, states = 2, kept = 5;
    static constexpr bool passes_by = true, into_is_delta = true;
    static constexpr bool has(Inverse inverse) {
        return inverse == Inverse::none || inverse == Inverse::identity || inverse == Inverse::weight;
    }
    static constexpr Form form(Inverse) { return {1, false, true}; }

    template <class T, class V>
    static Forward<Lstm, V> forward(const Several<V, 4>& u, const Several<V, 4>& product, V,
                                    const Several<V, 2>& before) {
        const V i = sigmoid<T>(u[0] + product[0]), f = sigmoid<T>(u[1] + product[1]);
        const V g = tanh<T>(u[2] + product[2]), o = sigmoid<T>(u[3] + product[3]);
        const V c = f * before[1] + i * g;
        return {several(o * tanh<T>(c), c), several(i, f, g, o, c)};
    }

    template <class T, class V>
    static Adjoint<Lstm, V> back(const Several<V, 2>& mu, const Step<Lstm, V>& step) {
        const V i = step.kept[0], f = step.kept[1], g = step.kept[2], o = step.kept[3];
        const V tanh_c = tanh<T>(step.kept[4]);
        const V of_c = mu[1] + o * (1 - tanh_c * tanh_c) * mu[0];
        const auto delta = several(g * i * (1 - i) * of_c, step.before[1] * f * (1 - f) * of_c, i * (1 - g * g) * of_c,
                                   tanh_c * o * (1 - o) * mu[0]);
        return {delta, delta, f * of_c};
    }

    // "weight": through g's block alone.
    template <Inverse inverse, class T, class V>
    static Term<Lstm, V> term(const Several<V, 2>& lambda, const Step<Lstm, V>& step, T) {
        const V i = step.kept[0], f = step.kept[1], o = step.kept[3];
        const V of_c = lambda[1] + o * lambda[0], sum = i + f;
        const V most = sum > 1 ? sum : broadcast<V>(T(1));
        const V part = root_of(i / most);
        return {several(part * of_c, V{}, V{}, V{}), several(V{}, f / most * of_c), part};
    }
};

}  // namespace tpk::TPK_ISA
