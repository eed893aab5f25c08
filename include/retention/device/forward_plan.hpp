// How a forward call is carried out: what was left to choose is chosen, and the workspace divided.
// Plain arithmetic, the same with and without a device.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "retention/device/forward.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::device {

/// A part of the workspace.
struct Region {
  std::size_t offset = 0;
  std::size_t bytes = 0;

  template <class T>
  T* in(void* workspace) const {
    return bytes == 0 ? nullptr : reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
  }
};

/// Lists of packed sequences, see kernel/sequence_lists.hpp.
enum SequenceListKind {
  kAllSequences,      // those without tokens too
  kPresentSequences,  // of any tokens
  kChunkedSequences,  // of several chunks
  kCutSequences,      // of several segments
  kSequenceLists,
};

/// A list of sequences of more than `limit` tokens, of which there are at most `most`.
struct PlannedList {
  int limit = 0;
  int most = 0;
  Region region;  // [1 + most] entries, the first of which holds their number
};

/// Divides a workspace into regions, one after the other.
class Regions {
 public:
  static constexpr std::size_t kAlignment = 256;

  explicit Regions(std::size_t bytes = 0) : bytes_(bytes) {}

  Region take(std::int64_t count, std::size_t size) {
    Region const region{bytes_, static_cast<std::size_t>(count) * size};
    bytes_ += (region.bytes + kAlignment - 1) / kAlignment * kAlignment;
    return region;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
};

/// What of a call is run: see forward.hpp and backward.hpp.
enum class ForwardPart { kAll, kStates, kCarry, kOutput };
enum class BackwardPart { kAll, kStateGradients, kQueryGradient, kKeyGradients };

struct ForwardPlan {
  static constexpr int kTokenMultiple = 64;  // of chunks: the tile of the kernels
  static constexpr std::size_t kAlignment = Regions::kAlignment;
  static constexpr int kStateParts = 32;         // that a state's range is found in
  static constexpr int kWarpgroupValueDim = 64;  // from which on output goes through wgmma

  static constexpr std::size_t kListEntry = 16;  // bytes

  // With chunk_size, whole_until and segment_tokens filled in.
  ForwardArguments arguments;
  bool initial_states = false;  // whether sequences begin with states
  bool final_states = false;    // whether the states that they end with are wanted
  bool reads_states = false;    // whether queries read a state
  bool makes_states = false;    // whether states are computed, to be read or as the final one
  bool segmented = false;       // whether a sequence is cut and a carry follows
  ForwardPart part = ForwardPart::kAll;
  OuterState earlier;  // of kCarry
  // See kernel/sequence.hpp.
  std::int64_t slots = 0;          // of chunks
  std::int64_t state_slots = 0;    // of states before them
  std::int64_t segment_slots = 0;  // of states after segments

  // Workspace. What backward reads comes first, in the same place whether a final state is wanted
  // or not.
  PlannedList lists[kSequenceLists];  // of packed sequences
  Region gate;      // [b, h, t] pairs of floats: cumulative log gates since the chunk's start
  Region states;    // [state_slots, h, D, dv] before each chunk, in the element type
  Region key_sums;  // [state_slots, h, D]
  // fp16 only, see kernel/exponents.hpp.
  Region chunk_ranges;       // [slots, h]
  Region initial_ranges;     // [n, h, kStateParts]
  Region key_exponents;      // [n, h]
  Region score_exponents;    // [n, h]
  Region state_exponents;    // [slots, h]
  Region key_sum_exponents;  // [slots, h]
  Region segment_state;      // [segment_slots, h, D, dv] fp32, of each segment alone
  Region segment_key_sum;    // [segment_slots, h, D]
  std::size_t workspace_bytes = 0;

  /// For arguments that can be implemented. Without states, it is what comes before them in the
  /// same call, for backward: chunks and segments are those of the call.
  static ForwardPlan make(ForwardArguments const& arguments, int multiprocessors,
                          bool with_states = true) {
    return make(arguments, multiprocessors, with_states, arguments.initial_state != nullptr,
                arguments.final_state != nullptr);
  }

  /// Where sequences' states are somewhere else than the arguments say.
  static ForwardPlan make(ForwardArguments const& arguments, int multiprocessors, bool with_states,
                          bool initial_states, bool final_states) {
    ForwardPlan plan;
    ForwardArguments& a = plan.arguments = arguments;
    plan.initial_states = initial_states;
    plan.final_states = final_states;
    std::int64_t const D = state_dim(a.head_dim, a.degree);
    bool const packed = a.cu_seqlens != nullptr;
    std::int64_t const rows = packed ? 1 : a.sequences;
    choose_chunk(a, a.discards_workspace && !initial_states && !final_states);
    plan.slots = slots_of(a, a.chunk_size, true);
    plan.state_slots = slots_of(a, a.chunk_size, initial_states);
    plan.reads_states = a.chunk_size < a.tokens || initial_states;
    plan.makes_states = plan.reads_states || final_states;

    int const one_segment = round_up(a.tokens + 1, a.chunk_size);
    if (a.chunk_size > a.tokens) {
      a.segment_tokens = one_segment;
    } else if (a.segment_tokens == 0) {
      a.segment_tokens = choose_segment(a, plan.makes_states, D, multiprocessors);
    }
    a.segment_tokens = std::min(a.segment_tokens, one_segment);
    if (!with_states) {
      plan.reads_states = plan.makes_states = false;
    }
    plan.segmented = plan.makes_states && a.segment_tokens < a.tokens;
    plan.segment_slots = slots_of(a, a.segment_tokens, final_states);

    std::int64_t const heads = a.heads;
    Regions regions;
    if (packed) {
      plan.lists[kAllSequences] = list(a, regions, -1);
      plan.lists[kPresentSequences] = list(a, regions, 0);
      plan.lists[kChunkedSequences] = list(a, regions, a.whole_until);
      plan.lists[kCutSequences] = list(a, regions, std::max(a.whole_until, a.segment_tokens));
    }
    if (a.log_gate != nullptr) {
      plan.gate = regions.take(rows * heads * a.tokens, 2 * sizeof(float));
    }
    if (plan.reads_states) {
      plan.states = regions.take(plan.state_slots * heads * D * a.value_dim, 2);
      plan.key_sums = regions.take(plan.state_slots * heads * D, 2);
    }
    if (a.element == ElementType::kFloat16) {
      plan.chunk_ranges = regions.take(plan.slots * heads, 5 * sizeof(float));
      plan.key_exponents = regions.take(a.sequences * heads, sizeof(int));
      plan.score_exponents = regions.take(a.sequences * heads, sizeof(int));
      plan.state_exponents = regions.take(plan.slots * heads, sizeof(int));
      plan.key_sum_exponents = regions.take(plan.slots * heads, sizeof(int));
      if (initial_states) {
        plan.initial_ranges = regions.take(a.sequences * heads * kStateParts, 2 * sizeof(float));
      }
    }
    if (plan.segmented) {
      plan.segment_state =
          regions.take(plan.segment_slots * heads * D * a.value_dim, sizeof(float));
      plan.segment_key_sum = regions.take(plan.segment_slots * heads * D, sizeof(float));
    }
    plan.workspace_bytes = regions.bytes();
    return plan;
  }

  /// Of pieces of `size` tokens, as kernel::Sequences has them: of all, or, when packed, of all but
  /// one of each sequence.
  static std::int64_t slots_of(ForwardArguments const& a, int size, bool all) {
    return a.cu_seqlens != nullptr
               ? std::int64_t{a.tokens / size} + (all ? a.sequences : 0)
               : std::int64_t{a.sequences} * ((std::int64_t{a.tokens} + size - 1) / size);
  }

 private:
  static int round_up(std::int64_t x, int multiple) {
    std::int64_t const rounded = (x + multiple - 1) / multiple * multiple;
    return static_cast<int>(std::min<std::int64_t>(rounded, INT32_MAX / multiple * multiple));
  }

  // A token's products are 2 D dv with the state for each query head, and as many for its key head;
  // or 2 (d + dv) for each query head with each of the t / 2 tokens before it: they are as many at
  // t = `even`. Where the latter go through mma.sync, as backward's do, the products with the state
  // run at twice their rate (seen on an H200), so that chunks are faster from half of that on;
  // where all go through wgmma, as for an output alone, from `even` on. How long a chunk is costs a
  // token half as many products, and what every state takes a part of one over it: together they
  // are least where it is as the root of `even`. On an H200 that was 256 tokens at d = dv = 32, 512
  // at 64 and 1,024 at 128.
  static void choose_chunk(ForwardArguments& a, bool output_alone) {
    std::int64_t const D = state_dim(a.head_dim, a.degree);
    std::int64_t const group = a.query_heads / a.heads;
    std::int64_t const even =
        2 * D * a.value_dim * (group + 1) / (group * (a.head_dim + a.value_dim));
    bool const given = a.chunk_size != 0;
    if (a.whole_until == 0) {
      bool const one_rate = output_alone && a.value_dim >= kWarpgroupValueDim;
      std::int64_t const faster_until = one_rate ? even : even / 2;
      a.whole_until =
          given ? a.chunk_size : static_cast<int>(std::min<std::int64_t>(faster_until, INT32_MAX));
    }
    if (!given) {
      a.chunk_size = 128;
      while (a.chunk_size < 2048 && std::int64_t{a.chunk_size} * a.chunk_size < 32 * even) {
        a.chunk_size *= 2;
      }
    }
    // More than t tokens a chunk are one chunk. More, not as many: then the slot of a packed
    // sequence is its index.
    int const one_chunk = round_up(a.tokens + std::int64_t{1}, kTokenMultiple);
    if (a.tokens <= a.whole_until && (!given || a.chunk_size < a.tokens)) {
      a.chunk_size = one_chunk;
    }
    a.chunk_size = std::min(a.chunk_size, one_chunk);
    // Of packed sequences, which the device compares.
    a.whole_until = std::min(std::max(a.whole_until, a.chunk_size), one_chunk);
  }

  static PlannedList list(ForwardArguments const& a, Regions& regions, int limit) {
    // Nobody else has the tokens of a sequence.
    int const most = limit < 0 ? a.sequences : std::min(a.sequences, a.tokens / (limit + 1));
    return {limit, most, regions.take(std::int64_t{most} + 1, kListEntry)};
  }

  // The states of a sequence are made one chunk after another, by D dv / 16384 blocks a head, two
  // to a multiprocessor. Where those are few, segments of a sequence go side by side. The fewest
  // of them that come within a twentieth of the shortest time, counted in the tokens that a block
  // goes through: beside its segment's, what it takes to start and to store a state, and what
  // `carry` takes, which moves all states but the first segment's (both seen on an H200).
  static int choose_segment(ForwardArguments const& a, bool makes_states, std::int64_t D,
                            int multiprocessors) {
    constexpr int kMaxSegments = 32;
    constexpr std::int64_t kTokensOfBlock = 256;
    constexpr std::int64_t kCarriedOfToken = 14000;  // elements of states
    std::int64_t const chunks = (std::int64_t{a.tokens} + a.chunk_size - 1) / a.chunk_size;
    // Packed sequences may all but one be empty: only the device knows.
    std::int64_t const rows = a.cu_seqlens != nullptr ? 1 : a.sequences;
    std::int64_t const blocks = rows * a.heads * ((D * a.value_dim + 16383) / 16384);
    std::int64_t const places = 2 * std::int64_t{multiprocessors};
    std::int64_t const carried = rows * a.heads * chunks * D * a.value_dim;
    auto const cost = [&](std::int64_t segments) {
      std::int64_t const waves = (blocks * segments + places - 1) / places;
      std::int64_t const tokens = (chunks + segments - 1) / segments * a.chunk_size;
      return waves * (tokens + kTokensOfBlock) + (segments > 1 ? carried / kCarriedOfToken : 0);
    };
    std::int64_t const most = makes_states ? std::min<std::int64_t>(chunks, kMaxSegments) : 1;
    std::int64_t least = cost(1);
    for (std::int64_t segments = 2; segments <= most; ++segments) {
      least = std::min(least, cost(segments));
    }
    std::int64_t segments = 1;
    while (segments < most && 20 * cost(segments) > 21 * least) {
      ++segments;
    }
    std::int64_t const tokens = segments == 1 ? std::int64_t{a.tokens} + 1
                                              : (chunks + segments - 1) / segments * a.chunk_size;
    return round_up(tokens, a.chunk_size);
  }
};

}  // namespace retention::device
