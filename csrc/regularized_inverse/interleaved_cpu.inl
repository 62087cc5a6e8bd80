// Small matrices, as many at once as a vector has lanes: element (i, j) of all of them is one vector, so that no
// product, pivot or remainder is too short for one. Strides are in vectors.

#pragma once

#include "../common/matrix.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

template <class T>
struct Lanes {
    T* data;
    ptrdiff_t row, column;

    Vec<T> get(ptrdiff_t i, ptrdiff_t j) const { return load<Vec<T>>(data + (i * row + j * column) * lanes<T>); }
    void set(ptrdiff_t i, ptrdiff_t j, Vec<T> v) const { store(data + (i * row + j * column) * lanes<T>, v); }
    Lanes at(ptrdiff_t i, ptrdiff_t j) const { return {data + (i * row + j * column) * lanes<T>, row, column}; }
    Lanes transposed() const { return {data, column, row}; }
};

// Rows and columns of a block: its sums and what they are made of fit into the registers.
constexpr int interleaved_rows = TPK_REGISTERS >= 32 ? 4 : 3;

enum class Finish { nothing, lower, upper };

// out = in ± Σ_k A[k][i] B[k][j] for R × C elements, `in` being zero for Into::store; then solves with the R × R
// triangle of a factor U: with Uᵀ (lower) or U (upper), whose diagonal comes inverted.
template <class T, Into into, Finish finish, int R, int C>
void interleaved_block(Lanes<T> a, Lanes<T> b, ptrdiff_t k_size, Lanes<T> in, Lanes<T> out, Lanes<T> factor,
                       const T* inverse_diagonal) {
    Vec<T> sum[R][C];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[i][j] = into == Into::store ? Vec<T>{} : in.get(i, j);
    for (ptrdiff_t k = 0; k < k_size; ++k) {
        Vec<T> right[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) right[j] = b.get(k, j);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const Vec<T> left = a.get(k, i);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                if (into == Into::store)
                    sum[i][j] += left * right[j];
                else
                    sum[i][j] -= left * right[j];
            }
        }
    }
    if (finish != Finish::nothing) {
#pragma GCC unroll 4
        for (int step = 0; step < R; ++step) {
            const int i = finish == Finish::lower ? step : R - 1 - step;
            const auto scale = load<Vec<T>>(inverse_diagonal + i * lanes<T>);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) sum[i][j] *= scale;
#pragma GCC unroll 4
            for (int later = step + 1; later < R; ++later) {
                const int p = finish == Finish::lower ? later : R - 1 - later;
                const Vec<T> value = finish == Finish::lower ? factor.get(i, p) : factor.get(p, i);
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) sum[p][j] -= value * sum[i][j];
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) out.set(i, j, sum[i][j]);
}

template <class T>
using InterleavedFunction = void (*)(Lanes<T>, Lanes<T>, ptrdiff_t, Lanes<T>, Lanes<T>, Lanes<T>, const T*);

template <class T, Into into, Finish finish, int R = interleaved_rows, int C = interleaved_rows>
inline InterleavedFunction<T> interleaved_function(ptrdiff_t rows, ptrdiff_t columns) {
    if constexpr (R > 1) {
        if (rows < R) return interleaved_function<T, into, finish, R - 1, C>(rows, columns);
    }
    if constexpr (C > 1) {
        if (columns < C) return interleaved_function<T, into, finish, R, C - 1>(rows, columns);
    }
    return interleaved_block<T, into, finish, R, C>;
}

// The block of some rows over columns [first, end), block by block.
template <class T, Into into, Finish finish>
void interleaved_rows_of(Lanes<T> a, Lanes<T> b, ptrdiff_t k_size, ptrdiff_t rows, ptrdiff_t first, ptrdiff_t end,
                         Lanes<T> in, Lanes<T> out, Lanes<T> factor, const T* inverse_diagonal) {
    for (ptrdiff_t j = first; j < end; j += interleaved_rows) {
        const ptrdiff_t columns = smaller(interleaved_rows, end - j);
        interleaved_function<T, into, finish>(rows, columns)(a, b.at(0, j), k_size, in.at(0, j), out.at(0, j), factor,
                                                             inverse_diagonal);
    }
}

template <class T>
inline Vec<T> inverse_root(Vec<T> x) {
    T values[lanes<T>];
    store(values, x);
    for (int lane = 0; lane < lanes<T>; ++lane) values[lane] = 1 / root(values[lane]);
    return load<Vec<T>>(values);
}

// Factors a diagonal block of up to interleaved_rows rows in its upper triangle. A pivot that is not positive makes its
// lane infinite or NaN from there on.
template <class T>
void interleaved_factor(Lanes<T> block, ptrdiff_t rows, T* inverse_diagonal) {
    for (ptrdiff_t i = 0; i < rows; ++i) {
        const Vec<T> scale = inverse_root<T>(block.get(i, i));
        store(inverse_diagonal + i * lanes<T>, scale);
        for (ptrdiff_t j = i; j < rows; ++j) block.set(i, j, block.get(i, j) * scale);
        for (ptrdiff_t p = i + 1; p < rows; ++p)
            for (ptrdiff_t j = p; j < rows; ++j) block.set(p, j, block.get(p, j) - block.get(i, p) * block.get(i, j));
    }
}

// The distance of rows: one of a multiple of a kilobyte would put whole columns into the same few lines of the cache.
inline ptrdiff_t interleaved_row(ptrdiff_t columns) { return columns + (columns % 16 == 0 ? 1 : 0); }

// rows × columns elements of each of as many arrays as a vector has lanes, `stride` apart, to one vector each.
template <class T>
void interleave(const T* source, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, Lanes<T> target) {
    constexpr ptrdiff_t L = lanes<T>;
    if (target.row == columns) return interleave(source, stride, 1, rows * columns, Lanes<T>{target.data, 0, 1});
    for (ptrdiff_t i = 0; i < rows; ++i) {
        const T* from = source + i * columns;
        T* to = target.data + i * target.row * L;
        ptrdiff_t j = 0;
        for (; j + L <= columns; j += L) transpose_block(from + j, stride, to + j * L, L);
        for (; j < columns; ++j)
            for (ptrdiff_t lane = 0; lane < L; ++lane) to[j * L + lane] = from[lane * stride + j];
    }
}

template <class T>
void deinterleave(Lanes<T> source, ptrdiff_t rows, ptrdiff_t columns, T* target, ptrdiff_t stride) {
    constexpr ptrdiff_t L = lanes<T>;
    if (source.row == columns) return deinterleave(Lanes<T>{source.data, 0, 1}, 1, rows * columns, target, stride);
    for (ptrdiff_t i = 0; i < rows; ++i) {
        const T* from = source.data + i * source.row * L;
        T* to = target + i * columns;
        ptrdiff_t j = 0;
        for (; j + L <= columns; j += L) transpose_block(from + j * L, L, to + j, stride);
        for (; j < columns; ++j)
            for (ptrdiff_t lane = 0; lane < L; ++lane) to[lane * stride + j] = from[j * L + lane];
    }
}

template <class T>
inline ptrdiff_t interleaved_scratch(ptrdiff_t m, ptrdiff_t n) {
    return ((m + n) * interleaved_row(n) + n * interleaved_row(m) + n) * lanes<T>;
}

// Matrices [first, first + lanes) of the batch.
template <class T>
void solve_interleaved(const RegularizedSolve<T>& f, ptrdiff_t first, T* scratch) {
    constexpr ptrdiff_t L = lanes<T>;
    const ptrdiff_t m = f.m, n = f.n, elements = m * n;
    const Lanes<T> w = {scratch, interleaved_row(n), 1}, gram = {w.at(m, 0).data, w.row, 1},
                   x = {gram.at(n, 0).data, interleaved_row(m), 1};
    T* inverse_diagonal = x.at(n, 0).data;
    interleave(f.weight + first * elements, elements, m, n, w);
    if (f.rhs) interleave(f.rhs + first * elements, elements, n, m, x);
    const Lanes<T> rhs = f.rhs ? x : w.transposed();
    for (ptrdiff_t i = 0; i < n; i += interleaved_rows) {
        const ptrdiff_t rows = smaller(interleaved_rows, n - i);
        const Lanes<T> block = gram.at(i, i);
        interleaved_rows_of<T, Into::store, Finish::nothing>(w.at(0, i), w, m, rows, i, n, gram, gram.at(i, 0), block,
                                                             inverse_diagonal);
        for (ptrdiff_t p = 0; p < rows; ++p) block.set(p, p, block.get(p, p) + broadcast<Vec<T>>(f.reg));
        interleaved_rows_of<T, Into::subtract, Finish::nothing>(gram.at(0, i), gram, i, rows, i, i + rows,
                                                                gram.at(i, 0), gram.at(i, 0), block, inverse_diagonal);
        T* own = inverse_diagonal + i * L;
        interleaved_factor(block, rows, own);
        interleaved_rows_of<T, Into::subtract, Finish::lower>(gram.at(0, i), gram, i, rows, i + rows, n, gram.at(i, 0),
                                                              gram.at(i, 0), block, own);
        interleaved_rows_of<T, Into::subtract, Finish::lower>(gram.at(0, i), x, i, rows, 0, m, rhs.at(i, 0), x.at(i, 0),
                                                              block, own);
    }
    for (ptrdiff_t i = (n - 1) / interleaved_rows * interleaved_rows; i >= 0; i -= interleaved_rows) {
        const ptrdiff_t rows = smaller(interleaved_rows, n - i), end = i + rows;
        interleaved_rows_of<T, Into::subtract, Finish::upper>(gram.at(i, end).transposed(), x.at(end, 0), n - end, rows,
                                                              0, m, x.at(i, 0), x.at(i, 0), gram.at(i, i),
                                                              inverse_diagonal + i * L);
    }
    deinterleave(x, n, m, f.solved + first * elements, elements);
}

}  // namespace tpk::TPK_ISA
