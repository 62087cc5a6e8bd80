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

// Calls f(zero vector, first column) so that vectors cover columns 0 … n-1. Where n is no multiple of the vector, the
// last two overlap: f must not read what it writes.
template <class T, class F>
inline void for_columns(ptrdiff_t n, F f) {
    constexpr int full = lanes<T>;
    if (n >= full) {
        ptrdiff_t i = 0;
        for (; i + full <= n; i += full) f(Vec<T>{}, i);
        if (i < n) f(Vec<T>{}, n - full);
    } else if (n >= 4 && full > 4) {
        ptrdiff_t i = 0;
        for (; i + 4 <= n; i += 4) f(Vec<T, 4>{}, i);
        if (i < n) f(Vec<T, 4>{}, n - 4);
    } else {
        for (ptrdiff_t i = 0; i < n; ++i) f(Vec<T, 1>{}, i);
    }
}

}  // namespace tpk::TPK_ISA
