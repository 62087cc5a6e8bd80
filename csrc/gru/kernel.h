// The gated recurrent unit's launchers. Arrays are [T][B][…], contiguous unless strides (in elements) are given; absent
// ones null. Blocks of three lie in the order r, z, n.
#pragma once

#include <stddef.h>

#include "../common/rule.h"

namespace tpk {

struct SequenceStrides {
    ptrdiff_t time, batch;
};

template <class T>
struct GruForward {
    const T* u;  // [T][B][3N], the input's share of the gates
    SequenceStrides u_strides;
    const T* weight;  // [3N][N]
    const T* bias;    // [N], or null: zero
    const T* h0;      // [B][N], or null: zero
    T* h;
    T* gates;  // [T][B][4][N]: r, z, n, and what r multiplied, q; or null
    ptrdiff_t T_, B, N;
    int threads;
};

template <class T>
struct GruBackward {
    const T* grad_h;  // or null: zero
    SequenceStrides grad_h_strides;
    const T* grad_last;  // [B][N], added to the last step's gradient, or null: zero
    const T* h;
    const T* gates;
    const T* weight;
    const T* feedback;  // P of n's block, [N][N], for the inverse "weight"; of all three, [3][N][N], for "layer"
    const T* h0;        // or null: zero
    T* grad_u;          // [T][B][3N]
    T* grad_h0;         // [B][N]
    Unsolved* unsolved;
    ptrdiff_t T_, B, N;
    Inverse inverse;
    Update update;
    T step, clip, reg, rtol;
    int threads;
};

}  // namespace tpk
