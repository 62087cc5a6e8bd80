// Every CPU kernel, for the instruction set TPK_ISA. CMakeLists.txt compiles this file once for each.
#include "common/isa.h"
#include "common/peak.inl"
#include "recurrence/driver_cpu.inl"
#include "regularized_inverse/kernel_cpu.inl"
#include "regularized_inverse/polar_cpu.inl"

#define TPK_STRING_OF(x) #x
#define TPK_STRING(x) TPK_STRING_OF(x)

namespace tpk::TPK_ISA {

extern const IsaLevel level;
const IsaLevel level = {
    TPK_STRING(TPK_ISA),
    {recurrence_forward<float>, recurrence_backward<float>, regularized_solve<float>, multiply_add_loop<float>},
    {recurrence_forward<double>, recurrence_backward<double>, regularized_solve<double>, multiply_add_loop<double>},
    regularized_polar,
};

}  // namespace tpk::TPK_ISA
