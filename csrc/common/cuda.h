// What CUDA kernels and their launchers are written against: the CUDA runtime or, with TPK_EMULATE, an emulation of
// thread blocks on the CPU, so that the very same source is tested where there is no GPU.
#pragma once

#include <stddef.h>

#include <stdexcept>
#include <string>

#ifdef TPK_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

// A variable that a thread block shares.
#define TPK_SHARED(type, name) __shared__ type name
// The memory that a launch asks for, as `float4* name`.
#define TPK_DYNAMIC_SHARED(name) extern __shared__ float4 name[]

namespace tpk {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": CUDA says: " + cudaGetErrorString(error) + " (" +
                                 cudaGetErrorName(error) + ")");
}

// Why no device can be used; empty where one can.
inline std::string device_problem() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return std::string("no CUDA device can be used: ") + cudaGetErrorString(error);
    return count > 0 ? "" : "no CUDA device can be used: there is none";
}

inline int current_device() {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

// Whether a context is there; to make its device the current one would create it. The runtime cannot say, the driver
// can: it is asked through the runtime, so that nothing is linked to it.
inline bool has_context(int device) {
    using Ask = CUresult (*)(CUdevice, unsigned*, int*);
    static const Ask ask = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result),
            "cudaGetDriverEntryPointByVersion");
        return reinterpret_cast<Ask>(found);
    }();
    unsigned flags = 0;
    int active = 0;
    return !ask || (ask(device, &flags, &active) == CUDA_SUCCESS && active);
}

// The device to launch on, as long as this lives. The one before is current again if anybody uses it: in a new thread
// that is device 0, where a context would cost hundreds of megabytes. torch keeps its own note of it, as with its
// guards.
class OnDevice {
public:
    explicit OnDevice(int device) {
        const std::string problem = device_problem();
        if (!problem.empty()) throw std::runtime_error(problem);
        before_ = current_device();
        restores_ = before_ != device && has_context(before_);
        if (before_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() {
        if (restores_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool restores_ = false;
};

inline int multiprocessors(int device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Bytes of shared memory that a block may be given.
inline size_t shared_memory(int device) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    return static_cast<size_t>(bytes);
}

// Throws where the launch itself fails; what fails later, on the device, the next call to CUDA reports.
template <class... Arguments>
void launch(const char* what, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, void* stream,
            Arguments... arguments) {
    void* pointers[] = {&arguments...};
    check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                dim3(static_cast<unsigned>(threads)), pointers, 0, static_cast<cudaStream_t>(stream)),
               what);
}

// What has to be done once for each kernel and device, and not again at every launch.
class Once {
public:
    // run(): for this kernel on the current device.
    template <class Run>
    void operator()(const void* kernel, Run run) {
        const std::pair<const void*, int> key(kernel, current_device());
        const std::lock_guard<std::mutex> lock(one_at_a_time_);
        if (done_.count(key)) return;
        run();
        done_.insert(key);
    }

private:
    std::mutex one_at_a_time_;
    std::set<std::pair<const void*, int> > done_;
};

// A kernel has to be allowed more than 48 KB: always all that there is on the current device, or threads that launch
// the same kernel would get in each other's way.
inline void allow_shared_memory(const void* kernel) {
    static Once once;
    once(kernel, [&] {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_memory(current_device()))),
                   "cudaFuncSetAttribute");
    });
}

// The same with that many bytes of dynamic shared memory.
template <class... Arguments>
void launch_with_shared(const char* what, void (*kernel)(Arguments...), ptrdiff_t blocks, int threads, size_t bytes,
                        void* stream, Arguments... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    allow_shared_memory(function);
    void* pointers[] = {&arguments...};
    check_cuda(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                                pointers, bytes, static_cast<cudaStream_t>(stream)),
               what);
}

#ifdef __CUDACC__
// 1/d within an ulp or two, for d from 1 to 1e37.
__device__ inline float estimated_reciprocal(float d) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(d));
    return result;
}
#endif

}  // namespace tpk
#endif
