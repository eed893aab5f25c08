// How the warps of a block share a tile of rows.

#pragma once

#include <cute/tensor.hpp>

namespace retention::collective {

/// A warp has `MmaRows` mma tiles of 16 rows, which are neighbours, with all of their columns.
template <int MmaRows, int Warps>
struct RowTiling {
  static constexpr int kWarps = Warps;
  static constexpr int kMmaRows = MmaRows;
  static constexpr int kWarpRows = 16 * kMmaRows;
  static constexpr int kRows = kWarpRows * kWarps;

  CUTE_HOST_DEVICE static constexpr int first_row(int warp) { return warp * kWarpRows; }
};

/// For wgmma: two warpgroups of 64 rows share what a block loads. A lane has so few sums that a
/// multiprocessor has room for two such blocks: of its four warpgroups some make operands while the
/// tensor cores have products of others.
using WarpgroupTiling = RowTiling<1, 8>;

}  // namespace retention::collective
