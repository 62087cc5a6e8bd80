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
    pack(weight, 1, N, N, N, transposed, N);
    multiply_packed(weight, N, N, transposed, N, N, gram, columns);
    pack(gram, columns, 1, N, N, packed, N);
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

// Of one row of the tile. Residuals are counted in its unit.
template <class T>
struct SolvedRow {
    T unit = 1;             // a power of two: λ over it has a mean magnitude between 1 and 2
    T squared = 0;          // of λ
    T goal = 0, bound = 0;  // squares of the residual at which to stop, and with which to be content
    T product = 0;          // of the residual with the preconditioned one
    T turn = 0;             // by how much that changed in the last step
    T residual = 0;         // its square
    T checked = 0;          // its square when last computed anew
    int iterations = 0;
    enum { solved, given_up, not_finite } state = solved;
};

// Solves for a tile of rows, step by step back in time.
template <class T>
class JacobianSolver {
public:
    static constexpr ptrdiff_t arrays = 7;  // of [rows][columns], in its scratch

    // scratch: zero.
    JacobianSolver(const RnnBackward<T>& f, const Gram<T>& gram, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows,
                   T* scratch)
        : f_(f), gram_(gram), head_(head), first_(first), rows_(rows), columns_(padded<T>(f.N)) {
        T** const all[arrays] = {&slope_, &inverted_, &solution_, &residual_, &direction_, &scaled_, &product_};
        for (ptrdiff_t k = 0; k < arrays; ++k) *all[k] = scratch + k * rows * columns_;
    }

    // Replaces λ_t by D y. lambda: [rows][columns], zero beyond N.
    template <Nonlinearity a>
    void solve(ptrdiff_t t, T* lambda) {
        const ptrdiff_t row = f_.H * f_.N, columns = columns_;
        const T* h = f_.h + (t * f_.B + first_) * row + head_ * f_.N;
        T* slope = slope_;
        for_elements<T>(rows_, f_.N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using W = decltype(zero);
            store(slope + i * columns + j, through_activation<a>(broadcast<W>(T(1)), load<W>(h + i * row + j)));
        });
        active_ = 0;
        for (ptrdiff_t i = 0; i < rows_; ++i) start(i, lambda + i * columns);
        iterate();
        while (gram_.rounding && check(lambda)) iterate();
        for (ptrdiff_t i = 0; i < rows_; ++i) finish(i, t, lambda + i * columns);
    }

private:
    using V = Vec<T>;
    static constexpr ptrdiff_t L = lanes<T>;
    using Row = SolvedRow<T>;

    void fill(T* row, T value) {
        for (ptrdiff_t j = 0; j < columns_; j += L) store(row + j, broadcast<V>(value));
    }

    // f(column, element of row i) for every vector of that row.
    template <class F>
    void for_row(ptrdiff_t i, F f) {
        for (ptrdiff_t j = 0; j < columns_; j += L) f(j, i * columns_ + j);
    }

    // Row i takes part in the next product, with a direction from its preconditioned residual alone.
    void activate(ptrdiff_t i) {
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V p = load<V>(inverted_ + at) * load<V>(residual_ + at);
            store(direction_ + at, p);
            store(scaled_ + active_ * columns_ + j, load<V>(slope_ + at) * p);
        });
        order_[active_++] = i;
    }

    void start(ptrdiff_t i, T* lambda) {
        Row& s = states_[i];
        V means = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V x = load<V>(lambda + j);
            means += (x < 0 ? -x : x) * (1 / static_cast<T>(f_.N)) + 0 * load<V>(slope_ + at);
        });
        const T mean = sum<T>(means);
        s = {};
        if (!gram_.finite || mean - mean != 0) s.state = Row::not_finite;
        fill(solution_ + i * columns_, 0);
        if (s.state == Row::not_finite || mean == 0) return;
        int exponent;
        __builtin_frexp(static_cast<double>(mean), &exponent);
        const int most = sizeof(T) == 4 ? 126 : 1022;  // the unit's inverse is no denormal number
        exponent = exponent - 1 < most ? exponent - 1 : most;
        s.unit = static_cast<T>(__builtin_ldexp(1.0, exponent));
        const T inverse_unit = static_cast<T>(__builtin_ldexp(1.0, -exponent)), reg = f_.reg;
        V squares = {}, products = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V x = load<V>(lambda + j) * inverse_unit, d = load<V>(slope_ + at);
            const V m = 1 / (d * d * load<V>(gram_.diagonal + j) + reg);
            store(lambda + j, x);
            store(residual_ + at, x);
            store(inverted_ + at, m);
            squares += x * x;
            products += m * x * x;
        });
        s.squared = s.residual = s.checked = sum<T>(squares);
        s.product = sum<T>(products);
        s.bound = f_.rtol * f_.rtol * s.squared;
        s.goal = gram_.rounding ? s.bound / 4 : s.bound;
        activate(i);
    }

    // Until every active row has reached its goal or gives up. Those that go on are kept together, in order_ and in
    // scaled_: only they are multiplied.
    void iterate() {
        const int limit = static_cast<int>(4 * f_.N + 50);
        while (active_ > 0) {
            multiply_packed(scaled_, columns_, active_, gram_.packed, f_.N, f_.N, product_, columns_);
            ptrdiff_t kept = 0;
            for (ptrdiff_t k = 0; k < active_; ++k) {
                const ptrdiff_t i = order_[k];
                Row& s = states_[i];
                if (!step(i, product_ + k * columns_)) {
                    s.state = Row::given_up;  // not positive definite in this precision
                } else if (s.residual <= s.goal) {
                    s.state = Row::solved;
                } else if (s.iterations >= limit) {
                    s.state = Row::given_up;
                } else {
                    turn(i, scaled_ + kept * columns_);
                    order_[kept++] = i;
                }
            }
            active_ = kept;
        }
    }

    // A step along the direction p, given K D p. False: there is none.
    bool step(ptrdiff_t i, T* product) {
        Row& s = states_[i];
        const T reg = f_.reg;
        V curvatures = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V p = load<V>(direction_ + at), q = load<V>(slope_ + at) * load<V>(product + j) + reg * p;
            store(product + j, q);
            curvatures += p * q;
        });
        const T curvature = sum<T>(curvatures), alpha = s.product / curvature;
        ++s.iterations;
        if (!(curvature > 0 && alpha > 0)) return false;
        V squares = {}, products = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            store(solution_ + at, load<V>(solution_ + at) + alpha * load<V>(direction_ + at));
            const V r = load<V>(residual_ + at) - alpha * load<V>(product + j);
            store(residual_ + at, r);
            squares += r * r;
            products += load<V>(inverted_ + at) * r * r;
        });
        s.residual = sum<T>(squares);
        const T before = s.product;
        s.product = sum<T>(products);
        s.turn = s.product / before;
        return true;
    }

    // The next direction, and what K multiplies of it.
    void turn(ptrdiff_t i, T* scaled) {
        const T beta = states_[i].turn;
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V p = load<V>(inverted_ + at) * load<V>(residual_ + at) + beta * load<V>(direction_ + at);
            store(direction_ + at, p);
            store(scaled + j, load<V>(slope_ + at) * p);
        });
    }

    // Computes the residuals of solved rows anew. Where rounding errors have run away from the recursion, the row is
    // active again, or gives up where that did not help before. True: there are active rows.
    bool check(const T* lambda) {
        ptrdiff_t count = 0;
        for (ptrdiff_t i = 0; i < rows_; ++i) {
            if (states_[i].state != Row::solved || states_[i].checked <= states_[i].bound) continue;
            for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
                store(scaled_ + count * columns_ + j, load<V>(slope_ + at) * load<V>(solution_ + at));
            });
            order_[count++] = i;
        }
        if (count == 0) return false;
        multiply_packed(scaled_, columns_, count, gram_.packed, f_.N, f_.N, product_, columns_);
        const T reg = f_.reg;
        for (ptrdiff_t k = 0; k < count; ++k) {
            const ptrdiff_t i = order_[k];
            Row& s = states_[i];
            V squares = {}, products = {};
            for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
                const V r = load<V>(lambda + at) - load<V>(slope_ + at) * load<V>(product_ + k * columns_ + j) -
                            reg * load<V>(solution_ + at);
                store(residual_ + at, r);
                squares += r * r;
                products += load<V>(inverted_ + at) * r * r;
            });
            s.residual = sum<T>(squares);
            s.product = sum<T>(products);
            const bool nearer = s.residual <= s.checked / 4;
            s.checked = s.residual;
            if (s.residual <= s.bound) continue;
            if (nearer)
                activate(i);
            else
                s.state = Row::given_up;
        }
        return active_ > 0;
    }

    void finish(ptrdiff_t i, ptrdiff_t t, T* lambda) {
        const Row& s = states_[i];
        if (f_.iterations) f_.iterations[(t * f_.B + first_ + i) * f_.H + head_] = s.iterations;
        if (s.state == Row::not_finite) return fill(lambda, T(__builtin_nan("")));
        if (s.state == Row::given_up) {
            const double missed = __builtin_sqrt(static_cast<double>(s.residual) / static_cast<double>(s.squared));
            const Unsolved found = {missed == missed ? missed : __builtin_inf(), f_.first + t, first_ + i, head_};
#pragma omp critical
            if (found.residual > f_.unsolved->residual) *f_.unsolved = found;
        }
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            store(lambda + j, load<V>(slope_ + at) * load<V>(solution_ + at) * s.unit);
        });
    }

    const RnnBackward<T>& f_;
    const Gram<T>& gram_;
    const ptrdiff_t head_, first_, rows_, columns_;
    T* slope_;     // d = a'(z_t)
    T* inverted_;  // 1/(d² K_jj + r)
    T *solution_, *residual_, *direction_;
    T *scaled_, *product_;  // what K multiplies and the result: of active rows only
    Row states_[largest_tile];
    ptrdiff_t order_[largest_tile], active_;  // the active rows
};

}  // namespace tpk::TPK_ISA
