// Blocks that wait for nobody: the last of them to arrive goes on with what all of them left.

#pragma once

#include <cute/tensor.hpp>

namespace retention::kernel {

/// Whether all of `count` blocks have come this far; where it is true, what they wrote is there.
/// The counter is 0 before the first and after the last. All threads of a block call it; `is_last`
/// is in shared memory.
CUTE_DEVICE bool is_last_arrival(int& is_last, unsigned* counter, int count, int thread) {
  __syncthreads();
  if (count == 1) {
    return true;
  }
  if (thread == 0) {
    auto const last = static_cast<unsigned>(count - 1);
    __threadfence();
    is_last = atomicInc(counter, last) == last ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  return is_last != 0;
}

}  // namespace retention::kernel
