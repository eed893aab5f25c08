// How the warps of a block share a tile of rows.

#pragma once

#include <cute/tensor.hpp>

#include "retention/detail/named_barrier.hpp"

namespace retention::collective {

/// A warp has `MmaRows` mma tiles of 16 rows, which are neighbours, with all of their columns.
template <int MmaRows, int Warps>
struct RowTiling {
  static constexpr int kWarpgroups = 0;  // that wgmma knows of
  static constexpr int kWarps = Warps;
  static constexpr int kMmaRows = MmaRows;
  static constexpr int kWarpRows = 16 * kMmaRows;
  static constexpr int kRows = kWarpRows * kWarps;

  CUTE_HOST_DEVICE static constexpr int first_row(int warp) { return warp * kWarpRows; }
};

/// For wgmma: warpgroups of 64 rows share what a block loads. A lane has so few sums that a
/// multiprocessor has room for three or four warpgroups: while some make operands, the tensor cores
/// have products of others. The block may have more warps, which have no rows.
template <int Warpgroups = 2>
struct WarpgroupTiling : RowTiling<1, 4 * Warpgroups> {
  static constexpr int kWarpgroups = Warpgroups;

  static constexpr int kBarrier = 1;

  /// A barrier of the threads that have rows.
  CUTE_DEVICE static void meet() { detail::wait_at_barrier(kBarrier, 128 * kWarpgroups); }
};

}  // namespace retention::collective
