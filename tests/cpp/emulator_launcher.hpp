// Launching a kernel of kernel/ on the emulator.

#pragma once

#include <cstdint>

#include "emulator/emulator.hpp"
#include "retention/device/status.hpp"

namespace retention::test {

struct EmulatorLauncher {
  std::uint64_t seed;

  template <class Kernel>
  device::Status launch(typename Kernel::Params const& params) const {
    dim3 const grid = Kernel::grid(params);
    emulator::LaunchConfig const config{
        {grid.x, grid.y, grid.z}, {Kernel::kThreads}, sizeof(typename Kernel::SharedStorage), seed};
    auto const report = emulator::launch<Kernel>(config, params);
    return report.ok() ? device::Status{} : device::Status{report.text};
  }
};

}  // namespace retention::test
