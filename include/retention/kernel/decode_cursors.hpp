// What moves cursors and nothing else: slots that become empty, tokens that are taken back, and
// those of a prefill, when they are where they belong.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/decode_pool.hpp"

namespace retention::kernel {

/// A thread for every slot of a list, with a number of its own: what `Kernel::move` does to its
/// cursor. Slots that are not there stand for nothing.
template <class Kernel>
struct MoveCursors {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  struct SharedStorage {};

  struct Params {
    SlotCursors cursors;
    int const* slots;    // [count], each at most once
    int const* numbers;  // [count]; null: 0
    int count;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(cute::ceil_div(params.count, int{kThreads})));
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    int const i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i < params.count && params.cursors.has(params.slots[i])) {
      int const number = params.numbers == nullptr ? 0 : params.numbers[i];
      Kernel::move(*params.cursors.at(params.slots[i]), number);
    }
  }
};

/// Nothing was seen by these slots, whatever their memory holds.
struct DecodeReset : MoveCursors<DecodeReset> {
  CUTE_DEVICE static void move(Cursor& cursor, int phase) { cursor = {0, 0, phase, 0, 0, 0}; }
};

/// The newest tokens of these slots were never seen: drafts that were rejected. The ring has to
/// hold them still; of more than it holds, it is left empty.
struct DecodeRollback : MoveCursors<DecodeRollback> {
  CUTE_DEVICE static void move(Cursor& cursor, int given) {
    int const tokens = cute::max(0, cute::min(given, cursor.length));
    cursor.length -= tokens;
    cursor.seen -= tokens;
  }
};

/// Tokens have gone straight into the states of these slots.
struct CountFolded : MoveCursors<CountFolded> {
  CUTE_DEVICE static void move(Cursor& cursor, int tokens) {
    cursor.folded += tokens;
    cursor.seen += tokens;
  }
};

/// Tokens have been put behind those in the rings of these slots.
struct CountAppended : MoveCursors<CountAppended> {
  CUTE_DEVICE static void move(Cursor& cursor, int tokens) {
    cursor.length += tokens;
    cursor.seen += tokens;
  }
};

}  // namespace retention::kernel
