// The state before every chunk of a sequence, and after the last:
//
//     S_{c+1} = exp(G_c) S_c + sum_{j in chunk c} exp(G_c - g_j) phi_k(k_j) v_j^T
//
// and z, the sum of keys, the same with v = 1; g_j is the cumulative log gate since the start of
// the chunk, and G_c that of its last token.
//
// A block of threads owns a slice of the state of one segment of a sequence, and head, holds it in
// fp32 registers, and walks over the tokens. Nothing is shared between blocks, so the result does
// not depend on their order.
//
// In fp16 the registers hold 2^f S and 2^f z instead, with f from `Exponents::key`: the power of
// two is part of a token's weight, and leaves again with what is stored.

#pragma once

#include <cstddef>
#include <cstdint>

#include "retention/collective/expand_reduce.hpp"
#include "retention/collective/state_tile.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/kernel/sequence_states.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct ChunkStatesTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr int kWarps = Warps;
};

template <class Traits>
struct ChunkStates {
  using Element = typename Traits::Element;
  using Mainloop =
      collective::ExpandReduce<Element, Traits::kHeadDim, Traits::kValueDim, Traits::kWarps>;
  using StateTile = collective::StateTile<Mainloop, Traits::kValueDim, /*Multiplicity=*/true>;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kValueTile = Mainloop::kValueTile;
  static constexpr int kTileTokens = Mainloop::kTileTokens;
  static constexpr int kStages = Mainloop::kStages;
  static_assert(Mainloop::kSteps == 4, "keys, values, weights and the barrier have a step each");
  static constexpr int kThreads = 32 * Traits::kWarps;
  static constexpr int kMinBlocks = 2;
  static constexpr int kStateDim = static_cast<int>(SymmetricPower<kHeadDim, 2>::kStateDim);
  static constexpr int kRowSlices = (Mainloop::kTasks + Traits::kWarps - 1) / Traits::kWarps;
  // Blocks that cover the state of one sequence and head.
  static constexpr int kSlices = kRowSlices * (kValueDim / kValueTile);
  // Whether numbers of this type need `Exponents` to stay in range.
  static constexpr bool kScaled = cute::is_same_v<Element, cute::half_t>;

  struct SharedStorage {
    typename Mainloop::SharedStorage mainloop;
    typename StateTile::Rows rows[Traits::kWarps];
    detail::CumulativeGate gate[kStages][kTileTokens];
    detail::CumulativeGate end_gate[kTileTokens];  // each thread's own: here it takes no registers
    // What the main loop need not have in registers.
    std::int64_t without;  // slots of chunks ahead of those of states, times heads
    std::int64_t segment;  // slot of the state after the segment; -1: not wanted
    detail::CumulativeGate const* first_gate;
    int sequence;
  };
  static_assert(offsetof(SharedStorage, mainloop) == 0, "tiles of wgmma");

  struct Params {
    Element const* key;                  // [b, t, h, d]
    Element const* value;                // [b, t, h, dv]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride gate_stride;

    // Each sequence is cut into segments, which know nothing of each other: all but the first start
    // from a state of zero, and `states` and `ends` are of the segment alone. A segment has a
    // number and a slot as a chunk has (`Sequences::segments`).
    SequenceStates initial;  // [count, h, ..], of each sequence; not given for zero
    // Before each chunk; not before a sequence's first, where it is zero. Null to skip.
    Element* states;    // [slots, h, D, dv], by `state_slots`
    Element* key_sums;  // [slots, h, D]; with states
    // [slots of segments, h, ..], or in a pool, of sequences of one segment; not given to skip.
    SequenceStates ends;
    bool sequence_ends;  // whether they are wanted of last segments, and have slots for them

    Exponents exponents;  // for fp16
    Sequences sequences;  // those listed get their states
    int heads;
    int segment_tokens;  // a multiple of the chunk size
  };

  /// blockIdx = (segment and slice of the state, head); slices of a segment are neighbours, because
  /// they read the same keys and values.
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
    bool const ends =
        params.ends.given() && (first_token + tokens < sequence.length || params.sequence_ends);
    // The last chunk counts for nothing but the state after it.
    int const used = ends ? tokens : cute::max(tokens - 1, 0) / chunk_size * chunk_size;

    detail::CumulativeGate const* gate =
        params.gate == nullptr ? nullptr
                               : params.gate + params.gate_stride.at(sequence, first_token, head);

    constexpr int kKeyColumns = Mainloop::kKeyColumns;
    // A thread copies the same block of the keys from each of its rows.
    int const tile_block = thread % (kKeyColumns / 8);
    int const key_block = Mainloop::key_block(first_task, tile_block);
    collective::TileLoader<Element, kThreads, kTileTokens, kKeyColumns,
                           typename Mainloop::KeyLayout>
        key_loader(params.key + params.key_stride.at(sequence, first_token, head) +
                       8 * (cute::max(key_block, 0) - tile_block),
                   params.key_stride.token, thread);
    collective::TileLoader<Element, kThreads, kTileTokens, kValueTile,
                           typename Mainloop::ValueLayout>
        value_loader(
            params.value + params.value_stride.at(sequence, first_token, head) + value_offset,
            params.value_stride.token, thread);
    // One thread a token takes care of its weight.
    bool const weighs = gate != nullptr && thread < kTileTokens;
    // One tile early, as in `TileLoader`.
    std::int64_t const gate_step = kTileTokens * params.gate_stride.token;
    detail::CumulativeGate const* next_gate = gate + thread * params.gate_stride.token - gate_step;
    // `left` tokens remain, those of this tile included; others become zero. One group of copies a
    // tile, so that waits can count.
    auto load_keys = [&](int stage, int left) {
      key_loader.load(shared.key, stage, !Mainloop::kGathered || key_block >= 0 ? left : 0);
    };
    auto load_values = [&](int stage, int left) {
      value_loader.load(shared.value, stage, left);
      if (weighs) {
        next_gate = collective::advanced(next_gate, gate_step);
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<detail::CumulativeGate>::copy(
            *next_gate, storage.gate[stage][thread], thread < left);
      }
      cute::cp_async_fence();
    };

    int const scale = tokens == 0 ? 0 : key_scale(params, sequence.index, head);
    if (gate == nullptr && thread < kTileTokens) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        shared.weight[stage][thread] = detail::power_of_two(scale);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
      load_keys(tile, used - tile * kTileTokens);
      load_values(tile, used - tile * kTileTokens);
    }

    typename Mainloop::Accumulators accumulators;
    bool loaded = false;
    bool const continues = params.initial.given() && sequence.continues;
    if (continues && segment.index == 0) {
      float const factor = detail::power_of_two(scale);
      loaded = params.initial.read(shape(params), sequence.index, sequence.index, head,
                                   [&](auto const& state) {
                                     StateTile::load(state.from(value_offset), value_offset == 0,
                                                     factor, factor, mainloop, accumulators);
                                   });
    }
    if (!loaded) {
      StateTile::clear(accumulators);
    }

    // Of exponents; those of states are fewer.
    std::int64_t slot_head = (sequence.first_slot + first_token / chunk_size) * params.heads + head;
    if (thread == 0) {
      storage.without =
          params.sequences.without_slots(sequence, state_slots(params.initial.given())) *
          static_cast<std::int64_t>(params.heads);
      Slots const slots = params.sequence_ends ? Slots::kAll : Slots::kButLast;
      storage.segment = ends ? segments.slot(in_segments, segment.index, slots) : -1;
      storage.sequence = sequence.index;
      storage.first_gate = gate;
    }
    // Cumulative gate of the chunk from `begin` on.
    auto gate_of_chunk = [&](detail::CumulativeGate const* gates, int begin) {
      int const last = cute::min(begin + chunk_size, tokens) - 1;
      return params.gate != nullptr && begin < tokens ? gates[last * params.gate_stride.token]
                                                      : detail::CumulativeGate{0.0f, 0.0f};
    };
    detail::CumulativeGate next_end_gate = gate_of_chunk(gate, 0);
    // Turns the cumulative gates of a tile, which the thread itself has copied, into weights.
    auto weigh = [&](int stage, bool starts_chunk) {
      if (weighs) {
        detail::CumulativeGate const end = starts_chunk ? next_end_gate : storage.end_gate[thread];
        shared.weight[stage][Mainloop::weight_index(thread)] =
            detail::exp2(end.since(storage.gate[stage][thread]) + static_cast<float>(scale));
      }
    };
    int stage = 0;
    collective::wait_for_copies<kStages - 2, Mainloop::kWarpgroups>();
    weigh(stage, true);
    __syncthreads();
    typename Mainloop::Operands operands;
    mainloop.load(shared, stage, 0, operands);
#pragma unroll 1
    for (int done = 0; done < tokens;) {
      float const chunk_gate = next_end_gate.total();
      if (weighs) {
        storage.end_gate[thread] = next_end_gate;
      }
      next_end_gate = gate_of_chunk(storage.first_gate, done + chunk_size);  // a chunk ahead
      if (params.states != nullptr && stores && (continues || first_token > 0 || done > 0)) {
        store_rounded(params, slot_head, slot_head - storage.without, value_offset, scale, mainloop,
                      storage.rows[thread / 32], accumulators);
      }
      if (done == used) {
        break;
      }
      slot_head += params.heads;
      if (params.gate != nullptr) {
        float const decay = detail::exp2(chunk_gate);
        StateTile::multiply(decay, decay, accumulators);
      }
      int const chunk_end = cute::min(done + chunk_size, tokens);
#pragma unroll 1
      for (; done < chunk_end; done += kTileTokens) {
        // The tile after this one takes over a step before the end of this one, which is in
        // registers then.
        int const next_stage = stage == kStages - 1 ? 0 : stage + 1;
        int const free_stage = stage == 0 ? kStages - 1 : stage - 1;
        int const left = used - done - (kStages - 1) * kTileTokens;
#pragma unroll
        for (int step = 0; step < Mainloop::kSteps; ++step) {
          auto prepare = [&] {
            if (step == 0) {
              collective::wait_for_copies<kStages - 3, Mainloop::kWarpgroups>();
              weigh(next_stage, done + kTileTokens >= chunk_end);
            } else if (step == 1) {
              __syncthreads();
              load_keys(free_stage, left);
            } else if (step == 2) {
              load_values(free_stage, left);
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
    if (stores && storage.segment >= 0) {
      // What the main loop need not have in registers is found again.
      int const offset =
          detail::recomputed(static_cast<int>(blockIdx.x)) % kSlices / kRowSlices * kValueTile;
      float const factor = detail::power_of_two(-scale);
      params.ends.write(shape(params), storage.segment, storage.sequence,
                        static_cast<int>(blockIdx.y), [&](auto const& state) {
                          StateTile::store(state.from(offset), offset == 0, factor, factor,
                                           mainloop, accumulators);
                        });
    }
  }

 private:
  CUTE_DEVICE static StateShape shape(Params const& params) {
    return {params.heads, kStateDim, kValueDim};
  }

  /// f, where accumulators hold 2^f S and 2^f z. One factor of phi is multiplied by 2^f. With all
  /// |k| < 2^x it is below 2^(15 - max(x, 0)) then, and its product with another k below 2^15.
  CUTE_DEVICE static int key_scale(Params const& params, int sequence, int head) {
    if constexpr (kScaled) {
      if (params.exponents.key != nullptr) {
        int const x =
            params.exponents.key[static_cast<std::int64_t>(sequence) * params.heads + head];
        return 15 - x - cute::max(x, 0);
      }
    }
    return 0;
  }

  CUTE_DEVICE static void store_rounded(Params const& params, std::int64_t slot_head,
                                        std::int64_t state_head, int value_offset, int scale,
                                        Mainloop const& mainloop, typename StateTile::Rows& rows,
                                        typename Mainloop::Accumulators& accumulators) {
    float state_scale = 1.0f;
    float sum_scale = 1.0f;
    if constexpr (kScaled) {
      auto stored = [&](int const* exponents) {
        return detail::power_of_two(-scale - (exponents == nullptr ? 0 : exponents[slot_head]));
      };
      state_scale = stored(params.exponents.state);
      sum_scale = stored(params.exponents.key_sum);
    }
    StateTile::store_rounded(params.states + state_head * kStateDim * kValueDim + value_offset,
                             params.key_sums + state_head * kStateDim, value_offset == 0,
                             state_scale, sum_scale, mainloop, rows, accumulators);
  }
};

}  // namespace retention::kernel
