// How a step of decoding is carried out: how states are cut into slices, so that the device is
// filled, and what that takes of the workspace. Plain arithmetic, the same with and without a
// device.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "retention/device/decode.hpp"
#include "retention/device/forward_plan.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::device {

// What kernels are made for.
inline constexpr int kMaxDecodeTokens = 16;    // of a row, in a step
inline constexpr int kMaxDecodeWindow = 512;   // tokens of a fold
inline constexpr int kMaxDecodeCopies = 8192;  // slots

/// The block pairs of a state, cut into slices of as many, the last one fewer.
struct StateSlices {
  int pairs = 0;  // in a slice
  int count = 0;

  static StateSlices of(int all_pairs, int pairs) {
    int const in_slice = std::min(pairs, all_pairs);
    return {in_slice, (all_pairs + in_slice - 1) / in_slice};
  }
};

struct DecodeStepPlan {
  static constexpr int kPairRows = 64;  // of the state

  DecodeStepArguments arguments;
  int mma_rows = 1;    // 16 queries each, that a block has at one time: 1, 2 or 4
  StateSlices slices;  // that blocks of the step read
  int parts = 1;       // blocks of a head: one for each slice and one for the ring, where it is cut
  int fold_blocks = 1;
  Region
      partial;  // [b, h, parts, t * hq / h, dv + 1] floats: of each part, where there are several
  std::size_t workspace_bytes = 0;

  /// For arguments that can be implemented.
  static DecodeStepPlan make(DecodeStepArguments const& arguments, int multiprocessors) {
    DecodeStepPlan plan;
    plan.arguments = arguments;
    DecodePool const& pool = arguments.pool;
    int const pairs = static_cast<int>(state_dim(pool.head_dim, pool.degree) / kPairRows);
    std::int64_t const heads = std::int64_t{arguments.rows} * pool.heads;
    int const queries = arguments.tokens * (arguments.query_heads / pool.heads);
    plan.mma_rows = queries <= 16 ? 1 : queries <= 32 ? 2 : 4;
    std::int64_t const blocks = resident_blocks(pool.value_dim, multiprocessors);
    plan.slices = arguments.slice_pairs == 0 ? choose_slices(pairs, heads, blocks)
                                             : StateSlices::of(pairs, arguments.slice_pairs);
    plan.parts = plan.slices.count == 1 ? 1 : plan.slices.count + 1;
    // Which heads fold, and so how much there is to do, only the device knows.
    plan.fold_blocks = static_cast<int>(
        std::min<std::int64_t>(blocks, (heads * pairs + kLeastPairs - 1) / kLeastPairs));
    Regions regions;
    if (plan.parts > 1) {
      plan.partial =
          regions.take(heads * plan.parts * queries * (pool.value_dim + 1), sizeof(float));
    }
    plan.workspace_bytes = regions.bytes();
    return plan;
  }

 private:
  static constexpr int kLeastPairs = 2;  // in less, a loop would end before it has got going

  // At one time, of any of the kernels: by their registers. Their loads on the way are enough for
  // all of the memory's bandwidth.
  static std::int64_t resident_blocks(int value_dim, int multiprocessors) {
    return std::int64_t{value_dim > 64 ? 2 : 3} * multiprocessors;
  }

  // One for each slice and one for the ring. Where there is no room for three blocks a head, each
  // is one block: no sums are left in memory for another.
  static StateSlices choose_slices(int pairs, std::int64_t heads, std::int64_t blocks) {
    std::int64_t const slices = std::max<std::int64_t>(blocks / heads - 1, 1);
    auto const in_slice = static_cast<int>((pairs + slices - 1) / slices);
    return StateSlices::of(pairs, std::max(in_slice, kLeastPairs));
  }
};

}  // namespace retention::device
