// What was compiled into this library.

#pragma once

#include <vector>

#include "retention/device/backward_plan.hpp"
#include "retention/device/forward_plan.hpp"

namespace retention::device {

struct CompiledKernels {
  Configuration configuration;
  Status (*run_forward)(ForwardPlan const& plan, void* workspace, CUstream_st* stream);
  Status (*run_backward)(BackwardPlan const& plan, void* workspace, CUstream_st* stream);
};

/// Defined in a source that the build generates from the table of configurations.
std::vector<CompiledKernels> const& compiled_kernels();

/// Those for a call; null where there are none.
CompiledKernels const* find_compiled(ForwardArguments const& arguments);

/// Whether there can be a plan for these sizes.
Status check_sizes(ForwardArguments const& arguments);

/// Of the current device; those of an H100 where there is none.
int multiprocessors();

}  // namespace retention::device
