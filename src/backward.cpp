// The host side of the backward kernels.

#include "retention/device/backward.hpp"

#include <cstdint>
#include <string>

#include "checks.hpp"
#include "compiled.hpp"
#include "retention/device/backward_plan.hpp"

namespace retention::device {

namespace {

Status check_backward(BackwardArguments const& a) {
  struct Pointer {
    char const* name;
    void const* data;
  };
  for (Pointer const& x :
       {Pointer{"output_residual", a.forward.output_residual}, {"d_output", a.d_output}}) {
    if (x.data == nullptr || !is_aligned(x.data)) {
      return Status(std::string(x.name) + ": expected a 16-byte aligned pointer, not null");
    }
  }
  if (a.forward_workspace != nullptr && a.forward.discards_workspace) {
    return Status("forward_workspace: expected null where forward.discards_workspace");
  }
  bool wanted = a.d_log_gate != nullptr;  // which is written by elements
  for (Pointer const& x : {Pointer{"d_query", a.d_query},
                           {"d_key", a.d_key},
                           {"d_value", a.d_value},
                           {"d_initial_state", a.d_initial_state},
                           {"d_initial_key_sum", a.d_initial_key_sum}}) {
    if (!is_aligned(x.data)) {
      return Status(std::string(x.name) + ": expected a 16-byte aligned pointer, or null");
    }
    wanted = wanted || x.data != nullptr;
  }
  if (!wanted) {
    return Status("gradients: got null pointers alone, expected one that is wanted");
  }
  Strides const& strides = a.d_output_strides;
  if (!are_aligned({strides.batch, strides.token, strides.head}, 2)) {
    return Status("d_output: expected strides that are multiples of 8");
  }
  if ((a.d_final_state == nullptr) != (a.d_final_key_sum == nullptr)) {
    return Status("d_final_state and d_final_key_sum: expected both or neither");
  }
  if ((a.d_initial_state == nullptr) != (a.d_initial_key_sum == nullptr)) {
    return Status("d_initial_state and d_initial_key_sum: expected both or neither");
  }
  if (a.d_initial_state != nullptr && a.forward.initial_state == nullptr) {
    return Status("d_initial_state: expected null where there is no initial_state");
  }
  if (a.d_log_gate != nullptr && a.forward.log_gate == nullptr) {
    return Status("d_log_gate: expected null where there is no log_gate");
  }
  return {};
}

}  // namespace

Status can_implement(BackwardArguments const& arguments) {
  Status status = can_implement(arguments.forward);
  if (status) {
    CompiledKernels const& compiled = *find_compiled(configuration_of(arguments.forward));
    status = check_shared_bytes(compiled.configuration, compiled.backward_shared_bytes());
  }
  return status ? check_backward(arguments) : status;
}

std::size_t workspace_size(BackwardArguments const& arguments) {
  // Sizes that make no sense have no plan.
  return check_sizes(arguments.forward)
             ? BackwardPlan::make(arguments, multiprocessors()).workspace_bytes
             : 0;
}

namespace {

Status run_part(BackwardArguments const& arguments, BackwardPart part, OuterState const& later,
                void* workspace, CUstream_st* stream) {
  for (void const* memory : {static_cast<void const*>(workspace), arguments.forward_workspace}) {
    if (!is_aligned(memory, Regions::kAlignment)) {
      return Status("workspace, forward_workspace: expected memory aligned to 256 bytes");
    }
  }
  if (workspace == nullptr) {
    return Status("workspace: got a null pointer");
  }
  auto const plan = BackwardPlan::make(arguments, multiprocessors(), part, later);
  return find_compiled(configuration_of(arguments.forward))->run_backward(plan, workspace, stream);
}

}  // namespace

Status run(BackwardArguments const& arguments, void* workspace, CUstream_st* stream) {
  if (Status status = can_implement(arguments); !status) {
    return status;
  }
  return run_part(arguments, BackwardPart::kAll, {}, workspace, stream);
}

Status can_implement_parts(BackwardArguments const& arguments) {
  if (Status status = can_implement(arguments); !status) {
    return status;
  }
  if (arguments.forward.element != ElementType::kBFloat16) {
    return Status("element: expected bf16 for a call in parts, got fp16");
  }
  if (arguments.d_final_state == nullptr || arguments.d_initial_state == nullptr) {
    return Status("d_final_state, d_initial_state: expected both for a call in parts");
  }
  return {};
}

std::size_t parts_workspace_size(BackwardArguments const& arguments) {
  return check_sizes(arguments.forward)
             ? BackwardPlan::make(arguments, multiprocessors(), BackwardPart::kStateGradients)
                   .workspace_bytes
             : 0;
}

Status run_state_gradients(BackwardArguments const& arguments, void* workspace,
                           CUstream_st* stream) {
  if (Status status = can_implement_parts(arguments); !status) {
    return status;
  }
  return run_part(arguments, BackwardPart::kStateGradients, {}, workspace, stream);
}

Status run_query_gradient(BackwardArguments const& arguments, void* workspace,
                          CUstream_st* stream) {
  if (Status status = can_implement_parts(arguments); !status) {
    return status;
  }
  return run_part(arguments, BackwardPart::kQueryGradient, {}, workspace, stream);
}

Status run_key_gradients(BackwardArguments const& arguments, OuterState const& later,
                         void* workspace, CUstream_st* stream) {
  Status status = can_implement_parts(arguments);
  if (status) {
    status = check_outer("later", later);
  }
  return status ? run_part(arguments, BackwardPart::kKeyGradients, later, workspace, stream)
                : status;
}

}  // namespace retention::device
