// Tiles of batch rows, which a recurrence takes through all its steps on one thread each.
#pragma once

#include "gemm.h"

namespace tpk::TPK_ISA {

// Rows at most: enough to hide the weights' trip from the second-level cache.
constexpr ptrdiff_t largest_tile = 48;

struct Tiles {
    ptrdiff_t rows, per_head, count;  // rows of a tile, tiles of a head, tiles in all

    Tiles(ptrdiff_t B, ptrdiff_t H, int threads) {
        const ptrdiff_t fair = divide_up(B * H, threads > 0 ? threads : 1);
        per_head = divide_up(B, fair < largest_tile ? fair : largest_tile);
        rows = divide_up(B, per_head);
        per_head = divide_up(B, rows);
        count = per_head * H;
    }
};

template <class T>
inline void copy_rows(const T* source, ptrdiff_t source_row, ptrdiff_t rows, ptrdiff_t n, T* target,
                      ptrdiff_t target_row) {
    for (ptrdiff_t i = 0; i < rows; ++i)
        __builtin_memcpy(target + i * target_row, source + i * source_row, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
inline void clear(T* elements, ptrdiff_t count) {
    __builtin_memset(elements, 0, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace tpk::TPK_ISA
