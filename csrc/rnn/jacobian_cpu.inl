// The regularized inverse of a layer's own linearization J = D W, for a tile of rows: (JᵀJ + rI)⁻¹ Jᵀ λ = Wᵀ D y with
// (D K D + rI) y = λ and K = W Wᵀ, by conjugate gradients. An iteration is one product of the tile with K.
//
// The diagonal d² K_jj + r preconditions: it evens out saturated units, and is all there is where W is orthogonal.
// Every row has scalars of its own and stops by itself, so that its result depends on no row beside it.

#include "../common/gemm.h"
#include "kernel.h"
#include "tile.h"

namespace tpk::TPK_ISA {

// K = W Wᵀ of one head.
template <class T>
struct Gram {
    const T* packed;
    const T* diagonal;  // padded with zeros
    bool finite;        // W is
    bool rounding;      // rounding errors may be as large as rtol: residuals have to be computed anew
};

// packed: [N][columns], diagonal: [columns]; scratch: 2 [N][columns].
template <class T>
Gram<T> gram_of(const T* weight, ptrdiff_t N, T reg, T rtol, T* packed, T* diagonal, T* scratch) {
    constexpr T epsilon = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);
    const ptrdiff_t columns = padded<T>(N);
    T *transposed = scratch, *gram = scratch + N * columns;
    pack(weight, 1, N, N, N, transposed);
    multiply_packed(weight, N, N, transposed, N, N, gram, columns);
    pack(gram, columns, 1, N, N, packed);
    T largest = 0, zero = 0;
    for (ptrdiff_t i = 0; i < N; ++i) {
        T sum = 0;
        for (ptrdiff_t j = 0; j < N; ++j) {
            sum += __builtin_fabs(gram[i * columns + j]);
            zero += 0 * weight[i * N + j];
        }
        largest = sum < largest ? largest : sum;
    }
    for (ptrdiff_t j = 0; j < columns; ++j) diagonal[j] = j < N ? gram[j * columns + j] : T(0);
    return {packed, diagonal, zero == 0, !(4 * epsilon * (largest + reg) <= rtol * reg)};
}

// A row of the tile while it is solved.
template <class T>
struct SolvedRow {
    T unit;         // a power of two: λ over it has a mean magnitude between 1 and 2
    T squared;      // of λ, in this unit, as are all residuals
    T goal, bound;  // squares of the residual at which to stop, and with which to be content
    T product;      // of the residual with the preconditioned one
    T residual;     // its square
    T checked;      // its square when last computed anew
    int iterations;
    enum { solved, active, given_up, not_finite } state;
};

constexpr ptrdiff_t jacobian_arrays = 7;  // in the scratch of solve_jacobian

template <class T>
inline void fill_row(T* row, ptrdiff_t columns, T value) {
    for (ptrdiff_t j = 0; j < columns; j += lanes<T>) store(row + j, broadcast<Vec<T>>(value));
}

// Replaces λ_t by D y. lambda: [rows][columns], zero beyond N; scratch: jacobian_arrays of that size, the first one
// zero beyond N when first called.
template <class T, Nonlinearity a>
void solve_jacobian(const RnnBackward<T>& f, const Gram<T>& gram, ptrdiff_t t, ptrdiff_t head, ptrdiff_t first,
                    ptrdiff_t rows, T* lambda, T* scratch) {
    using V = Vec<T>;
    constexpr ptrdiff_t L = lanes<T>;
    const ptrdiff_t N = f.N, row = f.H * N, columns = padded<T>(N), size = rows * columns;
    const int limit = static_cast<int>(4 * N + 50);
    const T reg = f.reg;
    T* const slope = scratch;          // d = a'(z_t)
    T* const inverted = slope + size;  // 1/(d² K_jj + r)
    T* const solution = inverted + size;
    T* const residual = solution + size;
    T* const direction = residual + size;
    T* const scaled = direction + size;  // what K multiplies
    T* const product = scaled + size;
    SolvedRow<T> states[largest_tile];
    ptrdiff_t active = 0;

    const T* h = f.h + (t * f.B + first) * row + head * N;
    for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
        using W = decltype(zero);
        store(slope + i * columns + j, through_activation<a>(broadcast<W>(T(1)), load<W>(h + i * row + j)));
    });

    // A direction from the preconditioned residual alone.
    const auto restart = [=](ptrdiff_t i) {
        for (ptrdiff_t j = i * columns; j < (i + 1) * columns; j += L) {
            const V p = load<V>(inverted + j) * load<V>(residual + j);
            store(direction + j, p);
            store(scaled + j, load<V>(slope + j) * p);
        }
    };

    for (ptrdiff_t i = 0; i < rows; ++i) {
        SolvedRow<T>& s = states[i];
        const ptrdiff_t begin = i * columns, end = begin + columns;
        V means = {};
        for (ptrdiff_t j = begin; j < end; j += L) {
            const V x = load<V>(lambda + j);
            means += (x < 0 ? -x : x) * (1 / static_cast<T>(N)) + 0 * load<V>(slope + j);
        }
        const T mean = sum<T>(means);
        s.iterations = 0;
        s.squared = s.residual = 0;
        s.unit = 1;
        s.state = gram.finite && mean - mean == 0 ? SolvedRow<T>::solved : SolvedRow<T>::not_finite;
        fill_row(solution + begin, columns, T(0));
        fill_row(scaled + begin, columns, T(0));
        if (s.state == SolvedRow<T>::not_finite || mean == 0) continue;
        int exponent;
        __builtin_frexp(static_cast<double>(mean), &exponent);
        const int most = sizeof(T) == 4 ? 126 : 1022;  // the unit's inverse is no denormal number
        exponent = exponent - 1 < most ? exponent - 1 : most;
        s.unit = static_cast<T>(__builtin_ldexp(1.0, exponent));
        const T inverse_unit = static_cast<T>(__builtin_ldexp(1.0, -exponent));
        V squares = {}, products = {};
        for (ptrdiff_t j = begin; j < end; j += L) {
            const V x = load<V>(lambda + j) * inverse_unit, d = load<V>(slope + j);
            const V m = 1 / (d * d * load<V>(gram.diagonal + (j - begin)) + reg);
            store(lambda + j, x);
            store(residual + j, x);
            store(inverted + j, m);
            squares += x * x;
            products += m * x * x;
        }
        restart(i);
        s.squared = s.checked = sum<T>(squares);
        s.product = sum<T>(products);
        s.bound = f.rtol * f.rtol * s.squared;
        s.goal = gram.rounding ? s.bound / 4 : s.bound;
        s.state = SolvedRow<T>::active;
        ++active;
    }

    while (active > 0) {
        while (active > 0) {
            multiply_packed(scaled, columns, rows, gram.packed, N, N, product, columns);
            for (ptrdiff_t i = 0; i < rows; ++i) {
                SolvedRow<T>& s = states[i];
                if (s.state != SolvedRow<T>::active) continue;
                const ptrdiff_t begin = i * columns, end = begin + columns;
                V curvatures = {};
                for (ptrdiff_t j = begin; j < end; j += L) {
                    const V p = load<V>(direction + j), q = load<V>(slope + j) * load<V>(product + j) + reg * p;
                    store(product + j, q);
                    curvatures += p * q;
                }
                const T curvature = sum<T>(curvatures), alpha = s.product / curvature;
                ++s.iterations;
                if (!(curvature > 0 && alpha > 0)) {  // not positive definite in this precision
                    s.state = SolvedRow<T>::given_up;
                    --active;
                    continue;
                }
                V squares = {}, products = {};
                for (ptrdiff_t j = begin; j < end; j += L) {
                    store(solution + j, load<V>(solution + j) + alpha * load<V>(direction + j));
                    const V r = load<V>(residual + j) - alpha * load<V>(product + j);
                    store(residual + j, r);
                    squares += r * r;
                    products += load<V>(inverted + j) * r * r;
                }
                s.residual = sum<T>(squares);
                if (s.residual <= s.goal || s.iterations >= limit) {
                    s.state = s.residual <= s.goal ? SolvedRow<T>::solved : SolvedRow<T>::given_up;
                    --active;
                    continue;
                }
                const T before = s.product;
                s.product = sum<T>(products);
                const T beta = s.product / before;
                for (ptrdiff_t j = begin; j < end; j += L) {
                    const V p = load<V>(inverted + j) * load<V>(residual + j) + beta * load<V>(direction + j);
                    store(direction + j, p);
                    store(scaled + j, load<V>(slope + j) * p);
                }
            }
        }
        if (!gram.rounding) break;
        // The residuals anew; where rounding errors have run away from the recursion, on from there.
        for (ptrdiff_t j = 0; j < size; j += L) store(scaled + j, load<V>(slope + j) * load<V>(solution + j));
        multiply_packed(scaled, columns, rows, gram.packed, N, N, product, columns);
        for (ptrdiff_t i = 0; i < rows; ++i) {
            SolvedRow<T>& s = states[i];
            if (s.state != SolvedRow<T>::solved || s.residual == 0 || s.checked <= s.bound) continue;
            V squares = {}, products = {};
            for (ptrdiff_t j = i * columns; j < (i + 1) * columns; j += L) {
                const V r =
                    load<V>(lambda + j) - load<V>(slope + j) * load<V>(product + j) - reg * load<V>(solution + j);
                store(residual + j, r);
                squares += r * r;
                products += load<V>(inverted + j) * r * r;
            }
            s.residual = sum<T>(squares);
            s.product = sum<T>(products);
            const bool stuck = !(s.residual <= s.checked / 4);
            s.checked = s.residual;
            if (s.residual <= s.bound) continue;
            s.state = stuck ? SolvedRow<T>::given_up : SolvedRow<T>::active;
            if (stuck) continue;
            restart(i);
            ++active;
        }
    }

    for (ptrdiff_t i = 0; i < rows; ++i) {
        const SolvedRow<T>& s = states[i];
        if (f.iterations) f.iterations[(t * f.B + first + i) * f.H + head] = s.iterations;
        if (s.state == SolvedRow<T>::given_up) {
            const double missed = __builtin_sqrt(static_cast<double>(s.residual) / static_cast<double>(s.squared));
            const Unsolved found = {missed == missed ? missed : __builtin_inf(), f.first + t, first + i, head};
#pragma omp critical
            if (found.residual > f.unsolved->residual) *f.unsolved = found;
        }
        if (s.state == SolvedRow<T>::not_finite) fill_row(lambda + i * columns, columns, T(__builtin_nan("")));
        if (s.state == SolvedRow<T>::not_finite) continue;
        for (ptrdiff_t j = i * columns; j < (i + 1) * columns; j += L)
            store(lambda + j, load<V>(slope + j) * load<V>(solution + j) * s.unit);
    }
}

}  // namespace tpk::TPK_ISA
