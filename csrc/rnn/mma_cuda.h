// The launchers of mma_cuda.cu, which kernel_cuda.cu calls where float32 pays there.
#pragma once

#include "kernel.h"

namespace tpk {

// parts: 1, or of float32 2. They throw where N is too large, or where displacements are needed and missing.
template <class T, int parts>
void rnn_forward_mma(const RnnForward<T>& f, void* stream);
template <class T, int parts>
void rnn_backward_mma(const RnnBackward<T, float>& f, float* displacements, void* stream);
// Whether backward needs displacements.
template <class T, int parts>
bool rnn_mma_needs_displacements(const RnnBackward<T, float>& f);

}  // namespace tpk
