// Matrices in scratch memory: rows of whole vectors, and their transposition.
#pragma once

#include "gemm.h"

namespace tpk::TPK_ISA {

inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
inline ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

template <class T>
inline bool is_finite(const T* values, ptrdiff_t n) {
    constexpr ptrdiff_t L = lanes<T>;
    Vec<T> sums = {};  // of x · 0: NaN where any x is not finite
    ptrdiff_t i = 0;
    for (; i + L <= n; i += L) sums += load<Vec<T>>(values + i) * 0;
    T sum = 0;
    for (; i < n; ++i) sum += values[i] * 0;
    for (ptrdiff_t lane = 0; lane < L; ++lane) sum += sums[lane];
    return sum == 0;
}

inline double root(double x) { return __builtin_sqrt(x); }
inline float root(float x) { return __builtin_sqrtf(x); }

// A matrix in scratch memory: `columns` columns, a multiple of the vector, in rows `stride` apart. A stride of a
// multiple of 4096 bytes would put whole columns into the same few lines of the cache.
template <class T>
struct Rows {
    T* data;
    ptrdiff_t columns, stride;

    static ptrdiff_t stride_of(ptrdiff_t columns) {
        constexpr ptrdiff_t line = 64 / sizeof(T);
        return columns + (columns % (2 * line) == 0 ? line : 0);
    }
    Rows(T* memory, ptrdiff_t n) : Rows(memory, padded<T>(n), stride_of(padded<T>(n))) {}
    Rows(T* memory, ptrdiff_t width, ptrdiff_t row) : data(memory), columns(width), stride(row) {}
    T* operator[](ptrdiff_t i) const { return data + i * stride; }
    Right<T> from(ptrdiff_t row, ptrdiff_t column) const { return {data + row * stride + column, stride, lanes<T>}; }
};

#if defined(__GNUC__) && !defined(__clang__)
template <size_t Bytes>
struct Integer {
    typedef int32_t type;
};
template <>
struct Integer<8> {
    typedef int64_t type;
};

// Transposes a block of as many rows as a vector has lanes: exchanges its off-diagonal halves, then those of each
// quarter, and so on.
template <class T>
inline void transpose_block(const T* source, ptrdiff_t source_row, T* target, ptrdiff_t target_row) {
    constexpr int L = lanes<T>;
    typedef typename Vector<typename Integer<sizeof(T)>::type, L>::type Index;
    Vec<T> rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = load<Vec<T>>(source + i * source_row);
#pragma GCC unroll 4
    for (int half = L / 2; half > 0; half /= 2) {
        Index low, high;
        for (int lane = 0; lane < L; ++lane) {
            low[lane] = lane & half ? L + lane - half : lane;
            high[lane] = lane & half ? L + lane : lane + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
            if (i & half) continue;
            const Vec<T> a = rows[i], b = rows[i + half];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + half] = __builtin_shuffle(a, b, high);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(target + i * target_row, rows[i]);
}
#else
template <class T>
inline void transpose_block(const T* source, ptrdiff_t source_row, T* target, ptrdiff_t target_row) {
    for (ptrdiff_t i = 0; i < lanes<T>; ++i)
        for (ptrdiff_t j = 0; j < lanes<T>; ++j) target[j * target_row + i] = source[i * source_row + j];
}
#endif

// X = Wᵀ for the m × n elements of W, block by block.
template <class T>
void transpose(const Rows<T>& w, ptrdiff_t m, ptrdiff_t n, const Rows<T>& x) {
    constexpr ptrdiff_t L = lanes<T>;
    for (ptrdiff_t j = 0; j < m; j += L) {
        for (ptrdiff_t i = 0; i < n; i += L) {
            if (j + L <= m && i + L <= n)
                transpose_block(w[j] + i, w.stride, x[i] + j, x.stride);
            else
                for (ptrdiff_t k = i; k < smaller(i + L, n); ++k)
                    for (ptrdiff_t l = j; l < smaller(j + L, m); ++l) x[k][l] = w[l][k];
        }
    }
}

}  // namespace tpk::TPK_ISA
