// What a backward pass is told of the rule, and tells of its solves.
#pragma once

#include <stddef.h>

namespace tpk {

enum class Inverse { none, identity, weight, layer, jacobian, difference, direct };
enum class Update { total, local };

// Where the solve of "jacobian" gave up, and the relative residual it was left with; 0: nowhere.
struct Unsolved {
    double residual;
    ptrdiff_t t, b, head;
};

}  // namespace tpk
