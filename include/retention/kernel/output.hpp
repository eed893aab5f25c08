// The output of every query of a chunk: what the state before the chunk gives it and what the
// tokens of the chunk up to its own do, in one set of accumulators, and normalised.
//
//     n_i = scale^2 exp(g_i) phi_q(q_i) S_c + sum_{s < j <= i} w_ij v_j,   z_i the same with v = 1
//     o_i = n_i / z_i                                                      0 / 0 = 0
//
// A tile of rows holds consecutive tokens, and of each token all the query heads that read one key
// head: they share the state, the keys and the values that the block loads.

#pragma once

#include <cstdint>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/intra_chunk.hpp"
#include "retention/collective/tile.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct OutputTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  using Tiling = collective::RowTiling<ValueDim, Warps>;
};

template <class Traits>
struct Output {
  using Element = typename Traits::Element;
  using Tiling = typename Traits::Tiling;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kRows = Tiling::kRows;
  static constexpr int kMmaRows = Tiling::kMmaRows;
  static constexpr int kThreads = 32 * Tiling::kWarps;

  using Apply = collective::ExpandApply<Element, kHeadDim, kValueDim, Tiling>;
  using Intra = collective::IntraChunk<Element, kHeadDim, kValueDim, Tiling>;
  using QueryLayout = typename Apply::QueryLayout;

  struct SharedStorage {
    alignas(128) Element query[cute::cosize_v<QueryLayout>];
    union {
      typename Apply::SharedStorage apply;
      typename Intra::SharedStorage intra;
    };
    int row_token[kRows];   // position in the chunk
    float row_gate[kRows];  // cumulative log gate since the chunk's start
  };

  struct Params {
    Element const* query;     // [b, t, hq, d]
    Element const* key;       // [b, t, h, d]
    Element const* value;     // [b, t, h, dv]
    float const* gate;        // [b, t, h] cumulative log gate since the chunk's start; or null
    Element const* states;    // [slots, h, D, dv] before each chunk; may be null for one chunk
    Element const* key_sums;  // [slots, h, D]
    Element* output;          // [b, t, hq, dv]
    float* normalizer;        // [b, t, hq]
    TokenStride query_stride;
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride gate_stride;
    TokenStride output_stride;
    TokenStride normalizer_stride;
    Sequences sequences;
    int heads;       // key heads, h
    int group;       // query heads that share a key head, hq / h
    int max_chunks;  // of any sequence, at least
    float scale;
    bool initial_states;  // whether the state before a sequence's first chunk is not zero
  };

  /// Tokens in a tile of rows.
  CUTE_HOST_DEVICE static int tile_tokens(int group, int chunk_size) {
    return cute::min(kRows / group, chunk_size);
  }
  /// Tiles of one chunk.
  CUTE_HOST_DEVICE static int chunk_tiles(int group, int chunk_size) {
    return cute::ceil_div(chunk_size, tile_tokens(group, chunk_size));
  }

  /// blockIdx = (tile and chunk, tile fastest; key head; sequence)
  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    int const head = blockIdx.y;
    Sequence const sequence = params.sequences.get(blockIdx.z);
    int const chunk_size = params.sequences.chunk_size;
    int const tile_size = tile_tokens(params.group, chunk_size);
    int const tiles = cute::ceil_div(chunk_size, tile_size);
    int const chunk = static_cast<int>(blockIdx.x) / tiles;
    int const first_token = chunk * chunk_size;
    int const chunk_tokens = cute::min(chunk_size, sequence.length - first_token);
    int const first_query = static_cast<int>(blockIdx.x) % tiles * tile_size;
    int const queries = cute::min(tile_size, chunk_tokens - first_query);
    if (queries <= 0) {
      return;  // the same for the whole block
    }

    auto const at = [&](TokenStride const& stride, int h) {
      return stride.at(sequence, first_token, h);
    };
    float const* gate =
        params.gate == nullptr ? nullptr : params.gate + at(params.gate_stride, head);
    load_queries(params, shared, params.query + at(params.query_stride, head * params.group), gate,
                 first_query, queries, thread);

    float normalizer[kMmaRows][2] = {};
    cute::Tensor output = cute::make_tensor<float>(collective::OutputLayout<Tiling>{});
    cute::clear(output);

    if (chunk > 0 || params.initial_states) {
      std::int64_t const slot_head =
          (sequence.first_slot + chunk) * static_cast<std::int64_t>(params.heads) + head;
      Apply apply(shared.apply, params.states + slot_head * Apply::kStateDim * kValueDim,
                  params.key_sums + slot_head * Apply::kStateDim, thread);
      apply(shared.query, warp, lane, output, normalizer);
      __syncthreads();  // the keys come where the state was
      scale_rows(params, shared, warp, lane, output, normalizer);
    }
    Intra intra(shared.intra, params.key + at(params.key_stride, head), params.key_stride.token,
                params.value + at(params.value_stride, head), params.value_stride.token, gate,
                params.gate_stride.token, first_query + queries, thread);
    intra(shared.query, shared.row_token, shared.row_gate, params.scale, warp, lane, output,
          normalizer);
    store(params, sequence, first_token + first_query, queries, head, warp, lane, output,
          normalizer);
  }

 private:
  // Row r of the tile is head r % group of token r / group; rows that stand for nothing are zero.
  CUTE_DEVICE static void load_queries(Params const& params, SharedStorage& shared,
                                       Element const* query, float const* gate, int first_query,
                                       int queries, int thread) {
    cute::Tensor tile = cute::make_tensor(cute::make_smem_ptr(shared.query), QueryLayout{});
    constexpr int kPieces = kHeadDim / 8;
#pragma unroll 1
    for (int i = thread; i < kRows * kPieces; i += kThreads) {
      int const row = i / kPieces;
      int const column = i % kPieces * 8;
      int const token = first_query + row / params.group;
      Element const* source = query + token * params.query_stride.token +
                              row % params.group * params.query_stride.head + column;
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(source),
          *reinterpret_cast<cute::uint128_t*>(&tile(row, column, 0)), row < queries * params.group);
    }
    for (int row = thread; row < kRows; row += kThreads) {
      int const token = first_query + cute::min(row / params.group, queries - 1);
      shared.row_token[row] = token;
      shared.row_gate[row] = gate == nullptr ? 0.0f : gate[token * params.gate_stride.token];
    }
  }

  template <class Tensor>
  CUTE_DEVICE static void scale_rows(Params const& params, SharedStorage const& shared, int warp,
                                     int lane, Tensor& output, float (&normalizer)[kMmaRows][2]) {
    int const first_row = warp / Tiling::kColumnWarps * Tiling::kWarpRows + lane / 4;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const factor =
            params.scale * params.scale *
            detail::exp_nonpositive(shared.row_gate[first_row + 16 * m + 8 * half]);
        normalizer[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < Tiling::kValueTile / 8; ++n) {
          output(cute::make_coord(0, half), m, n) *= factor;
          output(cute::make_coord(1, half), m, n) *= factor;
        }
      }
    }
  }

  template <class Tensor>
  CUTE_DEVICE static void store(Params const& params, Sequence const& sequence, int first_token,
                                int queries, int head, int warp, int lane, Tensor const& output,
                                float const (&normalizer)[kMmaRows][2]) {
    int const first_row = warp / Tiling::kColumnWarps * Tiling::kWarpRows + lane / 4;
    int const first_column = warp % Tiling::kColumnWarps * Tiling::kValueTile;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = normalizer[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int const row = first_row + 16 * m + 8 * half;
        if (row >= queries * params.group) {
          continue;
        }
        int const token = first_token + row / params.group;
        int const query_head = head * params.group + row % params.group;
        float const inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        Element* target = params.output + params.output_stride.at(sequence, token, query_head) +
                          first_column + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < Tiling::kValueTile / 8; ++n) {
          *reinterpret_cast<std::uint32_t*>(target + 8 * n) =
              detail::pack<Element>(inverse * output(cute::make_coord(0, half), m, n),
                                    inverse * output(cute::make_coord(1, half), m, n));
        }
        if (first_column == 0 && lane % 4 == 0) {
          params.normalizer[params.normalizer_stride.at(sequence, token, query_head)] = sum;
        }
      }
    }
  }
};

}  // namespace retention::kernel
