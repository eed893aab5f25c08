// Decoding in one configuration: what a call's kernels are, and their parameters.
//
// A step:
//
//     fold   where windows are folded at all: those rings that are full
//     step   new tokens join the rings, and their queries read states and rings
//
// A prefill:
//
//     fold     all that is in the rings
//     parts    which tokens of a row are its body, and which its tail
//     forward  over the bodies, from the states of slots to those after them
//     count    the bodies are in the states
//     forward  where tokens are kept: over the tails
//     append   the tails to the rings
//     count    the tails are in the rings
//     zeros    for rows of padding, and for tokens that no row has

#pragma once

#include "retention/device/decode_plan.hpp"
#include "retention/device/forward_kernels.hpp"
#include "retention/kernel/decode_copy.hpp"
#include "retention/kernel/decode_cursors.hpp"
#include "retention/kernel/decode_fold.hpp"
#include "retention/kernel/decode_prefill.hpp"
#include "retention/kernel/decode_step.hpp"

namespace retention::device {

template <class Element, int HeadDim, int ValueDim>
struct DecodeKernels {
  using Fold = kernel::DecodeFold<Element, HeadDim, ValueDim>;
  using Forward = ForwardKernels<Element, HeadDim, ValueDim>;
  template <int MmaRows>
  using Step = kernel::DecodeStep<Element, HeadDim, ValueDim, MmaRows>;

  /// Of shared memory, that a block of the largest kernel takes.
  static constexpr auto kSharedBytes = kernel::SharedBytes::most(
      {kernel::SharedBytes::of<Fold>(), kernel::SharedBytes::of<Step<1>>(),
       kernel::SharedBytes::of<Step<2>>(), kernel::SharedBytes::of<Step<4>>(),
       kernel::SharedBytes::of<kernel::DecodeCopy>()});
  static_assert(Fold::kMaxWindow == kMaxDecodeWindow && Step<1>::kMaxTokens == kMaxDecodeTokens &&
                    kernel::DecodeCopy::kMaxSlots == kMaxDecodeCopies,
                "what the host side accepts");
  template <int MmaRows>
  static constexpr bool kPlanned =
      Step<MmaRows>::kMinBlocks == DecodeStepPlan::resident_blocks(HeadDim, ValueDim, MmaRows);
  static_assert(kPlanned<1> && kPlanned<2> && kPlanned<4> &&
                    Fold::kMinBlocks == DecodeFoldPlan::resident_blocks(HeadDim, ValueDim),
                "as many blocks as the plan fills");

  /// Launchers as in ForwardKernels::run.
  template <class Launcher>
  static Status run(DecodeStepPlan const& plan, void* workspace, Launcher const& launcher) {
    if (plan.arguments.window > 0) {
      if (Status status = run(plan.fold, launcher); !status) {
        return status;
      }
    }
    auto const params = step(plan, workspace);
    switch (plan.mma_rows) {
      case 1:
        return launcher.template launch<Step<1>>(params);
      case 2:
        return launcher.template launch<Step<2>>(params);
      default:
        return launcher.template launch<Step<4>>(params);
    }
  }

  template <class Launcher>
  static Status run(DecodeFoldPlan const& plan, Launcher const& launcher) {
    for (int i = 0; i < plan.launches; ++i) {
      if (Status status = launcher.template launch<Fold>(fold(plan)); !status) {
        return status;
      }
    }
    return {};
  }

  template <class Launcher>
  static Status run(DecodePrefillPlan const& plan, void* workspace, Launcher const& launcher) {
    DecodePrefillArguments const& a = plan.arguments;
    kernel::PrefillParts const parts = parts_of(plan, workspace);
    kernel::FindPrefillParts::Params const rows = rows_of(plan, workspace);
    kernel::MoveCursors<kernel::CountFolded>::Params const folded{rows.cursors, a.slots,
                                                                  parts.folded, a.rows};
    return one_after_another(
        [&] { return run(plan.fold, launcher); },
        [&] { return launcher.template launch<kernel::FindPrefillParts>(rows); },
        [&] { return run_part(plan, plan.body, parts.starts, parts.middles, workspace, launcher); },
        [&] { return launcher.template launch<kernel::CountFolded>(folded); },
        [&] { return a.keep > 0 ? run_tails(plan, workspace, launcher) : Status{}; },
        [&] { return launcher.template launch<kernel::PaddingRows>({rows, output_of(a)}); },
        [&] {
          return a.cu_seqlens == nullptr
                     ? Status{}
                     : launcher.template launch<kernel::UnownedRows>(unowned(plan));
        });
  }

  template <class Launcher>
  static Status run(DecodeCopyArguments const& a, Launcher const& launcher) {
    kernel::DecodeCopy::Params p{};
    p.source = a.source;
    p.target = a.target;
    p.count = a.count;
    kernel::DecodeCopy::set_tensors(p, pool_of(a.pool), a.pool.heads, kStateDim, HeadDim, ValueDim);
    return launcher.template launch<kernel::DecodeCopy>(p);
  }

  template <class Launcher>
  static Status run(DecodeResetArguments const& a, Launcher const& launcher) {
    return launcher.template launch<kernel::DecodeReset>(
        {pool_of(a.pool).cursors, a.slots, a.phases, a.count});
  }

  template <class Launcher>
  static Status run(DecodeRollbackArguments const& a, Launcher const& launcher) {
    return launcher.template launch<kernel::DecodeRollback>(
        {pool_of(a.pool).cursors, a.slots, a.tokens, a.count});
  }

 private:
  static constexpr int kStateDim = static_cast<int>(SymmetricPower<HeadDim, 2>::kStateDim);

  template <class T>
  static kernel::SlotTensor<T> tensor(void* data, SlotStrides const& s) {
    return {static_cast<T*>(data), s.slot, s.head};
  }

  static kernel::DecodePool<Element> pool_of(DecodePool const& p) {
    return {tensor<cute::bfloat16_t>(p.high, p.high_strides),
            tensor<std::int16_t>(p.low, p.low_strides),
            tensor<float>(p.key_sum, p.key_sum_strides),
            tensor<Element>(p.keys, p.keys_strides),
            tensor<Element>(p.values, p.values_strides),
            tensor<float>(p.log_gates, p.log_gates_strides),
            {p.cursors, p.cursors_stride, p.slots, p.null_slot},
            p.ring};
  }

  /// Calls that launch something, up to the first that fails.
  template <class First, class... Rest>
  static Status one_after_another(First const& first, Rest const&... rest) {
    if (Status status = first(); !status) {
      return status;
    }
    if constexpr (sizeof...(Rest) == 0) {
      return {};
    } else {
      return one_after_another(rest...);
    }
  }

  static kernel::PrefillParts parts_of(DecodePrefillPlan const& plan, void* workspace) {
    auto const at = [&](int part) { return plan.parts[part].template in<int>(workspace); };
    return {at(0), at(1), at(2), at(3), at(4)};
  }

  static kernel::FindPrefillParts::Params rows_of(DecodePrefillPlan const& plan, void* workspace) {
    DecodePrefillArguments const& a = plan.arguments;
    return {a.cu_seqlens, a.slots, pool_of(a.pool).cursors,  a.rows,
            plan.total,   a.keep,  parts_of(plan, workspace)};
  }

  static kernel::UnownedRows::Tensor output_of(DecodePrefillArguments const& a) {
    return PlannedCall::rows_of(static_cast<Element*>(a.output), a.output_strides, a.query_heads,
                                ValueDim);
  }

  static kernel::UnownedRows::Params unowned(DecodePrefillPlan const& plan) {
    DecodePrefillArguments const& a = plan.arguments;
    return {a.cu_seqlens, a.rows, plan.total, {output_of(a)}};
  }

  /// Forward over a part of every row.
  template <class Launcher>
  static Status run_part(DecodePrefillPlan const& plan, ForwardPlan forward, int const* starts,
                         int const* ends, void* workspace, Launcher const& launcher) {
    kernel::DecodePool<Element> const pool = pool_of(plan.arguments.pool);
    forward.arguments.cu_seqlens = starts;
    forward.arguments.normalizer = plan.normalizer.template in<float>(workspace);
    PooledCall const pooled{{pool.high, pool.low, pool.key_sum, pool.cursors, plan.arguments.slots},
                            ends};
    return Forward::run_sequences(forward, plan.forward.template in<void>(workspace), launcher,
                                  pooled);
  }

  template <class Launcher>
  static Status run_tails(DecodePrefillPlan const& plan, void* workspace,
                          Launcher const& launcher) {
    using Append = kernel::AppendTails<Element>;
    DecodePrefillArguments const& a = plan.arguments;
    kernel::PrefillParts const parts = parts_of(plan, workspace);
    kernel::DecodePool<Element> const pool = pool_of(a.pool);
    auto const stride = [](Strides const& s) { return PlannedCall::stride(s); };
    typename Append::Params const tails{static_cast<Element const*>(a.key),
                                        static_cast<Element const*>(a.value),
                                        a.log_gate,
                                        stride(a.key_strides),
                                        stride(a.value_strides),
                                        stride(a.log_gate_strides),
                                        parts,
                                        a.slots,
                                        a.rows,
                                        a.pool.heads,
                                        HeadDim,
                                        ValueDim,
                                        pool};
    kernel::MoveCursors<kernel::CountAppended>::Params const appended{pool.cursors, a.slots,
                                                                      parts.kept, a.rows};
    return one_after_another(
        [&] { return run_part(plan, plan.tail, parts.middles, parts.ends, workspace, launcher); },
        [&] { return launcher.template launch<Append>(tails); },
        [&] { return launcher.template launch<kernel::CountAppended>(appended); });
  }

  static typename Fold::Params fold(DecodeFoldPlan const& plan) {
    DecodeFoldArguments const& a = plan.arguments;
    typename Fold::Params p{};
    p.slots = a.slots;
    p.rows = a.rows;
    p.heads = a.pool.heads;
    p.pool = pool_of(a.pool);
    p.window = a.window;
    p.keep = a.keep;
    p.blocks = plan.blocks;
    p.arrivals = a.arrivals;
    return p;
  }

  static kernel::DecodeStepParams<Element> step(DecodeStepPlan const& plan, void* workspace) {
    auto const stride = [](Strides const& s) { return PlannedCall::stride(s); };
    DecodeStepArguments const& a = plan.arguments;
    kernel::DecodeStepParams<Element> p{};
    p.query = static_cast<Element const*>(a.query);
    p.key = static_cast<Element const*>(a.key);
    p.value = static_cast<Element const*>(a.value);
    p.log_gate = a.log_gate;
    p.output = static_cast<Element*>(a.output);
    p.query_stride = stride(a.query_strides);
    p.key_stride = stride(a.key_strides);
    p.value_stride = stride(a.value_strides);
    p.gate_stride = stride(a.log_gate_strides);
    p.output_stride = stride(a.output_strides);
    p.cu_seqlens = a.cu_seqlens;
    p.total = a.total;
    p.slots = a.slots;
    p.rows = a.rows;
    p.tokens = a.tokens;
    p.heads = a.pool.heads;
    p.group = a.query_heads / a.pool.heads;
    p.pool = pool_of(a.pool);
    p.parts = plan.slices.count;
    p.slice_pairs = plan.slices.pairs;
    p.partial = plan.partial.template in<float>(workspace);
    p.arrivals = a.arrivals;
    return p;
  }
};

}  // namespace retention::device
