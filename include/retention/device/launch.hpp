// Launching a kernel of kernel/ on a CUDA stream.

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <string>

#include "retention/device/status.hpp"

namespace retention::device {

/// The size of the dynamic shared memory is an argument so that the kernel's name tells it.
template <class Kernel, std::size_t kSharedBytes>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run_kernel(__grid_constant__ typename Kernel::Params const params) {
  extern __shared__ __align__(1024) char smem[];  // what tiles of wgmma need
  Kernel{}(params, smem);
}

inline Status to_status(cudaError_t error, char const* what) {
  return error == cudaSuccess ? Status{}
                              : Status{std::string(what) + ": " + cudaGetErrorString(error)};
}

/// Enqueues kernels on a stream of the current device.
struct CudaLauncher {
  cudaStream_t stream;

  template <class Kernel>
  Status launch(typename Kernel::Params const& params) const {
    constexpr std::size_t kSharedBytes = sizeof(typename Kernel::SharedStorage);
    constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
    auto const kernel = run_kernel<Kernel, kSharedBytes>;
    if constexpr (kSharedBytes > kDefaultSharedBytes) {
      if (Status status = allow_shared_bytes<Kernel>(kernel, kSharedBytes); !status) {
        return status;
      }
    }
    kernel<<<Kernel::grid(params), Kernel::kThreads, kSharedBytes, stream>>>(params);
    return to_status(cudaGetLastError(), "launch of a kernel");
  }

 private:
  // Once a device: the call costs as much as a launch.
  template <class Kernel, class Function>
  static Status allow_shared_bytes(Function* kernel, std::size_t bytes) {
    constexpr int kDevices = 64;
    static std::atomic<bool> allowed[kDevices] = {};
    int device = 0;
    if (Status status = to_status(cudaGetDevice(&device), "current device"); !status) {
      return status;
    }
    bool const known = device < kDevices;
    if (known && allowed[device].load(std::memory_order_relaxed)) {
      return {};
    }
    Status status =
        to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)),
                  "shared memory of a kernel");
    if (status && known) {
      allowed[device].store(true, std::memory_order_relaxed);
    }
    return status;
  }
};

}  // namespace retention::device
