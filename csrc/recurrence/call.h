// A call of the recurrence, one struct each way for every cell, and the launchers on a CUDA device. Letters as in
// tp_kernels/ops/rnn/README.md: T steps, B sequences, H heads, N units; G gates and K kept arrays as the cell has them.
//
// Arrays are [T][B][H][…], contiguous unless strides (in elements, over time, batch, heads) are given; absent ones
// null. On the CPU row_strides are those of all of them in rows of N or of several N, and they may be packed:
// `offsets`, [T + 1], says how many rows there are before each step, in place of B a step. States have S parts, side by
// side in what is not over time. Fields are listed once, as FIELD(kind, name),
// for struct and bindings: those of both modules, of the CPU's alone, of the CUDA module's alone, and the four that
// arrive as `sizes`.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/half.h"
#include "../common/rule.h"

namespace tpk {

enum class Nonlinearity { tanh, relu, identity };
enum class CellName { rnn_tanh, rnn_relu, rnn_identity, gru, lstm };  // the first ones in the order of Nonlinearity

using Size = ptrdiff_t;
using Count = int;
using Flag = bool;
using Flags = const bool*;
using Offsets = const int64_t*;

struct Strides {
    ptrdiff_t time, batch, head;
};

#define TPK_FIELD(kind, name) kind name;
#define TPK_NO_FIELD(kind, name)

// input: u, the input's share of the gates, [T][B][H][G N]; or, with a projection, x, [T][B][M].
#define TPK_RECURRENCE_FORWARD(BOTH, CPU, SIZE)                               \
    BOTH(Input, input)                                                        \
    BOTH(Strides, input_strides)                                              \
    CPU(Input, projection) /* [G N][M], or null; with one, H = 1 */           \
    CPU(Input, input_bias) /* [G N], or null: zero; only with a projection */ \
    CPU(Size, projected)   /* M; 0 without a projection */                    \
    BOTH(Input, weight)    /* [H][G N][N] */                                  \
    BOTH(Input, start)     /* [B][H][S N], or null: zero */                   \
    BOTH(Output, h)        /* [T][B][H][N] */                                 \
    SIZE(Size, T_)                                                            \
    SIZE(Size, B)                                                             \
    SIZE(Size, H)                                                             \
    SIZE(Size, N)                                                             \
    BOTH(CellName, cell)                                                      \
    CPU(Count, threads)                                                       \
    CPU(Input, bias)  /* [H][N], the cell's own, or null: zero */             \
    CPU(Output, kept) /* [T][B][H][K][N], for backward, or null */            \
    CPU(Output, last) /* [B][H][S N]: the last state of each sequence */      \
    CPU(Strides, row_strides)                                                 \
    CPU(Offsets, offsets)                                                     \
    CPU(Flags, reset) /* [T][B]: the state before is zero; or null */         \
    CPU(Strides, reset_strides)                                               \
    CPU(Flag, reverse) /* the last step is the first */

// What a CUDA kernel takes: nvcc gives kernels with an argument of more than 128 bytes other registers.
template <class T>
struct RecurrenceForward {
    using Input = const T*;
    using Output = T*;
    TPK_RECURRENCE_FORWARD(TPK_FIELD, TPK_NO_FIELD, TPK_FIELD)
};

template <class T>
struct RecurrenceForwardCpu : RecurrenceForward<T> {
    using Input = const T*;
    using Output = T*;
    TPK_RECURRENCE_FORWARD(TPK_NO_FIELD, TPK_FIELD, TPK_NO_FIELD)
};

// With a chunk C, the B sequences are parts of one of `length` steps: the b-th begins at step b C and is read for up to
// T steps, some of which are the next ones'; δ is written for the first C. Heads are sequences here. Without grad_u
// only displacements are computed.
//
// `carried` and `through`, [B][H][S N] each (with a latch carried is [B][H][2 S N], the latched one last), are what the
// step after the last one sends back (null: nothing), and what the first one sends on (or null): the inverse's term, of
// no use to the inverse "none", and what the adjoint μ becomes, of no use to the update "local".
#define TPK_RECURRENCE_BACKWARD(BOTH, CPU, CUDA, SIZE)                                         \
    BOTH(Input, grad_h) /* [T][B][H][N], or null: zero */                                      \
    BOTH(Strides, grad_h_strides)                                                              \
    BOTH(Input, grad_last) /* [B][H][S N], added to the last step's gradient, or null: zero */ \
    BOTH(Input, h)                                                                             \
    BOTH(Input, weight)                                                                        \
    BOTH(Input, feedback) /* [H][F][N][N]: the P of the F products of the inverse */           \
    BOTH(Input, carried_in)                                                                    \
    BOTH(Input, through_in)                                                                    \
    BOTH(Output, carried_out)                                                                  \
    BOTH(Output, through_out)                                                                  \
    CPU(Input, u) /* [T][B][H][G N], for the inverse "direct" */                               \
    CPU(Strides, u_strides)                                                                    \
    CPU(Input, start)         /* as of forward */                                              \
    BOTH(Output, grad_u)      /* [T][B][H][G N] */                                             \
    BOTH(Counter, iterations) /* [T][B][H], of the solve of "jacobian", or null */             \
    CPU(Input, kept)                                                                           \
    SIZE(Size, T_)                                                                             \
    SIZE(Size, B)                                                                              \
    SIZE(Size, H)                                                                              \
    SIZE(Size, N)                                                                              \
    BOTH(CellName, cell)                                                                       \
    BOTH(Inverse, inverse)                                                                     \
    BOTH(Update, update)                                                                       \
    BOTH(Number, step)                                                                         \
    BOTH(Number, clip)                                                                         \
    BOTH(Number, reg)                                                                          \
    BOTH(Number, rtol)                                                                         \
    CPU(Size, first) /* the number of the first step, for `unsolved` */                        \
    CPU(Size, later) /* how many sequences go on after the last step: no grad_last for them */ \
    CPU(Number, blend)                                                                         \
    CPU(Number, latch)                                                                         \
    CPU(Size, heads)  /* of the weights: head k has those of k modulo this */                  \
    CPU(Size, chunk)  /* as below, or 0 */                                                     \
    CPU(Size, length) /* with a chunk: of the whole sequence */                                \
    CPU(Strides, row_strides)                                                                  \
    CPU(Offsets, offsets)                                                                      \
    CPU(Flags, reset)                                                                          \
    CPU(Strides, reset_strides)                                                                \
    CPU(Flag, reverse)                                                                         \
    CPU(Count, threads)                                                                        \
    CUDA(Residuals, missed) /* [T][B][H]: where the solve gave up its relative residual, else 0 */

// Number_: of the rule's numbers.
template <class T, class Number_ = T>
struct RecurrenceBackward {
    using Number = Number_;
    using Input = const T*;
    using Output = T*;
    using Counter = int32_t*;
    using Residuals = Number*;
    TPK_RECURRENCE_BACKWARD(TPK_FIELD, TPK_FIELD, TPK_FIELD, TPK_FIELD)
    Unsolved* unsolved;  // the worst; not on a CUDA device
};

// On a CUDA device, of float, bfloat16 and float16 and the first three cells: no projection, no inverse "difference" or
// "direct", "jacobian" of float on one multiprocessor. They return when the work is in the stream, and throw where it
// cannot be. tf32: float32 may be multiplied with 11 bits of its 24. displacements: [T][B][H][N], memory for λ where
// backward needs it, between two sweeps.
template <class T>
constexpr int recurrence_cuda_largest = sizeof(T) == 4 ? 128 : 256;  // N on one multiprocessor
template <class T>
void recurrence_forward_cuda(const RecurrenceForward<T>& f, bool tf32, int device, void* stream);
template <class T>
void recurrence_backward_cuda(const RecurrenceBackward<T, float>& f, float* displacements, bool tf32, int device,
                              void* stream);
template <class T>
bool recurrence_needs_displacements(const RecurrenceBackward<T, float>& f, bool tf32, int device);

// Beyond that, on a cluster of multiprocessors.
int recurrence_cluster_largest(int device);  // N; 0 where the device has no clusters
void recurrence_forward_cluster(const RecurrenceForward<float>& f, int device, void* stream);
void recurrence_backward_cluster(const RecurrenceBackward<float>& f, int device, void* stream);

// One step without its products, any N. a(h), in place; and δ, with carried_out what the inverse's product takes of λ.
void chain_activation_cuda(float* h, ptrdiff_t count, CellName cell, int device, void* stream);
void chain_step_cuda(const RecurrenceBackward<float>& f, int device, void* stream);

}  // namespace tpk
