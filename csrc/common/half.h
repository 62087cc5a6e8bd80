// The half precision types as they lie in memory.
#pragma once

#include <stdint.h>

namespace tpk {

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

}  // namespace tpk
