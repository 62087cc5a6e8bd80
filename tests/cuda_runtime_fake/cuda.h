// Of the driver's header, what csrc/common/cuda.h uses.
#pragma once

using CUresult = int;
using CUdevice = int;
constexpr CUresult CUDA_SUCCESS = 0;
