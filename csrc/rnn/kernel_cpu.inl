// A tile of batch rows of one head runs all T steps on one thread: threads split tiles and never wait for one another.
// The weights are packed once a call. A step is one small product into scratch, then one pass over its elements.

#include "../common/denormals.h"
#include "../common/gemm.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "../common/tiles.h"
#include "jacobian_cpu.inl"
#include "kernel.h"
#include "tile.h"

namespace tpk::TPK_ISA {

// packed[head] of a weight [H][N][N]: the right-hand matrix of a row vector times Wᵀ (transposed) or times W.
template <class T>
void pack_heads(const T* weight, bool transposed, ptrdiff_t H, ptrdiff_t N, T* packed) {
    for (ptrdiff_t head = 0; head < H; ++head)
        pack(weight + head * N * N, transposed ? 1 : N, transposed ? N : 1, N, N, packed + head * N * padded<T>(N), N);
}

// With a projection, `state` [rows][N + M] holds h_{t-1} and x_t side by side, and one product gives the whole
// pre-activation but for the bias. Without, h_{t-1} is read where it was written.
template <class T, Nonlinearity a, bool project>
void forward_tile(const RnnForward<T>& f, const T* packed, ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, T* product,
                  T* state, const T* bias) {
    const ptrdiff_t N = f.N, row = f.H * N, time = f.B * row, columns = padded<T>(N), K = N + f.M;
    const ptrdiff_t offset = first * row + head * N, input_row = f.input_strides.batch;
    const T* before = f.h0 + offset;
    if (project) copy_rows(before, row, rows, N, state, K);
    for (ptrdiff_t t = 0; t < f.T_; ++t) {
        const T* input = f.input + t * f.input_strides.time + first * input_row + head * f.input_strides.head;
        T* h = f.h + t * time + offset;
        if (project) copy_rows(input, input_row, rows, f.M, state + N, K);
        multiply_packed(project ? state : before, project ? K : row, rows, packed, K, N, product, columns);
        const T* term = project ? bias : input;
        const ptrdiff_t term_row = project ? 0 : input_row;
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const V z = load<V>(term + i * term_row + j) + load<V>(product + i * columns + j);
            const V value = activation<a, T>(z);
            // What the next step reads and writes, on its way before it is due. Beyond the last one no harm is done.
            if (!project) __builtin_prefetch(term + f.input_strides.time + i * term_row + j);
            __builtin_prefetch(h + time + i * row + j, 1);
            store(h + i * row + j, value);
            if (project) store(state + i * K + j, value);
        });
        before = h;
    }
}

template <class T, Nonlinearity a>
void backward_tile(const RnnBackward<T>& f, const T* packed_feedback, const T* packed_weight, const Gram<T>& gram,
                   ptrdiff_t head, ptrdiff_t first, ptrdiff_t rows, T* scratch) {
    const ptrdiff_t N = f.N, row = f.H * N, time = f.B * row, columns = padded<T>(N), size = rows * columns;
    const ptrdiff_t offset = first * row + head * N, g_row = f.grad_h_strides.batch, u_row = f.u_strides.batch;
    const Inverse inverse = f.inverse;
    const bool total = f.update == Update::total, jacobian = inverse == Inverse::jacobian,
               direct = inverse == Inverse::direct, product = inverse != Inverse::none && inverse != Inverse::identity;
    T* inverse_term = scratch;             // of λ_{t+1}, for the step at hand
    T* through = scratch + size;           // Wᵀ δ_{t+1}
    T* displacement = scratch + 2 * size;  // λ_t, or what P takes of it
    const T* delta = nullptr;              // δ_{t+1}
    const T step = f.step, low = f.clip - 1, high = 1 - f.clip;
    JacobianSolver<T> solver(f, gram, head, first, rows, scratch + 3 * size);
    // term(λ_t), from what the pass over the elements made of λ_t; h_{t-1} is still to be added to that of "direct"
    const auto send_back = [&](ptrdiff_t t) {
        if (jacobian) solver.template solve<a>(t, displacement);
        multiply_packed(displacement, columns, rows, jacobian ? packed_weight : packed_feedback, N, N, inverse_term,
                        columns);
    };
    if (jacobian) clear(displacement, (1 + JacobianSolver<T>::arrays) * size);  // columns beyond N stay zero
    if (f.carried_in) copy_rows(f.carried_in + offset, row, rows, N, product ? inverse_term : displacement, columns);
    if (f.through_in) copy_rows(f.through_in + offset, row, rows, N, through, columns);
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        const bool inner = t < f.T_ - 1;  // a step of this call follows
        const bool carried = inverse != Inverse::none && (inner || f.carried_in),
                   adjoint = total && (inner || f.through_in);
        if (inner && product) send_back(t + 1);
        if (inner && total) multiply_packed(delta, row, rows, packed_weight, N, N, through, columns);
        const T* term = product ? inverse_term : displacement;
        T* next = product ? displacement : inverse_term;  // never what is read: overlapping vectors are computed twice
        const T* g =
            !f.grad_h ? nullptr : f.grad_h + t * f.grad_h_strides.time + first * g_row + head * f.grad_h_strides.head;
        const T* last = !inner && f.grad_last ? f.grad_last + offset : nullptr;
        const T* h = f.h + t * time + offset;
        T* grad_u = f.grad_u + t * time + offset;
        const T* u = !direct ? nullptr : f.u + t * f.u_strides.time + first * u_row + head * f.u_strides.head;
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            V lambda = carried ? load<V>(term + i * columns + j) : zero;
            const V state = load<V>(h + i * row + j);
            if (direct && inner) lambda += state;
            if (g) lambda += step * load<V>(g + i * g_row + j);
            if (last) lambda += step * load<V>(last + i * row + j);
            const V mu = adjoint ? lambda + load<V>(through + i * columns + j) : lambda;
            store(grad_u + i * row + j, through_activation<a>(mu, state));
            if (inverse == Inverse::layer) lambda = through_inverse<a>(lambda, state, low, high);
            if (inverse == Inverse::difference) lambda = inverse_difference<a>(lambda, state, low, high);
            if (direct) lambda = load<V>(u + i * u_row + j) - inverse_activation<a>(state - lambda, low, high);
            if (inverse != Inverse::none) store(next + i * columns + j, lambda);
        });
        delta = grad_u;
        if (!product) {
            inverse_term = displacement;
            displacement = next;
        }
    }
    if (f.through_out && total) {
        multiply_packed(delta, row, rows, packed_weight, N, N, through, columns);
        copy_rows(through, columns, rows, N, f.through_out + offset, row);
    }
    if (f.carried_out && inverse != Inverse::none) {
        if (product) send_back(0);
        const T* term = product ? inverse_term : displacement;
        const T* h0 = direct && f.h0 ? f.h0 + offset : nullptr;
        T* sent = f.carried_out + offset;
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const V lambda = load<V>(term + i * columns + j);
            store(sent + i * row + j, h0 ? lambda + load<V>(h0 + i * row + j) : lambda);
        });
    }
}

template <class T, bool project>
auto forward_tile_of(Nonlinearity nonlinearity) {
    return nonlinearity == Nonlinearity::tanh   ? forward_tile<T, Nonlinearity::tanh, project>
           : nonlinearity == Nonlinearity::relu ? forward_tile<T, Nonlinearity::relu, project>
                                                : forward_tile<T, Nonlinearity::identity, project>;
}

// False: no memory for the packed weights.
template <class T>
bool rnn_forward(const RnnForward<T>& f) {
    if (f.B == 0) return true;
    const Tiles tiles(f.B, f.H, f.threads);
    const bool project = f.projection != nullptr;
    const ptrdiff_t columns = padded<T>(f.N), K = f.N + f.M, product = tiles.rows * columns;
    const ptrdiff_t scratch = product + (project ? tiles.rows * K : 0);
    const int threads = static_cast<int>(tiles.count < f.threads ? tiles.count : f.threads);
    Scratch<T> packed(f.H * K * columns), scratches(threads * scratch), bias(f.N);
    if (!packed || !scratches || !bias) return false;
    if (project) {
        pack(f.weight, 1, f.N, f.N, f.N, packed.get(), K);
        pack(f.projection, 1, f.M, f.M, f.N, packed.get() + f.N * lanes<T>, K);
        for (ptrdiff_t j = 0; j < f.N; ++j) bias.get()[j] = f.bias ? f.bias[j] : T(0);
    } else {
        pack_heads(f.weight, true, f.H, f.N, packed.get());
    }
    const auto tile = project ? forward_tile_of<T, true>(f.nonlinearity) : forward_tile_of<T, false>(f.nonlinearity);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t index = 0; index < tiles.count; ++index) {
        const FlushDenormals flush;
        const ptrdiff_t head = index / tiles.per_head, first = index % tiles.per_head * tiles.rows;
        const ptrdiff_t rest = f.B - first, rows = rest < tiles.rows ? rest : tiles.rows;
        T* own = scratches.get() + thread_number() * scratch;
        tile(f, packed.get() + head * f.N * columns, head, first, rows, own, own + product, bias.get());
    }
    return true;
}

template <class T>
bool rnn_backward(const RnnBackward<T>& f) {
    if (f.B == 0) return true;
    const Tiles tiles(f.B, f.H, f.threads);
    const bool jacobian = f.inverse == Inverse::jacobian;
    const ptrdiff_t columns = padded<T>(f.N), matrix = f.N * columns;
    const ptrdiff_t scratch = (jacobian ? 3 + JacobianSolver<T>::arrays : 3) * tiles.rows * columns;
    const int threads = static_cast<int>(tiles.count < f.threads ? tiles.count : f.threads);
    const bool square = f.feedback || jacobian;  // P, or K
    Scratch<T> feedback(square ? f.H * matrix : 0), weight(f.H * matrix), products(threads * scratch),
        diagonals(jacobian ? f.H * columns + 2 * matrix : 0);
    Scratch<Gram<T>> grams(f.H);
    if (!feedback || !weight || !products || !diagonals || !grams) return false;
    for (ptrdiff_t head = 0; jacobian && head < f.H; ++head)
        grams.get()[head] = gram_of(f.weight + head * f.N * f.N, f.N, f.reg, f.rtol, feedback.get() + head * matrix,
                                    diagonals.get() + head * columns, diagonals.get() + f.H * columns);
    if (f.feedback && !jacobian) pack_heads(f.feedback, true, f.H, f.N, feedback.get());
    pack_heads(f.weight, false, f.H, f.N, weight.get());
    const auto tile = f.nonlinearity == Nonlinearity::tanh   ? backward_tile<T, Nonlinearity::tanh>
                      : f.nonlinearity == Nonlinearity::relu ? backward_tile<T, Nonlinearity::relu>
                                                             : backward_tile<T, Nonlinearity::identity>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t index = 0; index < tiles.count; ++index) {
        const FlushDenormals flush;
        const ptrdiff_t head = index / tiles.per_head, first = index % tiles.per_head * tiles.rows;
        const ptrdiff_t rest = f.B - first, rows = rest < tiles.rows ? rest : tiles.rows;
        tile(f, feedback.get() + head * matrix, weight.get() + head * matrix, grams.get()[head], head, first, rows,
             products.get() + thread_number() * scratch);
    }
    return true;
}

}  // namespace tpk::TPK_ISA
