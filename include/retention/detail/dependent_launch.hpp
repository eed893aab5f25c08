// Programmatic dependent launch: a kernel that starts before those ahead of it in its stream have
// ended, to have its blocks in place and its memory on the way when they have. Of Hopper; on older
// devices, and where a kernel was launched without, all of this is nothing.
//
// A kernel that may be launched so has `kStartsEarly`, and every block of it waits, so that those
// after it, which wait for it alone, have waited for all before.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

namespace retention::detail {

/// The next kernel of the stream may start when all blocks have come here.
CUTE_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Earlier kernels have ended, and what they wrote is there. Before it nothing that they may write
/// can be relied on, and nothing be written.
CUTE_DEVICE void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// A number that an earlier kernel may still write: a guess until that has ended, and then to be
/// read again. The L1 cache does not see it, or it would have the guess for what was written.
CUTE_DEVICE int guess(int const* data) {
#if defined(__CUDA_ARCH__)
  return __ldcg(data);
#else
  return *data;
#endif
}

/// Brings memory to the L2 cache, whoever may still write it: the 128 bytes around an address.
CUTE_DEVICE void prefetch_line(void const* data) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(data)) : "memory");
#else
  static_cast<void>(data);
#endif
}

/// The same of `bytes` from `data` on, both multiples of 16.
CUTE_DEVICE void prefetch(void const* data, std::uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(data)),
               "r"(bytes)
               : "memory");
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace retention::detail
