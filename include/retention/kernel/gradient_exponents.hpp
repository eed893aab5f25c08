// Powers of two that keep fp16 in range in the backward pass, as `Exponents` do in the forward.
//
// `GradientRows` leaves a few numbers a tile, `ChunkRanges` a few a chunk, `StateRanges` those of
// the gradients of final states; `ChooseGradientExponents` walks over the chunks of a sequence from
// the last to the first, and bounds the gradient of the state after each. With the rows i of chunk
// c as `GradientRows` has prepared them, m = kQueryExponent, and G_c and L_c the cumulative log
// gates of chunk c and of all chunks after it,
//
//     |dS_c-1| <= exp(G_c) |dS_c| + sum_i weight_i 2^(2m) |do_i|       |do_i| Euclidean
//     |dz_c-1| <= exp(G_c) |dz_c| + sum_i weight_i 2^(2m) |delta_i|
//
// from exp(L_c) max|dS_T| on, and the gradient of a score s_ij = qs_i . k_j is
//
//     |da_ij| = 2 |s_ij| exp(g_i - g_j) inverse_i |do_i . v_j - delta_i|
//            <= 2 sqrt(inverse_i) (|do_i| |v_j| + |delta_i|)
//
// because s_ij^2 exp(g_i - g_j) inverse_i, a normalised weight, is at most 1, as are exponentials
// of gates that do not rise. Gates that do have a factor of 4 of room.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/detail/packed.hpp"
#include "retention/detail/reduce.hpp"
#include "retention/kernel/exponents.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

/// Null pointers stand for zeros.
struct GradientExponents {
  int const* weight;   // [slots, h] |weight| 2^weight <= 1 for the queries of the chunk
  int const* delta;    // [slots, h] |weight delta| 2^delta <= 1 for the queries of the chunk
  int const* state;    // [slots, h] what is stored of dS after the chunk is 2^-state dS, below 2^15
  int const* key_sum;  // [slots, h] the same of dz
  int const* score;    // [slots, h] |2 da 2^score| < 2^15 for the scores of the chunk
};

/// What the exponents need to know of the rows of a tile, those of all heads of a group.
struct GradientRange {
  float weight;        // max weight_i
  float weight_delta;  // max weight_i |delta_i|
  float state;         // sum of weight_i 2^(2m) |do_i|
  float key_sum;       // sum of weight_i 2^(2m) |delta_i|
  float gradient;      // max sqrt(inverse_i) |do_i|
  float delta;         // max sqrt(inverse_i) |delta_i|
};

struct ChooseGradientExponents : OneItem<ChooseGradientExponents> {
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = 2;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kStateParts = StateRanges::kParts;
  static constexpr int kTileTokens = 64;  // of `GradientRows`
  // 2^e and 2^-e are normal fp32 numbers.
  static constexpr int kMaxExponent = 120;
  using Scan = BoundScan<kThreads>;

  struct Params {
    GradientRange const* rows;       // [slots of tiles, h]
    ChunkRange const* ranges;        // [slots, h]
    StateRange const* final_ranges;  // [count, h, kStateParts] of dS_T, dz_T; null for zero
    int* weight;                     // [slots, h], as all of these: see `GradientExponents`
    int* delta;
    int* state;
    int* key_sum;
    int* score;
    Sequences sequences;
    int heads;
    int value_dim;
  };

  struct SharedStorage {
    Scan::SharedStorage scan;
    StateRange final_range;
  };

  /// (sequence, head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.sequences.listed),
                static_cast<unsigned>(params.heads));
  }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return params.sequences.turn_blocks(params.sequences.length / params.sequences.chunk_size);
  }
  CUTE_DEVICE static int count(Params const& params) { return params.sequences.num_listed(); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int place) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const head = blockIdx.y;
    Sequence const sequence = params.sequences.get(place);
    int const chunks = cute::ceil_div(sequence.length, sequence.chunk_size);
    int const tiles = cute::ceil_div(sequence.length, cute::Int<kTileTokens>{});
    int const chunk_tiles = sequence.chunk_size / kTileTokens;
    std::int64_t const first = sequence.first_slot * params.heads + head;
    std::int64_t const first_tile =
        params.sequences.pieces(kTileTokens).get(place).first_slot * params.heads + head;

    if (thread < 32) {
      StateRange range{0.0f, 0.0f};
      if (params.final_ranges != nullptr) {
        std::int64_t const item = static_cast<std::int64_t>(sequence.index) * params.heads + head;
        range = params.final_ranges[item * kStateParts + thread];
      }
      range.state = detail::reduce_warp(range.state, detail::Maximum{});
      range.key_sum = detail::reduce_warp(range.key_sum, detail::Maximum{});
      if (thread == 0) {
        shared.final_range = range;
      }
    }
    __syncthreads();
    StateRange const final_range = shared.final_range;
    static_assert(kStateParts == 32, "one a lane");
    // An element is at most max|v|, a Euclidean norm as many times that as the root of dv.
    float const norm_factor = sqrtf(static_cast<float>(params.value_dim));

    // Chunks from the last to the first.
    Scan::run(
        shared.scan, chunks,
        [&](int i) {
          int const chunk = chunks - 1 - i;
          int const begin = chunk * chunk_tiles;
          GradientRange const rows =
              over_tiles(params.rows + first_tile + std::int64_t{begin} * params.heads,
                         params.heads, cute::min(chunk_tiles, tiles - begin));
          std::int64_t const offset = first + std::int64_t{chunk} * params.heads;
          ChunkRange const range = params.ranges[offset];
          float const score = 2.0f * (norm_factor * range.value * rows.gradient + rows.delta);
          params.weight[offset] = below_one(rows.weight);
          params.delta[offset] = below_one(rows.weight_delta);
          // The margin covers the rounding of norms.
          params.score[offset] =
              score == 0.0f
                  ? 0
                  : cute::min(below_one(score * (1.0f + 0x1p-12f)) + 15, cute::Int<kMaxExponent>{});
          return BoundStep{range.gate == 0.0f ? 1.0f : detail::exp2_above(range.gate), rows.state,
                           rows.key_sum, static_cast<double>(range.gate)};
        },
        [&](int i, BoundStep const& after) {
          std::int64_t const offset = first + std::int64_t{chunks - 1 - i} * params.heads;
          params.state[offset] = Scan::stored(after.with_given(after.state, final_range.state));
          params.key_sum[offset] =
              Scan::stored(after.with_given(after.key_sum, final_range.key_sum));
        });
  }

 private:
  // The largest e with x 2^e <= 1, or one less; 0 for x = 0.
  CUTE_DEVICE static int below_one(float x) {
    return x == 0.0f ? 0
                     : cute::max(cute::min(-detail::exponent_above(x), cute::Int<kMaxExponent>{}),
                                 cute::Int<-kMaxExponent>{});
  }

  CUTE_DEVICE static GradientRange over_tiles(GradientRange const* tiles, int stride, int count) {
    GradientRange sum{};
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      GradientRange const tile = tiles[static_cast<std::int64_t>(i) * stride];
      sum.weight = fmaxf(sum.weight, tile.weight);
      sum.weight_delta = fmaxf(sum.weight_delta, tile.weight_delta);
      sum.state += tile.state;
      sum.key_sum += tile.key_sum;
      sum.gradient = fmaxf(sum.gradient, tile.gradient);
      sum.delta = fmaxf(sum.delta, tile.delta);
    }
    // Terms are norms of up to 128 elements, and went through 72 additions at most within a tile.
    float const margin = 1.0f + 0x1p-23f * static_cast<float>(count + 256);
    sum.state *= margin;
    sum.key_sum *= margin;
    return sum;
  }
};

}  // namespace retention::kernel
