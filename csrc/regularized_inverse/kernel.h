// Batched regularized solve: the factorization behind the regularized inverse and its gradient.
#pragma once

#include <stddef.h>

namespace tpk {

// solved = (WᵀW + rI)⁻¹ rhs for each matrix W [m][n] of a batch, m >= n. All arrays contiguous.
template <class T>
struct RegularizedSolve {
    const T* weight;  // [batch][m][n]
    const T* rhs;     // [batch][n][m] or null: Wᵀ
    T reg;
    T* solved;     // [batch][n][m]; NaN where the matrix failed or is not finite
    bool* failed;  // [batch]: finite, and its Gram matrix not numerically positive definite
    ptrdiff_t batch, m, n;
    int threads;
};

// polar = (WᵀW + rI)^{-1/2} Wᵀ for each float matrix W [m][n] of a batch, m >= n. All arrays contiguous.
struct RegularizedPolar {
    const float* weight;  // [batch][m][n]
    double reg;
    float* polar;  // [batch][n][m]; NaN where the iteration failed or the matrix is not finite
    bool* failed;  // [batch]: finite, and too ill-conditioned for the iteration
    ptrdiff_t batch, m, n;
    int threads;
};

}  // namespace tpk
