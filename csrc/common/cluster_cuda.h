// Clusters of thread blocks, which store into each other's shared memory: what kernels and launchers are written
// against, as in common/cuda.h. Devices have them from compute capability 9.0 on.
#pragma once

#include "cuda.h"

#ifndef TPK_EMULATE
#include <map>
#include <mutex>
#include <tuple>

namespace tpk {

#ifdef __CUDACC__
// Where the code is compiled for.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
#else
constexpr bool has_clusters = false;
#endif

// The barrier of all threads of the cluster, in two halves. What a thread stored before it arrives, in whichever block,
// all see that have waited.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// *address = value, in the shared memory of the cluster's block of that rank.
__device__ inline void store_in_block(float* address, int rank, float value) {
    const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(address));
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}
#endif

// A kernel has to be allowed more than 8 blocks.
inline void allow_large_clusters(const void* kernel) {
    static Once once;
    once(kernel, [&] {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                   "cudaFuncSetAttribute");
    });
}

// A launch of clusters of that many blocks on the current device, for the runtime.
struct ClusterLaunch {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};

    ClusterLaunch(const void* kernel, ptrdiff_t clusters, int blocks, int threads, size_t shared, void* stream) {
        allow_shared_memory(kernel);
        allow_large_clusters(kernel);
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
        config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
};

// Blocks of a cluster of this kernel, at most; 0 on a device without clusters.
template <class... Arguments>
int largest_cluster(int device, void (*kernel)(Arguments...), int threads, size_t shared) {
    static std::mutex one_at_a_time;
    static std::map<int, int> known;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    const OnDevice on_device(device);
    int blocks = 0;
    check_cuda(cudaDeviceGetAttribute(&blocks, cudaDevAttrClusterLaunch, device), "cudaDeviceGetAttribute");
    if (blocks) {
        const ClusterLaunch launch(reinterpret_cast<const void*>(kernel), 1, 16, threads, shared, nullptr);
        check_cuda(cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &launch.config),
                   "cudaOccupancyMaxPotentialClusterSize");
    }
    return known[device] = blocks;
}

// Clusters that run at once on the current device: at least one. The runtime takes longer to say so than to launch.
template <class... Arguments>
int active_clusters(const char* what, void (*kernel)(Arguments...), int blocks, int threads, size_t shared) {
    static std::mutex one_at_a_time;
    static std::map<std::tuple<const void*, int, int, int, size_t>, int> known;
    const void* function = reinterpret_cast<const void*>(kernel);
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    int& clusters = known[{function, current_device(), blocks, threads, shared}];
    if (clusters) return clusters;
    const ClusterLaunch launch(function, 1, blocks, threads, shared, nullptr);
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config), what);
    if (clusters == 0)
        throw std::runtime_error(std::string(what) + ": this device cannot run a cluster of " + std::to_string(blocks) +
                                 " blocks with " + std::to_string(shared) + " bytes of shared memory each");
    return clusters;
}

template <class... Arguments>
void launch_clusters(const char* what, void (*kernel)(Arguments...), ptrdiff_t clusters, int blocks, int threads,
                     size_t shared, void* stream, Arguments... arguments) {
    const ClusterLaunch launch(reinterpret_cast<const void*>(kernel), clusters, blocks, threads, shared, stream);
    void* pointers[] = {&arguments...};
    check_cuda(cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), pointers), what);
}

}  // namespace tpk
#endif
