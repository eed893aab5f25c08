// Arithmetic on two 16-bit floats in one register, as tensor-core fragments hold them.

#pragma once

#include <cstdint>
#include <cstring>
#include <cute/tensor.hpp>

namespace retention::detail {

/// (lo, hi) as one register, lo in the lower half.
template <class Element>
CUTE_HOST_DEVICE std::uint32_t pack(float lo, float hi) {
#if defined(__CUDA_ARCH__)
  std::uint32_t bits;
  if constexpr (cute::is_same_v<Element, cute::bfloat16_t>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  }
  return bits;
#else
  return std::uint32_t{Element(lo).raw()} | std::uint32_t{Element(hi).raw()} << 16;
#endif
}

template <class Element>
CUTE_HOST_DEVICE float unpack_lo(std::uint32_t bits) {
  return float(Element::bitcast(static_cast<std::uint16_t>(bits & 0xffff)));
}

template <class Element>
CUTE_HOST_DEVICE float unpack_hi(std::uint32_t bits) {
  return float(Element::bitcast(static_cast<std::uint16_t>(bits >> 16)));
}

/// One half in both places.
CUTE_HOST_DEVICE std::uint32_t broadcast_lo(std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, 0, 0x1010);
#else
  return (x & 0xffff) | x << 16;
#endif
}
CUTE_HOST_DEVICE std::uint32_t broadcast_hi(std::uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, 0, 0x3232);
#else
  return x >> 16 | (x & 0xffff0000);
#endif
}

/// Both products, each rounded once.
template <class Element>
CUTE_HOST_DEVICE std::uint32_t multiply(std::uint32_t x, std::uint32_t y) {
#if defined(__CUDA_ARCH__)
  std::uint32_t bits;
  if constexpr (cute::is_same_v<Element, cute::bfloat16_t>) {
    // mul.bf16x2 needs sm_90; adding -0 leaves every product as it is, signs of zero included.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(x), "r"(y), "r"(0x80008000u));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(x), "r"(y));
  }
  return bits;
#else
  return pack<Element>(unpack_lo<Element>(x) * unpack_lo<Element>(y),
                       unpack_hi<Element>(x) * unpack_hi<Element>(y));
#endif
}

/// Both x y + z, each rounded once.
template <class Element>
CUTE_HOST_DEVICE std::uint32_t multiply_add(std::uint32_t x, std::uint32_t y, std::uint32_t z) {
#if defined(__CUDA_ARCH__)
  std::uint32_t bits;
  if constexpr (cute::is_same_v<Element, cute::bfloat16_t>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(x), "r"(y), "r"(z));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(x), "r"(y), "r"(z));
  }
  return bits;
#else
  return pack<Element>(fmaf(unpack_lo<Element>(x), unpack_lo<Element>(y), unpack_lo<Element>(z)),
                       fmaf(unpack_hi<Element>(x), unpack_hi<Element>(y), unpack_hi<Element>(z)));
#endif
}

/// 2^x; what is below 2^-126 is 0.
CUTE_HOST_DEVICE float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

/// 2^exponent for an exponent of at least -149, and 2^127 where that is not finite.
CUTE_HOST_DEVICE float power_of_two(int exponent) {
  int const n = cute::min(exponent, 127);
  int const bits = n >= -126 ? (n + 127) << 23 : 1 << cute::max(n + 149, 0);
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
#endif
}

/// `x`, in a way that the compiler cannot trace. What is computed from it is computed where it
/// stands: out of a loop it would hold registers that the loop needs.
CUTE_HOST_DEVICE int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace retention::detail
