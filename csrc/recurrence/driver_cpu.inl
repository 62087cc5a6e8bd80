// The recurrence, whatever the cell. A tile of batch rows of one head runs all T steps on one thread: threads split
// tiles and never wait for one another. The weights are packed once a call. A step is one pass over the tile's
// elements, where the cell is, and the small products before it (forward) or after it (backward).

#include "../cells/elman.h"
#include "../cells/gru.h"
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
    return run(Gru{});
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

// With a projection, `both` [rows][N + M] holds h_{t-1} and x_t side by side, and one product gives the whole
// pre-activation but for the bias. Without, h_{t-1} is read where it was written.
template <class Cell, bool project, class T>
void forward_tile(const RecurrenceForwardCpu<T>& f, const Tile& tile, const T* packed, const T* zeros, T* scratch) {
    constexpr int G = Cell::gates, K = Cell::kept;
    const Strides states = contiguous(f, 1), arrays = contiguous(f, K);
    const ptrdiff_t N = f.N, width = N + f.projected, columns = padded<T>(G * N), rows = tile.rows;
    const ptrdiff_t row = states.batch, kept_row = arrays.batch, input_row = f.input_strides.batch;
    T *product = scratch, *both = scratch + rows * columns;
    const T* bias = f.bias ? f.bias + tile.head * N : zeros;
    const T* input_bias = f.input_bias ? f.input_bias : zeros;
    const T* before = f.start ? f.start + tile.in(states) : zeros;
    ptrdiff_t before_row = f.start ? row : 0;
    if (project) copy_rows(before, before_row, rows, N, both, width);
    Listener& listener = tpk::listener();
    for (ptrdiff_t t = 0; t < f.T_; ++t) {
        if (listener.interrupted()) return;
        const T* input = f.input + tile.in(f.input_strides, t);
        T* h = f.h + tile.in(states, t);
        T* kept = f.kept ? f.kept + tile.in(arrays, t) : nullptr;
        if (project) copy_rows(input, input_row, rows, f.projected, both + N, width);
        multiply_packed(project ? both : before, project ? width : before_row, rows, packed, width, G * N, product,
                        columns);
        const T* u = project ? input_bias : input;
        const ptrdiff_t u_row = project ? 0 : input_row;
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const auto next = Cell::template forward<T>(load_all<V, G>(u + i * u_row + j, N),
                                                        load_all<V, G>(product + i * columns + j, N), load<V>(bias + j),
                                                        load<V>(before + i * before_row + j));
            // What the next step reads and writes, on its way before it is due. Beyond the last one no harm is done.
            for (int k = 0; !project && k < G; ++k)
                __builtin_prefetch(u + f.input_strides.time + i * u_row + k * N + j);
            __builtin_prefetch(h + states.time + i * row + j, 1);
            store(h + i * row + j, next.state);
            if (project) store(both + i * width + j, next.state);
            if (kept) store_all(kept + i * kept_row + j, N, next.kept);
        });
        before = h, before_row = row;
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
        return for_tiles<T>(f, columns + (project ? padded<T>(N + M) : 0), [&](const Tile& tile, T* scratch) {
            run(f, tile, packed.get() + tile.head * N * columns, zeros.get(), scratch);
        });
    });
}

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
inline Term<Cell, V> term_of(V lambda, const Step<Cell, V>& step, T clip) {
    if constexpr (inverse == Inverse::identity || inverse == Inverse::jacobian) {
        Term<Cell, V> term;
        term.sent[0] = term.by = lambda;
        return term;
    } else {
        return Cell::template term<inverse>(lambda, step, clip);
    }
}

// Numbers of scratch memory that a row takes, or more.
template <class Cell, class T>
ptrdiff_t backward_size(Inverse inverse, ptrdiff_t N) {
    return 8 * padded<T>(N) + padded<T>(form_of<Cell>(inverse).products * N) + padded<T>(Cell::gates * N) +
           (inverse == Inverse::jacobian ? ConjugateGradients<T, Operator<Cell, T>>::size(N) : 0);
}

// A pass makes δ_t of λ_t and μ_t, and of these what W and the inverse take: multiplied, it is there for the next pass.
template <class Cell, Inverse inverse, class T>
void backward_tile(const RecurrenceBackward<T>& f, const Tile& tile, const Matrices<Cell, T>& matrices, const T* zeros,
                   T* scratch) {
    constexpr int G = Cell::gates;
    static constexpr Form form = form_of<Cell>(inverse);
    constexpr bool carries = inverse != Inverse::none, jacobian = inverse == Inverse::jacobian;
    const Strides states = contiguous(f, 1), gates = contiguous(f, G);
    const ptrdiff_t N = f.N, rows = tile.rows, columns = padded<T>(N), size = rows * columns;
    const ptrdiff_t row = states.batch, u_row = gates.batch, g_row = f.grad_h_strides.batch;
    const ptrdiff_t sent_row = padded<T>(form.products * N), into_row = Cell::into_is_delta ? u_row : padded<T>(G * N);
    const bool total = f.update == Update::total;
    if (jacobian) clear(scratch, rows * backward_size<Cell, T>(inverse, N));  // columns beyond N stay zero
    const auto take = [&](ptrdiff_t count) { return (scratch += count) - count; };
    // Of the step after: the inverse's term or, with a scale, the products' sum, `by` and the scale; and what the
    // adjoint became. Two of each where a pass reads one while it writes the next: overlapping vectors are computed
    // twice.
    const ptrdiff_t carried_size = form.scale ? 3 * size : size;
    T* carried = take(carried_size);
    T* next_carried = form.by ? take(carried_size) : carried;
    T* through = take(size);
    T* next_through = Cell::passes_by ? take(size) : through;
    T* sent = take(rows * sent_row);                                  // what the inverse's products take
    T* into = Cell::into_is_delta ? nullptr : take(rows * into_row);  // what W takes, where that is not δ
    ConjugateGradients<T, Operator<Cell, T>> solver(f, tile, matrices.weight, matrices.solved, scratch);
    const T step_size = f.step, clip = f.clip;
    if (f.carried_in) copy_rows(f.carried_in + tile.in(states), row, rows, N, carried, columns);
    if (f.through_in) copy_rows(f.through_in + tile.in(states), row, rows, N, through, columns);
    Listener& listener = tpk::listener();
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        if (listener.interrupted()) return;
        const bool inner = t < f.T_ - 1;  // a step of this call follows
        const bool carried_here = carries && (inner || f.carried_in), through_here = total && (inner || f.through_in);
        const T* g = f.grad_h ? f.grad_h + tile.in(f.grad_h_strides, t) : nullptr;
        const T* last = !inner && f.grad_last ? f.grad_last + tile.in(states) : nullptr;
        T* grad_u = f.grad_u + tile.in(gates, t);
        const StepOfTile<Cell, T> step_of_tile(f, tile, t, zeros);
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const ptrdiff_t at = i * columns + j;
            const auto step = step_of_tile.template at<V, inverse>(i, j);
            V lambda = carried_here ? load<V>(carried + at) : zero;
            if (form.scale && inner) lambda = load<V>(carried + size + at) + load<V>(carried + 2 * size + at) * lambda;
            if (g) lambda += step_size * load<V>(g + i * g_row + j);
            if (last) lambda += step_size * load<V>(last + i * row + j);
            const V mu = through_here ? lambda + load<V>(through + at) : lambda;
            const auto adjoint = Cell::back(mu, step);
            store_all(grad_u + i * u_row + j, N, adjoint.delta);
            if (total && !Cell::into_is_delta) store_all(into + i * into_row + j, N, adjoint.into);
            if (total && Cell::passes_by) store(next_through + at, adjoint.past);
            if constexpr (carries) {
                const auto term = term_of<inverse>(lambda, step, clip);
                for (int k = 0; k < form.products; ++k) store(sent + i * sent_row + k * N + j, term.sent[k]);
                if (form.by) store(next_carried + (form.scale ? size : 0) + at, term.by);
                if (form.scale) store(next_carried + 2 * size + at, term.scale);
            }
        });
        if (t > 0 || f.carried_out) {
            if constexpr (jacobian) solver.solve(t, step_of_tile, form.by ? next_carried : sent);
            if constexpr (form.products > 0)
                multiply_packed<form.by && !form.scale ? Into::add : Into::store>(
                    sent, sent_row, rows, jacobian ? matrices.weight : matrices.feedback, form.products * N, N,
                    next_carried, columns);
        }
        if (total && (t > 0 || f.through_out))
            multiply_packed<Cell::passes_by ? Into::add : Into::store>(
                Cell::into_is_delta ? grad_u : into, into_row, rows, matrices.weight, G * N, N, next_through, columns);
        exchange(carried, next_carried);
        exchange(through, next_through);
    }
    if (f.through_out && total) copy_rows(through, columns, rows, N, f.through_out + tile.in(states), row);
    if (f.carried_out && carries) {
        if (form.scale)
            for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
                using V = decltype(zero);
                T* term = carried + i * columns + j;
                store(next_carried + i * columns + j, load<V>(term + size) + load<V>(term + 2 * size) * load<V>(term));
            });
        copy_rows(form.scale ? next_carried : carried, columns, rows, N, f.carried_out + tile.in(states), row);
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
        Scratch<T> packed(f.H * of_head), zeros(N);
        Scratch<Matrices<Cell, T>> matrices(f.H);
        if (!packed || !zeros || !matrices) return false;
        clear(zeros.get(), N);
        for (ptrdiff_t head = 0; head < f.H; ++head) {
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
            run(f, tile, matrices.get()[tile.head], zeros.get(), scratch);
        });
    });
}

}  // namespace tpk::TPK_ISA
