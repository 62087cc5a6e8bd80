// Vectors of the instruction set this file is compiled for, in GCC/Clang vector extensions.
//
// Files under csrc that end in .inl, and the headers they include, are compiled once per instruction set, each time in
// a namespace of its own (TPK_ISA). They include no C++ standard header: an inline function of one, compiled for
// AVX-512, could be the copy the linker keeps for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tpk::TPK_ISA {

template <class T, int Lanes>
struct Vector {
    typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
    typedef T unaligned __attribute__((vector_size(Lanes * sizeof(T)), aligned(alignof(T)), may_alias));
};

// Lanes of a full vector.
template <class T>
constexpr int lanes = TPK_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T, int L = lanes<T>>
using Vec = typename Vector<T, L>::type;

template <class V, class T>
inline V load(const T* p) {
    return *reinterpret_cast<const typename Vector<T, sizeof(V) / sizeof(T)>::unaligned*>(p);
}

template <class V, class T>
inline void store(T* p, V v) {
    *reinterpret_cast<typename Vector<T, sizeof(V) / sizeof(T)>::unaligned*>(p) = v;
}

// x in every lane. x - 0 is x for every x, which the compiler knows; 0 + x is not, for x = -0.
template <class V, class T>
inline V broadcast(T x) {
    return x - V{};
}

template <class V, class T>
inline V clamp(V x, T low, T high) {
    const V raised = x < low ? broadcast<V>(low) : x;
    return raised > high ? broadcast<V>(high) : raised;  // NaN stays
}

// Sum of the lanes, by halves.
template <class T, class V>
inline T sum(V v) {
    constexpr int half = sizeof(V) / sizeof(T) / 2;
    if constexpr (half == 0) {
        return v[0];
    } else {
        T values[2 * half];
        store(values, v);
        return sum<T>(load<Vec<T, half>>(values) + load<Vec<T, half>>(values + half));
    }
}

// Calls f(zero vector, row, first column) so that vectors cover rows × n elements. Where n is no multiple of the
// vector, the last two of a row overlap: f must not read what it writes.
template <class T, class F>
inline void for_elements(ptrdiff_t rows, ptrdiff_t n, F f) {
    constexpr int full = lanes<T>;
    if (n >= full) {
        for (ptrdiff_t i = 0; i < rows; ++i) {
            ptrdiff_t j = 0;
            for (; j + full <= n; j += full) f(Vec<T>{}, i, j);
            if (j < n) f(Vec<T>{}, i, n - full);
        }
    } else if (n >= 4 && full > 4) {
        for (ptrdiff_t i = 0; i < rows; ++i) {
            ptrdiff_t j = 0;
            for (; j + 4 <= n; j += 4) f(Vec<T, 4>{}, i, j);
            if (j < n) f(Vec<T, 4>{}, i, n - 4);
        }
    } else {
        for (ptrdiff_t i = 0; i < rows; ++i)
            for (ptrdiff_t j = 0; j < n; ++j) f(Vec<T, 1>{}, i, j);
    }
}

}  // namespace tpk::TPK_ISA
