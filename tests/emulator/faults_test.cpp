// Kernels broken on purpose, one mistake each: the emulator must name it, whatever the schedule,
// and must pass the same kernel without the mistake.

#include <algorithm>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <initializer_list>
#include <iostream>
#include <string>
#include <utility>

#include "check.hpp"
#include "emulator/emulator.hpp"

namespace {

using emulator::Fault;
using emulator::GlobalArray;
using emulator::Report;

enum class Mistake {
  kNone,
  kNoBarrierAfterStore,   // neighbours read before the barrier
  kNoBarrierBeforeReuse,  // the second tile overwrites what neighbours still read
  kNoWait,                // cp.async never waited for
  kWaitTooEarly,          // one group too many left in flight
  kRowTooFar,             // reads the row after the last of the array
  kRowBefore,             // reads the row before the first
  kStorePastEnd,
  kStoreToInput,
  kStorePastShared,
  kSharedOffByOneRow,  // reads a row of shared memory that this stage never filled
  kMisaligned,
  kHalfBarrier,  // only some of the threads reach the barrier
  kHalfArrival,  // likewise, and none of them waits there
  kTwoBarriers,  // one warp meets the others at another barrier than theirs
  kDivergent,    // some lanes shuffle while others vote
  kMissingLane,  // a lane skips a warp-wide instruction
  kNoWarpSync,   // ldmatrix right after the lanes stored their rows
  kTwoBlocks,    // two blocks store to one place
  kNullPointer,
  kUninstrumented,  // a store past the end that the compiler did not announce
  // Of ExchangeKernel: global memory, and threads of one block.
  kSameWord,        // two threads store to one word
  kSameValue,       // the same, with one value
  kSameHalfWord,    // one stores a half of a word, the other all of it
  kReadTooEarly,    // no barrier before another thread's word is read
  kWriteTooEarly,   // none before a word is overwritten that another thread reads
  kShuffleInstead,  // a warp-wide instruction that orders nothing, where __syncwarp would do
  // Of WarpgroupKernel, and some of the above: wgmma.
  kNoFence,                   // fence.proxy.async left out
  kFenceTooLate,              // after the barrier
  kFenceTooEarly,             // before what it is for
  kFenceOfReader,             // one warp's stores fenced by the others alone
  kNoArrive,                  // no wgmma.fence
  kNoArriveAgain,             // none after the first products were waited for
  kNoCommit,                  // a group left open, which no wait is for
  kNoProductWait,             // accumulators read at once
  kProductWaitTooEarly,       // one group too many left in flight
  kAccumulatorWritten,        // an accumulator set while in flight
  kLeftInFlight,              // the block ends before its products
  kOtherShape,                // a product on half of the accumulators of another in flight
  kOverwrittenInFlight,       // B overwritten, all barriers in place, before the wait
  kNoBarrierBeforeOverwrite,  // and after the wait, before other warps had theirs
  kTileMisaligned,            // B at a multiple of 512 bytes
  kTilePastRow,               // K across the end of a row
  kTilePastShared,
  kTileUnfilled,    // a row of B that nobody wrote
  kMissingWarp,     // three warps of a warpgroup
  kHalfWarpgroup,   // a block of two warps
  kTwoDescriptors,  // lanes of a warp that give two
  // Of ArrivalKernel: the last block of a group adds up what all have stored.
  kNoFenceOfWriter,
  kFenceBeforeStore,      // the writer's, before what it is for
  kFenceOfOneThread,      // thread 0 alone, before the barrier
  kFenceOfWriterTooLate,  // after the atomic
  kNoFenceOfReader,
  kFenceOfReaderTooEarly,  // before the atomic
  kNoBarrierBeforeAtomic,
  kNoBarrierAfterAtomic,  // a shuffle instead
  kReadByAll,             // not by the last block to arrive alone
  kReadOfOtherGroup,      // by the last of another group
  kCounterPerBlock,       // atomics at different places
  kStoreToCounter,        // an ordinary one, before the atomics
  kLoadOfCounter,         // an ordinary one, by all blocks
  kStoreAfterAtomic,      // to what the last block reads
  kOverwrittenByFirst,    // what all blocks read: by the first one to arrive
  kOverwrittenByOther,    // by the last of another group
  kOverwrittenTooEarly,   // by the last, before its fence
  kAtomicPastEnd,
  kAtomicMisaligned,
  kAtomicToInput,
  kNoFences,  // of MeetingKernel
};

// Where the fences of ArrivalKernel are, and how its counter gets back to 0: all of these are
// right.
enum class Style {
  kAllFence,     // every thread, before the barrier and after it; atomicInc
  kOneFences,    // thread 0, on either side of its atomic, between the barriers
  kStoredReset,  // the last block stores 0
  kExchange,     // the last block's atomicExch
};

__attribute__((no_sanitize("thread"), noinline)) void store_unannounced(float* address) {
  *static_cast<float volatile*>(address) = 1.0f;
}

// Two tiles of [64 rows, 4 floats] through one shared buffer each; every thread copies its own row
// and adds its neighbour's to it.
template <Mistake M>
struct TileKernel {
  static constexpr int kRows = 64;

  struct Params {
    float const* in;  // [2, kRows, 4]
    float* out;       // [grid, 2, kRows, 4]
  };

  void operator()(Params const& p, char* smem) const {
    int const row = threadIdx.x;
    auto* buffer = reinterpret_cast<float*>(smem);  // [kRows, 4]
    int const block = M == Mistake::kTwoBlocks ? 0 : static_cast<int>(blockIdx.x);
    float* out = p.out + block * 2 * kRows * 4;
    for (int tile = 0; tile < 2; ++tile) {
      int const shift = M == Mistake::kRowTooFar ? 1 : M == Mistake::kRowBefore ? -1 : 0;
      float const* source = p.in + (tile * kRows + row + shift) * 4;
      if (M == Mistake::kNullPointer) {
        source = nullptr;
      }
      auto& target = *reinterpret_cast<cute::uint128_t*>(buffer + row * 4 +
                                                         (M == Mistake::kMisaligned ? 2 : 0));
      if (!(M == Mistake::kSharedOffByOneRow && row == 0)) {
        cute::SM80_CP_ASYNC_CACHEALWAYS<cute::uint128_t>::copy(
            *reinterpret_cast<cute::uint128_t const*>(source), target);
      }
      cute::cp_async_fence();
      if (M == Mistake::kWaitTooEarly) {
        cute::cp_async_wait<1>();
      } else if (M != Mistake::kNoWait) {
        cute::cp_async_wait<0>();
      }
      if (M != Mistake::kNoBarrierAfterStore) {
        __syncthreads();
      }
      float value[4];
      for (int i = 0; i < 4; ++i) {
        value[i] = buffer[row * 4 + i] + buffer[(row + 1) % kRows * 4 + i];
      }
      if (M == Mistake::kDivergent && row % 2 == 0) {
        value[0] += static_cast<float>(__ballot_sync(0xffffffffu, 1) & 0);
      } else if (!(M == Mistake::kMissingLane && row == 5)) {
        value[0] += 0 * __shfl_xor_sync(0xffffffffu, value[0], 1);
      }
      if (M != Mistake::kNoBarrierBeforeReuse) {
        __syncthreads();
      }
      bool const last = tile == 1 && blockIdx.x == 1;
      float* target_row =
          out + (tile * kRows + row) * 4 + (M == Mistake::kStorePastEnd && last ? 4 : 0);
      if (M == Mistake::kStoreToInput) {
        target_row = const_cast<float*>(p.in) + row * 4;
      }
      for (int i = 0; i < 4; ++i) {
        target_row[i] = value[i];
      }
      if (M == Mistake::kStorePastShared && tile == 1) {
        buffer[kRows * 4 + row] = value[0];
      }
    }
    if (M == Mistake::kTwoBarriers) {
      if (row < 32) {
        __syncthreads();
        out[row * 4] += 0.0f;
      } else {
        __syncthreads();
        out[row * 4] -= 0.0f;
      }
    }
    if (M == Mistake::kHalfBarrier && row < 32) {
      __syncthreads();
    }
    if (M == Mistake::kHalfArrival && row < 32) {
      __barrier_arrive_count(1, 64);
    }
    if (M == Mistake::kUninstrumented && row == 63) {
      store_unannounced(p.out + 2 * 2 * kRows * 4 + row);
    }
    if (M == Mistake::kNoWarpSync) {
      for (int i = 0; i < 4; ++i) {
        buffer[row * 4 + i] = 0.0f;
      }
      uint32_t r[4];
      cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<cute::uint128_t const*>(buffer + row * 4),
                                    r[0], r[1], r[2], r[3]);
      out[row * 4] += static_cast<float>(r[0]);
    }
  }
};

// Every thread reads what a thread of another warp, and one of its own, stored to global memory,
// then overwrites its word.
template <Mistake M>
struct ExchangeKernel {
  static constexpr int kThreads = 64;

  struct Params {
    int* words;  // [grid, kThreads]
    int* sums;   // [grid, kThreads]
  };

  void operator()(Params const& p, char*) const {
    int const thread = threadIdx.x;
    int* words = p.words + blockIdx.x * kThreads;
    int* sum = p.sums + blockIdx.x * kThreads + thread;
    if (M == Mistake::kSameWord || M == Mistake::kSameValue) {
      words[thread % 32] = M == Mistake::kSameValue ? 1 : thread;
    } else if (M == Mistake::kSameHalfWord && thread >= 32) {
      reinterpret_cast<short*>(words)[2 * (thread - 32) + 1] = 1;
    } else {
      words[thread] = thread;
    }
    if (M != Mistake::kShuffleInstead) {
      __syncwarp();
    } else {
      __shfl_xor_sync(0xffffffffu, thread, 1);
    }
    *sum = words[thread ^ 1];
    if (M != Mistake::kReadTooEarly) {
      __syncthreads();
    }
    *sum += words[thread ^ 32];
    if (M == Mistake::kWriteTooEarly && thread == 5) {
      words[thread] = -thread;  // alone, so that in some schedules its reader was there before
    }
    __syncthreads();
    words[thread] = -thread;
  }
};

// Every block of a group stores a row; the last one to arrive adds them up, and overwrites them.
template <Mistake M, Style S>
struct ArrivalKernel {
  // A shuffle takes the place of a barrier in one warp only.
  static constexpr int kThreads = M == Mistake::kNoBarrierAfterAtomic ? 32 : 64;
  static constexpr int kBlocks = 3, kGroups = 2;

  struct Params {
    int const* input;    // [kBlocks]
    int* parts;          // [kGroups, kBlocks, kThreads]
    unsigned* counters;  // [kGroups (1 + kBlocks)]: 0 before and after
    int* sums;           // [kGroups, kThreads]
    int* totals;         // [kGroups, kThreads]: of the launches
  };

  // Of every thread, and of the one that counts, `outer` of them away from the barrier.
  static void fence(bool outer, bool takes_part) {
    if (takes_part && outer == (S != Style::kOneFences)) {
      __threadfence();
    }
  }

  static unsigned count(unsigned* counter) {
    return S == Style::kAllFence || S == Style::kOneFences ? atomicInc(counter, kBlocks - 1)
                                                           : atomicAdd(counter, 1u);
  }

  void operator()(Params const& p, char* smem) const {
    int const thread = threadIdx.x, block = blockIdx.x, group = blockIdx.y;
    auto* last = reinterpret_cast<int*>(smem);
    int* parts = p.parts + group * kBlocks * kThreads;
    unsigned* counter = p.counters + group;
    constexpr bool kWriterFences = M != Mistake::kNoFenceOfWriter &&
                                   M != Mistake::kFenceBeforeStore &&
                                   M != Mistake::kFenceOfWriterTooLate;
    constexpr bool kReaderFences =
        M != Mistake::kNoFenceOfReader && M != Mistake::kFenceOfReaderTooEarly;

    if (M == Mistake::kStoreToCounter && thread == 0) {
      *counter = 0;
    }
    if (M == Mistake::kFenceBeforeStore) {
      __threadfence();
    }
    int const before = p.totals[group * kThreads + thread];
    parts[block * kThreads + thread] = (block + 1) * (thread + 1);
    fence(true, kWriterFences && !(M == Mistake::kFenceOfOneThread && thread != 0));
    if (M != Mistake::kNoBarrierBeforeAtomic) {
      __syncthreads();
    }
    int is_last = 0;
    if (thread == 0) {
      fence(false, kWriterFences || M == Mistake::kFenceOfReaderTooEarly);
      if (M == Mistake::kFenceOfReaderTooEarly) {
        __threadfence();
      }
      if (M == Mistake::kAtomicPastEnd) {
        counter = p.counters + kGroups * (1 + kBlocks);
      } else if (M == Mistake::kAtomicMisaligned) {
        counter = reinterpret_cast<unsigned*>(reinterpret_cast<char*>(p.counters) + 2);
      } else if (M == Mistake::kAtomicToInput) {
        counter = reinterpret_cast<unsigned*>(const_cast<int*>(p.input));
      } else if (M == Mistake::kCounterPerBlock) {
        counter = p.counters + kGroups + group * kBlocks + block;
      }
      unsigned const arrived = count(counter);
      is_last = arrived == kBlocks - 1;
      fence(false, kReaderFences);
      if ((M == Mistake::kOverwrittenByFirst && arrived == 0) ||
          (M == Mistake::kOverwrittenTooEarly && is_last)) {
        p.totals[group * kThreads + 5] = before;
      }
      *last = is_last;
    }
    if (M == Mistake::kFenceOfWriterTooLate) {
      __threadfence();
    }
    if (M == Mistake::kStoreAfterAtomic && !is_last) {
      parts[block * kThreads + thread] = (block + 1) * (thread + 1);
    }
    if (M != Mistake::kNoBarrierAfterAtomic) {
      __syncthreads();
      is_last = *last;
    } else {
      is_last = __shfl_sync(0xffffffffu, is_last, 0);
    }
    fence(true, kReaderFences);
    if (M == Mistake::kLoadOfCounter && thread == 0 && *counter == 0) {
      p.sums[group * kThreads] = 0;
    }
    if (is_last || M == Mistake::kReadByAll || M == Mistake::kCounterPerBlock) {
      if (M == Mistake::kReadOfOtherGroup) {
        parts = p.parts + (group + 1) % kGroups * kBlocks * kThreads;
      }
      int sum = 0;
      for (int b = 0; b < kBlocks; ++b) {
        int& part = parts[b * kThreads + (thread + 1) % kThreads];
        sum += part;
        part = 0;
      }
      p.sums[group * kThreads + thread] = sum;
      if (is_last && M != Mistake::kOverwrittenByFirst) {
        int const g = M == Mistake::kOverwrittenByOther ? (group + 1) % kGroups : group;
        p.totals[g * kThreads + thread] = before + sum;
      }
      if (thread == 0 && S == Style::kStoredReset) {
        *counter = 0;
      } else if (thread == 0 && S == Style::kExchange) {
        atomicExch(counter, 0u);
      }
    }
  }
};

// Two threads of one block that meet at an atomic.
template <Mistake M>
struct MeetingKernel {
  struct Params {
    int* note;
    unsigned* flag;  // 0
  };
  void operator()(Params const& p, char*) const {
    bool const fences = M != Mistake::kNoFences;
    if (threadIdx.x == 63) {
      *p.note = 1;
      if (fences) {
        __threadfence();
      }
      atomicExch(p.flag, 1u);
    } else if (threadIdx.x == 5 && (atomicAdd(p.flag, 0u) == 1 || !fences)) {
      if (fences) {
        __threadfence();
      }
      *p.note = 2;
    }
  }
};

// Two steps, each of which loads B [32, 64], one warp by stores and the others by cp.async, and
// multiplies by its halves in two groups. A is all ones.
template <Mistake M>
struct WarpgroupKernel {
  static constexpr int kRows = 32, kTileBytes = kRows * 128;

  struct Params {
    uint16_t const* b;  // [2, kRows, 64]: bf16
    float* out;         // [threads, 2]: sums over a thread's accumulators, of either group
  };

  using Product = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K,
                                                                cute::SM90::GMMA::Major::MN>;
  using NarrowProduct = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K,
                                                                      cute::SM90::GMMA::Major::K>;

  template <class Operation, std::size_t... I>
  static void multiply(uint64_t b, float* c, std::index_sequence<I...>) {
    uint32_t const ones = 0x3f803f80;
    Operation::fma(ones, ones, ones, ones, b, c[I]..., cute::SM90::GMMA::ScaleOut::One);
  }

  void operator()(Params const& p, char* smem) const {
    int const thread = threadIdx.x, threads = blockDim.x;
    char* tile = smem + 1024;
    if (M == Mistake::kTileMisaligned) {
      tile += 512;
    } else if (M == Mistake::kTilePastShared) {
      tile += 1024;
    }
    cute::GmmaDescriptor descriptor;
    descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(tile) >> 4 & 0x3fff;
    descriptor.bitfield.stride_byte_offset_ = 1024 / 16;
    descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
    if (M == Mistake::kTilePastRow || (M == Mistake::kTwoDescriptors && thread % 32 == 7)) {
      descriptor.desc_ += 1;
    }
    uint64_t const b = descriptor;
    float c[2][32] = {};
    for (int step = 0; step < 2; ++step) {
      auto fence = [&](bool here) {
        if (here && !(M == Mistake::kFenceOfReader && thread < 32)) {
          cute::tma_store_fence();
        }
      };
      fence(M == Mistake::kFenceTooEarly);
      for (int i = thread; i < kRows * 8; i += threads) {
        auto const* source = reinterpret_cast<cute::uint128_t const*>(p.b + step * kRows * 64) + i;
        // Which columns are where does not matter to the sum.
        auto* target = reinterpret_cast<cute::uint128_t*>(smem + 1024) + i;
        if (M == Mistake::kTileUnfilled && i / 8 == 29) {
          continue;
        }
        if (thread < 32) {
          *target = *source;
        } else {
          cute::SM80_CP_ASYNC_CACHEALWAYS<cute::uint128_t>::copy(*source, *target);
        }
      }
      cute::cp_async_fence();
      if (M != Mistake::kNoWait) {
        cute::cp_async_wait<0>();
      }
      fence(M != Mistake::kNoFence && M != Mistake::kFenceTooLate && M != Mistake::kFenceTooEarly);
      if (M != Mistake::kNoBarrierAfterStore) {
        __syncthreads();
      }
      fence(M == Mistake::kFenceTooLate);

      bool const takes_part = !(M == Mistake::kMissingWarp && thread / 32 == 2);
      if (takes_part) {
        if (M != Mistake::kNoArrive && !(M == Mistake::kNoArriveAgain && step == 1)) {
          cute::warpgroup_arrive();
        }
        if (!(M == Mistake::kMissingLane && thread == 5)) {
          multiply<Product>(b, c[0], std::make_index_sequence<32>{});
        }
        cute::warpgroup_commit_batch();
        if (M == Mistake::kOtherShape) {
          multiply<NarrowProduct>(b, c[0], std::make_index_sequence<16>{});
        } else {
          multiply<Product>(b + 2048 / 16, c[1], std::make_index_sequence<32>{});
        }
        if (!(M == Mistake::kNoCommit && step == 1)) {
          cute::warpgroup_commit_batch();
        }
        if (M == Mistake::kAccumulatorWritten) {
          c[1][3] = 0.0f;
        }
        if (M == Mistake::kLeftInFlight && step == 1) {
          return;
        }
        if (M == Mistake::kOverwrittenInFlight) {
          __syncthreads();
          *reinterpret_cast<int*>(smem + 1024 + 4 * thread) = 0;
          cute::tma_store_fence();
          __syncthreads();
        }
        if (M == Mistake::kProductWaitTooEarly && step == 1) {
          cute::warpgroup_wait<1>();
        } else if (M != Mistake::kNoProductWait) {
          cute::warpgroup_wait<0>();
        }
      }
      if (M != Mistake::kNoBarrierBeforeOverwrite) {
        __syncthreads();
      }
    }
    float sums[2] = {};
    for (int i = 0; i < 32; ++i) {
      sums[0] += c[0][i];
      sums[1] += c[1][i];
    }
    p.out[2 * thread] = sums[0];
    p.out[2 * thread + 1] = sums[1];
  }
};

// A product of two tiles [64, 64] of ones in shared memory. Mistakes are with the rows of A alone.
template <Mistake M>
struct SharedRowsKernel {
  static constexpr int kTileBytes = 64 * 128;

  struct Params {
    float* out;  // [threads]: sums over a thread's accumulators
  };

  using Product = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K,
                                                                cute::SM90::GMMA::Major::K>;

  template <std::size_t... I>
  static void multiply(uint64_t a, uint64_t b, float* c, std::index_sequence<I...>) {
    Product::fma(a, b, c[I]..., cute::SM90::GMMA::ScaleOut::Zero);
  }

  static uint64_t descriptor(char const* tile) {
    cute::GmmaDescriptor descriptor;
    descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(tile) >> 4 & 0x3fff;
    descriptor.bitfield.stride_byte_offset_ = 1024 / 16;
    descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
    return descriptor;
  }

  void operator()(Params const& p, char* smem) const {
    int const thread = threadIdx.x;
    auto fill = [&](char* tile) {
      for (int i = thread; i < kTileBytes / 4; i += blockDim.x) {
        if (M != Mistake::kTileUnfilled || tile != smem || i / 32 != 41) {
          reinterpret_cast<uint32_t*>(tile)[i] = 0x3f803f80;
        }
      }
    };
    fill(smem + kTileBytes);
    if (M != Mistake::kFenceTooEarly) {
      fill(smem);
    }
    cute::tma_store_fence();
    if (M == Mistake::kFenceTooEarly) {
      fill(smem);
    }
    __syncthreads();
    if (M == Mistake::kNoBarrierAfterStore) {
      fill(smem);
      cute::tma_store_fence();
    }
    float c[32];
    cute::warpgroup_arrive();
    multiply(descriptor(smem), descriptor(smem + kTileBytes), c, std::make_index_sequence<32>{});
    cute::warpgroup_commit_batch();
    if (M == Mistake::kOverwrittenInFlight) {
      __syncthreads();
      fill(smem);
      __syncthreads();
    }
    cute::warpgroup_wait<0>();
    p.out[thread] = 0.0f;
    for (float const x : c) {
      p.out[thread] += x;
    }
  }
};

template <Mistake M>
Report run_shared_rows(std::uint64_t seed) {
  using Kernel = SharedRowsKernel<M>;
  GlobalArray<float> out("out", 128);
  Report const report =
      emulator::launch<Kernel>({{1}, {128}, 2 * Kernel::kTileBytes, seed}, {out.data()});
  if (report.ok()) {
    for (float const x : out) {
      RETENTION_CHECK_EQUAL(x, 32 * 16.0f);
    }
  }
  return report;
}

template <Mistake M>
Report run_warpgroup(std::uint64_t seed) {
  using Kernel = WarpgroupKernel<M>;
  constexpr int kThreads = M == Mistake::kHalfWarpgroup ? 64 : 128;
  GlobalArray<uint16_t> b("b", 2 * Kernel::kRows * 64, true);
  GlobalArray<float> out("out", 2 * kThreads);
  for (std::size_t i = 0; i < b.size(); ++i) {
    b[i] = static_cast<uint16_t>(i / 64 % 4 == 0 ? 0x3f80 : 0x4000);  // rows of 1, 2, 2, 2
  }
  Report const report = emulator::launch<Kernel>({{1}, {kThreads}, 1024 + Kernel::kTileBytes, seed},
                                                 {b.data(), out.data()});
  if (report.ok()) {
    // 32 accumulators of 16 rows, in two steps.
    for (float const x : out) {
      RETENTION_CHECK_EQUAL(x, 2 * 32 * 28.0f);
    }
  }
  return report;
}

template <Mistake M>
Report run_exchange(std::uint64_t seed) {
  using Kernel = ExchangeKernel<M>;
  GlobalArray<int> words("words", 2 * Kernel::kThreads), sums("sums", 2 * Kernel::kThreads);
  Report const report =
      emulator::launch<Kernel>({{2}, {Kernel::kThreads}, 0, seed}, {words.data(), sums.data()});
  if (report.ok()) {
    for (int i = 0; i < 2 * Kernel::kThreads; ++i) {
      int const thread = i % Kernel::kThreads;
      RETENTION_CHECK_EQUAL(words[static_cast<std::size_t>(i)], -thread);
      RETENTION_CHECK_EQUAL(sums[static_cast<std::size_t>(i)], (thread ^ 1) + (thread ^ 32));
    }
  }
  return report;
}

template <Mistake M, Style S = Style::kAllFence>
Report run_arrival(std::uint64_t seed) {
  using Kernel = ArrivalKernel<M, S>;
  constexpr std::size_t kThreads = Kernel::kThreads, kBlocks = Kernel::kBlocks;
  constexpr std::size_t kGroups = Kernel::kGroups;
  GlobalArray<int> input("input", kBlocks, true), parts("parts", kGroups * kBlocks * kThreads);
  GlobalArray<int> sums("sums", kGroups * kThreads), totals("totals", kGroups * kThreads);
  GlobalArray<unsigned> counters("counters", kGroups * (1 + kBlocks));
  std::fill(counters.begin(), counters.end(), 0u);
  std::fill(totals.begin(), totals.end(), 0);
  Report report;
  for (int repeat = 0; repeat < 2 && report.ok(); ++repeat) {
    std::fill(sums.begin(), sums.end(), -1);
    report = emulator::launch<Kernel>(
        {{kBlocks, kGroups}, {kThreads}, 4, seed},
        {input.data(), parts.data(), counters.data(), sums.data(), totals.data()});
    if (report.ok()) {
      for (std::size_t i = 0; i < sums.size(); ++i) {
        int const sum = 6 * static_cast<int>((i + 1) % kThreads + 1);
        RETENTION_CHECK_EQUAL(sums[i], sum);
        RETENTION_CHECK_EQUAL(totals[i], (repeat + 1) * sum);
      }
      RETENTION_CHECK_EQUAL(counters[0], 0u);
      RETENTION_CHECK_EQUAL(counters[1], 0u);
    }
  }
  return report;
}

template <Mistake M>
Report run_meeting(std::uint64_t seed) {
  GlobalArray<int> note("note", 1);
  GlobalArray<unsigned> flag("flag", 1);
  flag[0] = 0;
  return emulator::launch<MeetingKernel<M>>({{1}, {64}, 0, seed}, {note.data(), flag.data()});
}

template <Mistake M>
Report run_tiles(std::uint64_t seed) {
  using Kernel = TileKernel<M>;
  GlobalArray<float> in("in", 2 * Kernel::kRows * 4, true), out("out", 2 * 2 * Kernel::kRows * 4);
  for (std::size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<float>(i);
  }
  Report const report =
      emulator::launch<Kernel>({{2}, {64}, Kernel::kRows * 16, seed}, {in.data(), out.data()});
  if (report.ok()) {
    for (std::size_t i = 0; i < out.size(); ++i) {
      std::size_t const tile = i / 256 % 2 * 256, next = (i % 256 + 4) % 256;
      RETENTION_CHECK_EQUAL(out[i], in[tile + i % 256] + in[tile + next]);
    }
  }
  return report;
}

// Some mistakes show first as one thing or another, depending on who came first.
void expect(Report (*run)(std::uint64_t seed), char const* name,
            std::initializer_list<Fault> faults) {
  for (std::uint64_t seed = 0; seed < 16; ++seed) {
    Report const report = run(seed);
    bool const expected = std::count(faults.begin(), faults.end(), report.fault) == 1;
    RETENTION_CHECK(expected);
    if (seed == 0 || !expected) {
      std::cout << name << ": " << report.text << '\n';
    }
  }
}

// A race, and one of these texts in its report.
void expect_race(Report (*run)(std::uint64_t seed), char const* name,
                 std::initializer_list<char const*> texts) {
  for (std::uint64_t seed = 0; seed < 16; ++seed) {
    Report const report = run(seed);
    bool const named = std::any_of(texts.begin(), texts.end(), [&](char const* text) {
      return report.text.find(text) != std::string::npos;
    });
    RETENTION_CHECK(report.fault == Fault::kRace && named);
    if (seed == 0 || !named) {
      std::cout << name << ": " << report.text << '\n';
    }
  }
}

void expect_arrivals() {
  char const* const no_fence_of_writer =
      ": no __threadfence() between that access and the atomic of its block";
  char const* const no_fence_of_reader =
      ": no __threadfence() between this block's atomic and this access";
  char const* const not_before_atomic = ": that access was not before the atomic of its block";
  char const* const no_barrier_after = ": no barrier between this block's atomic and this access";
  char const* const no_atomic = ": no atomic of this block came after one of that block";

  expect(run_arrival<Mistake::kNone>, "arrival", {Fault::kNone});
  expect(run_arrival<Mistake::kNone, Style::kOneFences>, "arrival, one fences", {Fault::kNone});
  expect(run_arrival<Mistake::kNone, Style::kStoredReset>, "arrival, 0 stored", {Fault::kNone});
  expect(run_arrival<Mistake::kNone, Style::kExchange>, "arrival, 0 exchanged", {Fault::kNone});

  expect_race(run_arrival<Mistake::kNoFenceOfWriter>, "no fence of the writer",
              {no_fence_of_writer});
  expect_race(run_arrival<Mistake::kNoFenceOfWriter, Style::kOneFences>,
              "no fence of the one that counts", {no_fence_of_writer});
  expect_race(run_arrival<Mistake::kFenceBeforeStore>, "fence before the store",
              {no_fence_of_writer});
  expect_race(run_arrival<Mistake::kFenceOfOneThread>, "fence of one thread", {no_fence_of_writer});
  expect_race(run_arrival<Mistake::kFenceOfWriterTooLate>, "fence of the writer too late",
              {no_fence_of_writer});
  expect_race(run_arrival<Mistake::kNoFenceOfReader>, "no fence of the reader",
              {no_fence_of_reader});
  expect_race(run_arrival<Mistake::kNoFenceOfReader, Style::kOneFences>, "no fence after the count",
              {no_fence_of_reader});
  expect_race(run_arrival<Mistake::kFenceOfReaderTooEarly>, "fence of the reader too early",
              {no_fence_of_reader});
  expect_race(run_arrival<Mistake::kNoBarrierBeforeAtomic>, "no barrier before the atomic",
              {not_before_atomic});
  expect_race(run_arrival<Mistake::kNoBarrierBeforeAtomic, Style::kOneFences>,
              "no barrier before the fence", {not_before_atomic});
  expect_race(run_arrival<Mistake::kNoBarrierAfterAtomic>, "no barrier after the atomic",
              {no_barrier_after});
  expect_race(run_arrival<Mistake::kNoBarrierAfterAtomic, Style::kOneFences>,
              "no barrier after the fence", {no_barrier_after});
  expect_race(run_arrival<Mistake::kReadByAll>, "read by all", {no_atomic, not_before_atomic});
  expect_race(run_arrival<Mistake::kReadOfOtherGroup>, "read of another group", {no_atomic});
  expect_race(run_arrival<Mistake::kCounterPerBlock>, "a counter per block", {no_atomic});
  expect_race(run_arrival<Mistake::kStoreToCounter>, "store to the counter",
              {"touched by an atomic"});
  expect_race(run_arrival<Mistake::kLoadOfCounter>, "load of the counter",
              {"touched by an atomic"});
  expect_race(run_arrival<Mistake::kStoreAfterAtomic>, "store after the atomic",
              {not_before_atomic});
  expect_race(run_arrival<Mistake::kOverwrittenByFirst>, "overwritten by the first", {no_atomic});
  expect_race(run_arrival<Mistake::kOverwrittenByOther>, "overwritten by another group",
              {no_atomic});
  expect_race(run_arrival<Mistake::kOverwrittenTooEarly>, "overwritten too early",
              {no_fence_of_reader});
  expect(run_meeting<Mistake::kNone>, "meeting", {Fault::kNone});
  expect_race(run_meeting<Mistake::kNoFences>, "meeting without fences",
              {"of the same block with no barrier between"});
  expect(run_arrival<Mistake::kAtomicPastEnd>, "atomic past end", {Fault::kOutOfBounds});
  expect(run_arrival<Mistake::kAtomicMisaligned>, "atomic misaligned", {Fault::kMisaligned});
  expect(run_arrival<Mistake::kAtomicToInput>, "atomic to input", {Fault::kOutOfBounds});
}

}  // namespace

RETENTION_TEST(emulator_faults) {
  expect(run_tiles<Mistake::kNone>, "none", {Fault::kNone});
  expect(run_tiles<Mistake::kNoBarrierAfterStore>, "no barrier after store",
         {Fault::kUninitialized, Fault::kRace, Fault::kAsyncPending});
  expect(run_tiles<Mistake::kNoBarrierBeforeReuse>, "no barrier before reuse",
         {Fault::kRace, Fault::kAsyncPending});
  expect(run_tiles<Mistake::kNoWait>, "no wait", {Fault::kAsyncPending});
  expect(run_tiles<Mistake::kWaitTooEarly>, "wait too early", {Fault::kAsyncPending});
  expect(run_tiles<Mistake::kRowTooFar>, "row too far", {Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kRowBefore>, "row before", {Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kStorePastEnd>, "store past end", {Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kStoreToInput>, "store to input", {Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kStorePastShared>, "store past shared", {Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kSharedOffByOneRow>, "shared off by one row", {Fault::kUninitialized});
  expect(run_tiles<Mistake::kMisaligned>, "misaligned", {Fault::kMisaligned, Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kHalfBarrier>, "half barrier", {Fault::kDeadlock});
  expect(run_tiles<Mistake::kHalfArrival>, "half arrival", {Fault::kDeadlock});
  expect(run_tiles<Mistake::kTwoBarriers>, "two barriers", {Fault::kDivergence});
  expect(run_tiles<Mistake::kDivergent>, "divergent", {Fault::kDivergence});
  expect(run_tiles<Mistake::kMissingLane>, "missing lane", {Fault::kDeadlock});
  expect(run_tiles<Mistake::kNoWarpSync>, "no warp sync", {Fault::kRace});
  expect(run_tiles<Mistake::kTwoBlocks>, "two blocks", {Fault::kRace});
  expect(run_tiles<Mistake::kNullPointer>, "null pointer", {Fault::kOutOfBounds});
  expect(run_tiles<Mistake::kUninstrumented>, "uninstrumented", {Fault::kCrash});
  expect(run_exchange<Mistake::kNone>, "exchange", {Fault::kNone});
  expect(run_exchange<Mistake::kSameWord>, "same word", {Fault::kRace});
  expect(run_exchange<Mistake::kSameValue>, "same value", {Fault::kRace});
  expect(run_exchange<Mistake::kSameHalfWord>, "same half of a word", {Fault::kRace});
  expect(run_exchange<Mistake::kReadTooEarly>, "read too early", {Fault::kRace});
  expect(run_exchange<Mistake::kWriteTooEarly>, "write too early", {Fault::kRace});
  expect(run_exchange<Mistake::kShuffleInstead>, "shuffle instead", {Fault::kRace});
  expect_arrivals();
  expect(run_warpgroup<Mistake::kNone>, "warpgroup", {Fault::kNone});
  expect(run_warpgroup<Mistake::kNoFence>, "no proxy fence", {Fault::kProxy});
  expect(run_warpgroup<Mistake::kFenceTooLate>, "fence too late", {Fault::kProxy});
  expect(run_warpgroup<Mistake::kFenceTooEarly>, "fence too early", {Fault::kProxy});
  expect(run_warpgroup<Mistake::kFenceOfReader>, "fence of the reader", {Fault::kProxy});
  expect(run_warpgroup<Mistake::kNoWait>, "wgmma, no wait for cp.async", {Fault::kAsyncPending});
  expect(run_warpgroup<Mistake::kNoBarrierAfterStore>, "wgmma, no barrier after store",
         {Fault::kUninitialized, Fault::kRace, Fault::kAsyncPending});
  expect(run_warpgroup<Mistake::kNoBarrierBeforeOverwrite>, "wgmma, no barrier before overwrite",
         {Fault::kRace});
  expect(run_warpgroup<Mistake::kOverwrittenInFlight>, "overwritten in flight", {Fault::kRace});
  expect(run_warpgroup<Mistake::kNoArrive>, "no arrive", {Fault::kRace});
  expect(run_warpgroup<Mistake::kNoArriveAgain>, "no arrive again", {Fault::kRace});
  expect(run_warpgroup<Mistake::kNoCommit>, "no commit", {Fault::kWarpgroupPending});
  expect(run_warpgroup<Mistake::kNoProductWait>, "no wait for products",
         {Fault::kWarpgroupPending});
  expect(run_warpgroup<Mistake::kProductWaitTooEarly>, "wait for products too early",
         {Fault::kWarpgroupPending});
  expect(run_warpgroup<Mistake::kAccumulatorWritten>, "accumulator written",
         {Fault::kWarpgroupPending});
  expect(run_warpgroup<Mistake::kLeftInFlight>, "left in flight", {Fault::kWarpgroupPending});
  expect(run_warpgroup<Mistake::kOtherShape>, "other shape", {Fault::kRace});
  expect(run_warpgroup<Mistake::kTileMisaligned>, "tile misaligned", {Fault::kMisaligned});
  expect(run_warpgroup<Mistake::kTilePastRow>, "tile past row", {Fault::kMisaligned});
  expect(run_warpgroup<Mistake::kTilePastShared>, "tile past shared", {Fault::kOutOfBounds});
  expect(run_warpgroup<Mistake::kTileUnfilled>, "tile unfilled", {Fault::kUninitialized});
  expect(run_warpgroup<Mistake::kMissingWarp>, "missing warp", {Fault::kDeadlock});
  expect(run_warpgroup<Mistake::kMissingLane>, "wgmma, missing lane", {Fault::kDivergence});
  expect(run_warpgroup<Mistake::kHalfWarpgroup>, "half a warpgroup", {Fault::kDivergence});
  expect(run_warpgroup<Mistake::kTwoDescriptors>, "two descriptors", {Fault::kDivergence});
  expect(run_shared_rows<Mistake::kNone>, "shared rows", {Fault::kNone});
  expect(run_shared_rows<Mistake::kTileUnfilled>, "shared rows unfilled", {Fault::kUninitialized});
  expect(run_shared_rows<Mistake::kFenceTooEarly>, "shared rows, fence too early", {Fault::kProxy});
  expect(run_shared_rows<Mistake::kNoBarrierAfterStore>, "shared rows, no barrier after store",
         {Fault::kRace});
  expect(run_shared_rows<Mistake::kOverwrittenInFlight>, "shared rows overwritten in flight",
         {Fault::kRace});
}
