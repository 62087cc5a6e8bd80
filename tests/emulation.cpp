// Kernels that are wrong, each in its own way: csrc/common/cuda_emulation.h must see it. Prints a line for each.
#include <cstdio>

#include "../csrc/common/cuda.h"

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

void run(const char* name, void (*kernel)(float*)) {
    float results[2][64];
    try {
        for (const bool reversed : {false, true}) {
            emulation::settings.reversed = reversed;
            launch(name, kernel, 1, 64, nullptr, &results[reversed][0]);
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
}
