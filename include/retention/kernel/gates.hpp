// The cumulative log gate since the start of each chunk, inclusive, in the units of `exp2`:
//
//     g_j = log2(e) sum of log_gate_i over the tokens i <= j of j's chunk
//
// A block of threads owns a chunk of several heads, which are neighbours in memory as a rule, and
// scans it a tile after the other, a warp a head. Tiles pass through shared memory, so that loads
// and stores are contiguous whichever of tokens and heads comes last.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/gate_tile.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

struct Gates : OneItem<Gates> {
  using Tile = collective::GateTile;
  static constexpr int kHeads = Tile::kHeads;  // of a block, one a warp
  static constexpr int kTileTokens = Tile::kTokens;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = 4;

  struct SharedStorage {
    float tile[Tile::kSize];  // log gates, and then the upper parts of their sums
    float low[Tile::kSize];
  };

  struct Params {
    float const* log_gate;         // [b, t, h]
    detail::CumulativeGate* gate;  // [b, t, h]
    TokenStride log_gate_stride;
    TokenStride gate_stride;
    Sequences sequences;
    int heads;
  };

  /// (chunk, heads)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.sequences.most_chunks()),
                static_cast<unsigned>((params.heads + kHeads - 1) / kHeads));
  }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return params.sequences.turn_blocks(params.sequences.length / params.sequences.chunk_size);
  }
  CUTE_DEVICE static int count(Params const& params) { return params.sequences.num_chunks(); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    int const first_head = static_cast<int>(blockIdx.y) * kHeads;
    int const heads = cute::min(cute::Int<kHeads>{}, params.heads - first_head);
    Chunk const chunk = params.sequences.find(number);
    Sequence const sequence = params.sequences.get(chunk.sequence);
    std::int64_t const first_token = static_cast<std::int64_t>(chunk.index) * sequence.chunk_size;
    if (first_token >= sequence.length) {
      return;  // a number without a chunk
    }
    int const tokens =
        cute::min(sequence.chunk_size, sequence.length - static_cast<int>(first_token));

    float const* source =
        params.log_gate + params.log_gate_stride.at(sequence, first_token, first_head);
    detail::CumulativeGate* target =
        params.gate + params.gate_stride.at(sequence, first_token, first_head);
    Tile::Part const load_part(params.log_gate_stride, thread);
    Tile::Part const store_part(params.gate_stride, thread);

    source += load_part.offset;
    target += store_part.offset;
    float next[Tile::kLoads];
    load_part.load(source, heads, tokens, next);
    // Double precision: sums of a million gates differ by less than their rounding to fp32.
    double carry = 0.0;
#pragma unroll 1
    for (int left = tokens; left > 0; left -= kTileTokens) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        shared.tile[load_part.position(i)] = detail::limited_log_gate(next[i]);
      }
      // The next tile arrives during the scan.
      source += kTileTokens * params.log_gate_stride.token;
      load_part.load(source, heads, left - kTileTokens, next);
      __syncthreads();
      if (warp < heads) {
        carry = scan(shared, warp, lane, carry);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        if (store_part.within(i, heads, left)) {
          int const position = store_part.position(i);
          target[i * store_part.step] = {shared.tile[position], shared.low[position]};
        }
      }
      target += kTileTokens * params.gate_stride.token;
      __syncthreads();
    }
  }

 private:
  // Inclusive sums of one head's tile, in place, on top of `carry`; returns the last of them. The
  // order of summation is fixed by the lanes.
  CUTE_DEVICE static double scan(SharedStorage& shared, int head, int lane, double carry) {
    int const first = Tile::position(head, Tile::kLaneTokens * lane);
    double values[Tile::kLaneTokens];
    double total = 0.0;
#pragma unroll
    for (int i = 0; i < Tile::kLaneTokens; ++i) {
      values[i] = detail::kLog2E * double{shared.tile[first + i]};
      total += values[i];
    }
    double inclusive = total;
#pragma unroll
    for (unsigned delta = 1; delta < 32; delta *= 2) {
      double const before = __shfl_up_sync(0xffffffffu, inclusive, delta);
      inclusive = static_cast<unsigned>(lane) < delta ? inclusive : before + inclusive;
    }
    double const before = __shfl_up_sync(0xffffffffu, inclusive, 1);
    double sum = lane == 0 ? carry : carry + before;
#pragma unroll
    for (int i = 0; i < Tile::kLaneTokens; ++i) {
      sum += values[i];
      auto const gate = detail::CumulativeGate::from(sum);
      shared.tile[first + i] = gate.high;
      shared.low[first + i] = gate.low;
    }
    return carry + __shfl_sync(0xffffffffu, inclusive, 31);
  }
};

}  // namespace retention::kernel
