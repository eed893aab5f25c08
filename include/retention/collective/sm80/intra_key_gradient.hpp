// The causal mainloop inside a chunk for the gradients of keys and values: rows are keys, columns
// the queries of all heads of the group. With scores s_ji = k_j . q_i, products u_ji = v_j . do_i,
// decays E_ij = exp(g_i - g_j) and c_i the inverse normalisers,
//
//     values: dv_j += sum_{i >= j} s_ji^2 E_ij c_i do_i
//     keys:   dk_j += sum_{i >= j} s_ji E_ij c_i (u_ji - delta_i) q_i
//
// and for keys k_j . dk_j in fp32, as gradients of gates need it: without the rounding of weights
// between the two products.
//
// Scores and weights stay in registers: what an mma leaves in a lane is what the next one takes as
// its A operand.
//
// Columns come from the last to the first. Those after a warp's rows have E_ij = C_i R_j, where
// C_i = exp(g_i - r), R_j = exp(r - g_j) and r is the largest gate of the rows: one exponential a
// column serves all of the rows. Weights s^2 C_i c_i are then at most their true values, which are
// probabilities: relative to any other row they might be out of range. Down to the rows, gradients
// are sums in units of R_j, what comes from a state included; they are multiplied by it once, and
// then the columns at the rows follow, with a mask and an exponential for every weight. So do all
// columns where gates fall so much between the rows that products with C_i would lose their digits.

#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>

#include <cute/tensor.hpp>

#include "retention/collective/query_tiles.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm80 {

template <class Element_, int HeadDim, int ValueDim, class Tiling_, RowGradient kGradient>
struct IntraKeyGradient
    : WarpQueryTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, kGradient> {
  using Tiles = WarpQueryTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, kGradient>;
  using Element = Element_;
  using Tiling = Tiling_;
  using Tiles::kIsKey;
  using Tiles::kLoadQueries;
  using Tiles::kLoadTiles;
  using Tiles::kSlots;
  using Tiles::kThreads;
  using Tiles::kTileQueries;
  using Tiles::load;
  using Tiles::this_thread;
  using typename Tiles::Columns;
  using typename Tiles::OutputGradientLayout;
  using typename Tiles::QueryLayout;
  using typename Tiles::Work;

  static constexpr int kMmaRows = Tiling::kMmaRows;
  static constexpr int kWidth = kIsKey ? HeadDim : ValueDim;  // of the gradient
  /// Of rows g and g + 8 of each mma tile, a lane's part of k_j . dk_j.
  using KeyProducts = float[kMmaRows][2];
  // Of the rows, how many have scores at one time: together with the gradients that registers hold.
  static constexpr int kScoreRows = kMmaRows == 4 && ValueDim == 64 ? 2 : kMmaRows;
  static constexpr bool kSplitsScores = kScoreRows < kMmaRows && HeadDim > 64;
  // Where registers are short, each thread's products are in shared memory.
  static constexpr bool kSharesProducts = kIsKey && HeadDim > 64 && ValueDim > 32;
  // Rows that registers have room for are not loaded anew for each tile of columns.
  static constexpr bool kHoldsKeys = kMmaRows == 2 && HeadDim <= 64;
  static constexpr bool kHoldsValues = kIsKey && HeadDim <= 64 && ValueDim <= 64;
  // What the decay between a warp's rows may be, as a power of two: it costs weights as much of
  // their range.
  static constexpr float kMaxSpan = cute::is_same_v<Element, cute::half_t> ? 10.0f : 64.0f;

  using KeyLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;     // [row, d, 1]
  using ValueLayout = StagedTileLayout<Tiling::kRows, ValueDim, 1>;  // [row, dv, 1]

  /// Where a thread reads its first operands of ldmatrix, in bytes from the start of each tile.
  struct alignas(16) Offsets {
    int head_rows;  // of width d: the A operand from rows and, transposed, the B operand
    int value_rows;
    int head_columns;  // the B operand
    int value_columns;
  };
  /// Of a warp's rows, tokens in the chunk.
  struct alignas(16) Reach {
    int first_token;                   // INT_MAX where no row stands for anything
    int end_exact;                     // columns from there on are factorised; INT_MAX for none
    detail::CumulativeGate reference;  // r
  };

  struct SharedStorage : Tiles::SharedStorage {
    // Each warp's own, of a tile and the next.
    alignas(16) float factor[2][Tiling::kWarps][kTileQueries];
    alignas(16) detail::CumulativeGate exact_gate[2][Tiling::kWarps][kTileQueries];
    // Each thread's own: here they take no registers.
    Offsets offsets[kThreads];
    Reach reach[kThreads];
    alignas(16) float products[kSharesProducts ? kThreads : 1][kMmaRows][2];
  };

  /// Starts the first loads.
  CUTE_DEVICE static void prefetch(SharedStorage& shared, Work const& work) {
    int const thread = this_thread();
    int const lane = thread % 32;
    // (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15) for A and the transposed B;
    // (0-7, 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15) for B.
    int const b_row = lane % 8 + lane / 16 * 8;
    int const b_column = lane / 8 % 2 * 8;
    shared.offsets[thread] = {byte_offset<QueryLayout>(lane % 16, lane / 16 * 8),
                              byte_offset<OutputGradientLayout>(lane % 16, lane / 16 * 8),
                              byte_offset<QueryLayout>(b_row, b_column),
                              byte_offset<OutputGradientLayout>(b_row, b_column)};
    Tiles::prefetch(shared, work);
  }

  /// To be called before `scale` and `run`, when `row_gate` is in shared memory: of every row of
  /// the tile; that of the chunk's last token for rows that stand for nothing.
  CUTE_DEVICE static void set_reach(SharedStorage& shared, Work const& work,
                                    detail::CumulativeGate const* row_gate) {
    int const thread = this_thread();
    int const first_row = thread / 32 * Tiling::kWarpRows;
    detail::CumulativeGate const own = row_gate[first_row + thread % 32];
    detail::CumulativeGate const other = row_gate[first_row + Tiling::kWarpRows - 32 + thread % 32];
    auto const larger = [](detail::CumulativeGate const& x, detail::CumulativeGate const& y) {
      return x.since(y) >= 0.0f ? x : y;
    };
    detail::CumulativeGate high = larger(own, other);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      high = larger(high, {__shfl_xor_sync(0xffffffffu, high.high, distance),
                           __shfl_xor_sync(0xffffffffu, high.low, distance)});
    }
    // Where gates are NaN, lanes may not agree on it.
    high = {__shfl_sync(0xffffffffu, high.high, 0), __shfl_sync(0xffffffffu, high.low, 0)};
    bool const is_near = high.since(own) <= kMaxSpan && high.since(other) <= kMaxSpan;
    bool const factorises = __all_sync(0xffffffffu, static_cast<int>(is_near)) != 0;
    int const left = work.rows - first_row;
    int const rows = left < Tiling::kWarpRows ? left : Tiling::kWarpRows;
    int const first_token = work.first_token + first_row;
    int const end =
        (first_token + cute::max(rows, 1) - 1) / kLoadQueries * kLoadQueries + kLoadQueries;
    shared.reach[thread] = {rows <= 0 ? INT_MAX : first_token, factorises ? end : INT_MAX, high};
  }

  /// Where a thread has its products.
  CUTE_DEVICE static KeyProducts& products_in(SharedStorage& shared, KeyProducts& registers) {
    if constexpr (kSharesProducts) {
      return shared.products[this_thread()];
    } else {
      return registers;
    }
  }

  /// Multiplies what a state gives by its decay, exp(G - g_j) over R_j, and by 2^exponent.
  /// `end_gate` is G.
  template <class Gradient>
  CUTE_DEVICE static void scale(SharedStorage const& shared, detail::CumulativeGate const* row_gate,
                                detail::CumulativeGate const& end_gate, int exponent,
                                Gradient& gradient) {
    Reach const reach = shared.reach[this_thread()];
    for_each_row(row_gate, gradient, [&](detail::CumulativeGate const& gate) {
      detail::CumulativeGate const until = reach.end_exact == INT_MAX ? gate : reach.reference;
      return detail::exp2(end_gate.since(until) + static_cast<float>(exponent));
    });
  }

  /// R_j, which sums are over before `run`, for a row of this gate in any mma tile of the warp.
  CUTE_DEVICE static float row_unit(SharedStorage const& shared, int,
                                    detail::CumulativeGate const& gate) {
    Reach const reach = shared.reach[this_thread()];
    return reach.end_exact == INT_MAX ? 1.0f : detail::exp2(reach.reference.since(gate));
  }

  /// Adds to `gradient` [rows, d or dv], which is over R_j; what is returned is not. `key` and, for
  /// gradients of keys, `value` are the tiles of rows in shared memory, and `products` is added to
  /// in the same units.
  template <class Gradient>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* key,
                              Element const* value, detail::CumulativeGate const* row_gate,
                              Gradient& gradient, KeyProducts& products) {
    HeldRows<kHoldsKeys, HeadDim> held_keys;
    HeldRows<kHoldsValues, ValueDim> held_values;
    {
      Offsets const offsets = shared.offsets[this_thread()];
      held_keys.template load<KeyLayout>(key, offsets.head_rows);
      if constexpr (kIsKey) {
        held_values.template load<ValueLayout>(value, offsets.value_rows);
      }
    }
    int token = 0;              // the first of a tile
    int slot = kLoadTiles - 1;  // the last tile of what is loaded comes first
#pragma unroll 1
    do {
      Reach const reach = shared.reach[this_thread()];
      if (slot % kLoadTiles == kLoadTiles - 1) {
        cute::cp_async_wait<0>();
        __syncthreads();
        Columns const columns = shared.columns[this_thread()];
        load(shared, work, columns.next(work.group), (slot ^ kLoadTiles) & kLoadTiles);
        token = columns.token + (kLoadTiles - 1) * kTileQueries;
        if (columns.head == 0 && columns.token + kLoadQueries == reach.end_exact) {
          auto const decay = [&](detail::CumulativeGate const& gate) {
            return detail::exp2(reach.reference.since(gate));
          };
          for_each_row(row_gate, gradient, decay);
          if constexpr (kIsKey) {
            int const first_row = this_thread() / 32 * Tiling::kWarpRows + this_thread() % 32 / 4;
#pragma unroll
            for (int m = 0; m < kMmaRows; ++m) {
              products[m][0] *= decay(row_gate[first_row + 16 * m]);
              products[m][1] *= decay(row_gate[first_row + 16 * m + 8]);
            }
          }
        }
      }
      if (token + kTileQueries > reach.first_token) {  // else no row of this warp is attended to
        if (token < reach.end_exact) {
          add<true>(shared, key, value, held_keys, held_values, row_gate, work, token, slot,
                    gradient, products);
        } else {
          add<false>(shared, key, value, held_keys, held_values, row_gate, work, token, slot,
                     gradient, products);
        }
      }
      token -= kTileQueries;
      slot = slot % kLoadTiles != 0 ? slot - 1 : slot ^ (kSlots - 1);
    } while (slot % kLoadTiles != kLoadTiles - 1 ||
             shared.columns[this_thread()].token >= work.first_token);
  }

 private:
  /// The A operand of a warp's rows in registers, or nothing.
  template <bool Holds, int Depth>
  struct HeldRows {
    std::uint32_t a[Holds ? kMmaRows : 1][Holds ? Depth / 16 : 1][4];

    template <class Layout>
    CUTE_DEVICE void load(Element const* rows, int offset) {
      if constexpr (Holds) {
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
          for (int k = 0; k < Depth; k += 16) {
            load_rows<Layout>(rows, offset, m, k, a[m][k / 16]);
          }
        }
      }
    }
  };

  template <class Layout>
  CUTE_DEVICE static void load_rows(Element const* rows, int offset, int m, int k,
                                    std::uint32_t (&a)[4]) {
    int const first_row = this_thread() / 32 * Tiling::kWarpRows;
    cute::SM75_U32x4_LDSM_N::copy(
        piece_at(rows, advance_columns<Layout>(offset, k) + byte_offset<Layout>(16 * m, 0) +
                           first_row * byte_offset<Layout>(8, 0) / 8),
        a[0], a[1], a[2], a[3]);
  }

  // One tile of columns; `Exact` where they are not factorised.
  template <bool Exact, class HeldKeys, class HeldValues, class Gradient>
  CUTE_DEVICE static void add(SharedStorage& shared, Element const* key, Element const* value,
                              HeldKeys const& held_keys, HeldValues const& held_values,
                              detail::CumulativeGate const* row_gate, Work const& work,
                              int first_query, int slot, Gradient& gradient,
                              KeyProducts& products) {
    int const thread = this_thread();
    Offsets const offsets = shared.offsets[thread];
    set_factors<Exact>(shared, work, slot, thread);
    std::uint32_t a[kMmaRows][kTileQueries / 16][4];  // the weights: [row, query]
#pragma unroll
    for (int m = 0; m < kMmaRows; m += kScoreRows) {
      float score[kScoreRows][kTileQueries / 8][4] = {};
      multiply<HeadDim, KeyLayout, QueryLayout>(key, offsets.head_rows, held_keys, shared.query,
                                                offsets.head_columns, m, slot, score);
      if constexpr (kIsKey) {
        float product[kScoreRows][kTileQueries / 8][4] = {};
        multiply<ValueDim, ValueLayout, OutputGradientLayout>(
            value, offsets.value_rows, held_values, shared.d_output, offsets.value_columns, m, slot,
            product);
        weigh<Exact>(shared, work, row_gate, product, m, slot, first_query, thread, score);
#pragma unroll
        for (int i = 0; i < kScoreRows; ++i) {
          float lower = products[m + i][0];
          float upper = products[m + i][1];
#pragma unroll
          for (int n = 0; n < kTileQueries / 8; ++n) {
            lower += product[i][n][0] + product[i][n][1];
            upper += product[i][n][2] + product[i][n][3];
          }
          products[m + i][0] = lower;
          products[m + i][1] = upper;
        }
      } else {
        weigh<Exact>(shared, work, row_gate, score, m, slot, first_query, thread, score);
      }
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
#pragma unroll
        for (int n = 0; n < kTileQueries / 8; ++n) {
          float const(&w)[4] = score[i][n];
          std::uint32_t (&pairs)[4] = a[m + i][n / 2];
          pairs[n % 2 * 2] = detail::pack<Element>(w[0], w[1]);
          pairs[n % 2 * 2 + 1] = detail::pack<Element>(w[2], w[3]);
        }
      }
    }
    if constexpr (kIsKey) {
      add_products<QueryLayout>(a, shared.query, offsets.head_rows, slot, gradient);
    } else {
      add_products<OutputGradientLayout>(a, shared.d_output, offsets.value_rows, slot, gradient);
    }
  }

  // gradient += a B, where B are the rows of a tile of columns.
  template <class Layout, class Gradient>
  CUTE_DEVICE static void add_products(std::uint32_t const (&a)[kMmaRows][kTileQueries / 16][4],
                                       Element const* tiles, int offset, int slot,
                                       Gradient& gradient) {
#pragma unroll
    for (int k = 0; k < kTileQueries / 16; ++k) {
      std::uint32_t b[kWidth / 8][2];
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        cute::SM75_U16x8_LDSM_T::copy(piece_at(tiles, advance_columns<Layout>(offset, 8 * n) +
                                                          byte_offset<Layout>(16 * k, 0) +
                                                          byte_offset<Layout>(0, 0, 1) * slot),
                                      b[n][0], b[n][1], b[n + 1][0], b[n + 1][1]);
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          float* c = &gradient(0, m, n);
          MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[m][k][0], a[m][k][1],
                                           a[m][k][2], a[m][k][3], b[n][0], b[n][1], c[0], c[1],
                                           c[2], c[3]);
        }
      }
    }
  }

  // product += rows columns^T for the mma tiles of the warp's rows from `first` on.
  template <int Depth, class RowLayout, class ColumnLayout, bool Holds>
  CUTE_DEVICE static void multiply(Element const* rows, int row_offset,
                                   HeldRows<Holds, Depth> const& held, Element const* columns,
                                   int column_offset, int first, int slot,
                                   float (&product)[kScoreRows][kTileQueries / 8][4]) {
#pragma unroll
    for (int k = 0; k < Depth; k += 16) {
      std::uint32_t b[kTileQueries / 16][4];
      int const source = advance_columns<ColumnLayout>(column_offset, k) +
                         byte_offset<ColumnLayout>(0, 0, 1) * slot;
#pragma unroll
      for (int n = 0; n < kTileQueries / 16; ++n) {
        cute::SM75_U32x4_LDSM_N::copy(
            piece_at(columns, source + byte_offset<ColumnLayout>(16 * n, 0)), b[n][0], b[n][1],
            b[n][2], b[n][3]);
      }
#pragma unroll
      for (int m = 0; m < kScoreRows; ++m) {
        std::uint32_t a[4];
        if constexpr (Holds) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[i] = held.a[first + m][k / 16][i];
          }
        } else {
          load_rows<RowLayout>(rows, row_offset, first + m, k, a);
        }
#pragma unroll
        for (int n = 0; n < kTileQueries / 8; ++n) {
          float (&c)[4] = product[m][n];
          MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3],
                                           b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], c[0], c[1],
                                           c[2], c[3]);
        }
      }
    }
  }

  // c_i C_i or, where `Exact`, c_i without its unit, a column a lane. Zero for columns without
  // weight and those beyond the end, whose inverse is zero.
  //
  // Where all of a row's keys decay far, inverse_i may be the largest of floats and the decay below
  // the least: exponentials are taken in two halves. Later keys of zero meet such factors alone,
  // and the product must be zero: a factor is finite.
  template <bool Exact>
  CUTE_DEVICE static void set_factors(SharedStorage& shared, Work const& work, int slot,
                                      int thread) {
    int const warp = thread / 32;
    int const lane = thread % 32;
    float factor = shared.inverse[slot][lane];
    detail::CumulativeGate const gate = shared.gate[slot][lane];
    if constexpr (Exact) {
      shared.exact_gate[slot % 2][warp][lane] =
          factor > 0.0f ? gate : detail::CumulativeGate{-INFINITY, 0.0f};
    } else {
      Reach const reach = shared.reach[thread];
      float const half = detail::exp2(fmaf(0.5f, gate.since(reach.reference), work.half_unit()));
      factor = factor > 0.0f ? cute::min(factor * half * half, FLT_MAX) : 0.0f;
    }
    shared.factor[slot % 2][warp][lane] = factor;
    __syncwarp();
  }

  // Scores to weights, in place, for the mma tiles of the warp from `first` on. For gradients of
  // keys `product` is u_ji and becomes the weight times the score; for those of values it is the
  // score, and remains it. The meeting points keep these steps apart, and
  // the branch a branch: run together with the products before and after them they would need more
  // registers than there are.
  template <bool Exact>
  CUTE_DEVICE static void weigh(SharedStorage const& shared, Work const& work,
                                detail::CumulativeGate const* row_gates,
                                float (&product)[kScoreRows][kTileQueries / 8][4], int first,
                                int slot, int first_query, int thread,
                                float (&weight)[kScoreRows][kTileQueries / 8][4]) {
    int const warp = thread / 32;
    int const quad = thread % 4;
    int const first_row = warp * Tiling::kWarpRows + 16 * first + thread % 32 / 4;
    float const half_unit = work.half_unit();
    auto const pair = [&](float const(&columns)[kTileQueries], int n) {
      return *reinterpret_cast<float2 const*>(&columns[8 * n + 2 * quad]);
    };
#pragma unroll
    for (int n = 0; n < kTileQueries / 8; ++n) {
      float2 const factors = pair(shared.factor[slot % 2][warp], n);
      float2 deltas{};
      float4 gates{};  // two
      if constexpr (kIsKey) {
        deltas = pair(shared.delta[slot], n);
      }
      if constexpr (Exact) {
        gates =
            *reinterpret_cast<float4 const*>(&shared.exact_gate[slot % 2][warp][8 * n + 2 * quad]);
      }
#pragma unroll
      for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const factor = i % 2 == 0 ? factors.x : factors.y;
          float root = 1.0f;  // of E_ij times the unit, unless the factor has both
          if constexpr (Exact) {
            detail::CumulativeGate const gate = i % 2 == 0
                                                    ? detail::CumulativeGate{gates.x, gates.y}
                                                    : detail::CumulativeGate{gates.z, gates.w};
            float const decay = gate.since(row_gates[first_row + 16 * m + 8 * (i / 2)]);
            root = detail::exp2(fmaf(0.5f, decay, half_unit));
          }
          float& w = weight[m][n][i];
          float const score = w * root;
          if constexpr (kIsKey) {
            float& u = product[m][n][i];
            float const d_score = score * factor * (u - (i % 2 == 0 ? deltas.x : deltas.y));
            w = d_score * root;
            u = d_score * score;
          } else {
            w = score * factor * score;
          }
        }
      }
    }
    if constexpr (Exact || kSplitsScores) {
      __syncwarp();
    }
    if constexpr (Exact) {
      int const warp_end = work.first_token + (warp + 1) * Tiling::kWarpRows;
      if (first_query < warp_end) {
        int const row = work.first_token + first_row - first_query - 2 * quad;
#pragma unroll
        for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < kTileQueries / 8; ++n) {
              // Not a product with zero: the exponential of a difference that is no decay may be
              // huge.
              bool const is_seen = 8 * n + i % 2 >= row + 16 * m + 8 * (i / 2);
              float& w = weight[m][n][i];
              w = is_seen ? w : 0.0f;
              if constexpr (kIsKey) {
                float& p = product[m][n][i];
                p = is_seen ? p : 0.0f;
              }
            }
          }
        }
        __syncwarp();
      }
    }
  }

  // Multiplies each row by what `factor` gives for its gate.
  template <class Gradient, class Factor>
  CUTE_DEVICE static void for_each_row(detail::CumulativeGate const* row_gates, Gradient& gradient,
                                       Factor factor) {
    int const thread = this_thread();
    detail::CumulativeGate const* row_gate =
        row_gates + thread / 32 * Tiling::kWarpRows + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float const f = factor(row_gate[16 * m + 8 * upper]);
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          gradient(cute::make_coord(0, upper), m, n) *= f;
          gradient(cute::make_coord(1, upper), m, n) *= f;
        }
      }
    }
  }
};

}  // namespace retention::collective::sm80
