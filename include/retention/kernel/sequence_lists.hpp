// Lists of packed sequences that are longer than some limits: those that are there at all, those
// of several chunks, those of several segments. The first kernel of a packed call; the others find
// their work in these lists, at no cost for sequences that are not in them.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/decode_pool.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

struct SequenceLists {
  static constexpr int kThreads = 1024;
  static constexpr int kMinBlocks = 1;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kThreadSequences = 4;  // neighbours
  static constexpr int kLists = 4;

  struct SharedStorage {
    int warps[kWarps];
  };

  struct List {
    int* count;
    SequenceList::Entry* entries;  // [most]
    int limit;                     // sequences of more tokens are listed
    int most;                      // more of them than this there are not, if bounds rise
  };

  struct Params {
    // [count] on the device: sequence i is tokens starts[i] to ends[i] - 1.
    int const* starts;
    int const* ends;
    int count;
    int length;  // tokens
    // Where states before sequences are in a pool: those of empty slots are not there.
    SlotCursors cursors;
    int const* slots;  // [count], of each sequence; null: there is no pool
    List lists[kLists];
  };

  /// A block a list.
  CUTE_HOST static dim3 grid(Params const&) { return dim3(kLists); }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    List const& list = params.lists[blockIdx.x];
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    int listed = 0;
    // 64 bits, for the index of a thread beyond the last sequence.
#pragma unroll 1
    for (std::int64_t start = 0; start < params.count; start += kThreads * kThreadSequences) {
      std::int64_t const index = start + std::int64_t{thread} * kThreadSequences;
      int first[kThreadSequences];
      int length[kThreadSequences];
#pragma unroll
      for (int i = 0; i < kThreadSequences; ++i) {
        // Nobody on the host has read these: whatever they are, no access may leave the tensors.
        auto const bound = [&](int const* bounds) {
          int const given = bounds[cute::min(index + i, std::int64_t{params.count} - 1)];
          return cute::min(cute::max(given, 0), params.length);
        };
        first[i] = bound(params.starts);
        length[i] = cute::max(bound(params.ends) - first[i], 0);
      }
      auto const is_listed = [&](int i) {
        return index + i < params.count && length[i] > list.limit;
      };
      int own = 0;
#pragma unroll
      for (int i = 0; i < kThreadSequences; ++i) {
        own += is_listed(i) ? 1 : 0;
      }
      int inclusive = own;
#pragma unroll
      for (unsigned delta = 1; delta < 32; delta *= 2) {
        int const before = __shfl_up_sync(0xffffffffu, inclusive, delta);
        inclusive += static_cast<unsigned>(lane) < delta ? 0 : before;
      }
      if (lane == 31) {
        shared.warps[warp] = inclusive;
      }
      __syncthreads();
      int place = listed + inclusive - own;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        int const total = shared.warps[i];
        place += i < warp ? total : 0;
        listed += total;
      }
      __syncthreads();  // all have read the totals
#pragma unroll
      for (int i = 0; i < kThreadSequences; ++i) {
        if (is_listed(i)) {
          if (place < list.most) {
            list.entries[place] = {static_cast<int>(index) + i, first[i], length[i],
                                   continues(params, index + i) ? 1 : 0};
          }
          ++place;
        }
      }
    }
    if (thread == 0) {
      *list.count = cute::min(listed, list.most);
    }
  }

 private:
  CUTE_DEVICE static bool continues(Params const& params, std::int64_t sequence) {
    if (params.slots == nullptr) {
      return true;
    }
    int const slot = params.slots[sequence];
    return params.cursors.has(slot) && params.cursors.at(slot)->folded > 0;
  }
};

}  // namespace retention::kernel
