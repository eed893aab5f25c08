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
  StateSlices slices;  // that blocks of the step read, each with a share of the ring
  int fold_blocks = 1;
  Region partial;  // [b, h, slices, t * hq / h, dv + 4] floats, where there are several
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
    std::int64_t const blocks =
        std::int64_t{resident_blocks(pool.head_dim, pool.value_dim, plan.mma_rows)} *
        multiprocessors;
    plan.slices = arguments.slice_pairs == 0
                      ? choose_slices(pairs, heads, blocks)
                      : StateSlices::of(pairs, std::max(arguments.slice_pairs, kLeastPairs));
    // Which heads fold, and so how much there is to do, only the device knows.
    std::int64_t const fold_blocks =
        std::int64_t{resident_fold_blocks(pool.head_dim, pool.value_dim)} * multiprocessors;
    plan.fold_blocks = static_cast<int>(
        std::min<std::int64_t>(fold_blocks, (heads * pairs + kLeastPairs - 1) / kLeastPairs));
    Regions regions;
    if (plan.slices.count > 1) {
      plan.partial =
          regions.take(heads * plan.slices.count * queries * (pool.value_dim + 4), sizeof(float));
    }
    plan.workspace_bytes = regions.bytes();
    return plan;
  }

  /// Blocks of a step that a multiprocessor runs at one time, by their registers. Their loads on
  /// the way are enough for all of the memory's bandwidth.
  static constexpr int resident_blocks(int head_dim, int value_dim, int mma_rows) {
    bool const few_registers = head_dim * mma_rows <= 64 && value_dim == 64;
    return value_dim > 64 || head_dim * mma_rows > 256 ? 2 : few_registers ? 4 : 3;
  }

  /// Those of a fold, by their shared memory.
  static constexpr int resident_fold_blocks(int head_dim, int value_dim) {
    return std::max(head_dim, value_dim) > 64 ? 2 : 3;
  }

 private:
  static constexpr int kLeastPairs = 2;  // in less, a loop would end before it has got going

  // Where there is no room for two blocks a head, each is one block: no sums are left in memory for
  // another.
  static StateSlices choose_slices(int pairs, std::int64_t heads, std::int64_t blocks) {
    std::int64_t const slices = std::max<std::int64_t>(blocks / heads, 1);
    auto const in_slice = static_cast<int>((pairs + slices - 1) / slices);
    return StateSlices::of(pairs, std::max(in_slice, kLeastPairs));
  }
};

}  // namespace retention::device
