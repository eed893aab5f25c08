// Power retention, token by token, on a CUDA device: many sequences at once, each in a slot of a
// pool that the caller owns. This header needs neither CUDA nor CuTe; link retention::retention.
//
// A slot has, per key head, a state and a ring of the recent tokens, which are not in the state
// yet. A step reads both, and writes new tokens into the ring alone; a fold moves a window of the
// oldest ones into the state, and a prefill puts prompts there. What there is to do is seen on the
// device, from the cursors of the slots: a call that was captured into a CUDA graph can be replayed
// for ever.

#pragma once

#include <cstddef>
#include <cstdint>

#include "retention/cursor.hpp"
#include "retention/device/forward.hpp"

namespace retention::device {

/// In elements. What follows the heads is contiguous.
struct SlotStrides {
  std::int64_t slot = 0;
  std::int64_t head = 0;

  /// Those of a contiguous [slots, h, size].
  static constexpr SlotStrides contiguous(std::int64_t heads, std::int64_t size) {
    return {heads * size, size};
  }
};

/// Memory of the device for the sequences that are decoded, which belongs to the caller. It needs
/// no initial values but in `cursors`: zeros there, or `run(DecodeResetArguments)`, make slots
/// empty. Rows of all tensors are 16-byte aligned, but those of log_gates. D = state_dim(d,
/// degree).
struct DecodePool {
  ElementType element = ElementType::kBFloat16;  // of keys and values
  int degree = 2;
  int head_dim = 0;   // d
  int value_dim = 0;  // dv
  int heads = 0;      // h, of keys and values
  int slots = 0;
  /// Tokens that a ring holds: at least window - 1, and those that are kept, and a step's.
  int ring = 0;
  /// Slots up to this one, and from `slots` on, stand for nothing: their rows are padding.
  int null_slot = -1;

  // A state in fp32 is two planes of 16 bits: its bits rounded to their upper half, which is a
  // bf16, and the bits less those. A state in bf16 is the first one alone.
  void* high = nullptr;  // [slots, h, D, dv]
  SlotStrides high_strides;
  void* low = nullptr;  // [slots, h, D, dv]; null: states are bf16
  SlotStrides low_strides;
  float* key_sum = nullptr;  // [slots, h, D]
  SlotStrides key_sum_strides;
  void* keys = nullptr;  // [slots, h, ring, d]
  SlotStrides keys_strides;
  void* values = nullptr;  // [slots, h, ring, dv]
  SlotStrides values_strides;
  float* log_gates = nullptr;  // [slots, h, ring]; null: no gates
  SlotStrides log_gates_strides;
  Cursor* cursors = nullptr;        // [slots]
  std::int64_t cursors_stride = 1;  // from slot to slot, in cursors
};

/// A step: in every row t tokens join the ring of its slot, and their queries attend to all tokens
/// that the slot has seen, themselves included. Rows of padding get zeros.
struct DecodeStepArguments {
  DecodePool pool;
  int rows = 0;         // b
  int tokens = 0;       // t, 1 to 16: of every row, or with cu_seqlens at most
  int query_heads = 0;  // hq, a multiple of h: query head i reads key head i / (hq / h)

  // [b, t, h, d], or packed, [1, sum of t, h, d], with cu_seqlens; 16-byte aligned, as are all rows
  // but those of log_gate.
  void const* query = nullptr;  // [b, t, hq, d]
  Strides query_strides;
  void const* key = nullptr;  // [b, t, h, d]
  Strides key_strides;
  void const* value = nullptr;  // [b, t, h, dv]
  Strides value_strides;
  float const* log_gate = nullptr;  // [b, t, h], down to -inf; null where the pool has none
  Strides log_gate_strides;
  void* output = nullptr;  // [b, t, hq, dv]
  Strides output_strides;
  int const* slots = nullptr;       // [b], each slot at most once
  int const* cu_seqlens = nullptr;  // [b + 1]: row i has tokens [i] to [i + 1] - 1
  int total = 0;  // tokens of packed tensors, beyond which cu_seqlens is not believed

  /// Before anything else, rings with a window of tokens beyond the `keep` newest are folded: the
  /// oldest, up to where the number of folded tokens is the slot's phase, modulo the window. 0: no
  /// folds; else from t to 512 tokens.
  int window = 0;
  int keep = 0;

  /// [b, h + 1] zeros before the first call, which every call leaves as zeros: to be cleared once,
  /// by whoever allocates it. As the workspace, it is shared by calls one after another alone.
  unsigned* arrivals = nullptr;

  /// Block pairs of a state that one block of threads reads, at least two; a state has D / 64. 0:
  /// chosen so that the device is filled.
  int slice_pairs = 0;
};

/// Prompts, or pieces of them, on top of what slots hold: the forward pass, with states in the
/// slots before and after it. What is in the rings is folded first; of the new tokens all but the
/// last `keep` of every row go into the state, and these into the ring. Rows of padding get zeros.
struct DecodePrefillArguments {
  DecodePool pool;
  int rows = 0;         // b
  int tokens = 0;       // t, of every row; with cu_seqlens those of all rows
  int query_heads = 0;  // hq, a multiple of h

  // [b, t, h, d], row after row without anything between them: their batch strides are t times the
  // strides of tokens. With cu_seqlens [1, t, h, d]. All but log_gate 16-byte aligned, as their
  // rows.
  void const* query = nullptr;  // [b, t, hq, d]
  Strides query_strides;
  void const* key = nullptr;  // [b, t, h, d]
  Strides key_strides;
  void const* value = nullptr;  // [b, t, h, dv]
  Strides value_strides;
  float const* log_gate = nullptr;  // [b, t, h], down to -inf; null where the pool has none
  Strides log_gate_strides;
  void* output = nullptr;  // [b, t, hq, dv]
  Strides output_strides;
  int const* slots = nullptr;  // [b], each slot at most once
  /// [b + 1]: row i has tokens [i] to [i + 1] - 1. Others are not read, and their results are 0.
  int const* cu_seqlens = nullptr;
  int keep = 0;                  // at most the ring
  unsigned* arrivals = nullptr;  // [1], as that of a step, with which it can be shared
  int chunk_size = 0;            // as in ForwardArguments
};

/// Tokens of rings go into the states. A step does so by itself.
struct DecodeFoldArguments {
  DecodePool pool;
  int rows = 0;
  int const* slots = nullptr;  // [rows], each slot at most once
  /// As in a step; 0: all tokens but the `keep` newest, whatever the phase, in a ring of any size.
  int window = 0;
  int keep = 0;
  unsigned* arrivals = nullptr;  // [1], as that of a step
};

/// Slots become others, as if all were read before any is written: copies may go in circles.
struct DecodeCopyArguments {
  DecodePool pool;
  int count = 0;                // at most 8,192
  int const* source = nullptr;  // [count]
  int const* target = nullptr;  // [count], each slot at most once
};

/// Slots become empty: no state, no tokens.
struct DecodeResetArguments {
  DecodePool pool;
  int count = 0;
  int const* slots = nullptr;   // [count], each slot at most once
  int const* phases = nullptr;  // [count]; null: 0, windows end at multiples of the window
};

/// The newest tokens of slots were never seen. At most those that are in the ring can be taken
/// back; more than that is taken as all of them.
struct DecodeRollbackArguments {
  DecodePool pool;
  int count = 0;
  int const* slots = nullptr;   // [count], each slot at most once
  int const* tokens = nullptr;  // [count], to be taken back
};

/// Whether `run` takes these arguments on the current device, and if not, which one and what would
/// do. Without a device it says what it would say with an H100.
RETENTION_API Status can_implement(DecodeStepArguments const& arguments);
RETENTION_API Status can_implement(DecodePrefillArguments const& arguments);
RETENTION_API Status can_implement(DecodeFoldArguments const& arguments);
RETENTION_API Status can_implement(DecodeCopyArguments const& arguments);
RETENTION_API Status can_implement(DecodeResetArguments const& arguments);
RETENTION_API Status can_implement(DecodeRollbackArguments const& arguments);

/// Bytes of device memory that a step or a prefill needs at `workspace`, 0 for none and for sizes
/// that make no sense. It depends on sizes and the current device's number of multiprocessors, that
/// of an H100 where there is none; of pointers it matters which are null.
RETENTION_API std::size_t workspace_size(DecodeStepArguments const& arguments);
RETENTION_API std::size_t workspace_size(DecodePrefillArguments const& arguments);

/// Enqueues the work on `stream` of the current device, with no allocation and no synchronisation,
/// so that it can be captured into a CUDA graph. `workspace` is 256-byte aligned, not shared with
/// work in flight. Results are the same bits in every run.
RETENTION_API Status run(DecodeStepArguments const& arguments, void* workspace,
                         CUstream_st* stream);
RETENTION_API Status run(DecodePrefillArguments const& arguments, void* workspace,
                         CUstream_st* stream);
RETENTION_API Status run(DecodeFoldArguments const& arguments, CUstream_st* stream);
RETENTION_API Status run(DecodeCopyArguments const& arguments, CUstream_st* stream);
RETENTION_API Status run(DecodeResetArguments const& arguments, CUstream_st* stream);
RETENTION_API Status run(DecodeRollbackArguments const& arguments, CUstream_st* stream);

}  // namespace retention::device
