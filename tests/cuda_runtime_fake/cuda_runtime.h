// A CUDA runtime of two devices that launches nothing and counts its calls: for tests/launching.cpp.
#pragma once

#include <stddef.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

namespace fake {
inline std::map<std::string, int> calls;
inline int current = 0;
inline bool has_context[2] = {false, false};
inline std::vector<size_t> asked;  // by occupancy queries: bytes of shared memory
}  // namespace fake

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline cudaError_t count(const char* name) {
    ++fake::calls[name];
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* devices) {
    *devices = 2;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = fake::current;
    return cudaSuccess;
}
// As from CUDA 12 on.
inline cudaError_t cudaSetDevice(int device) {
    fake::current = device;
    fake::has_context[device] = true;
    return cudaSuccess;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
inline int primary_context_state(int device, unsigned*, int* active) {
    *active = fake::has_context[device];
    return 0;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
    *function =
        strcmp(symbol, "cuDevicePrimaryCtxGetState") ? nullptr : reinterpret_cast<void*>(&primary_context_state);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrClusterLaunch,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 1 << 16;
    return count("cudaDeviceGetAttribute");
}
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributeNonPortableClusterSizeAllowed,
};
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return count("cudaFuncSetAttribute"); }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    return count("cudaLaunchKernel");
}

constexpr int cudaLaunchAttributeClusterDimension = 4;
struct cudaLaunchAttribute {
    int id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, Kernel, const cudaLaunchConfig_t*) {
    *blocks = 16;
    return count("cudaOccupancyMaxPotentialClusterSize");
}
// Of clusters of n blocks, 100 / n run at once on device 0, and one more on device 1.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
    *clusters = static_cast<int>(100 / config->attrs->val.clusterDim.x) + fake::current;
    fake::asked.push_back(config->dynamicSmemBytes);
    return count("cudaOccupancyMaxActiveClusters");
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
    return count("cudaLaunchKernelExC");
}
