// Where the tokens and the states of a sequence are, for batches of equal length and packed ones.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

namespace retention::kernel {

struct Sequence {
  std::int64_t batch;        // row of the batch; 0 when packed
  std::int64_t first_token;  // in that row; 0 unless packed
  std::int64_t first_slot;   // of the states before its chunks
  int length;
};

struct Sequences {
  int const* cu_seqlens;  // [n + 1] on the device, for packed sequences; else null
  int length;             // tokens in each row of the batch; in all of them when packed
  int chunk_size;

  /// Slots for states: what `count` sequences need at most.
  CUTE_HOST_DEVICE std::int64_t num_slots(int count) const {
    return cu_seqlens == nullptr
               ? static_cast<std::int64_t>(count) * ((length + chunk_size - 1) / chunk_size)
               : length / chunk_size + count;
  }

  CUTE_HOST_DEVICE Sequence get(int index) const {
    if (cu_seqlens == nullptr) {
      return {index, 0, static_cast<std::int64_t>(index) * ((length + chunk_size - 1) / chunk_size),
              length};
    }
    int const first = cu_seqlens[index];
    // ceil(n / c) <= floor((first + n) / c) - floor(first / c) + 1: slots never overlap, and nobody
    // has to add up the chunks of the sequences before.
    return {0, first, first / chunk_size + index, cu_seqlens[index + 1] - first};
  }
};

/// Strides, in elements, of a [b, t, h, *] tensor whose last dimension is contiguous.
struct TokenStride {
  std::int64_t batch;
  std::int64_t token;
  std::int64_t head;

  CUTE_HOST_DEVICE std::int64_t at(Sequence const& sequence, std::int64_t t, int h) const {
    return sequence.batch * batch + (sequence.first_token + t) * token + h * head;
  }
};

}  // namespace retention::kernel
