// Running a call of the host API on the emulator, as its plan has it.

#pragma once

#include <cstdint>

#include "emulator_launcher.hpp"
#include "retention/device/backward_kernels.hpp"
#include "retention/device/decode_kernels.hpp"
#include "retention/device/forward_kernels.hpp"

namespace retention::test {

template <class Kernels, class Plan>
device::Status run_plan(Plan const& plan, void* workspace, std::uint64_t seed) {
  return Kernels::run(plan, workspace, EmulatorLauncher{seed});
}

/// One that takes no workspace.
template <class Kernels, class Plan>
device::Status run_plan(Plan const& plan, std::uint64_t seed) {
  return Kernels::run(plan, EmulatorLauncher{seed});
}

}  // namespace retention::test

// All of them, with all kernels of a configuration; `extern` where these are compiled elsewhere.
#define RETENTION_RUN_PLANS(linkage, Forward, Backward, Decode)        \
  RETENTION_RUN_PLAN(linkage, Forward, ForwardPlan const&, void*)      \
  RETENTION_RUN_PLAN(linkage, Backward, BackwardPlan const&, void*)    \
  RETENTION_RUN_PLAN(linkage, Decode, DecodeStepPlan const&, void*)    \
  RETENTION_RUN_PLAN(linkage, Decode, DecodePrefillPlan const&, void*) \
  RETENTION_RUN_PLAN(linkage, Decode, DecodeFoldPlan const&)           \
  RETENTION_RUN_PLAN(linkage, Decode, DecodeCopyArguments const&)      \
  RETENTION_RUN_PLAN(linkage, Decode, DecodeResetArguments const&)     \
  RETENTION_RUN_PLAN(linkage, Decode, DecodeRollbackArguments const&)
#define RETENTION_RUN_PLAN(linkage, Kernels, ...) \
  linkage template device::Status run_plan<Kernels>(device::__VA_ARGS__, std::uint64_t);
