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
    bool done = false;
};

// Set from outside.
struct Settings {
    bool reversed = false;
    int multiprocessors = 4;
};
inline Settings settings;

class Block {
public:
    Block(dim3 index, unsigned threads, std::function<void()> body)
        : index(index), body_(std::move(body)), all_{threads}, fibers_(threads) {
        if (threads % warp_size) throw std::logic_error("the emulation takes whole warps only");
        warps_.resize(threads / warp_size, Warp{Barrier{warp_size}, {}, {}, {}});
        shared_.resize(shared_bytes / sizeof(float), float_of(0xffffffffu));  // NaN in halves, too
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
    static float number(Format format, uint32_t bits) {
        if (format == Format::tf32) return float_of(bits & 0xffffe000u);  // the rest is not read
        if (format == Format::bfloat16) return float_of(bits << 16);
        return float16_value(static_cast<uint16_t>(bits));
    }

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
#define threadIdx (::tpk::emulation::Block::current->thread)
#define blockIdx (::tpk::emulation::Block::now->index)

inline void __syncthreads() { emulation::Block::now->wait_for_all(); }

inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
    if (lanes != 0xffffffffu) throw std::logic_error("the emulation knows shuffles of whole warps only");
    return emulation::Block::now->shuffle(value, static_cast<unsigned>(mask));
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

template <class... Arguments>
void launch(const char*, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, void*, Arguments... arguments) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    for (ptrdiff_t index = 0; index < blocks; ++index)
        emulation::Block(dim3{static_cast<unsigned>(index)}, static_cast<unsigned>(threads), [&] {
            kernel(arguments...);
        }).run();
}

}  // namespace tpk
