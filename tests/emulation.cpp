// Kernels that are wrong, each in its own way: csrc/common/cuda_emulation.h must see it. Then the product on tensor
// cores that it emulates, and where csrc/common/mma_cuda.h puts numbers. Prints a line for each.
#include <cstdio>
#include <set>

#include "../csrc/common/cluster_cuda.h"
#include "../csrc/common/mma_cuda.h"

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

int a_of(int row, int k) { return (row * 3 + k * 5) % 7 - 3; }
int b_of(int k, int column) { return (k * 2 + column * 3) % 5 - 2; }

template <class T>
uint32_t bits(int number) {
    if constexpr (sizeof(T) == 2) return rounded<T>(static_cast<float>(number)).bits;
    // What is below tf32 must not be read.
    return static_cast<uint32_t>(__float_as_int(static_cast<float>(number))) | 0x1fffu;
}

// Every number goes to the lane and the register that hold it: the tables of the PTX ISA, read the other way round.
template <class T>
__global__ void product(float* out) {
    constexpr int each = 4 / sizeof(T), depth = 8 * each;  // numbers of a register, and of a sum
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t a[4] = {}, b[2] = {};
    float sums[4];
    for (int k = 0; k < depth; ++k) {
        const int member = k / each % 4, part = k / (4 * each), shift = k % each * 16;
        for (int row = 0; row < 16; ++row)
            if (lane == row % 8 * 4 + member) a[part * 2 + row / 8] |= bits<T>(a_of(row, k)) << shift;
        for (int column = 0; column < 8; ++column)
            if (lane == column * 4 + member) b[part] |= bits<T>(b_of(k, column)) << shift;
    }
    for (const bool after : {false, true}) {
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; ++column) {
                if (lane != row % 8 * 4 + column / 2) continue;
                float& sum = sums[row / 8 * 2 + column % 2];
                if (after)
                    out[row * 8 + column] = sum;
                else
                    sum = static_cast<float>(row - column);
            }
        if (!after) mma::multiply_add<T>(sums, a, b[0], b[1]);
    }
}

template <class T>
void check_product(const char* name) {
    float found[16 * 8];
    launch(name, product<T>, 1, 32, nullptr, &found[0]);
    bool exact = true;
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            int expected = row - column;
            for (int k = 0; k < 32 / static_cast<int>(sizeof(T)); ++k) expected += a_of(row, k) * b_of(k, column);
            exact = exact && found[row * 8 + column] == static_cast<float>(expected);
        }
    std::printf("product in %s: %s\n", name, exact ? "exact" : "wrong");
}

// Addends are cut off at the last of the largest one's 24 bits, whatever their sign.
void check_sums() {
    const double ulp = std::ldexp(1.0, -23), small[] = {1, 0.75 * ulp, 0.75 * ulp}, last[] = {-1, -ulp, 0.75 * ulp},
                 infinite[] = {1, INFINITY, 1};
    const bool right = emulation::truncated_sum(small, 3) == 1.0f &&
                       emulation::truncated_sum(last, 3) == static_cast<float>(-1 - ulp) &&
                       emulation::truncated_sum(infinite, 3) == INFINITY;
    std::printf("sums: %s\n", right ? "cut off" : "wrong");
}

// Both parts together are the number, to an ulp of float32.
void check_split() {
    bool right = true;
    for (int i = 0; i < 100000; ++i) {
        const float x = static_cast<float>(std::sin(i) * std::ldexp(1.0, i % 60 - 30));
        const mma::Split parts = mma::split(x);
        const double high = __int_as_float(static_cast<int>(parts.high)),
                     low = __int_as_float(static_cast<int>(parts.low));
        right = right && !((parts.high | parts.low) & 0x1fffu) && std::fabs(low) <= std::ldexp(std::fabs(high), -11) &&
                std::fabs(high + low - x) <= std::ldexp(std::fabs(double{x}), -23);
    }
    for (const float x : {INFINITY, -INFINITY, 0.0f}) {
        const mma::Split parts = mma::split(x);
        right = right && __int_as_float(static_cast<int>(parts.high)) == x && parts.low == 0;
    }
    const mma::Split parts = mma::split(__int_as_float(0x7fffffff));  // the NaN that devices make
    const float high = __int_as_float(static_cast<int>(parts.high & 0xffffe000u));
    std::printf("split: %s\n", right && high != high ? "exact" : "wrong");
}

// Each word of a row once; and no two of those that go to shared memory or come from it together in one bank: 32 words
// of 4 bytes, 16 times 8, or 8 times 16.
void check_layout() {
    std::set<int> words, slots;
    for (int step = 0; step < 8; ++step)
        for (int member = 0; member < 4; ++member)
            for (int part = 0; part < 2; ++part) words.insert(mma::word_of(step, member, part));
    bool right = words.size() == 64 && *words.begin() == 0 && *words.rbegin() == 63;
    for (int row = 0; row < mma::rows; ++row)
        for (int chunk = 0; chunk < 16; ++chunk) slots.insert(row * 16 + mma::slot_of(row, chunk));
    right = right && slots.size() == mma::rows * 16 && *slots.rbegin() == mma::rows * 16 - 1;
    const auto bank = [](int row, int word) {
        return (mma::slot_of(row, word / mma::chunk_words) * mma::chunk_words + word % mma::chunk_words) % 32;
    };
    for (int chunks = 0; chunks < 16; chunks += 4)
        for (int first = 0; first < 32; first += 8) {
            std::set<int> banks;
            for (int lane = first; lane < first + 8; ++lane)
                banks.insert(bank(lane / 4, (chunks + lane % 4) * mma::chunk_words));
            right = right && banks.size() == 8;
        }
    for (int tile = 0; tile < 4; ++tile)
        for (int sum = 0; sum < 2; ++sum)
            for (const int bytes : {2, 4})  // of a number
                for (int first = 0; first < 32; first += 64 / bytes) {
                    std::set<int> banks;
                    for (int lane = first; lane < first + 64 / bytes; ++lane) {
                        const int row = mma::row_of(lane % 4, sum), unit = mma::unit_of(tile, lane / 4, 0);
                        for (int i = 0; i < bytes / 2; ++i) banks.insert(bank(row, unit * bytes / 4 + i));
                    }
                    right = right && banks.size() == 32;
                }
    std::printf("layout: %s\n", right ? "each word once, no conflicts" : "wrong");
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
    check_product<bfloat16>("bfloat16");
    check_product<float16>("float16");
    check_product<float>("tf32");
    check_sums();
    check_split();
    check_layout();
}
