// What tests of the host API run on the emulator: the kernels of the configuration that
// TEST_ELEMENT, TEST_HEAD_DIM and TEST_VALUE_DIM name. Once in a program of these tests.

#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "retention/configuration.hpp"
#include "run_plan.hpp"

namespace retention::test {

using ForwardKernels = device::ForwardKernels<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>;
using BackwardKernels = device::BackwardKernels<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>;
using DecodeKernels = device::DecodeKernels<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>;

/// Weak, for the Python module has the kernels of two, and asks neither.
[[gnu::weak]] std::vector<Configuration> configurations() {
  constexpr bool kIsBFloat16 = std::is_same_v<cute::TEST_ELEMENT, cute::bfloat16_t>;
  return {{kIsBFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16, TEST_HEAD_DIM,
           TEST_VALUE_DIM, 2}};
}

template <class Plan>
device::Status run_kernels(Plan const& plan, void* workspace, std::uint64_t seed) {
  if constexpr (std::is_same_v<Plan, device::ForwardPlan>) {
    return run_plan<ForwardKernels>(plan, workspace, seed);
  } else if constexpr (std::is_same_v<Plan, device::BackwardPlan>) {
    return run_plan<BackwardKernels>(plan, workspace, seed);
  } else if constexpr (std::is_same_v<Plan, device::DecodeStepPlan> ||
                       std::is_same_v<Plan, device::DecodePrefillPlan>) {
    return run_plan<DecodeKernels>(plan, workspace, seed);
  } else {
    return run_plan<DecodeKernels>(plan, seed);
  }
}

/// Launches nothing, and notes what would serve a gradient.
struct Recorder {
  std::string& kernels;

  template <class Kernel>
  device::Status launch(typename Kernel::Params const&) const {
    using All = BackwardKernels;
    auto const note = [&](char letter, bool is) { kernels += is ? std::string(1, letter) : ""; };
    note('s', std::is_same_v<Kernel, typename All::Forward::ChunkStates>);
    note('r', std::is_same_v<Kernel, kernel::StateRanges>);
    note('Q', std::is_same_v<Kernel, typename All::QueryGradient>);
    note('S', std::is_same_v<Kernel, typename All::StateGradients>);
    note('c', std::is_same_v<Kernel, typename All::Carry>);
    note('V', std::is_same_v<Kernel, typename All::ValueGradient>);
    note('K', std::is_same_v<Kernel, typename All::KeyGradient>);
    note('p', std::is_same_v<Kernel, typename All::StateProducts>);
    note('G', std::is_same_v<Kernel, kernel::GateGradient>);
    return {};
  }
};

template <class Plan>
device::Status record_kernels(Plan const& plan, std::string& kernels) {
  return BackwardKernels::run(plan, nullptr, Recorder{kernels});
}

}  // namespace retention::test
