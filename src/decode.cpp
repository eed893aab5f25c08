// The host side of the decoding kernels.

#include "retention/device/decode.hpp"

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "checks.hpp"
#include "compiled.hpp"
#include "retention/device/decode_plan.hpp"

namespace retention::device {

namespace {

using Named = std::pair<char const*, std::int64_t>;

Configuration configuration_of(DecodePool const& p) {
  return {p.element, p.head_dim, p.value_dim, p.degree};
}

Status check_positive(std::initializer_list<Named> sizes) {
  for (auto const& [name, value] : sizes) {
    if (value < 1) {
      return Status(got(name, value) + "at least 1");
    }
  }
  return {};
}

Status check_given(std::initializer_list<std::pair<char const*, void const*>> pointers) {
  for (auto const& [name, data] : pointers) {
    if (data == nullptr) {
      return Status(std::string(name) + ": got a null pointer");
    }
  }
  return {};
}

Status check_sizes(DecodePool const& p) {
  // A state's elements are counted by 32-bit integers.
  if (!is_supported(p.head_dim, p.degree) || p.value_dim < 1 ||
      state_dim(p.head_dim, p.degree) > INT_MAX / p.value_dim) {
    return Status("head_dim, value_dim, degree: got " + std::to_string(p.head_dim) + ", " +
                  std::to_string(p.value_dim) + " and " + std::to_string(p.degree) +
                  ", expected a multiple of 8, a positive and a positive even number, and a state "
                  "of less than 2^31 elements");
  }
  Status status = check_positive({{"heads", p.heads}, {"slots", p.slots}, {"ring", p.ring}});
  constexpr int kMaxHeads = 65535;
  if (status && p.heads > kMaxHeads) {
    return Status(got("heads", p.heads) + "at most " + std::to_string(kMaxHeads));
  }
  constexpr int kMaxRing = 1 << 20;  // so are a ring's
  if (status && p.ring > kMaxRing) {
    return Status(got("ring", p.ring) + "at most " + std::to_string(kMaxRing));
  }
  return status;
}

Status check_pool(DecodePool const& p) {
  Configuration const configuration = configuration_of(p);
  Status status = check_configuration(configuration);
  if (status) {
    status = check_shared_bytes(configuration, find_compiled(configuration)->decode_shared_bytes());
  }
  if (status) {
    status = check_sizes(p);
  }
  if (status) {
    status = check_given({{"high", p.high},
                          {"key_sum", p.key_sum},
                          {"keys", p.keys},
                          {"values", p.values},
                          {"cursors", p.cursors}});
  }
  struct Tensor {
    char const* name;
    void const* data;
    int element_bytes;
    SlotStrides const& strides;
  };
  for (Tensor const& x : {Tensor{"high", p.high, 2, p.high_strides},
                          {"low", p.low, 2, p.low_strides},
                          {"key_sum", p.key_sum, 4, p.key_sum_strides},
                          {"keys", p.keys, 2, p.keys_strides},
                          {"values", p.values, 2, p.values_strides}}) {
    if (status) {
      status = check_rows(x.name, x.data, x.element_bytes, {x.strides.slot, x.strides.head});
    }
  }
  if (status && !is_aligned(p.cursors, alignof(Cursor))) {
    return Status("cursors: expected a 16-byte aligned pointer");
  }
  return status;
}

Status check_blocks(int rows, DecodePool const& p) {
  // Blocks are counted by 32-bit integers, of the smallest slices that there could be.
  int const most = INT_MAX / (pairs_of(p) + 1) / p.heads;
  return rows <= most ? Status{}
                      : Status(got("rows", rows) + "at most " + std::to_string(most) + " with " +
                               std::to_string(p.heads) + " heads");
}

/// Of a call with new tokens.
template <class Arguments>
Status check_new(Arguments const& a) {
  DecodePool const& p = a.pool;
  Status status = check_sizes(p);
  if (status) {
    status =
        check_positive({{"rows", a.rows}, {"tokens", a.tokens}, {"query_heads", a.query_heads}});
  }
  constexpr int kMaxGroup = 64;
  if (status && (a.query_heads % p.heads != 0 || a.query_heads / p.heads > kMaxGroup)) {
    return Status(got("query_heads", a.query_heads) +
                  "a multiple of heads = " + std::to_string(p.heads) + ", and at most " +
                  std::to_string(kMaxGroup) + " to one of them");
  }
  return status;
}

Status check_sizes(DecodeStepArguments const& a) {
  DecodePool const& p = a.pool;
  if (Status status = check_new(a); !status) {
    return status;
  }
  if (a.tokens > kMaxDecodeTokens) {
    return Status(got("tokens", a.tokens) + "at most " + std::to_string(kMaxDecodeTokens));
  }
  if (a.cu_seqlens != nullptr && a.total < 1) {
    return Status(got("total", a.total) + "at least 1 with cu_seqlens");
  }
  if (a.window != 0 && (a.window < a.tokens || a.window > kMaxDecodeWindow)) {
    return Status(got("window", a.window) + "0, or tokens = " + std::to_string(a.tokens) + " to " +
                  std::to_string(kMaxDecodeWindow));
  }
  if (a.keep < 0) {
    return Status(got("keep", a.keep) + "0 or more");
  }
  // After a fold, a ring has less than a window beyond those that are kept.
  std::int64_t const least =
      a.window == 0 ? a.tokens : std::int64_t{a.window} - 1 + a.keep + a.tokens;
  if (p.ring < least) {
    return Status(got("ring", p.ring) + "at least " + std::to_string(least) +
                  (a.window == 0 ? ", the tokens of a step"
                                 : ": window - 1, and keep, and the tokens of a step"));
  }
  if (a.slice_pairs < 0) {
    return Status(got("slice_pairs", a.slice_pairs) + "0 or more");
  }
  return check_blocks(a.rows, p);
}

Status check_sizes(DecodePrefillArguments const& a) {
  Status status = check_new(a);
  if (status) {
    status = check_blocks(a.rows, a.pool);
  }
  if (status && a.cu_seqlens == nullptr && std::int64_t{a.rows} * a.tokens > INT_MAX) {
    return Status(got("tokens", a.tokens) + "at most " + std::to_string(INT_MAX / a.rows) +
                  " in each of " + std::to_string(a.rows) + " rows");
  }
  if (status && (a.keep < 0 || a.keep > a.pool.ring)) {
    return Status(got("keep", a.keep) + "0 to ring = " + std::to_string(a.pool.ring));
  }
  return status ? check_sizes(DecodePrefillPlan::forward_of(a)) : status;
}

Status check_sizes(DecodeFoldArguments const& a) {
  Status status = check_sizes(a.pool);
  if (status) {
    status = check_positive({{"rows", a.rows}});
  }
  if (status && (a.window < 0 || a.window > kMaxDecodeWindow)) {
    return Status(got("window", a.window) + "0 to " + std::to_string(kMaxDecodeWindow));
  }
  if (status && a.keep < 0) {
    return Status(got("keep", a.keep) + "0 or more");
  }
  return status ? check_blocks(a.rows, a.pool) : status;
}

/// Of a call with new tokens.
template <class Arguments>
Status check_pointers(Arguments const& a) {
  struct Operand {
    char const* name;
    void const* data;
    Strides const& strides;
  };
  for (Operand const& x : {Operand{"query", a.query, a.query_strides},
                           {"key", a.key, a.key_strides},
                           {"value", a.value, a.value_strides},
                           {"output", a.output, a.output_strides}}) {
    Status status = check_given({{x.name, x.data}});
    if (status) {
      status = check_rows(x.name, x.data, 2, {x.strides.batch, x.strides.token, x.strides.head});
    }
    if (!status) {
      return status;
    }
  }
  if ((a.log_gate == nullptr) != (a.pool.log_gates == nullptr)) {
    return Status("log_gate and the pool's log_gates: expected both or neither");
  }
  return check_given({{"slots", a.slots}, {"arrivals", a.arrivals}});
}

/// Of a call on slots in a list.
Status check_list(DecodePool const& pool, int count,
                  std::initializer_list<std::pair<char const*, void const*>> pointers) {
  Status status = check_pool(pool);
  if (status) {
    status = check_positive({{"count", count}});
  }
  return status ? check_given(pointers) : status;
}

/// A call with a workspace.
template <class Plan, class Arguments, class Run>
Status run_planned(Arguments const& arguments, void* workspace, CUstream_st* stream, Run run) {
  if (Status status = can_implement(arguments); !status) {
    return status;
  }
  auto const plan = Plan::make(arguments, multiprocessors());
  if (Status status = check_workspace(workspace, plan.workspace_bytes); !status) {
    return status;
  }
  return (find_compiled(configuration_of(arguments.pool))->*run)(plan, workspace, stream);
}

}  // namespace

Status can_implement(DecodeStepArguments const& arguments) {
  Status status = check_pool(arguments.pool);
  if (status) {
    status = check_sizes(arguments);
  }
  return status ? check_pointers(arguments) : status;
}

Status can_implement(DecodePrefillArguments const& a) {
  Status status = check_pool(a.pool);
  if (status) {
    Configuration const configuration = configuration_of(a.pool);
    status =
        check_shared_bytes(configuration, find_compiled(configuration)->forward_shared_bytes());
  }
  if (status) {
    status = check_sizes(a);
  }
  if (status) {
    status = check_pointers(a);
  }
  struct Operand {
    char const* name;
    Strides const& strides;
  };
  for (Operand const& x : {Operand{"query", a.query_strides},
                           {"key", a.key_strides},
                           {"value", a.value_strides},
                           {"log_gate", a.log_gate_strides},
                           {"output", a.output_strides}}) {
    if (status && a.cu_seqlens == nullptr && a.rows > 1 &&
        x.strides.batch != a.tokens * x.strides.token) {
      return Status(std::string(x.name) +
                    ": expected rows one after the other, a batch stride of tokens = " +
                    std::to_string(a.tokens) + " times that of a token");
    }
  }
  return status;
}

Status can_implement(DecodeFoldArguments const& a) {
  Status status = check_pool(a.pool);
  if (status) {
    status = check_sizes(a);
  }
  return status ? check_given({{"slots", a.slots}, {"arrivals", a.arrivals}}) : status;
}

Status can_implement(DecodeCopyArguments const& a) {
  Status status = check_list(a.pool, a.count, {{"source", a.source}, {"target", a.target}});
  if (status && a.count > kMaxDecodeCopies) {
    return Status(got("count", a.count) + "at most " + std::to_string(kMaxDecodeCopies));
  }
  return status;
}

Status can_implement(DecodeResetArguments const& a) {
  return check_list(a.pool, a.count, {{"slots", a.slots}});
}

Status can_implement(DecodeRollbackArguments const& a) {
  return check_list(a.pool, a.count, {{"slots", a.slots}, {"tokens", a.tokens}});
}

std::size_t workspace_size(DecodeStepArguments const& arguments) {
  return check_sizes(arguments) ? DecodeStepPlan::make(arguments, multiprocessors()).workspace_bytes
                                : 0;
}

std::size_t workspace_size(DecodePrefillArguments const& arguments) {
  return check_sizes(arguments)
             ? DecodePrefillPlan::make(arguments, multiprocessors()).workspace_bytes
             : 0;
}

Status run(DecodeStepArguments const& arguments, void* workspace, CUstream_st* stream) {
  return run_planned<DecodeStepPlan>(arguments, workspace, stream,
                                     &CompiledKernels::run_decode_step);
}

Status run(DecodePrefillArguments const& arguments, void* workspace, CUstream_st* stream) {
  return run_planned<DecodePrefillPlan>(arguments, workspace, stream,
                                        &CompiledKernels::run_decode_prefill);
}

Status run(DecodeFoldArguments const& a, CUstream_st* stream) {
  Status const status = can_implement(a);
  return status ? find_compiled(configuration_of(a.pool))
                      ->run_decode_fold(DecodeFoldPlan::make(a, multiprocessors()), stream)
                : status;
}

Status run(DecodeCopyArguments const& a, CUstream_st* stream) {
  Status const status = can_implement(a);
  return status ? find_compiled(configuration_of(a.pool))->run_decode_copy(a, stream) : status;
}

Status run(DecodeResetArguments const& a, CUstream_st* stream) {
  Status const status = can_implement(a);
  return status ? find_compiled(configuration_of(a.pool))->run_decode_reset(a, stream) : status;
}

Status run(DecodeRollbackArguments const& a, CUstream_st* stream) {
  Status const status = can_implement(a);
  return status ? find_compiled(configuration_of(a.pool))->run_decode_rollback(a, stream) : status;
}

}  // namespace retention::device
