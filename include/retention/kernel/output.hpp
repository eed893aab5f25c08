// The output of every query of a chunk: what the state before the chunk gives it and what the
// tokens of the chunk up to its own do, in one set of accumulators, and normalised.
//
//     n_i = exp(g_i) phi_q(q_i) S_c + sum_{s < j <= i} w_ij v_j,   z_i the same with v = 1
//     o_i = n_i / z_i                                              0 where there is no weight
//
// with w_ij = (q_i . k_j)^2 exp(g_i - g_j). The output does not depend on a query's magnitude; the
// normaliser z_i is that of the query rescaled by a power of two to magnitude [1/2, 1).
//
// With a chunk as long as the sequence nothing comes from a state: that is the quadratic form.

#pragma once

#include <cfloat>
#include <cstdint>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/sm80/intra_chunk.hpp"
#include "retention/collective/sm90/intra_chunk.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/rescale.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/row_tiles.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct OutputTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr int kWarps = Warps;
};

template <class Traits>
struct Output : OneItem<Output<Traits>> {
  using Element = typename Traits::Element;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr bool kWarpgroups = collective::kTakesWarpgroups<kValueDim>;
  // Long values leave a lane of four warpgroups no register for a product that is under way.
  static constexpr int kWarpgroupCount = kHeadDim <= 64 && kValueDim <= 64 ? 2 : 3;
  template <bool Warpgroups>
  using TilingOf = collective::ApplyTiling<kValueDim, Traits::kWarps, Warpgroups, kWarpgroupCount>;
  using Tiling = TilingOf<kWarpgroups>;
  // Long rows leave no register for turns, and take far longer than idle blocks. Nor do two blocks
  // of three warpgroups, of values of 64.
  static constexpr bool kTakesTurns = kHeadDim <= 64 && kValueDim != 64;
  static constexpr int kRows = Tiling::kRows;
  static constexpr int kMmaRows = Tiling::kMmaRows;
  static constexpr int kRowThreads = 32 * Tiling::kWarps;
  static constexpr int kMinBlocks = kWarpgroups && kWarpgroupCount > 2 ? 1 : 2;
  // fp16 has too few exponents for the keys of a head and their sums: see `Exponents`.
  static constexpr bool kHasExponents = cute::is_same_v<Element, cute::half_t>;
  static constexpr int kQueryExponent = detail::kQueryExponent<Element>;
  // Weights are below 2^kWeightExponent where gates do not rise: near the end of fp16's range, so
  // that small weights keep their digits. The rest, up to 2^16, is for gates that do.
  static constexpr int kWeightExponent = kHasExponents ? 13 : 0;

  template <bool Warpgroups>
  using ApplyOf = collective::ExpandApply<Element, kHeadDim, kValueDim, TilingOf<Warpgroups>>;
  using Apply = ApplyOf<kWarpgroups>;
  template <bool Warpgroups>
  using IntraOf = cute::conditional_t<
      Warpgroups && collective::kFitsWarpgroups<kValueDim>,
      collective::sm90::IntraChunk<Element, kHeadDim, kValueDim, TilingOf<true>>,
      collective::sm80::IntraChunk<Element, kHeadDim, kValueDim, TilingOf<false>>>;
  using Intra = IntraOf<kWarpgroups>;
  template <bool Warpgroups>
  static constexpr int kThreadsOf = IntraOf<Warpgroups>::kThreads;
  static constexpr int kThreads = kThreadsOf<kWarpgroups>;
  template <bool Warpgroups>
  using TilesOf = RowTiles<TilingOf<Warpgroups>::kRows>;
  using Tiles = TilesOf<kWarpgroups>;
  using Tile = typename Tiles::Tile;
  using Rows = collective::TileRows;
  using QueryLayout = typename Apply::QueryLayout;
  // A warpgroup that copies for the others.
  template <bool Warpgroups>
  static constexpr bool kProducesOf = TilingOf<Warpgroups>::kWarpgroups != 0;
  static constexpr bool kProduces = kProducesOf<kWarpgroups>;
  // A block was launched with 80 a thread where there are two of three warpgroups, or 128 of four.
  static constexpr int kRowRegisters = kWarpgroupCount == 2 ? 104 : 144;
  static constexpr int kProducerRegisters = kWarpgroupCount == 2 ? 32 : 80;

  template <class Apply, class Intra>
  union Loops {
    Apply apply;
    Intra intra;
  };
  template <bool Warpgroups>
  using LoopsOf =
      cute::conditional_t<kProducesOf<Warpgroups>, typename IntraOf<Warpgroups>::SharedStorage,
                          Loops<typename ApplyOf<Warpgroups>::SharedStorage,
                                typename IntraOf<Warpgroups>::SharedStorage>>;
  template <bool Warpgroups>
  struct StorageOf {
    alignas(128) Element query[cute::cosize_v<typename ApplyOf<Warpgroups>::QueryLayout>];
    LoopsOf<Warpgroups> loops;  // one after the other, or all from one stream
    // Kept here for the loop inside the chunk and the epilogue: registers are short.
    Tile tile;
    typename IntraOf<Warpgroups>::Work work;
    // Since the chunk's start, less weight_exponent.
    detail::CumulativeGate row_gate[TilingOf<Warpgroups>::kRows];
  };
  using SharedStorage = StorageOf<kWarpgroups>;
  static_assert(collective::kKeepsAlignment<QueryLayout> &&
                    collective::kKeepsAlignment<typename Apply::StateLayout>,
                "tiles of wgmma follow");

  /// Every row of d or dv elements is aligned to 16 bytes.
  struct Params {
    Element const* query;                // [b, t, hq, d]
    Element const* key;                  // [b, t, h, d]
    Element const* value;                // [b, t, h, dv]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    // Before each chunk, by `state_slots`; may be null for one chunk.
    Element const* states;    // [slots, h, D, dv]
    Element const* key_sums;  // [slots, h, D]
    Element* output;          // [b, t, hq, dv]
    Element* residual;        // [b, t, hq, dv] o - output, strides as output's; null: not wanted
    float* normalizer;        // [b, t, hq]
    TokenStride query_stride;
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride gate_stride;
    TokenStride output_stride;
    TokenStride normalizer_stride;
    Exponents exponents;  // all null unless kHasExponents
    Sequences sequences;  // chunks of a multiple of 64 tokens
    int heads;            // key heads, h
    int group;            // query heads that share a key head, hq / h; at most kRows
    bool initial_states;  // whether the state before a sequence's first chunk is not zero
  };

  /// blockIdx = (tile of rows, key head). Nothing to do where x is 0.
  template <bool Warpgroups>
  CUTE_HOST static dim3 grid_of(Params const& params) {
    return TilesOf<Warpgroups>{params.sequences, params.group}.grid(params.heads);
  }
  CUTE_HOST static dim3 grid(Params const& params) { return grid_of<kWarpgroups>(params); }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return Tiles{params.sequences, params.group}.turn_blocks();
  }
  CUTE_DEVICE static int count(Params const& params) {
    return Tiles{params.sequences, params.group}.count();
  }

  /// Copies what the others take, for an item.
  CUTE_DEVICE static void produce(Params const& params, char* smem, int number) {
    if constexpr (kProduces) {
      Item const item(params, number);
      if (item.rows.tokens > 0) {
        Intra::Stream::produce(reinterpret_cast<SharedStorage*>(smem)->loops, item.work(params));
      }
    }
  }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = Intra::this_thread();
    int const lane = thread % 32;
    int const head = blockIdx.y;
    Item const item(params, number);
    Tile const tile = item.tile;
    Sequence const sequence = item.sequence;
    Rows const rows = item.rows;
    if (rows.tokens <= 0) {
      return;  // the same for the whole block
    }
    int const weight_exponent = item.weight_exponent;
    auto const at = [&](TokenStride const& stride, int h) { return item.at(stride, h); };
    typename Intra::Work const work = item.work(params);
    detail::CumulativeGate const* const gate = work.gate;
    if (thread == 0) {
      shared.tile = tile;
      shared.work = work;
    }
    Element const* query = params.query + at(params.query_stride, head * params.group);
    int const first_row = Tiling::first_row(thread / 32);
    float normalizer[kMmaRows][2] = {};
    cute::Tensor output = cute::make_tensor<float>(collective::OutputLayout<Tiling, kValueDim>{});
    cute::clear(output);

    bool const has_state = item.has_state;
    std::int64_t const slot_head =
        (sequence.first_slot + tile.chunk) * static_cast<std::int64_t>(params.heads) + head;
    std::int64_t const state_head = item.state_head(params);
    if constexpr (kProduces) {
      load_queries(params, shared, query, gate, weight_exponent, rows, thread);
      cute::tma_store_fence();  // wgmma reads them
      Tiling::meet();
      if (has_state) {
        Apply::add_key_sum(params.key_sums + state_head * Apply::kStateDim, shared.query, first_row,
                           lane, normalizer);
        Intra::template apply_state<Apply>(shared.loops, shared.work, shared.query, output);
      }
    } else {
      Apply apply(shared.loops.apply, params.states + state_head * Apply::kStateDim * kValueDim,
                  thread);
      if (has_state) {
        apply.prefetch();
      } else {
        Intra::prefetch(shared.loops.intra, work);
      }
      load_queries(params, shared, query, gate, weight_exponent, rows, thread);
      if (has_state) {
        __syncthreads();  // the queries are there
        Apply::add_key_sum(params.key_sums + state_head * Apply::kStateDim, shared.query, first_row,
                           lane, normalizer);
        apply(shared.query, first_row, lane, output);
        __syncthreads();  // the keys come where the state was
        Intra::prefetch(shared.loops.intra, shared.work);
      }
    }
    if (has_state) {
      float state_scale = 1.0f, key_sum_scale = 1.0f;
      if constexpr (kHasExponents) {
        state_scale =
            detail::power_of_two(exponent(params.exponents.state, slot_head) - weight_exponent);
        key_sum_scale =
            detail::power_of_two(exponent(params.exponents.key_sum, slot_head) - weight_exponent);
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        // The rest of the decay, from that row to each, is that of earlier keys.
        int const reference = Intra::reference_row(first_row + 16 * m);
        float const decay =
            detail::exp2(shared.row_gate[reference].total() + static_cast<float>(weight_exponent));
        scale(decay * state_scale, decay * key_sum_scale, m, output, normalizer);
      }
    } else if constexpr (kProduces) {
      // Zeros in registers: as constants they would reach the loop as what is not of wgmma, for
      // which ptxas has one product wait for another.
      collective::hold<kMmaRows * kValueDim / 2>(&output(0));
    }
    if constexpr (kProduces) {
      Intra::run(shared.loops, shared.work, shared.query, shared.row_gate, output, normalizer);
    } else {
      Intra::run(shared.loops.intra, shared.work, shared.query, shared.row_gate, output,
                 normalizer);
    }
    store(params, shared.tile, shared.work.rows, output, normalizer);
  }

 private:
  // What a block has.
  struct Item {
    Tile tile;
    Sequence sequence;
    Rows rows;
    int first_token;      // of the chunk
    int weight_exponent;  // accumulators hold weights over 2^it: see `Exponents`, kWeightExponent
    bool has_state;

    CUTE_DEVICE Item(Params const& params, int number) {
      Tiles const tiles{params.sequences, params.group};
      tile = tiles.find(number);
      sequence = params.sequences.get(tile.sequence);
      rows = tiles.rows(tile, sequence);
      first_token = tile.chunk * sequence.chunk_size;
      has_state = tile.chunk > 0 || (params.initial_states && sequence.continues);
      weight_exponent = 0;
      if constexpr (kHasExponents) {
        if (rows.tokens > 0) {
          std::int64_t const sequence_head =
              static_cast<std::int64_t>(sequence.index) * params.heads + blockIdx.y;
          weight_exponent =
              2 * (score_exponent(params, sequence_head) + kQueryExponent) - kWeightExponent;
        }
      }
    }

    CUTE_DEVICE std::int64_t at(TokenStride const& stride, int head) const {
      return stride.at(sequence, first_token, head);
    }

    CUTE_DEVICE std::int64_t state_head(Params const& params) const {
      return params.sequences.slot(sequence, tile.chunk, state_slots(params.initial_states)) *
                 params.heads +
             blockIdx.y;
    }

    CUTE_DEVICE typename Intra::Work work(Params const& params) const {
      int const head = blockIdx.y;
      collective::KeyWork<Element> const keys{
          params.key + at(params.key_stride, head),
          params.value + at(params.value_stride, head),
          params.gate == nullptr ? nullptr : params.gate + at(params.gate_stride, head),
          params.key_stride.token,
          params.value_stride.token,
          params.gate_stride.token,
          rows,
          detail::power_of_two(-weight_exponent)};
      if constexpr (kProduces) {
        return {keys, has_state ? params.states + state_head(params) * Apply::kStateDim * kValueDim
                                : nullptr};
      } else {
        return keys;
      }
    }
  };

  // Without exponents, that of keys whose elements are below 1.
  CUTE_DEVICE static int score_exponent(Params const& params, std::int64_t sequence_head) {
    constexpr int kOfUnitKeys = kHeadDim == 32 ? 5 : kHeadDim == 64 ? 6 : 7;
    static_assert(1 << kOfUnitKeys == kHeadDim);
    return params.exponents.score == nullptr ? kOfUnitKeys : params.exponents.score[sequence_head];
  }

  CUTE_DEVICE static int exponent(int const* exponents, std::int64_t index) {
    return exponents == nullptr ? 0 : exponents[index];
  }

  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes in a row of queries, a lane each

  // Rows that stand for nothing are zero.
  CUTE_DEVICE static void load_queries(Params const& params, SharedStorage& shared,
                                       Element const* query, detail::CumulativeGate const* gate,
                                       int weight_exponent, Rows const& rows, int thread) {
    cute::Tensor tile = cute::make_tensor(cute::make_smem_ptr(shared.query), QueryLayout{});
    // Loaded first, to arrive together with the queries.
    constexpr int kGates = cute::ceil_div(kRows, kRowThreads);  // of a thread
    detail::CumulativeGate row_gate[kGates] = {};
#pragma unroll
    for (int i = 0; i < kGates; ++i) {
      int const row = thread + i * kRowThreads;
      if (gate != nullptr && row < rows.count()) {
        row_gate[i] = gate[rows.token(row) * params.gate_stride.token];
      }
    }
    constexpr int kStepRows = kRowThreads / kPieces;
    constexpr int kBatch = kRows / kStepRows < 8 ? kRows / kStepRows : 8;  // loads in flight
    static_assert(kRows % (kBatch * kStepRows) == 0, "whole batches");
    int const column = thread % kPieces * 8;
#pragma unroll 1
    for (int start = 0; start < kRows; start += kBatch * kStepRows) {
      int const first = start + thread / kPieces;
      std::uint32_t x[kBatch][4] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int const row = first + i * kStepRows;
        if (row < rows.count()) {
          uint4 const bits =
              *reinterpret_cast<uint4 const*>(query + rows.token(row) * params.query_stride.token +
                                              rows.head(row) * params.query_stride.head + column);
          x[i][0] = bits.x;
          x[i][1] = bits.y;
          x[i][2] = bits.z;
          x[i][3] = bits.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        detail::rescale_row<Element, kPieces>(x[i]);
        *reinterpret_cast<uint4*>(&tile(first + i * kStepRows, column, 0)) =
            make_uint4(x[i][0], x[i][1], x[i][2], x[i][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kGates; ++i) {
      if (int const row = thread + i * kRowThreads; row < kRows) {
        shared.row_gate[row] = {row_gate[i].high,
                                row_gate[i].low - static_cast<float>(weight_exponent)};
      }
    }
  }

  // The m-th tile of rows.
  template <class Tensor>
  CUTE_DEVICE static void scale(float factor, float key_sum_factor, int m, Tensor& output,
                                float (&normalizer)[kMmaRows][2]) {
    normalizer[m][0] *= key_sum_factor;
    normalizer[m][1] *= key_sum_factor;
#pragma unroll
    for (int n = 0; n < kValueDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        output(i, m, n) *= factor;
      }
    }
  }

  template <class Tensor>
  CUTE_DEVICE static void store(Params const& params, Tile const& tile, Rows const& rows,
                                Tensor const& output, float const (&normalizer)[kMmaRows][2]) {
    int const thread = Intra::this_thread();
    int const lane = thread % 32;
    int const first_row = Tiling::first_row(thread / 32) + lane / 4;
    int const head = blockIdx.y;
    Sequence const sequence = params.sequences.get(tile.sequence);
    int const first_token = tile.chunk * sequence.chunk_size;
    float unit = 1.0f;  // what a weight of 1 in the accumulators stands for
    if constexpr (kHasExponents) {
      std::int64_t const sequence_head =
          static_cast<std::int64_t>(sequence.index) * params.heads + head;
      unit = detail::power_of_two(2 * score_exponent(params, sequence_head) - kWeightExponent);
    }
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float sum = normalizer[m][upper];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        // Below the normal numbers a sum is made of terms that have lost their digits, here or in
        // units of 1: then there is no weight. One that is NaN is to be seen.
        float const scaled = sum > FLT_MIN ? sum * unit : cute::min(sum * unit, sum);
        float const inverse = scaled <= FLT_MIN ? 0.0f : 1.0f / sum;

        int const row = first_row + 16 * m + 8 * upper;
        bool const valid = row < rows.count();
        int const token = first_token + rows.token(row);
        int const query_head = head * params.group + rows.head(row);
        std::int64_t const offset =
            params.output_stride.at(sequence, token, query_head) + 8 * (lane % 4);
#pragma unroll
        for (int first = 0; first < kValueDim / 8; first += 4) {
          std::uint32_t x[4];
          std::uint32_t residual[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            float const lo = inverse * output(cute::make_coord(0, upper), m, first + n);
            float const hi = inverse * output(cute::make_coord(1, upper), m, first + n);
            x[n] = detail::pack<Element>(lo, hi);
            residual[n] = detail::pack<Element>(lo - detail::unpack_lo<Element>(x[n]),
                                                hi - detail::unpack_hi<Element>(x[n]));
          }
          auto const store_pieces = [&](Element* target, std::uint32_t (&pieces)[4]) {
            collective::transpose_quad(pieces, lane);
            if (valid) {
              *reinterpret_cast<uint4*>(target + offset + 8 * first) =
                  make_uint4(pieces[0], pieces[1], pieces[2], pieces[3]);
            }
          };
          store_pieces(params.output, x);
          if (params.residual != nullptr) {
            store_pieces(params.residual, residual);
          }
        }
        if (valid && lane % 4 == 0) {
          params.normalizer[params.normalizer_stride.at(sequence, token, query_head)] = scaled;
        }
      }
    }
  }
};

}  // namespace retention::kernel
