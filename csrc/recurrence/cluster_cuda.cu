// One cluster of thread blocks runs a tile of 1, 2 or 4 batch rows of one head through all T steps, for 128 < N <= 1024
// in float32. Each block computes 64 units and keeps their rows of the matrices on chip: in registers, and what they
// cannot hold in shared memory. The states go round through the shared memory of all blocks: whoever computes a number
// stores it in each of them. A step costs one barrier of the cluster.
//
// N is padded to K, a multiple of 128. A warp computes 8 units, each lane a 32nd of each sum; the lanes then add up by
// shuffles, in an order that is the same for every tile, so that a result does not depend on the batch beside it.
//
// Two buffers take turns. A block that stores into one has passed the barrier of the step before, to which the others
// came only after they had read that buffer for the last time. Nothing is stored in another block behind a block's last
// barrier, so a block may end while others still compute.
//
// What a step should cost, cycle by cycle, is in benchmarks/gpu_log.md: predicted, it has not run on a GPU yet.
#include "../common/cluster_cuda.h"
#include "common_cuda.h"

namespace tpk {

namespace cluster {

constexpr int lanes = 32, threads = 256, outputs = 8;  // outputs: of a warp
constexpr int units = threads / lanes * outputs;       // of a block
constexpr int slice = 4 * lanes;                       // of K: each lane reads 16 bytes of it
constexpr int widest = 8;                              // slices of the largest K

// What a launch of either kernel is told about its matrices: how far K goes beyond the slices in registers, and over
// how many blocks the units are split.
struct Split {
    int blocks, in_shared;

    Split(ptrdiff_t N, int in_registers) : blocks(static_cast<int>((N + units - 1) / units)) {
        const int slices = static_cast<int>((N + slice - 1) / slice);
        in_shared = slices > in_registers ? slices - in_registers : 0;
    }
};

// The shared memory of a block, in float4: two buffers for the vectors that each matrix multiplies, then what the
// registers do not hold.
struct Layout {
    int K, buffer, rest;

    __host__ __device__ Layout(int in_registers, int in_shared, int rows)
        : K((in_registers + in_shared) * slice), buffer(rows * K / 4), rest(in_shared * outputs * threads) {}

    size_t bytes(int matrices) const { return matrices * (2 * static_cast<size_t>(buffer) + rest) * sizeof(float4); }
};

// What one thread has to do with its tile: of the warp's sums, after they are added up, one.
template <int rows>
struct Place {
    static constexpr int sums = outputs * rows;
    static constexpr int copies = lanes / sums;  // lanes that the sum ends in

    int rank, lane, first_column, copy, row, column;
    ptrdiff_t head, sequence;
    bool inside;  // neither padding nor beyond the batch

    __device__ Place(ptrdiff_t B, ptrdiff_t N, int blocks) {
        rank = static_cast<int>(blockIdx.x % blocks);
        lane = static_cast<int>(threadIdx.x) % lanes;
        first_column = rank * units + static_cast<int>(threadIdx.x) / lanes * outputs;
        copy = lane % copies;
        row = lane / copies / outputs;
        column = first_column + lane / copies % outputs;
        const ptrdiff_t tiles = (B + rows - 1) / rows, tile = blockIdx.x / blocks;
        head = tile / tiles;
        sequence = tile % tiles * rows + row;
        inside = sequence < B && column < N;
    }

    // Into this buffer of all blocks; the copies share the work. Padding stays zero, whatever NaN its zero weights met.
    __device__ void send(float4* buffer, int K, int blocks, float value) const {
        if (!inside) return;
        float* mine = reinterpret_cast<float*>(buffer) + row * K + column;
        for (int i = copy; i < blocks; i += copies) {
            const int to = rank + i;  // each block begins with another one
            store_in_block(mine, to < blocks ? to : to - blocks, value);
        }
    }
};

// A thread's part of a matrix, for y = x Aᵀ.
template <int in_registers>
struct Panel {
    float4 kept[in_registers][outputs];
    float4* rest;  // written and read by this thread only
    int in_shared;

    // A [n][k], or [k][n] if transposed; this thread has the rows from `first` on.
    __device__ void load(const float* matrix, int N, bool transposed, int first, int lane, int slices, float4* shared) {
        rest = shared + threadIdx.x;
        in_shared = slices;
        const int of_n = transposed ? 1 : N, of_k = transposed ? N : 1;
        const auto four = [&](int n, int k) {
            float part[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) part[j] = n < N && k + j < N ? matrix[n * of_n + (k + j) * of_k] : 0.0f;
            return float4{part[0], part[1], part[2], part[3]};
        };
#pragma unroll
        for (int s = 0; s < in_registers; ++s)
#pragma unroll
            for (int i = 0; i < outputs; ++i) kept[s][i] = four(first + i, s * slice + lane * 4);
#pragma unroll 1
        for (int i = 0; i < in_shared * outputs; ++i)
            rest[i * threads] = four(first + i % outputs, (in_registers + i / outputs) * slice + lane * 4);
    }

    // x: [rows][K]
    template <int rows>
    __device__ void multiply(const float4* x, int K, int lane, float (&sums)[outputs * rows]) const {
#pragma unroll
        for (int i = 0; i < outputs * rows; ++i) sums[i] = 0;
#pragma unroll
        for (int s = 0; s < in_registers; ++s) {
            float4 part[rows];
            read<rows>(x + s * lanes + lane, K, part);
#pragma unroll
            for (int i = 0; i < outputs; ++i) add<rows>(kept[s][i], part, &sums[i]);
        }
#pragma unroll 1
        for (int s = 0; s < in_shared; ++s) {
            float4 part[rows];
            read<rows>(x + (in_registers + s) * lanes + lane, K, part);
#pragma unroll
            for (int i = 0; i < outputs; ++i) add<rows>(rest[(s * outputs + i) * threads], part, &sums[i]);
        }
    }

private:
    template <int rows>
    __device__ static void read(const float4* x, int K, float4 (&part)[rows]) {
#pragma unroll
        for (int row = 0; row < rows; ++row) part[row] = x[row * (K / 4)];
    }

    // To the sums of one output.
    template <int rows>
    __device__ static void add(const float4& of, const float4 (&part)[rows], float* sums) {
#pragma unroll
        for (int row = 0; row < rows; ++row) {
            float& sum = sums[row * outputs];
            sum = fmaf(of.x, part[row].x, sum);
            sum = fmaf(of.y, part[row].y, sum);
            sum = fmaf(of.z, part[row].z, sum);
            sum = fmaf(of.w, part[row].w, sum);
        }
    }
};

template <int in_registers, int rows>
__device__ inline void run_forward(const RecurrenceForward<float>& f, Split split) {
    using P = Place<rows>;
    TPK_DYNAMIC_SHARED(shared);
    const Layout layout(in_registers, split.in_shared, rows);
    const int buffer = layout.buffer, K = layout.K, blocks = split.blocks;
    const P place(f.B, f.N, blocks);
    Panel<in_registers> weight;
    weight.load(f.weight + place.head * f.N * f.N, static_cast<int>(f.N), false, place.first_column, place.lane,
                split.in_shared, shared + 2 * buffer);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * buffer; i += threads) shared[i] = float4{0, 0, 0, 0};
    cluster_arrive();  // all have started and have their zeros
    cluster_wait();
    const ptrdiff_t offset = (place.sequence * f.H + place.head) * f.N + place.column;
    const float* input =
        f.input + place.sequence * f.input_strides.batch + place.head * f.input_strides.head + place.column;
    float* h = f.h + offset;
    float u = place.inside ? *input : 0;
    if (f.start) place.send(shared, K, blocks, place.inside ? f.start[offset] : 0);
    cluster_arrive();
    cluster_wait();
    for (ptrdiff_t t = 0; t < f.T_; ++t) {
        const bool more = t + 1 < f.T_;
        input += f.input_strides.time;
        const float next = more && place.inside ? *input : 0;  // its trip from memory takes as long as the product
        float sums[P::sums];
        weight.template multiply<rows>(shared + t % 2 * buffer, K, place.lane, sums);
        reduce<P::sums, lanes>(sums, place.lane);
        const float value = activation(nonlinearity_of(f.cell), u + sums[0]);
        if (more) {
            place.send(shared + (t + 1) % 2 * buffer, K, blocks, value);
            cluster_arrive();
        }
        if (place.inside && place.copy == 0) *h = value;
        h += f.B * f.H * f.N;
        u = next;
        if (more) cluster_wait();
    }
}

template <int in_registers, int rows>
__global__ void __launch_bounds__(threads, 1)
    rnn_cluster_forward_kernel(const RecurrenceForward<float> f, Split split) {
    if constexpr (has_clusters) run_forward<in_registers, rows>(f, split);
}

// `carries`: the product with P, of the inverses "weight" and "layer"; `adjoins`: that with Wᵀ, of the update "total".
// `displacements`: writes λ in place of δ, for a second sweep. That one reads λ where it writes δ: between the two is a
// barrier, since several lanes read what one of them writes.
template <int in_registers, int rows, bool carries, bool adjoins>
__device__ inline void run_backward(const RecurrenceBackward<float>& f, Split split, bool displacements) {
    using P = Place<rows>;
    TPK_DYNAMIC_SHARED(shared);
    const Layout layout(in_registers, split.in_shared, rows);
    const int buffer = layout.buffer, K = layout.K, blocks = split.blocks;
    float4* const of_delta = shared + (carries ? 2 * buffer : 0);  // the buffers of δ; those of λ come first
    float4* const rest = shared + (carries + adjoins) * 2 * buffer;
    const P place(f.B, f.N, blocks);
    const ptrdiff_t matrix = place.head * f.N * f.N, time = f.B * f.H * f.N;
    const int N = static_cast<int>(f.N);
    Panel<in_registers> feedback, weight;
    if constexpr (carries)
        feedback.load(f.feedback + matrix, N, false, place.first_column, place.lane, split.in_shared, rest);
    if constexpr (adjoins)
        weight.load(f.weight + matrix, N, true, place.first_column, place.lane, split.in_shared,
                    rest + (carries ? layout.rest : 0));
    const bool inside = place.inside, writes = inside && place.copy == 0;
    const ptrdiff_t first = (place.sequence * f.H + place.head) * f.N + place.column;
    ptrdiff_t at = (f.T_ - 1) * time + first;
    ptrdiff_t g = (f.T_ - 1) * f.grad_h_strides.time + place.sequence * f.grad_h_strides.batch +
                  place.head * f.grad_h_strides.head + place.column;
    float term = inside && f.carried_in && f.inverse != Inverse::none ? f.carried_in[first] : 0;
    float through = inside && adjoins && f.through_in ? f.through_in[first] : 0;
    float gradient = inside && f.grad_h ? f.step * f.grad_h[g] : 0;
    if (inside && f.grad_last) gradient = fmaf(f.step, f.grad_last[first], gradient);
    float state = inside ? f.h[at] : 0;
    if constexpr (carries || adjoins) {
        for (float4* i = shared + threadIdx.x; i < rest; i += threads) *i = float4{0, 0, 0, 0};
        cluster_arrive();  // all have started, have their zeros and have read the last step
        cluster_wait();
    }
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        const bool more = t > 0 && inside;
        g -= f.grad_h_strides.time;
        const float next_state = more ? f.h[at - time] : 0;
        const float next_gradient = more && f.grad_h ? f.grad_h[g] : 0;
        const float lambda = term + gradient;
        const float mu = lambda + through;
        const float delta = through_activation(nonlinearity_of(f.cell), mu, state);
        if constexpr (carries)
            place.send(
                shared + t % 2 * buffer, K, blocks,
                f.inverse == Inverse::layer ? through_inverse(nonlinearity_of(f.cell), lambda, state, f.clip) : lambda);
        if constexpr (adjoins) place.send(of_delta + t % 2 * buffer, K, blocks, delta);
        if constexpr (carries || adjoins) cluster_arrive();
        if (writes) f.grad_u[at] = displacements ? lambda : delta;
        at -= time;
        if constexpr (carries || adjoins) cluster_wait();
        float sums[P::sums];
        if constexpr (carries) {
            feedback.template multiply<rows>(shared + t % 2 * buffer, K, place.lane, sums);
            reduce<P::sums, lanes>(sums, place.lane);
            term = sums[0];
        } else {
            term = f.inverse == Inverse::identity ? lambda : 0;
        }
        if constexpr (adjoins) {
            weight.template multiply<rows>(of_delta + t % 2 * buffer, K, place.lane, sums);
            reduce<P::sums, lanes>(sums, place.lane);
            through = sums[0];
        }
        gradient = f.step * next_gradient;
        state = next_state;
    }
    if (writes && f.carried_out) f.carried_out[first] = term;
    if (writes && f.through_out) f.through_out[first] = through;
}

template <int in_registers, int rows, bool carries, bool adjoins>
__global__ void __launch_bounds__(threads, 1)
    rnn_cluster_backward_kernel(const RecurrenceBackward<float> f, Split split, bool displacements) {
    if constexpr (has_clusters || !(carries || adjoins))
        run_backward<in_registers, rows, carries, adjoins>(f, split, displacements);
}

void check_size(const char* what, ptrdiff_t N, int device) {
    const int largest = recurrence_cluster_largest(device);
    if (largest == 0)
        throw std::invalid_argument(std::string(what) + ": N must be at most " +
                                    std::to_string(recurrence_cuda_largest<float>) +
                                    " on a device without thread block clusters, got " + std::to_string(N));
    if (N > largest)
        throw std::invalid_argument(std::string(what) + ": N must be at most " + std::to_string(largest) +
                                    " on this device, got " + std::to_string(N));
}

// The smallest tile with which all clusters run at once; beyond that the largest, which reads the matrices least often.
// kernel(rows): the kernel; arguments: what it takes behind the split.
template <int in_registers, int matrices, class Kernel, class Call, class... Arguments>
void launch_tiles(const char* what, const Call& f, void* stream, Kernel kernel, Arguments... arguments) {
    const Split split(f.N, in_registers);
    const auto bytes = [&](int rows) { return Layout(in_registers, split.in_shared, rows).bytes(matrices); };
    const auto with = [&](auto rows) {
        const ptrdiff_t clusters = blocks_of(what, f.B, f.H * split.blocks, rows.of) / split.blocks;
        launch_clusters(what, kernel(rows), clusters, split.blocks, threads, bytes(rows.of), stream, f, split,
                        arguments...);
    };
    const int at_once = active_clusters(what, kernel(Constant<1>{}), split.blocks, threads, bytes(1));
    if (f.B * f.H <= at_once)
        with(Constant<1>{});
    else if ((f.B + 1) / 2 * f.H <= at_once)
        with(Constant<2>{});
    else
        with(Constant<4>{});
}

// Two slices of a matrix in registers, or the four that there is room for.
template <class Run>
void with_registers(ptrdiff_t N, Run run) {
    if (N <= 2 * slice)
        run(Constant<2>{});
    else
        run(Constant<4>{});
}

template <int in_registers, bool carries, bool adjoins>
void sweep(const RecurrenceBackward<float>& f, bool displacements, void* stream) {
    launch_tiles<in_registers, carries + adjoins>(
        "recurrence_bwd", f, stream,
        [](auto rows) { return rnn_cluster_backward_kernel<in_registers, rows.of, carries, adjoins>; }, displacements);
}

template <bool carries>
void sweep_of_one_matrix(const RecurrenceBackward<float>& f, bool displacements, void* stream) {
    with_registers(f.N, [&](auto n) { sweep<decltype(n)::of, carries, !carries>(f, displacements, stream); });
}

// First all λ, in the place of δ, then back-propagation of λ.
void sweep_twice(const RecurrenceBackward<float>& f, void* stream) {
    RecurrenceBackward<float> first = f, second = f;
    first.update = Update::local;
    first.through_in = nullptr;
    first.through_out = nullptr;
    sweep_of_one_matrix<true>(first, true, stream);
    second.inverse = Inverse::none;
    second.step = 1;
    second.grad_h = f.grad_u;
    second.grad_h_strides = {f.B * f.H * f.N, f.H * f.N, f.N};
    second.grad_last = nullptr;
    second.carried_out = nullptr;
    sweep_of_one_matrix<false>(second, false, stream);
}

bool both_fit(ptrdiff_t N, int device) { return Layout(2, Split(N, 2).in_shared, 4).bytes(2) <= shared_memory(device); }

}  // namespace cluster

int recurrence_cluster_largest(int device) {
    using namespace cluster;
    const int blocks = largest_cluster(device, rnn_cluster_forward_kernel<4, 1>, threads, Layout(4, 0, 1).bytes(1));
    return blocks * units < widest * slice ? blocks * units : widest * slice;
}

void recurrence_forward_cluster(const RecurrenceForward<float>& f, int device, void* stream) {
    using namespace cluster;
    const OnDevice on_device(device);
    check_size("recurrence_fwd", f.N, device);
    if (f.T_ * f.B * f.H == 0) return;
    with_registers(f.N, [&](auto n) {
        launch_tiles<decltype(n)::of, 1>("recurrence_fwd", f, stream, [](auto rows) {
            return rnn_cluster_forward_kernel<decltype(n)::of, rows.of>;
        });
    });
}

void recurrence_backward_cluster(const RecurrenceBackward<float>& f, int device, void* stream) {
    using namespace cluster;
    const OnDevice on_device(device);
    check_size("recurrence_bwd", f.N, device);
    if (f.inverse == Inverse::jacobian)
        throw std::invalid_argument("recurrence_bwd: N must be at most " +
                                    std::to_string(recurrence_cuda_largest<float>) +
                                    " with the inverse 'jacobian', got " + std::to_string(f.N));
    if (f.T_ * f.B * f.H == 0) return;
    const bool adjoins = f.update == Update::total;
    if (carries(f.inverse) && adjoins) {
        if (both_fit(f.N, device))
            sweep<2, true, true>(f, false, stream);
        else
            sweep_twice(f, stream);
    } else if (carries(f.inverse)) {
        sweep_of_one_matrix<true>(f, false, stream);
    } else if (adjoins) {
        sweep_of_one_matrix<false>(f, false, stream);
    } else {  // no product: no block needs another
        const Split split(f.N, 2);
        launch("recurrence_bwd", rnn_cluster_backward_kernel<2, 4, false, false>,
               blocks_of("recurrence_bwd", f.B, f.H * split.blocks, 4), threads, stream, f, split, false);
    }
}

}  // namespace tpk
