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

/// A chunk of a sequence.
struct Chunk {
  int sequence;
  int index;  // in the sequence
};

/// `count` sequences, each cut into chunks. Every chunk has a *slot*: a number of its own, in the
/// order of sequences and chunks. Packed sequences leave some slots without a chunk, so that a slot
/// follows from `cu_seqlens` by a sum and a chunk from its slot by a search, on the device.
struct Sequences {
  // [count + 1] on the device, for packed sequences; else null. Rising from 0 to `length`.
  int const* cu_seqlens;
  int length;  // tokens in each row of the batch; in all of them when packed
  int chunk_size;
  int count;

  CUTE_HOST_DEVICE bool packed() const { return cu_seqlens != nullptr; }

  /// Chunks of a row of the batch; the most that any packed sequence can have.
  CUTE_HOST_DEVICE int max_chunks() const { return (length + chunk_size - 1) / chunk_size; }

  /// What the sequences need at most.
  CUTE_HOST_DEVICE std::int64_t num_slots() const {
    return packed() ? static_cast<std::int64_t>(length / chunk_size) + count
                    : static_cast<std::int64_t>(count) * max_chunks();
  }

  /// The same sequences, cut into larger pieces.
  CUTE_HOST_DEVICE Sequences segments(int segment_tokens) const {
    return {cu_seqlens, length, segment_tokens, count};
  }

  CUTE_HOST_DEVICE Sequence get(int index) const {
    if (!packed()) {
      return {index, 0, static_cast<std::int64_t>(index) * max_chunks(), length};
    }
    int const first = bound(index);
    return {0, first, packed_slot(index, first), cute::max(bound(index + 1) - first, 0)};
  }

  /// The chunk of a slot; beyond the end of its sequence where the slot has none.
  CUTE_HOST_DEVICE Chunk find(int slot) const {
    if (!packed()) {
      return {slot / max_chunks(), slot % max_chunks()};
    }
    int low = 0;  // first slot of `low` <= slot < first slot of `high`
    int high = count;
    while (high - low > 1) {
      int const middle = low + (high - low) / 2;
      if (packed_slot(middle, bound(middle)) <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
    int const first_slot = static_cast<int>(packed_slot(low, bound(low)));
    return {low, cute::max(slot - first_slot, 0)};
  }

 private:
  // Nobody on the host has read these: whatever they are, no access may leave the tensors.
  CUTE_HOST_DEVICE int bound(int index) const {
    return cute::min(cute::max(cu_seqlens[index], 0), length);
  }
  // ceil(n / c) <= floor((first + n) / c) - floor(first / c) + 1: slots never overlap, and nobody
  // has to add up the chunks of the sequences before.
  CUTE_HOST_DEVICE std::int64_t packed_slot(int index, int first) const {
    return static_cast<std::int64_t>(first / chunk_size) + index;
  }
};

/// Powers of two that keep 16-bit floats of a narrow exponent (fp16) in range, whatever the
/// magnitude of keys and values and the length of the sequence. Null pointers stand for zeros.
struct Exponents {
  // [count, h]: the elements of every key of the sequence and head are below 2^key, and its product
  // with a query of elements below 1 is below 2^score. Scores take the tighter bound, from norms.
  int const* key;
  int const* score;
  // [slots, h]: what is stored of a state is 2^-state S, and of its sum of keys 2^-key_sum z.
  int const* state;
  int const* key_sum;
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
