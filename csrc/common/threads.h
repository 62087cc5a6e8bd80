// What the kernels need of OpenMP; one thread where the compiler has none.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tpk::TPK_ISA {

#ifdef _OPENMP
inline int thread_number() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }

// Returns once all threads of a team of more than one have come here.
inline void wait_for_team(int members) {
    if (members > 1) {
#pragma omp barrier
    }
}
#else
inline int thread_number() { return 0; }
inline int thread_count() { return 1; }
inline void wait_for_team(int) {}
#endif

}  // namespace tpk::TPK_ISA
