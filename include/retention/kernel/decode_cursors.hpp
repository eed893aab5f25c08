// What moves cursors and nothing else: slots that become empty, and tokens that are taken back.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/decode_pool.hpp"

namespace retention::kernel {

/// Nothing was seen by these slots, whatever their memory holds.
struct DecodeReset {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  struct SharedStorage {};

  struct Params {
    SlotCursors cursors;
    int const* slots;   // [count], each at most once
    int const* phases;  // [count]; null: 0
    int count;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(cute::ceil_div(params.count, int{kThreads})));
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    int const i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i < params.count && params.cursors.has(params.slots[i])) {
      int const phase = params.phases == nullptr ? 0 : params.phases[i];
      *params.cursors.at(params.slots[i]) = {0, 0, phase, 0, 0, 0};
    }
  }
};

/// The newest tokens of these slots were never seen: drafts that were rejected. The ring has to
/// hold them still; of more than it holds, it is left empty.
struct DecodeRollback {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  struct SharedStorage {};

  struct Params {
    SlotCursors cursors;
    int const* slots;   // [count], each at most once
    int const* tokens;  // [count], to be taken back
    int count;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(cute::ceil_div(params.count, int{kThreads})));
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    int const i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i < params.count && params.cursors.has(params.slots[i])) {
      Cursor& cursor = *params.cursors.at(params.slots[i]);
      int const tokens = cute::max(0, cute::min(params.tokens[i], cursor.length));
      cursor.length -= tokens;
      cursor.seen -= tokens;
    }
  }
};

}  // namespace retention::kernel
