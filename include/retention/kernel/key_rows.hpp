// What the kernels whose rows are keys share: the gradients of keys and of values.
//
// Rows are consecutive tokens of a chunk and one key head. They get their gradient from the queries
// of all heads of the group from their own token to the chunk's end, and from the state after the
// chunk, whose gradient is that of everything later.

#pragma once

#include <cstdint>

#include "retention/collective/key_tiles.hpp"
#include "retention/collective/query_tiles.hpp"
#include "retention/collective/sm80/intra_key_gradient.hpp"
#include "retention/collective/sm90/intra_key_gradient.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/packed.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/row_tiles.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

/// The main loop of either architecture; `TilingOf` gives the rows of each.
template <class Element, int HeadDim, int ValueDim, template <bool> class TilingOf,
          collective::RowGradient kGradient, bool Warpgroups>
using IntraKeyGradientOf = cute::conditional_t<
    Warpgroups && collective::kFitsWarpgroups<ValueDim>,
    collective::sm90::IntraKeyGradient<Element, HeadDim, ValueDim, TilingOf<true>, kGradient>,
    collective::sm80::IntraKeyGradient<Element, HeadDim, ValueDim, TilingOf<false>, kGradient>>;

/// Every row of d or dv elements is aligned to 16 bytes. `query`, `inverse` and `delta` are those
/// of GradientRows.
template <class Element>
struct KeyRowsParams {
  Element const* query;                // [b, t, hq, d]
  Element const* key;                  // [b, t, h, d]
  Element const* value;                // [b, t, h, dv]
  Element const* d_output;             // [b, t, hq, dv]
  detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
  float const* inverse;                // [b, t, hq] 0 where a query has no weight
  float const* delta;                  // [b, t, hq]
  // After each chunk, by `gradient_slots`; null where there is none to read.
  Element const* d_states;    // [slots, h, D, dv]
  Element const* d_key_sums;  // [slots, h, D]
  TokenStride query_stride;
  TokenStride key_stride;
  TokenStride value_stride;
  TokenStride d_output_stride;
  TokenStride gate_stride;
  TokenStride row_stride;  // of inverse and delta
  Exponents exponents;     // null unless fp16, as gradient_exponents
  GradientExponents gradient_exponents;
  Sequences sequences;   // chunks of a multiple of 64 tokens
  int heads;             // key heads, h
  int group;             // query heads that share a key head, hq / h
  bool final_gradients;  // whether the gradient after a sequence's last chunk is not zero
};

/// A block's rows: up to kRows keys of a chunk.
template <int kRows>
struct KeyRows {
  using Tiles = RowTiles<kRows, HeavyTiles::kFirst>;

  Sequence sequence;
  int chunk;        // of the sequence
  int chunk_start;  // in the sequence
  int first_token;  // of the rows, in the chunk
  int count;        // not above 0 where there are none
  int end_token;    // of the chunk

  /// blockIdx = (tile of rows, key head). Nothing to do where x is 0.
  template <class Params>
  CUTE_HOST static dim3 grid(Params const& params) {
    return Tiles{params.sequences, 1}.grid(params.heads);
  }
  template <class Params>
  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return Tiles{params.sequences, 1}.turn_blocks();
  }
  CUTE_DEVICE static int tiles(Sequences const& sequences) { return Tiles{sequences, 1}.count(); }

  CUTE_DEVICE static KeyRows find(Sequences const& sequences, int number) {
    Tiles const tiles{sequences, 1};
    typename Tiles::Tile const tile = tiles.find(number);
    Sequence const sequence = sequences.get(tile.sequence);
    collective::TileRows const rows = tiles.rows(tile, sequence);
    int const chunk_start = tile.chunk * sequence.chunk_size;
    return {sequence,    tile.chunk,
            chunk_start, rows.first_token,
            rows.tokens, cute::min(sequence.length - chunk_start, sequence.chunk_size)};
  }

  /// Of the chunk and a head.
  template <class Params>
  CUTE_DEVICE std::int64_t slot_head(Params const& params, int head) const {
    return (sequence.first_slot + chunk) * params.heads + head;
  }
  /// Of the gradient of the state after the chunk.
  template <class Params>
  CUTE_DEVICE std::int64_t state_head(Params const& params, int head) const {
    return params.sequences.slot(sequence, chunk, gradient_slots(params.final_gradients)) *
               params.heads +
           head;
  }

  template <class Params>
  CUTE_DEVICE bool has_state(Params const& params) const {
    return params.final_gradients || chunk_start + end_token < sequence.length;
  }

  /// Offset of the first row of a [b, t, h, *] tensor.
  CUTE_DEVICE std::int64_t at(TokenStride const& stride, int head) const {
    return stride.at(sequence, chunk_start + first_token, head);
  }
};

/// What the loop inside the chunk needs; `Intra` is collective::IntraKeyGradient. The weights are
/// multiplied by 2^unit_exponent.
template <class Intra, class Element, class Rows>
CUTE_DEVICE typename Intra::Work intra_work(KeyRowsParams<Element> const& params, Rows const& rows,
                                            int head, int unit_exponent) {
  auto const at = [&](TokenStride const& stride, int h) {
    return stride.at(rows.sequence, rows.chunk_start, h);
  };
  int const query_head = head * params.group;
  return {params.query + at(params.query_stride, query_head),
          params.d_output + at(params.d_output_stride, query_head),
          params.inverse + at(params.row_stride, query_head),
          params.delta + at(params.row_stride, query_head),
          params.gate == nullptr ? nullptr : params.gate + at(params.gate_stride, head),
          params.query_stride.token,
          params.query_stride.head,
          params.d_output_stride.token,
          params.d_output_stride.head,
          params.row_stride.token,
          params.row_stride.head,
          params.gate_stride.token,
          params.group,
          rows.first_token,
          rows.count,
          rows.end_token,
          unit_exponent};
}

/// Copies the gate of each row of the tile, and last that of the chunk's last token. Rows that
/// stand for nothing have this one.
template <class Intra, int kGates>
CUTE_DEVICE void load_row_gates(typename Intra::Work const& work,
                                detail::CumulativeGate (&target)[kGates], int thread) {
  for (int row = thread; row < kGates; row += Intra::kThreads) {
    int const token = row < work.rows ? work.first_token + row : work.end_token - 1;
    target[row] =
        work.gate == nullptr ? detail::CumulativeGate{} : work.gate[token * work.gate_token];
  }
}

/// Copies `count` rows of a [tokens, Columns] matrix, from `source` on, to a tile of kRows, each
/// element by `prepare` of pairs of them; rows that stand for nothing are zero.
template <int kThreads, int kRows, int Columns, class Layout, class Element, class Prepare>
CUTE_DEVICE void load_rows(Element const* source, std::int64_t stride, int count, Element* target,
                           int thread, Prepare prepare) {
  cute::Tensor tile = cute::make_tensor(cute::make_smem_ptr(target), Layout{});
  constexpr int kPieces = Columns / 8;  // of 16 bytes in a row
  constexpr int kStepRows = kThreads / kPieces;
  constexpr int kBatch = kRows / kStepRows < 8 ? kRows / kStepRows : 8;  // loads in flight
  static_assert(kRows % (kBatch * kStepRows) == 0, "whole batches");
  int const column = thread % kPieces * 8;
#pragma unroll 1
  for (int start = 0; start < kRows; start += kBatch * kStepRows) {
    int const first = start + thread / kPieces;
    uint4 x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int const row = first + i * kStepRows;
      x[i] = make_uint4(0, 0, 0, 0);
      if (row < count) {
        x[i] = *reinterpret_cast<uint4 const*>(source + row * stride + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      *reinterpret_cast<uint4*>(&tile(first + i * kStepRows, column, 0)) =
          make_uint4(prepare(x[i].x), prepare(x[i].y), prepare(x[i].z), prepare(x[i].w));
    }
  }
}

/// Stores `factor` times the rows g and g + 8 of each mma tile of a warp, as far as the tile has
/// `count`. `target` is the tile's first row.
template <class Tiling, class Element, class Gradient>
CUTE_DEVICE void store_rows(Element* target, std::int64_t stride, int count, float factor,
                            int thread, Gradient const& gradient) {
  int const lane = thread % 32;
  int const first_row = Tiling::first_row(thread / 32) + lane / 4;
#pragma unroll
  for (int m = 0; m < cute::size<1>(gradient); ++m) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int const row = first_row + 16 * m + 8 * upper;
#pragma unroll
      for (int first = 0; first < cute::size<2>(gradient); first += 4) {
        std::uint32_t x[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          x[n] = detail::pack<Element>(factor * gradient(cute::make_coord(0, upper), m, first + n),
                                       factor * gradient(cute::make_coord(1, upper), m, first + n));
        }
        collective::transpose_quad(x, lane);
        if (row < count) {
          *reinterpret_cast<uint4*>(target + row * stride + 8 * (first + lane % 4)) =
              make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }
}

}  // namespace retention::kernel
