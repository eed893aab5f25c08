// What was compiled into this library.

#pragma once

#include <cstddef>
#include <vector>

#include "retention/device/backward_plan.hpp"
#include "retention/device/decode_plan.hpp"
#include "retention/device/forward_plan.hpp"
#include "retention/kernel/launch_shape.hpp"

namespace retention::device {

struct CompiledKernels {
  Configuration configuration;
  Status (*run_forward)(ForwardPlan const& plan, void* workspace, CUstream_st* stream);
  Status (*run_backward)(BackwardPlan const& plan, void* workspace, CUstream_st* stream);
  Status (*run_decode_step)(DecodeStepPlan const& plan, void* workspace, CUstream_st* stream);
  Status (*run_decode_prefill)(DecodePrefillPlan const& plan, void* workspace, CUstream_st* stream);
  Status (*run_decode_fold)(DecodeFoldPlan const& plan, CUstream_st* stream);
  Status (*run_decode_copy)(DecodeCopyArguments const& arguments, CUstream_st* stream);
  Status (*run_decode_reset)(DecodeResetArguments const& arguments, CUstream_st* stream);
  Status (*run_decode_rollback)(DecodeRollbackArguments const& arguments, CUstream_st* stream);
  // Of shared memory, that a block of some kernel takes.
  kernel::SharedBytes (*forward_shared_bytes)();
  kernel::SharedBytes (*backward_shared_bytes)();
  kernel::SharedBytes (*decode_shared_bytes)();
};

/// Defined in a source that the build generates from the table of configurations.
std::vector<CompiledKernels> const& compiled_kernels();

/// Null where there are none.
CompiledKernels const* find_compiled(Configuration const& configuration);

Configuration configuration_of(ForwardArguments const& arguments);

/// Whether there are kernels for it, and if not, why.
Status check_configuration(Configuration const& configuration);

/// Whether there can be a plan for these sizes.
Status check_sizes(ForwardArguments const& arguments);

/// Of the current device; those of an H100 where there is none.
int multiprocessors();
/// Shared memory that a block can have on the current device, or on an H100.
std::size_t shared_bytes();
/// Whether code for the current device, or for an H100, may have main loops by wgmma.
bool may_have_warpgroups();

/// Whether the current device has as much for a block of kernels of this configuration.
Status check_shared_bytes(Configuration const& configuration, kernel::SharedBytes const& either);

}  // namespace retention::device
