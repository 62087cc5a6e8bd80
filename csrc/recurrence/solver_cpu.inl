// The regularized inverse of a step's own linearization J = ∂h_t/∂h_{t-1}, for a tile of rows: (JᵀJ + rI)⁻¹ Jᵀ λ = Jᵀ y
// with (J Jᵀ + rI) y = λ, by conjugate gradients. What J Jᵀ is, is the operator's: there are two.
//
// Every row has scalars of its own and stops by itself, so that its result depends on no row beside it.

#include "../common/gemm.h"
#include "../common/matrix.h"
#include "tile.h"

namespace tpk::TPK_ISA {

// J = D W: with K = W Wᵀ, an iteration is one product of the tile with K. What is left is D y: Jᵀ y = Wᵀ D y.
//
// The diagonal d² K_jj + r preconditions: it evens out saturated units, and is all there is where W is orthogonal.
template <class T>
class GramOperator {
    using V = Vec<T>;

public:
    static constexpr Form form = {1, false, false};

    struct Matrices {
        const T *packed, *diagonal;  // of K; the diagonal padded with zeros
        bool finite;                 // W is
        bool rounding;               // rounding errors may be as large as rtol
    };

    static ptrdiff_t matrices_size(ptrdiff_t N) { return (3 * N + 1) * padded<T>(N); }
    static ptrdiff_t size(ptrdiff_t N) { return 4 * padded<T>(N); }

    static Matrices prepare(const T* weight, const RecurrenceBackward<T>& f, T* memory) {
        constexpr T epsilon = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);
        const ptrdiff_t N = f.N, columns = padded<T>(N);
        T *packed = memory, *gram = packed + N * columns, *transposed = gram + N * columns,
          *diagonal = transposed + N * columns;
        pack(weight, 1, N, N, N, transposed, N);
        multiply_packed(weight, N, N, transposed, N, N, gram, columns);
        pack(gram, columns, 1, N, N, packed, N);
        T largest = 0;
        for (ptrdiff_t i = 0; i < N; ++i) {
            T sum = 0;
            for (ptrdiff_t j = 0; j < N; ++j) sum += __builtin_fabs(gram[i * columns + j]);
            largest = sum < largest ? largest : sum;
        }
        for (ptrdiff_t j = 0; j < columns; ++j) diagonal[j] = j < N ? gram[j * columns + j] : T(0);
        return {packed, diagonal, is_finite(weight, N * N), !(4 * epsilon * (largest + f.reg) <= f.rtol * f.reg)};
    }

    GramOperator(const RecurrenceBackward<T>& f, const Tile& tile, const T*, const Matrices& matrices, T* scratch)
        : matrices_(matrices), reg_(f.reg), N_(f.N), columns_(padded<T>(f.N)), rows_(tile.rows) {
        T** const all[] = {&slope_, &inverted_, &sent_, &product_};
        for (T** array : all) *array = scratch, scratch += rows_ * columns_;
    }

    template <class Cell>
    void linearize(const StepOfTile<Cell, T>& step, ptrdiff_t rows) {
        T *slope = slope_, *inverted = inverted_;
        for_elements<T>(
            rows, N_,
            [=, reg = reg_, columns = columns_, diagonal = matrices_.diagonal](auto zero, ptrdiff_t i, ptrdiff_t j) {
                using W = decltype(zero);
                const W d = Cell::template linear<T>(step.template at<W, Inverse::jacobian>(i, j)).slopes[0];
                store(slope + i * columns + j, d);
                store(inverted + i * columns + j, 1 / (d * d * load<W>(diagonal + j) + reg));
            });
    }

    bool rechecks() const { return matrices_.rounding; }
    T margin() const { return matrices_.rounding ? T(0.25) : T(1); }
    bool finite() const { return matrices_.finite; }
    V not_finite(ptrdiff_t at) const { return 0 * load<V>(slope_ + at); }
    V preconditioned(ptrdiff_t at, V r) const { return load<V>(inverted_ + at) * r; }

    template <class Element>
    void send(ptrdiff_t i, ptrdiff_t k, const Element& element) {
        for (ptrdiff_t j = 0; j < columns_; j += lanes<T>) {
            const ptrdiff_t at = i * columns_ + j;
            store(sent_ + k * columns_ + j, load<V>(slope_ + at) * element(at));
        }
    }

    void multiply(ptrdiff_t count) {
        multiply_packed(sent_, columns_, count, matrices_.packed, N_, N_, product_, columns_);
    }

    T* product(ptrdiff_t k) { return product_ + k * columns_; }

    V image(V x, ptrdiff_t k, ptrdiff_t j, ptrdiff_t at) const {
        return load<V>(slope_ + at) * load<V>(product_ + k * columns_ + j) + reg_ * x;
    }

    V residual(V lambda, V x, ptrdiff_t k, ptrdiff_t j, ptrdiff_t at) const {
        return lambda - load<V>(slope_ + at) * load<V>(product_ + k * columns_ + j) - reg_ * x;
    }

    void solved(ptrdiff_t, ptrdiff_t, T*) {}
    V result(V, V solution, ptrdiff_t at) const { return load<V>(slope_ + at) * solution; }

private:
    const Matrices matrices_;
    const T reg_;
    const ptrdiff_t N_, columns_, rows_;
    T *slope_, *inverted_;  // d, and 1/(d² K_jj + r)
    T *sent_, *product_;    // what K multiplies and the result: of active rows only
};

// J = diag(d) + Σ diag(slopes) W over the gates: an iteration is a product of the tile with W and one with Wᵀ. What is
// left is Jᵀ y.
template <class T, int G>
class ProductsOperator {
    using V = Vec<T>;

public:
    static constexpr Form form = {0, true, false};

    struct Matrices {
        const T* transposed;  // each gate's block, packed for products with its Wᵀ, one after another
        bool finite;          // W is
    };

    static ptrdiff_t matrices_size(ptrdiff_t N) { return G * N * padded<T>(N); }
    static ptrdiff_t size(ptrdiff_t N) { return (2 * G + 2) * padded<T>(N) + sent_row(N); }

    static Matrices prepare(const T* weight, const RecurrenceBackward<T>& f, T* memory) {
        const ptrdiff_t N = f.N;
        for (ptrdiff_t gate = 0; gate < G; ++gate)
            pack(weight + gate * N * N, 1, N, N, N, memory + gate * N * padded<T>(N), N);
        return {memory, is_finite(weight, G * N * N)};
    }

    ProductsOperator(const RecurrenceBackward<T>& f, const Tile& tile, const T* weight, const Matrices& matrices,
                     T* scratch)
        : weight_(weight), matrices_(matrices), reg_(f.reg), N_(f.N), columns_(padded<T>(f.N)), rows_(tile.rows) {
        const ptrdiff_t array = rows_ * columns_;
        for (T*& slope : slopes_) slope = scratch, scratch += array;
        d_ = scratch, scratch += array;
        product_ = scratch, scratch += G * array;
        back_ = scratch, scratch += array;
        sent_ = scratch;
    }

    template <class Cell>
    void linearize(const StepOfTile<Cell, T>& step, ptrdiff_t rows) {
        T *d = d_, *slopes = slopes_[0];
        for_elements<T>(rows, N_,
                        [=, columns = columns_, array = rows_ * columns_](auto zero, ptrdiff_t i, ptrdiff_t j) {
                            using W = decltype(zero);
                            const auto linear = Cell::template linear<T>(step.template at<W, Inverse::jacobian>(i, j));
                            store(d + i * columns + j, linear.d);
                            store_all(slopes + i * columns + j, array, linear.slopes);
                        });
    }

    bool rechecks() const { return true; }
    T margin() const { return 1; }
    bool finite() const { return matrices_.finite; }
    V preconditioned(ptrdiff_t, V r) const { return r; }

    V not_finite(ptrdiff_t at) const {
        V result = 0 * load<V>(d_ + at);
        for (const T* slope : slopes_) result += 0 * load<V>(slope + at);
        return result;
    }

    // A gate's block of sent_ is written in whole vectors, over the beginning of the next one, which is written later.
    template <class Element>
    void send(ptrdiff_t i, ptrdiff_t k, const Element& element) {
        for (ptrdiff_t j = columns_ - lanes<T>; j >= 0; j -= lanes<T>) {
            const ptrdiff_t at = i * columns_ + j;
            const V x = element(at);
            store(back_ + k * columns_ + j, load<V>(d_ + at) * x);
            for (ptrdiff_t gate = 0; gate < G; ++gate)
                store(sent_ + k * sent_row(N_) + gate * N_ + j, load<V>(slopes_[gate] + at) * x);
        }
    }

    // back_ = Jᵀ x and product_ = its products with Wᵀ.
    void multiply(ptrdiff_t count) {
        multiply_packed<Into::add>(sent_, sent_row(N_), count, weight_, G * N_, N_, back_, columns_);
        multiply_packed(back_, columns_, count, matrices_.transposed, N_, G * columns_, product_, G * columns_);
    }

    T* product(ptrdiff_t k) { return product_ + G * k * columns_; }

    V image(V x, ptrdiff_t k, ptrdiff_t j, ptrdiff_t at) const {
        V result = load<V>(d_ + at) * load<V>(back_ + k * columns_ + j) + reg_ * x;
        for (ptrdiff_t gate = 0; gate < G; ++gate)
            result += load<V>(slopes_[gate] + at) * load<V>(product_ + (G * k + gate) * columns_ + j);
        return result;
    }

    V residual(V lambda, V x, ptrdiff_t k, ptrdiff_t j, ptrdiff_t at) const { return lambda - image(x, k, j, at); }

    void solved(ptrdiff_t i, ptrdiff_t k, T* lambda) {
        __builtin_memcpy(lambda + i * columns_, back_ + k * columns_, static_cast<size_t>(columns_) * sizeof(T));
    }

    V result(V lambda, V, ptrdiff_t) const { return lambda; }

private:
    static ptrdiff_t sent_row(ptrdiff_t N) { return padded<T>(G * N) + lanes<T>; }

    const T* weight_;  // packed for products with W
    const Matrices matrices_;
    const T reg_;
    const ptrdiff_t N_, columns_, rows_;
    T *slopes_[G], *d_;
    T *sent_, *back_, *product_;  // of active rows only
};

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
    enum { solved, unchecked, given_up, not_finite } state = solved;
};

// Solves for a tile of rows, step by step back in time. An operator:
//
//   linearize(step, rows)      J, at that step, for so many rows
//   send(i, k, element)        what the products take of row i, element(at), as the k-th of the active rows
//   multiply(count)            the products, of that many active rows
//   image(x, k, …)             then, an element of (J Jᵀ + rI) x; product(k) is memory for it, read for the last time
//   residual(λ, x, k, …)       λ less that
//   solved(i, k, λ), result()  what the solution is made of, when row i is done and at last
template <class T, class O>
class ConjugateGradients {
public:
    // Numbers of scratch memory that a row takes.
    static ptrdiff_t size(ptrdiff_t N) { return 3 * padded<T>(N) + O::size(N); }

    // scratch: zero.
    ConjugateGradients(const RecurrenceBackward<T>& f, const Tile& tile, const T* weight,
                       const typename O::Matrices& matrices, T* scratch)
        : f_(f),
          tile_(tile),
          columns_(padded<T>(f.N)),
          solution_(scratch),
          residual_(solution_ + tile.rows * columns_),
          direction_(residual_ + tile.rows * columns_),
          operator_(f, tile, weight, matrices, direction_ + tile.rows * columns_) {}

    // Replaces λ_t by the operator's result. lambda: [rows][columns], zero beyond N.
    template <class Step>
    void solve(ptrdiff_t t, ptrdiff_t rows, const Step& step, T* lambda) {
        rows_ = rows;
        operator_.linearize(step, rows);
        solve(t, lambda);
    }

private:
    using V = Vec<T>;
    using Row = SolvedRow<T>;

    void solve(ptrdiff_t t, T* lambda) {
        active_ = 0;
        for (ptrdiff_t i = 0; i < rows_; ++i) start(i, lambda + i * columns_);
        iterate();
        while (operator_.rechecks() && check(lambda)) iterate();
        for (ptrdiff_t i = 0; i < rows_; ++i) finish(i, t, lambda + i * columns_);
    }

    // f(column, element of row i) for every vector of that row.
    template <class F>
    void for_row(ptrdiff_t i, F f) {
        for (ptrdiff_t j = 0; j < columns_; j += lanes<T>) f(j, i * columns_ + j);
    }

    void fill(T* row, T value) {
        for (ptrdiff_t j = 0; j < columns_; j += lanes<T>) store(row + j, broadcast<V>(value));
    }

    void start(ptrdiff_t i, T* lambda) {
        Row& s = states_[i];
        V means = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V x = load<V>(lambda + j);
            means += (x < 0 ? -x : x) * (1 / static_cast<T>(f_.N)) + operator_.not_finite(at);
        });
        const T mean = sum<T>(means);
        s = {};
        if (!operator_.finite() || mean - mean != 0) s.state = Row::not_finite;
        fill(solution_ + i * columns_, 0);
        if (mean == 0) fill(lambda, 0);  // or too small to tell
        if (s.state == Row::not_finite || mean == 0) return;
        int exponent;
        __builtin_frexp(static_cast<double>(mean), &exponent);
        const int most = sizeof(T) == 4 ? 126 : 1022;  // the unit's inverse is no denormal number
        exponent = exponent - 1 < most ? exponent - 1 : most;
        s.unit = static_cast<T>(__builtin_ldexp(1.0, exponent));
        const T inverse_unit = static_cast<T>(__builtin_ldexp(1.0, -exponent));
        V squares = {}, products = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V x = load<V>(lambda + j) * inverse_unit;
            store(lambda + j, x);
            store(residual_ + at, x);
            squares += x * x;
            products += operator_.preconditioned(at, x) * x;
        });
        s.squared = s.residual = s.checked = sum<T>(squares);
        s.product = sum<T>(products);
        s.bound = f_.rtol * f_.rtol * s.squared;
        s.goal = operator_.margin() * s.bound;
        activate(i);
    }

    // Row i takes part in the next product, with a direction from its preconditioned residual alone.
    void activate(ptrdiff_t i) {
        operator_.send(i, active_, [&](ptrdiff_t at) {
            const V p = operator_.preconditioned(at, load<V>(residual_ + at));
            store(direction_ + at, p);
            return p;
        });
        order_[active_++] = i;
    }

    // Until every active row has reached its goal or gives up. Those that go on are kept together: only they are
    // multiplied.
    void iterate() {
        const int limit = static_cast<int>(4 * f_.N + 50);
        while (active_ > 0) {
            operator_.multiply(active_);
            ptrdiff_t kept = 0;
            for (ptrdiff_t k = 0; k < active_; ++k) {
                const ptrdiff_t i = order_[k];
                Row& s = states_[i];
                if (!step(i, k)) {
                    s.state = Row::given_up;  // not positive definite in this precision
                } else if (s.residual <= s.goal) {
                    s.state = Row::unchecked;
                } else if (s.iterations >= limit) {
                    s.state = Row::given_up;
                } else {
                    turn(i, kept);
                    order_[kept++] = i;
                }
            }
            active_ = kept;
        }
    }

    // A step along the direction. False: there is none.
    bool step(ptrdiff_t i, ptrdiff_t k) {
        Row& s = states_[i];
        T* image = operator_.product(k);
        V curvatures = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            const V p = load<V>(direction_ + at), q = operator_.image(p, k, j, at);
            store(image + j, q);
            curvatures += p * q;
        });
        const T curvature = sum<T>(curvatures), alpha = s.product / curvature;
        ++s.iterations;
        if (!(curvature > 0 && alpha > 0)) return false;
        V squares = {}, products = {};
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            store(solution_ + at, load<V>(solution_ + at) + alpha * load<V>(direction_ + at));
            const V r = load<V>(residual_ + at) - alpha * load<V>(image + j);
            store(residual_ + at, r);
            squares += r * r;
            products += operator_.preconditioned(at, r) * r;
        });
        s.residual = sum<T>(squares);
        const T before = s.product;
        s.product = sum<T>(products);
        s.turn = s.product / before;
        return true;
    }

    // The next direction, and what the products take of it.
    void turn(ptrdiff_t i, ptrdiff_t k) {
        const T beta = states_[i].turn;
        operator_.send(i, k, [&](ptrdiff_t at) {
            const V p = operator_.preconditioned(at, load<V>(residual_ + at)) + beta * load<V>(direction_ + at);
            store(direction_ + at, p);
            return p;
        });
    }

    // Computes the residuals of rows that reached their goal anew. Where rounding errors have run away from the
    // recursion, the row is active again, from there, or gives up where that did not help before. True: there are
    // active rows.
    bool check(T* lambda) {
        ptrdiff_t count = 0;
        for (ptrdiff_t i = 0; i < rows_; ++i) {
            if (states_[i].state != Row::unchecked) continue;
            operator_.send(i, count, [&](ptrdiff_t at) { return load<V>(solution_ + at); });
            order_[count++] = i;
        }
        if (count == 0) return false;
        operator_.multiply(count);
        for (ptrdiff_t k = 0; k < count; ++k) {
            const ptrdiff_t i = order_[k];
            Row& s = states_[i];
            V squares = {}, products = {};
            for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
                const V r = operator_.residual(load<V>(lambda + at), load<V>(solution_ + at), k, j, at);
                store(residual_ + at, r);
                squares += r * r;
                products += operator_.preconditioned(at, r) * r;
            });
            s.residual = sum<T>(squares);
            s.product = sum<T>(products);
            const bool nearer = s.residual <= s.checked / 4;
            s.checked = s.residual;
            if (s.residual <= s.bound) {
                s.state = Row::solved;
                operator_.solved(i, k, lambda);
            } else if (nearer) {
                activate(i);
            } else {
                s.state = Row::given_up;
            }
        }
        return active_ > 0;
    }

    void finish(ptrdiff_t i, ptrdiff_t t, T* lambda) {
        const Row& s = states_[i];
        if (f_.iterations) f_.iterations[(t * f_.B + tile_.first + i) * f_.H + tile_.head] = s.iterations;
        if (s.state == Row::not_finite) return fill(lambda, T(__builtin_nan("")));
        if (s.state == Row::given_up) {
            const double missed = __builtin_sqrt(static_cast<double>(s.residual) / static_cast<double>(s.squared));
            const Unsolved found = {missed == missed ? missed : __builtin_inf(), f_.first + t, tile_.first + i,
                                    tile_.head};
#pragma omp critical
            if (found.residual > f_.unsolved->residual) *f_.unsolved = found;
        }
        for_row(i, [&](ptrdiff_t j, ptrdiff_t at) {
            store(lambda + j, operator_.result(load<V>(lambda + j), load<V>(solution_ + at), at) * s.unit);
        });
    }

    const RecurrenceBackward<T>& f_;
    const Tile tile_;
    const ptrdiff_t columns_;
    ptrdiff_t rows_ = 0;  // of the step
    T *solution_, *residual_, *direction_;
    O operator_;
    Row states_[largest_tile];
    ptrdiff_t order_[largest_tile], active_;  // the active rows
};

template <class Cell, class T, bool gram = Cell::gates == 1 && !Cell::passes_by>
struct OperatorOf {
    using type = ProductsOperator<T, Cell::gates>;
};
template <class Cell, class T>
struct OperatorOf<Cell, T, true> {
    using type = GramOperator<T>;
};
template <class Cell, class T>
using Operator = typename OperatorOf<Cell, T>::type;

}  // namespace tpk::TPK_ISA
