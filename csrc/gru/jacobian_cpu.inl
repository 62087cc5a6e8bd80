// The regularized inverse of the unit's own linearization J = ∂h_t/∂h_{t-1}, for a tile of rows: (JᵀJ + rI)⁻¹ Jᵀ λ = Jᵀ
// y with (J Jᵀ + rI) y = λ, by conjugate gradients. J = diag(z) + Σ diag(slope) W over the three blocks of W, so an
// iteration is a product of the tile with W and one with Wᵀ.
//
// Every row has scalars of its own and stops by itself, so that its result depends on no row beside it.

#include "../common/gemm.h"
#include "../common/tiles.h"
#include "kernel.h"

namespace tpk::TPK_ISA {

template <class T>
class GruJacobianSolver {
public:
    // Numbers of its scratch.
    static constexpr ptrdiff_t size(ptrdiff_t rows, ptrdiff_t N) { return rows * (11 * padded<T>(N) + sent_row(N)); }

    // weight: packed for products with W, [3N][N]; transpose: each block for products with its Wᵀ, one after another.
    GruJacobianSolver(const GruBackward<T>& f, const T* weight, const T* transpose, bool finite, ptrdiff_t first,
                      ptrdiff_t rows, T* scratch)
        : f_(f),
          weight_(weight),
          transpose_(transpose),
          finite_(finite),
          first_(first),
          rows_(rows),
          columns_(padded<T>(f.N)) {
        if (f.inverse != Inverse::jacobian) return;
        const ptrdiff_t array = rows * columns_;
        clear(scratch, size(rows, f.N));  // columns beyond N stay zero
        for (T*& slope : slopes_) slope = scratch, scratch += array;
        T** const others[] = {&z_, &solution_, &residual_, &direction_};
        for (T** other : others) *other = scratch, scratch += array;
        product_ = scratch, scratch += 3 * array;
        back_ = scratch, scratch += array;
        sent_ = scratch;
    }

    // Replaces λ_t by Jᵀ y. lambda: [rows][columns], zero beyond N.
    void solve(ptrdiff_t t, const T* gates, const T* before, T* lambda) {
        const ptrdiff_t N = f_.N, columns = columns_;
        T *of_r = slopes_[0], *of_z = slopes_[1], *of_n = slopes_[2], *through_z = z_;
        for_elements<T>(rows_, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using W = decltype(zero);
            const T* kept = gates + 4 * i * N + j;
            const W r = load<W>(kept), z = load<W>(kept + N), n = load<W>(kept + 2 * N), q = load<W>(kept + 3 * N);
            const W inner = (1 - z) * (1 - n * n);
            const ptrdiff_t at = i * columns + j;
            store(of_r + at, inner * q * r * (1 - r));
            store(of_z + at, (load<W>(before + i * N + j) - n) * z * (1 - z));
            store(of_n + at, inner * r);
            store(through_z + at, z);
        });
        active_ = 0;
        for (ptrdiff_t i = 0; i < rows_; ++i) start(i, lambda + i * columns);
        do {
            iterate();
        } while (check(lambda));
        for (ptrdiff_t i = 0; i < rows_; ++i) finish(i, t, lambda + i * columns);
    }

private:
    using V = Vec<T>;
    static constexpr ptrdiff_t L = lanes<T>;

    // Of one row of the tile. Residuals are counted in its unit.
    struct Row {
        T unit = 1;      // a power of two: λ over it has a mean magnitude between 1 and 2
        T squared = 0;   // of λ
        T bound = 0;     // square of the residual with which to be content
        T residual = 0;  // its square
        T checked = 0;   // its square when last computed anew
        int iterations = 0;
        enum { unchecked, solved, given_up, not_finite } state = solved;
    };

    // A block of a row of `sent_` is written in whole vectors, over the beginning of the next one.
    static constexpr ptrdiff_t sent_row(ptrdiff_t N) { return 3 * N + L; }

    // f(column, element of row i) for every vector of that row.
    template <class F>
    void for_row(ptrdiff_t i, F f) {
        for (ptrdiff_t j = 0; j < columns_; j += L) f(j, i * columns_ + j);
    }

    void start(ptrdiff_t i, T* lambda) {
        Row& s = states_[i];
        s = {};
        V means = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V x = load<V>(lambda + j);
            means += (x < 0 ? -x : x) * (1 / static_cast<T>(f_.N)) + 0 * load<V>(z_ + at);
            for (const T* slope : slopes_) means += 0 * load<V>(slope + at);
        });
        const T mean = sum<T>(means);
        if (!finite_ || mean - mean != 0) s.state = Row::not_finite;
        if (mean == 0) for_row(i, [&](ptrdiff_t j, ptrdiff_t) { store(lambda + j, V{}); });  // or too small to tell
        if (s.state == Row::not_finite || mean == 0) return;
        int exponent;
        __builtin_frexp(static_cast<double>(mean), &exponent);
        const int most = sizeof(T) == 4 ? 126 : 1022;  // the unit's inverse is no denormal number
        exponent = exponent - 1 < most ? exponent - 1 : most;
        s.unit = static_cast<T>(__builtin_ldexp(1.0, exponent));
        const T inverse_unit = static_cast<T>(__builtin_ldexp(1.0, -exponent));
        V squares = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V x = load<V>(lambda + j) * inverse_unit;
            store(lambda + j, x);
            store(solution_ + at, V{});
            store(residual_ + at, x);
            store(direction_ + at, x);
            squares += x * x;
        });
        s.squared = s.residual = s.checked = sum<T>(squares);
        s.bound = f_.rtol * f_.rtol * s.squared;
        order_[active_++] = i;
    }

    // Of x, an array of rows: back_ = Jᵀ x and product_ = its products with Wᵀ, for active rows, one after another.
    void apply(const T* x) {
        const ptrdiff_t N = f_.N, row = sent_row(N);
        for (ptrdiff_t k = 0; k < active_; ++k) {
            for (ptrdiff_t block = 0; block < 3; ++block)
                for_row(order_[k], [&](ptrdiff_t j, ptrdiff_t at) {
                    store(sent_ + k * row + block * N + j, load<V>(slopes_[block] + at) * load<V>(x + at));
                });
            for_row(order_[k], [&](ptrdiff_t j, ptrdiff_t at) {
                store(back_ + k * columns_ + j, load<V>(z_ + at) * load<V>(x + at));
            });
        }
        multiply<T, Into::add>(sent_, row, 1, active_, packed_right(weight_, 3 * N), 3 * N, columns_, back_, columns_);
        multiply_packed(back_, columns_, active_, transpose_, N, 3 * columns_, product_, 3 * columns_);
    }

    // An element of (J Jᵀ + rI) x, after apply(x), in row i, which is the k-th active one.
    V image(const T* x, ptrdiff_t k, ptrdiff_t j, ptrdiff_t at) {
        V result = load<V>(z_ + at) * load<V>(back_ + k * columns_ + j) + f_.reg * load<V>(x + at);
        for (ptrdiff_t block = 0; block < 3; ++block)
            result += load<V>(slopes_[block] + at) * load<V>(product_ + (3 * k + block) * columns_ + j);
        return result;
    }

    // Until every active row has reached its bound or gives up.
    void iterate() {
        const int limit = static_cast<int>(4 * f_.N + 50);
        while (active_ > 0) {
            apply(direction_);
            ptrdiff_t kept = 0;
            for (ptrdiff_t k = 0; k < active_; ++k) {
                const ptrdiff_t i = order_[k];
                Row& s = states_[i];
                if (!step(i, k) || (s.residual > s.bound && s.iterations >= limit))
                    s.state = Row::given_up;
                else if (s.residual <= s.bound)
                    s.state = Row::unchecked;
                else
                    order_[kept++] = i;
            }
            active_ = kept;
        }
    }

    // A step along the direction, and the next direction. False: not positive definite in this precision.
    bool step(ptrdiff_t i, ptrdiff_t k) {
        Row& s = states_[i];
        V curvatures = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V q = image(direction_, k, j, at);
            store(product_ + 3 * k * columns_ + j, q);  // read for the last time above
            curvatures += load<V>(direction_ + at) * q;
        });
        const T curvature = sum<T>(curvatures), alpha = s.residual / curvature;
        ++s.iterations;
        if (!(curvature > 0 && alpha > 0)) return false;
        V squares = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            store(solution_ + at, load<V>(solution_ + at) + alpha * load<V>(direction_ + at));
            const V r = load<V>(residual_ + at) - alpha * load<V>(product_ + 3 * k * columns_ + j);
            store(residual_ + at, r);
            squares += r * r;
        });
        const T before = s.residual;
        s.residual = sum<T>(squares);
        const T beta = s.residual / before;
        for_row(i, [&](ptrdiff_t, ptrdiff_t at) {
            store(direction_ + at, load<V>(residual_ + at) + beta * load<V>(direction_ + at));
        });
        return true;
    }

    // Computes the residuals of rows that reached their bound anew. Where rounding errors have run away from the
    // recursion the row is active again, from there, or gives up where that did not help before. λ of the others is
    // Jᵀ y now. True: there are active rows.
    bool check(T* lambda) {
        active_ = 0;
        for (ptrdiff_t i = 0; i < rows_; ++i)
            if (states_[i].state == Row::unchecked) order_[active_++] = i;
        if (active_ == 0) return false;
        apply(solution_);
        ptrdiff_t kept = 0;
        for (ptrdiff_t k = 0; k < active_; ++k) {
            const ptrdiff_t i = order_[k];
            Row& s = states_[i];
            V squares = {};
            for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
                const V r = load<V>(lambda + at) - image(solution_, k, j, at);
                store(residual_ + at, r);
                store(direction_ + at, r);
                squares += r * r;
            });
            s.residual = sum<T>(squares);
            const bool nearer = s.residual <= s.checked / 4;
            s.checked = s.residual;
            if (s.residual <= s.bound) {
                s.state = Row::solved;
                for_row(i, [&](ptrdiff_t j, ptrdiff_t at) { store(lambda + at, load<V>(back_ + k * columns_ + j)); });
            } else if (nearer) {
                order_[kept++] = i;
            } else {
                s.state = Row::given_up;
            }
        }
        active_ = kept;
        return active_ > 0;
    }

    void finish(ptrdiff_t i, ptrdiff_t t, T* lambda) {
        const Row& s = states_[i];
        if (s.state == Row::given_up) {
            const double missed = __builtin_sqrt(static_cast<double>(s.residual) / static_cast<double>(s.squared));
            const Unsolved found = {missed == missed ? missed : __builtin_inf(), t, first_ + i, 0};
#pragma omp critical
            if (found.residual > f_.unsolved->residual) *f_.unsolved = found;
        }
        const T unit = s.state == Row::not_finite ? T(__builtin_nan("")) : s.unit;
        for_row(i, [&](ptrdiff_t j, ptrdiff_t) { store(lambda + j, load<V>(lambda + j) * unit); });
    }

    const GruBackward<T>& f_;
    const T *weight_, *transpose_;
    const bool finite_;  // the weight is
    const ptrdiff_t first_, rows_, columns_;
    T *slopes_[3], *z_;  // of the rows: J
    T *solution_, *residual_, *direction_;
    T *sent_, *back_, *product_;  // of active rows only
    Row states_[largest_tile];
    ptrdiff_t order_[largest_tile], active_;  // the active rows
};

}  // namespace tpk::TPK_ISA
