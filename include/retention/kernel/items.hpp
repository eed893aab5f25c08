// Kernels whose blocks have one item of work each, such as a tile or a chunk. Such a `Kernel` has
//
//     grid(params)                 a block for every number that there may be; y: heads
//     turn_blocks(params)          how many of these are launched at most
//     count(params)                numbers that there are, on the device
//     work(params, smem, number)   for an item, if the number has one
//
// Numbers of packed sequences are bounded by their count, of which thousands may be empty or short.
// Idle blocks take their time as well: where the grid would be far larger than the tokens imply,
// fewer blocks take items in turns. That loop is a kernel of its own, since it would cost the main
// loops registers.
//
// A kernel may have a warpgroup that copies for the others, beside `work` of the first kRowThreads:
//
//     produce(params, smem, number)       its part of an item
//     kProducerRegisters, kRowRegisters   what a thread of either has, of those that a block was
//                                         launched with

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>

#include "retention/detail/named_barrier.hpp"
#include "retention/kernel/launch_shape.hpp"

namespace retention::kernel {

/// What a block does: Items::run<true> in threads that copy for the others, with fewer registers,
/// and Items::run<false> in those with rows.
template <class Kernel, class Items, class Params>
CUTE_DEVICE void run_in_roles(Params const& params, char* smem) {
  if constexpr (Kernel::kProduces) {
    if (static_cast<int>(threadIdx.x) >= Kernel::kRowThreads) {
      cutlass::arch::warpgroup_reg_dealloc<Kernel::kProducerRegisters>();
      Items::template run<true>(params, smem);
      return;
    }
    cutlass::arch::warpgroup_reg_alloc<Kernel::kRowRegisters>();
  }
  Items::template run<false>(params, smem);
}

/// What a thread does for an item.
template <class Kernel, bool kCopies, class Params>
CUTE_DEVICE void run_item(Params const& params, char* smem, int number) {
  if constexpr (kCopies) {
    Kernel::produce(params, smem, number);
  } else {
    Kernel::work(params, smem, number);
  }
}

/// An item a block.
template <class Kernel>
struct OneItem {
  static constexpr bool kTakesTurns = true;  // whether InTurns is an alternative
  static constexpr bool kProduces = false;   // whether there is a warpgroup that copies

  template <class Params>
  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    run_in_roles<Kernel, OneItem>(params, smem);
  }

  template <bool kCopies, class Params>
  CUTE_DEVICE static void run(Params const& params, char* smem) {
    if (int const number = blockIdx.x; number < Kernel::count(params)) {
      run_item<Kernel, kCopies>(params, smem, number);
    }
  }
};

/// The same kernel in turns: a block has every gridDim.x-th item from its own on.
template <class Kernel>
struct InTurns {
  using Params = typename Kernel::Params;
  template <class KernelStorage, int Threads>
  struct Storage {
    KernelStorage kernel;
    // Where the block is, each warp's own: the work has no register to spare.
    int numbers[Threads / 32];
  };
  using SharedStorage = Storage<typename Kernel::SharedStorage, Kernel::kThreads>;
  template <bool Warpgroups>
  using StorageOf =
      Storage<SharedStorageOf<Kernel, Warpgroups>, LaunchShape<Kernel, Warpgroups>::kThreads>;
  template <bool Warpgroups>
  static constexpr int kThreadsOf = LaunchShape<Kernel, Warpgroups>::kThreads;
  static constexpr int kThreads = Kernel::kThreads;
  // With some more registers, for where a block is, but where they are dealt out.
  static constexpr int kMinBlocks =
      Kernel::kProduces ? Kernel::kMinBlocks : std::max(1, Kernel::kMinBlocks - 1);

  template <bool Warpgroups>
  CUTE_HOST static dim3 grid_of(Params const& params) {
    return in_turns(params, LaunchShape<Kernel, Warpgroups>::grid(params));
  }
  CUTE_HOST static dim3 grid(Params const& params) {
    return in_turns(params, Kernel::grid(params));
  }
  CUTE_HOST static bool pays(Params const& params) {
    return grid(params).x < Kernel::grid(params).x;
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    run_in_roles<Kernel, InTurns>(params, smem);
  }

  template <bool kCopies>
  CUTE_DEVICE static void run(Params const& params, char* smem) {
    auto& numbers = reinterpret_cast<SharedStorage*>(smem)->numbers;
    int number = blockIdx.x;
#pragma unroll 1
    while (number < Kernel::count(params)) {
      if (threadIdx.x % 32 == 0) {
        numbers[threadIdx.x / 32] = number;
      }
      run_item<Kernel, kCopies>(params, smem, number);
      detail::wait_at_barrier(0, Kernel::kThreads);  // shared memory is free
      number = numbers[threadIdx.x / 32] + static_cast<int>(gridDim.x);
      __syncwarp();
    }
  }

 private:
  CUTE_HOST static dim3 in_turns(Params const& params, dim3 grid) {
    grid.x = static_cast<unsigned>(
        std::min(std::int64_t{grid.x}, std::int64_t{Kernel::turn_blocks(params)}));
    return grid;
  }
};

/// Of a kernel that may run in turns, in either way.
template <class Kernel>
constexpr SharedBytes items_shared_bytes() {
  if constexpr (Kernel::kTakesTurns) {
    return SharedBytes::of<InTurns<Kernel>>();
  } else {
    return SharedBytes::of<Kernel>();
  }
}

}  // namespace retention::kernel
