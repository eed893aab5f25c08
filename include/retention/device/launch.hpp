// Launching a kernel of kernel/ on a CUDA stream.

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <string>
#include <type_traits>

#include "retention/device/status.hpp"
#include "retention/kernel/launch_shape.hpp"

namespace retention::device {

/// The sizes of the dynamic shared memory are arguments so that the kernel's name tells them: that
/// of code with main loops by wgmma, and that of other code.
template <class Kernel, std::size_t kWarpgroupBytes, std::size_t kWarpBytes>
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
    constexpr auto kShared = kernel::SharedBytes::of<Kernel>();
    auto const kernel = run_kernel<Kernel, kShared.warpgroups, kShared.warps>;
    Code code{kShared.warps, false, false};
    constexpr std::size_t kDefaultSharedBytes = 48 * 1024;  // for which nobody need be asked
    constexpr bool kSameThreads =
        kernel::LaunchShape<Kernel, true>::kThreads == kernel::LaunchShape<Kernel, false>::kThreads;
    if constexpr (kStartsEarly<Kernel> || !kSameThreads || kShared.warpgroups != kShared.warps ||
                  kShared.warps > kDefaultSharedBytes) {
      if (Status status = prepare<Kernel>(kernel, kShared, code); !status) {
        return status;
      }
    }
    cudaLaunchConfig_t config{};
    if (code.warpgroups) {
      using Shape = kernel::LaunchShape<Kernel, true>;
      config.gridDim = Shape::grid(params);
      config.blockDim = Shape::kThreads;
    } else {
      using Shape = kernel::LaunchShape<Kernel, false>;
      config.gridDim = Shape::grid(params);
      config.blockDim = Shape::kThreads;
    }
    config.dynamicSmemBytes = code.shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    if constexpr (kStartsEarly<Kernel>) {
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      config.attrs = &attribute;
      config.numAttrs = code.waits ? 1 : 0;
    }
    return to_status(cudaLaunchKernelEx(&config, kernel, params), "launch of a kernel");
  }

 private:
  /// Of a kernel, what the current device runs.
  struct Code {
    std::size_t shared_bytes;
    bool warpgroups;  // whether its shape is that of main loops by wgmma
    bool waits;       // for the launch before, where it may start early
  };

  // Finds out, and lets blocks have their shared memory: once a device, for the calls cost as much
  // as a launch.
  template <class Kernel, class Function>
  static Status prepare(Function* kernel, kernel::SharedBytes const& shared, Code& code) {
    constexpr int kHopper = 90;
    constexpr int kDevices = 64;
    enum class Known : char { kNothing, kForOthers, kForHopper, kWithWarpgroups };
    static std::atomic<Known> known[kDevices] = {};
    int device = 0;
    if (Status status = to_status(cudaGetDevice(&device), "current device"); !status) {
      return status;
    }
    Known answer =
        device < kDevices ? known[device].load(std::memory_order_relaxed) : Known::kNothing;
    bool const is_new = answer == Known::kNothing;
    if (is_new) {
      // Code for older devices runs on new ones, too: it has no wgmma, and waits for nothing. That
      // for any device from Hopper on waits, and has no wgmma: its blocks may be smaller.
      cudaFuncAttributes attributes{};
      if (Status status =
              to_status(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
          !status) {
        return status;
      }
      answer = attributes.ptxVersion < kHopper ? Known::kForOthers
               : attributes.maxThreadsPerBlock < kernel::LaunchShape<Kernel, true>::kThreads
                   ? Known::kForHopper
                   : Known::kWithWarpgroups;
    }
    bool const warpgroups = answer == Known::kWithWarpgroups;
    code = {warpgroups ? shared.warpgroups : shared.warps, warpgroups, answer != Known::kForOthers};
    if (is_new) {
      if (Status status =
              to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(code.shared_bytes)),
                        "shared memory of a kernel");
          !status) {
        return status;
      }
      if (device < kDevices) {
        known[device].store(answer, std::memory_order_relaxed);
      }
    }
    return {};
  }
};

}  // namespace retention::device
