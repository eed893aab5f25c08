// The host side of the forward kernels: what is accepted, and which of those compiled runs it.

#include "retention/device/forward.hpp"

#include <cstdint>
#include <string>

#include "checks.hpp"
#include "compiled.hpp"
#include "retention/device/forward_plan.hpp"

namespace retention::device {

namespace {

Status check_pointers(ForwardArguments const& a) {
  struct Operand {
    char const* name;
    void const* data;
    Strides const& strides;
    bool optional = false;
  };
  for (Operand const& x : {Operand{"query", a.query, a.query_strides},
                           {"key", a.key, a.key_strides},
                           {"value", a.value, a.value_strides},
                           {"output", a.output, a.output_strides},
                           {"output_residual", a.output_residual, a.output_strides, true}}) {
    if (x.data == nullptr && !x.optional) {
      return Status(std::string(x.name) + ": got a null pointer");
    }
    Status const status =
        check_rows(x.name, x.data, 2, {x.strides.batch, x.strides.token, x.strides.head});
    if (!status) {
      return status;
    }
  }
  if (a.normalizer == nullptr) {
    return Status("normalizer: got a null pointer");
  }
  if ((a.initial_state == nullptr) != (a.initial_key_sum == nullptr)) {
    return Status("initial_state and initial_key_sum: expected both or neither");
  }
  if ((a.final_state == nullptr) != (a.final_key_sum == nullptr)) {
    return Status("final_state and final_key_sum: expected both or neither");
  }
  return {};
}

}  // namespace

Configuration configuration_of(ForwardArguments const& a) {
  return {a.element, a.head_dim, a.value_dim, a.degree};
}

Status check_sizes(ForwardArguments const& a) {
  if (!is_supported(a.head_dim, a.degree) || a.value_dim < 1) {
    return Status("head_dim, value_dim, degree: got " + std::to_string(a.head_dim) + ", " +
                  std::to_string(a.value_dim) + " and " + std::to_string(a.degree) +
                  ", expected a multiple of 8, a positive and a positive even number");
  }
  for (auto const& [name, value] : {std::pair{"sequences", a.sequences},
                                    {"tokens", a.tokens},
                                    {"heads", a.heads},
                                    {"query_heads", a.query_heads}}) {
    if (value < 1) {
      return Status(got(name, value) + "at least 1");
    }
  }
  constexpr int kMaxTokens = 1 << 30;  // sums of two positions fit 32 bits
  if (a.tokens > kMaxTokens) {
    return Status(got("tokens", a.tokens) + "at most " + std::to_string(kMaxTokens));
  }
  constexpr int kMaxHeads = 65535;
  if (a.heads > kMaxHeads) {
    return Status(got("heads", a.heads) + "at most " + std::to_string(kMaxHeads));
  }
  constexpr int kMaxGroup = 64;
  if (a.query_heads % a.heads != 0 || a.query_heads / a.heads > kMaxGroup) {
    return Status(got("query_heads", a.query_heads) +
                  "a multiple of heads = " + std::to_string(a.heads) + ", and at most " +
                  std::to_string(kMaxGroup) + " to one of them");
  }
  if (a.chunk_size < 0 || a.chunk_size % ForwardPlan::kTokenMultiple != 0) {
    return Status(got("chunk_size", a.chunk_size) + "0 or a positive multiple of " +
                  std::to_string(ForwardPlan::kTokenMultiple));
  }
  if (a.whole_until < 0) {
    return Status(got("whole_until", a.whole_until) + "0 or more");
  }
  if (a.segment_tokens < 0 ||
      (a.segment_tokens > 0 && (a.chunk_size == 0 || a.segment_tokens % a.chunk_size != 0))) {
    return Status(got("segment_tokens", a.segment_tokens) +
                  "0 or a positive multiple of a chunk_size that is given");
  }
  return {};
}

Status can_implement(ForwardArguments const& arguments) {
  Configuration const configuration = configuration_of(arguments);
  Status status = check_configuration(configuration);
  if (status) {
    status =
        check_shared_bytes(configuration, find_compiled(configuration)->forward_shared_bytes());
  }
  if (status) {
    status = check_sizes(arguments);
  }
  if (status) {
    status = check_pointers(arguments);
  }
  return status;
}

std::size_t workspace_size(ForwardArguments const& arguments) {
  return check_sizes(arguments) ? ForwardPlan::make(arguments, multiprocessors()).workspace_bytes
                                : 0;
}

int chunk_size(ForwardArguments const& arguments) {
  return check_sizes(arguments)
             ? ForwardPlan::make(arguments, multiprocessors()).arguments.chunk_size
             : 0;
}

namespace {

Status run_part(ForwardArguments const& arguments, ForwardPart part, OuterState const& earlier,
                void* workspace, CUstream_st* stream) {
  auto plan = ForwardPlan::make(arguments, multiprocessors());
  plan.part = part;
  plan.earlier = earlier;
  if (Status status = check_workspace(workspace, plan.workspace_bytes); !status) {
    return status;
  }
  return find_compiled(configuration_of(arguments))->run_forward(plan, workspace, stream);
}

}  // namespace

Status run(ForwardArguments const& arguments, void* workspace, CUstream_st* stream) {
  if (Status status = can_implement(arguments); !status) {
    return status;
  }
  return run_part(arguments, ForwardPart::kAll, {}, workspace, stream);
}

Status can_implement_parts(ForwardArguments const& arguments) {
  if (Status status = can_implement(arguments); !status) {
    return status;
  }
  if (arguments.element != ElementType::kBFloat16) {
    return Status("element: expected bf16 for a call in parts, got fp16");
  }
  if (arguments.initial_state == nullptr || arguments.final_state == nullptr) {
    return Status("initial_state, final_state: expected both for a call in parts");
  }
  return {};
}

Status run_states(ForwardArguments const& arguments, void* workspace, CUstream_st* stream) {
  if (Status status = can_implement_parts(arguments); !status) {
    return status;
  }
  return run_part(arguments, ForwardPart::kStates, {}, workspace, stream);
}

Status run_carry(ForwardArguments const& arguments, OuterState const& earlier, void* workspace,
                 CUstream_st* stream) {
  Status status = can_implement_parts(arguments);
  if (status) {
    status = check_outer("earlier", earlier);
  }
  return status ? run_part(arguments, ForwardPart::kCarry, earlier, workspace, stream) : status;
}

Status run_output(ForwardArguments const& arguments, void* workspace, CUstream_st* stream) {
  if (Status status = can_implement_parts(arguments); !status) {
    return status;
  }
  return run_part(arguments, ForwardPart::kOutput, {}, workspace, stream);
}

}  // namespace retention::device
