// The instruction sets the CPU kernels are compiled for, and the one in use.
#pragma once

#include "../recurrence/call.h"
#include "../regularized_inverse/kernel.h"

namespace tpk {

// What one instruction set offers. Launchers return false where there is no memory for their scratch.
template <class T>
struct Launchers {
    bool (*recurrence_forward)(const RecurrenceForwardCpu<T>&);
    bool (*recurrence_backward)(const RecurrenceBackward<T>&);
    bool (*regularized_solve)(const RegularizedSolve<T>&);
    double (*multiply_add_loop)(long iterations);  // the ceiling; returns the operations it took
};

struct IsaLevel {
    const char* name;
    Launchers<float> single_precision;
    Launchers<double> double_precision;
    bool (*regularized_polar)(const RegularizedPolar&);
};

// Levels that are compiled in and that this processor has, best first; null-terminated.
const IsaLevel* const* isa_levels();

// Level in use: the best one, or the one that was set. set_isa_level is false for a name that isa_levels() lacks.
const IsaLevel& isa_level();
bool set_isa_level(const char* name);

}  // namespace tpk
