// Every CUDA kernel as plain C++, for tests: common/cuda_emulation.h runs their thread blocks.
#include "recurrence/chain_cuda.cu"
#include "recurrence/cluster_cuda.cu"
#include "recurrence/mma_cuda.cu"
#include "recurrence/registers_cuda.cu"
#include "regularized_inverse/kernel_cuda.cu"
