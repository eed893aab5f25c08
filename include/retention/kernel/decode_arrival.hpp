// Blocks that wait for nobody: the last of them to arrive goes on with what all of them left.

#pragma once

#include <cute/tensor.hpp>

namespace retention::kernel {

/// Whether all of `count` threads have come this far, those of other blocks; where it is true, what
/// they wrote is there. The counter is 0 before the first and after the last.
CUTE_DEVICE bool arrives_last(unsigned* counter, int count) {
  if (count == 1) {
    return true;
  }
  auto const last = static_cast<unsigned>(count - 1);
  __threadfence();
  bool const is_last = atomicInc(counter, last) == last;
  __threadfence();
  return is_last;
}

/// The same of blocks: all threads of a block call it, and `is_last` is in shared memory.
CUTE_DEVICE bool is_last_arrival(int& is_last, unsigned* counter, int count, int thread) {
  __syncthreads();
  if (count == 1) {
    return true;
  }
  if (thread == 0) {
    is_last = arrives_last(counter, count) ? 1 : 0;
  }
  __syncthreads();
  return is_last != 0;
}

}  // namespace retention::kernel
