// Rows of 16-bit floats brought to one magnitude by a power of two, which their output does not
// depend on.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/detail/packed.hpp"

namespace retention::detail {

/// The larger of each half, of numbers that are not negative.
template <class Element>
CUTE_DEVICE std::uint32_t larger(std::uint32_t x, std::uint32_t y) {
#if defined(__CUDA_ARCH__)
  std::uint32_t bits;
  if constexpr (cute::is_same_v<Element, cute::bfloat16_t>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(bits) : "r"(x), "r"(y));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(x), "r"(y));
  }
  return bits;
#else
  return cute::max(x & 0xffff, y & 0xffff) | cute::max(x >> 16, y >> 16) << 16;
#endif
}

/// Queries are rescaled to magnitude [2^(kQueryExponent - 1), 2^kQueryExponent): in fp16 as large
/// as phi allows, so that products of small elements are not lost.
template <class Element>
constexpr int kQueryExponent = cute::is_same_v<Element, cute::half_t> ? 7 : 0;

/// Multiplies eight elements of a query by the power of two 2^n that gives it its magnitude, as far
/// as n's range allows; returns n. The row is spread over `Lanes` neighbouring lanes. A zero row
/// gets an n as well, and stays zero.
template <class Element, int Lanes>
CUTE_DEVICE int rescale_row(std::uint32_t (&x)[4]) {
  constexpr std::uint32_t kMagnitude = 0x7fff7fff;
  std::uint32_t both = larger<Element>(larger<Element>(x[0] & kMagnitude, x[1] & kMagnitude),
                                       larger<Element>(x[2] & kMagnitude, x[3] & kMagnitude));
#pragma unroll
  for (int distance = 1; distance < Lanes; distance *= 2) {
    both = larger<Element>(both, __shfl_xor_sync(0xffffffffu, both, distance));
  }
  float const magnitude = unpack_lo<Element>(larger<Element>(both, both >> 16));
  // magnitude = 2^e times [1/2, 1)
  int const e = static_cast<int>(__float_as_uint(magnitude) >> 23) - 126;
  if constexpr (cute::is_same_v<Element, cute::half_t>) {
    auto const power = [](int n) { return broadcast_lo(static_cast<std::uint32_t>(n + 15) << 10); };
    // Elements down to 2^-24 take more than one factor.
    int const n = kQueryExponent<Element> - cute::max(cute::min(e, 16), -23);
    int const first = cute::min(n, 15);
    std::uint32_t const factor = power(first);
    std::uint32_t const rest = power(n - first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = multiply<Element>(multiply<Element>(x[i], factor), rest);
    }
    return n;
  } else {
    // Its exponent is that of a normal number.
    int const n = kQueryExponent<Element> - cute::max(cute::min(e, 126), -126);
    std::uint32_t const factor = broadcast_lo(static_cast<std::uint32_t>(n + 127) << 7);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = multiply<Element>(x[i], factor);
    }
    return n;
  }
}

}  // namespace retention::detail
