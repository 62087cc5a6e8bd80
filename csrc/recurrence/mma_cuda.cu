// The products on tensor cores. One thread block runs a tile of 8 batch rows of one head through all T steps, with one
// barrier a step; the matrices stay in its registers, the states go round through shared memory, as what is multiplied:
// rounded to the storage type, or split in two tf32 parts.
//
// N is padded to K. Who holds what, at which K:
//
//                                 K    warps   registers of a thread   shared memory, KB: forward,
//                                              for each matrix         backward of one or two matrices
//   bfloat16, float16            64      4            16                  2    2     4
//                               128      8            32                  4    4     8
//                               256      8           128                  8    8     -
//   tf32                         64      4            32                  4    4     8
//                               128      8            64                  8    8    16
//   float32, as 3 products       64      4            64                  8    8    16
//   of tf32 parts               128      8           128                 16   16     -
//
// Where a matrix takes 128 registers there is no place for a second. A total update through P is two sweeps there, the
// first of which leaves displacements in memory, in float32: the second pays its barrier and its way through shared
// memory again, some 300 cycles a step, whereas a matrix in shared memory would take 1024 to read.
//
// 8 rows, not 16: the tensor cores take as long for a row either way. What a step should cost is in
// benchmarks/gpu_log.md: predicted, it has not run on a GPU yet.
#include "../common/mma_cuda.h"
#include "common_cuda.h"
#include "mma_cuda.h"

namespace tpk {

namespace {

// parts: of float32, 1 (tf32) or 2 (both that are needed for its accuracy).
template <class T, int parts_, int K_>
struct Shape {
    static_assert(sizeof(T) == 4 || parts_ == 1);
    static constexpr int K = K_, parts = parts_;
    static constexpr int words = K * static_cast<int>(sizeof(T)) / 4;  // of a row
    static constexpr int steps = words / mma::step_words;
    static constexpr int tiles = K > 128 ? 2 : 1;  // of a warp
    static constexpr int warps = K / mma::tile_units / tiles;
    static constexpr int threads = 32 * warps;
    static constexpr int chains = 4 / tiles;  // sums that are added up last: one after the other an instruction is slow
    static constexpr bool holds_two = tiles * steps * parts * 4 <= 64;
};

// What is multiplied, a row of the batch after the other.
template <class S>
struct alignas(16) Operand {
    uint32_t of[S::parts][mma::rows][S::words];
};

struct alignas(16) Chunk {
    uint32_t of[mma::chunk_words];
};

struct alignas(8) Two {
    uint32_t of[2];
};

// What one thread has to do with its tile: of each tile of units 4 numbers, of two units in two rows.
template <class S>
struct TilePlace {
    int warp, group, member;
    int unit, units, rows;  // the first unit; how many there are from it on, and from the first row
    ptrdiff_t head, sequence;

    __device__ TilePlace(ptrdiff_t B, ptrdiff_t N) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        warp = static_cast<int>(threadIdx.x) / 32;
        group = lane / 4;
        member = lane % 4;
        const ptrdiff_t blocks = (B + mma::rows - 1) / mma::rows;
        head = blockIdx.x / blocks;
        sequence = blockIdx.x % blocks * mma::rows + mma::row_of(member, 0);
        unit = mma::unit_of(warp * S::tiles, group, 0);
        units = static_cast<int>(N) - unit;
        rows = B - sequence < 2 ? static_cast<int>(B - sequence) : 2;
    }

    // Neither padding nor beyond the batch.
    __device__ bool inside(int tile, int i) const { return i % 2 < rows && tile * mma::tile_units + i / 2 < units; }

    // From the thread's first number.
    __device__ ptrdiff_t offset(int tile, int i, ptrdiff_t batch_stride) const {
        return i % 2 * batch_stride + tile * mma::tile_units + i / 2;
    }
};

// A number for each of a thread's.
template <class S>
using Numbers = float[S::tiles][4];

template <class S, class Run>
__device__ inline void for_each(Run run) {
#pragma unroll
    for (int tile = 0; tile < S::tiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) run(tile, i);
}

template <class T>
__device__ inline uint32_t pair(float first, float second) {
    return rounded<T>(first).bits | static_cast<uint32_t>(rounded<T>(second).bits) << 16;
}

// Two neighbours go into shared memory together.
template <class T, class S>
__device__ inline void put(Operand<S>& operand, const TilePlace<S>& place, const Numbers<S>& numbers) {
#pragma unroll
    for (int tile = 0; tile < S::tiles; ++tile)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = mma::row_of(place.member, r), unit = place.unit + tile * mma::tile_units;
            const float first = numbers[tile][r], second = numbers[tile][2 + r];
            const int word = unit * static_cast<int>(sizeof(T)) / 4;
            const int at = mma::slot_of(row, word / mma::chunk_words) * mma::chunk_words + word % mma::chunk_words;
            if constexpr (sizeof(T) == 2) {
                operand.of[0][row][at] = pair<T>(first, second);
            } else {
                const mma::Split one = mma::split(first), other = mma::split(second);
                *reinterpret_cast<Two*>(&operand.of[0][row][at]) = {{one.high, other.high}};
                if constexpr (S::parts == 2) *reinterpret_cast<Two*>(&operand.of[1][row][at]) = {{one.low, other.low}};
            }
        }
}

// A thread's part of a matrix, for y = x Aᵀ.
template <class T, class S>
struct Fragments {
    uint32_t of[S::tiles][S::steps][S::parts][4];

    // A [n][k], or [k][n] if transposed; by way of shared memory, so that neither addresses nor numbers under way take
    // registers from the matrix.
    __device__ void load(const T* matrix, ptrdiff_t size, bool transposed, const TilePlace<S>& place,
                         Operand<S> (&memory)[2]) {
        static_assert(sizeof memory >= S::K * mma::step_words * sizeof(uint32_t));
        uint32_t* const stage = memory[0].of[0][0];  // [K][words of a step]
        const int N = static_cast<int>(size);
        const auto at = [&](int n, int k) {
            return n < N && k < N ? widened(matrix[transposed ? k * N + n : n * N + k]) : 0.0f;
        };
#pragma unroll
        for (int step = 0; step < S::steps; ++step) {
            __syncthreads();
#pragma unroll 4
            for (int item = static_cast<int>(threadIdx.x); item < S::K * mma::step_words; item += S::threads) {
                const int n = transposed ? item % S::K : item / mma::step_words;
                const int place_of_word = transposed ? item / S::K : item % mma::step_words;
                const int word = mma::word_of(step, place_of_word / 2, place_of_word % 2);
                uint32_t& staged = stage[n * mma::step_words + place_of_word];
                if constexpr (sizeof(T) == 2)
                    staged = pair<T>(at(n, 2 * word), at(n, 2 * word + 1));
                else
                    staged = static_cast<uint32_t>(__float_as_int(at(n, word)));
            }
            __syncthreads();
#pragma unroll
            for (int tile = 0; tile < S::tiles; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = mma::unit_of(place.warp * S::tiles + tile, place.group, i % 2);
                    const uint32_t staged = stage[n * mma::step_words + place.member * 2 + i / 2];
                    if constexpr (sizeof(T) == 2) {
                        of[tile][step][0][i] = staged;
                    } else {
                        const mma::Split parts = mma::split(__int_as_float(static_cast<int>(staged)));
                        of[tile][step][0][i] = parts.high;
                        if constexpr (S::parts == 2) of[tile][step][1][i] = parts.low;
                    }
                }
        }
        __syncthreads();
    }

    __device__ void multiply(const Operand<S>& x, const TilePlace<S>& place, Numbers<S>& sums) const {
        float chains[S::tiles][S::chains][4] = {};
#pragma unroll
        for (int step = 0; step < S::steps; step += 2) {
            const int slot = mma::slot_of(place.group, step / 2 * 4 + place.member);
            Chunk parts[S::parts];
#pragma unroll
            for (int part = 0; part < S::parts; ++part)
                parts[part] = *reinterpret_cast<const Chunk*>(&x.of[part][place.group][slot * mma::chunk_words]);
#pragma unroll
            for (int second = 0; second < 2; ++second)
#pragma unroll
                for (int tile = 0; tile < S::tiles; ++tile) {
                    const auto& matrix = of[tile][step + second];
                    const auto add = [&](int chain, int of_matrix, int of_x) {
                        mma::multiply_add<T>(chains[tile][chain], matrix[of_matrix], parts[of_x].of[2 * second],
                                             parts[of_x].of[2 * second + 1]);
                    };
                    if constexpr (S::parts == 1) {
                        add((step + second) % S::chains, 0, 0);
                    } else {  // the product of the low parts is below float32's last bit
                        add(second, 0, 0);
                        add(2, 1, 0);
                        add(3, 0, 1);
                    }
                }
        }
        for_each<S>([&](int tile, int i) {
            const auto& c = chains[tile];
            sums[tile][i] = c[0][i] + c[1][i];
            if constexpr (S::chains == 4) {
                const float rest = c[2][i] + c[3][i];
                // The low part of a weight may have the other sign, or be zero: infinity must not become NaN by that.
                sums[tile][i] += S::parts == 1 || fabsf(rest) < INFINITY ? rest : 0.0f;
            }
        });
    }
};

template <class T, int parts, int K>
__global__ void __launch_bounds__(Shape<T, parts, K>::threads, 1) rnn_forward_mma_kernel(const RecurrenceForward<T> f) {
    using S = Shape<T, parts, K>;
    using States = Operand<S>[2];
    TPK_SHARED(States, states);
    const TilePlace<S> place(f.B, f.N);
    Fragments<T, S> weight;
    weight.load(f.weight + place.head * f.N * f.N, f.N, false, place, states);
    const ptrdiff_t row = f.H * f.N, first = place.sequence * row + place.head * f.N + place.unit;
    const T* input = f.input + place.sequence * f.input_strides.batch + place.head * f.input_strides.head + place.unit;
    T* h = f.h + first;
    Numbers<S> u, state;
    for_each<S>([&](int tile, int i) {
        const bool inside = place.inside(tile, i);
        u[tile][i] = inside ? widened(input[place.offset(tile, i, f.input_strides.batch)]) : 0;
        state[tile][i] = inside && f.start ? widened(f.start[first + place.offset(tile, i, row)]) : 0;
    });
    put<T>(states[0], place, state);
    __syncthreads();
    for (ptrdiff_t t = 0; t < f.T_; ++t) {
        Numbers<S> next = {};  // its trip from memory takes as long as the product
        input += f.input_strides.time;
        for_each<S>([&](int tile, int i) {
            if (t + 1 < f.T_ && place.inside(tile, i))
                next[tile][i] = widened(input[place.offset(tile, i, f.input_strides.batch)]);
        });
        Numbers<S> sums;
        weight.multiply(states[t % 2], place, sums);
        for_each<S>([&](int tile, int i) {
            // Padding stays zero, whatever NaN its zero weights met.
            const bool inside = place.inside(tile, i);
            state[tile][i] = inside ? activation(nonlinearity_of(f.cell), u[tile][i] + sums[tile][i]) : 0;
            if (inside) h[place.offset(tile, i, row)] = rounded<T>(state[tile][i]);
            u[tile][i] = next[tile][i];
        });
        put<T>(states[(t + 1) % 2], place, state);
        h += f.B * row;
        __syncthreads();
    }
}

// Both products of a step are computed together: `carries` that with P, of the inverses "weight" and "layer",
// `adjoins` that with Wᵀ, of the update "total". Given memory for displacements, one that carries only leaves them
// there, and no gradient, and one that adjoins only takes them from there.
template <class T, int parts, int K, bool carries, bool adjoins>
__global__ void __launch_bounds__(Shape<T, parts, K>::threads, 1)
    rnn_backward_mma_kernel(const RecurrenceBackward<T, float> f, float* displacements) {
    using S = Shape<T, parts, K>;
    struct Shared {
        Operand<S> operands[carries && adjoins ? 2 : 1][2];  // what P takes of λ, and δ
    };
    TPK_SHARED(Shared, shared);
    auto& sent = shared.operands[0];
    auto& delta = shared.operands[carries && adjoins];
    const TilePlace<S> place(f.B, f.N);
    Fragments<T, S> feedback, weight;
    const ptrdiff_t matrix = place.head * f.N * f.N;
    if constexpr (carries) feedback.load(f.feedback + matrix, f.N, false, place, sent);
    if constexpr (adjoins) weight.load(f.weight + matrix, f.N, true, place, delta);
    const bool leaves = carries && !adjoins && displacements, takes = !carries && adjoins && displacements;
    const bool has_gradient = !takes && f.grad_h;
    const float scale = takes ? 1 : f.step;
    const ptrdiff_t row = f.H * f.N, first = place.sequence * row + place.head * f.N + place.unit, time = f.B * row;
    ptrdiff_t at = first + (f.T_ - 1) * time;  // of step t in h and δ
    const T* grad = f.grad_h + (f.T_ - 1) * f.grad_h_strides.time + place.sequence * f.grad_h_strides.batch +
                    place.head * f.grad_h_strides.head + place.unit;
    const auto source = [&](int tile, int i) {
        float value = 0;
        if (has_gradient) value = widened(grad[place.offset(tile, i, f.grad_h_strides.batch)]);
        if (takes) value = displacements[at + place.offset(tile, i, row)];
        return value;
    };
    Numbers<S> term, through, gradient, state;
    for_each<S>([&](int tile, int i) {
        const bool inside = place.inside(tile, i);
        const ptrdiff_t here = first + place.offset(tile, i, row);
        term[tile][i] = inside && f.carried_in && f.inverse != Inverse::none ? widened(f.carried_in[here]) : 0;
        through[tile][i] = inside && adjoins && f.through_in ? widened(f.through_in[here]) : 0;
        gradient[tile][i] = inside ? scale * source(tile, i) : 0;
        if (inside && f.grad_last) gradient[tile][i] = fmaf(f.step, widened(f.grad_last[here]), gradient[tile][i]);
        state[tile][i] = inside ? widened(f.h[at + place.offset(tile, i, row)]) : 0;
    });
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        Numbers<S> displacement, mine;
        for_each<S>([&](int tile, int i) {
            const bool inside = place.inside(tile, i);
            const ptrdiff_t here = at + place.offset(tile, i, row);
            const float lambda = term[tile][i] + gradient[tile][i];
            const float mu = lambda + through[tile][i];
            mine[tile][i] = inside ? through_activation(nonlinearity_of(f.cell), mu, state[tile][i]) : 0;
            if (inside && leaves)
                displacements[here] = lambda;
            else if (inside)
                f.grad_u[here] = rounded<T>(mine[tile][i]);
            if constexpr (carries) {
                const float value = f.inverse == Inverse::layer
                                        ? through_inverse(nonlinearity_of(f.cell), lambda, state[tile][i], f.clip)
                                        : lambda;
                displacement[tile][i] = inside ? value : 0;
            } else {
                term[tile][i] = f.inverse == Inverse::identity ? lambda : 0;
            }
        });
        if constexpr (carries) put<T>(sent[t % 2], place, displacement);
        if constexpr (adjoins) put<T>(delta[t % 2], place, mine);
        Numbers<S> next_gradient = {}, next_state = {};
        at -= time;
        grad -= f.grad_h_strides.time;
        for_each<S>([&](int tile, int i) {
            if (t == 0 || !place.inside(tile, i)) return;
            next_state[tile][i] = widened(f.h[at + place.offset(tile, i, row)]);
            next_gradient[tile][i] = source(tile, i);
        });
        if constexpr (carries || adjoins) __syncthreads();
        if constexpr (carries) feedback.multiply(sent[t % 2], place, term);
        if constexpr (adjoins) weight.multiply(delta[t % 2], place, through);
        for_each<S>([&](int tile, int i) {
            gradient[tile][i] = scale * next_gradient[tile][i];
            state[tile][i] = next_state[tile][i];
        });
    }
    for_each<S>([&](int tile, int i) {
        if (!place.inside(tile, i)) return;
        const ptrdiff_t here = first + place.offset(tile, i, row);
        if (f.carried_out) f.carried_out[here] = rounded<T>(term[tile][i]);
        if (f.through_out) f.through_out[here] = rounded<T>(through[tile][i]);
    });
}

// run(the Shape), of the smallest one that holds N.
template <class T, int parts, class Run>
void for_shape(const char* what, ptrdiff_t N, Run run) {
    constexpr int largest = recurrence_cuda_largest<T>;
    if (N <= 64)
        run(Shape<T, parts, 64>{});
    else if (N <= 128)
        run(Shape<T, parts, 128>{});
    else if (N <= largest)
        run(Shape<T, parts, largest>{});
    else
        throw std::invalid_argument(std::string(what) + ": N must be at most " + std::to_string(largest) + ", got " +
                                    std::to_string(N));
}

}  // namespace

template <class T, int parts>
void recurrence_forward_mma(const RecurrenceForward<T>& f, void* stream) {
    constexpr const char* what = "recurrence_fwd";
    const ptrdiff_t blocks = blocks_of(what, f.B, f.H, mma::rows);
    for_shape<T, parts>(what, f.N, [&](auto shape) {
        launch(what, rnn_forward_mma_kernel<T, parts, shape.K>, blocks, shape.threads, stream, f);
    });
}

template <class T, int parts>
bool recurrence_mma_needs_displacements(const RecurrenceBackward<T, float>& f) {
    bool needs = false;
    for_shape<T, parts>("recurrence_bwd", f.N, [&](auto shape) {
        needs = carries(f.inverse) && f.update == Update::total && !shape.holds_two;
    });
    return needs;
}

template <class T, int parts>
void recurrence_backward_mma(const RecurrenceBackward<T, float>& f, float* displacements, void* stream) {
    constexpr const char* what = "recurrence_bwd";
    const bool two_sweeps = recurrence_mma_needs_displacements<T, parts>(f), adjoins = f.update == Update::total;
    if (two_sweeps && !displacements) throw std::invalid_argument("recurrence_bwd: displacements is missing");
    const ptrdiff_t blocks = blocks_of(what, f.B, f.H, mma::rows);
    for_shape<T, parts>(what, f.N, [&](auto shape) {
        using S = decltype(shape);
        const auto sweep = [&](auto kernel, const RecurrenceBackward<T, float>& of, float* memory = nullptr) {
            launch(what, kernel, blocks, S::threads, stream, of, memory);
        };
        constexpr auto carry = rnn_backward_mma_kernel<T, parts, S::K, true, false>,
                       adjoin = rnn_backward_mma_kernel<T, parts, S::K, false, true>;
        if (two_sweeps) {
            RecurrenceBackward<T, float> first = f, second = f;
            first.through_out = nullptr;
            second.inverse = Inverse::none;
            second.grad_last = second.carried_in = nullptr;
            second.carried_out = nullptr;
            sweep(carry, first, displacements);
            sweep(adjoin, second, displacements);
        } else if (carries(f.inverse) && adjoins) {
            if constexpr (S::holds_two) sweep(rnn_backward_mma_kernel<T, parts, S::K, true, true>, f);
        } else if (carries(f.inverse)) {
            sweep(carry, f);
        } else if (adjoins) {
            sweep(adjoin, f);
        } else {
            sweep(rnn_backward_mma_kernel<T, parts, S::K, false, false>, f);
        }
    });
}

#define TPK_FLOAT(parts)                                                                                  \
    template void recurrence_forward_mma<float, parts>(const RecurrenceForward<float>&, void*);           \
    template void recurrence_backward_mma<float, parts>(const RecurrenceBackward<float>&, float*, void*); \
    template bool recurrence_mma_needs_displacements<float, parts>(const RecurrenceBackward<float>&);
TPK_FLOAT(1)
TPK_FLOAT(2)
#undef TPK_FLOAT

// Half precision has no other kernel.
template <class T>
void recurrence_forward_cuda(const RecurrenceForward<T>& f, bool, int device, void* stream) {
    const OnDevice on_device(device);
    if (f.T_ * f.B * f.H * f.N == 0) return;
    recurrence_forward_mma<T, 1>(f, stream);
}

template <class T>
void recurrence_backward_cuda(const RecurrenceBackward<T, float>& f, float* displacements, bool, int device,
                              void* stream) {
    check_rule(f);
    const OnDevice on_device(device);
    if (f.T_ * f.B * f.H * f.N == 0) return;
    recurrence_backward_mma<T, 1>(f, displacements, stream);
}

template <class T>
bool recurrence_needs_displacements(const RecurrenceBackward<T, float>& f, bool, int) {
    return recurrence_mma_needs_displacements<T, 1>(f);
}

#define TPK_HALF(T)                                                                                           \
    template void recurrence_forward_cuda<T>(const RecurrenceForward<T>&, bool, int, void*);                  \
    template void recurrence_backward_cuda<T>(const RecurrenceBackward<T, float>&, float*, bool, int, void*); \
    template bool recurrence_needs_displacements<T>(const RecurrenceBackward<T, float>&, bool, int);
TPK_HALF(bfloat16)
TPK_HALF(float16)
#undef TPK_HALF

}  // namespace tpk
