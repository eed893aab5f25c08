// Blocks that wait for nobody: the last of them to arrive goes on with what all of them left.

#pragma once

#include <cute/tensor.hpp>

namespace retention::kernel {

/// A thread has come this far, one of `count` in different blocks. Returns how many have before it;
/// the counter is 0 before the first and after the last.
CUTE_DEVICE unsigned arrive(unsigned* counter, int count) {
  if (count == 1) {
    return 0;
  }
  __threadfence();
  return atomicInc(counter, static_cast<unsigned>(count - 1));
}

struct Arrivals {
  unsigned first;
  unsigned second;
};

/// The same of two counters, in the time of one.
CUTE_DEVICE Arrivals arrive(unsigned* first, int of_first, unsigned* second, int of_second) {
  __threadfence();
  unsigned const before = atomicInc(first, static_cast<unsigned>(of_first - 1));
  return {before, atomicInc(second, static_cast<unsigned>(of_second - 1))};
}

/// Whether all have, by what `arrive` returned; where it is true, what they wrote is there.
CUTE_DEVICE bool is_last(unsigned before, int count) {
  bool const last = before == static_cast<unsigned>(count - 1);
  if (last) {
    __threadfence();
  }
  return last;
}

/// Whether all of `count` blocks have come this far. All threads of a block call it; `last` is in
/// shared memory.
CUTE_DEVICE bool is_last_arrival(int& last, unsigned* counter, int count, int thread) {
  __syncthreads();
  if (count == 1) {
    return true;
  }
  if (thread == 0) {
    last = is_last(arrive(counter, count), count) ? 1 : 0;
  }
  __syncthreads();
  return last != 0;
}

}  // namespace retention::kernel
