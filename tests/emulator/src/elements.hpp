// Values of the 16-bit element types.

#pragma once

#include <cstdint>
#include <cstring>

// For loops over numbers: wider vectors where the processor has them, and the same results, for
// AVX2 alone has no fused multiply-add.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMULATOR_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define EMULATOR_VECTORS
#endif

namespace emulator::detail {

inline float bfloat16_value(std::uint32_t bits) {
  bits = (bits & 0xffff) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float float16_value(std::uint32_t bits) {
  std::uint32_t const sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  // The exponent is 112 too small when the half's bits are moved into place; denormals included.
  std::uint32_t word = magnitude << 13;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  value *= 0x1p112f;
  std::memcpy(&word, &value, sizeof(value));
  word = sign | (magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : word);
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

}  // namespace emulator::detail
