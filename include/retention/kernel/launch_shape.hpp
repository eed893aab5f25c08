// What a block takes, and how many there are: of some kernels another thing with main loops by
// Hopper's wgmma. The host that launches them does not know which it is from the type, for it is
// compiled once.

#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <type_traits>

namespace retention::kernel {

/// What a block has in shared memory with main loops by wgmma or without. Where that differs,
/// Kernel::StorageOf<bool> tells; Kernel::SharedStorage is that of the device compiled for.
template <class Kernel, bool Warpgroups, class = void>
struct SharedStorageFor {
  using type = typename Kernel::SharedStorage;
};
template <class Kernel, bool Warpgroups>
struct SharedStorageFor<Kernel, Warpgroups,
                        std::void_t<typename Kernel::template StorageOf<Warpgroups>>> {
  using type = typename Kernel::template StorageOf<Warpgroups>;
};
template <class Kernel, bool Warpgroups>
using SharedStorageOf = typename SharedStorageFor<Kernel, Warpgroups>::type;

/// Threads of a block, and the grid, with main loops by wgmma or without. Where they differ,
/// Kernel::kThreadsOf<bool> and Kernel::grid_of<bool> tell; Kernel::kThreads and Kernel::grid are
/// those of the device compiled for.
template <class Kernel, bool Warpgroups, class = void>
struct LaunchShape {
  static constexpr int kThreads = Kernel::kThreads;
  template <class Params>
  static auto grid(Params const& params) {
    return Kernel::grid(params);
  }
};
template <class Kernel, bool Warpgroups>
struct LaunchShape<Kernel, Warpgroups,
                   std::void_t<decltype(Kernel::template kThreadsOf<Warpgroups>)>> {
  static constexpr int kThreads = Kernel::template kThreadsOf<Warpgroups>;
  template <class Params>
  static auto grid(Params const& params) {
    return Kernel::template grid_of<Warpgroups>(params);
  }
};

struct SharedBytes {
  std::size_t warpgroups;  // with main loops by wgmma
  std::size_t warps;

  template <class Kernel>
  static constexpr SharedBytes of() {
    return {sizeof(SharedStorageOf<Kernel, true>), sizeof(SharedStorageOf<Kernel, false>)};
  }
  static constexpr SharedBytes most(std::initializer_list<SharedBytes> all) {
    SharedBytes most{0, 0};
    for (SharedBytes const& x : all) {
      most = {std::max(most.warpgroups, x.warpgroups), std::max(most.warps, x.warps)};
    }
    return most;
  }
};

}  // namespace retention::kernel
