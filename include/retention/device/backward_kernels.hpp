// The backward pass of one configuration as a sequence of kernels.
//
// As far as they serve a gradient that is wanted:
//
//     states            those of forward, again, unless they were kept
//     rows              what every query row needs: rescaled queries, normalisers, delta
//     exponents         fp16 only: the powers of two that keep gradients in range
//     query gradient    from the states
//     state gradients   after every chunk, by segments side by side; in the place of the states,
//                       where gates have no gradient to read them for
//     carry             what a segment hands on to those before it
//     value, key gradient
//     gate gradient     from what queries and keys left for it, and states and their gradients
//     unowned           packed sequences only: zeros for tokens of none of them

#pragma once

#include "retention/device/backward_plan.hpp"
#include "retention/device/forward_kernels.hpp"
#include "retention/kernel/gate_gradient.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/gradient_rows.hpp"
#include "retention/kernel/key_gradient.hpp"
#include "retention/kernel/query_gradient.hpp"
#include "retention/kernel/state_gradients.hpp"
#include "retention/kernel/value_gradient.hpp"

namespace retention::device {

template <class Element, int HeadDim, int ValueDim>
struct BackwardKernels {
  using Forward = ForwardKernels<Element, HeadDim, ValueDim>;
  using Rows = kernel::GradientRows<kernel::GradientRowsTraits<Element, HeadDim, ValueDim>>;
  using QueryGradient =
      kernel::QueryGradient<kernel::QueryGradientTraits<Element, HeadDim, ValueDim>>;
  using StateGradients =
      kernel::StateGradients<kernel::StateGradientsTraits<Element, HeadDim, ValueDim>>;
  using Carry =
      kernel::Carry<kernel::CarryTraits<Element, HeadDim, ValueDim, kernel::Direction::kBackward>>;
  using ValueGradient =
      kernel::ValueGradient<kernel::ValueGradientTraits<Element, HeadDim, ValueDim>>;
  using KeyGradient = kernel::KeyGradient<kernel::KeyGradientTraits<Element, HeadDim, ValueDim>>;
  using StateProducts = kernel::StateProducts<Element>;

  static constexpr bool kScaled = Forward::kScaled;
  /// As of the forward kernels, some of which run here as well.
  static constexpr auto kSharedBytes = kernel::SharedBytes::most(
      {Forward::kSharedBytes, kernel::SharedBytes::of<StateGradients>(),
       kernel::items_shared_bytes<QueryGradient>(), kernel::items_shared_bytes<ValueGradient>(),
       kernel::items_shared_bytes<KeyGradient>()});
  static constexpr int kStateDim = static_cast<int>(SymmetricPower<HeadDim, 2>::kStateDim);
  static_assert(kernel::GatePiece::kTokens == BackwardPlan::kGateTokens &&
                    StateProducts::kParts == BackwardPlan::kProductParts &&
                    kernel::GateGradient::kParts == BackwardPlan::kProductParts &&
                    Rows::kTileTokens == BackwardPlan::kTileTokens &&
                    sizeof(kernel::GradientRange) == 6 * sizeof(float) &&
                    sizeof(kernel::GatePieceSum) == 2 * sizeof(double),
                "the plan reserves memory for them");

  /// `launcher` as for ForwardKernels.
  template <class Launcher>
  static Status run(BackwardPlan plan, void* workspace, Launcher const& launcher) {
    Call const call(plan, workspace);
    switch (plan.part) {
      case BackwardPart::kStateGradients:
        return run_state_gradients(call, launcher);
      case BackwardPart::kQueryGradient:
        return run_query_gradient(call, launcher);
      case BackwardPart::kKeyGradients:
        if (Status status = launcher.template launch<Carry>(call.outer_carry()); !status) {
          return status;
        }
        return run_key_gradients(call, launcher);
      case BackwardPart::kAll:
        break;
    }
    if (plan.recomputes) {
      if (Status status = Forward::run_states(plan.forward, workspace, launcher); !status) {
        return status;
      }
    }
    if (Status status = launch_items<Rows>(launcher, call.rows()); !status) {
      return status;
    }
    if constexpr (kScaled) {
      if (plan.final_ranges.bytes != 0) {
        if (Status status = launcher.template launch<kernel::StateRanges>(call.final_ranges());
            !status) {
          return status;
        }
      }
      if (Status status = launch_items<kernel::ChooseGradientExponents>(launcher, call.choose());
          !status) {
        return status;
      }
    }
    if (plan.runs_queries) {
      if (Status status = launch_items<QueryGradient>(launcher, call.query()); !status) {
        return status;
      }
    }
    if (plan.makes_gradients) {
      if (Status status = launcher.template launch<StateGradients>(call.states()); !status) {
        return status;
      }
    }
    if (plan.segmented) {
      if (Status status = launcher.template launch<Carry>(call.carry()); !status) {
        return status;
      }
    }
    return run_key_gradients(call, launcher);
  }

 private:
  // A plan and its workspace as the kernels take them.
  struct Call {
    BackwardPlan const& plan;
    BackwardArguments const& arguments;
    void* workspace;
    PlannedCall forward;
    ForwardArguments const& a;
    kernel::TokenStride query_stride;  // of the prepared queries, [b, hq, t, d]
    kernel::TokenStride row_stride;    // of what there is once for each of them
    kernel::GradientExponents exponents;

    Call(BackwardPlan const& plan_, void* workspace_)
        : plan(plan_),
          arguments(plan_.arguments),
          workspace(workspace_),
          // Nobody writes to a workspace that was kept.
          forward(plan_.forward,
                  plan_.recomputes ? workspace_ : const_cast<void*>(arguments.forward_workspace)),
          a(plan_.forward.arguments),
          query_stride{std::int64_t{a.query_heads} * a.tokens * HeadDim, HeadDim,
                       std::int64_t{a.tokens} * HeadDim},
          row_stride{std::int64_t{a.query_heads} * a.tokens, 1, a.tokens},
          exponents{in<int>(plan.weight_exponents), in<int>(plan.delta_exponents),
                    in<int>(plan.state_exponents), in<int>(plan.key_sum_exponents),
                    in<int>(plan.score_exponents)} {}

    template <class T>
    T* in(Region const& region) const {
      return region.template in<T>(workspace);
    }
    /// Of the workspace that has the states.
    template <class T>
    T* in_forward(Region const& region) const {
      return region.template in<T>(
          plan.recomputes ? workspace : const_cast<void*>(arguments.forward_workspace));
    }
    static kernel::TokenStride stride(Strides const& s) { return PlannedCall::stride(s); }
    /// Of a contiguous [b, t, heads, width].
    kernel::TokenStride contiguous(int heads, int width) const {
      return stride(Strides::contiguous(a.tokens, heads, width));
    }

    typename Rows::Params rows() const {
      typename Rows::Params p{};
      p.query = static_cast<Element const*>(a.query);
      p.d_output = static_cast<Element const*>(arguments.d_output);
      p.output = static_cast<Element const*>(a.output);
      p.residual = static_cast<Element const*>(a.output_residual);
      p.normalizer = a.normalizer;
      p.gate = forward.gate;
      p.query_stride = stride(a.query_strides);
      p.d_output_stride = stride(arguments.d_output_strides);
      p.output_stride = stride(a.output_strides);
      p.normalizer_stride = contiguous(a.query_heads, 1);
      p.gate_stride = forward.gate_stride;
      p.prepared_query = in<Element>(plan.query);
      p.inverse = in<float>(plan.inverse);
      p.delta = in<float>(plan.delta);
      p.weight = in<float>(plan.weight);
      p.scale = in<float>(plan.scale);
      p.prepared_query_stride = query_stride;
      p.row_stride = row_stride;
      p.ranges = in<kernel::GradientRange>(plan.tile_ranges);
      p.sequences = forward.sequences;
      p.heads = a.heads;
      p.group = a.query_heads / a.heads;
      return p;
    }

    kernel::StateRanges::Params final_ranges() const {
      kernel::StateRanges::Params p{};
      p.states = PlannedCall::states_at(arguments.d_final_state, arguments.d_final_key_sum);
      p.ranges = in<kernel::StateRange>(plan.final_ranges);
      p.count = a.sequences;
      p.shape = {a.heads, kStateDim, ValueDim};
      return p;
    }

    kernel::ChooseGradientExponents::Params choose() const {
      kernel::ChooseGradientExponents::Params p{};
      p.rows = in<kernel::GradientRange>(plan.tile_ranges);
      p.ranges = in_forward<kernel::ChunkRange>(plan.forward.chunk_ranges);
      p.final_ranges = in<kernel::StateRange>(plan.final_ranges);
      p.weight = in<int>(plan.weight_exponents);
      p.delta = in<int>(plan.delta_exponents);
      p.state = in<int>(plan.state_exponents);
      p.key_sum = in<int>(plan.key_sum_exponents);
      p.score = in<int>(plan.score_exponents);
      p.sequences = forward.sequences;
      p.heads = a.heads;
      p.value_dim = ValueDim;
      return p;
    }

    typename QueryGradient::Params query() const {
      typename QueryGradient::Params p{};
      p.query = in<Element>(plan.query);
      p.key = static_cast<Element const*>(a.key);
      p.value = static_cast<Element const*>(a.value);
      p.d_output = static_cast<Element const*>(arguments.d_output);
      p.gate = forward.gate;
      p.inverse = in<float>(plan.inverse);
      p.delta = in<float>(plan.delta);
      p.scale = in<float>(plan.scale);
      p.states = in_forward<Element>(plan.forward.states);
      p.key_sums = in_forward<Element>(plan.forward.key_sums);
      p.d_query = static_cast<Element*>(arguments.d_query);
      p.d_gate = in<float>(plan.query_d_gate);
      p.query_stride = query_stride;
      p.key_stride = stride(a.key_strides);
      p.value_stride = stride(a.value_strides);
      p.d_output_stride = stride(arguments.d_output_strides);
      p.gate_stride = forward.gate_stride;
      p.row_stride = row_stride;
      p.d_query_stride = contiguous(a.query_heads, HeadDim);
      p.exponents = forward.exponents;
      p.gradient_exponents = exponents;
      p.sequences = forward.sequences;
      p.heads = a.heads;
      p.group = a.query_heads / a.heads;
      p.initial_states = a.initial_state != nullptr;
      return p;
    }

    typename StateGradients::Params states() const {
      typename StateGradients::Params p{};
      p.query = in<Element>(plan.query);
      p.d_output = static_cast<Element const*>(arguments.d_output);
      p.weight = in<float>(plan.weight);
      p.delta = in<float>(plan.delta);
      p.gate = forward.gate;
      p.query_stride = query_stride;
      p.d_output_stride = stride(arguments.d_output_strides);
      p.row_stride = row_stride;
      p.gate_stride = forward.gate_stride;
      p.final_state_gradient = arguments.d_final_state;
      p.final_key_sum_gradient = arguments.d_final_key_sum;
      p.d_states = in<Element>(plan.d_states);
      p.d_key_sums = in<Element>(plan.d_key_sums);
      p.initial_state_gradient =
          plan.segmented ? in<float>(plan.d_segment_state) : arguments.d_initial_state;
      p.initial_key_sum_gradient =
          plan.segmented ? in<float>(plan.d_segment_key_sum) : arguments.d_initial_key_sum;
      p.sequence_starts = arguments.d_initial_state != nullptr;
      p.exponents = exponents;
      p.sequences = forward.listed(arguments.d_initial_state != nullptr ? kAllSequences
                                   : arguments.d_final_state != nullptr ? kPresentSequences
                                                                        : kChunkedSequences);
      p.heads = a.heads;
      p.group = a.query_heads / a.heads;
      p.segment_tokens = a.segment_tokens;
      return p;
    }

    typename Carry::Params carry() const {
      typename Carry::Params p{};
      p.states = in<Element>(plan.d_states);
      p.key_sums = in<Element>(plan.d_key_sums);
      p.slots = kernel::gradient_slots(arguments.d_final_state != nullptr);
      p.segment_state = in<float>(plan.d_segment_state);
      p.segment_key_sum = in<float>(plan.d_segment_key_sum);
      p.gate = forward.gate;
      p.gate_stride = forward.gate_stride;
      p.state_exponents = exponents.state;
      p.key_sum_exponents = exponents.key_sum;
      p.ends = PlannedCall::states_at(arguments.d_initial_state, arguments.d_initial_key_sum);
      p.sequences =
          forward.listed(arguments.d_initial_state != nullptr ? kAllSequences : kCutSequences);
      p.heads = a.heads;
      p.segment_tokens = a.segment_tokens;
      return p;
    }

    /// Of what sequences begin with, and not of the gradients after chunks.
    typename Carry::Params carry_of_starts() const {
      typename Carry::Params p = carry();
      p.states = p.key_sums = nullptr;
      return p;
    }

    /// With what comes after. A sequence that is not cut has its start where it is wanted.
    typename Carry::Params outer_carry() const {
      typename Carry::Params p = carry();
      p.outer_state = plan.later.state;
      p.outer_key_sum = plan.later.key_sum;
      if (!plan.segmented) {
        p.segment_state = arguments.d_initial_state;
        p.segment_key_sum = arguments.d_initial_key_sum;
      }
      return p;
    }

    // What the gradients of keys and values read.
    kernel::KeyRowsParams<Element> key_rows() const {
      kernel::KeyRowsParams<Element> p{};
      p.query = in<Element>(plan.query);
      p.key = static_cast<Element const*>(a.key);
      p.value = static_cast<Element const*>(a.value);
      p.d_output = static_cast<Element const*>(arguments.d_output);
      p.gate = forward.gate;
      p.inverse = in<float>(plan.inverse);
      p.delta = in<float>(plan.delta);
      p.d_states = in<Element>(plan.d_states);
      p.d_key_sums = in<Element>(plan.d_key_sums);
      p.query_stride = query_stride;
      p.key_stride = stride(a.key_strides);
      p.value_stride = stride(a.value_strides);
      p.d_output_stride = stride(arguments.d_output_strides);
      p.gate_stride = forward.gate_stride;
      p.row_stride = row_stride;
      p.exponents = forward.exponents;
      p.gradient_exponents = exponents;
      p.sequences = forward.sequences;
      p.heads = a.heads;
      p.group = a.query_heads / a.heads;
      p.final_gradients = arguments.d_final_state != nullptr;
      return p;
    }

    typename ValueGradient::Params value() const {
      typename ValueGradient::Params p{};
      static_cast<kernel::KeyRowsParams<Element>&>(p) = key_rows();
      p.d_value = static_cast<Element*>(arguments.d_value);
      p.d_value_stride = contiguous(a.heads, ValueDim);
      return p;
    }

    typename KeyGradient::Params key() const {
      typename KeyGradient::Params p{};
      static_cast<kernel::KeyRowsParams<Element>&>(p) = key_rows();
      p.d_key = static_cast<Element*>(arguments.d_key);
      p.d_key_stride = contiguous(a.heads, HeadDim);
      p.d_gate = in<float>(plan.d_gate);
      p.state_d_gate = in<float>(plan.state_d_gate);
      p.query_d_gate = in<float>(plan.query_d_gate);
      p.d_gate_stride = forward.gate_stride;
      return p;
    }

    // A sequence of one chunk has states on both sides of it where both are given.
    bool products_of_single_chunks() const {
      return a.initial_state != nullptr && arguments.d_final_state != nullptr;
    }

    typename StateProducts::Params products() const {
      typename StateProducts::Params p{};
      p.states = in_forward<Element>(plan.forward.states);
      p.key_sums = in_forward<Element>(plan.forward.key_sums);
      p.state_gradients = in<Element>(plan.d_states);
      p.key_sum_gradients = in<Element>(plan.d_key_sums);
      p.gate = forward.gate;
      p.gate_stride = forward.gate_stride;
      p.products = in<double>(plan.products);
      p.exponents = forward.exponents;
      p.gradient_exponents = exponents;
      p.sequences =
          forward.listed(products_of_single_chunks() ? kPresentSequences : kChunkedSequences);
      p.heads = a.heads;
      p.state_dim = kStateDim;
      p.value_dim = ValueDim;
      p.initial_states = a.initial_state != nullptr;
      p.final_gradients = arguments.d_final_state != nullptr;
      return p;
    }

    kernel::GateGradientSums::Params gate_sums() const {
      kernel::GateGradientSums::Params p{};
      p.d_gate = in<float>(plan.d_gate);
      p.log_gate = a.log_gate;
      p.d_gate_stride = forward.gate_stride;
      p.log_gate_stride = stride(a.log_gate_strides);
      p.sums = in<kernel::GatePieceSum>(plan.gate_sums);
      p.sequences = forward.sequences;
      p.heads = a.heads;
      return p;
    }

    kernel::GateGradient::Params gate() const {
      kernel::GateGradient::Params p{};
      p.d_gate = in<float>(plan.d_gate);
      p.log_gate = a.log_gate;
      p.d_log_gate = arguments.d_log_gate;
      p.d_gate_stride = forward.gate_stride;
      p.log_gate_stride = stride(a.log_gate_strides);
      p.d_log_gate_stride = contiguous(a.heads, 1);
      p.state_d_gate = in<float>(plan.state_d_gate);
      p.sums = in<kernel::GatePieceSum>(plan.gate_sums);
      p.products = in<double>(plan.products);
      p.products_of_single_chunks = products_of_single_chunks();
      p.sequences = forward.sequences;
      p.heads = a.heads;
      return p;
    }

    kernel::UnownedRows::Params unowned_rows() const {
      auto const rows = [&](void* data, int heads, int width) {
        return PlannedCall::rows_of(static_cast<Element*>(data), heads * width);
      };
      return forward.unowned(rows(arguments.d_query, a.query_heads, HeadDim),
                             rows(arguments.d_key, a.heads, HeadDim),
                             rows(arguments.d_value, a.heads, ValueDim),
                             PlannedCall::rows_of(arguments.d_log_gate, a.heads));
    }
  };

  // Those of segments, which a carry is still to join, and what sequences begin with.
  template <class Launcher>
  static Status run_state_gradients(Call const& call, Launcher const& launcher) {
    BackwardPlan const& plan = call.plan;
    if (plan.recomputes) {
      if (Status status = Forward::run_gates(plan.forward, call.workspace, launcher); !status) {
        return status;
      }
    }
    if (Status status = launch_items<Rows>(launcher, call.rows()); !status) {
      return status;
    }
    if (Status status = launcher.template launch<StateGradients>(call.states()); !status) {
      return status;
    }
    return plan.segmented ? launcher.template launch<Carry>(call.carry_of_starts()) : Status{};
  }

  // With the states, once more unless they were kept.
  template <class Launcher>
  static Status run_query_gradient(Call const& call, Launcher const& launcher) {
    BackwardPlan const& plan = call.plan;
    if (plan.recomputes) {
      if (Status status = Forward::run_made_states(plan.forward, call.workspace, launcher);
          !status) {
        return status;
      }
    }
    return plan.runs_queries ? launch_items<QueryGradient>(launcher, call.query()) : Status{};
  }

  // All that comes after the gradients of states.
  template <class Launcher>
  static Status run_key_gradients(Call const& call, Launcher const& launcher) {
    BackwardPlan const& plan = call.plan;
    if (plan.arguments.d_value != nullptr) {
      if (Status status = launch_items<ValueGradient>(launcher, call.value()); !status) {
        return status;
      }
    }
    if (plan.runs_keys) {
      if (Status status = launch_items<KeyGradient>(launcher, call.key()); !status) {
        return status;
      }
    }
    if (plan.arguments.d_log_gate != nullptr) {
      if (Status status = run_gates(call, launcher); !status) {
        return status;
      }
    }
    return call.a.cu_seqlens == nullptr
               ? Status{}
               : launcher.template launch<kernel::UnownedRows>(call.unowned_rows());
  }

  template <class Launcher>
  static Status run_gates(Call const& call, Launcher const& launcher) {
    if (call.plan.gate_of_states) {
      if (Status status = launcher.template launch<StateProducts>(call.products()); !status) {
        return status;
      }
    }
    if (call.plan.gate_sums.bytes != 0) {
      if (Status status = launch_items<kernel::GateGradientSums>(launcher, call.gate_sums());
          !status) {
        return status;
      }
    }
    return launch_items<kernel::GateGradient>(launcher, call.gate());
  }
};

}  // namespace retention::device
