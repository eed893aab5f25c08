// Power retention, forward, on a CUDA device: plain pointers, sizes and strides. This header needs
// neither CUDA nor CuTe; link retention::retention, which holds the compiled kernels.
//
//     w_ij = (q_i . k_j)^p exp(L_i - L_j) for j <= i,    L = cumsum(log_gate)
//     o_i  = sum_j w_ij v_j / sum_j w_ij                 0 / 0 = 0
//
// Gelada, Buckman, Zhang and Bach, "Scaling Context Requires Rethinking Attention"
// (arXiv:2507.04239), gated, and normalised by the sum of the weights. A factor on the scores
// cancels, so there is none.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "retention/configuration.hpp"
#include "retention/device/status.hpp"

#if defined(_WIN32)
#define RETENTION_API
#else
#define RETENTION_API __attribute__((visibility("default")))
#endif

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace retention::device {

/// In elements. The last dimension of every tensor is contiguous.
struct Strides {
  std::int64_t batch = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;

  /// Those of a contiguous [b, t, h, width].
  static constexpr Strides contiguous(std::int64_t tokens, std::int64_t heads, std::int64_t width) {
    return {tokens * heads * width, heads * width, width};
  }
};

/// b, t: a batch of rows of equal length; or, with cu_seqlens, b = 1 and n sequences end to end.
/// n is b otherwise. D = state_dim(d, degree). All pointers are to memory of the device; those of
/// query, key, value, output and output_residual are 16-byte aligned, and so are their rows.
struct ForwardArguments {
  // Of query, key, value, output and output_residual.
  ElementType element = ElementType::kBFloat16;
  int degree = 2;
  int head_dim = 0;     // d
  int value_dim = 0;    // dv
  int sequences = 0;    // n
  int tokens = 0;       // t
  int heads = 0;        // h, of keys and values
  int query_heads = 0;  // hq, a multiple of h: query head i reads key head i / (hq / h)

  void const* query = nullptr;  // [b, t, hq, d]
  Strides query_strides;
  void const* key = nullptr;  // [b, t, h, d]
  Strides key_strides;
  void const* value = nullptr;  // [b, t, h, dv]
  Strides value_strides;
  float const* log_gate = nullptr;  // [b, t, h], down to -inf; null: no decay
  Strides log_gate_strides;

  /// [n + 1]: sequence i is tokens [i] to [i + 1] - 1. Tokens before the first or behind the last
  /// are not read, and their results and gradients are 0.
  int const* cu_seqlens = nullptr;
  float const* initial_state = nullptr;    // [n, h, D, dv]; null: zero
  float const* initial_key_sum = nullptr;  // [n, h, D]; with initial_state

  void* output = nullptr;  // [b, t, hq, dv]
  Strides output_strides;
  /// [b, t, hq, dv] with output_strides; null: not wanted. What output lacks of o, rounded in turn:
  /// output + output_residual is o to twice the digits, as gradients need it.
  void* output_residual = nullptr;
  /// [b, t, hq], contiguous: sum_j w_ij with the query scaled by the power of two that brings its
  /// largest magnitude into [1/2, 1).
  float* normalizer = nullptr;
  float* final_state = nullptr;  // [n, h, D, dv]; null: not wanted. Rows as in symmetric_power.hpp
  float* final_key_sum = nullptr;  // [n, h, D]; with final_state

  int chunk_size = 0;  // tokens, a multiple of 64; 0: chosen by shape. From t up: no chunks
  /// A sequence of so many tokens or fewer is one chunk: the quadratic form. 0: chosen by shape
  /// where chunk_size is, else chunk_size. Packed sequences are compared one by one, on the device.
  int whole_until = 0;
  int segment_tokens = 0;  // a multiple of chunk_size; 0: chosen so that the device is filled
  /// Whether backward does not get the workspace of this call. Where nobody wants its states,
  /// longer sequences may then be one chunk.
  bool discards_workspace = false;
};

/// Whether `run` takes these arguments on the current device, and if not, which one and what would
/// do. Without a device it says what it would say with an H100.
RETENTION_API Status can_implement(ForwardArguments const& arguments);

/// Bytes of device memory that `run` needs at `workspace`; 0 for sizes that make no sense. Of the
/// pointers it matters which are null, no more. It depends on the current device's number of
/// multiprocessors, that of an H100 where there is none.
RETENTION_API std::size_t workspace_size(ForwardArguments const& arguments);

/// Tokens of a chunk as `run` takes it, given or chosen, the same on every device: from t up, no
/// chunks; 0 for sizes that make no sense. Packed sequences of up to whole_until tokens are one
/// chunk all the same.
RETENTION_API int chunk_size(ForwardArguments const& arguments);

/// Enqueues the work on `stream` of the current device, with no allocation and no synchronisation,
/// so that it can be captured into a CUDA graph. `workspace` is 256-byte aligned, not shared with
/// work in flight. Results are the same bits in every run.
RETENTION_API Status run(ForwardArguments const& arguments, void* workspace, CUstream_st* stream);

// Sequences over several devices: each has some of their tokens, and `run` in three parts, between
// which the caller lets the devices know of each other what states need.
//
//     run_states   what the tokens leave in the states: `final_state`
//     run_carry    adds what the tokens before them have left: `earlier`, decayed
//     run_output   the rest of `run`
//
// All have the same arguments and workspace, and follow one another on a stream. They need bf16
// elements, `initial_state` (zeros where nothing came before that this device knows of) and
// `final_state`. `earlier` is added to `initial_state`, and what it leaves to `final_state`. Tokens
// go through no product twice: `run` itself is `run_states` and `run_output`. fp16 chooses its
// powers of two from all that comes in, and therefore has no parts.

/// [n, h, D, dv] and [n, h, D], 16-byte aligned.
struct OuterState {
  float const* state = nullptr;
  float const* key_sum = nullptr;
};

/// Whether the three take these arguments, as for `run`. Their workspace is that of `run`.
RETENTION_API Status can_implement_parts(ForwardArguments const& arguments);

RETENTION_API Status run_states(ForwardArguments const& arguments, void* workspace,
                                CUstream_st* stream);
RETENTION_API Status run_carry(ForwardArguments const& arguments, OuterState const& earlier,
                               void* workspace, CUstream_st* stream);
RETENTION_API Status run_output(ForwardArguments const& arguments, void* workspace,
                                CUstream_st* stream);

/// What this library was compiled with, a part of kConfigurations; empty in one without CUDA.
RETENTION_API std::vector<Configuration> compiled_configurations();

}  // namespace retention::device
