// The regularized polar factor of float matrices, one thread a matrix.
//
// P = A^{-1/2} Wᵀ with A = WᵀW + rI. With A scaled to eigenvalues in [l², 1], rational steps G ← f(G)² G,
// f(G) = (b/c) I + (a - b/c) (I + c G)⁻¹, raise the lower end l fastest when a, b and c are chosen from it (the
// dynamically weighted Halley iteration); once G is near the identity, a short series of G^{-1/2} ends it. All but the
// series, which is a small correction, is in double precision: the condition number of A is the square of that of [W;
// √r I], and a P whose gains are biased by a unit in float's last place would show it after a thousand products.
// Everything n × n is a function of A: symmetric, commuting, and computed as an upper triangle.

#include "../common/interrupt.h"
#include "../common/matrix.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

// Lower ends l below which double precision cannot tell A from a singular matrix, and from which the series is exact to
// 1e-9. From the first of them, four steps lead to the last.
constexpr double least_end = 1e-8, near_one = 0.94;

// C = AᵀB, known to be symmetric, for A and B of k rows and n columns. C has whole vectors of rows too.
// `triangular`: A and B are zero above their diagonals, and so are the first terms of each column's sums.
template <class T>
void multiply_symmetric(const Rows<T>& a, const Rows<T>& b, ptrdiff_t k, ptrdiff_t n, const Rows<T>& c,
                        bool triangular = false) {
    constexpr ptrdiff_t L = lanes<T>;
    // Rows at a time, from the diagonal of the first on: few waste little, many read less from afar.
    const ptrdiff_t strip = n > 256 ? outer_rows : L;
    for (ptrdiff_t first = 0; first < n; first += strip) {
        if (interrupted()) return;
        const ptrdiff_t rows = smaller(strip, n - first);
        for (ptrdiff_t column = first, width; column < c.columns; column += width) {
            width = triangular ? smaller(4 * L, c.columns - column) : c.columns - column;
            const ptrdiff_t from = triangular ? smaller(column, k) : 0;
            multiply<T, Into::store>(a[from] + first, 1, a.stride, rows, b.from(from, column), k - from, width,
                                     c[first] + column, c.stride);
        }
        for (ptrdiff_t row = first; row < first + rows; row += L)  // mirrored square by square
            for (ptrdiff_t column = first + strip; column < c.columns; column += L)
                transpose_block(c[row] + column, c.stride, c[column] + row, c.stride);
    }
}

// f(row, first column) for every vector of n rows.
template <class T, class F>
void for_vectors(const Rows<T>& x, ptrdiff_t n, F f) {
    for (ptrdiff_t i = 0; i < n; ++i)
        for (ptrdiff_t j = 0; j < x.columns; j += lanes<T>) f(i, j);
}

template <class T>
double frobenius_norm(const Rows<T>& x, ptrdiff_t n) {
    Vec<T> sums = {};
    for_vectors(x, n, [&](ptrdiff_t i, ptrdiff_t j) {
        const auto values = load<Vec<T>>(x[i] + j);
        sums += values * values;
    });
    double sum = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) sum += sums[lane];
    return root(sum);
}

// n rows and columns, elements beyond them zero.
template <class From, class To>
void convert(const Rows<From>& source, ptrdiff_t rows, ptrdiff_t n, const Rows<To>& target, double scale) {
    for (ptrdiff_t i = 0; i < rows; ++i) {
        for (ptrdiff_t j = 0; j < n; ++j) target[i][j] = static_cast<To>(source[i][j] * scale);
        for (ptrdiff_t j = n; j < target.columns; ++j) target[i][j] = 0;
    }
}

template <class T>
void add_to_diagonal(const Rows<T>& x, ptrdiff_t n, double value) {
    for (ptrdiff_t i = 0; i < n; ++i) x[i][i] += static_cast<T>(value);
}

// The rational step that maps [l, 1] closest to 1, and the new lower end.
struct HalleyStep {
    double a, b, c, raised;

    explicit HalleyStep(double l) {
        const double square = l * l, d = __builtin_cbrt(4 * (1 - square) / (square * square)), s = root(1 + d);
        a = s + root(8 - 4 * d + 8 * (2 - square) / (square * s)) / 2;
        b = (a - 1) * (a - 1) / 4;
        c = a + b - 1;
        raised = l * (a + b * square) / (1 + c * square);
    }
};

// n × n matrices in a row of scratch memory.
template <class T>
struct Squares {
    T* memory;
    ptrdiff_t n;

    static ptrdiff_t size(ptrdiff_t n) { return padded<T>(n) * Rows<T>::stride_of(padded<T>(n)); }
    Rows<T> operator[](int index) const { return Rows<T>(memory + index * size(n), n); }
};

// The matrix, the product of the factors applied to it, and what a step computes in between.
struct PolarChain {
    ptrdiff_t n;
    Rows<double> gram, factor, inverse, square, spare;
    int steps = 0;  // the factor means nothing before the first

    static constexpr int matrices = 5;
    explicit PolarChain(const Squares<double>& scratch)
        : n(scratch.n),
          gram(scratch[0]),
          factor(scratch[1]),
          inverse(scratch[2]),
          square(scratch[3]),
          spare(scratch[4]) {}

    // Steps until l >= near_one. False: not numerically positive definite, or interrupted.
    bool raise(double& l) {
        using V = Vec<double>;
        while (l < near_one) {
            if (interrupted()) return false;
            const HalleyStep step(l);
            const double alpha = step.b / step.c, beta = step.a - alpha;
            for_vectors(gram, n,
                        [&](ptrdiff_t i, ptrdiff_t j) { store(square[i] + j, load<V>(gram[i] + j) * step.c); });
            add_to_diagonal(square, n, 1);
            double* inverse_diagonal = inverse[0];  // not needed any more once the inverse is written
            if (!cholesky(square, n, inverse_diagonal)) return false;
            invert_factor(square, n, inverse_diagonal, spare);
            multiply_symmetric(spare, spare, n, n, inverse, true);  // M = (I + cG)⁻¹
            multiply_symmetric(inverse, inverse, n, n, square);
            // f² G from M and M² alone, since M G = (I - M)/c.
            const double linear = 2 * alpha * beta / step.c, quadratic = beta * beta / step.c;
            for_vectors(gram, n, [&](ptrdiff_t i, ptrdiff_t j) {
                const V m = load<V>(inverse[i] + j);
                store(gram[i] + j, alpha * alpha * load<V>(gram[i] + j) + (quadratic - linear) * m -
                                       quadratic * load<V>(square[i] + j));
                store(inverse[i] + j, beta * m);
            });
            add_to_diagonal(gram, n, linear);
            add_to_diagonal(inverse, n, alpha);
            if (steps++ > 0) {
                multiply_symmetric(factor, inverse, n, n, spare);
                exchange(factor, spare);
            } else {
                exchange(factor, inverse);
            }
            l = step.raised;
        }
        return true;
    }

private:
    static void exchange(Rows<double>& a, Rows<double>& b) {
        const Rows<double> c = a;
        a = b;
        b = c;
    }
};

// (I + E)^{-1/2} - I = -E/2 + E² (3/8 - 5/16 E + E² (35/128 - 63/256 E + 231/1024 E²))
inline void inverse_root_series(const Rows<float>& e, ptrdiff_t n, const Rows<float>& square, const Rows<float>& inner,
                                const Rows<float>& result) {
    using V = Vec<float>;
    multiply_symmetric(e, e, n, n, square);
    for_vectors(inner, n, [&](ptrdiff_t i, ptrdiff_t j) {
        store(inner[i] + j, load<V>(square[i] + j) * (231.0f / 1024) - load<V>(e[i] + j) * (63.0f / 256));
    });
    add_to_diagonal(inner, n, 35.0 / 128);
    multiply_symmetric(square, inner, n, n, result);
    for_vectors(inner, n, [&](ptrdiff_t i, ptrdiff_t j) {
        store(inner[i] + j, load<V>(result[i] + j) - load<V>(e[i] + j) * (5.0f / 16));
    });
    add_to_diagonal(inner, n, 3.0 / 8);
    multiply_symmetric(square, inner, n, n, result);
    for_vectors(result, n, [&](ptrdiff_t i, ptrdiff_t j) {
        store(result[i] + j, load<V>(result[i] + j) - load<V>(e[i] + j) * 0.5f);
    });
}

// Rows of Pᵀ that are computed before they are transposed into P.
constexpr ptrdiff_t rows_at_once = 16;

// One matrix's scratch memory, in doubles: W, the chain, and the series in float.
struct PolarScratch {
    static constexpr int series = 4;
    ptrdiff_t w, chain, rest;

    PolarScratch(ptrdiff_t m, ptrdiff_t n)
        : w(m * Rows<double>::stride_of(padded<double>(n))),
          chain(PolarChain::matrices * Squares<double>::size(n)),
          rest(series * Squares<float>::size(n) / 2 + 1 + rows_at_once * Rows<double>::stride_of(padded<double>(n))) {}
    ptrdiff_t size() const { return w + chain + rest; }
};

// False: too ill-conditioned.
inline bool polar_matrix(const float* weight, double reg, ptrdiff_t m, ptrdiff_t n, double* scratch, float* polar) {
    const PolarScratch part(m, n);
    const Rows<double> w(scratch, n), rows(scratch + part.w + part.chain, n);
    PolarChain chain(Squares<double>{scratch + part.w, n});
    const Squares<float> single = {reinterpret_cast<float*>(rows[rows_at_once]), n};

    convert(Rows<const float>{weight, n, n}, m, n, w, 1);
    multiply_symmetric(w, w, m, n, chain.gram);
    add_to_diagonal(chain.gram, n, reg);
    const double shrink = 1 / (1.001 * frobenius_norm(chain.gram, n));
    convert(chain.gram, n, n, chain.gram, shrink);
    double l = root(reg * shrink);
    if (l < least_end || !chain.raise(l)) return false;

    // Around the middle of what is left, G = centre⁻² (I + E).
    const double centre = 2 / (1 + l), scale = centre * root(shrink);
    convert(chain.gram, n, n, chain.gram, centre * centre);
    add_to_diagonal(chain.gram, n, -1);
    if (!(frobenius_norm(chain.gram, n) < 0.07 * root(static_cast<double>(n)))) return false;  // not there, or NaN
    const Rows<float> e = single[0], correction = single[3];
    convert(chain.gram, n, n, e, 1);
    inverse_root_series(e, n, single[1], single[2], correction);
    Rows<float> factor = single[1], change = correction;  // of the factor, by the series
    if (chain.steps > 0) {
        convert(chain.factor, n, n, factor, 1);
        multiply_symmetric(factor, correction, n, n, e);
        change = e;
    }
    for (ptrdiff_t i = 0; i < n; ++i) {
        for (ptrdiff_t j = 0; j < n; ++j) {
            const double before = chain.steps > 0 ? chain.factor[i][j] : i == j;
            chain.factor[i][j] = (before + change[i][j]) * scale;
        }
        for (ptrdiff_t j = n; j < chain.factor.columns; ++j) chain.factor[i][j] = 0;
    }
    const Rows<float> narrow(single.memory, n);  // over the series, whose four matrices have 16 rows at least
    for (ptrdiff_t first = 0; first < m; first += rows_at_once) {  // Pᵀ = W A^{-1/2}
        const ptrdiff_t count = smaller(rows_at_once, m - first);
        multiply<double, Into::store>(w[first], w.stride, 1, count, chain.factor.from(0, 0), n, rows.columns, rows[0],
                                      rows.stride);
        convert(rows, count, n, narrow, 1);
        transpose(narrow, count, n, Rows<float>{polar + first, count, m});
    }
    return true;
}

// False: no memory for the scratch.
inline bool regularized_polar(const RegularizedPolar& f) {
    if (f.batch == 0) return true;
    const int threads = static_cast<int>(smaller(f.batch, f.threads));
    const ptrdiff_t size = PolarScratch(f.m, f.n).size(), elements = f.m * f.n;
    Scratch<double> scratch(threads * size);
    if (!scratch) return false;
    Interruptible* const call = running_call();
#pragma omp parallel num_threads(threads)
    {
        Listener here(call);
        const int number = thread_number(), count = thread_count();  // of threads, which may be fewer than asked for
        const int place = count - 1 - number;  // of its share: the largest for the thread that listens for Ctrl-C
        for (ptrdiff_t index = f.batch * place / count; index < f.batch * (place + 1) / count; ++index) {
            if (interrupted()) break;
            const float* weight = f.weight + index * elements;
            float* polar = f.polar + index * elements;
            // Data that is not finite is not a failure of the iteration: NaN flows through.
            const bool finite = is_finite(weight, elements);
            const bool done = finite && polar_matrix(weight, f.reg, f.m, f.n, scratch.get() + number * size, polar);
            if (interrupted()) break;
            f.failed[index] = finite && !done;
            for (ptrdiff_t i = 0; i < elements && !done; ++i) polar[i] = __builtin_nanf("");
        }
    }
    return true;
}

}  // namespace tpk::TPK_ISA
