// As the recurrent layer: a tile of batch rows runs all T steps on one thread, with the weights packed once a call.

#include "../common/denormals.h"
#include "../common/gemm.h"
#include "../common/matrix.h"
#include "../common/memory.h"
#include "../common/tanh.h"
#include "../common/threads.h"
#include "../common/tiles.h"
#include "jacobian_cpu.inl"
#include "kernel.h"

namespace tpk::TPK_ISA {

template <class T, class V>
inline V sigmoid(V x) {
    return T(0.5) * tanh<T>(T(0.5) * x) + T(0.5);
}

template <class V>
inline V root_of(V x) {
    for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = root(x[i]);
    return x;
}

template <class T>
void gru_forward_tile(const GruForward<T>& f, const T* packed, ptrdiff_t first, ptrdiff_t rows, const T* zeros,
                      T* product) {
    const ptrdiff_t N = f.N, time = f.B * N, columns = padded<T>(3 * N), u_row = f.u_strides.batch;
    const T* before = f.h0 ? f.h0 + first * N : zeros;
    const T* bias = f.bias ? f.bias : zeros;
    for (ptrdiff_t t = 0; t < f.T_; ++t) {
        const T* u = f.u + t * f.u_strides.time + first * u_row;
        T* h = f.h + t * time + first * N;
        T* gates = f.gates ? f.gates + 4 * (t * time + first * N) : nullptr;
        multiply_packed(before, N, rows, packed, N, 3 * N, product, columns);
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const T *input = u + i * u_row + j, *state = product + i * columns + j;
            const V r = sigmoid<T>(load<V>(input) + load<V>(state));
            const V z = sigmoid<T>(load<V>(input + N) + load<V>(state + N));
            const V q = load<V>(state + 2 * N) + load<V>(bias + j);
            const V n = tanh<T>(load<V>(input + 2 * N) + r * q);
            store(h + i * N + j, n + z * (load<V>(before + i * N + j) - n));
            if (!gates) return;
            T* kept = gates + 4 * i * N + j;
            store(kept, r), store(kept + N, z), store(kept + 2 * N, n), store(kept + 3 * N, q);
        });
        before = h;
    }
}

template <class T>
void gru_backward_tile(const GruBackward<T>& f, const T* packed_feedback, const T* packed_weight,
                       const T* packed_transpose, bool finite, ptrdiff_t first, ptrdiff_t rows, const T* zeros,
                       T* scratch) {
    const ptrdiff_t N = f.N, time = f.B * N, columns = padded<T>(N), size = rows * columns, wide = rows * 3 * N;
    const Inverse inverse = f.inverse;
    const bool total = f.update == Update::total, layer = inverse == Inverse::layer,
               weight = inverse == Inverse::weight, jacobian = inverse == Inverse::jacobian;
    T* carried = scratch;  // term(λ_{t+1}), for the step at hand
    T* next_carried = scratch + size;
    T* through = scratch + 2 * size;  // Jᵀ_{t+1} μ_{t+1}
    T* next_through = scratch + 3 * size;
    T* product = scratch + 4 * size;  // of the inverse "weight": P's, and what it is multiplied with
    T* outer = scratch + 5 * size;
    T* direct = scratch + 6 * size;  // and what goes past it
    T* sent = scratch + 7 * size;    // what the weights' blocks, [3] of a row, are multiplied with
    T* inverted = sent + wide;       // what those of the inverse are
    GruJacobianSolver<T> solver(f, packed_weight, packed_transpose, finite, first, rows, inverted + wide);
    clear(scratch, 4 * size);  // nothing comes from beyond the last step
    const T step = f.step, low = f.clip, high = 1 - f.clip;
    for (ptrdiff_t t = f.T_ - 1; t >= 0; --t) {
        const T* g = f.grad_h ? f.grad_h + t * f.grad_h_strides.time + first * f.grad_h_strides.batch : nullptr;
        const T* last = t == f.T_ - 1 && f.grad_last ? f.grad_last + first * N : nullptr;
        const T* before = t ? f.h + (t - 1) * time + first * N : f.h0 ? f.h0 + first * N : zeros;
        const T* gates = f.gates + 4 * (t * time + first * N);
        T* grad_u = f.grad_u + 3 * (t * time + first * N);
        const ptrdiff_t g_row = f.grad_h_strides.batch;
        for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
            using V = decltype(zero);
            const T* kept = gates + 4 * i * N + j;
            const V r = load<V>(kept), z = load<V>(kept + N), n = load<V>(kept + 2 * N), q = load<V>(kept + 3 * N);
            const V apart = load<V>(before + i * N + j) - n;
            V lambda = load<V>(carried + i * columns + j);
            if (g) lambda += step * load<V>(g + i * g_row + j);
            if (last) lambda += step * load<V>(last + i * N + j);
            const V mu = total ? lambda + load<V>(through + i * columns + j) : lambda;
            const V of_n = (1 - z) * (1 - n * n) * mu, of_z = apart * z * (1 - z) * mu, of_r = of_n * q * r * (1 - r);
            T* delta = grad_u + 3 * i * N + j;
            store(delta, of_r), store(delta + N, of_z), store(delta + 2 * N, of_n);
            if (total) {
                T* blocks = sent + 3 * i * N + j;
                store(blocks, of_r), store(blocks + N, of_z), store(blocks + 2 * N, r * of_n);
                store(next_through + i * columns + j, z * mu);
            }
            if (weight) {
                const V part = root_of(1 - z);
                store(inverted + i * N + j, part * r * lambda);
                store(outer + i * columns + j, part);
                store(direct + i * columns + j, z * lambda);
                return;
            }
            if (layer) {
                const V r_in = clamp(r, low, high), z_in = clamp(z, low, high);
                const V inner = (1 - z_in) * (1 - n * n) * lambda;
                T* blocks = inverted + 3 * i * N + j;
                store(blocks, q * inner / (r_in * (1 - r_in)));
                store(blocks + N, apart * lambda / (z_in * (1 - z_in)));
                store(blocks + 2 * N, r_in * inner);
                lambda *= z_in;
            }
            if (inverse != Inverse::none) store(next_carried + i * columns + j, lambda);
        });
        if (total)
            multiply<T, Into::add>(sent, 3 * N, 1, rows, packed_right(packed_weight, 3 * N), 3 * N, columns,
                                   next_through, columns);
        if (layer)
            multiply<T, Into::add>(inverted, 3 * N, 1, rows, packed_right(packed_feedback, 3 * N), 3 * N, columns,
                                   next_carried, columns);
        if (weight) {
            multiply_packed(inverted, N, rows, packed_feedback, N, N, product, columns);
            for_elements<T>(rows, N, [=](auto zero, ptrdiff_t i, ptrdiff_t j) {
                using V = decltype(zero);
                const ptrdiff_t at = i * columns + j;
                store(next_carried + at, load<V>(direct + at) + load<V>(outer + at) * load<V>(product + at));
            });
        }
        if (jacobian) solver.solve(t, gates, before, next_carried);
        T* spent = through;
        through = next_through, next_through = spent;
        if (inverse != Inverse::none) spent = carried, carried = next_carried, next_carried = spent;
    }
    copy_rows(total ? through : carried, columns, rows, N, f.grad_h0 + first * N, N);
}

// False: no memory for the packed weights.
template <class T>
bool gru_forward(const GruForward<T>& f) {
    if (f.B == 0) return true;
    const Tiles tiles(f.B, 1, f.threads);
    const ptrdiff_t columns = padded<T>(3 * f.N), product = tiles.rows * columns;
    const int threads = static_cast<int>(tiles.count < f.threads ? tiles.count : f.threads);
    Scratch<T> packed(f.N * columns), products(threads * product), zeros(tiles.rows * f.N);
    if (!packed || !products || !zeros) return false;
    pack(f.weight, 1, f.N, f.N, 3 * f.N, packed.get(), f.N);
    clear(zeros.get(), tiles.rows * f.N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t index = 0; index < tiles.count; ++index) {
        const FlushDenormals flush;
        const ptrdiff_t first = index * tiles.rows, rest = f.B - first, rows = rest < tiles.rows ? rest : tiles.rows;
        gru_forward_tile(f, packed.get(), first, rows, zeros.get(), products.get() + thread_number() * product);
    }
    return true;
}

template <class T>
bool gru_backward(const GruBackward<T>& f) {
    if (f.B == 0) return true;
    const Tiles tiles(f.B, 1, f.threads);
    const ptrdiff_t N = f.N, columns = padded<T>(N), matrix = N * columns;
    const bool jacobian = f.inverse == Inverse::jacobian;
    const ptrdiff_t blocks = f.inverse == Inverse::layer ? 3 : f.inverse == Inverse::weight ? 1 : 0;
    const ptrdiff_t scratch =
        7 * tiles.rows * columns + 6 * tiles.rows * N + (jacobian ? GruJacobianSolver<T>::size(tiles.rows, N) : 0);
    const int threads = static_cast<int>(tiles.count < f.threads ? tiles.count : f.threads);
    Scratch<T> feedback(blocks * matrix), weight(3 * matrix), transpose(jacobian ? 3 * matrix : 0),
        scratches(threads * scratch), zeros(tiles.rows * N);
    if (!feedback || !weight || !transpose || !scratches || !zeros) return false;
    for (ptrdiff_t block = 0; block < blocks; ++block)
        pack(f.feedback + block * N * N, 1, N, N, N, feedback.get() + block * N * lanes<T>, blocks * N);
    pack(f.weight, N, 1, 3 * N, N, weight.get(), 3 * N);
    for (ptrdiff_t block = 0; jacobian && block < 3; ++block)
        pack(f.weight + block * N * N, 1, N, N, N, transpose.get() + block * matrix, N);
    const bool finite = !jacobian || is_finite(f.weight, 3 * N * N);
    clear(zeros.get(), tiles.rows * N);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t index = 0; index < tiles.count; ++index) {
        const FlushDenormals flush;
        const ptrdiff_t first = index * tiles.rows, rest = f.B - first, rows = rest < tiles.rows ? rest : tiles.rows;
        gru_backward_tile(f, feedback.get(), weight.get(), transpose.get(), finite, first, rows, zeros.get(),
                          scratches.get() + thread_number() * scratch);
    }
    return true;
}

}  // namespace tpk::TPK_ISA
