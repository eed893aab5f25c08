// Barriers for some of a block's warps, by number: 0 is that of __syncthreads(). Who arrives goes
// on at once; who waits does so until as many threads as all of them name, whole warps, have come.
// What those did before happens before what the waiting ones do after. Then the barrier is as new.

#pragma once

#include <cute/tensor.hpp>

namespace retention::detail {

CUTE_DEVICE void wait_at_barrier(int barrier, int threads) {
#if defined(__CUDA_ARCH__)
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  __barrier_sync_count(static_cast<unsigned>(barrier), static_cast<unsigned>(threads));
#endif
}

CUTE_DEVICE void arrive_at_barrier(int barrier, int threads) {
#if defined(__CUDA_ARCH__)
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  __barrier_arrive_count(static_cast<unsigned>(barrier), static_cast<unsigned>(threads));
#endif
}

}  // namespace retention::detail
