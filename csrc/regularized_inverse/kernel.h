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

// On a CUDA device, for float and double: one thread block a matrix, n <= regularized_inverse_cuda_largest(...). They
// return when the work is in the stream, and throw where it cannot be.
struct MatrixStrides {
    ptrdiff_t matrix, row, column;
};

template <class T>
struct RegularizedSolveCuda {
    const T* weight;  // [batch][m][n], m >= n
    MatrixStrides weight_strides;
    const T* rhs;  // [batch][n][m]; Wᵀ where it is the weight's memory with rows and columns exchanged
    MatrixStrides rhs_strides;
    T reg;
    const T* reg_on_device;  // or null: reg
    T* solved;               // [batch][n][m], contiguous; NaN where the matrix failed or is not finite
    bool* failed;            // [batch]: finite, and its Gram matrix not numerically positive definite
    ptrdiff_t batch, m, n;
};

template <class T>
struct RegularizedPolarCuda {
    const T* weight;  // [batch][m][n], m >= n
    MatrixStrides weight_strides;
    T reg;
    const T* reg_on_device;  // or null: reg
    T* polar;                // [batch][n][m], contiguous; NaN where the iteration failed or the matrix is not finite
    T* scratch;              // [batch][n][n]
    bool* failed;            // [batch]: finite, and the iteration did not converge
    ptrdiff_t batch, m, n;
    T tolerance;  // on ‖I - ZᵀZ‖_F before the last step
    int most;     // steps
};

// The largest n that the device's shared memory holds; at most 128.
template <class T>
int regularized_inverse_cuda_largest(int device);
template <class T>
void regularized_solve_cuda(const RegularizedSolveCuda<T>& f, int device, void* stream);
template <class T>
void regularized_polar_cuda(const RegularizedPolarCuda<T>& f, int device, void* stream);

}  // namespace tpk
