// Decoding in one configuration: what a call's kernels are, and their parameters.
//
//     fold   where windows are folded at all: those rings that are full
//     step   new tokens join the rings, and their queries read states and rings

#pragma once

#include "retention/device/decode_plan.hpp"
#include "retention/kernel/decode_copy.hpp"
#include "retention/kernel/decode_cursors.hpp"
#include "retention/kernel/decode_fold.hpp"
#include "retention/kernel/decode_step.hpp"

namespace retention::device {

template <class Element, int HeadDim, int ValueDim>
struct DecodeKernels {
  using Fold = kernel::DecodeFold<Element, HeadDim, ValueDim>;
  template <int MmaRows>
  using Step = kernel::DecodeStep<Element, HeadDim, ValueDim, MmaRows>;

  /// Of shared memory, that a block of the largest kernel takes.
  static constexpr std::size_t kSharedBytes =
      cute::max(sizeof(typename Fold::SharedStorage), sizeof(typename Step<1>::SharedStorage),
                sizeof(typename Step<2>::SharedStorage), sizeof(typename Step<4>::SharedStorage),
                sizeof(kernel::DecodeCopy::SharedStorage));
  static_assert(Fold::kTileRows == DecodeStepPlan::kPairRows &&
                    Fold::kMaxWindow == kMaxDecodeWindow &&
                    Step<1>::kMaxTokens == kMaxDecodeTokens &&
                    kernel::DecodeCopy::kMaxSlots == kMaxDecodeCopies,
                "what the host side accepts");
  template <int MmaRows>
  static constexpr bool kPlanned =
      Step<MmaRows>::kMinBlocks == DecodeStepPlan::resident_blocks(HeadDim, ValueDim, MmaRows);
  static_assert(kPlanned<1> && kPlanned<2> && kPlanned<4> &&
                    Fold::kMinBlocks == DecodeStepPlan::resident_fold_blocks(HeadDim, ValueDim),
                "as many blocks as the plan fills");

  /// Launchers as in ForwardKernels::run.
  template <class Launcher>
  static Status run(DecodeStepPlan const& plan, void* workspace, Launcher const& launcher) {
    if (plan.arguments.window > 0) {
      if (Status status = launcher.template launch<Fold>(fold(plan)); !status) {
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

  static typename Fold::Params fold(DecodeStepPlan const& plan) {
    DecodeStepArguments const& a = plan.arguments;
    typename Fold::Params p{};
    p.slots = a.slots;
    p.rows = a.rows;
    p.heads = a.pool.heads;
    p.pool = pool_of(a.pool);
    p.window = a.window;
    p.keep = a.keep;
    p.blocks = plan.fold_blocks;
    p.arrivals = a.arrivals;
    return p;
  }

  static kernel::DecodeStepParams<Element> step(DecodeStepPlan const& plan, void* workspace) {
    auto const stride = [](Strides const& s) {
      return kernel::TokenStride{s.batch, s.token, s.head};
    };
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
