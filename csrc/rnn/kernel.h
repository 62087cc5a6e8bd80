// The recurrent layer's launchers. Letters as in tp_kernels/ops/rnn/README.md: T steps, B sequences, H heads, N units.
// Arrays are [T][B][H][N], contiguous unless strides (in elements, over time, batch, heads) are given; absent ones
// null.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/half.h"
#include "../common/rule.h"

namespace tpk {

enum class Nonlinearity { tanh, relu, identity };

struct Strides {
    ptrdiff_t time, batch, head;
};

template <class T>
struct RnnForward {
    // [T][B][H][N], the input's share of the pre-activation; or, with a projection, the input x: [T][B][M].
    const T* input;
    Strides input_strides;
    const T* projection;  // [N][M], or null; with one, H = 1
    const T* bias;        // [N], or null: zero; only with a projection
    ptrdiff_t M;          // 0 without a projection
    const T* weight;      // [H][N][N]
    const T* h0;          // [B][H][N]
    T* h;
    ptrdiff_t T_, B, H, N;
    Nonlinearity nonlinearity;
    int threads;
};

// Number: of the rule's numbers.
template <class T, class Number = T>
struct RnnBackward {
    const T* grad_h;  // or null: zero
    Strides grad_h_strides;
    const T* grad_last;  // [B][H][N], added to the last step's gradient, or null: zero
    const T* h;
    const T* weight;    // [H][N][N]
    const T* feedback;  // [H][N][N]: P, for the inverses "weight", "layer", "difference" and "direct"
    // [B][H][N] each: what the step after the last one sends back (null: nothing), and what the first one sends on.
    const T* carried_in;  // the inverse's term; of no use to the inverse "none"
    const T* through_in;  // Wᵀ δ; of no use to the update "local"
    T* carried_out;       // or null
    T* through_out;       // or null
    // For the inverse "direct": what went into the states, and the one before the first (null: zero).
    const T* u;
    Strides u_strides;
    const T* h0;
    T* grad_u;
    int32_t* iterations;  // [T][B][H], of the solve of "jacobian", or null
    Unsolved* unsolved;   // the worst; not on a CUDA device
    ptrdiff_t T_, B, H, N;
    Nonlinearity nonlinearity;
    Inverse inverse;
    Update update;
    Number step, clip, reg, rtol;
    ptrdiff_t first;  // the number of the first step, for "unsolved"
    int threads;
    // [T][B][H], on a CUDA device: where the solve of "jacobian" gave up its relative residual, else 0.
    Number* missed;
};

// On a CUDA device, of float, bfloat16 and float16: no projection, no inverse "difference" or "direct", "jacobian" of
// float on one multiprocessor. They return when the work is in the stream, and throw where it cannot be. tf32: float32
// may be multiplied with 11 bits of its 24. displacements: [T][B][H][N], memory for λ where backward needs it, between
// two sweeps.
template <class T>
constexpr int rnn_cuda_largest = sizeof(T) == 4 ? 128 : 256;  // N on one multiprocessor
template <class T>
void rnn_forward_cuda(const RnnForward<T>& f, bool tf32, int device, void* stream);
template <class T>
void rnn_backward_cuda(const RnnBackward<T, float>& f, float* displacements, bool tf32, int device, void* stream);
template <class T>
bool rnn_needs_displacements(const RnnBackward<T, float>& f, bool tf32, int device);

// Beyond that, on a cluster of multiprocessors.
int rnn_cluster_largest(int device);  // N; 0 where the device has no clusters
void rnn_forward_cluster(const RnnForward<float>& f, int device, void* stream);
void rnn_backward_cluster(const RnnBackward<float>& f, int device, void* stream);

// One step without its products, any N. a(h), in place; and δ, with carried_out what the inverse's product takes of λ.
void rnn_activation_cuda(float* h, ptrdiff_t count, Nonlinearity nonlinearity, int device, void* stream);
void rnn_step_cuda(const RnnBackward<float>& f, int device, void* stream);

}  // namespace tpk
