// Powers of two that keep fp16 in range in the backward pass, as `Exponents` do in the forward.

#pragma once

namespace retention::kernel {

/// Null pointers stand for zeros.
struct GradientExponents {
  int const* weight;   // [slots, h] |weight| 2^weight <= 1 for the queries of the chunk
  int const* delta;    // [slots, h] |weight delta| 2^delta <= 1 for the queries of the chunk
  int const* state;    // [slots, h] what is stored of dS after the chunk is 2^-state dS, below 2^15
  int const* key_sum;  // [slots, h] the same of dz
  int const* score;    // [slots, h] |2 da 2^score| < 2^15 for the scores of the chunk
};

}  // namespace retention::kernel
