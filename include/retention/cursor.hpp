// Where a sequence that is decoded stands: for kernels, and for whoever owns their memory.

#pragma once

#include <cstdint>

namespace retention {

/// Where a slot's ring starts, how many tokens are in it, and how many were folded into the state:
/// with none the state is empty, whatever its memory holds. All zeros: nothing was seen.
struct alignas(16) Cursor {
  int start;
  int length;
  int phase;  // windows end where the number of folded tokens is this one, modulo the window
  int unused;
  std::int64_t folded;
  std::int64_t seen;  // in all: folded + length, but for states from elsewhere
};

}  // namespace retention
