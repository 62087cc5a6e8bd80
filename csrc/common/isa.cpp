#include "isa.h"

#include <cstring>

namespace tpk {

#ifdef TPK_HAVE_V4
namespace v4 {
extern const IsaLevel level;
}
#endif
#ifdef TPK_HAVE_V3
namespace v3 {
extern const IsaLevel level;
}
#endif
namespace base {
extern const IsaLevel level;
}

namespace {

struct Levels {
    const IsaLevel* list[4] = {};

    Levels() {
        int count = 0;
#if defined(TPK_HAVE_V4) || defined(TPK_HAVE_V3)
        __builtin_cpu_init();
#endif
#ifdef TPK_HAVE_V4
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            list[count++] = &v4::level;
#endif
#ifdef TPK_HAVE_V3
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
            __builtin_cpu_supports("bmi2"))
            list[count++] = &v3::level;
#endif
        list[count++] = &base::level;
    }
};

const Levels& levels() {
    static const Levels found;
    return found;
}

const IsaLevel*& current() {
    static const IsaLevel* level = levels().list[0];
    return level;
}

}  // namespace

const IsaLevel* const* isa_levels() { return levels().list; }

const IsaLevel& isa_level() { return *current(); }

bool set_isa_level(const char* name) {
    for (const IsaLevel* const* level = isa_levels(); *level; ++level) {
        if (std::strcmp((*level)->name, name) == 0) {
            current() = *level;
            return true;
        }
    }
    return false;
}

}  // namespace tpk
