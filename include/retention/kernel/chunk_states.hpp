// The state before every chunk of a sequence, and after the last:
//
//     S_{c+1} = exp(G_c) S_c + sum_{j in chunk c} exp(G_c - g_j) phi_k(k_j) v_j^T
//
// and z, the sum of keys, the same with v = 1; g_j is the cumulative log gate since the start of
// the chunk, and G_c that of its last token.
//
// A block of threads owns a slice of the state of one sequence and head, holds it in fp32
// registers, and walks over the tokens. Nothing is shared between blocks, so the result does not
// depend on their order.

#pragma once

#include <cstdint>

#include "retention/collective/expand_reduce.hpp"
#include "retention/collective/tile.hpp"
#include "retention/kernel/sequence.hpp"

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
  using Mainloop = collective::ExpandReduce<Element, Traits::kHeadDim, Traits::kValueDim>;
  using SharedStorage = typename Mainloop::SharedStorage;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kValueTile = Mainloop::kValueTile;
  static constexpr int kTileTokens = Mainloop::kTileTokens;
  static constexpr int kStages = Mainloop::kStages;
  static constexpr int kThreads = 32 * Traits::kWarps;
  static constexpr int kStateDim = static_cast<int>(SymmetricPower<kHeadDim, 2>::kStateDim);
  static constexpr int kRowSlices = (Mainloop::kTasks + Traits::kWarps - 1) / Traits::kWarps;
  // Blocks that cover the state of one sequence and head.
  static constexpr int kSlices = kRowSlices * (kValueDim / kValueTile);

  struct Params {
    Element const* key;    // [b, t, h, d]
    Element const* value;  // [b, t, h, dv]
    float const* gate;     // [b, t, h] cumulative log gate since the chunk's start; null for none
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride gate_stride;

    // One item is a segment of a sequence: segments * sequences of them, segment fastest.
    float const* initial_state;    // [items, h, D, dv]; null for zero
    float const* initial_key_sum;  // [items, h, D]; with initial_state
    Element* states;               // [slots, h, D, dv] before each chunk; null to skip
    Element* key_sums;             // [slots, h, D]; with states
    float* final_state;            // [items, h, D, dv]; null to skip
    float* final_key_sum;          // [items, h, D]; with final_state

    Sequences sequences;
    int heads;
    int segments;  // parts that each sequence is cut into
  };

  /// blockIdx = (slice of the state, head, item)
  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const head = blockIdx.y;
    int const item = blockIdx.z;
    int const value_offset = static_cast<int>(blockIdx.x) / kRowSlices * kValueTile;
    int const task = static_cast<int>(blockIdx.x) % kRowSlices * Traits::kWarps + thread / 32;
    // A warp beyond the last task helps to load, computes the last one again and stores nothing.
    bool const stores = task < Mainloop::kTasks;
    Mainloop const mainloop(thread % 32, stores ? task : Mainloop::kTasks - 1);

    Sequence const sequence = params.sequences.get(item / params.segments);
    int const chunk_size = params.sequences.chunk_size;
    int const num_chunks = cute::ceil_div(sequence.length, chunk_size);
    int const segment_chunks = cute::ceil_div(num_chunks, params.segments);
    int const first_chunk = cute::min(item % params.segments * segment_chunks, num_chunks);
    int const end_chunk = cute::min(first_chunk + segment_chunks, num_chunks);
    int const first_token = first_chunk * chunk_size;
    int const tokens = cute::min(end_chunk * chunk_size, sequence.length) - first_token;

    float const* gate = params.gate == nullptr
                            ? nullptr
                            : params.gate + params.gate_stride.at(sequence, first_token, head);

    collective::TileLoader<Element, kThreads, kTileTokens, kHeadDim, typename Mainloop::KeyLayout>
        key_loader(params.key + params.key_stride.at(sequence, first_token, head),
                   params.key_stride.token, thread);
    collective::TileLoader<Element, kThreads, kTileTokens, kValueTile,
                           typename Mainloop::ValueLayout>
        value_loader(
            params.value + params.value_stride.at(sequence, first_token, head) + value_offset,
            params.value_stride.token, thread);
    float const* next_gate = gate + thread * params.gate_stride.token;
    // `left` tokens remain, those of this tile included.
    auto load_tile = [&](int stage, int left) {
      if (left > 0) {
        key_loader.load(shared.key, stage, left);
        value_loader.load(shared.value, stage, left);
        if (gate != nullptr && thread < kTileTokens) {
          cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(*next_gate, shared.gate[stage][thread],
                                                             thread < left);
          next_gate += kTileTokens * params.gate_stride.token;
        }
      }
      cute::cp_async_fence();  // one group a tile, empty past the end, so that waits can count
    };

    if (gate == nullptr && thread < kTileTokens) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        shared.gate[stage][thread] = 0.0f;
      }
    }
#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) {
      load_tile(tile, tokens - tile * kTileTokens);
    }

    typename Mainloop::Accumulators accumulators;
    std::int64_t const item_head = static_cast<std::int64_t>(item) * params.heads + head;
    load_initial(params, item_head, value_offset, mainloop, accumulators);

    std::int64_t slot = sequence.first_slot + first_chunk;
    float end_gate = 0.0f;
    int stage = 0;
    int chunk_end = 0;
#pragma unroll 1
    for (int done = 0; done < tokens; done += kTileTokens) {
      if (done == chunk_end) {
        chunk_end += chunk_size;
        if (params.states != nullptr && stores) {
          store<Element>(params.states, params.key_sums, slot * params.heads + head, value_offset,
                         mainloop, accumulators);
        }
        ++slot;
        if (gate != nullptr) {
          int const last = cute::min(chunk_end, tokens) - 1;
          end_gate = gate[last * params.gate_stride.token];
          decay(detail::exp_nonpositive(end_gate), accumulators);
        }
      }
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      load_tile(stage == 0 ? kStages - 1 : stage - 1, tokens - done - (kStages - 1) * kTileTokens);
      mainloop(shared, stage, end_gate, accumulators);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (params.final_state != nullptr && stores) {
      store<float>(params.final_state, params.final_key_sum, item_head, value_offset, mainloop,
                   accumulators);
    }
  }

 private:
  using Accumulators = typename Mainloop::Accumulators;

  CUTE_DEVICE static void clear(Accumulators& accumulators) {
    cute::clear(Mainloop::state_tensor(accumulators));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      accumulators.key_sum[i] = 0.0f;
    }
  }

  CUTE_DEVICE static void decay(float factor, Accumulators& accumulators) {
    cute::Tensor state = Mainloop::state_tensor(accumulators);
#pragma unroll
    for (int i = 0; i < cute::size(state); ++i) {
      state(i) *= factor;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      accumulators.key_sum[i] *= factor;
    }
  }

  // Calls visit(offset, state[0], state[1], diagonal) for the pairs of neighbouring columns that
  // this lane holds, and visit_sum(row, sum, diagonal) for its part of the sum of keys. The
  // accumulators are without the multiplicity of the row: 1 in a diagonal block pair, else 2.
  template <class Visit, class VisitSum>
  CUTE_DEVICE static void for_each(Mainloop const& mainloop, Accumulators& accumulators,
                                   Visit visit, VisitSum visit_sum) {
    int const lane = detail::recomputed(mainloop.lane);
    int const group = lane / 4;
    int const quad = lane % 4;
    int const first_outer = detail::recomputed(mainloop.first_outer);
    collective::StateUnit const unit{
        detail::recomputed(mainloop.unit.outer),
        {detail::recomputed(mainloop.unit.native[0]), detail::recomputed(mainloop.unit.native[1])}};
    cute::Tensor state = Mainloop::state_tensor(accumulators);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const row = unit.row(i) + group * unit.stride_native(i);
      int const stride = unit.stride_outer(i);
      bool const diagonal = unit.outer == unit.native[i];
      int offset = (row + first_outer * stride) * kValueDim + 2 * quad;
#pragma unroll
      for (int x = 0; x < Mainloop::kOuterTile; ++x) {
#pragma unroll
        for (int n = 0; n < kValueTile / 8; ++n) {
          visit(offset + 8 * n, state(cute::make_coord(0, i), x, n),
                state(cute::make_coord(1, i), x, n), diagonal);
        }
        offset += stride * kValueDim;
        // Keeps the rows apart: interleaved, their conversions need more registers than there are.
        __syncwarp();
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        visit_sum(row + (2 * quad + c) * stride, accumulators.key_sum[2 * i + c], diagonal);
      }
    }
  }

  CUTE_DEVICE static void load_initial(Params const& params, std::int64_t item_head,
                                       int value_offset, Mainloop const& mainloop,
                                       Accumulators& accumulators) {
    clear(accumulators);
    if (params.initial_state == nullptr) {
      return;
    }
    float const* state = params.initial_state + item_head * kStateDim * kValueDim + value_offset;
    float const* key_sum = params.initial_key_sum + item_head * kStateDim;
    for_each(
        mainloop, accumulators,
        [&](int offset, float& lo, float& hi, bool diagonal) {
          float2 const pair = *reinterpret_cast<float2 const*>(state + offset);
          float const weight = diagonal ? 1.0f : 0.5f;
          lo = weight * pair.x;
          hi = weight * pair.y;
        },
        [&](int row, float& sum, bool diagonal) { sum = (diagonal ? 1.0f : 0.5f) * key_sum[row]; });
  }

  template <class Out>
  CUTE_DEVICE static void store(Out* state, Out* key_sum, std::int64_t slot_head, int value_offset,
                                Mainloop const& mainloop, Accumulators& accumulators) {
    state += slot_head * kStateDim * kValueDim + value_offset;
    key_sum += slot_head * kStateDim;
    // The unit's sum is whole in each of the warps that share it; one of them stores it.
    bool const stores_sum = value_offset == 0 && mainloop.first_outer == 0;
    for_each(
        mainloop, accumulators,
        [&](int offset, float lo, float hi, bool diagonal) {
          float const weight = diagonal ? 1.0f : 2.0f;
          if constexpr (cute::is_same_v<Out, float>) {
            *reinterpret_cast<float2*>(state + offset) = make_float2(weight * lo, weight * hi);
          } else {
            // Doubling is exact after rounding as well, and takes half the instructions there.
            *reinterpret_cast<std::uint32_t*>(state + offset) =
                detail::multiply<Out>(detail::pack<Out>(lo, hi), detail::pack<Out>(weight, weight));
          }
        },
        [&](int row, float sum, bool diagonal) {
          if (stores_sum) {
            key_sum[row] = Out((diagonal ? 1.0f : 2.0f) * sum);
          }
        });
  }
};

}  // namespace retention::kernel
