// One thread a matrix: Gram matrix, Cholesky factor and two triangular solves, all by the blocked micro-kernel of
// gemm.h. Rows are padded to whole vectors, so that no product has a remainder.

#include "../common/gemm.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

template <class T>
inline bool is_finite(const T* values, ptrdiff_t n) {
    T sum = 0;
    for (ptrdiff_t i = 0; i < n; ++i) sum += values[i] * 0;  // NaN if any is not finite
    return sum == 0;
}

// y[j] -= factor · x[j] and y[j] *= factor, over whole vectors.
template <class T>
inline void subtract_row(T* y, const T* x, T factor, ptrdiff_t first, ptrdiff_t columns) {
    for (ptrdiff_t j = first; j < columns; j += lanes<T>)
        store(y + j, load<Vec<T>>(y + j) - factor * load<Vec<T>>(x + j));
}

template <class T>
inline void scale_row(T* y, T factor, ptrdiff_t first, ptrdiff_t columns) {
    for (ptrdiff_t j = first; j < columns; j += lanes<T>) store(y + j, load<Vec<T>>(y + j) * factor);
}

inline double root(double x) { return __builtin_sqrt(x); }
inline float root(float x) { return __builtin_sqrtf(x); }

// G = UᵀU in place, in the upper triangle, `columns` apart; inverse_diagonal[i] = 1/U[i][i]. False: a pivot is not
// positive.
template <class T>
bool cholesky(T* gram, ptrdiff_t n, ptrdiff_t columns, T* inverse_diagonal) {
    for (ptrdiff_t first = 0; first < n; first += block_rows) {
        const ptrdiff_t rows = n - first < block_rows ? n - first : block_rows;
        const ptrdiff_t start = first / lanes<T> * lanes<T>;  // the vector that holds the block's first column
        // Rows of the block less what the rows above contribute; only columns from the diagonal on are used.
        multiply<T, Into::subtract>(gram + first, 1, columns, rows, gram + start, columns, block_vectors * lanes<T>,
                                    first, columns - start, gram + first * columns + start, columns);
        for (ptrdiff_t i = first; i < first + rows; ++i) {
            T* row = gram + i * columns;
            for (ptrdiff_t p = first; p < i; ++p)
                subtract_row(row, gram + p * columns, gram[p * columns + i], start, columns);
            const T pivot = row[i];
            if (!(pivot > 0)) return false;  // NaN too
            const T scale = 1 / root(pivot);
            scale_row(row, scale, start, columns);
            inverse_diagonal[i] = scale;
        }
    }
    return true;
}

// UᵀU X = B in place; X has `columns` columns.
template <class T>
void solve(const T* factor, ptrdiff_t n, ptrdiff_t stride, const T* inverse_diagonal, T* x, ptrdiff_t columns) {
    const ptrdiff_t panel = block_vectors * lanes<T>;
    for (ptrdiff_t first = 0; first < n; first += block_rows) {
        const ptrdiff_t rows = n - first < block_rows ? n - first : block_rows;
        multiply<T, Into::subtract>(factor + first, 1, stride, rows, x, columns, panel, first, columns,
                                    x + first * columns, columns);
        for (ptrdiff_t i = first; i < first + rows; ++i) {
            for (ptrdiff_t p = first; p < i; ++p)
                subtract_row(x + i * columns, x + p * columns, factor[p * stride + i], 0, columns);
            scale_row(x + i * columns, inverse_diagonal[i], 0, columns);
        }
    }
    for (ptrdiff_t end = n; end > 0;) {
        const ptrdiff_t first = (end - 1) / block_rows * block_rows;
        multiply<T, Into::subtract>(factor + first * stride + end, stride, 1, end - first, x + end * columns, columns,
                                    panel, n - end, columns, x + first * columns, columns);
        for (ptrdiff_t i = end - 1; i >= first; --i) {
            for (ptrdiff_t p = i + 1; p < end; ++p)
                subtract_row(x + i * columns, x + p * columns, factor[i * stride + p], 0, columns);
            scale_row(x + i * columns, inverse_diagonal[i], 0, columns);
        }
        end = first;
    }
}

// Elements of scratch that one matrix takes.
template <class T>
inline ptrdiff_t solve_scratch(ptrdiff_t m, ptrdiff_t n) {
    return (m + n) * padded<T>(n) + n * padded<T>(m) + padded<T>(n);
}

template <class T>
void solve_matrix(const RegularizedSolve<T>& f, ptrdiff_t index, T* scratch) {
    const ptrdiff_t m = f.m, n = f.n, columns = padded<T>(n), rhs_columns = padded<T>(m);
    const T* weight = f.weight + index * m * n;
    T* packed = scratch;
    T* gram = packed + m * columns;
    T* x = gram + n * columns;
    T* inverse_diagonal = x + n * rhs_columns;
    pack(weight, n, 1, m, n, packed);
    multiply<T, Into::store>(weight, 1, n, n, packed, 0, m * block_vectors * lanes<T>, m, columns, gram, columns);
    for (ptrdiff_t i = 0; i < n; ++i) gram[i * columns + i] += f.reg;
    for (ptrdiff_t i = 0; i < n; ++i)
        for (ptrdiff_t j = 0; j < rhs_columns; ++j)
            x[i * rhs_columns + j] = j >= m ? T(0) : f.rhs ? f.rhs[(index * n + i) * m + j] : weight[j * n + i];
    bool solved = cholesky(gram, n, columns, inverse_diagonal);
    if (solved) {
        solve(gram, n, columns, inverse_diagonal, x, rhs_columns);
        solved = is_finite(x, n * rhs_columns);
    }
    // Data that is not finite is not a failure of the factorization: NaN flows through.
    f.failed[index] = !solved && is_finite(weight, m * n) && (!f.rhs || is_finite(f.rhs + index * n * m, n * m));
    T* out = f.solved + index * n * m;
    for (ptrdiff_t i = 0; i < n; ++i)
        for (ptrdiff_t j = 0; j < m; ++j) out[i * m + j] = solved ? x[i * rhs_columns + j] : T(__builtin_nan(""));
}

// False: no memory for the scratch.
template <class T>
bool regularized_solve(const RegularizedSolve<T>& f) {
    if (f.batch == 0) return true;
    const int threads = static_cast<int>(f.batch < f.threads ? f.batch : f.threads);
    const ptrdiff_t size = solve_scratch<T>(f.m, f.n);
    Scratch<T> scratch(threads * size);
    if (!scratch) return false;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t index = 0; index < f.batch; ++index) solve_matrix(f, index, scratch.get() + thread_number() * size);
    return true;
}

}  // namespace tpk::TPK_ISA
