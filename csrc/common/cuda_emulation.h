// An emulation of CUDA thread blocks, for tests. Every thread of a block is a fiber; they take turns where they wait:
// at __syncthreads, at the barrier of a cluster, or in a shuffle for the other lanes of their warp. Clusters, and
// blocks that are in none, run one after the other; within a cluster each block gets as far as it can before the next
// one.
//
// What it finds: shared memory that is read before it is written (it starts as NaN), barriers and shuffles that only
// some of the threads reach, stores into a block of the cluster that has not started or has ended, and, where the
// results in the two orders of threads and blocks differ, races: whichever of two threads runs first, it runs up to the
// next barrier. A store into another block is seen there at once in one order, after the barrier in the other. What it
// cannot find: what depends on the memory model below that, and anything about time.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) double2 {
    double x, y;
};

namespace tpk {
namespace emulation {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 1 << 17, shared_bytes = 1 << 16;

// What tensor cores multiply: 16 of k at a time in half precision, 8 as tf32.
enum class Format { bfloat16, float16, tf32 };

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float16_value(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}

// c + Σ products, as the coarsest tensor cores add: every addend is cut off where the 24 bits of the largest one end,
// and so is the sum. Later ones keep a bit or two more.
inline float truncated_sum(const double* addends, int count) {
    double largest = 0, plain = 0;
    for (int i = 0; i < count; ++i) {
        plain += addends[i];
        largest = std::fmax(largest, std::fabs(addends[i]));
    }
    if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += std::trunc(addends[i] / unit);
    sum *= unit;
    const float nearest = static_cast<float>(sum);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Barrier {
    unsigned size, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    // Of shuffles and products in turn: some lanes may be one ahead.
    float slots[2][warp_size];
    float a[2][16][16], b[2][16][8];
};

struct Fiber {
    ucontext_t context;
    dim3 thread;
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;  // of that barrier, when it started to wait
    unsigned arrived = 0;     // generation of the cluster's barrier, when it arrived there
    bool done = false;
};

// Set from outside.
struct Settings {
    bool reversed = false;
    int multiprocessors = 4;
    int largest_cluster = 16;  // 0: no clusters
    size_t shared_memory = 227 << 10;
};
inline Settings settings;

class Block;

struct Cluster {
    Barrier barrier;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::pair<float*, float>> stores;  // that are not to be seen yet
};

class Block {
public:
    // bytes: of shared memory; behind it lies a fence.
    Block(dim3 index, unsigned threads, size_t bytes, Cluster& cluster, std::function<void()> body)
        : index(index), cluster_(cluster), body_(std::move(body)), all_{threads}, any_{threads}, fibers_(threads) {
        if (threads % warp_size) throw std::logic_error("the emulation takes whole warps only");
        warps_.resize(threads / warp_size, Warp{Barrier{warp_size}, {}, {}, {}});
        const float nan = float_of(0xffffffffu), post = float_of(0x5a5a5a5au);  // NaN in halves, too
        shared_.resize(bytes / sizeof(float4), float4{nan, nan, nan, nan});
        shared_.resize(shared_.size() + fence, float4{post, post, post, post});
    }

    // Up to where nothing goes on without other blocks. Whether anything went on.
    bool advance() {
        now = this;
        const size_t count = fibers_.size();
        for (unsigned i = 0; !started_ && i < count; ++i) start(i);
        started_ = true;
        for (bool any = false;; any = true) {
            bool progress = false;
            for (size_t turn = 0; turn < count; ++turn) {
                current = &fibers_[settings.reversed ? count - 1 - turn : turn];
                if (current->done || (current->waits_for && current->waits_for->generation == current->generation))
                    continue;
                progress = true;
                swapcontext(&scheduler_, &current->context);
                if (error_) std::rethrow_exception(error_);
                done_ += current->done;
            }
            if (!progress) return any;
        }
    }

    bool done() const { return done_ == fibers_.size(); }

    void check_fence() const {
        for (size_t i = shared_.size() - fence; i < shared_.size(); ++i)
            if (memcmp(&shared_[i], &shared_.back(), sizeof(float4)) != 0)
                throw std::runtime_error("emulation: written beyond the end of shared memory");
    }

    void wait(Barrier& barrier) { wait(barrier, arrive(barrier)); }

    void wait_for_all() { wait(all_); }

    // Whether any of the threads says so.
    bool ask_all(bool value) {
        const unsigned generation = any_.generation;
        if (any_.arrived == 0) answers_[generation % 2] = false;
        answers_[generation % 2] |= value;
        wait(any_);
        return answers_[generation % 2];
    }

    void arrive_in_cluster() {
        current->arrived = arrive(cluster_.barrier);
        if (cluster_.barrier.generation == current->arrived) return;
        for (const auto& [address, value] : cluster_.stores) *address = value;
        cluster_.stores.clear();
    }

    void wait_for_cluster() { wait(cluster_.barrier, current->arrived); }

    void store(float* address, int rank, float value) {
        Block& block = *cluster_.blocks.at(static_cast<size_t>(rank));
        if (!block.started_) throw std::runtime_error("emulation: a store into a block that has not started");
        if (block.done()) throw std::runtime_error("emulation: a store into a block that has ended");
        const ptrdiff_t offset = address - &shared_[0].x;
        if (offset < 0 || offset >= static_cast<ptrdiff_t>(4 * (shared_.size() - fence)))
            throw std::runtime_error("emulation: a store outside of shared memory");
        float* const there = &block.shared_[0].x + offset;
        if (settings.reversed && &block != this)
            cluster_.stores.emplace_back(there, value);
        else
            *there = value;
    }

    float shuffle(float value, unsigned mask) {
        Warp& warp = warps_[current->thread.x / warp_size];
        float* slots = warp.slots[warp.barrier.generation % 2];
        slots[current->thread.x % warp_size] = value;
        wait(warp.barrier);
        return slots[(current->thread.x % warp_size) ^ mask];
    }

    // mma.sync m16n8k16 of half precision, m16n8k8 of tf32, by the tables of the PTX ISA ("Matrix Fragments for mma").
    void multiply_add(Format format, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        Warp& warp = warps_[current->thread.x / warp_size];
        const unsigned turn = warp.barrier.generation % 2;
        const unsigned lane = current->thread.x % warp_size, group = lane >> 2, thread = lane % 4;
        auto& of_a = warp.a[turn];
        auto& of_b = warp.b[turn];
        int depth;
        if (format == Format::tf32) {
            depth = 8;
            for (unsigned i = 0; i < 4; ++i)
                of_a[i == 0 || i == 2 ? group : group + 8][i < 2 ? thread : thread + 4] = number(format, a[i]);
            for (unsigned i = 0; i < 2; ++i) of_b[i == 0 ? thread : thread + 4][group] = number(format, b[i]);
        } else {
            depth = 16;
            for (unsigned i = 0; i < 8; ++i)
                of_a[i < 2 || (4 <= i && i < 6) ? group : group + 8][thread * 2 + (i & 1) + (i < 4 ? 0 : 8)] =
                    number(format, a[i / 2] >> 16 * (i & 1));
            for (unsigned i = 0; i < 4; ++i)
                of_b[thread * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = number(format, b[i / 2] >> 16 * (i & 1));
        }
        wait(warp.barrier);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = i < 2 ? group : group + 8, column = thread * 2 + (i & 1);
            double addends[17];
            for (int k = 0; k < depth; ++k) addends[k] = double{of_a[row][k]} * of_b[k][column];
            addends[depth] = sums[i];
            sums[i] = truncated_sum(addends, depth + 1);
        }
    }

    void* shared() { return shared_.data(); }

    static inline Block* now = nullptr;
    static inline Fiber* current = nullptr;
    const dim3 index;

private:
    // The generation to wait for the end of.
    static unsigned arrive(Barrier& barrier) {
        const unsigned generation = barrier.generation;
        if (++barrier.arrived == barrier.size) {
            barrier.arrived = 0;
            ++barrier.generation;
        }
        return generation;
    }

    void wait(Barrier& barrier, unsigned generation) {
        if (barrier.generation != generation) return;
        current->generation = generation;
        current->waits_for = &barrier;
        swapcontext(&current->context, &scheduler_);
        current->waits_for = nullptr;
    }

    static float number(Format format, uint32_t bits) {
        if (format == Format::tf32) return float_of(bits & 0xffffe000u);  // the rest is not read
        if (format == Format::bfloat16) return float_of(bits << 16);
        return float16_value(static_cast<uint16_t>(bits));
    }

    static constexpr size_t fence = 16;  // float4 after the end of shared memory

    void start(unsigned i) {
        Fiber& fiber = fibers_[i];
        fiber.thread = {i, 0, 0};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack(index.x % cluster_.blocks.size() * fibers_.size() + i);
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = &scheduler_;
        makecontext(&fiber.context, &Block::main, 0);
    }

    // Kept from cluster to cluster.
    static char* stack(size_t i) {
        static std::vector<std::unique_ptr<char[]>> stacks;
        while (stacks.size() <= i) stacks.emplace_back(new char[stack_bytes]);
        return stacks[i].get();
    }

    static void main() {
        try {
            now->body_();
        } catch (...) {
            now->error_ = std::current_exception();
        }
        current->done = true;
    }

    Cluster& cluster_;
    std::function<void()> body_;
    bool started_ = false;
    size_t done_ = 0;  // threads
    Barrier all_, any_;
    bool answers_[2];  // in turn: some threads may be one question ahead
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<float4> shared_;
    ucontext_t scheduler_;
    std::exception_ptr error_;
};

// One cluster after the other.
template <class Body>
void run(ptrdiff_t clusters, int blocks, int threads, size_t bytes, Body body) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto count = static_cast<unsigned>(blocks);
    for (unsigned first = 0; first < clusters * count; first += count) {
        Cluster cluster{{count * static_cast<unsigned>(threads)}, {}, {}};
        cluster.blocks.resize(count);
        for (unsigned rank = 0; rank < count; ++rank)
            cluster.blocks[rank].reset(
                new Block(dim3{first + rank}, static_cast<unsigned>(threads), bytes, cluster, body));
        for (unsigned done = 0; done < count;) {
            bool progress = false;
            for (unsigned turn = 0; turn < count; ++turn) {
                Block& block = *cluster.blocks[settings.reversed ? count - 1 - turn : turn];
                if (block.done()) continue;
                progress |= block.advance();
                done += block.done();
            }
            if (!progress) throw std::runtime_error("emulation: threads wait at a barrier that others never reach");
        }
        for (const auto& block : cluster.blocks) block->check_fence();
    }
}

template <class T>
T& shared() {
    static_assert(sizeof(T) <= shared_bytes && std::is_trivial_v<T>);
    return *static_cast<T*>(Block::now->shared());
}

}  // namespace emulation

// One in each kernel.
#define TPK_SHARED(type, name) type& name = ::tpk::emulation::shared<type>()
#define TPK_DYNAMIC_SHARED(name) float4* const name = static_cast<float4*>(::tpk::emulation::Block::now->shared())
#define threadIdx (::tpk::emulation::Block::current->thread)
#define blockIdx (::tpk::emulation::Block::now->index)

inline void __syncthreads() { emulation::Block::now->wait_for_all(); }

inline int __syncthreads_or(int value) { return emulation::Block::now->ask_all(value != 0); }

inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
    if (lanes != 0xffffffffu) throw std::logic_error("the emulation knows shuffles of whole warps only");
    return emulation::Block::now->shuffle(value, static_cast<unsigned>(mask));
}

// The two halves, one after the other.
inline double __shfl_xor_sync(unsigned lanes, double value, int mask) {
    float halves[2];
    memcpy(halves, &value, sizeof value);
    for (float& half : halves) half = __shfl_xor_sync(lanes, half, mask);
    memcpy(&value, halves, sizeof value);
    return value;
}

inline float __int_as_float(int bits) { return emulation::float_of(static_cast<uint32_t>(bits)); }

inline int __float_as_int(float value) { return static_cast<int>(emulation::bits_of(value)); }

using emulation::float16_value;

inline uint16_t float16_bits(float x) {
    const _Float16 nearest = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    return bits;
}

inline uint16_t bfloat16_bits(float x) {
    const uint32_t bits = emulation::bits_of(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The device's is not exact either: here the last two bits are missing.
inline float estimated_reciprocal(float d) { return __int_as_float(__float_as_int(1 / d) & ~3); }

inline std::string device_problem() { return ""; }

struct OnDevice {
    explicit OnDevice(int) {}
};

inline int multiprocessors(int) { return emulation::settings.multiprocessors; }

inline size_t shared_memory(int) { return emulation::settings.shared_memory; }

template <class... Arguments>
void launch(const char*, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, void*, Arguments... arguments) {
    emulation::run(blocks, 1, threads, emulation::shared_bytes, [&] { kernel(arguments...); });
}

template <class... Arguments>
void launch_with_shared(const char*, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, size_t bytes, void*,
                        Arguments... arguments) {
    if (bytes > emulation::settings.shared_memory) throw std::logic_error("emulation: too much shared memory");
    emulation::run(blocks, 1, threads, bytes, [&] { kernel(arguments...); });
}

// --- clusters: common/cluster_cuda.h

constexpr bool has_clusters = true;

inline void cluster_arrive() { emulation::Block::now->arrive_in_cluster(); }
inline void cluster_wait() { emulation::Block::now->wait_for_cluster(); }
inline void store_in_block(float* address, int rank, float value) {
    emulation::Block::now->store(address, rank, value);
}

template <class... Arguments>
int largest_cluster(int, void (*)(Arguments...), int, size_t) {
    return emulation::settings.largest_cluster;
}

template <class... Arguments>
int active_clusters(const char*, void (*)(Arguments...), int blocks, int, size_t) {
    return emulation::settings.multiprocessors / blocks;
}

template <class... Arguments>
void launch_clusters(const char*, void (*kernel)(Arguments...), ptrdiff_t clusters, int blocks, int threads,
                     size_t shared, void*, Arguments... arguments) {
    if (shared > emulation::settings.shared_memory) throw std::logic_error("emulation: too much shared memory");
    emulation::run(clusters, blocks, threads, shared, [&] { kernel(arguments...); });
}

}  // namespace tpk
