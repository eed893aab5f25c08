// Compiled by the CUDA compiler where there is one.

#include "compiled.hpp"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace retention::device {

#ifdef __CUDACC__
namespace {

/// Of the current device; 0 where there is none.
int attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
    (void)cudaGetLastError();  // not an error of a later call
    return 0;
  }
  return value;
}

}  // namespace
#endif

int multiprocessors() {
  int count = 0;
#ifdef __CUDACC__
  count = attribute(cudaDevAttrMultiProcessorCount);
#endif
  constexpr int kOfAnH100 = 132;
  return count > 0 ? count : kOfAnH100;
}

std::size_t shared_bytes() {
  int bytes = 0;
#ifdef __CUDACC__
  bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#endif
  constexpr std::size_t kOfAnH100 = 227 * 1024;
  return bytes > 0 ? static_cast<std::size_t>(bytes) : kOfAnH100;
}

bool may_have_warpgroups() {
  int major = 0;
#ifdef __CUDACC__
  major = attribute(cudaDevAttrComputeCapabilityMajor);
#endif
  constexpr int kOfAnH100 = 9;
  return major == 0 || major >= kOfAnH100;
}

}  // namespace retention::device
