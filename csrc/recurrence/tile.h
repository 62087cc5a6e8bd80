// Where a tile's numbers lie.
#pragma once

#include "../cells/cell.h"
#include "../common/tiles.h"
#include "call.h"

namespace tpk::TPK_ISA {

// Of arrays [T][B][H][arrays][N].
template <class Call>
inline Strides contiguous(const Call& f, ptrdiff_t arrays) {
    return {f.B * f.H * arrays * f.N, f.H * arrays * f.N, arrays * f.N};
}

// Rows of the batch, of one head.
struct Tile {
    ptrdiff_t head, first, rows;

    ptrdiff_t in(const Strides& strides, ptrdiff_t t = 0) const {
        return t * strides.time + first * strides.batch + head * strides.head;
    }
};

// Vectors `stride` apart.
template <class V, int count, class T>
inline Several<V, count> load_all(const T* from, ptrdiff_t stride) {
    Several<V, count> all;
    for (int k = 0; k < count; ++k) all[k] = load<V>(from + k * stride);
    return all;
}

template <class V, int count, class T>
inline void store_all(T* to, ptrdiff_t stride, const Several<V, count>& all) {
    for (int k = 0; k < count; ++k) store(to + k * stride, all[k]);
}

template <class T>
inline void exchange(T*& one, T*& other) {
    T* first = one;
    one = other, other = first;
}

// What backward reads of a step.
template <class Cell, class T>
struct StepOfTile {
    const T *before, *after, *kept, *u;
    ptrdiff_t before_row, row, kept_row, u_row, N;

    StepOfTile(const RecurrenceBackward<T>& f, const Tile& tile, ptrdiff_t t, const T* zeros) : N(f.N) {
        const Strides states = contiguous(f, 1), arrays = contiguous(f, Cell::kept);
        row = states.batch, kept_row = arrays.batch, u_row = f.u_strides.batch;
        before_row = t || f.start ? row : 0;
        before = t ? f.h + tile.in(states, t - 1) : f.start ? f.start + tile.in(states) : zeros;
        after = f.h + tile.in(states, t);
        kept = Cell::kept ? f.kept + tile.in(arrays, t) : nullptr;
        u = f.u ? f.u + tile.in(f.u_strides, t) : nullptr;
    }

    template <class V, Inverse inverse>
    Step<Cell, V> at(ptrdiff_t i, ptrdiff_t j) const {
        Step<Cell, V> step;
        step.before = load<V>(before + i * before_row + j);
        step.after = load<V>(after + i * row + j);
        step.kept = load_all<V, Cell::kept>(kept + i * kept_row + j, N);
        if constexpr (inverse == Inverse::direct) step.u = load_all<V, Cell::gates>(u + i * u_row + j, N);
        return step;
    }
};

}  // namespace tpk::TPK_ISA
