// Which configurations were compiled, and what is said about the others.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "compiled.hpp"

namespace retention::device {

CompiledKernels const* find_compiled(Configuration const& configuration) {
  for (CompiledKernels const& compiled : compiled_kernels()) {
    if (compiled.configuration == configuration) {
      return &compiled;
    }
  }
  return nullptr;
}

std::vector<Configuration> compiled_configurations() {
  std::vector<Configuration> configurations;
  for (CompiledKernels const& compiled : compiled_kernels()) {
    configurations.push_back(compiled.configuration);
  }
  return configurations;
}

Status check_configuration(Configuration const& wanted) {
  if (find_compiled(wanted) != nullptr) {
    return {};
  }
  bool const known = std::find(std::begin(kConfigurations), std::end(kConfigurations), wanted) !=
                     std::end(kConfigurations);
  if (known && compiled_kernels().empty()) {
    return Status("this library was compiled without CUDA kernels");
  }
  if (known) {
    return Status("no kernel for " + to_string(wanted) + " was compiled into this library");
  }
  return Status("no kernel for " + to_string(wanted) +
                ": expected degree 2, head_dim and value_dim of 32, 64 or 128, and bf16 or fp16");
}

Status check_shared_bytes(Configuration const& configuration, kernel::SharedBytes const& either) {
  std::size_t const needed = may_have_warpgroups() ? either.warpgroups : either.warps;
  std::size_t const available = shared_bytes();
  if (needed <= available) {
    return {};
  }
  return Status("too little shared memory for " + to_string(configuration) + ": expected " +
                std::to_string(needed) + " bytes a block, this device has " +
                std::to_string(available));
}

}  // namespace retention::device
