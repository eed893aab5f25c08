// 16-bit floats for tests: bits and their values.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "retention/configuration.hpp"

namespace retention::test {

/// About the relative error of one rounding, which is at most twice that: the unit of bounds.
inline double roundoff(ElementType element) {
  return element == ElementType::kBFloat16 ? 0x1p-9 : 0x1p-12;
}

inline double decode(ElementType element, std::uint16_t bits) {
  int const mantissa_bits = element == ElementType::kBFloat16 ? 7 : 10;
  int const bias = element == ElementType::kBFloat16 ? 127 : 15;
  int const exponent = (bits & 0x7fff) >> mantissa_bits;
  int const mantissa = bits & ((1 << mantissa_bits) - 1);
  double const sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 2 * bias + 1) {
    return mantissa == 0 ? sign * INFINITY : NAN;
  }
  double const significand =
      exponent == 0 ? mantissa : static_cast<double>(mantissa + (1 << mantissa_bits));
  return sign * std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
}

/// To nearest, ties to even; what is too large becomes infinite.
inline std::uint16_t encode(ElementType element, double x) {
  int const mantissa_bits = element == ElementType::kBFloat16 ? 7 : 10;
  int const bias = element == ElementType::kBFloat16 ? 127 : 15;
  auto const sign = static_cast<unsigned>(std::signbit(x) ? 0x8000 : 0);
  auto const infinity = static_cast<unsigned>(2 * bias + 1) << mantissa_bits;
  if (std::isnan(x)) {
    return static_cast<std::uint16_t>(sign | infinity | 1);
  }
  double const magnitude = std::abs(x);
  int const least = 1 - bias;
  int exponent = magnitude == 0.0 || std::isinf(magnitude) ? least : std::ilogb(magnitude);
  exponent = exponent < least ? least : exponent;
  // In units of the last place. A carry into the next power of two carries into the exponent.
  double const units = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
  double const bits = units + std::ldexp(exponent + bias - 1, mantissa_bits);
  return static_cast<std::uint16_t>(
      sign | (std::isinf(magnitude) || bits >= infinity ? infinity : static_cast<unsigned>(bits)));
}

/// decode(encode(x)) for what is in range, without a detour through bits.
inline double rounded(ElementType element, double x) {
  bool const is_bfloat16 = element == ElementType::kBFloat16;
  double const spread = x * (is_bfloat16 ? 0x1p45 + 1 : 0x1p42 + 1);  // Veltkamp's splitting
  double const result = spread - (spread - x);
  double const least = is_bfloat16 ? 0x1p-126 : 0x1p-14;
  double const spacing = is_bfloat16 ? 0x1p-133 : 0x1p-24;
  return std::abs(result) < least ? std::nearbyint(x / spacing) * spacing : result;
}

/// The distance of the numbers around `x`, a value of the type, on the side away from zero.
inline double spacing(ElementType element, double x) {
  int const mantissa_bits = element == ElementType::kBFloat16 ? 7 : 10;
  int const least = element == ElementType::kBFloat16 ? -126 : -14;
  int const exponent = x == 0.0 ? least : std::ilogb(x);
  return std::ldexp(1.0, (exponent < least ? least : exponent) - mantissa_bits);
}

}  // namespace retention::test
