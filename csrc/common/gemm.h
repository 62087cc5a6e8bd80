// Products of small matrices: one register-blocked micro-kernel, and the loops around it.
//
// Every element of a result is one chain of fused multiply-adds in the order of k, whatever the block it falls in: a
// row's result does not depend on the rows beside it, nor on the number of threads.
#pragma once

#include "vector.h"

namespace tpk::TPK_ISA {

// Rows of a block at most.
constexpr int block_rows = TPK_BLOCK_ROWS;

// Vectors of columns of a block of that many rows at most: the accumulators, a row of B and one element of A fill the
// registers.
constexpr int block_vectors(int rows) {
    const int fit = (TPK_REGISTERS - 1) / (rows + 1);
    return fit < 8 ? fit : 8;
}

enum class Into { store, add, subtract };

// The right-hand matrix: element (k, j) at data[k·row + j/L·vector + j%L], for vectors of L lanes. Columns are padded
// to whole vectors.
template <class T>
struct Right {
    const T* data;
    ptrdiff_t row, vector;
};

// C[i][j] (=, +=, -=) Σ_k A[i·a_row + k·a_k] B[k][j] for R rows and V vectors of columns.
template <class T, int R, int V, Into into>
void multiply_block(const T* a, ptrdiff_t a_row, ptrdiff_t a_k, Right<T> b, ptrdiff_t k_size, T* c, ptrdiff_t c_row) {
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
        for (int v = 0; v < V; ++v) column[v] = load<Lane>(b.data + k * b.row + v * b.vector);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Lane value = broadcast<Lane>(a[i * a_row + k * a_k]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) {
                if (into == Into::subtract)
                    sum[i][v] -= value * column[v];
                else
                    sum[i][v] += value * column[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(c + i * c_row + v * L, sum[i][v]);
}

template <class T>
using BlockFunction = void (*)(const T*, ptrdiff_t, ptrdiff_t, Right<T>, ptrdiff_t, T*, ptrdiff_t);

// The micro-kernel for 1 … block_rows rows and 1 … block_vectors(rows) vectors.
template <class T, Into into, int R = block_rows, int V = block_vectors(R)>
inline BlockFunction<T> block_function(int rows, int vectors) {
    if constexpr (R > 1) {
        if (rows < R) return block_function<T, into, R - 1>(rows, vectors);
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

// C (=, +=, -=) A B over `columns` columns, a multiple of the vector. Rows and vectors are split evenly, so that no
// block is a mere remainder; all rows of A pass over some vectors of B while these are in the first-level cache.
template <class T, Into into>
void multiply_panel(const T* a, ptrdiff_t a_row, ptrdiff_t a_k, ptrdiff_t rows, Right<T> b, ptrdiff_t k_size,
                    ptrdiff_t columns, T* c, ptrdiff_t c_row) {
    constexpr ptrdiff_t L = lanes<T>;
    const ptrdiff_t row_blocks = divide_up(rows, block_rows), vectors = columns / L;
    const ptrdiff_t groups = divide_up(vectors, block_vectors(static_cast<int>(divide_up(rows, row_blocks))));
    for (ptrdiff_t group = 0; group < groups; ++group) {
        const ptrdiff_t v = vectors * group / groups, width = vectors * (group + 1) / groups - v;
        const Right<T> part = {b.data + v * b.vector, b.row, b.vector};
        for (ptrdiff_t block = 0; block < row_blocks; ++block) {
            const ptrdiff_t first = rows * block / row_blocks, last = rows * (block + 1) / row_blocks;
            block_function<T, into>(static_cast<int>(last - first), static_cast<int>(width))(
                a + first * a_row, a_row, a_k, part, k_size, c + first * c_row + v * L, c_row);
        }
    }
}

// The same for matrices of any size: what a panel reads of A stays in the second-level cache.
template <class T, Into into>
void multiply(const T* a, ptrdiff_t a_row, ptrdiff_t a_k, ptrdiff_t rows, Right<T> b, ptrdiff_t k_size,
              ptrdiff_t columns, T* c, ptrdiff_t c_row) {
    constexpr ptrdiff_t most_k = 256, most_rows = 64;
    if (k_size <= most_k || rows < most_rows)
        return multiply_panel<T, into>(a, a_row, a_k, rows, b, k_size, columns, c, c_row);
    for (ptrdiff_t k = 0; k < k_size; k += most_k) {
        const ptrdiff_t size = k_size - k < most_k ? k_size - k : most_k;
        const Right<T> part = {b.data + k * b.row, b.row, b.vector};
        for (ptrdiff_t i = 0; i < rows; i += most_rows) {
            const ptrdiff_t count = rows - i < most_rows ? rows - i : most_rows;
            const T* left = a + i * a_row + k * a_k;
            if (k == 0)
                multiply_panel<T, into>(left, a_row, a_k, count, part, size, columns, c + i * c_row, c_row);
            else
                multiply_panel<T, into == Into::store ? Into::add : into>(left, a_row, a_k, count, part, size, columns,
                                                                          c + i * c_row, c_row);
        }
    }
}

// A right-hand matrix packed by vectors of columns: each vector's k_size rows lie one after another.
template <class T>
inline Right<T> packed_right(const T* packed, ptrdiff_t k_size) {
    return {packed, lanes<T>, k_size * lanes<T>};
}

// Packs the matrix [k][n] at source[k·k_stride + n·n_stride] so; columns beyond n are zero. Takes k_size × padded(n)
// elements, or, as some rows of a taller matrix, those rows of each of its vectors.
template <class T>
void pack(const T* source, ptrdiff_t k_stride, ptrdiff_t n_stride, ptrdiff_t k_size, ptrdiff_t n, T* packed,
          ptrdiff_t all_rows) {
    for (ptrdiff_t first = 0; first < padded<T>(n); first += lanes<T>) {
        T* row = packed + first * all_rows;
        for (ptrdiff_t k = 0; k < k_size; ++k)
            for (ptrdiff_t j = first; j < first + lanes<T>; ++j)
                *row++ = j < n ? source[k * k_stride + j * n_stride] : T(0);
    }
}

// C (=, +=, -=) A · packed: A is [rows][k_size] with unit column stride, C is [rows][padded(n)].
template <Into into = Into::store, class T>
inline void multiply_packed(const T* a, ptrdiff_t a_row, ptrdiff_t rows, const T* packed, ptrdiff_t k_size, ptrdiff_t n,
                            T* c, ptrdiff_t c_row) {
    multiply<T, into>(a, a_row, 1, rows, packed_right(packed, k_size), k_size, padded<T>(n), c, c_row);
}

}  // namespace tpk::TPK_ISA
