// The gradient of every query of a chunk: what comes through the state before the chunk and what
// comes through the tokens of the chunk up to its own, in one set of accumulators.
//
//     dqs_i = w_i J(qs_i)^T (S_c do_i - delta_i z_c) + 2 sum_{s < j <= i} da_ij k_j
//     da_ij = s_ij exp(g_i - g_j) inverse_i (do_i . v_j - delta_i),     s_ij = qs_i . k_j
//     dq_i  = scale_i dqs_i                                    0 where the row has no weight
//
// and the query's part of the gradient of the cumulative log gate, q_i . dq_i / 2: the rounding
// that is left of what would be zero, for kernel/key_gradient.hpp.
//
// for rows as kernel/gradient_rows.hpp prepares them, with w_i = exp(g_i) inverse_i and J the
// Jacobian of phi. Tiles of rows are those of kernel/row_tiles.hpp; with a chunk as long as the
// sequence nothing comes from a state.

#pragma once

#include <cstdint>

#include "retention/collective/contract.hpp"
#include "retention/collective/sm80/intra_query_gradient.hpp"
#include "retention/collective/sm90/intra_query_gradient.hpp"
#include "retention/collective/tile.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/row_tiles.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct QueryGradientTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr int kWarps = Warps;
};

template <class Traits>
struct QueryGradient : OneItem<QueryGradient<Traits>> {
  using Element = typename Traits::Element;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  // Long rows leave no register for turns, and take far longer than idle blocks.
  static constexpr bool kTakesTurns = kHeadDim * kValueDim < 64 * 64;
  // Shared memory has room for one block of long rows.
  static constexpr int kMinBlocks = kHeadDim > 64 ? 1 : 2;
  static constexpr bool kHasExponents = cute::is_same_v<Element, cute::half_t>;

  static constexpr bool kWarpgroups = collective::kTakesWarpgroups<kValueDim>;
  template <bool Warpgroups>
  using TilingOf = collective::ContractTiling<kValueDim, Traits::kWarps, Warpgroups>;
  template <bool Warpgroups>
  using ContractOf =
      collective::Contract<Element, kHeadDim, kValueDim, TilingOf<Warpgroups>, false>;
  template <bool Warpgroups>
  using IntraOf = cute::conditional_t<
      Warpgroups && collective::kFitsWarpgroups<kValueDim>,
      collective::sm90::IntraQueryGradient<Element, kHeadDim, kValueDim, TilingOf<true>>,
      collective::sm80::IntraQueryGradient<Element, kHeadDim, kValueDim, Traits::kWarps>>;
  using Contract = ContractOf<kWarpgroups>;
  using Tiling = TilingOf<kWarpgroups>;
  using Intra = IntraOf<kWarpgroups>;
  using QueryLayout = typename Contract::RowLayout;
  using OutputLayout = typename Contract::ValueLayout;

  static constexpr int kRows = Tiling::kRows;
  static constexpr int kMmaRows = Tiling::kMmaRows;

  template <bool Warpgroups>
  static constexpr int kThreadsOf = 32 * TilingOf<Warpgroups>::kWarps;
  static constexpr int kThreads = kThreadsOf<kWarpgroups>;
  template <bool Warpgroups>
  using TilesOf = RowTiles<TilingOf<Warpgroups>::kRows>;
  using Tiles = TilesOf<kWarpgroups>;
  using Tile = typename Tiles::Tile;
  using Rows = collective::TileRows;

  static_assert(kRows <= kThreads, "a thread has a row, if any");

  template <bool Warpgroups>
  struct StorageOf {
    static constexpr int kRows = TilingOf<Warpgroups>::kRows;
    alignas(128) Element query[cute::cosize_v<typename ContractOf<Warpgroups>::RowLayout>];
    alignas(128) Element d_output[cute::cosize_v<typename ContractOf<Warpgroups>::ValueLayout>];
    union {
      typename ContractOf<Warpgroups>::SharedStorage contract;
      typename IntraOf<Warpgroups>::SharedStorage intra;
    };
    // Kept here for the loop inside the chunk and the epilogue: registers are short.
    Tile tile;
    typename IntraOf<Warpgroups>::Work work;
    typename IntraOf<Warpgroups>::RowFactors rows;
    float key_sum_factor[kRows];  // -delta_i
    float state_weight[kRows];    // w_i 2^{f_c}: see `GradientExponents`
    float scale[kRows];           // of what is accumulated; 0 where the row has no gradient
    int exponent;                 // of da in the accumulators
  };
  using SharedStorage = StorageOf<kWarpgroups>;
  static_assert(collective::kKeepsAlignment<QueryLayout>, "tiles of wgmma follow");
  static_assert(collective::kKeepsAlignment<OutputLayout>, "tiles of wgmma follow");

  /// Every row of d or dv elements is aligned to 16 bytes.
  struct Params {
    Element const* query;                // [b, t, hq, d] prepared: qs
    Element const* key;                  // [b, t, h, d]
    Element const* value;                // [b, t, h, dv]
    Element const* d_output;             // [b, t, hq, dv]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    float const* inverse;  // [b, t, hq], as delta and scale; 0 where a row has no weight
    float const* delta;
    float const* scale;
    // Before each chunk, by `state_slots`; may be null for one chunk.
    Element const* states;    // [slots, h, D, dv]
    Element const* key_sums;  // [slots, h, D]
    Element* d_query;         // [b, t, hq, d]; null for not wanted, as d_gate
    float* d_gate;            // [b, t, hq] by row_stride
    TokenStride query_stride;
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride d_output_stride;
    TokenStride gate_stride;
    TokenStride row_stride;
    TokenStride d_query_stride;
    Exponents exponents;                   // all null unless kHasExponents
    GradientExponents gradient_exponents;  // likewise
    Sequences sequences;                   // chunks of a multiple of 64 tokens
    int heads;                             // key heads, h
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

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = Intra::this_thread();
    int const head = blockIdx.y;
    Tiles const tiles{params.sequences, params.group};
    Tile const tile = tiles.find(number);
    Sequence const sequence = params.sequences.get(tile.sequence);
    Rows const rows = tiles.rows(tile, sequence);
    if (rows.tokens <= 0) {
      return;  // the same for the whole block
    }
    int const first_token = tile.chunk * sequence.chunk_size;
    std::int64_t const slot_head =
        (sequence.first_slot + tile.chunk) * static_cast<std::int64_t>(params.heads) + head;
    auto const at = [&](TokenStride const& stride, int h) {
      return stride.at(sequence, first_token, h);
    };

    int const query_head = head * params.group;
    load_rows<QueryLayout, kHeadDim>(params.query + at(params.query_stride, query_head),
                                     params.query_stride, rows, shared.query, thread);
    load_rows<OutputLayout, kValueDim>(params.d_output + at(params.d_output_stride, query_head),
                                       params.d_output_stride, rows, shared.d_output, thread);
    cute::cp_async_fence();
    typename Intra::Work const work{
        params.key + at(params.key_stride, head),
        params.value + at(params.value_stride, head),
        params.gate == nullptr ? nullptr : params.gate + at(params.gate_stride, head),
        params.key_stride.token,
        params.value_stride.token,
        params.gate_stride.token,
        rows,
        1.0f};
    if (thread == 0) {
      shared.tile = tile;
      shared.work = work;
      shared.exponent = exponent(params.gradient_exponents.score, slot_head);
    }
    bool const has_state = tile.chunk > 0 || params.initial_states;
    std::int64_t const state_head =
        params.sequences.slot(sequence, tile.chunk, state_slots(params.initial_states)) *
            params.heads +
        head;
    Contract contract(shared.contract, params.states + state_head * Contract::kStateDim * kValueDim,
                      params.key_sums + state_head * Contract::kStateDim, thread);
    if (has_state) {
      contract.prefetch();
    } else {
      Intra::prefetch(shared.intra, work);
    }
    int const score_exponent = exponent(params.gradient_exponents.score, slot_head);
    int const weight_exponent = exponent(params.gradient_exponents.weight, slot_head);
    prepare_rows(params, shared, work, sequence, first_token, score_exponent, weight_exponent,
                 thread);

    int const first_row = Tiling::first_row(thread / 32);
    cute::Tensor gradient = cute::make_tensor<float>(typename Contract::GradientLayout{});
    typename Intra::QueryProducts products = {};
    if (has_state) {
      // Without the factor 2 of da, and over the factor 2^-weight_exponent of each row.
      int const unit = score_exponent - 1 - weight_exponent;
      contract(shared.query, shared.d_output, shared.key_sum_factor,
               detail::power_of_two(exponent(params.exponents.state, slot_head) + unit),
               detail::power_of_two(exponent(params.exponents.key_sum, slot_head) + unit),
               first_row, thread % 32, gradient);
      __syncthreads();  // the keys come where the state was
      Intra::prefetch(shared.intra, shared.work);
      multiply_rows(shared.state_weight, gradient);
      multiply_queries(shared, gradient, products);
    } else {
      cute::clear(gradient);
    }
    Intra::run(shared.intra, shared.work, shared.query, shared.d_output, shared.rows, gradient,
               products);
    store(params, shared, gradient, products);
  }

 private:
  CUTE_DEVICE static int exponent(int const* exponents, std::int64_t index) {
    return !kHasExponents || exponents == nullptr ? 0 : exponents[index];
  }

  // Starts the copy of a tile; rows that stand for nothing become zero.
  template <class Layout, int Columns>
  CUTE_DEVICE static void load_rows(Element const* source, TokenStride const& stride,
                                    Rows const& rows, Element* tile, int thread) {
    constexpr int kPieces = Columns / 8;  // of 16 bytes in a row
    constexpr int kStepRows = kThreads / kPieces;
    static_assert(kStepRows % 8 == 0, "steps differ by whole periods of the swizzle");
    int const column = thread % kPieces * 8;
    int const first = thread / kPieces;
    Element* target = tile + Layout{}(first, column, 0);
#pragma unroll 4
    for (int step = 0; step < kRows; step += kStepRows) {
      int const row = first + step;
      bool const valid = row < rows.count();
      // Where the predicate is false nothing is read.
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(source + rows.token(row) * stride.token +
                                                    rows.head(row) * stride.head + column),
          *reinterpret_cast<cute::uint128_t*>(target + Layout{}(step, 0, 0)), valid);
    }
  }

  // A thread a row.
  CUTE_DEVICE static void prepare_rows(Params const& params, SharedStorage& shared,
                                       typename Intra::Work const& work, Sequence const& sequence,
                                       int first_token, int score_exponent, int weight_exponent,
                                       int thread) {
    if (thread >= kRows) {
      return;
    }
    Rows const& rows = work.rows;
    float inverse = 0.0f, delta = 0.0f, scale = 0.0f;
    detail::CumulativeGate gate{0.0f, 0.0f}, reference_gate{0.0f, 0.0f};
    if (thread < rows.count()) {
      int const token = rows.token(thread);
      std::int64_t const offset =
          params.row_stride.at(sequence, first_token + token,
                               static_cast<int>(blockIdx.y) * params.group + rows.head(thread));
      inverse = params.inverse[offset];
      delta = params.delta[offset];
      scale = params.scale[offset];
      if (work.gate != nullptr) {
        gate = work.gate[token * work.gate_stride];
        int const reference = rows.token(Intra::reference_row(thread));
        reference_gate = work.gate[reference * work.gate_stride];
      }
    }
    // delta is anything where there is no weight.
    bool const has_gradient = inverse > 0.0f;
    float const factor = inverse * detail::power_of_two(score_exponent);
    float const shift = has_gradient ? -delta * factor : 0.0f;
    float const decay = has_gradient ? detail::exp2(gate.since(reference_gate)) : 0.0f;
    shared.rows.gate[thread] = gate;
    shared.rows.factor[thread] = {factor, shift};
    shared.rows.early_factor[thread] = {decay * factor, decay * shift};
    shared.key_sum_factor[thread] = has_gradient ? -delta : 0.0f;
    shared.state_weight[thread] =
        has_gradient ? detail::exp2(gate.total() + static_cast<float>(weight_exponent)) * inverse
                     : 0.0f;
    shared.scale[thread] = has_gradient ? detail::power_of_two(1 - score_exponent) * scale : 0.0f;
  }

  template <class Tensor>
  CUTE_DEVICE static void multiply_rows(float const* factors, Tensor& gradient) {
    int const thread = Intra::this_thread();
    int const first_row = Tiling::first_row(thread / 32) + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float const factor = factors[first_row + 16 * m + 8 * upper];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          gradient(cute::make_coord(0, upper), m, n) *= factor;
          gradient(cute::make_coord(1, upper), m, n) *= factor;
        }
      }
    }
  }

  // q . dq of what comes from the state, a lane's part.
  template <class Tensor>
  CUTE_DEVICE static void multiply_queries(SharedStorage& shared, Tensor const& gradient,
                                           typename Intra::QueryProducts& products) {
    cute::Tensor query = cute::make_tensor(cute::make_smem_ptr(shared.query), QueryLayout{});
    int const thread = Intra::this_thread();
    int const row = Tiling::first_row(thread / 32) + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float& sum = products[m][upper];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          auto const pair = *reinterpret_cast<std::uint32_t const*>(
              &query(row + 16 * m + 8 * upper, 8 * n + 2 * (thread % 4), 0));
          sum = fmaf(detail::unpack_lo<Element>(pair), gradient(cute::make_coord(0, upper), m, n),
                     sum);
          sum = fmaf(detail::unpack_hi<Element>(pair), gradient(cute::make_coord(1, upper), m, n),
                     sum);
        }
      }
    }
  }

  template <class Tensor>
  CUTE_DEVICE static void store(Params const& params, SharedStorage const& shared,
                                Tensor const& gradient,
                                typename Intra::QueryProducts const& products) {
    int const thread = Intra::this_thread();
    int const lane = thread % 32;
    int const first_row = Tiling::first_row(thread / 32) + lane / 4;
    int const head = blockIdx.y;
    Rows const rows = shared.work.rows;
    Sequence const sequence = params.sequences.get(shared.tile.sequence);
    int const first_token = shared.tile.chunk * sequence.chunk_size;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        int const row = first_row + 16 * m + 8 * upper;
        bool const valid = row < rows.count();
        float const scale = shared.scale[row];
        // Not a product with zero: without weight, what was accumulated may be anything.
        auto const scaled = [&](float x) { return scale == 0.0f ? 0.0f : scale * x; };
        if (params.d_gate != nullptr) {
          float sum = products[m][upper];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (lane % 4 == 0 && valid) {
            params.d_gate[params.row_stride.at(sequence, first_token + rows.token(row),
                                               head * params.group + rows.head(row))] =
                scale == 0.0f ? 0.0f : detail::power_of_two(-shared.exponent) * sum;
          }
        }
        if (params.d_query == nullptr) {
          continue;
        }
        Element* target = params.d_query +
                          params.d_query_stride.at(sequence, first_token + rows.token(row),
                                                   head * params.group + rows.head(row)) +
                          8 * (lane % 4);
#pragma unroll
        for (int first = 0; first < kHeadDim / 8; first += 4) {
          std::uint32_t x[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            x[n] =
                detail::pack<Element>(scaled(gradient(cute::make_coord(0, upper), m, first + n)),
                                      scaled(gradient(cute::make_coord(1, upper), m, first + n)));
          }
          collective::transpose_quad(x, lane);
          if (valid) {
            *reinterpret_cast<uint4*>(target + 8 * first) = make_uint4(x[0], x[1], x[2], x[3]);
          }
        }
      }
    }
  }
};

}  // namespace retention::kernel
