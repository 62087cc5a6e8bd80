// Where a tile's numbers lie.
#pragma once

#include "../cells/cell.h"
#include "../common/tiles.h"
#include "call.h"

namespace tpk::TPK_ISA {

// Of arrays [T][B][H][arrays][N].
template <class Call>
inline Strides contiguous(const Call& f, ptrdiff_t arrays) {
    const ptrdiff_t row = arrays * f.N;
    return {f.row_strides.time * row, f.row_strides.batch * row, f.row_strides.head * row};
}

// Of states outside of time, [B][H][parts][N].
template <class Call>
inline Strides outside_time(const Call& f, ptrdiff_t parts) {
    return {0, f.H * parts * f.N, parts * f.N};
}

// Rows of the batch, of one head.
struct Tile {
    ptrdiff_t head, first, rows;

    ptrdiff_t in(const Strides& strides) const { return first * strides.batch + head * strides.head; }
};

template <class Call>
constexpr bool is_backward = false;
template <class T>
constexpr bool is_backward<RecurrenceBackward<T>> = true;

// A tile's sequences in time. Steps are numbered in the order of time, and read in that order or in reverse.
template <class Call>
class Course {
    static constexpr bool has_chunks = is_backward<Call>;

public:
    Course(const Call& f, const Tile& tile) : f_(f), tile_(tile), plain(is_plain(f)) {}

    // The k-th that is read.
    ptrdiff_t step(ptrdiff_t k) const { return f_.reverse ? f_.T_ - 1 - k : k; }

    // How many of the tile's sequences, the first ones, have a k-th step; none outside of time.
    ptrdiff_t rows(ptrdiff_t k) const {
        if (k < 0 || k >= f_.T_) return 0;
        if (plain) return tile_.rows;
        if constexpr (has_chunks)
            if (f_.chunk) return within(divide_up(f_.length - k, f_.chunk));
        if (!f_.offsets) return tile_.rows;
        const ptrdiff_t t = step(k);
        return within(f_.offsets[t + 1] - f_.offsets[t]);
    }

    // Of so many sequences of the batch, the tile's.
    ptrdiff_t within(ptrdiff_t sequences) const {
        const ptrdiff_t rows = sequences - tile_.first;
        return rows < 0 ? 0 : rows < tile_.rows ? rows : tile_.rows;
    }

    // Where the tile's numbers of step t begin.
    ptrdiff_t at(const Strides& strides, ptrdiff_t t) const {
        return (f_.offsets ? f_.offsets[t] * strides.batch : t * strides.time) + tile_.in(strides);
    }

    // run(row) for each of the rows that start anew before step t. False: there is none.
    template <class Run>
    bool for_resets(ptrdiff_t t, ptrdiff_t rows, const Run& run) const {
        if (!f_.reset) return false;
        const Strides& strides = f_.reset_strides;
        const bool* reset = f_.reset + (f_.offsets ? f_.offsets[t] : t * strides.time) + tile_.first * strides.batch;
        if constexpr (has_chunks) reset += tile_.head / f_.heads * strides.head;
        bool any = false;
        for (ptrdiff_t i = 0; i < rows; ++i)
            if (reset[i * strides.batch]) run(i), any = true;
        return any;
    }

private:
    static bool is_plain(const Call& f) {
        if constexpr (has_chunks)
            if (f.chunk) return false;
        return !f.offsets && !f.reset;
    }

    const Call& f_;
    const Tile& tile_;

public:
    const bool plain;  // all sequences have all steps, and the first state only is where they start
};

// Rows of numbers, `row` apart.
template <class T>
struct RowsOf {
    const T* data;
    ptrdiff_t row;
};

// A part of the state that a tile starts its k-th step from. It is `there` for the sequences that had a step before, of
// the first state, or zero, for the others, and zero for those that start anew. A mixture is put together in `mixed`.
template <class T, class Call>
RowsOf<T> part_before(const Call& f, const Course<Call>& course, const Tile& tile, ptrdiff_t k, ptrdiff_t part,
                      ptrdiff_t parts, RowsOf<T> there, const T* zeros, T* mixed) {
    const Strides strides = outside_time(f, parts);
    const RowsOf<T> start = {f.start ? f.start + tile.in(strides) + part * f.N : zeros, f.start ? strides.batch : 0};
    if (course.plain) return k > 0 ? there : start;
    const ptrdiff_t t = course.step(k), rows = course.rows(k), columns = padded<T>(f.N);
    if constexpr (is_backward<Call>)
        if (f.chunk && k == 0) {  // there is the end of the chunk before, but for the first one
            const ptrdiff_t none = tile.first == 0 ? 1 : 0;
            const T* start = f.start ? f.start + (tile.head * parts + part) * f.N : zeros;
            copy_rows(start, 0, none, f.N, mixed, columns);
            copy_rows(there.data + none * there.row, there.row, rows - none, f.N, mixed + none * columns, columns);
            course.for_resets(t, rows, [&](ptrdiff_t i) { clear(mixed + i * columns, f.N); });
            return {mixed, columns};
        }
    const ptrdiff_t earlier = course.rows(k - 1), known = earlier < rows ? earlier : rows;
    if ((known == 0 || known == rows) && !course.for_resets(t, rows, [](ptrdiff_t) {})) return known ? there : start;
    copy_rows(there.data, there.row, known, f.N, mixed, columns);
    copy_rows(start.data + known * start.row, start.row, rows - known, f.N, mixed + known * columns, columns);
    course.for_resets(t, rows, [&](ptrdiff_t i) { clear(mixed + i * columns, f.N); });
    return {mixed, columns};
}

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
inline void exchange(T& one, T& other) {
    const T first = one;
    one = other, other = first;
}

// What backward reads of a step.
template <class Cell, class T>
struct StepOfTile {
    RowsOf<T> before[Cell::states], after, kept, u;
    ptrdiff_t N;

    // The k-th that is read. mixed: memory for all parts of the tile.
    StepOfTile(const RecurrenceBackward<T>& f, const Course<RecurrenceBackward<T>>& course, const Tile& tile,
               ptrdiff_t k, const T* zeros, T* mixed)
        : N(f.N) {
        constexpr ptrdiff_t S = Cell::states, K = Cell::kept;
        const Strides states = contiguous(f, 1), arrays = contiguous(f, K);
        const ptrdiff_t t = course.step(k), earlier = k || f.chunk ? course.step(k - 1) : t;
        after = {f.h + course.at(states, t), states.batch};
        kept = {K ? f.kept + course.at(arrays, t) : nullptr, arrays.batch};
        u = {f.u ? f.u + course.at(f.u_strides, t) : nullptr, f.u_strides.batch};
        before[0] = {f.h + course.at(states, earlier), states.batch};
        if (S > 1) before[S - 1] = {f.kept + course.at(arrays, earlier) + (K - 1) * N, arrays.batch};
        for (ptrdiff_t part = 0; part < S; ++part)
            before[part] = part_before<T>(f, course, tile, k, part, S, before[part], zeros,
                                          mixed + part * tile.rows * padded<T>(N));
    }

    template <class V, Inverse inverse>
    Step<Cell, V> at(ptrdiff_t i, ptrdiff_t j) const {
        Step<Cell, V> step;
        for (int part = 0; part < Cell::states; ++part)
            step.before[part] = load<V>(before[part].data + i * before[part].row + j);
        step.after = load<V>(after.data + i * after.row + j);
        step.kept = load_all<V, Cell::kept>(kept.data + i * kept.row + j, N);
        if constexpr (inverse == Inverse::direct) step.u = load_all<V, Cell::gates>(u.data + i * u.row + j, N);
        return step;
    }
};

}  // namespace tpk::TPK_ISA
