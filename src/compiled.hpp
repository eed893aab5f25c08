// What was compiled into this library.

#pragma once

#include <vector>

#include "retention/device/forward_plan.hpp"

namespace retention::device {

struct CompiledForward {
  Configuration configuration;
  Status (*run)(ForwardPlan const& plan, void* workspace, CUstream_st* stream);
};

/// Defined in a source that the build generates from the table of configurations.
std::vector<CompiledForward> const& compiled_forward();

/// Of the current device; those of an H100 where there is none.
int multiprocessors();

}  // namespace retention::device
