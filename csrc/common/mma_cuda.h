// Products on tensor cores: the instruction, what it multiplies, and where a warp keeps it.
//
// Y = A X, 16 units of A's rows and 8 columns an instruction. A [units][K] stays in registers; X [K] has a column for
// each of 8 rows of the batch, and lies in shared memory a row of the batch after the other. Both are words of 32 bits:
// two numbers in half precision, or one float32.
//
// A sum may run over k in any order, and the units of a tile may stand in any order, as long as everybody agrees. So k
// is permuted so that a lane's words of two instructions are 16 neighbouring bytes of shared memory, and units so that
// a lane's two are neighbours.
#pragma once

#include <stdint.h>

#include "half_cuda.h"

namespace tpk::mma {

constexpr int rows = 8;         // of the batch
constexpr int tile_units = 16;  // of A
constexpr int step_words = 8;   // of k, in one instruction
constexpr int chunk_words = 4;  // 16 bytes

// The lanes of a warp are 8 groups of 4 members. A register of A or X: of step `step`, the word of its first half of k
// (part 0) or its second.
__host__ __device__ constexpr int word_of(int step, int member, int part) {
    return step / 2 * 2 * step_words + member * chunk_words + step % 2 * 2 + part;
}

// Register i of A holds the second of a group's two units where i is odd, and part i / 2 of k.
__host__ __device__ constexpr int unit_of(int tile, int group, int second) {
    return tile * tile_units + group * 2 + second;
}

// The sum i of a lane is of unit i / 2, and of this row of the batch.
__host__ __device__ constexpr int row_of(int member, int sum) { return member * 2 + sum % 2; }

// Where the 16 bytes `chunk` of a row lie in shared memory. Neither a warp that reads (lane: group's row, member's
// chunk) nor one that writes (two neighbours of a group's, of the member's row) finds two of its words in one bank.
__host__ __device__ constexpr int slot_of(int row, int chunk) { return chunk ^ (row & 6) ^ (row & 1) << 2; }

#if defined(__CUDACC__) || defined(TPK_EMULATE)

// The 11 leading bits of x and the 11 that follow, as numbers: x within an ulp, where neither is infinite. tf32 is
// float32 whose last 13 bits are not read.
struct Split {
    uint32_t high, low;
};

__device__ inline Split split(float x) {
    constexpr uint32_t mask = 0xffffe000u;
    float high, low;
    if (fabsf(x) < 0x1.ffep127f) {
        // half of the last bit kept is added, then the rest cut off: to the nearest
        high = __int_as_float(static_cast<int>((static_cast<uint32_t>(__float_as_int(x)) + 0x1000u) & mask));
        low = x - high;
    } else {  // would round to infinity, or is infinite, or NaN; with a difference, infinity would turn into NaN
        high = x + 0.0f;
        low = 0;
    }
    return {static_cast<uint32_t>(__float_as_int(high)), static_cast<uint32_t>(__float_as_int(low)) & mask};
}

#ifdef TPK_EMULATE
template <class T>
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using emulation::Format;
    constexpr Format format = std::is_same_v<T, bfloat16>  ? Format::bfloat16
                              : std::is_same_v<T, float16> ? Format::float16
                                                           : Format::tf32;
    emulation::Block::now->multiply_add(format, sums, a, {b0, b1});
}
#else
// sums += A X of one step, by the whole warp. T: float for tf32.
template <class T>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define TPK_MULTIPLY_ADD(type, instruction)                                                                         \
    template <>                                                                                                     \
    __device__ inline void multiply_add<type>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
        asm volatile("mma.sync.aligned." instruction                                                                \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                              \
                     "{%0, %1, %2, %3};"                                                                            \
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                               \
    }
TPK_MULTIPLY_ADD(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
TPK_MULTIPLY_ADD(float16, "m16n8k16.row.col.f32.f16.f16.f32")
TPK_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef TPK_MULTIPLY_ADD
#endif

#endif

}  // namespace tpk::mma
