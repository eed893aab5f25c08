// The forward pass of one configuration as a sequence of kernels.
//
//     lists      packed sequences only: those that there are, and those of several chunks
//     gates      cumulative log gates within each chunk
//     exponents  fp16 only: the powers of two that keep keys and states in range
//     states     the state before every chunk, by segments of a sequence side by side
//     carry      what a segment hands on to those after it
//     output     every query against the state before its chunk and the tokens of its chunk
//     unowned    packed sequences only: zeros for tokens of none of them
//
// A sequence of one chunk without an initial state needs no states: the quadratic form.

#pragma once

#include "retention/device/forward_plan.hpp"
#include "retention/kernel/carry.hpp"
#include "retention/kernel/chunk_states.hpp"
#include "retention/kernel/exponents.hpp"
#include "retention/kernel/gates.hpp"
#include "retention/kernel/output.hpp"
#include "retention/kernel/sequence_lists.hpp"
#include "retention/kernel/sequence_states.hpp"
#include "retention/kernel/unowned_rows.hpp"

namespace retention::device {

/// A call on sequences whose states are in the slots of a pool: packed ones, which need not follow
/// one another, since each has an end of its own. None given: no such call.
struct PooledCall {
  kernel::PooledStates states;
  int const* ends;  // [n]
};

/// What the kernels of a call share, forward and backward.
struct PlannedCall {
  ForwardPlan const& forward_plan;
  void* forward_workspace;
  ForwardArguments const& a;
  kernel::Sequences sequences;      // that are there
  kernel::TokenStride gate_stride;  // of the cumulative gates, [b, h, t]
  detail::CumulativeGate* gate;
  kernel::Exponents exponents;

  PlannedCall(ForwardPlan const& plan, void* workspace)
      : forward_plan(plan),
        forward_workspace(workspace),
        a(plan.arguments),
        sequences(listed(kPresentSequences)),
        gate_stride{std::int64_t{a.heads} * a.tokens, 1, a.tokens},
        gate(plan.gate.in<detail::CumulativeGate>(workspace)),
        exponents{plan.key_exponents.in<int>(workspace), plan.score_exponents.in<int>(workspace),
                  plan.state_exponents.in<int>(workspace),
                  plan.key_sum_exponents.in<int>(workspace)} {}

  /// Those that are not there: null pointers. A state that is read is not written.
  static kernel::SequenceStates states_at(float const* state, float const* key_sum) {
    return {const_cast<float*>(state), const_cast<float*>(key_sum), {}};
  }

  /// Those of a list; rows of a batch are all of them.
  kernel::Sequences listed(SequenceListKind kind) const {
    kernel::Sequences result{{}, a.tokens, a.chunk_size, a.sequences, a.sequences, a.whole_until,
                             0};
    result.whole_chunk = cute::round_up(a.whole_until, ForwardPlan::kTokenMultiple);
    if (a.cu_seqlens != nullptr) {
      PlannedList const& list = forward_plan.lists[kind];
      auto const* entries = list.region.in<kernel::SequenceList::Entry>(forward_workspace);
      result.list = {entries + 1, &entries->index};
      result.listed = list.most;
    }
    return result;
  }

  static kernel::TokenStride stride(Strides const& s) { return {s.batch, s.token, s.head}; }

  /// To clear up to four tensors, see `rows_of`.
  template <class... Tensors>
  kernel::UnownedRows::Params unowned(Tensors const&... tensors) const {
    return {a.cu_seqlens, a.sequences, a.tokens, {tensors...}};
  }
  /// Of a packed [t, heads, width] tensor, null for none.
  template <class T>
  static kernel::UnownedRows::Tensor rows_of(T* data, Strides const& s, int heads, int width) {
    constexpr int kInWord = sizeof(std::uint32_t) / sizeof(T);
    return {reinterpret_cast<std::uint32_t*>(data), s.token / kInWord, s.head / kInWord, heads,
            width / kInWord};
  }
  /// Of a contiguous one.
  template <class T>
  static kernel::UnownedRows::Tensor rows_of(T* data, int width) {
    return rows_of(data, Strides::contiguous(0, 1, width), 1, width);
  }
};

/// Launches a kernel of kernel/items.hpp.
template <class Kernel, class Launcher>
Status launch_items(Launcher const& launcher, typename Kernel::Params const& params) {
  if constexpr (Kernel::kTakesTurns) {
    using InTurns = kernel::InTurns<Kernel>;
    if (InTurns::pays(params)) {
      return launcher.template launch<InTurns>(params);
    }
  }
  return launcher.template launch<Kernel>(params);
}

template <class Element, int HeadDim, int ValueDim>
struct ForwardKernels {
  using Ranges = kernel::ChunkRanges<cute::half_t>;
  using ChunkStates = kernel::ChunkStates<kernel::ChunkStatesTraits<Element, HeadDim, ValueDim>>;
  using Carry = kernel::Carry<kernel::CarryTraits<Element, HeadDim, ValueDim>>;
  using Output = kernel::Output<kernel::OutputTraits<Element, HeadDim, ValueDim>>;

  static constexpr bool kScaled = cute::is_same_v<Element, cute::half_t>;
  /// Of shared memory, that a block of the largest kernel takes. The others get along with what
  /// every device has.
  static constexpr auto kSharedBytes = kernel::SharedBytes::most(
      {kernel::SharedBytes::of<ChunkStates>(), kernel::items_shared_bytes<Output>()});
  static_assert(sizeof(kernel::ChunkRange) == 5 * sizeof(float) &&
                    sizeof(kernel::StateRange) == 2 * sizeof(float) &&
                    kernel::ChooseExponents::kStateParts == ForwardPlan::kStateParts &&
                    collective::kFitsWarpgroups<ValueDim> ==
                        (ValueDim >= ForwardPlan::kWarpgroupValueDim) &&
                    sizeof(kernel::SequenceList::Entry) == ForwardPlan::kListEntry &&
                    kernel::SequenceLists::kLists == kSequenceLists,
                "the plan reserves memory for them");

  /// `launcher.launch<Kernel>(params)` runs one kernel after those launched before, and returns a
  /// Status: CudaLauncher, or one of the caller's own.
  template <class Launcher>
  static Status run(ForwardPlan const& plan, void* workspace, Launcher const& launcher) {
    switch (plan.part) {
      case ForwardPart::kStates:
        return run_own_states(plan, workspace, launcher);
      case ForwardPart::kCarry:
        return launcher.template launch<Carry>(Call(plan, workspace, {}).outer_carry());
      case ForwardPart::kOutput:
        return run_output(plan, workspace, launcher);
      case ForwardPart::kAll:
        break;
    }
    if (Status status = run_states(plan, workspace, launcher); !status) {
      return status;
    }
    return run_output(plan, workspace, launcher);
  }

  /// All of it but what happens to tokens of no sequence.
  template <class Launcher>
  static Status run_sequences(ForwardPlan const& plan, void* workspace, Launcher const& launcher,
                              PooledCall const& pooled = {}) {
    if (Status status = run_states(plan, workspace, launcher, pooled); !status) {
      return status;
    }
    return launch_items<Output>(launcher, Call(plan, workspace, pooled).output());
  }

  /// All that comes before the output, which backward computes again.
  template <class Launcher>
  static Status run_states(ForwardPlan const& plan, void* workspace, Launcher const& launcher,
                           PooledCall const& pooled = {}) {
    if (Status status = run_gates(plan, workspace, launcher, pooled); !status) {
      return status;
    }
    return run_made_states(plan, workspace, launcher, pooled);
  }

  /// All that comes before the states.
  template <class Launcher>
  static Status run_gates(ForwardPlan const& plan, void* workspace, Launcher const& launcher,
                          PooledCall const& pooled = {}) {
    Call const call(plan, workspace, pooled);
    if (plan.arguments.cu_seqlens != nullptr) {
      if (Status status = launcher.template launch<kernel::SequenceLists>(call.lists()); !status) {
        return status;
      }
    }
    if (plan.arguments.log_gate != nullptr) {
      if (Status status = launch_items<kernel::Gates>(launcher, call.gates()); !status) {
        return status;
      }
    }
    if constexpr (kScaled) {
      if (Status status = launch_items<Ranges>(launcher, call.ranges()); !status) {
        return status;
      }
      if (Status status = launch_items<kernel::ChooseExponents>(launcher, call.choose()); !status) {
        return status;
      }
    }
    return {};
  }

  /// The states, where gates are there.
  template <class Launcher>
  static Status run_made_states(ForwardPlan const& plan, void* workspace, Launcher const& launcher,
                                PooledCall const& pooled = {}) {
    Call const call(plan, workspace, pooled);
    if (plan.makes_states) {
      if (Status status = launcher.template launch<ChunkStates>(call.states()); !status) {
        return status;
      }
    }
    if (plan.segmented) {
      if (Status status = launcher.template launch<Carry>(call.carry()); !status) {
        return status;
      }
    }
    return {};
  }

 private:
  /// States of segments, which a carry is still to join, and what sequences end with.
  template <class Launcher>
  static Status run_own_states(ForwardPlan const& plan, void* workspace, Launcher const& launcher) {
    if (Status status = run_gates(plan, workspace, launcher); !status) {
      return status;
    }
    Call const call(plan, workspace, {});
    if (Status status = launcher.template launch<ChunkStates>(call.states()); !status) {
      return status;
    }
    return plan.segmented ? launcher.template launch<Carry>(call.carry_of_ends()) : Status{};
  }

  template <class Launcher>
  static Status run_output(ForwardPlan const& plan, void* workspace, Launcher const& launcher) {
    Call const call(plan, workspace, {});
    if (Status status = launch_items<Output>(launcher, call.output()); !status) {
      return status;
    }
    return plan.arguments.cu_seqlens == nullptr
               ? Status{}
               : launcher.template launch<kernel::UnownedRows>(call.unowned_rows());
  }

  // A plan and its workspace as the kernels take them.
  struct Call : PlannedCall {
    ForwardPlan const& plan;
    void* workspace;
    PooledCall pooled;

    Call(ForwardPlan const& plan_, void* workspace_, PooledCall const& pooled_)
        : PlannedCall(plan_, workspace_), plan(plan_), workspace(workspace_), pooled(pooled_) {}

    kernel::SequenceStates initial() const {
      return pooled.states.given() ? kernel::SequenceStates{nullptr, nullptr, pooled.states}
                                   : states_at(a.initial_state, a.initial_key_sum);
    }
    kernel::SequenceStates ends() const {
      return pooled.states.given() && plan.final_states
                 ? kernel::SequenceStates{nullptr, nullptr, pooled.states}
                 : states_at(a.final_state, a.final_key_sum);
    }

    kernel::SequenceLists::Params lists() const {
      kernel::SequenceLists::Params p{};
      p.starts = a.cu_seqlens;
      p.ends = pooled.ends != nullptr ? pooled.ends : a.cu_seqlens + 1;
      p.count = a.sequences;
      p.length = a.tokens;
      p.cursors = pooled.states.cursors;
      p.slots = pooled.states.slots;
      for (int i = 0; i < kSequenceLists; ++i) {
        auto* entries = plan.lists[i].region.template in<kernel::SequenceList::Entry>(workspace);
        p.lists[i] = {&entries->index, entries + 1, plan.lists[i].limit, plan.lists[i].most};
      }
      return p;
    }

    kernel::Gates::Params gates() const {
      kernel::Gates::Params p{};
      p.log_gate = a.log_gate;
      p.gate = gate;
      p.log_gate_stride = stride(a.log_gate_strides);
      p.gate_stride = gate_stride;
      p.sequences = sequences;
      p.heads = a.heads;
      return p;
    }

    Ranges::Params ranges() const {
      Ranges::Params p{};
      p.key = static_cast<cute::half_t const*>(a.key);
      p.value = static_cast<cute::half_t const*>(a.value);
      p.gate = gate;
      p.key_stride = stride(a.key_strides);
      p.value_stride = stride(a.value_strides);
      p.gate_stride = gate_stride;
      p.initial = initial();
      p.ranges = plan.chunk_ranges.template in<kernel::ChunkRange>(workspace);
      p.initial_ranges = plan.initial_ranges.template in<kernel::StateRange>(workspace);
      p.sequences = sequences;
      p.heads = a.heads;
      p.head_dim = HeadDim;
      p.value_dim = ValueDim;
      p.state_dim = static_cast<int>(SymmetricPower<HeadDim, 2>::kStateDim);
      return p;
    }

    kernel::ChooseExponents::Params choose() const {
      kernel::ChooseExponents::Params p{};
      p.ranges = plan.chunk_ranges.template in<kernel::ChunkRange>(workspace);
      p.initial_ranges = plan.initial_ranges.template in<kernel::StateRange>(workspace);
      p.key = plan.key_exponents.template in<int>(workspace);
      p.score = plan.score_exponents.template in<int>(workspace);
      p.state = plan.state_exponents.template in<int>(workspace);
      p.key_sum = plan.key_sum_exponents.template in<int>(workspace);
      p.sequences = sequences;
      p.heads = a.heads;
      p.head_dim = HeadDim;
      return p;
    }

    typename ChunkStates::Params states() const {
      typename ChunkStates::Params p{};
      p.key = static_cast<Element const*>(a.key);
      p.value = static_cast<Element const*>(a.value);
      p.gate = gate;
      p.key_stride = stride(a.key_strides);
      p.value_stride = stride(a.value_strides);
      p.gate_stride = gate_stride;
      p.initial = initial();
      p.states = plan.states.template in<Element>(workspace);
      p.key_sums = plan.key_sums.template in<Element>(workspace);
      p.ends = plan.segmented ? states_at(plan.segment_state.template in<float>(workspace),
                                          plan.segment_key_sum.template in<float>(workspace))
                              : ends();
      p.sequence_ends = plan.final_states;
      p.exponents = exponents;
      p.sequences = listed(plan.final_states     ? kAllSequences
                           : plan.initial_states ? kPresentSequences
                                                 : kChunkedSequences);
      p.heads = a.heads;
      p.segment_tokens = a.segment_tokens;
      return p;
    }

    typename Carry::Params carry() const {
      typename Carry::Params p{};
      p.states = plan.states.template in<Element>(workspace);
      p.key_sums = plan.key_sums.template in<Element>(workspace);
      p.slots = kernel::state_slots(plan.initial_states);
      p.segment_state = plan.segment_state.template in<float>(workspace);
      p.segment_key_sum = plan.segment_key_sum.template in<float>(workspace);
      p.gate = gate;
      p.gate_stride = gate_stride;
      p.state_exponents = exponents.state;
      p.key_sum_exponents = exponents.key_sum;
      p.ends = ends();
      p.sequences = listed(plan.final_states ? kAllSequences : kCutSequences);
      p.heads = a.heads;
      p.segment_tokens = a.segment_tokens;
      return p;
    }

    /// Of what sequences end with, and not of the states.
    typename Carry::Params carry_of_ends() const {
      typename Carry::Params p = carry();
      p.states = p.key_sums = nullptr;
      return p;
    }

    /// With what came before. A sequence that is not cut has its end where it is wanted.
    typename Carry::Params outer_carry() const {
      typename Carry::Params p = carry();
      p.outer_state = plan.earlier.state;
      p.outer_key_sum = plan.earlier.key_sum;
      if (!plan.segmented) {
        p.segment_state = a.final_state;
        p.segment_key_sum = a.final_key_sum;
      }
      return p;
    }

    typename Output::Params output() const {
      typename Output::Params p{};
      p.query = static_cast<Element const*>(a.query);
      p.key = static_cast<Element const*>(a.key);
      p.value = static_cast<Element const*>(a.value);
      p.gate = gate;
      p.states = plan.states.template in<Element>(workspace);
      p.key_sums = plan.key_sums.template in<Element>(workspace);
      p.output = static_cast<Element*>(a.output);
      p.residual = static_cast<Element*>(a.output_residual);
      p.normalizer = a.normalizer;
      p.query_stride = stride(a.query_strides);
      p.key_stride = stride(a.key_strides);
      p.value_stride = stride(a.value_strides);
      p.gate_stride = gate_stride;
      p.output_stride = stride(a.output_strides);
      p.normalizer_stride = {std::int64_t{a.tokens} * a.query_heads, a.query_heads, 1};
      p.exponents = exponents;
      p.sequences = sequences;
      p.heads = a.heads;
      p.group = a.query_heads / a.heads;
      p.initial_states = plan.initial_states;
      return p;
    }

    kernel::UnownedRows::Params unowned_rows() const {
      auto const outputs = [&](void* data) {
        return rows_of(static_cast<Element*>(data), a.output_strides, a.query_heads, ValueDim);
      };
      return unowned(outputs(a.output), outputs(a.output_residual),
                     rows_of(a.normalizer, a.query_heads));
    }
  };
};

}  // namespace retention::device
