// The regularized polar factor of float matrices, one thread a matrix.
//
// P = A^{-1/2} Wᵀ with A = WᵀW + rI. With A scaled to eigenvalues in [l², 1], rational steps G ← f(G)² G,
// f(G) = (b/c) I + (a - b/c) (I + c G)⁻¹, raise the lower end l fastest when a, b and c are chosen from it (the
// dynamically weighted Halley iteration); once G is near the identity, a short series of G^{-1/2} ends it. The
// condition number of A is the square of that of [W; √r I], which double precision can afford and float could not:
// steps are in double until G is well-conditioned. Everything n × n is a function of A: symmetric, commuting, and
// computed as an upper triangle.

#include "../common/matrix.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

// Lower ends l below which double precision cannot tell A from a singular matrix, from which float will do, and from
// which the series is exact to 1e-9: a bias of a unit in the last place would show after a thousand products with P.
// From the first of them, four steps lead to the last.
constexpr double least_end = 1e-8, well_conditioned = 0.2, near_one = 0.94;

// C = AᵀB, known to be symmetric, for A and B of k rows and n columns. C has whole vectors of rows too.
// `triangular`: A and B are zero above their diagonals, and so are the first terms of each column's sums.
template <class T>
void multiply_symmetric(const Rows<T>& a, const Rows<T>& b, ptrdiff_t k, ptrdiff_t n, const Rows<T>& c,
                        bool triangular = false) {
    constexpr ptrdiff_t L = lanes<T>;
    for (ptrdiff_t first = 0; first < n; first += L) {
        for (ptrdiff_t column = first, width; column < c.columns; column += width) {
            width = triangular ? smaller(4 * L, c.columns - column) : c.columns - column;
            const ptrdiff_t from = triangular ? smaller(column, k) : 0;
            multiply<T, Into::store>(a[from] + first, 1, a.stride, smaller(L, n - first), b.from(from, column),
                                     k - from, width, c[first] + column, c.stride);
        }
        for (ptrdiff_t column = first + L; column < c.columns; column += L)  // mirrored square by square
            transpose_block(c[first] + column, c.stride, c[column] + first, c.stride);
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

// Functions of one symmetric matrix with eigenvalues in [l², 1]: the matrix, the product of the factors applied to it,
// and what a step computes in between.
template <class T>
struct PolarChain {
    ptrdiff_t n;
    Rows<T> gram, factor, inverse, square, spare;
    int steps = 0;  // the factor means nothing before the first

    static ptrdiff_t size(ptrdiff_t n) { return 5 * padded<T>(n) * Rows<T>::stride_of(padded<T>(n)); }
    PolarChain(T* memory, ptrdiff_t order)
        : n(order),
          gram(memory, n),
          factor(gram[padded<T>(n)], n),
          inverse(factor[padded<T>(n)], n),
          square(inverse[padded<T>(n)], n),
          spare(square[padded<T>(n)], n) {}

    // Applies a factor to the product of those before.
    void append(Rows<T>& next) {
        if (steps++ > 0) {
            multiply_symmetric(factor, next, n, n, spare);
            exchange(factor, spare);
        } else {
            exchange(factor, next);
        }
    }

    // Steps until l >= enough. False: not numerically positive definite.
    bool raise(double& l, double enough) {
        using V = Vec<T>;
        while (l < enough) {
            const HalleyStep step(l);
            const double alpha = step.b / step.c, beta = step.a - alpha;
            for_vectors(gram, n, [&](ptrdiff_t i, ptrdiff_t j) {
                store(square[i] + j, load<V>(gram[i] + j) * static_cast<T>(step.c));
            });
            add_to_diagonal(square, n, 1);
            T* inverse_diagonal = inverse[0];  // not needed any more once the inverse is written
            if (!cholesky(square, n, inverse_diagonal)) return false;
            invert_factor(square, n, inverse_diagonal, spare);
            multiply_symmetric(spare, spare, n, n, inverse, true);  // M = (I + cG)⁻¹
            multiply_symmetric(inverse, inverse, n, n, square);
            // f² G from M and M² alone, since M G = (I - M)/c.
            const double linear = 2 * alpha * beta / step.c, quadratic = beta * beta / step.c;
            const T kept = static_cast<T>(alpha * alpha), once = static_cast<T>(quadratic - linear),
                    twice = static_cast<T>(quadratic), scale = static_cast<T>(beta);
            for_vectors(gram, n, [&](ptrdiff_t i, ptrdiff_t j) {
                const V m = load<V>(inverse[i] + j);
                store(gram[i] + j, kept * load<V>(gram[i] + j) + once * m - twice * load<V>(square[i] + j));
                store(inverse[i] + j, scale * m);
            });
            add_to_diagonal(gram, n, linear);
            add_to_diagonal(inverse, n, alpha);
            append(inverse);
            l = step.raised;
        }
        return true;
    }

    // Appends G^{-1/2} by the series of (I + E)^{-1/2} around the middle of [near_one, 1]. False: G is not there, or
    // NaN.
    bool finish(double l) {
        using V = Vec<T>;
        const double centre = __builtin_round(2048 / (1 + l)) / 1024;  // few bits: nothing is lost in its square
        const T scale = static_cast<T>(centre * centre), last = static_cast<T>(centre);
        for_vectors(gram, n, [&](ptrdiff_t i, ptrdiff_t j) { store(gram[i] + j, load<V>(gram[i] + j) * scale); });
        add_to_diagonal(gram, n, -1);
        if (!(frobenius_norm(gram, n) < 0.07 * root(static_cast<double>(n)))) return false;
        // -E/2 + E² (3/8 - 5/16 E + E² (35/128 - 63/256 E + 231/1024 E²))
        multiply_symmetric(gram, gram, n, n, square);
        for_vectors(inverse, n, [&](ptrdiff_t i, ptrdiff_t j) {
            store(inverse[i] + j, load<V>(square[i] + j) * T(231.0 / 1024) - load<V>(gram[i] + j) * T(63.0 / 256));
        });
        add_to_diagonal(inverse, n, 35.0 / 128);
        multiply_symmetric(square, inverse, n, n, spare);
        for_vectors(inverse, n, [&](ptrdiff_t i, ptrdiff_t j) {
            store(inverse[i] + j, load<V>(spare[i] + j) - load<V>(gram[i] + j) * T(5.0 / 16));
        });
        add_to_diagonal(inverse, n, 3.0 / 8);
        multiply_symmetric(square, inverse, n, n, spare);
        for_vectors(inverse, n, [&](ptrdiff_t i, ptrdiff_t j) {
            store(inverse[i] + j, (load<V>(spare[i] + j) - load<V>(gram[i] + j) * T(0.5)) * last);
        });
        add_to_diagonal(inverse, n, centre);
        append(inverse);
        return true;
    }

private:
    static void exchange(Rows<T>& a, Rows<T>& b) {
        const Rows<T> c = a;
        a = b;
        b = c;
    }
};

// The scratch memory of one matrix, in doubles. A small footprint is time: it comes from a far cache at each call.
struct PolarScratch {
    ptrdiff_t w, chain, start;

    PolarScratch(ptrdiff_t m, ptrdiff_t n)
        : w(m * larger(Rows<double>::stride_of(padded<double>(n)), Rows<float>::stride_of(padded<float>(n)) / 2)),
          chain(larger(PolarChain<double>::size(n),
                       PolarChain<double>::size(n) / 5 + PolarChain<float>::size(n) / 2 + 1)),
          start((m * Rows<float>::stride_of(padded<float>(n)) + 1) / 2) {}
    ptrdiff_t size() const { return w + chain + start; }
};

// False: too ill-conditioned.
inline bool polar_matrix(const float* weight, double reg, ptrdiff_t m, ptrdiff_t n, double* scratch, float* polar) {
    const PolarScratch part(m, n);
    const Rows<double> w(scratch, n);
    PolarChain<double> wide(scratch + part.w, n);
    const Rows<float> start(reinterpret_cast<float*>(scratch + part.w + part.chain), n);

    convert(Rows<const float>{weight, n, n}, m, n, w, 1);
    multiply_symmetric(w, w, m, n, wide.gram);
    add_to_diagonal(wide.gram, n, reg);
    const double shrink = 1 / (1.001 * frobenius_norm(wide.gram, n)), root_shrink = root(shrink);
    convert(wide.gram, n, n, wide.gram, shrink);
    double l = root(reg * shrink);
    if (l < least_end || !wide.raise(l, well_conditioned)) return false;
    if (wide.steps == 0) convert(w, m, n, start, root_shrink);
    const ptrdiff_t most_rows = smaller(16, padded<double>(n));  // that a spare matrix has room for
    for (ptrdiff_t first = 0; first < m && wide.steps > 0; first += most_rows) {
        const ptrdiff_t rows = smaller(most_rows, m - first);
        multiply<double, Into::store>(w[first], w.stride, 1, rows, wide.factor.from(0, 0), n, wide.spare.columns,
                                      wide.spare[0], wide.spare.stride);
        convert(wide.spare, rows, n, Rows<float>{start[first], start.columns, start.stride}, root_shrink);
    }

    PolarChain<float> chain(reinterpret_cast<float*>(wide.gram[padded<double>(n)]), n);  // over all but G
    convert(wide.gram, n, n, chain.gram, 1);
    if (!chain.raise(l, near_one) || !chain.finish(l)) return false;
    const Rows<float> result(reinterpret_cast<float*>(w[0]), n);  // over W
    multiply<float, Into::store>(start[0], start.stride, 1, m, chain.factor.from(0, 0), n, result.columns, result[0],
                                 result.stride);
    transpose(result, m, n, Rows<float>{polar, m, m});
    return true;
}

// False: no memory for the scratch.
inline bool regularized_polar(const RegularizedPolar& f) {
    if (f.batch == 0) return true;
    const int threads = static_cast<int>(smaller(f.batch, f.threads));
    const ptrdiff_t size = PolarScratch(f.m, f.n).size(), elements = f.m * f.n;
    Scratch<double> scratch(threads * size);
    if (!scratch) return false;
#pragma omp parallel num_threads(threads)
    {
        const int number = thread_number(), count = thread_count();  // of threads, which may be fewer than asked for
        for (ptrdiff_t index = f.batch * number / count; index < f.batch * (number + 1) / count; ++index) {
            const float* weight = f.weight + index * elements;
            float* polar = f.polar + index * elements;
            // Data that is not finite is not a failure of the iteration: NaN flows through.
            const bool finite = is_finite(weight, elements);
            const bool done = finite && polar_matrix(weight, f.reg, f.m, f.n, scratch.get() + number * size, polar);
            f.failed[index] = finite && !done;
            for (ptrdiff_t i = 0; i < elements && !done; ++i) polar[i] = __builtin_nanf("");
        }
    }
    return true;
}

}  // namespace tpk::TPK_ISA
