// The gradient of the state after every chunk of a sequence, and before the first:
//
//     dS_{c-1} = exp(G_c) dS_c + sum_{i in chunk c} w_i phi(q_i) do_i^T
//     dz_{c-1} = exp(G_c) dz_c - sum_{i in chunk c} w_i delta_i phi(q_i)
//
// where dS_c is that of the state after chunk c, and the sums are over the queries i of all heads
// that read the state: w_i = exp(g_i) / z_i with the cumulative log gate g_i since the start of the
// chunk and the normaliser z_i, and delta_i = do_i . o_i. There is no multiplicity in dS and dz.
//
// The mirror of `ChunkStates`: a block of threads owns a slice of dS of one segment of a sequence,
// and key head, holds it in fp32 registers, and walks over the tiles of 64 tokens from the last to
// the first, and within each over the heads of the group. Nothing is shared between blocks.
//
// In fp16 the registers hold 2^a dS and 2^b dz, with powers of two that are part of a query's
// weights, follow the chunk's `GradientExponents`, and leave again with what is stored.

#pragma once

#include <cstddef>
#include <cstdint>

#include "retention/collective/expand_reduce.hpp"
#include "retention/collective/state_tile.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/kernel/sequence_states.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct StateGradientsTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr int kWarps = Warps;
};

template <class Traits>
struct StateGradients {
  using Element = typename Traits::Element;
  // Queries take the place of keys, d_output that of values.
  using Mainloop = collective::ExpandReduce<Element, Traits::kHeadDim, Traits::kValueDim,
                                            Traits::kWarps, /*KeySumWeights=*/true>;
  using StateTile = collective::StateTile<Mainloop, Traits::kValueDim, /*Multiplicity=*/false>;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kValueTile = Mainloop::kValueTile;
  static constexpr int kTileTokens = Mainloop::kTileTokens;
  static constexpr int kStages = Mainloop::kStages;
  static_assert(Mainloop::kSteps == 4, "queries, d_output, weights and the barrier have a step");
  static constexpr int kThreads = 32 * Traits::kWarps;
  static constexpr int kMinBlocks = 2;
  static constexpr int kStateDim = static_cast<int>(SymmetricPower<kHeadDim, 2>::kStateDim);
  static constexpr int kRowSlices = (Mainloop::kTasks + Traits::kWarps - 1) / Traits::kWarps;
  // Blocks that cover the state of one sequence and key head.
  static constexpr int kSlices = kRowSlices * (kValueDim / kValueTile);
  // Whether numbers of this type need `GradientExponents` to stay in range.
  static constexpr bool kScaled = StateTile::kScaled;

  /// Between the same rows of one tile and of the next, in elements.
  struct Distances {
    std::int64_t query;
    std::int64_t d_output;
    std::int64_t row;
  };

  struct SharedStorage {
    typename Mainloop::SharedStorage mainloop;
    typename StateTile::Rows rows[Traits::kWarps];
    float2 row[kStages][kTileTokens];  // weight and delta, as they come from memory
    // What a loop over tiles need not have in registers: from one tile to the next, and (fp16) each
    // thread's copy of what its weights are multiplied by, in this chunk and in the next: two
    // powers of two, of which bf16 holds half a word each.
    Distances distance[2];
    std::uint32_t factor[kScaled ? 2 : 1][kScaled ? kThreads : 1];
    std::int64_t without;       // slots of chunks ahead of those of gradients, times heads
    std::int64_t segment_head;  // of the gradient before the segment
  };
  static_assert(offsetof(SharedStorage, mainloop) == 0, "tiles of wgmma");

  struct Params {
    Element const* query;     // [b, t, hq, d] as prepared: rescaled, 0 for queries without weight
    Element const* d_output;  // [b, t, hq, dv]
    float const* weight;      // [b, t, hq] w_i
    float const* delta;       // [b, t, hq]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    TokenStride query_stride;
    TokenStride d_output_stride;
    TokenStride row_stride;  // of weight and delta
    TokenStride gate_stride;

    // Each sequence is cut into segments, which know nothing of each other: all but the last start
    // from a gradient of zero, and `d_states` and `initial_state_gradient` are of the segment
    // alone. A segment has a number and a slot as a chunk has (`Sequences::segments`).
    float const* final_state_gradient;    // [count, h, D, dv] of each sequence; null for zero
    float const* final_key_sum_gradient;  // [count, h, D]; with final_state_gradient
    // After each chunk; after the last of a sequence, where it is zero, only with
    // final_state_gradient.
    Element* d_states;    // [slots, h, D, dv], by `gradient_slots`; null to skip
    Element* d_key_sums;  // [slots, h, D]; with d_states
    // Before the first chunk of each segment; of first segments too with sequence_starts, and has
    // slots for them then.
    float* initial_state_gradient;    // [slots of segments, h, D, dv]; null to skip
    float* initial_key_sum_gradient;  // [slots of segments, h, D]; with initial_state_gradient
    bool sequence_starts;

    GradientExponents exponents;  // for fp16
    Sequences sequences;          // those listed get their gradients
    int heads;
    int group;           // query heads a key head
    int segment_tokens;  // a multiple of the chunk size
  };

 private:
  // Accumulators hold 2^state dS and 2^key_sum dz.
  struct Scale {
    int state;
    int key_sum;
  };

 public:
  /// blockIdx = (segment and slice of the state, key head); slices of a segment are neighbours,
  /// because they read the same queries and rows of d_output.
  CUTE_HOST static dim3 grid(Params const& params) {
    std::int64_t const segments = params.sequences.segments(params.segment_tokens).most_chunks();
    return dim3(static_cast<unsigned>(segments * kSlices), static_cast<unsigned>(params.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(smem);
    typename Mainloop::SharedStorage& shared = storage.mainloop;
    int const thread = threadIdx.x;
    int const head = blockIdx.y;
    int const slice = static_cast<int>(blockIdx.x % kSlices);
    int const number = static_cast<int>(blockIdx.x / kSlices);
    Sequences const segments = params.sequences.segments(params.segment_tokens);
    if (number >= segments.num_chunks()) {
      return;
    }
    int const value_offset = slice / kRowSlices * kValueTile;
    int const first_task = slice % kRowSlices * Traits::kWarps;
    int const task = first_task + __shfl_sync(0xffffffffu, thread / 32, 0);  // uniform in a warp
    // A warp beyond the last task computes what the last one does, for nobody: all warps meet at
    // the same barriers, and only states of few rows have such warps.
    bool const stores = task < Mainloop::kTasks;
    Mainloop const mainloop(thread % 32, stores ? task : Mainloop::kTasks - 1);

    Chunk const segment = segments.find(number);
    Sequence const in_segments = segments.get(segment.sequence);
    Sequence const sequence = params.sequences.get(segment.sequence);
    int const chunk_size = sequence.chunk_size;
    std::int64_t const first = static_cast<std::int64_t>(segment.index) * in_segments.chunk_size;
    if (segment.index > 0 && first >= sequence.length) {
      return;  // a number without a segment; an empty sequence has one
    }
    int const first_token = static_cast<int>(first);
    int const tokens = cute::min(in_segments.chunk_size, sequence.length - first_token);
    bool const is_last = first_token + tokens == sequence.length;
    bool const starts =
        params.initial_state_gradient != nullptr && (first_token > 0 || params.sequence_starts);
    int const tiles = cute::ceil_div(tokens, cute::Int<kTileTokens>{});
    int const chunk_tiles = chunk_size / kTileTokens;
    int const chunks = cute::ceil_div(tiles, chunk_tiles);
    // The first chunk counts for nothing but the state before it.
    int const first_tile = starts ? 0 : chunk_tiles;

    // Tiles of 64 tokens come from the last to the first, and of each those of all heads of the
    // group. Here is the tile loaded last: at first, one that would come before all of them.
    int tile_head = params.group - 1;
    int tile_tokens = tokens - tiles * kTileTokens;  // from its first token on
    int const most_tokens = tokens - first_tile * kTileTokens;
    auto start_of = [&](TokenStride const& stride, int token) {
      return stride.at(sequence, first_token + tiles * kTileTokens + token,
                       (head + 1) * params.group - 1);
    };
    if (thread < 2) {
      auto distance = [&](TokenStride const& stride) {
        return thread == 0 ? stride.head
                           : -kTileTokens * stride.token - (params.group - 1) * stride.head;
      };
      storage.distance[thread] = {distance(params.query_stride), distance(params.d_output_stride),
                                  distance(params.row_stride)};
    }
    if (thread == 0) {
      storage.without = params.sequences.without_slots(
                            sequence, gradient_slots(params.final_state_gradient != nullptr)) *
                        static_cast<std::int64_t>(params.heads);
      Slots const slots = params.sequence_starts ? Slots::kAll : Slots::kButFirst;
      storage.segment_head = segments.slot(in_segments, segment.index, slots) * params.heads + head;
    }
    __syncthreads();

    constexpr int kQueryColumns = Mainloop::kKeyColumns;
    // A thread copies the same block of the queries from each of its rows.
    int const tile_block = thread % (kQueryColumns / 8);
    int const query_block = Mainloop::key_block(first_task, tile_block);
    collective::TileLoader<Element, kThreads, kTileTokens, kQueryColumns,
                           typename Mainloop::KeyLayout>
        query_loader(params.query + start_of(params.query_stride, kTileTokens) +
                         8 * (cute::max(query_block, 0) - tile_block),
                     params.query_stride.token, thread);
    collective::TileLoader<Element, kThreads, kTileTokens, kValueTile,
                           typename Mainloop::ValueLayout>
        d_output_loader(
            params.d_output + start_of(params.d_output_stride, kTileTokens) + value_offset,
            params.d_output_stride.token, thread);
    // One thread a token takes care of its weights.
    bool const weighs = thread < kTileTokens;
    std::int64_t next_row = start_of(params.row_stride, thread);
    // Rows of the tile that there are; others become zero.
    auto valid = [&] { return tile_tokens <= most_tokens ? tile_tokens : 0; };
    // One group of copies a tile, so that waits can count.
    auto load_queries = [&](int stage) {
      bool const wraps = tile_head == params.group - 1;
      tile_head = wraps ? 0 : tile_head + 1;
      tile_tokens += wraps ? kTileTokens : 0;
      query_loader.load(shared.key, stage, !Mainloop::kGathered || query_block >= 0 ? valid() : 0,
                        storage.distance[tile_head == 0].query);
    };
    auto load_d_output = [&](int stage) {
      Distances const& distance = storage.distance[tile_head == 0];
      d_output_loader.load(shared.value, stage, valid(), distance.d_output);
      next_row += distance.row;
      if (weighs) {
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(
            params.weight[next_row], storage.row[stage][thread].x, thread < valid());
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(
            params.delta[next_row], storage.row[stage][thread].y, thread < valid());
      }
      cute::cp_async_fence();
    };
    // Turns the numbers that the thread itself has copied into weights in dS and dz.
    auto weigh = [&](int stage, int next_chunk) {
      if (weighs) {
        float2 const row = storage.row[stage][thread];
        float2 factor = {1.0f, 1.0f};
        if constexpr (kScaled) {
          std::uint32_t const both = storage.factor[next_chunk][thread];
          factor = {detail::unpack_lo<cute::bfloat16_t>(both),
                    detail::unpack_hi<cute::bfloat16_t>(both)};
        }
        Mainloop::set_weights(shared, stage, thread, factor.x * row.x, factor.y * -(row.x * row.y));
      }
    };
    auto set_factor = [&](int next_chunk, Scale const& scale) {
      if constexpr (kScaled) {
        storage.factor[next_chunk][thread] = detail::pack<cute::bfloat16_t>(
            detail::power_of_two(scale.state), detail::power_of_two(scale.key_sum));
      }
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      load_queries(stage);
      load_d_output(stage);
    }

    // Of exponents; those of gradients are fewer.
    std::int64_t slot_head =
        (sequence.first_slot + first_token / chunk_size + chunks - 1) * params.heads + head;
    // Cumulative gate of a chunk.
    detail::CumulativeGate const* gate =
        params.gate == nullptr ? nullptr
                               : params.gate + params.gate_stride.at(sequence, first_token, head);
    auto gate_of = [&](int chunk) {
      int const last = chunk * chunk_size + cute::min(chunk_size, tokens - chunk * chunk_size) - 1;
      return gate != nullptr && chunk >= 0 ? gate[last * params.gate_stride.token].total() : 0.0f;
    };
    // Whether there is anything after the chunk: after a sequence's last, only what was given.
    auto follows = [&](int chunk) {
      return params.final_state_gradient != nullptr || !is_last || chunk < chunks - 1;
    };
    float next_gate = gate_of(chunks - 1);
    Scale scale{0, 0};
    Scale next_scale = scale;
    if (chunks > 0) {
      scale = scale_of(params, slot_head, follows(chunks - 1), 0.0f, {kMaxScale, kMaxScale});
      next_scale = scale_of(params, slot_head, follows(chunks - 1), next_gate, scale);
    }

    typename Mainloop::Accumulators accumulators;
    if (params.final_state_gradient != nullptr && is_last) {
      std::int64_t const sequence_head =
          static_cast<std::int64_t>(sequence.index) * params.heads + head;
      FloatState<float const> const gradient{
          params.final_state_gradient + sequence_head * kStateDim * kValueDim + value_offset,
          params.final_key_sum_gradient + sequence_head * kStateDim};
      StateTile::load(gradient, value_offset == 0, detail::power_of_two(scale.state),
                      detail::power_of_two(scale.key_sum), mainloop, accumulators);
    } else {
      StateTile::clear(accumulators);
    }

    int stage = 0;
    collective::wait_for_copies<kStages - 2, Mainloop::kWarpgroups>();
    set_factor(0, next_scale);
    weigh(stage, 0);
    __syncthreads();
    typename Mainloop::Operands operands;
    mainloop.load(shared, stage, 0, operands);
#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      if (params.d_states != nullptr && follows(chunk) && stores) {
        store_rounded(params, slot_head, slot_head - storage.without, value_offset, scale, mainloop,
                      storage.rows[thread / 32], accumulators);
      }
      int const chunk_tile = chunk * chunk_tiles;
      if (chunk_tile < first_tile) {
        break;
      }
      if (kScaled || gate != nullptr) {
        StateTile::multiply(
            detail::exp2(next_gate + static_cast<float>(next_scale.state - scale.state)),
            detail::exp2(next_gate + static_cast<float>(next_scale.key_sum - scale.key_sum)),
            accumulators);
      }
      scale = next_scale;
      slot_head -= params.heads;
      // Needed a chunk from now.
      next_gate = gate_of(chunk - 1);
      next_scale = chunk == 0 ? scale : scale_of(params, slot_head, true, next_gate, scale);
      set_factor(0, scale);
      set_factor(1, next_scale);
#pragma unroll 1
      for (int left = cute::min(chunk_tiles, tiles - chunk_tile) * params.group; left > 0; --left) {
        // The tile after this one takes over a step before the end of this one, which is in
        // registers then.
        int const next_stage = stage == kStages - 1 ? 0 : stage + 1;
        int const free_stage = stage == 0 ? kStages - 1 : stage - 1;
#pragma unroll
        for (int step = 0; step < Mainloop::kSteps; ++step) {
          auto prepare = [&] {
            if (step == 0) {
              collective::wait_for_copies<kStages - 3, Mainloop::kWarpgroups>();
              weigh(next_stage, left == 1);
            } else if (step == 1) {
              __syncthreads();
              load_queries(free_stage);
            } else if (step == 2) {
              load_d_output(free_stage);
            }
          };
          bool const last = step == Mainloop::kSteps - 1;
          mainloop.add_and_load(shared, last ? next_stage : stage, last ? 0 : step + 1, operands,
                                accumulators, prepare);
        }
        stage = next_stage;
      }
    }
    cute::cp_async_wait<0>();
    if (starts && stores) {
      std::int64_t const segment_head = storage.segment_head;
      FloatState<> const gradient{
          params.initial_state_gradient + segment_head * kStateDim * kValueDim + value_offset,
          params.initial_key_sum_gradient + segment_head * kStateDim};
      StateTile::store(gradient, value_offset == 0, detail::power_of_two(-scale.state),
                       detail::power_of_two(-scale.key_sum), mainloop, accumulators);
    }
  }

 private:
  static constexpr int kMaxScale = 96;
  static constexpr int kMaxStep = 120;

  // For the queries of a chunk: weights of at most 1. But what is left there of the gradient after
  // the chunk stays below 2^(16 + kMaxScale), and what takes it there is a finite factor: where
  // that takes digits of the weights, they are far below what is there.
  CUTE_DEVICE static Scale scale_of(Params const& params, std::int64_t slot_head, bool follows,
                                    float chunk_gate, Scale const& before) {
    if constexpr (!kScaled) {
      return {0, 0};
    }
    // 2^G is below 2^(decay + 1).
    int const decay = static_cast<int>(floorf(fmaxf(chunk_gate, -1000.0f)));
    auto at = [&](int const* exponents) { return exponents == nullptr ? 0 : exponents[slot_head]; };
    auto choose = [&](int const* weight, int const* stored, int exponent_before) {
      int const exponent = cute::min(at(weight), +kMaxScale);
      return follows ? cute::min(exponent, cute::min(kMaxScale - decay - at(stored),
                                                     kMaxStep - decay + exponent_before))
                     : exponent;
    };
    return {choose(params.exponents.weight, params.exponents.state, before.state),
            choose(params.exponents.delta, params.exponents.key_sum, before.key_sum)};
  }

  CUTE_DEVICE static void store_rounded(Params const& params, std::int64_t slot_head,
                                        std::int64_t state_head, int value_offset,
                                        Scale const& scale, Mainloop const& mainloop,
                                        typename StateTile::Rows& rows,
                                        typename Mainloop::Accumulators& accumulators) {
    auto stored = [&](int exponent, int const* exponents) {
      return detail::power_of_two(-exponent - (exponents == nullptr ? 0 : exponents[slot_head]));
    };
    float state_factor = 1.0f;
    float sum_factor = 1.0f;
    if constexpr (kScaled) {
      state_factor = stored(scale.state, params.exponents.state);
      sum_factor = stored(scale.key_sum, params.exponents.key_sum);
    }
    StateTile::store_rounded(params.d_states + state_head * kStateDim * kValueDim + value_offset,
                             params.d_key_sums + state_head * kStateDim, value_offset == 0,
                             state_factor, sum_factor, mainloop, rows, accumulators);
  }
};

}  // namespace retention::kernel
