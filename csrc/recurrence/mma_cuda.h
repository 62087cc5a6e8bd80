// The launchers of mma_cuda.cu, which registers_cuda.cu calls where float32 pays there.
#pragma once

#include "call.h"

namespace tpk {

// parts: 1, or of float32 2. They throw where N is too large, or where displacements are needed and missing.
template <class T, int parts>
void recurrence_forward_mma(const RecurrenceForward<T>& f, void* stream);
template <class T, int parts>
void recurrence_backward_mma(const RecurrenceBackward<T, float>& f, float* displacements, void* stream);
// Whether backward needs displacements.
template <class T, int parts>
bool recurrence_mma_needs_displacements(const RecurrenceBackward<T, float>& f);

}  // namespace tpk
