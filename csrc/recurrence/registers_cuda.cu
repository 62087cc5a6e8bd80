// One thread block runs a tile of 1, 2 or 4 batch rows of one head through all T steps, for N <= 128 in float32. The
// matrices stay in its registers, the states go round through shared memory: a step costs one barrier.
//
// N is padded to K = 32, 64 or 128. A thread computes, for 4 outputs, an eighth of each sum; the 8 lanes that share a
// sum then add up by shuffles, in an order that is the same for every tile, so that a result does not depend on the
// batch beside it. Four outputs for each number read: with one, shared memory could not feed the multipliers.
//
// What a step should cost, cycle by cycle, is in benchmarks/gpu_log.md: predicted, it has not run on a GPU yet.
#include "common_cuda.h"
#include "mma_cuda.h"

namespace tpk {

namespace {

constexpr int outputs = 4;  // of a thread
constexpr int splits = 8;   // lanes that share a sum

template <int K>
constexpr int threads_of = K / outputs * splits;

// A state of the tile's rows, twice: while some threads still read one, others write the next.
template <int K, int rows>
struct alignas(16) Vectors {
    float of[2][rows][K];
};

// What one thread has to do with its tile.
template <int K, int rows>
struct Place {
    static constexpr int sums = outputs * rows;
    static constexpr int kept = sums > splits ? sums / splits : 1;    // sums that end in one lane
    static constexpr int copies = sums < splits ? splits / sums : 1;  // lanes that one sum ends in

    int group, lane;  // 4 outputs; which eighth
    int row[kept], column[kept];
    ptrdiff_t head, sequence[kept];
    bool inside[kept];  // neither padding nor beyond the batch
    bool writes;        // one of the copies does

    __device__ Place(ptrdiff_t B, ptrdiff_t N) {
        group = static_cast<int>(threadIdx.x) / splits;
        lane = static_cast<int>(threadIdx.x) % splits;
        writes = lane % copies == 0;
        const ptrdiff_t tiles = (B + rows - 1) / rows;
        head = blockIdx.x / tiles;
#pragma unroll
        for (int e = 0; e < kept; ++e) {
            const int sum = lane / copies * kept + e;
            row[e] = sum / outputs;
            column[e] = group * outputs + sum % outputs;
            sequence[e] = blockIdx.x % tiles * rows + row[e];
            inside[e] = sequence[e] < B && column[e] < N;
        }
    }
};

// A thread's part of a matrix, for y = x Aᵀ.
template <int K>
struct Panel {
    float of[outputs][K / splits];

    // A [n][k], or [k][n] if transposed
    __device__ void load(const float* matrix, int N, bool transposed, int group, int lane) {
#pragma unroll
        for (int i = 0; i < outputs; ++i)
#pragma unroll
            for (int j = 0; j < K / splits; ++j) {
                const int n = group * outputs + i, k = j / 4 * (4 * splits) + lane * 4 + j % 4;
                of[i][j] = n < N && k < N ? matrix[transposed ? k * N + n : n * N + k] : 0.0f;
            }
    }

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < outputs; ++i)
#pragma unroll
            for (int j = 0; j < K / splits; ++j) of[i][j] = 0;
    }

    // Adds this thread's part of w wᵀ, w: column m of the matrix. What it returns is NaN where its part of w is not
    // finite, else 0.
    __device__ float add_outer_product(const float* matrix, int N, int m, int group, int lane) {
        float mine[outputs], zero = 0;
#pragma unroll
        for (int i = 0; i < outputs; ++i) {
            const int n = group * outputs + i;
            mine[i] = n < N ? matrix[n * N + m] : 0;
            zero += 0 * mine[i];
        }
#pragma unroll
        for (int j = 0; j < K / splits; ++j) {
            const int k = j / 4 * (4 * splits) + lane * 4 + j % 4;
            const float other = k < N ? matrix[k * N + m] : 0;
#pragma unroll
            for (int i = 0; i < outputs; ++i) of[i][j] = fmaf(mine[i], other, of[i][j]);
        }
        return zero;
    }

    // The 8 lanes read 8 neighbours of 16 bytes: no two of them from the same bank.
    template <int rows>
    __device__ void multiply(const float (&x)[rows][K], int lane, float (&sums)[outputs * rows]) const {
#pragma unroll
        for (int s = 0; s < outputs * rows; ++s) sums[s] = 0;
#pragma unroll
        for (int j = 0; j < K / splits; j += 4)
#pragma unroll
            for (int row = 0; row < rows; ++row) {
                const float4 part = *reinterpret_cast<const float4*>(&x[row][j * splits + lane * 4]);
#pragma unroll
                for (int i = 0; i < outputs; ++i) {
                    float& sum = sums[row * outputs + i];
                    sum = fmaf(of[i][j], part.x, sum);
                    sum = fmaf(of[i][j + 1], part.y, sum);
                    sum = fmaf(of[i][j + 2], part.z, sum);
                    sum = fmaf(of[i][j + 3], part.w, sum);
                }
            }
    }
};

template <int K, int rows>
__global__ void __launch_bounds__(threads_of<K>, 1) rnn_forward_kernel(const RecurrenceForward<float> f) {
    using Shared = Vectors<K, rows>;
    using P = Place<K, rows>;
    TPK_SHARED(Shared, state);
    const P place(f.B, f.N);
    Panel<K> weight;
    weight.load(f.weight + place.head * f.N * f.N, static_cast<int>(f.N), false, place.group, place.lane);
    const float* input[P::kept];
    float* h[P::kept];
    float u[P::kept];
#pragma unroll
    for (int e = 0; e < P::kept; ++e) {
        const ptrdiff_t offset = (place.sequence[e] * f.H + place.head) * f.N + place.column[e];
        input[e] =
            f.input + place.sequence[e] * f.input_strides.batch + place.head * f.input_strides.head + place.column[e];
        h[e] = f.h + offset;
        u[e] = place.inside[e] ? *input[e] : 0;
        if (place.writes) state.of[0][place.row[e]][place.column[e]] = place.inside[e] && f.start ? f.start[offset] : 0;
    }
    __syncthreads();
    for (ptrdiff_t t = 0; t < f.T_; ++t) {
        float next[P::kept] = {};  // its trip from memory takes as long as the product
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            input[e] += f.input_strides.time;
            if (t + 1 < f.T_ && place.inside[e]) next[e] = *input[e];
        }
        float sums[P::sums];
        weight.multiply(state.of[t % 2], place.lane, sums);
        reduce<P::sums, splits>(sums, place.lane);
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            // Padding stays zero, whatever NaN its zero weights met.
            const float value = place.inside[e] ? activation(nonlinearity_of(f.cell), u[e] + sums[e]) : 0;
            if (place.writes) state.of[(t + 1) % 2][place.row[e]][place.column[e]] = value;
            if (place.writes && place.inside[e]) *h[e] = value;
            h[e] += f.B * f.H * f.N;
            u[e] = next[e];
        }
        __syncthreads();
    }
}

// Both products of a step are computed together: `carries` that with P, of the inverses "weight" and "layer",
// `adjoins` that with Wᵀ, of the update "total".
template <int K, int rows, bool carries, bool adjoins>
__global__ void __launch_bounds__(threads_of<K>, 1) rnn_backward_kernel(const RecurrenceBackward<float> f) {
    using P = Place<K, rows>;
    struct Shared {
        Vectors<K, rows> vectors[carries && adjoins ? 2 : 1];  // what P takes of λ, and δ
    };
    TPK_SHARED(Shared, shared);
    auto& displacement = shared.vectors[0].of;
    auto& delta = shared.vectors[carries && adjoins].of;
    const P place(f.B, f.N);
    Panel<K> feedback, weight;
    const ptrdiff_t matrix = place.head * f.N * f.N, time = f.B * f.H * f.N;
    const int N = static_cast<int>(f.N);
    if constexpr (carries) feedback.load(f.feedback + matrix, N, false, place.group, place.lane);
    if constexpr (adjoins) weight.load(f.weight + matrix, N, true, place.group, place.lane);
    ptrdiff_t at[P::kept], first[P::kept], g[P::kept];  // of step t and the first step in h and δ, of step t in grad_h
    float term[P::kept], through[P::kept], gradient[P::kept], state[P::kept];
#pragma unroll
    for (int e = 0; e < P::kept; ++e) {
        const bool inside = place.inside[e];
        first[e] = (place.sequence[e] * f.H + place.head) * f.N + place.column[e];
        at[e] = (f.T_ - 1) * time + first[e];
        g[e] = (f.T_ - 1) * f.grad_h_strides.time + place.sequence[e] * f.grad_h_strides.batch +
               place.head * f.grad_h_strides.head + place.column[e];
        term[e] = inside && f.carried_in && f.inverse != Inverse::none ? f.carried_in[first[e]] : 0;
        through[e] = inside && adjoins && f.through_in ? f.through_in[first[e]] : 0;
        gradient[e] = inside && f.grad_h ? f.step * f.grad_h[g[e]] : 0;
        if (inside && f.grad_last) gradient[e] = fmaf(f.step, f.grad_last[first[e]], gradient[e]);
        state[e] = inside ? f.h[at[e]] : 0;
    }
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        float next_gradient[P::kept] = {}, next_state[P::kept] = {};
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            const bool more = t > 0 && place.inside[e];
            g[e] -= f.grad_h_strides.time;
            if (more) next_state[e] = f.h[at[e] - time];
            if (more && f.grad_h) next_gradient[e] = f.grad_h[g[e]];
            const float lambda = term[e] + gradient[e];
            const float mu = lambda + through[e];
            const float mine = place.inside[e] ? through_activation(nonlinearity_of(f.cell), mu, state[e]) : 0;
            if (place.writes && place.inside[e]) f.grad_u[at[e]] = mine;
            at[e] -= time;
            if constexpr (carries) {
                const float sent = f.inverse == Inverse::layer
                                       ? through_inverse(nonlinearity_of(f.cell), lambda, state[e], f.clip)
                                       : lambda;
                if (place.writes) displacement[t % 2][place.row[e]][place.column[e]] = place.inside[e] ? sent : 0;
            } else {
                term[e] = f.inverse == Inverse::identity ? lambda : 0;
            }
            if constexpr (adjoins)
                if (place.writes) delta[t % 2][place.row[e]][place.column[e]] = mine;
        }
        if constexpr (carries || adjoins) __syncthreads();
        float carried[P::sums], adjoint[P::sums];
        if constexpr (carries) feedback.multiply(displacement[t % 2], place.lane, carried);
        if constexpr (adjoins) weight.multiply(delta[t % 2], place.lane, adjoint);
        if constexpr (carries) reduce<P::sums, splits>(carried, place.lane);
        if constexpr (adjoins) reduce<P::sums, splits>(adjoint, place.lane);
#pragma unroll
        for (int e = 0; e < P::kept; ++e) {
            if constexpr (carries) term[e] = carried[e];
            if constexpr (adjoins) through[e] = adjoint[e];
            gradient[e] = f.step * next_gradient[e];
            state[e] = next_state[e];
        }
    }
#pragma unroll
    for (int e = 0; e < P::kept; ++e) {
        if (!place.writes || !place.inside[e]) continue;
        if (f.carried_out) f.carried_out[first[e]] = term[e];
        if (f.through_out) f.through_out[first[e]] = through[e];
    }
}

#include "jacobian_cuda.inl"

// The smallest tile with which all blocks run at once. 0 where none does: then a step on tensor cores, of 8 rows, is
// shorter than two of 4 rows; with tf32 already than one of 4. The cycles are in benchmarks/gpu_log.md.
int rows_for(ptrdiff_t B, ptrdiff_t H, bool tf32, int multiprocessors) {
    for (int rows : {1, 2, 4})
        if ((B + rows - 1) / rows * H <= multiprocessors && !(rows == 4 && tf32)) return rows;
    return 0;
}

// run(K, rows), of the smallest kernel that holds N.
template <class Run>
void for_tile(const char* what, ptrdiff_t N, int rows, Run run) {
    const auto with = [&](auto K) {
        if (rows == 1)
            run(K, Constant<1>{});
        else if (rows == 2)
            run(K, Constant<2>{});
        else
            run(K, Constant<4>{});
    };
    if (N <= 32)
        with(Constant<32>{});
    else if (N <= 64)
        with(Constant<64>{});
    else if (N <= recurrence_cuda_largest<float>)
        with(Constant<recurrence_cuda_largest<float>>{});
    else
        throw std::invalid_argument(std::string(what) + ": N must be at most 128, got " + std::to_string(N));
}

// run(parts), where the product is one on tensor cores.
template <class Run>
void with_parts(bool tf32, Run run) {
    if (tf32)
        run(Constant<1>{});
    else
        run(Constant<2>{});
}

}  // namespace

template <>
void recurrence_forward_cuda(const RecurrenceForward<float>& f, bool tf32, int device, void* stream) {
    constexpr const char* what = "recurrence_fwd";
    if (f.N > recurrence_cuda_largest<float>) return recurrence_forward_cluster(f, device, stream);
    const OnDevice on_device(device);
    if (f.T_ * f.B * f.H * f.N == 0) return;
    const int rows = rows_for(f.B, f.H, tf32, multiprocessors(device));
    if (!rows) return with_parts(tf32, [&](auto parts) { recurrence_forward_mma<float, parts.of>(f, stream); });
    const ptrdiff_t blocks = blocks_of(what, f.B, f.H, rows);
    for_tile(what, f.N, rows, [&](auto K, auto R) {
        launch(what, rnn_forward_kernel<K.of, R.of>, blocks, threads_of<K.of>, stream, f);
    });
}

template <>
void recurrence_backward_cuda(const RecurrenceBackward<float>& f, float* displacements, bool tf32, int device,
                              void* stream) {
    constexpr const char* what = "recurrence_bwd";
    check_rule(f);
    if (f.N > recurrence_cuda_largest<float>) return recurrence_backward_cluster(f, device, stream);
    const OnDevice on_device(device);
    if (f.T_ * f.B * f.H * f.N == 0) return;
    if (f.inverse == Inverse::jacobian && !f.missed) throw std::invalid_argument("recurrence_bwd: missed is missing");
    int rows = rows_for(f.B, f.H, tf32, multiprocessors(device));
    if (!rows && f.inverse == Inverse::jacobian) rows = 4;  // it has no tile of 8
    if (!rows)
        return with_parts(tf32,
                          [&](auto parts) { recurrence_backward_mma<float, parts.of>(f, displacements, stream); });
    const ptrdiff_t blocks = blocks_of(what, f.B, f.H, rows);
    const bool adjoins = f.update == Update::total;
    for_tile(what, f.N, rows, [&](auto K, auto R) {
        if (f.inverse == Inverse::jacobian)
            return launch(what,
                          adjoins ? rnn_jacobian_kernel<K.of, R.of, true> : rnn_jacobian_kernel<K.of, R.of, false>,
                          blocks, threads_of<K.of>, stream, f);
        const auto kernel = carries(f.inverse) ? adjoins ? rnn_backward_kernel<K.of, R.of, true, true>
                                                         : rnn_backward_kernel<K.of, R.of, true, false>
                            : adjoins          ? rnn_backward_kernel<K.of, R.of, false, true>
                                               : rnn_backward_kernel<K.of, R.of, false, false>;
        launch(what, kernel, blocks, threads_of<K.of>, stream, f);
    });
}

template <>
bool recurrence_needs_displacements(const RecurrenceBackward<float>& f, bool tf32, int device) {
    const bool others = f.N > recurrence_cuda_largest<float> || f.inverse == Inverse::jacobian;  // a cluster's, or none
    if (others || rows_for(f.B, f.H, tf32, multiprocessors(device))) return false;
    bool needs = false;
    with_parts(tf32, [&](auto parts) { needs = recurrence_mma_needs_displacements<float, parts.of>(f); });
    return needs;
}

}  // namespace tpk
