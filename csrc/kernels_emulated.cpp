// Every CUDA kernel as plain C++, for tests: common/cuda_emulation.h runs their thread blocks.
#include "regularized_inverse/kernel_cuda.cu"
#include "rnn/cluster_cuda.cu"
#include "rnn/kernel_cuda.cu"
#include "rnn/mma_cuda.cu"
#include "rnn/pointwise_cuda.cu"
