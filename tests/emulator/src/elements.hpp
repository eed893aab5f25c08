// Values of the 16-bit element types.

#pragma once

#include <cstdint>
#include <cstring>

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
  if (magnitude >= 0x7c00) {
    word = 0x7f800000 | magnitude << 13;
    std::memcpy(&value, &word, sizeof(value));
  }
  return sign != 0 ? -value : value;
}

}  // namespace emulator::detail
