// The recurrence, whatever the cell. A tile of batch rows of one head runs all T steps on one thread: threads split
// tiles and never wait for one another. The weights are packed once a call. A step is one pass over the tile's
// elements, where the cell is, and the small products before it (forward) or after it (backward).

#include "../cells/elman.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../common/denormals.h"
#include "../common/gemm.h"
#include "../common/interrupt.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "solver_cpu.inl"
#include "tile.h"

namespace tpk::TPK_ISA {

// run(cell)
template <class Run>
bool with_cell(CellName name, const Run& run) {
    if (name == CellName::rnn_tanh) return run(Elman<Nonlinearity::tanh>{});
    if (name == CellName::rnn_relu) return run(Elman<Nonlinearity::relu>{});
    if (name == CellName::rnn_identity) return run(Elman<Nonlinearity::identity>{});
    if (name == CellName::gru) return run(Gru{});
    return run(Lstm{});
}

// run(tile, scratch) for every tile, with scratch memory for `size` numbers a row. False: there is no such memory.
template <class T, class Call, class Run>
bool for_tiles(const Call& f, ptrdiff_t size, const Run& run) {
    const Tiles tiles(f.B, f.H, f.threads);
    const int threads = static_cast<int>(tiles.count < f.threads ? tiles.count : f.threads);
    Scratch<T> scratch(threads * tiles.rows * size);
    if (!scratch) return false;
    Interruptible* const call = running_call();
    // The first thread, which listens for Ctrl-C, has the largest share.
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t index = 0; index < tiles.count; ++index) {
        const FlushDenormals flush;
        Listener listener(call);
        const ptrdiff_t first = index % tiles.per_head * tiles.rows, rest = f.B - first;
        const Tile tile = {index / tiles.per_head, first, rest < tiles.rows ? rest : tiles.rows};
        run(tile, scratch.get() + thread_number() * tiles.rows * size);
    }
    return true;
}

// Numbers of scratch memory that a row takes.
template <class Cell, class T>
ptrdiff_t forward_size(const RecurrenceForwardCpu<T>& f) {
    return padded<T>(Cell::gates * f.N) + (f.projection ? padded<T>(f.N + f.projected) : 0) +
           3 * Cell::states * padded<T>(f.N);
}

// With a projection, `both` [rows][N + M] holds h_{t-1} and x_t side by side, and one product gives the whole
// pre-activation but for the bias. Without, h_{t-1} is read where it was written. A second part of the state is written
// to `next` and read from there in the next step.
template <class Cell, bool project, class T>
void forward_tile(const RecurrenceForwardCpu<T>& f, const Tile& tile, const T* packed, const T* zeros, T* scratch) {
    constexpr int G = Cell::gates, K = Cell::kept, S = Cell::states;
    const Course<RecurrenceForwardCpu<T>> course(f, tile);
    const Strides states = contiguous(f, 1), arrays = contiguous(f, K), outside = outside_time(f, S);
    const ptrdiff_t N = f.N, width = N + f.projected, columns = padded<T>(G * N), state_columns = padded<T>(N);
    const ptrdiff_t row = states.batch, kept_row = arrays.batch, input_row = f.input_strides.batch;
    const auto take = [&](ptrdiff_t count) { return (scratch += tile.rows * count) - tile.rows * count; };
    T *product = take(columns), *both = take(project ? padded<T>(width) : 0), *mixed = take(S * state_columns);
    T *second = take((S - 1) * state_columns), *next = take((S - 1) * state_columns);
    const T* bias = f.bias ? f.bias + tile.head * N : zeros;
    const T* input_bias = f.input_bias ? f.input_bias : zeros;
    T* last = f.last + tile.in(outside);
    if (f.offsets) {  // some may have no step here
        const T* start = f.start ? f.start + tile.in(outside) : zeros;
        copy_rows(start, f.start ? outside.batch : 0, tile.rows, S * N, last, outside.batch);
    }
    RowsOf<T> there = {nullptr, row};  // h of the step before
    Listener& listener = tpk::listener();
    for (ptrdiff_t k = 0; k < f.T_; ++k) {
        if (listener.interrupted()) return;
        const ptrdiff_t t = course.step(k), rows = course.rows(k);
        if (rows == 0) continue;
        const T* input = f.input + course.at(f.input_strides, t);
        T* h = f.h + course.at(states, t);
        T* kept = f.kept ? f.kept + course.at(arrays, t) : nullptr;
        RowsOf<T> before = part_before<T>(f, course, tile, k, 0, S, there, zeros, mixed);
        RowsOf<T> second_before = before;
        if (S > 1)
            second_before = part_before<T>(f, course, tile, k, 1, S, RowsOf<T>{second, state_columns}, zeros,
                                           mixed + tile.rows * state_columns);
        if (project) {
            if (before.data != both) copy_rows(before.data, before.row, rows, N, both, width);
            copy_rows(input, input_row, rows, f.projected, both + N, width);
            before = {both, width};
        }
        multiply_packed(before.data, before.row, rows, packed, width, G * N, product, columns);
        const T* u = project ? input_bias : input;
        const ptrdiff_t u_row = project ? 0 : input_row;
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            Several<V, S> state;
            state[0] = load<V>(before.data + i * before.row + j);
            if constexpr (S > 1) state[1] = load<V>(second_before.data + i * second_before.row + j);
            const auto result =
                Cell::template forward<T>(load_all<V, G>(u + i * u_row + j, N),
                                          load_all<V, G>(product + i * columns + j, N), load<V>(bias + j), state);
            // What the next step reads and writes, on its way before it is due. Beyond the last one no harm is done.
            for (int gate = 0; !project && gate < G; ++gate)
                __builtin_prefetch(u + f.input_strides.time + i * u_row + gate * N + j);
            __builtin_prefetch(h + states.time + i * row + j, 1);
            store(h + i * row + j, result.state[0]);
            if (project) store(both + i * width + j, result.state[0]);
            if constexpr (S > 1) store(next + i * state_columns + j, result.state[1]);
            if (kept) store_all(kept + i * kept_row + j, N, result.kept);
        });
        there = project ? RowsOf<T>{both, width} : RowsOf<T>{h, row};
        exchange(second, next);
        const ptrdiff_t go_on = course.rows(k + 1);
        T* ended = last + go_on * outside.batch;
        copy_rows(h + go_on * row, row, rows - go_on, N, ended, outside.batch);
        if (S > 1) copy_rows(second + go_on * state_columns, state_columns, rows - go_on, N, ended + N, outside.batch);
    }
}

// False: no memory for the packed weights.
template <class T>
bool recurrence_forward(const RecurrenceForwardCpu<T>& f) {
    if (f.B == 0) return true;
    return with_cell(f.cell, [&](auto cell) {
        using Cell = decltype(cell);
        constexpr bool projects = Cell::into_is_delta;  // one product can give both shares
        const bool project = f.projection;
        const ptrdiff_t N = f.N, M = f.projected, all = Cell::gates * N, columns = padded<T>(all);
        Scratch<T> packed(f.H * (N + M) * columns), zeros(all);
        if (!packed || !zeros) return false;
        for (ptrdiff_t head = 0; head < f.H; ++head)
            pack(f.weight + head * all * N, 1, N, N, all, packed.get() + head * N * columns, N + M);
        if (project) pack(f.projection, 1, M, M, all, packed.get() + N * lanes<T>, N + M);
        clear(zeros.get(), all);
        const auto run = project ? forward_tile<Cell, projects, T> : forward_tile<Cell, false, T>;
        return for_tiles<T>(f, forward_size<Cell>(f), [&](const Tile& tile, T* scratch) {
            run(f, tile, packed.get() + tile.head * N * columns, zeros.get(), scratch);
        });
    });
}

template <bool constant>
struct Constant {
    static constexpr bool value = constant;
};

// A head's matrices, packed for products of rows with W and with the P of all of the inverse's products.
template <class Cell, class T>
struct Matrices {
    const T *weight, *feedback;
    typename Operator<Cell, T>::Matrices solved;
};

template <class Cell>
constexpr Form form_of(Inverse inverse) {
    if (inverse == Inverse::none) return {0, false, false};
    if (inverse == Inverse::identity) return {0, true, false};
    if (inverse == Inverse::jacobian) return Operator<Cell, float>::form;
    return Cell::form(inverse);
}

// Of "identity" λ as it is, of "jacobian" what the solver takes.
template <Inverse inverse, class Cell, class T, class V>
inline Term<Cell, V> term_of(const Several<V, Cell::states>& lambda, const Step<Cell, V>& step, T clip) {
    if constexpr (inverse == Inverse::identity || inverse == Inverse::jacobian) {
        Term<Cell, V> term;
        term.sent[0] = lambda[0], term.by = lambda;
        return term;
    } else {
        return Cell::template term<inverse>(lambda, step, clip);
    }
}

// What a step of a tile sends back of one kind, in memory: the products' sum, in its place `by` where there is no
// product; with a scale, the scale and `by` of their own; and the second part of the state.
template <class Cell, class T>
struct Sent {
    static constexpr bool two = Cell::states > 1;
    static constexpr ptrdiff_t arrays(Form form) { return 1 + form.scale + (form.scale && form.by) + two; }

    T *sum, *scale, *by, *second;

    Sent(T* memory, ptrdiff_t size, Form form)
        : sum(memory),
          scale(memory + size),
          by(form.scale ? scale + size : memory),
          second(memory + size * (arrays(form) - 1)) {}

    template <class V>
    V first(ptrdiff_t at, Form form) const {
        V value = load<V>(sum + at);
        if (form.scale) value = form.by ? load<V>(by + at) + load<V>(scale + at) * value : load<V>(scale + at) * value;
        return value;
    }
};

// Numbers of scratch memory that a row takes, or more.
template <class Cell, class T>
ptrdiff_t backward_size(Inverse inverse, ptrdiff_t N) {
    return (12 + 4 * Cell::states) * padded<T>(N) + padded<T>(form_of<Cell>(inverse).products * N) +
           2 * padded<T>(Cell::gates * N) +
           (inverse == Inverse::jacobian ? ConjugateGradients<T, Operator<Cell, T>>::size(N) : 0);
}

// A pass makes δ_t of λ_t and μ_t, and of these what W and the inverse take: multiplied, it is there for the next pass.
template <class Cell, Inverse inverse, class T>
void backward_tile(const RecurrenceBackward<T>& f, const Tile& tile, const Matrices<Cell, T>& matrices, const T* zeros,
                   T* scratch) {
    constexpr int G = Cell::gates, S = Cell::states;
    static constexpr Form form = form_of<Cell>(inverse);
    constexpr bool carries = inverse != Inverse::none, jacobian = inverse == Inverse::jacobian, two = S > 1;
    constexpr bool adds_past = Cell::passes_by && !two;  // to the product with W
    static constexpr Form unscaled = {1, false, false};  // of an adjoint, and of the latched displacement
    using Sent = Sent<Cell, T>;
    const Course<RecurrenceBackward<T>> course(f, tile);
    const bool total = f.update == Update::total, latches = f.latch != 0, blends = f.blend != 1 || latches;
    const Strides gates = contiguous(f, G), of_adjoints = outside_time(f, S);
    const Strides of_displacements = outside_time(f, latches ? 2 * S : S);
    const ptrdiff_t N = f.N, columns = padded<T>(N), size = tile.rows * columns, wide = padded<T>(G * N);
    const ptrdiff_t g_row = f.grad_h_strides.batch, last_row = f.chunk ? 0 : of_adjoints.batch;
    const ptrdiff_t sent_row = padded<T>(form.products * N);
    if (jacobian) clear(scratch, tile.rows * backward_size<Cell, T>(inverse, N));  // columns beyond N stay zero
    const auto take = [&](ptrdiff_t count) { return (scratch += count) - count; };
    // Of the step after: the inverse's term, and what the adjoint became. Two of each where a pass reads one while it
    // writes the next: overlapping vectors are computed twice.
    const auto take_sent = [&](Form of) { return Sent(take(Sent::arrays(of) * size), size, of); };
    Sent carried = take_sent(form), next_carried = form.by || two ? take_sent(form) : carried;
    Sent through = take_sent(unscaled), next_through = Cell::passes_by ? take_sent(unscaled) : through;
    Sent latched = take_sent(unscaled), next_latched = take_sent(unscaled);
    T* sent = take(tile.rows * sent_row);                              // what the inverse's products take
    T* into = Cell::into_is_delta ? nullptr : take(tile.rows * wide);  // what W takes, where that is not δ
    T* dropped = take(f.chunk ? tile.rows * wide : 0);                 // δ of steps that are another chunk's
    T* mixed = take(S * size);
    ConjugateGradients<T, Operator<Cell, T>> solver(f, tile, matrices.weight, matrices.solved, scratch);
    const T step_size = f.step, clip = f.clip, blend = f.blend, latch = f.latch;

    // What the step after the last one sent, and what the first one sends on, of a tensor with those strides.
    const auto receive = [&](const T* from, const Strides& strides, const Sent& sent, Form of) {
        const RowsOf<T> given = {from ? from + tile.in(strides) : zeros, from ? strides.batch : 0};
        copy_rows(given.data, given.row, tile.rows, N, sent.sum, columns);
        if (two) copy_rows(given.data + (from ? N : 0), given.row, tile.rows, N, sent.second, columns);
        for (ptrdiff_t j = 0; of.scale && j < size; ++j) sent.scale[j] = T(1);
        if (of.scale && of.by) clear(sent.by, size);
    };
    const auto send = [&](const Sent& sent, Form of, T* to, const Strides& strides, ptrdiff_t first, ptrdiff_t end) {
        if (!to || first >= end) return;
        to += tile.in(strides) + first * strides.batch;
        for_elements<T>(end - first, N, [=, row = strides.batch](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const ptrdiff_t at = (first + i) * columns + j;
            store(to + i * row + j, sent.template first<V>(at, of));
            if (two) store(to + i * row + N + j, load<V>(sent.second + at));
        });
    };
    const auto forget = [&](const Sent& sent, Form of, ptrdiff_t i) {
        const ptrdiff_t at = i * columns;
        clear(sent.sum + at, N);
        if (of.scale) clear(sent.scale + at, N);
        if (of.scale && of.by) clear(sent.by + at, N);
        if (two) clear(sent.second + at, N);
    };
    // λ' follows λ in what is carried.
    const T* latched_in = f.carried_in ? f.carried_in + S * N : nullptr;
    T* latched_out = f.carried_out ? f.carried_out + S * N : nullptr;
    const bool several_lengths = f.offsets || f.chunk;
    const bool received_carried = carries && (f.carried_in || several_lengths);
    const bool received_through = total && (f.through_in || several_lengths);
    if (received_carried) {
        receive(f.carried_in, of_displacements, carried, form);
        receive(f.carried_in, of_displacements, next_carried, form);
    }
    if (received_through) {
        receive(f.through_in, of_adjoints, through, unscaled);
        receive(f.through_in, of_adjoints, next_through, unscaled);
    }
    if (latches) {
        receive(latched_in, of_displacements, latched, unscaled);
        receive(latched_in, of_displacements, next_latched, unscaled);
    }
    const auto send_on = [&](ptrdiff_t first, ptrdiff_t end) {
        if (carries) send(carried, form, f.carried_out, of_displacements, first, end);
        if (total) send(through, unscaled, f.through_out, of_adjoints, first, end);
        if (latches) send(latched, unscaled, latched_out, of_displacements, first, end);
    };
    if (several_lengths) send_on(0, tile.rows);  // some may have no step here
    Listener& listener = tpk::listener();
    for (ptrdiff_t k = f.T_ - 1; k >= 0; --k) {
        if (listener.interrupted()) return;
        const ptrdiff_t t = course.step(k), rows = course.rows(k);
        if (rows == 0) continue;
        const bool inner = k < f.T_ - 1;  // a step of this call follows
        const bool carried_here = carries && (inner || received_carried);
        const bool through_here = total && (inner || received_through);
        const T* g = f.grad_h ? f.grad_h + course.at(f.grad_h_strides, t) : nullptr;
        const ptrdiff_t ending =
            inner ? course.rows(k + 1) : course.within(f.later);  // the first of those that end here
        const T* last =
            ending < rows && f.grad_last ? f.grad_last + tile.head * S * N + tile.first * last_row : nullptr;
        // Without δ nothing is read but g.
        const bool own = !f.chunk || k < f.chunk;
        T* grad_u = !f.grad_u ? nullptr : own ? f.grad_u + course.at(gates, t) : dropped;
        const ptrdiff_t u_row = own ? gates.batch : wide;
        const StepOfTile<Cell, T> step_of_tile(f, course, tile, k, zeros, mixed);
        const auto pass = [=](auto zero, ptrdiff_t i, ptrdiff_t j, auto is_plain) {
            using V = decltype(zero);
            constexpr bool is_blend = !decltype(is_plain)::value, may_lack_delta = is_blend;
            const ptrdiff_t at = i * columns + j;
            const auto step = step_of_tile.template at<V, inverse>(i, j);
            Several<V, S> lambda = {}, source = {};  // λ and the gradient
            if (carried_here) lambda[0] = carried.template first<V>(at, form);
            if (two && carried_here) lambda[S - 1] = load<V>(carried.second + at);
            if (g) source[0] = load<V>(g + i * g_row + j);
            if (last && i >= ending)
                for (int part = 0; part < S; ++part) source[part] += load<V>(last + i * last_row + part * N + j);
            for (int part = 0; part < S; ++part) lambda[part] += step_size * source[part];
            Several<V, S> mu = lambda;
            if (is_blend && blends)
                for (int part = 0; part < S; ++part) {
                    mu[part] = source[part] + blend * (lambda[part] - source[part]);
                    if (!latches) continue;
                    const V sum = load<V>((part ? latched.second : latched.sum) + at) + step_size * source[part];
                    store((part ? next_latched.second : next_latched.sum) + at, sum);
                    mu[part] += latch * (sum - source[part]);
                }
            if (through_here) mu[0] += load<V>(through.sum + at);
            if (two && through_here) mu[S - 1] += load<V>(through.second + at);
            if (!may_lack_delta || grad_u) {
                const auto adjoint = Cell::template back<T>(mu, step);
                store_all(grad_u + i * u_row + j, N, adjoint.delta);
                if (total && !Cell::into_is_delta) store_all(into + i * wide + j, N, adjoint.into);
                if (total && Cell::passes_by) store((two ? next_through.second : next_through.sum) + at, adjoint.past);
            }
            if constexpr (carries) {
                const auto term = term_of<inverse>(lambda, step, clip);
                for (int n = 0; n < form.products; ++n) store(sent + i * sent_row + n * N + j, term.sent[n]);
                if (form.by) store(next_carried.by + at, term.by[0]);
                if (form.scale) store(next_carried.scale + at, term.scale);
                if (two) store(next_carried.second + at, term.by[S - 1]);
            }
        };
        if (blends || !grad_u)
            for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) { pass(zero, i, j, Constant<false>{}); });
        else
            for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) { pass(zero, i, j, Constant<true>{}); });
        if (k > 0 || f.carried_out) {
            if constexpr (jacobian) solver.solve(t, rows, step_of_tile, form.by ? next_carried.sum : sent);
            if constexpr (form.products > 0)
                multiply_packed<form.by && !form.scale ? Into::add : Into::store>(
                    sent, sent_row, rows, jacobian ? matrices.weight : matrices.feedback, form.products * N, N,
                    next_carried.sum, columns);
        }
        if (total && (k > 0 || f.through_out))
            multiply_packed<adds_past ? Into::add : Into::store>(Cell::into_is_delta ? grad_u : into,
                                                                 Cell::into_is_delta ? u_row : wide, rows,
                                                                 matrices.weight, G * N, N, next_through.sum, columns);
        course.for_resets(t, rows, [&](ptrdiff_t i) {
            forget(next_carried, form, i);
            forget(next_through, unscaled, i);
            forget(next_latched, unscaled, i);
        });
        exchange(carried, next_carried);
        exchange(through, next_through);
        exchange(latched, next_latched);
        send_on(course.rows(k - 1), rows);  // of those that have no earlier step
    }
}

// Tries the inverses from the last one on; the bindings reject what the cell lacks.
template <class Cell, class T, Inverse inverse = Inverse::direct>
auto backward_tile_of(Inverse wanted) -> decltype(&backward_tile<Cell, Inverse::none, T>) {
    if constexpr (Cell::has(inverse))
        if (wanted == inverse) return backward_tile<Cell, inverse, T>;
    if constexpr (inverse != Inverse::none)
        return backward_tile_of<Cell, T, static_cast<Inverse>(static_cast<int>(inverse) - 1)>(wanted);
    return nullptr;
}

// False: no memory for the packed weights.
template <class T>
bool recurrence_backward(const RecurrenceBackward<T>& f) {
    if (f.B == 0) return true;
    return with_cell(f.cell, [&](auto cell) {
        using Cell = decltype(cell);
        const bool jacobian = f.inverse == Inverse::jacobian;
        const ptrdiff_t N = f.N, matrix = N * padded<T>(N), all = Cell::gates;
        const ptrdiff_t products = jacobian ? 0 : form_of<Cell>(f.inverse).products;
        const ptrdiff_t of_solver = jacobian ? Operator<Cell, T>::matrices_size(N) : 0;
        const ptrdiff_t of_head = (all + products) * matrix + of_solver;
        Scratch<T> packed(f.heads * of_head), zeros(N);
        Scratch<Matrices<Cell, T>> matrices(f.heads);
        if (!packed || !zeros || !matrices) return false;
        clear(zeros.get(), N);
        for (ptrdiff_t head = 0; head < f.heads; ++head) {
            const T* weight = f.weight + head * all * N * N;
            T *to = packed.get() + head * of_head, *feedback = to + all * matrix,
              *solved = feedback + products * matrix;
            pack(weight, N, 1, all * N, N, to, all * N);
            for (ptrdiff_t k = 0; k < products; ++k)
                pack(f.feedback + (head * products + k) * N * N, 1, N, N, N, feedback + k * N * lanes<T>, products * N);
            matrices.get()[head] = {to, feedback, {}};
            if (jacobian) matrices.get()[head].solved = Operator<Cell, T>::prepare(weight, f, solved);
        }
        const auto run = backward_tile_of<Cell, T>(f.inverse);
        return for_tiles<T>(f, backward_size<Cell, T>(f.inverse, N), [&](const Tile& tile, T* scratch) {
            run(f, tile, matrices.get()[tile.head % f.heads], zeros.get(), scratch);
        });
    });
}

}  // namespace tpk::TPK_ISA
