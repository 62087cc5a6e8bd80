// An emulation of CUDA thread blocks, for tests. Every thread of a block is a fiber; they take turns where they wait:
// at __syncthreads, or in a shuffle for the other lanes of their warp. Blocks run one after the other.
//
// What it finds: shared memory that is read before it is written (it starts as NaN), barriers and shuffles that only
// some of the threads reach, and, where the results in the two orders of threads differ, races: whichever of two
// threads runs first, it runs up to the next barrier. What it cannot find: what depends on the memory model below that,
// and anything about time.
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

struct Barrier {
    unsigned size, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    float slots[2][warp_size];  // of shuffles in turn: some lanes may be one ahead
};

struct Fiber {
    ucontext_t context;
    dim3 thread;
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;  // of that barrier, when it started to wait
    bool done = false;
};

// Set from outside.
struct Settings {
    bool reversed = false;
    int multiprocessors = 4;
    ptrdiff_t shared_limit = 232448;
};
inline Settings settings;

class Block {
public:
    Block(dim3 index, unsigned threads, std::function<void()> body, size_t shared_size = shared_bytes)
        : index(index), body_(std::move(body)), all_{threads}, fibers_(threads) {
        if (threads % warp_size) throw std::logic_error("the emulation takes whole warps only");
        warps_.resize(threads / warp_size, Warp{Barrier{warp_size}, {}});
        shared_.resize(shared_size / sizeof(float) + fence, std::numeric_limits<float>::quiet_NaN());
        memset(&shared_[shared_.size() - fence], 0x5a, fence * sizeof(float));
    }

    void run() {
        now = this;
        for (unsigned i = 0; i < fibers_.size(); ++i) start(i);
        const size_t count = fibers_.size();
        for (size_t done = 0; done < count;) {
            bool progress = false;
            for (size_t turn = 0; turn < count; ++turn) {
                current = &fibers_[settings.reversed ? count - 1 - turn : turn];
                if (current->done || (current->waits_for && current->waits_for->generation == current->generation))
                    continue;
                progress = true;
                swapcontext(&scheduler_, &current->context);
                if (error_) std::rethrow_exception(error_);
                done += current->done;
            }
            if (!progress) throw std::runtime_error("emulation: threads wait at a barrier that others never reach");
        }
        for (size_t i = shared_.size() - fence; i < shared_.size(); ++i)
            if (memcmp(&shared_[i], &shared_.back(), sizeof(float)) != 0)
                throw std::runtime_error("emulation: written beyond the end of shared memory");
    }

    void wait(Barrier& barrier) {
        current->generation = barrier.generation;
        if (++barrier.arrived == barrier.size) {
            barrier.arrived = 0;
            ++barrier.generation;
            return;
        }
        current->waits_for = &barrier;
        swapcontext(&current->context, &scheduler_);
        current->waits_for = nullptr;
    }

    void wait_for_all() { wait(all_); }

    float shuffle(float value, unsigned mask) {
        Warp& warp = warps_[current->thread.x / warp_size];
        float* slots = warp.slots[warp.barrier.generation % 2];
        slots[current->thread.x % warp_size] = value;
        wait(warp.barrier);
        return slots[(current->thread.x % warp_size) ^ mask];
    }

    void* shared() { return shared_.data(); }

    static inline Block* now = nullptr;
    static inline Fiber* current = nullptr;
    const dim3 index;

private:
    static constexpr size_t fence = 64;  // numbers after the end of shared memory

    void start(unsigned i) {
        Fiber& fiber = fibers_[i];
        fiber.thread = {i, 0, 0};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack(i);
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = &scheduler_;
        makecontext(&fiber.context, &Block::main, 0);
    }

    // Kept from block to block.
    static char* stack(unsigned i) {
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

    std::function<void()> body_;
    Barrier all_;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<float> shared_;
    ucontext_t scheduler_;
    std::exception_ptr error_;
};

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

inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The device's is not exact either: here the last two bits are missing.
inline float estimated_reciprocal(float d) { return __int_as_float(__float_as_int(1 / d) & ~3); }

inline std::string device_problem() { return ""; }

struct OnDevice {
    explicit OnDevice(int) {}
};

inline int multiprocessors(int) { return emulation::settings.multiprocessors; }

inline ptrdiff_t shared_limit(int) { return emulation::settings.shared_limit; }

template <class... Arguments>
void launch_with_shared(const char*, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, ptrdiff_t bytes,
                        void*, Arguments... arguments) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (bytes > emulation::settings.shared_limit) throw std::runtime_error("emulation: too much shared memory");
    for (ptrdiff_t index = 0; index < blocks; ++index)
        emulation::Block(
            dim3{static_cast<unsigned>(index)}, static_cast<unsigned>(threads), [&] { kernel(arguments...); },
            static_cast<size_t>(bytes))
            .run();
}

template <class... Arguments>
void launch(const char* what, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, void* stream,
            Arguments... arguments) {
    launch_with_shared(what, kernel, blocks, threads, emulation::shared_bytes, stream, arguments...);
}

}  // namespace tpk
