// Launching a kernel of kernel/ on a CUDA stream.

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <string>
#include <type_traits>

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

/// Whether a kernel knows of programmatic dependent launch, see detail/dependent_launch.hpp.
template <class Kernel, class = void>
inline constexpr bool kStartsEarly = false;
template <class Kernel>
inline constexpr bool kStartsEarly<Kernel, std::void_t<decltype(Kernel::kStartsEarly)>> =
    Kernel::kStartsEarly;

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
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::grid(params);
    config.blockDim = Kernel::kThreads;
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    if constexpr (kStartsEarly<Kernel>) {
      bool waits = false;
      if (Status status = knows_how_to_wait<Kernel>(kernel, waits); !status) {
        return status;
      }
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      config.attrs = &attribute;
      config.numAttrs = waits ? 1 : 0;
    }
    return to_status(cudaLaunchKernelEx(&config, kernel, params), "launch of a kernel");
  }

 private:
  // What is found out about a kernel once a device, for every launch would wait for it.
  static constexpr int kDevices = 64;

  // Code for older devices runs on new ones, too, and does not wait for anything.
  template <class Kernel, class Function>
  static Status knows_how_to_wait(Function* kernel, bool& result) {
    constexpr int kHopper = 90;
    enum class Answer : char { kUnknown, kWaits, kDoesNot };
    static std::atomic<Answer> known[kDevices] = {};
    int device = 0;
    if (Status status = to_status(cudaGetDevice(&device), "current device"); !status) {
      return status;
    }
    Answer answer =
        device < kDevices ? known[device].load(std::memory_order_relaxed) : Answer::kDoesNot;
    if (answer == Answer::kUnknown) {
      cudaFuncAttributes attributes{};
      if (Status status =
              to_status(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
          !status) {
        return status;
      }
      answer = attributes.ptxVersion >= kHopper ? Answer::kWaits : Answer::kDoesNot;
      known[device].store(answer, std::memory_order_relaxed);
    }
    result = answer == Answer::kWaits;
    return {};
  }

  // Once a device: the call costs as much as a launch.
  template <class Kernel, class Function>
  static Status allow_shared_bytes(Function* kernel, std::size_t bytes) {
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
