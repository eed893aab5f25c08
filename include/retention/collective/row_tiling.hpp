// How the warps of a block share a tile of rows.

#pragma once

#include <cute/tensor.hpp>

namespace retention::collective {

/// A warp has `MmaRows` mma tiles of 16 rows, with all of their columns. They are neighbours, or
/// `Interleaved` with those of the other warps: then the m-th of all warps are contiguous rows, for
/// a warpgroup the 64 of a wgmma.
template <int MmaRows, int Warps, bool Interleaved = false>
struct RowTiling {
  static constexpr int kWarps = Warps;
  static constexpr int kMmaRows = MmaRows;
  static constexpr int kWarpRows = 16 * kMmaRows;
  static constexpr int kRows = kWarpRows * kWarps;
  static constexpr int kMmaPitch = Interleaved ? 16 * kWarps : 16;  // rows, from tile to tile

  CUTE_HOST_DEVICE static constexpr int first_row(int warp) {
    return warp * (Interleaved ? 16 : kWarpRows);
  }
};

}  // namespace retention::collective
