// The inverse "jacobian" for a tile of rows: (JᵀJ + rI)⁻¹ Jᵀ λ = Wᵀ D y with (D K D + rI) y = λ and K = W Wᵀ, by
// conjugate gradients, as in jacobian_cpu.inl. K and Wᵀ stay in registers for all T steps.
//
// A unit's numbers are in the registers of the thread that its sums end in, a row's in every thread that has one of its
// units: they all compute them from the same sums, so they always agree. Every row stops by itself, and its result
// depends on no row beside it, nor on how many there are. An iteration takes three barriers.

template <int K, int rows>
struct JacobianMemory {
    struct Pair {
        float a, b;
    };
    alignas(16) float product[rows][K];  // what K or Wᵀ multiplies
    alignas(16) float delta[2][rows][K];
    Pair sums[2][threads_of<K> / 32][rows];  // of a warp: while some threads still read one, others write the next
};

template <int K, int rows>
class JacobianSolver {
public:
    using P = Place<K, rows>;
    using Memory = JacobianMemory<K, rows>;
    using Pair = typename Memory::Pair;

    // What the rows are left with: a relative residual where the solve gave up, else 0.
    struct Outcome {
        int iterations;
        float missed;
    };

    __device__ JacobianSolver(const RecurrenceBackward<float>& f, const P& place, Memory& memory)
        : f_(f), place_(place), memory_(memory) {
        const int N = static_cast<int>(f.N);
        const float* weight = f.weight + place.head * f.N * f.N;
        float zero = 0;
        gram_.clear();
        for (int m = 0; m < N; ++m) zero += gram_.add_outer_product(weight, N, m, place.group, place.lane);
        bool rounding = false;
#pragma unroll
        for (int i = 0; i < outputs; ++i) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < K / splits; ++j) sum += fabsf(gram_.of[i][j]);
#pragma unroll
            for (int mask = 1; mask < splits; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            rounding = rounding || !(4 * 0x1p-23f * (sum + f.reg) <= f.rtol * f.reg);
        }
        finite_ = !__syncthreads_or(zero != 0);  // NaN differs from 0, too
        rounding_ = __syncthreads_or(rounding);
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            float sum = 0;
            for (int m = 0; m < N && place.column[e] < N; ++m) {
                const float w = weight[place.column[e] * N + m];
                sum = fmaf(w, w, sum);
            }
            diagonal_[e] = sum;
        }
    }

    // Replaces λ_t by D y; h: the state of step t; both zero where there is no unit.
    __device__ Outcome solve(float (&lambda)[P::kept], const float (&h)[P::kept]) {
        start(lambda, h);
        iterate();
        while (rounding_ && check(lambda)) iterate();
        Outcome outcome = {iterations_, 0};
        if (state_ == given_up) {
            const float missed = sqrtf(residual_square_ / squared_);
            outcome.missed = missed == missed ? missed : __int_as_float(0x7f800000);
        }
#pragma unroll
        for (int e = 0; e < P::kept; ++e)
            lambda[e] = state_ == not_finite ? __int_as_float(0x7fc00000) : slope_[e] * solution_[e] * unit_;
        return outcome;
    }

private:
    enum State { solved, given_up, not_finite };

    // Sums over the units of this thread's row, the same in all threads of the row: the additions are those of a tree
    // over its columns, whatever the tile. A barrier.
    __device__ Pair over_row(const float (&a)[P::kept], const float (&b)[P::kept]) {
        Pair sum = {a[0], b[0]};
#pragma unroll
        for (int e = 1; e < P::kept; ++e) sum = {sum.a + a[e], sum.b + b[e]};
#pragma unroll
        for (int mask = P::copies; mask < 32; mask *= 2) {
            if (mask >= splits / rows && mask < splits) continue;  // another row's
            sum.a += __shfl_xor_sync(0xffffffffu, sum.a, mask);
            sum.b += __shfl_xor_sync(0xffffffffu, sum.b, mask);
        }
        const int warp = static_cast<int>(threadIdx.x) / 32, in_warp = static_cast<int>(threadIdx.x) % 32;
        auto& sums = memory_.sums[turn_];
        turn_ ^= 1;
        if (in_warp < splits && in_warp % (splits / rows) == 0) sums[warp][place_.row[0]] = sum;
        __syncthreads();
        sum = sums[0][place_.row[0]];
#pragma unroll
        for (int w = 1; w < threads_of<K> / 32; ++w) {
            const Pair other = sums[w][place_.row[0]];
            sum = {sum.a + other.a, sum.b + other.b};
        }
        return sum;
    }

    // K times D of what the rows that take part have in `of`; false where none does. Two barriers since the product
    // before have to lie behind.
    __device__ bool multiply(bool takes_part, const float (&of)[P::kept], float (&result)[P::sums]) {
#pragma unroll
        for (int e = 0; e < P::kept; ++e)
            if (takes_part && place_.writes) memory_.product[place_.row[e]][place_.column[e]] = slope_[e] * of[e];
        if (!__syncthreads_or(takes_part)) return false;
        gram_.multiply(memory_.product, place_.lane, result);
        reduce<P::sums, splits>(result, place_.lane);
        return true;
    }

    // This thread's row goes on with a direction from its preconditioned residual alone.
    __device__ void activate() {
        active_ = true;
#pragma unroll
        for (int e = 0; e < P::kept; ++e) direction_[e] = inverted_[e] * residual_[e];
    }

    __device__ void start(float (&lambda)[P::kept], const float (&h)[P::kept]) {
        float magnitude[P::kept], none[P::kept] = {}, square[P::kept], product[P::kept];
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            slope_[e] = place_.inside[e] ? through_activation(nonlinearity_of(f_.cell), 1, h[e]) : 0;
            magnitude[e] = fabsf(lambda[e]) * (1 / static_cast<float>(f_.N)) + 0 * slope_[e];
            solution_[e] = residual_[e] = direction_[e] = 0;
            inverted_[e] = 1 / (slope_[e] * slope_[e] * diagonal_[e] + f_.reg);
        }
        const float mean = over_row(magnitude, none).a;
        state_ = !finite_ || mean - mean != 0 ? not_finite : solved;
        const bool starts = state_ == solved && mean > 0;
        int exponent = 0;
        if (starts) frexpf(mean, &exponent);
        // The unit and its inverse are no denormal numbers.
        exponent = exponent - 1 < -126 ? -126 : exponent - 1 > 126 ? 126 : exponent - 1;
        unit_ = ldexpf(1, exponent);
        const float inverse_unit = ldexpf(1, -exponent);
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            lambda[e] = starts ? lambda[e] * inverse_unit : 0;
            residual_[e] = lambda[e];
            square[e] = lambda[e] * lambda[e];
            product[e] = inverted_[e] * square[e];
        }
        const Pair sum = over_row(square, product);
        squared_ = residual_square_ = checked_ = sum.a;
        product_ = sum.b;
        bound_ = f_.rtol * f_.rtol * squared_;
        goal_ = rounding_ ? bound_ / 4 : bound_;
        iterations_ = 0;
        active_ = false;
        if (starts) activate();
    }

    // Until every row has reached its goal or gives up.
    __device__ void iterate() {
        const int limit = static_cast<int>(4 * f_.N + 50);
        float result[P::sums], step[P::kept], curvature[P::kept], square[P::kept], product[P::kept];
        float none[P::kept] = {};
        while (multiply(active_, direction_, result)) {
#pragma unroll
            for (int e = 0; e < P::kept; ++e) {
                step[e] = place_.inside[e] ? slope_[e] * result[e] + f_.reg * direction_[e] : 0;
                curvature[e] = direction_[e] * step[e];
            }
            const float curved = over_row(curvature, none).a, alpha = product_ / curved;
            const bool descends = curved > 0 && alpha > 0;
            if (active_ && descends) {
#pragma unroll
                for (int e = 0; e < P::kept; ++e) {
                    solution_[e] += alpha * direction_[e];
                    residual_[e] -= alpha * step[e];
                }
            }
#pragma unroll
            for (int e = 0; e < P::kept; ++e) {
                square[e] = residual_[e] * residual_[e];
                product[e] = inverted_[e] * square[e];
            }
            const Pair sum = over_row(square, product);
            if (!active_) continue;
            ++iterations_;
            if (!descends) {  // not positive definite in this precision
                state_ = given_up;
                active_ = false;
                continue;
            }
            residual_square_ = sum.a;
            const float turn = sum.b / product_;
            product_ = sum.b;
            if (residual_square_ <= goal_) {
                active_ = false;
            } else if (iterations_ >= limit) {
                state_ = given_up;
                active_ = false;
            } else {
#pragma unroll
                for (int e = 0; e < P::kept; ++e) direction_[e] = inverted_[e] * residual_[e] + turn * direction_[e];
            }
        }
    }

    // Computes the residuals of solved rows anew. Where rounding errors have run away from the recursion, the row is
    // active again, or gives up where that did not help before. False: no row had to be looked at.
    __device__ bool check(const float (&lambda)[P::kept]) {
        const bool takes_part = state_ == solved && !(checked_ <= bound_);
        float result[P::sums], square[P::kept], product[P::kept];
        if (!multiply(takes_part, solution_, result)) return false;
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            if (takes_part && place_.inside[e])
                residual_[e] = lambda[e] - slope_[e] * result[e] - f_.reg * solution_[e];
            square[e] = residual_[e] * residual_[e];
            product[e] = inverted_[e] * square[e];
        }
        const Pair sum = over_row(square, product);
        if (!takes_part) return true;
        residual_square_ = sum.a;
        product_ = sum.b;
        const bool nearer = residual_square_ <= checked_ / 4;
        checked_ = residual_square_;
        if (residual_square_ <= bound_) return true;
        if (nearer)
            activate();
        else
            state_ = given_up;
        return true;
    }

    const RecurrenceBackward<float>& f_;
    const P& place_;
    Memory& memory_;
    Panel<K> gram_;
    bool finite_;    // W is
    bool rounding_;  // rounding errors may be as large as rtol: residuals have to be computed anew
    int turn_ = 0;   // of memory_.sums
    // Of each unit: K_jj, a'(z_t), 1/(d² K_jj + r).
    float diagonal_[P::kept], slope_[P::kept], inverted_[P::kept];
    float solution_[P::kept], residual_[P::kept], direction_[P::kept];
    // Of the row, residuals counted in its unit: a power of two, so that λ over it has a mean magnitude from 1 to 2.
    float unit_, squared_;             // squared_: the square of λ
    float goal_, bound_;               // squares of the residual at which to stop, and with which to be content
    float product_;                    // of the residual with the preconditioned one
    float residual_square_, checked_;  // and when last computed anew
    int iterations_;
    State state_;
    bool active_;
};

// Both products of a step with Wᵀ, that of D y and that of δ, take the same matrix.
template <int K, int rows, bool adjoins>
__global__ void __launch_bounds__(threads_of<K>, 1) rnn_jacobian_kernel(const RecurrenceBackward<float> f) {
    using P = Place<K, rows>;
    using Memory = JacobianMemory<K, rows>;
    TPK_SHARED(Memory, memory);
    const P place(f.B, f.N);
    Panel<K> weight;
    const ptrdiff_t time = f.B * f.H * f.N;
    weight.load(f.weight + place.head * f.N * f.N, static_cast<int>(f.N), true, place.group, place.lane);
    JacobianSolver<K, rows> solver(f, place, memory);
    ptrdiff_t at[P::kept], first[P::kept], g[P::kept];  // as in rnn_backward_kernel
    float term[P::kept], through[P::kept];
#pragma unroll
    for (int e = 0; e < P::kept; ++e) {
        const bool inside = place.inside[e];
        first[e] = (place.sequence[e] * f.H + place.head) * f.N + place.column[e];
        at[e] = (f.T_ - 1) * time + first[e];
        g[e] = (f.T_ - 1) * f.grad_h_strides.time + place.sequence[e] * f.grad_h_strides.batch +
               place.head * f.grad_h_strides.head + place.column[e];
        term[e] = inside && f.carried_in ? f.carried_in[first[e]] : 0;
        through[e] = inside && adjoins && f.through_in ? f.through_in[first[e]] : 0;
        if (inside && f.grad_last) term[e] = fmaf(f.step, f.grad_last[first[e]], term[e]);
    }
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        float lambda[P::kept], state[P::kept];
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            const bool inside = place.inside[e];
            state[e] = inside ? f.h[at[e]] : 0;
            lambda[e] = inside ? term[e] : 0;
            if (inside && f.grad_h) lambda[e] = fmaf(f.step, f.grad_h[g[e]], lambda[e]);
            const float mine =
                inside ? through_activation(nonlinearity_of(f.cell), lambda[e] + through[e], state[e]) : 0;
            if (place.writes && inside) f.grad_u[at[e]] = mine;
            if (adjoins && place.writes) memory.delta[t % 2][place.row[e]][place.column[e]] = mine;
            at[e] -= time;
            g[e] -= f.grad_h_strides.time;
        }
        const auto outcome = solver.solve(lambda, state);
        if (place.column[0] == 0 && place.writes && place.sequence[0] < f.B) {
            const ptrdiff_t sample = (t * f.B + place.sequence[0]) * f.H + place.head;
            if (f.iterations) f.iterations[sample] = outcome.iterations;
            f.missed[sample] = outcome.missed;
        }
#pragma unroll
        for (int e = 0; e < P::kept; ++e)
            if (place.writes) memory.product[place.row[e]][place.column[e]] = place.inside[e] ? lambda[e] : 0;
        __syncthreads();
        float carried[P::sums], adjoint[P::sums];
        weight.multiply(memory.product, place.lane, carried);
        if constexpr (adjoins) weight.multiply(memory.delta[t % 2], place.lane, adjoint);
        reduce<P::sums, splits>(carried, place.lane);
        if constexpr (adjoins) reduce<P::sums, splits>(adjoint, place.lane);
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            term[e] = carried[e];
            if constexpr (adjoins) through[e] = adjoint[e];
        }
    }
#pragma unroll
    for (int e = 0; e < P::kept; ++e) {
        if (!place.writes || !place.inside[e]) continue;
        if (f.carried_out) f.carried_out[first[e]] = term[e];
        if (f.through_out) f.through_out[first[e]] = through[e];
    }
}
