// Kernels that are wrong, each in its own way: csrc/common/cuda_emulation.h must see it. Prints a line for each.
#include <cstdio>

#include "../csrc/common/cluster_cuda.h"

using namespace tpk;

namespace {

using Slots = float[64];

// The neighbour's number, read before the barrier.
__global__ void race(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x;
    slots[i] = static_cast<float>(i);
    out[i] = slots[i ^ 1];
}

__global__ void no_race(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x;
    slots[i] = static_cast<float>(i);
    __syncthreads();
    out[i] = slots[i ^ 1] + __shfl_xor_sync(0xffffffffu, slots[i], 16);
}

__global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 0;
}

__global__ void divergent_shuffle(float* out) {
    out[threadIdx.x] = 0;
    if (threadIdx.x % 32 < 31) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void unwritten(float* out) {
    TPK_SHARED(Slots, slots);
    out[threadIdx.x] = slots[threadIdx.x];
}

// Of two blocks, each sends the other its numbers, and reads what has come before the barrier …
__global__ void cluster_race(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x, rank = blockIdx.x % 2;
    slots[i] = 0;
    cluster_arrive();
    cluster_wait();
    store_in_block(&slots[i], 1 - rank, static_cast<float>(1 + rank));
    cluster_arrive();
    out[rank * 32 + i] = slots[i];
    cluster_wait();
}

// … or behind it.
__global__ void no_cluster_race(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x, rank = blockIdx.x % 2;
    slots[i] = 0;
    cluster_arrive();
    cluster_wait();
    store_in_block(&slots[i], 1 - rank, static_cast<float>(1 + rank));
    cluster_arrive();
    cluster_wait();
    out[rank * 32 + i] = slots[i];
}

// One buffer, where two would have to take turns: a block may be ahead by a step.
__global__ void one_buffer(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x, rank = blockIdx.x % 2;
    float read = 0;
    cluster_arrive();
    cluster_wait();
    for (int t = 0; t < 2; ++t) {
        store_in_block(&slots[i], 1 - rank, static_cast<float>(t));
        cluster_arrive();
        cluster_wait();
        read += slots[i];
    }
    out[rank * 32 + i] = read;
}

__global__ void not_started(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x, rank = blockIdx.x % 2;
    store_in_block(&slots[i], 1 - rank, 0);
    cluster_arrive();
    cluster_wait();
    out[rank * 32 + i] = slots[i];
}

__global__ void ended(float* out) {
    TPK_SHARED(Slots, slots);
    const unsigned i = threadIdx.x, rank = blockIdx.x % 2;
    cluster_arrive();
    cluster_wait();
    store_in_block(&slots[i], 1 - rank, 0);
    out[rank * 32 + i] = 0;
}

__global__ void divergent_cluster(float* out) {
    const unsigned rank = blockIdx.x % 2;
    if (rank == 0) {
        cluster_arrive();
        cluster_wait();
    }
    out[rank * 32 + threadIdx.x] = 0;
}

void run(const char* name, void (*kernel)(float*), int blocks = 1) {
    float results[2][64];
    try {
        for (const bool reversed : {false, true}) {
            emulation::settings.reversed = reversed;
            launch_clusters(name, kernel, 1, blocks, 64 / blocks, sizeof(Slots), nullptr, &results[reversed][0]);
        }
    } catch (const std::runtime_error& error) {
        std::printf("%s: %s\n", name, error.what());
        return;
    }
    bool same = true, number = true;
    for (int i = 0; i < 64; ++i) {
        same = same && memcmp(&results[0][i], &results[1][i], sizeof(float)) == 0;
        number = number && results[0][i] == results[0][i];
    }
    std::printf("%s: %s, %s\n", name, same ? "same" : "different", number ? "numbers" : "NaN");
}

}  // namespace

int main() {
    run("race", race);
    run("no race", no_race);
    run("divergent barrier", divergent_barrier);
    run("divergent shuffle", divergent_shuffle);
    run("unwritten", unwritten);
    run("cluster race", cluster_race, 2);
    run("no cluster race", no_cluster_race, 2);
    run("one buffer", one_buffer, 2);
    run("not started", not_started, 2);
    run("ended", ended, 2);
    run("divergent cluster", divergent_cluster, 2);
}
