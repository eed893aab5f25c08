// What the gradient kernels need of every query row i, prepared once: the query as the forward pass
// rescaled it, and four numbers.
//
//     qs_i      = 2^n_i q_i           of magnitude [2^(m - 1), 2^m), m = kQueryExponent; 0 without
//     weight inverse_i = 1 / (z_i 2^(2m))    z_i as the forward pass saved it; 0 where there is no
//     weight delta_i   = do_i . o_i          o_i = output_i + residual_i weight_i  = exp(g_i)
//     inverse_i scale_i   = 2^n_i               the gradient of q_i is that of qs_i times scale_i
//
// With s_ij = qs_i . k_j, p_ij = s_ij^2 exp(g_i - g_j) inverse_i are the normalised weights. From a
// rounded output, delta would lose all of do_i . (v_j - o_i) where one weight dominates a row.

#pragma once

#include <cfloat>
#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/reduce.hpp"
#include "retention/detail/rescale.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim>
struct GradientRowsTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
};

template <class Traits>
struct GradientRows : OneItem<GradientRows<Traits>> {
  using Element = typename Traits::Element;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTileTokens = 64;
  static constexpr int kWarpRows = kTileTokens / kWarps;  // of one head
  static constexpr bool kHasExponents = cute::is_same_v<Element, cute::half_t>;
  static constexpr int kQueryExponent = detail::kQueryExponent<Element>;

  struct SharedStorage {
    GradientRange warps[kWarps];
    std::int64_t slot;  // of the tile's range: here it takes no register
  };

  /// Every row of d or dv elements is aligned to 16 bytes.
  struct Params {
    Element const* query;                // [b, t, hq, d]
    Element const* d_output;             // [b, t, hq, dv]
    Element const* output;               // [b, t, hq, dv]
    Element const* residual;             // [b, t, hq, dv], strides as output's
    float const* normalizer;             // [b, t, hq]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    TokenStride query_stride;
    TokenStride d_output_stride;
    TokenStride output_stride;
    TokenStride normalizer_stride;
    TokenStride gate_stride;
    Element* prepared_query;  // [b, t, hq, d]
    float* inverse;           // [b, t, hq], as delta, weight and scale
    float* delta;
    float* weight;
    float* scale;
    TokenStride prepared_query_stride;
    TokenStride row_stride;
    GradientRange* ranges;  // [slots of tiles, h] with kHasExponents
    Sequences sequences;
    int heads;  // key heads, h
    int group;  // query heads that share a key head, hq / h

    /// The sequences in tiles: their slots are those of `ranges`.
    CUTE_HOST_DEVICE Sequences tiles() const { return sequences.pieces(kTileTokens); }
  };

  /// (tile, key head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.tiles().most_chunks()),
                static_cast<unsigned>(params.heads));
  }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return params.sequences.turn_blocks(params.sequences.length / kTileTokens);
  }
  CUTE_DEVICE static int count(Params const& params) { return params.tiles().num_chunks(); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    Sequences const tiles = params.tiles();
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const head = blockIdx.y;
    Chunk const tile = tiles.find(number);
    Sequence const sequence = tiles.get(tile.sequence);
    std::int64_t const first = static_cast<std::int64_t>(tile.index) * kTileTokens;
    if (first >= sequence.length) {
      return;  // a number without a tile
    }

    if (threadIdx.x == 0) {
      shared.slot = sequence.first_slot + tile.index;
    }

    // A warp's tokens; lane r takes care of the numbers of row r.
    std::int64_t const first_token = first + warp * kWarpRows;
    int const rows = static_cast<int>(cute::max(
        cute::min(sequence.length - first_token, std::int64_t{kWarpRows}), std::int64_t{0}));
    bool const owns = lane < rows;
    std::int64_t const own_token = first_token + lane;
    float const gate = params.gate != nullptr && owns
                           ? params.gate[params.gate_stride.at(sequence, own_token, head)].total()
                           : 0.0f;
    GradientRange range{};
#pragma unroll 1
    for (int n = 0; n < params.group; ++n) {
      int const query_head = head * params.group + n;
      float const normalizer =
          owns ? params.normalizer[params.normalizer_stride.at(sequence, own_token, query_head)]
               : 0.0f;
      Products const products =
          value_products(params, sequence, first_token, rows, query_head, lane);
      // Not finite ones are no reason to forget a row.
      bool const has_weight = !(normalizer <= FLT_MIN);
      int const exponent =
          prepare_queries(params, sequence, first_token, rows, query_head, has_weight, lane);
      // Apart, for z 2^(2m) may be out of range.
      float const inverse =
          has_weight ? 1.0f / normalizer * detail::power_of_two(-2 * kQueryExponent) : 0.0f;
      float const delta = has_weight ? products.delta : 0.0f;
      float const weight = params.gate != nullptr ? detail::exp2(gate) * inverse : inverse;
      if (owns) {
        std::int64_t const row = params.row_stride.at(sequence, own_token, query_head);
        params.inverse[row] = inverse;
        params.delta[row] = delta;
        params.weight[row] = weight;
        params.scale[row] = detail::power_of_two(exponent);
      }
      if constexpr (kHasExponents) {
        // What is not finite spoils gradients, and must not take the precision of others.
        float const bound = detail::finite_magnitude(weight);
        float const phi_bound = bound * detail::power_of_two(2 * kQueryExponent);
        float const root = sqrtf(detail::finite_magnitude(inverse));
        float const norm = sqrtf(detail::finite_magnitude(products.norm));
        float const magnitude = detail::finite_magnitude(delta);
        range.weight = fmaxf(range.weight, bound);
        range.state += phi_bound * norm;
        range.key_sum += phi_bound * magnitude;
        range.weight_delta = fmaxf(range.weight_delta, bound * magnitude);
        range.gradient = fmaxf(range.gradient, root * norm);
        range.delta = fmaxf(range.delta, root * magnitude);
      }
    }
    if constexpr (kHasExponents) {
      store_range(params, shared, range, warp, lane);
    }
  }

 private:
  static constexpr int kLoads = 4;  // 16-byte loads in flight of each tensor

  struct Products {
    float delta;  // do . o
    float norm;   // do . do
  };

  // Rows `first` and on of width 8 Lanes, a row to `Lanes` neighbouring lanes. Calls
  // visit(step, row), where row = step * (rows at a time) + lane / Lanes.
  template <int Lanes>
  struct Spread {
    static constexpr int kStepRows = 32 / Lanes;
    static constexpr int kSteps = kWarpRows / kStepRows;
    static constexpr int kBatch = cute::min(kSteps, kLoads);
    static_assert(kSteps % kBatch == 0, "whole batches");

    /// For the lane that owns a row: `x` of the lanes that hold the row, if it is one of `step`'s.
    template <class T>
    CUTE_DEVICE static void gather(int step, int lane, T x, T& own) {
      T const received = __shfl_sync(0xffffffffu, x, lane % kStepRows * Lanes);
      own = lane / kStepRows == step ? received : own;
    }
  };

  CUTE_DEVICE static void load(Element const* source, bool predicate, std::uint32_t (&x)[4]) {
    uint4 bits{0, 0, 0, 0};
    if (predicate) {
      bits = *reinterpret_cast<uint4 const*>(source);
    }
    x[0] = bits.x;
    x[1] = bits.y;
    x[2] = bits.z;
    x[3] = bits.w;
  }

  // Of the row that the lane owns.
  CUTE_DEVICE static Products value_products(Params const& params, Sequence const& sequence,
                                             std::int64_t first_token, int rows, int query_head,
                                             int lane) {
    constexpr int kLanes = kValueDim / 8;
    using Rows = Spread<kLanes>;
    int const first_row = lane / kLanes;
    int const column = lane % kLanes * 8;
    Element const* d_output = params.d_output + first_row * params.d_output_stride.token + column +
                              params.d_output_stride.at(sequence, first_token, query_head);
    std::int64_t output_offset = first_row * params.output_stride.token + column +
                                 params.output_stride.at(sequence, first_token, query_head);
    Products own{0.0f, 0.0f};
#pragma unroll 1
    for (int start = 0; start < Rows::kSteps; start += Rows::kBatch) {
      std::uint32_t gradient[Rows::kBatch][4], output[Rows::kBatch][4], residual[Rows::kBatch][4];
#pragma unroll
      for (int i = 0; i < Rows::kBatch; ++i) {
        int const row = first_row + (start + i) * Rows::kStepRows;
        load(d_output, row < rows, gradient[i]);
        load(params.output + output_offset, row < rows, output[i]);
        load(params.residual + output_offset, row < rows, residual[i]);
        d_output += Rows::kStepRows * params.d_output_stride.token;
        output_offset += Rows::kStepRows * params.output_stride.token;
      }
#pragma unroll
      for (int i = 0; i < Rows::kBatch; ++i) {
        float delta = 0.0f;
        float norm = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float const lo = detail::unpack_lo<Element>(gradient[i][j]);
          float const hi = detail::unpack_hi<Element>(gradient[i][j]);
          delta = fmaf(
              lo,
              detail::unpack_lo<Element>(output[i][j]) + detail::unpack_lo<Element>(residual[i][j]),
              delta);
          delta = fmaf(
              hi,
              detail::unpack_hi<Element>(output[i][j]) + detail::unpack_hi<Element>(residual[i][j]),
              delta);
          norm = fmaf(lo, lo, norm);
          norm = fmaf(hi, hi, norm);
        }
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2) {
          delta += __shfl_xor_sync(0xffffffffu, delta, distance);
          if constexpr (kHasExponents) {
            norm += __shfl_xor_sync(0xffffffffu, norm, distance);
          }
        }
        Rows::gather(start + i, lane, delta, own.delta);
        if constexpr (kHasExponents) {
          Rows::gather(start + i, lane, norm, own.norm);
        }
      }
    }
    return own;
  }

  // Rescales and stores the queries; returns the exponent of the row that the lane owns.
  CUTE_DEVICE static int prepare_queries(Params const& params, Sequence const& sequence,
                                         std::int64_t first_token, int rows, int query_head,
                                         bool has_weight, int lane) {
    constexpr int kLanes = kHeadDim / 8;
    using Rows = Spread<kLanes>;
    int const first_row = lane / kLanes;
    int const column = lane % kLanes * 8;
    Element const* source = params.query + first_row * params.query_stride.token + column +
                            params.query_stride.at(sequence, first_token, query_head);
    Element* target = params.prepared_query + first_row * params.prepared_query_stride.token +
                      column + params.prepared_query_stride.at(sequence, first_token, query_head);
    int own = 0;
#pragma unroll 1
    for (int start = 0; start < Rows::kSteps; start += Rows::kBatch) {
      std::uint32_t x[Rows::kBatch][4];
#pragma unroll
      for (int i = 0; i < Rows::kBatch; ++i) {
        int const row = first_row + (start + i) * Rows::kStepRows;
        load(source, row < rows, x[i]);
        source += Rows::kStepRows * params.query_stride.token;
      }
#pragma unroll
      for (int i = 0; i < Rows::kBatch; ++i) {
        int const row = first_row + (start + i) * Rows::kStepRows;
        Rows::gather(start + i, lane, detail::rescale_row<Element, kLanes>(x[i]), own);
        bool const kept = __shfl_sync(0xffffffffu, static_cast<int>(has_weight), row) != 0;
        if (row < rows) {
          *reinterpret_cast<uint4*>(target) =
              kept ? uint4{x[i][0], x[i][1], x[i][2], x[i][3]} : uint4{0, 0, 0, 0};
        }
        target += Rows::kStepRows * params.prepared_query_stride.token;
      }
    }
    return own;
  }

  // Lanes and warps in a fixed order: the same in every run.
  CUTE_DEVICE static void store_range(Params const& params, SharedStorage& shared,
                                      GradientRange range, int warp, int lane) {
    range.weight = detail::reduce_warp(range.weight, detail::Maximum{});
    range.weight_delta = detail::reduce_warp(range.weight_delta, detail::Maximum{});
    range.state = detail::reduce_warp(range.state, detail::Plus{});
    range.key_sum = detail::reduce_warp(range.key_sum, detail::Plus{});
    range.gradient = detail::reduce_warp(range.gradient, detail::Maximum{});
    range.delta = detail::reduce_warp(range.delta, detail::Maximum{});
    if (lane == 0) {
      shared.warps[warp] = range;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 1; i < kWarps; ++i) {
        GradientRange const& other = shared.warps[i];
        range.weight = fmaxf(range.weight, other.weight);
        range.weight_delta = fmaxf(range.weight_delta, other.weight_delta);
        range.state += other.state;
        range.key_sum += other.key_sum;
        range.gradient = fmaxf(range.gradient, other.gradient);
        range.delta = fmaxf(range.delta, other.delta);
      }
      params.ranges[shared.slot * params.heads + blockIdx.y] = range;
    }
  }
};

}  // namespace retention::kernel
