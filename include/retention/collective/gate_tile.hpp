// Tiles of a [b, t, h] tensor of floats, such as gates, in shared memory: [8 heads, 128 tokens], a
// warp a head. Loads and stores are contiguous whichever of tokens and heads comes last in memory.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/sequence.hpp"

namespace retention::collective {

struct GateTile {
  static constexpr int kHeads = 8;
  static constexpr int kTokens = 128;
  static constexpr int kLaneTokens = kTokens / 32;  // consecutive, of a lane of the head's warp
  static constexpr int kThreads = 32 * kHeads;
  static constexpr int kLoads = kHeads * kTokens / kThreads;  // elements of a tile a thread
  static_assert(kThreads % kTokens == 0 && kThreads % kHeads == 0, "steps of whole rows");

  // A gap after every 32 tokens, and rows 4 banks apart: no bank conflicts among lanes that take
  // 32 consecutive tokens, 8 heads of 4 tokens, or every fourth token.
  static constexpr int kRowPitch = 132;
  static constexpr int kSize = kHeads * kRowPitch;

  CUTE_DEVICE static int position(int head, int token) {
    return head * kRowPitch + token + token / 32;
  }

  /// The elements of a tile that a thread loads or stores, one step after the other: neighbouring
  /// threads take what is contiguous.
  struct Part {
    int head;  // the first
    int token;
    int head_step;
    int token_step;
    std::int64_t offset;  // in memory
    std::int64_t step;

    CUTE_DEVICE Part(kernel::TokenStride const& stride, int thread) {
      bool const heads_last = stride.head < stride.token;
      head = heads_last ? thread % kHeads : thread / kTokens;
      token = heads_last ? thread / kHeads : thread % kTokens;
      head_step = heads_last ? 0 : kThreads / kTokens;
      token_step = heads_last ? kThreads / kHeads : 0;
      offset = token * stride.token + head * stride.head;
      step = token_step * stride.token + head_step * stride.head;
    }
    /// Whether step i is among the first `heads` and `tokens`.
    CUTE_DEVICE bool within(int i, int heads, int tokens) const {
      return head + i * head_step < heads && token + i * token_step < tokens;
    }
    /// In shared memory.
    CUTE_DEVICE int position(int i) const {
      return GateTile::position(head + i * head_step, token + i * token_step);
    }
    /// `source` is the thread's own first element: the tile's, plus `offset`.
    CUTE_DEVICE void load(float const* source, int heads, int tokens, float (&x)[kLoads]) const {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        x[i] = within(i, heads, tokens) ? source[i * step] : 0.0f;
      }
    }
  };
};

}  // namespace retention::collective
