// The regularized polar factor, one thread a matrix, by matrix products only.
//
// P is the transpose of the upper block of the polar factor of X = [W; √r I], whose singular values are at least √r.
// X p(XᵀX) has the singular values σ p(σ²); minimax.h has the p that bring them nearest to 1. The lower block stays a
// polynomial of WᵀW, and so does everything n × n here: symmetric, and computed as an upper triangle.

#include "../common/gemm.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "kernel.h"
#include "minimax.h"

namespace tpk::TPK_ISA {

// Steps at most that only raise the small singular values: each does so at least fourfold.
constexpr int most_raising_steps = 12;

// C = AᵀB, known to be symmetric, for A and B of k rows and n columns. C has whole vectors of rows too.
template <class T>
void multiply_symmetric(const Rows<T>& a, const Rows<T>& b, ptrdiff_t k, ptrdiff_t n, const Rows<T>& c) {
    constexpr ptrdiff_t L = lanes<T>;
    for (ptrdiff_t first = 0; first < n; first += L) {
        multiply<T, Into::store>(a[0] + first, 1, a.stride, smaller(L, n - first), b.from(0, first), k,
                                 c.columns - first, c[first] + first, c.stride);
        for (ptrdiff_t column = first + L; column < c.columns; column += L)  // mirrored square by square
            transpose_block(c[first] + column, c.stride, c[column] + first, c.stride);
    }
}

// f(element, first column) for every vector of n rows.
template <class T, class F>
void for_vectors(const Rows<T>& x, ptrdiff_t n, F f) {
    for (ptrdiff_t i = 0; i < n; ++i)
        for (ptrdiff_t j = 0; j < x.columns; j += lanes<T>) f(i, j);
}

template <class T>
double squared_norm(const Rows<T>& x, ptrdiff_t n) {
    Vec<T> sums = {};
    for_vectors(x, n, [&](ptrdiff_t i, ptrdiff_t j) {
        const auto values = load<Vec<T>>(x[i] + j);
        sums += values * values;
    });
    double sum = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) sum += sums[lane];
    return sum;
}

template <class T>
T largest_magnitude(const T* values, ptrdiff_t n) {
    T largest = 0;
    for (ptrdiff_t i = 0; i < n; ++i) {
        const T size = values[i] < 0 ? -values[i] : values[i];
        largest = size > largest ? size : largest;
    }
    return largest;
}

// The largest power of two that does not exceed x > 0.
inline double power_of_two(double x) {
    int exponent;
    __builtin_frexp(x, &exponent);
    return __builtin_ldexp(1.0, exponent - 1);
}

template <class T>
inline ptrdiff_t polar_scratch(ptrdiff_t m, ptrdiff_t n) {
    const ptrdiff_t columns = padded<T>(n);
    return (2 * (m + columns) + 4 * columns) * Rows<T>::stride_of(columns);
}

// False: too ill-conditioned.
template <class T>
bool polar_matrix(const T* weight, T reg, ptrdiff_t m, ptrdiff_t n, T* scratch, T* polar) {
    const Minimax* const table = minimax<T>;
    Rows<T> x(scratch, n), next(x[m + padded<T>(n)], n);
    const Rows<T> gram(next[m + padded<T>(n)], n), square(gram[padded<T>(n)], n), factor(square[padded<T>(n)], n),
        p(factor[padded<T>(n)], n);
    // P of sW and s²r is that of W and r: no square overflows.
    const double root_reg = root(static_cast<double>(reg)), largest = largest_magnitude(weight, m * n);
    const T scale = static_cast<T>(1 / power_of_two(largest > root_reg ? largest : root_reg));
    const double least = root_reg * scale;
    for (ptrdiff_t i = 0; i < m; ++i) {
        for (ptrdiff_t j = 0; j < n; ++j) x[i][j] = weight[i * n + j] * scale;
        for (ptrdiff_t j = n; j < x.columns; ++j) x[i][j] = 0;
    }
    multiply_symmetric(x, x, m, n, gram);
    for (ptrdiff_t i = 0; i < n; ++i) gram[i][i] += static_cast<T>(least * least);
    multiply_symmetric(gram, gram, n, n, square);
    // ‖X‖₂ ≤ ‖(XᵀX)²‖^{1/4} in the Frobenius norm, and a little more for rounding errors.
    const double most = 1.001 * root(root(root(squared_norm(square, n))));

    // The last row whose interval holds all singular values, after scaling; before the first one, steps that raise
    // them.
    int row = 0;
    while (row + 1 < minimax_rows && least * (1 + table[row + 1].extent) >= most * (1 - table[row + 1].extent)) ++row;
    const double start = (1 + table[row].extent) / most;
    int raising = 0;
    for (double bound = least * start; bound < 1 - table[row].extent; ++raising) {
        if (raising == most_raising_steps) return false;
        const double h = bound * bound - table[row].centre;
        const double* c = table[row].coefficients;
        bound *= c[0] + h * (c[1] + h * (c[2] + h * (c[3] + h * c[4])));
    }
    for_vectors(gram, n, [&](ptrdiff_t i, ptrdiff_t j) {
        store(gram[i] + j, load<Vec<T>>(gram[i] + j) * static_cast<T>(start * start));
    });

    for (int step = 0, steps = raising + minimax_rows - row; step < steps; ++step) {
        const Minimax& minimum = table[step < raising ? row : row + step - raising];
        const double factor_scale = step == 0 ? start : 1;
        const auto coefficient = [&](int j) { return static_cast<T>(minimum.coefficients[j] * factor_scale); };
        const T c0 = coefficient(0), c1 = coefficient(1), c2 = coefficient(2), c3 = coefficient(3), c4 = coefficient(4);
        const bool last = step == steps - 1;
        if (step > 0) multiply_symmetric(x, x, m + n, n, gram);
        for (ptrdiff_t i = 0; i < n; ++i) gram[i][i] -= static_cast<T>(minimum.centre);
        multiply_symmetric(gram, gram, n, n, square);
        // What did not converge would be about 1 away from the centre. NaN is not below either.
        if (last && !(squared_norm(square, n) < 0.0625)) return false;
        for_vectors(factor, n, [&](ptrdiff_t i, ptrdiff_t j) {
            store(factor[i] + j, c3 * load<Vec<T>>(gram[i] + j) + c4 * load<Vec<T>>(square[i] + j));
        });
        for (ptrdiff_t i = 0; i < n; ++i) factor[i][i] += c2;
        multiply_symmetric(factor, square, n, n, p);
        for_vectors(p, n, [&](ptrdiff_t i, ptrdiff_t j) {
            store(p[i] + j, load<Vec<T>>(p[i] + j) + c1 * load<Vec<T>>(gram[i] + j));
        });
        for (ptrdiff_t i = 0; i < n; ++i) p[i][i] += c0;
        multiply<T, Into::store>(x[0], x.stride, 1, m, p.from(0, 0), n, p.columns, next[0], next.stride);
        const Rows<T> lower(x[m], n), next_lower(next[m], n);
        if (step == 0) {  // of √r I
            for_vectors(p, n, [&](ptrdiff_t i, ptrdiff_t j) {
                store(next_lower[i] + j, load<Vec<T>>(p[i] + j) * static_cast<T>(least));
            });
        } else if (!last) {
            multiply_symmetric(lower, p, n, n, next_lower);
        }
        const Rows<T> previous = x;
        x = next;
        next = previous;
    }
    transpose(x, m, n, Rows<T>{polar, m, m});
    return true;
}

// False: no memory for the scratch.
template <class T>
bool regularized_polar(const RegularizedPolar<T>& f) {
    if (f.batch == 0) return true;
    const int threads = static_cast<int>(smaller(f.batch, f.threads));
    const ptrdiff_t size = polar_scratch<T>(f.m, f.n), elements = f.m * f.n;
    Scratch<T> scratch(threads * size);
    if (!scratch) return false;
#pragma omp parallel num_threads(threads)
    {
        const int number = thread_number(), count = thread_count();  // of threads, which may be fewer than asked for
        for (ptrdiff_t index = f.batch * number / count; index < f.batch * (number + 1) / count; ++index) {
            const T* weight = f.weight + index * elements;
            T* polar = f.polar + index * elements;
            // Data that is not finite is not a failure of the iteration: NaN flows through.
            const bool finite = is_finite(weight, elements);
            const bool done = finite && polar_matrix(weight, f.reg, f.m, f.n, scratch.get() + number * size, polar);
            f.failed[index] = finite && !done;
            for (ptrdiff_t i = 0; i < elements && !done; ++i) polar[i] = T(__builtin_nan(""));
        }
    }
    return true;
}

}  // namespace tpk::TPK_ISA
