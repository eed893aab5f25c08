// The gradients of power retention on a CUDA device: plain pointers, sizes and strides, as
// forward.hpp. With p_ij = w_ij / sum_j w_ij, the share of token j in output i, and s = q_i . k_j:
//
//     d v_j  = sum_i p_ij d o_i
//     d s_ij = p_ij (p / s) (d o_i . v_j - d o_i . o_i)    p the degree
//     d q_i  = sum_j d s_ij k_j        d k_j = sum_i d s_ij q_i
//
// and a log gate's is the sum of -(k_j . d k_j) / p over the tokens from its own on: weights are
// homogeneous of degree p in the keys.

#pragma once

#include <cstddef>

#include "retention/device/forward.hpp"

namespace retention::device {

struct BackwardArguments {
  /// The arguments of forward as they were, with the results in `output`, `output_residual`, which
  /// is needed here, and `normalizer`. Its `final_state` and `final_key_sum` are not read.
  ForwardArguments forward;
  /// The workspace of that call of `run`, if it was kept and nothing has written to it; null: the
  /// states before each chunk are computed again, which takes as much memory in the workspace.
  void const* forward_workspace = nullptr;

  void const* d_output = nullptr;  // [b, t, hq, dv], 16-byte aligned as its rows
  Strides d_output_strides;
  float const* d_final_state = nullptr;    // [n, h, D, dv]; null: zero
  float const* d_final_key_sum = nullptr;  // [n, h, D]; with d_final_state

  // Results, contiguous and 16-byte aligned; null: not wanted, but not all of them. What serves
  // none that is wanted is not computed, and takes no workspace; the others are the same bits.
  // Those of 16-bit tensors are rounded once.
  void* d_query = nullptr;             // [b, t, hq, d]
  void* d_key = nullptr;               // [b, t, h, d]
  void* d_value = nullptr;             // [b, t, h, dv]
  float* d_log_gate = nullptr;         // [b, t, h]
  float* d_initial_state = nullptr;    // [n, h, D, dv]
  float* d_initial_key_sum = nullptr;  // [n, h, D]; with d_initial_state
};

/// Whether `run` takes these arguments on the current device, and if not, which one and what would
/// do. Wide heads need more shared memory than forward: see docs/cpp.md.
RETENTION_API Status can_implement(BackwardArguments const& arguments);

/// Bytes of device memory that `run` needs at `workspace`, as for forward. It matters which
/// gradients are wanted.
RETENTION_API std::size_t workspace_size(BackwardArguments const& arguments);

/// Enqueues the work on `stream` of the current device, with no allocation and no synchronisation.
/// `workspace` is 256-byte aligned, not shared with work in flight. Results are the same bits in
/// every run.
RETENTION_API Status run(BackwardArguments const& arguments, void* workspace, CUstream_st* stream);

// In three parts, as forward:
//
//     run_state_gradients   what the tokens' own queries have for the states: `d_initial_state`
//     run_query_gradient    d_query, which takes all of the states before the tokens
//     run_key_gradients     adds what queries of later tokens have: `later`, decayed; and the rest
//
// The caller lets the devices know of each other's `d_initial_state` between the first and the
// last; the second needs nothing of it, and hides that it takes time. They need bf16 elements,
// `forward.initial_state` with all that came before (forward's own, and what was `earlier`),
// `d_final_state` (zeros where nothing comes after that this device knows of) and
// `d_initial_state`. `later` is added to `d_final_state`, and what is left of it to
// `d_initial_state`.

/// Whether the three take these arguments, as for `run`.
RETENTION_API Status can_implement_parts(BackwardArguments const& arguments);

/// Bytes of their workspace, which may be more than that of `run`.
RETENTION_API std::size_t parts_workspace_size(BackwardArguments const& arguments);

RETENTION_API Status run_state_gradients(BackwardArguments const& arguments, void* workspace,
                                         CUstream_st* stream);
RETENTION_API Status run_query_gradient(BackwardArguments const& arguments, void* workspace,
                                        CUstream_st* stream);
RETENTION_API Status run_key_gradients(BackwardArguments const& arguments, OuterState const& later,
                                       void* workspace, CUstream_st* stream);

}  // namespace retention::device
