// How a backward call is carried out: what is computed, and the workspace divided. Plain
// arithmetic, the same with and without a device.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "retention/device/backward.hpp"
#include "retention/device/forward_plan.hpp"

namespace retention::device {

struct BackwardPlan {
  static constexpr std::size_t kAlignment = Regions::kAlignment;
  static constexpr int kTileTokens = 64;    // of a range of gradients
  static constexpr int kGateTokens = 1024;  // of a piece of a chunk, for gates' gradients
  static constexpr int kProductParts = 16;  // that the product of two states is summed in

  BackwardArguments arguments;
  // Of the call before, in `arguments.forward_workspace`, or of the states that are computed again,
  // in the workspace.
  ForwardPlan forward;
  bool recomputes = true;
  bool runs_queries = false;     // whether `QueryGradient` runs, for queries or gates; reads states
  bool runs_keys = false;        // whether `KeyGradient` runs, for keys or gates
  bool reads_gradients = false;  // whether keys and values read the gradient of a state
  bool makes_gradients = false;  // whether such gradients are computed, to be read or the initial
  bool segmented = false;        // whether a sequence is cut and a carry follows
  bool gate_of_states = false;   // whether gates need products of states and their gradients
  BackwardPart part = BackwardPart::kAll;
  OuterState later;  // of kKeyGradients

  // Workspace.
  Region query;    // [b, hq, t, d] rescaled by powers of two, see kernel/gradient_rows.hpp
  Region inverse;  // [b, hq, t], as those that follow
  Region delta;
  Region weight;
  Region scale;
  Region query_d_gate;       // [b, hq, t] what queries have of d_gate
  Region d_gate;             // [b, t, h] of the gate's cumulative sum
  Region state_d_gate;       // [b, t, h] what keys have of it from states
  Region products;           // [slots, h, kProductParts] of states and their gradients
  Region gate_sums;          // [h, slots of pieces] of d_gate, where a chunk may have several:
                             // see kernel::GatePieceSum
  Region d_states;           // [state_slots, h, D, dv] after each chunk, in the element type
  Region d_key_sums;         // [state_slots, h, D]
  Region d_segment_state;    // [segment_slots, h, D, dv] fp32, of each segment alone
  Region d_segment_key_sum;  // [segment_slots, h, D]
  // fp16 only, see kernel/gradient_exponents.hpp.
  Region tile_ranges;       // [tile slots, h]
  Region final_ranges;      // [n, h, kStateParts]
  Region weight_exponents;  // [slots, h], as those that follow
  Region delta_exponents;
  Region state_exponents;
  Region key_sum_exponents;
  Region score_exponents;
  std::size_t workspace_bytes = 0;

  /// For arguments that can be implemented. In parts, gradients of states come before the states.
  static BackwardPlan make(BackwardArguments const& arguments, int multiprocessors,
                           BackwardPart part = BackwardPart::kAll, OuterState const& later = {}) {
    BackwardPlan plan;
    plan.arguments = arguments;
    plan.part = part;
    plan.later = later;
    bool const in_parts = part != BackwardPart::kAll;
    bool const has_final = arguments.d_final_state != nullptr;
    plan.recomputes = arguments.forward_workspace == nullptr;
    plan.runs_queries = arguments.d_query != nullptr || arguments.d_log_gate != nullptr;
    plan.runs_keys = arguments.d_key != nullptr || arguments.d_log_gate != nullptr;

    ForwardArguments forward = arguments.forward;
    forward.final_state = forward.final_key_sum = nullptr;
    forward.discards_workspace = false;  // chunks are as they suit backward
    // A workspace that was kept is divided as it was.
    plan.forward =
        ForwardPlan::make(forward, multiprocessors, !plan.recomputes || plan.runs_queries);
    ForwardArguments const& a = plan.forward.arguments;
    plan.reads_gradients =
        (plan.runs_keys || arguments.d_value != nullptr) && (a.chunk_size < a.tokens || has_final);
    plan.makes_gradients = plan.reads_gradients || arguments.d_initial_state != nullptr;
    plan.gate_of_states =
        plan.reads_gradients && plan.forward.reads_states && arguments.d_log_gate != nullptr;
    // The states' segments suit their gradients as well, where there are any.
    plan.segmented = plan.makes_gradients && a.segment_tokens < a.tokens;

    std::int64_t const D = state_dim(a.head_dim, a.degree);
    std::int64_t const sequences = a.sequences;
    std::int64_t const heads = a.heads;
    std::int64_t const tokens = (a.cu_seqlens != nullptr ? 1 : sequences) * a.tokens;
    std::int64_t const slots = plan.forward.slots;
    std::int64_t const state_slots = ForwardPlan::slots_of(a, a.chunk_size, has_final);
    std::int64_t const segment_slots =
        ForwardPlan::slots_of(a, a.segment_tokens, arguments.d_initial_state != nullptr);
    Regions regions(plan.recomputes ? plan.forward.workspace_bytes : 0);
    plan.query = regions.take(tokens * a.query_heads * a.head_dim, 2);
    for (Region* row : {&plan.inverse, &plan.delta, &plan.weight, &plan.scale}) {
      *row = regions.take(tokens * a.query_heads, sizeof(float));
    }
    if (arguments.d_log_gate != nullptr) {
      plan.query_d_gate = regions.take(tokens * a.query_heads, sizeof(float));
      plan.d_gate = regions.take(tokens * heads, sizeof(float));
      if (plan.reads_gradients) {
        plan.state_d_gate = regions.take(tokens * heads, sizeof(float));
      }
      if (plan.gate_of_states) {
        plan.products = regions.take(slots * heads * kProductParts, sizeof(double));
      }
      // Of a packed sequence that is one chunk, pieces are no longer than chunks of others.
      int const piece = std::min(+kGateTokens, a.chunk_size);
      bool const packed = a.cu_seqlens != nullptr;
      if (a.chunk_size > piece || (packed && a.whole_until > piece)) {
        std::int64_t const pieces = (a.chunk_size - 1) / piece + 1;
        std::int64_t const in_chunks =
            packed ? a.tokens / a.chunk_size * pieces + a.tokens % a.chunk_size / piece + sequences
                   : slots * pieces;
        plan.gate_sums = regions.take(in_chunks * heads, 2 * sizeof(double));
      }
    }
    // By the time that gradients of states are written, none but the gates' gradient reads the
    // states any more.
    bool const reuses = !in_parts && plan.recomputes && plan.forward.reads_states &&
                        !plan.gate_of_states && plan.forward.state_slots >= state_slots;
    if (plan.reads_gradients) {
      plan.d_states =
          reuses ? plan.forward.states : regions.take(state_slots * heads * D * a.value_dim, 2);
      plan.d_key_sums = reuses ? plan.forward.key_sums : regions.take(state_slots * heads * D, 2);
    }
    if (plan.segmented) {
      bool const there = !in_parts && plan.recomputes && plan.forward.segmented &&
                         plan.forward.segment_slots >= segment_slots;
      plan.d_segment_state =
          there ? plan.forward.segment_state
                : regions.take(segment_slots * heads * D * a.value_dim, sizeof(float));
      plan.d_segment_key_sum = there ? plan.forward.segment_key_sum
                                     : regions.take(segment_slots * heads * D, sizeof(float));
    }
    if (a.element == ElementType::kFloat16) {
      plan.tile_ranges =
          regions.take(ForwardPlan::slots_of(a, kTileTokens, true) * heads, 6 * sizeof(float));
      for (Region* exponents :
           {&plan.weight_exponents, &plan.delta_exponents, &plan.state_exponents,
            &plan.key_sum_exponents, &plan.score_exponents}) {
        *exponents = regions.take(slots * heads, sizeof(int));
      }
      if (has_final && plan.makes_gradients) {
        plan.final_ranges =
            regions.take(sequences * heads * ForwardPlan::kStateParts, 2 * sizeof(float));
      }
    }
    plan.workspace_bytes = regions.bytes();
    return plan;
  }
};

}  // namespace retention::device
