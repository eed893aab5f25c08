// Powers of two that keep fp16 in range in the backward kernels.

#pragma once

namespace retention::kernel {

/// Null pointers stand for zeros.
struct GradientExponents {
  int const* weight;   // [slots, h] f_c: weight_i 2^{f_c} <= 1 for the rows of chunk c
  int const* state;    // [slots, h] what is stored of dS_c, after chunk c, is 2^-state dS_c
  int const* key_sum;  // [slots, h] the same of dz_c
  int const* score;  // [slots, h] y_c: |2 da'| < 2^15 for da' = s E inverse (do.v - delta) 2^{y_c}
};

}  // namespace retention::kernel
