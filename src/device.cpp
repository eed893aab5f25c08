// Compiled by the CUDA compiler where there is one.

#include "compiled.hpp"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace retention::device {

int multiprocessors() {
  int count = 0;
#ifdef __CUDACC__
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    (void)cudaGetLastError();  // no device: not an error of a later call
    count = 0;
  }
#endif
  constexpr int kOfAnH100 = 132;
  return count > 0 ? count : kOfAnH100;
}

}  // namespace retention::device
