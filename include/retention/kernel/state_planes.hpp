// Numbers in fp32 as two planes of 16 bits, or in one alone: how the slots of a pool hold states.
// All here is about two neighbours at a time, the first of them in the lower half of a word.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

namespace retention::kernel {

/// Of `high`, each is a number's bits rounded to their upper half, ties up, which is a bf16; of
/// `low`, the bits less that, 16 bits with a sign.
struct PlanePair {
  std::uint32_t high;
  std::uint32_t low;
};

CUTE_DEVICE float2 join_planes(PlanePair const& pair) {
  auto const join = [](std::uint32_t high, std::uint32_t low) {
    return __uint_as_float((high << 16) +
                           static_cast<std::uint32_t>(static_cast<std::int16_t>(low & 0xffff)));
  };
  return make_float2(join(pair.high & 0xffff, pair.low), join(pair.high >> 16, pair.low >> 16));
}

inline constexpr std::uint32_t kInfinityBits = 0x7f800000;

/// The inverse, of the same bits but for those of a NaN.
CUTE_DEVICE PlanePair split_planes(float2 x) {
  auto const split = [](float number) {
    std::uint32_t const bits = __float_as_uint(number);
    if ((bits & 0x7fffffff) > kInfinityBits) {
      return PlanePair{0x7fc0, 0};  // rounding would make a number of some
    }
    std::uint32_t const high = (bits + 0x8000) >> 16;
    return PlanePair{high, (bits - (high << 16)) & 0xffff};
  };
  PlanePair const first = split(x.x), second = split(x.y);
  return {first.high | second.high << 16, first.low | second.low << 16};
}

/// The high plane of states that have no other: rounded up with the probability of what is cut
/// off, by 16 bits of `random` for each.
CUTE_DEVICE std::uint32_t round_at_random(float2 x, std::uint32_t random) {
  auto const rounded = [](float number, std::uint32_t up_to) {
    std::uint32_t const bits = __float_as_uint(number);
    // What is no number, and infinity, is not to be rounded.
    bool const is_finite = (bits & 0x7fffffff) < kInfinityBits;
    return is_finite ? (bits + up_to) >> 16 : split_planes(make_float2(number, 0.0f)).high & 0xffff;
  };
  return rounded(x.x, random & 0xffff) | rounded(x.y, random >> 16) << 16;
}

/// 32 bits for two neighbours in the states of a slot, by the first one's place there and the
/// tokens that were folded before: runs repeat.
CUTE_DEVICE std::uint32_t random_bits(int slot, std::uint64_t place, std::int64_t folded) {
  std::uint64_t x = place * 0x9e3779b97f4a7c15u ^ static_cast<std::uint64_t>(folded) << 20 ^
                    static_cast<std::uint64_t>(static_cast<std::uint32_t>(slot)) << 44;
  // The finaliser of SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number
  // Generators, 2014).
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return static_cast<std::uint32_t>(x >> 32);
}

}  // namespace retention::kernel
