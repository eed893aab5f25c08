// Reductions over a warp.

#pragma once

#include <cmath>
#include <cute/tensor.hpp>

namespace retention::detail {

/// Sum or maximum over a warp, the same in every lane and in any schedule.
template <class T, class Combine>
CUTE_DEVICE T reduce_warp(T x, Combine combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}

struct Maximum {
  CUTE_DEVICE float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Plus {
  template <class T>
  CUTE_DEVICE T operator()(T x, T y) const {
    return x + y;
  }
};

}  // namespace retention::detail
