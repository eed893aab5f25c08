// Cumulative log gates, in the units of `exp2`, as sums of two floats: their differences are right
// to the last digits of a float however far gates have fallen before. A single float that is -2^17
// after some hundred resets is a multiple of 2^-7, and so would be the logarithm of every weight.

#pragma once

#include <cute/tensor.hpp>

namespace retention::detail {

constexpr double kLog2E = 1.4426950408889634;

/// A smaller log gate, down to -inf, counts as this one: a reset, from before which nothing comes
/// through. It is finite, so that no difference of sums is NaN, and no smaller than need be:
/// thousands of them leave most digits of a sum to the gates between.
///
/// What `exp2` of it gives, however it is scaled, must be below 2^-126, and so 0. In units of log2
/// it is -385. The largest powers of two in an exponent beside it are
/// - half of 120, beside a half of the gate (`IntraKeyGradient`: -192.6 + 60 < -126),
/// - 216, from one chunk's scale of a gradient to the next (`StateGradients`: -385 + 216 < -126),
/// - 160 and less, of states and rows.
/// bf16 has none of these, and so room for gates that rise after the reset as far as floats allow.
constexpr float kReset = -267.0f;

CUTE_HOST_DEVICE bool is_reset(float log_gate) { return log_gate <= kReset; }

/// Not fmaxf, which would turn NaN into a number.
CUTE_HOST_DEVICE float limited_log_gate(float log_gate) {
  return log_gate < kReset ? kReset : log_gate;
}

struct alignas(8) CumulativeGate {
  float high;
  float low;

  CUTE_HOST_DEVICE static CumulativeGate from(double log2_gate) {
    float const high = static_cast<float>(log2_gate);
    return {high, static_cast<float>(log2_gate - double{high})};
  }

  CUTE_HOST_DEVICE float total() const { return high + low; }

  /// Of the tokens after that of `other`. Exactly 0 for a token and itself: its own gate does not
  /// weigh its own key.
  CUTE_HOST_DEVICE float since(CumulativeGate const& other) const {
    return (high - other.high) + (low - other.low);
  }
};

}  // namespace retention::detail
