// Products of small matrices: one register-blocked micro-kernel, and the loops around it.
//
// Every element of a result is one chain of fused multiply-adds in the order of k, whatever the block it falls in: a
// row's result does not depend on the rows beside it, nor on the number of threads.
#pragma once

#include "vector.h"

namespace tpk::TPK_ISA {

// Accumulators of a block (rows × vectors), chosen to fill the instruction set's registers.
constexpr int block_rows = TPK_BLOCK_ROWS;
constexpr int block_vectors = TPK_BLOCK_VECTORS;

enum class Into { store, subtract };

// C[i][j] (=, -=) Σ_k A[i·a_row + k·a_k] B[k·b_k + j] for R rows and V vectors of columns.
template <class T, int R, int V, Into into>
void multiply_block(const T* a, ptrdiff_t a_row, ptrdiff_t a_k, const T* b, ptrdiff_t b_k, ptrdiff_t k_size, T* c,
                    ptrdiff_t c_row) {
    using Lane = Vec<T>;
    constexpr int L = lanes<T>;
    Lane sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[i][v] = into == Into::store ? Lane{} : load<Lane>(c + i * c_row + v * L);
    for (ptrdiff_t k = 0; k < k_size; ++k) {
        Lane column[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) column[v] = load<Lane>(b + k * b_k + v * L);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Lane value = broadcast<Lane>(a[i * a_row + k * a_k]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) {
                if (into == Into::store)
                    sum[i][v] += value * column[v];
                else
                    sum[i][v] -= value * column[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(c + i * c_row + v * L, sum[i][v]);
}

template <class T>
using BlockFunction = void (*)(const T*, ptrdiff_t, ptrdiff_t, const T*, ptrdiff_t, ptrdiff_t, T*, ptrdiff_t);

// The micro-kernel for 1 … block_rows rows and 1 … block_vectors vectors.
template <class T, Into into, int R = block_rows, int V = block_vectors>
inline BlockFunction<T> block_function(int rows, int vectors) {
    if constexpr (R > 1) {
        if (rows < R) return block_function<T, into, R - 1, V>(rows, vectors);
    }
    if constexpr (V > 1) {
        if (vectors < V) return block_function<T, into, R, V - 1>(rows, vectors);
    }
    return multiply_block<T, R, V, into>;
}

inline ptrdiff_t divide_up(ptrdiff_t n, ptrdiff_t d) { return (n + d - 1) / d; }

template <class T>
inline ptrdiff_t padded(ptrdiff_t columns) {
    return divide_up(columns, lanes<T>) * lanes<T>;
}

// B: k_size rows of `padded` columns, at element [k][j] = b[k·b_k + j]; panel p of block_vectors vectors starts
// `b_panel` elements after panel p - 1. All rows of A pass over a panel while it is in the first-level cache.
template <class T, Into into>
void multiply(const T* a, ptrdiff_t a_row, ptrdiff_t a_k, ptrdiff_t rows, const T* b, ptrdiff_t b_k, ptrdiff_t b_panel,
              ptrdiff_t k_size, ptrdiff_t columns, T* c, ptrdiff_t c_row) {
    constexpr ptrdiff_t L = lanes<T>;
    const ptrdiff_t vectors = columns / L, row_blocks = divide_up(rows, block_rows);
    for (ptrdiff_t v = 0; v < vectors; v += block_vectors) {
        const int width = static_cast<int>(vectors - v < block_vectors ? vectors - v : block_vectors);
        const T* panel = b + v / block_vectors * b_panel;
        const ptrdiff_t stride = b_k != 0 ? b_k : width * L;
        for (ptrdiff_t block = 0; block < row_blocks; ++block) {  // rows split evenly: no block is a mere remainder
            const ptrdiff_t first = rows * block / row_blocks, last = rows * (block + 1) / row_blocks;
            block_function<T, into>(static_cast<int>(last - first), width)(a + first * a_row, a_row, a_k, panel, stride,
                                                                           k_size, c + first * c_row + v * L, c_row);
        }
    }
}

// A matrix [k][n] at source[k·k_stride + n·n_stride], packed in panels of block_vectors vectors of columns; a panel's
// rows lie one after another, and columns beyond n are zero. Takes k_size × padded(n) elements.
template <class T>
void pack(const T* source, ptrdiff_t k_stride, ptrdiff_t n_stride, ptrdiff_t k_size, ptrdiff_t n, T* packed) {
    const ptrdiff_t columns = padded<T>(n);
    for (ptrdiff_t first = 0; first < columns; first += block_vectors * lanes<T>) {
        const ptrdiff_t rest = columns - first,
                        width = rest < block_vectors * lanes<T> ? rest : block_vectors * lanes<T>;
        for (ptrdiff_t k = 0; k < k_size; ++k)
            for (ptrdiff_t j = first; j < first + width; ++j)
                *packed++ = j < n ? source[k * k_stride + j * n_stride] : T(0);
    }
}

// C = A · packed: A is [rows][k_size] with unit column stride, C is [rows][padded(n)].
template <class T>
inline void multiply_packed(const T* a, ptrdiff_t a_row, ptrdiff_t rows, const T* packed, ptrdiff_t k_size, ptrdiff_t n,
                            T* c, ptrdiff_t c_row) {
    multiply<T, Into::store>(a, a_row, 1, rows, packed, 0, k_size * block_vectors * lanes<T>, k_size, padded<T>(n), c,
                             c_row);
}

}  // namespace tpk::TPK_ISA
