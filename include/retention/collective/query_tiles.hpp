// Tiles of a chunk's queries, gradients of their outputs and what else there is of them in shared
// memory, for main loops whose rows are keys: copied while those before are in use. Tokens come
// from the last to the first, and of each tile of tokens the heads of the group.

#pragma once

#include <cstdint>

#include <cute/tensor.hpp>

#include "retention/collective/key_tiles.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/cumulative_gate.hpp"

namespace retention::collective {

/// The gradient of a key head that a row of accumulators is.
enum class RowGradient { kKey, kValue };

/// Tiles of `TileQueries` tokens of one head, `LoadTiles` of which are loaded at a time.
template <class Element_, int HeadDim, int ValueDim, int Threads, int TileQueries, int LoadTiles,
          RowGradient kGradient>
struct QueryTiles {
  using Element = Element_;

  static constexpr bool kIsKey = kGradient == RowGradient::kKey;
  // They are like those of keys: queries have their width, gradients of outputs that of values.
  using Tiles = KeyTiles<Element, HeadDim, ValueDim, Threads, TileQueries, LoadTiles>;
  static constexpr int kTileQueries = TileQueries;
  static constexpr int kLoadTiles = LoadTiles;
  static constexpr int kLoadQueries = Tiles::kLoadKeys;
  static constexpr int kSlots = Tiles::kSlots;
  static constexpr int kThreads = Threads;

  using QueryLayout = typename Tiles::KeyLayout;             // [query, d, slot]
  using OutputGradientLayout = typename Tiles::ValueLayout;  // [query, dv, slot]

  /// Where a thread reads of the next columns.
  struct alignas(16) Source {
    Element const* query;
    Element const* d_output;
  };
  /// Columns that are loaded at a time: kLoadQueries tokens of a head of the group.
  struct alignas(8) Columns {
    int token;  // the first
    int head;

    CUTE_DEVICE Columns next(int group) const {
      return head + 1 < group ? Columns{token, head + 1} : Columns{token - kLoadQueries, 0};
    }
  };

  struct SharedStorage {
    alignas(128) Element query[cute::cosize_v<QueryLayout>];
    alignas(128) Element d_output[cute::cosize_v<OutputGradientLayout>];
    alignas(16) float inverse[kSlots][kTileQueries];
    alignas(16) detail::CumulativeGate gate[kSlots][kTileQueries];
    alignas(16) float delta[kIsKey ? kSlots : 1][kTileQueries];
    // Each thread's own: here they take no registers.
    Source source[kThreads];
    Columns columns[kThreads];  // loaded last
  };

  /// What the loop needs beside its registers, all of which gradients and scores take: it stays in
  /// shared memory, out of reach of whoever moves code out of loops.
  struct Work {
    Element const* query;     // of the chunk's first token and the group's first head, as d_output,
    Element const* d_output;  // inverse and delta
    float const* inverse;
    float const* delta;
    detail::CumulativeGate const* gate;  // of the chunk's first token; null for none
    // Strides.
    std::int64_t query_token, query_head;
    std::int64_t d_output_token, d_output_head;
    std::int64_t row_token, row_head;
    std::int64_t gate_token;
    int group;
    int first_token;    // of the rows, in the chunk
    int rows;           // that stand for something
    int end_token;      // of the chunk
    int unit_exponent;  // c_i are inverse_i times 2^unit_exponent

    CUTE_DEVICE float half_unit() const { return 0.5f * static_cast<float>(unit_exponent); }
  };

  CUTE_DEVICE static int this_thread() { return Tiles::this_thread(); }

  /// Starts the first loads, to slots from 0 on.
  CUTE_DEVICE static void prefetch(SharedStorage& shared, Work const& work) {
    int const thread = this_thread();
    int const tokens = work.end_token - work.first_token;
    Columns const first{work.first_token + (tokens - 1) / kLoadQueries * kLoadQueries, 0};
    auto const source = [&](Element const* tensor, std::int64_t stride, int pieces) {
      return tensor + (first.token + thread / pieces) * stride + thread % pieces * 8;
    };
    shared.source[thread] = {source(work.query, work.query_token, HeadDim / 8),
                             source(work.d_output, work.d_output_token, ValueDim / 8)};
    load(shared, work, first, 0);
  }

  /// Starts the copies of `columns`, to tiles from `slot` on; zeros beyond the chunk's end.
  CUTE_DEVICE static void load(SharedStorage& shared, Work const& work, Columns const& columns,
                               int slot) {
    int const thread = this_thread();
    shared.columns[thread] = columns;
    if (columns.token >= work.first_token) {
      int const left = work.end_token - columns.token;
      Source const source = shared.source[thread];
      Tiles::template copy<HeadDim, QueryLayout>(source.query, work.query_token, shared.query, slot,
                                                 left, thread);
      Tiles::template copy<ValueDim, OutputGradientLayout>(source.d_output, work.d_output_token,
                                                           shared.d_output, slot, left, thread);
      if (columns.head + 1 < work.group) {
        shared.source[thread] = {source.query + work.query_head,
                                 source.d_output + work.d_output_head};
      } else {
        int const heads = work.group - 1;
        shared.source[thread] = {
            source.query - heads * work.query_head - kLoadQueries * work.query_token,
            source.d_output - heads * work.d_output_head - kLoadQueries * work.d_output_token};
      }
      if (thread < kLoadQueries) {
        using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>;
        int const tile = slot + thread / kTileQueries;
        int const column = thread % kTileQueries;
        std::int64_t const token = columns.token + thread;
        bool const valid = thread < left;
        std::int64_t const row = token * work.row_token + columns.head * work.row_head;
        Copy::copy(work.inverse[row], shared.inverse[tile][column], valid);
        if constexpr (kIsKey) {
          Copy::copy(work.delta[row], shared.delta[tile][column], valid);
        }
        using CopyGate = cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<detail::CumulativeGate>;
        bool const gated = work.gate != nullptr;
        // Without gates nothing is read, from an address that is aligned.
        CopyGate::copy(gated ? work.gate[token * work.gate_token]
                             : *reinterpret_cast<detail::CumulativeGate const*>(work.query),
                       shared.gate[tile][column], valid && gated);
      }
    }
    cute::cp_async_fence();
  }
};

/// For mma.sync. Of long rows more at a time would leave one block less room.
template <class Element, int HeadDim, int ValueDim, int Threads, RowGradient kGradient>
using WarpQueryTiles =
    QueryTiles<Element, HeadDim, ValueDim, Threads, 32, HeadDim <= 64 ? 2 : 1, kGradient>;

}  // namespace retention::collective
