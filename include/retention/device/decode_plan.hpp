// How the calls of decoding are carried out: how states are cut into slices, so that the device is
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

/// Block pairs of a state.
inline int pairs_of(DecodePool const& pool) {
  constexpr int kPairRows = 64;
  return static_cast<int>(state_dim(pool.head_dim, pool.degree) / kPairRows);
}

struct DecodeFoldPlan {
  static constexpr int kLeastPairs = 2;  // that are worth a block of threads

  DecodeFoldArguments arguments;
  int blocks = 1;
  int launches = 1;  // of which each folds as much as one can

  static DecodeFoldPlan make(DecodeFoldArguments const& arguments, int multiprocessors) {
    DecodeFoldPlan plan;
    plan.arguments = arguments;
    DecodePool const& pool = arguments.pool;
    // Which heads fold, and so how much there is to do, only the device knows.
    std::int64_t const resident =
        std::int64_t{resident_blocks(pool.head_dim, pool.value_dim)} * multiprocessors;
    std::int64_t const most = std::int64_t{arguments.rows} * pool.heads * pairs_of(pool);
    plan.blocks =
        static_cast<int>(std::min<std::int64_t>(resident, (most + kLeastPairs - 1) / kLeastPairs));
    plan.launches =
        arguments.window > 0 ? 1 : (pool.ring + kMaxDecodeWindow - 1) / kMaxDecodeWindow;
    return plan;
  }

  /// Blocks that a multiprocessor runs at one time, by their shared memory.
  static constexpr int resident_blocks(int head_dim, int value_dim) {
    return std::max(head_dim, value_dim) > 64 ? 2 : 3;
  }
};

struct DecodeStepPlan {
  DecodeStepArguments arguments;
  int mma_rows = 1;     // 16 queries each, that a block has at one time: 1, 2 or 4
  StateSlices slices;   // that blocks of the step read, each with a share of the ring
  DecodeFoldPlan fold;  // first, where there is a window
  Region partial;       // [b, h, slices, t * hq / h, dv + 4] floats, where there are several
  std::size_t workspace_bytes = 0;

  /// For arguments that can be implemented.
  static DecodeStepPlan make(DecodeStepArguments const& arguments, int multiprocessors) {
    DecodeStepPlan plan;
    plan.arguments = arguments;
    DecodePool const& pool = arguments.pool;
    int const pairs = pairs_of(pool);
    std::int64_t const heads = std::int64_t{arguments.rows} * pool.heads;
    int const queries = arguments.tokens * (arguments.query_heads / pool.heads);
    plan.mma_rows = queries <= 16 ? 1 : queries <= 32 ? 2 : 4;
    std::int64_t const blocks =
        std::int64_t{resident_blocks(pool.head_dim, pool.value_dim, plan.mma_rows)} *
        multiprocessors;
    plan.slices = arguments.slice_pairs == 0
                      ? choose_slices(pairs, heads, blocks)
                      : StateSlices::of(pairs, std::max(arguments.slice_pairs, kLeastPairs));
    plan.fold = DecodeFoldPlan::make({pool, arguments.rows, arguments.slots, arguments.window,
                                      arguments.keep, arguments.arrivals},
                                     multiprocessors);
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

 private:
  static constexpr int kLeastPairs = 2;  // in less, a loop would end before it has got going

  // A few more than so many slices of a head take longer to be added up than they save. On an H200,
  // with 40 query and 8 key heads of 128, 28 slices took 21.8 us and 20 took 19.4.
  static constexpr int kMostSlices = 20;

  // Where there is no room for two blocks a head, each is one block: no sums are left in memory for
  // another.
  static StateSlices choose_slices(int pairs, std::int64_t heads, std::int64_t blocks) {
    std::int64_t const slices =
        std::min<std::int64_t>(std::max<std::int64_t>(blocks / heads, 1), kMostSlices);
    auto const in_slice = static_cast<int>((pairs + slices - 1) / slices);
    return StateSlices::of(pairs, std::max(in_slice, kLeastPairs));
  }
};

/// A prefill: rings are folded, then forward runs over the bodies of all rows and, where tokens are
/// kept, over their tails.
struct DecodePrefillPlan {
  DecodePrefillArguments arguments;
  int total = 0;  // tokens of all rows
  DecodeFoldPlan fold;
  ForwardPlan body;  // with states from slots and to them; its workspace is the tail's too
  ForwardPlan tail;  // with states from slots; of keep > 0
  Region parts[5];   // of kernel::PrefillParts
  Region normalizer;
  Region forward;
  std::size_t workspace_bytes = 0;

  static DecodePrefillPlan make(DecodePrefillArguments const& a, int multiprocessors) {
    DecodePrefillPlan plan;
    plan.arguments = a;
    plan.total = a.cu_seqlens != nullptr ? a.tokens : a.rows * a.tokens;
    plan.fold = DecodeFoldPlan::make({a.pool, a.rows, a.slots, 0, 0, a.arrivals}, multiprocessors);
    ForwardArguments const forward = forward_of(a);
    plan.body = ForwardPlan::make(forward, multiprocessors, true, true, true);
    plan.tail = ForwardPlan::make(forward, multiprocessors, true, true, false);
    Regions regions;
    for (Region& part : plan.parts) {
      part = regions.take(a.rows, sizeof(int));
    }
    plan.normalizer = regions.take(std::int64_t{plan.total} * a.query_heads, sizeof(float));
    plan.forward = regions.take(
        1, std::max(plan.body.workspace_bytes, a.keep > 0 ? plan.tail.workspace_bytes : 0));
    plan.workspace_bytes = regions.bytes();
    return plan;
  }

  /// The call of forward: packed, of sequences that `parts` tell.
  static ForwardArguments forward_of(DecodePrefillArguments const& a) {
    ForwardArguments f;
    f.element = a.pool.element;
    f.degree = a.pool.degree;
    f.head_dim = a.pool.head_dim;
    f.value_dim = a.pool.value_dim;
    f.sequences = a.rows;
    f.tokens = a.cu_seqlens != nullptr ? a.tokens : a.rows * a.tokens;
    f.heads = a.pool.heads;
    f.query_heads = a.query_heads;
    f.query = a.query;
    f.query_strides = a.query_strides;
    f.key = a.key;
    f.key_strides = a.key_strides;
    f.value = a.value;
    f.value_strides = a.value_strides;
    f.log_gate = a.log_gate;
    f.log_gate_strides = a.log_gate_strides;
    f.cu_seqlens = a.cu_seqlens != nullptr ? a.cu_seqlens : a.slots;  // any: it is packed
    f.output = a.output;
    f.output_strides = a.output_strides;
    f.chunk_size = a.chunk_size;
    return f;
  }
};

}  // namespace retention::device
