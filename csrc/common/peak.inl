// The ceiling: fused multiply-adds on registers only, as many chains as keep every unit busy.

#include "vector.h"

#if defined(__aarch64__)
#define TPK_OPAQUE(vector) asm volatile("" : "+w"(vector))
#else
#define TPK_OPAQUE(vector) asm volatile("" : "+v"(vector))
#endif

namespace tpk::TPK_ISA {

// Runs the loop and returns the floating-point operations it took.
template <class T>
double multiply_add_loop(long iterations) {
    constexpr int chains = TPK_REGISTERS - 4;
    Vec<T> sum[chains];
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) sum[i] = broadcast<Vec<T>>(T(i));
    Vec<T> factor = broadcast<Vec<T>>(T(0.5));
    const Vec<T> term = broadcast<Vec<T>>(T(1));
    for (long n = 0; n < iterations; ++n) {
#pragma GCC unroll 32
        for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + term;
        TPK_OPAQUE(factor);  // the next iteration may not be computed ahead
    }
    Vec<T> total = {};
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) total += sum[i];
    TPK_OPAQUE(total);  // nor left out
    return 2.0 * chains * lanes<T> * static_cast<double>(iterations);
}

}  // namespace tpk::TPK_ISA
