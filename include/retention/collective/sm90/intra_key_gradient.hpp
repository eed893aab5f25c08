// The causal mainloop inside a chunk for the gradients of keys and values by Hopper's wgmma: rows
// are keys, columns the queries of all heads of the group. With scores s_ji = k_j . q_i, products
// u_ji = v_j . do_i, decays E_ij = exp(g_i - g_j) and c_i the inverse normalisers,
//
//     values: dv_j += sum_{i >= j} s_ji^2 E_ij c_i do_i
//     keys:   dk_j += sum_{i >= j} s_ji E_ij c_i (u_ji - delta_i) q_i
//
// and for keys k_j . dk_j in fp32, as gradients of gates need it: without the rounding of weights
// between the two products.
//
// A warpgroup has 64 rows, and multiplies them and a tile of 64 columns; weights are made of the
// products in registers, and are the A operand of that with the columns. Meanwhile the tensor cores
// have products of other warpgroups. One whose rows come after a tile's columns leaves it out.
//
// Columns come from the last to the first. Those after the warpgroup's rows have, for the 16 of a
// warp, E_ij = C_i R_j, where C_i = exp(g_i - r), R_j = exp(r - g_j) and r is the largest gate of
// the 16: one exponential a column serves all of them. Weights s^2 C_i c_i are then at most their
// true values, which are probabilities: relative to any other row they might be out of range. Down
// to the rows, gradients are sums in units of R_j, what comes from a state included; they are
// multiplied by it once, and then the columns of the rows' own tokens follow, in units of 1. Where
// gates fall so much between the 16 rows that products with C_i would lose their digits, every
// weight has an exponential of its own, and units are 1 throughout.

#pragma once

#include <cfloat>
#include <cstdint>

#include <cute/tensor.hpp>

#include "retention/collective/query_tiles.hpp"
#include "retention/collective/row_tiling.hpp"
#include "retention/collective/sm90/products.hpp"
#include "retention/collective/sm90/row_decays.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

template <class Element_, int HeadDim, int ValueDim, class Tiling_, RowGradient kGradient>
struct IntraKeyGradient
    : QueryTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1, kGradient> {
  using Tiles = QueryTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1, kGradient>;
  using Element = Element_;
  using Tiling = Tiling_;
  using Tiles::kIsKey;
  using Tiles::kSlots;
  using Tiles::kTileQueries;
  using Tiles::load;
  using Tiles::prefetch;
  using Tiles::this_thread;
  using typename Tiles::Columns;
  using typename Tiles::Work;

  static constexpr int kWidth = kIsKey ? HeadDim : ValueDim;  // of the gradient
  static_assert(Tiling::kMmaRows == 1 && kTileQueries == kTileColumns);
  /// Of rows g and g + 8 of a warp, a lane's part of k_j . dk_j.
  using KeyProducts = float[1][2];
  // What the decay between 16 rows may be, as a power of two: it costs weights as much of their
  // range.
  static constexpr float kMaxSpan = cute::is_same_v<Element, cute::half_t> ? 10.0f : 64.0f;

  using KeyLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;     // [row, d, 1]
  using ValueLayout = StagedTileLayout<Tiling::kRows, ValueDim, 1>;  // [row, dv, 1]

  /// Of the 16 rows of a warp.
  struct Reach {
    detail::CumulativeGate reference;  // r
    int factorises;                    // whether columns after the warpgroup's rows do
  };

  struct SharedStorage : Tiles::SharedStorage {
    // Each warp's own.
    alignas(16) float factor[Tiling::kWarps][kTileQueries];
    Reach reach[Tiling::kWarps];
  };

  /// To be called before `scale` and `run`, when `row_gate` is in shared memory: of every row of
  /// the tile; that of the chunk's last token for rows that stand for nothing.
  CUTE_DEVICE static void set_reach(SharedStorage& shared, Work const&,
                                    detail::CumulativeGate const* row_gate) {
    int const warp = this_thread() / 32;
    int const lane = this_thread() % 32;
    detail::CumulativeGate const own = row_gate[Tiling::first_row(warp) + lane % 16];
    detail::CumulativeGate high = own;
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      detail::CumulativeGate const other{__shfl_xor_sync(0xffffffffu, high.high, distance),
                                         __shfl_xor_sync(0xffffffffu, high.low, distance)};
      high = high.since(other) >= 0.0f ? high : other;
    }
    // Where gates are NaN, lanes may not agree on it.
    high = {__shfl_sync(0xffffffffu, high.high, 0), __shfl_sync(0xffffffffu, high.low, 0)};
    int const factorises = __all_sync(0xffffffffu, static_cast<int>(high.since(own) <= kMaxSpan));
    if (lane == 0) {
      shared.reach[warp] = {high, factorises};
    }
    __syncwarp();
  }

  /// Where a thread has its products.
  CUTE_DEVICE static KeyProducts& products_in(SharedStorage&, KeyProducts& registers) {
    return registers;
  }

  /// Multiplies what a state gives by its decay, exp(G - g_j) over R_j, and by 2^exponent.
  /// `end_gate` is G.
  template <class Gradient>
  CUTE_DEVICE static void scale(SharedStorage const& shared, detail::CumulativeGate const* row_gate,
                                detail::CumulativeGate const& end_gate, int exponent,
                                Gradient& gradient) {
    Reach const reach = reach_of(shared);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      detail::CumulativeGate const gate = row_gate[lane_row() + 8 * upper];
      float const decay = end_gate.since(reach.factorises ? reach.reference : gate);
      multiply_row(detail::exp2(decay + static_cast<float>(exponent)), upper, gradient);
    }
  }

  /// R_j, which sums are over before `run`, for a row of the warp with this gate.
  CUTE_DEVICE static float row_unit(SharedStorage const& shared, int,
                                    detail::CumulativeGate const& gate) {
    return row_unit(reach_of(shared), gate);
  }

  /// Adds to `gradient` [rows, d or dv], which is over R_j; what is returned is not. `key` and, for
  /// gradients of keys, `value` are the tiles of rows in shared memory, and `products` is added to
  /// in the same units.
  template <class Gradient>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* key,
                              Element const* value, detail::CumulativeGate const* row_gate,
                              Gradient& gradient, KeyProducts& products) {
    int slot = 0;
    bool more;
#pragma unroll 1
    do {
      wait_for_copies<0, true>();  // of the rows as well
      __syncthreads();
      Columns const columns = shared.columns[this_thread()];
      Columns const next = columns.next(work.group);
      load(shared, work, next, slot ^ 1);
      int const first_token = work.first_token + first_row();
      // The same for the whole warpgroup, whose rows must be seen.
      if (first_row() < work.rows && columns.token + kTileQueries > first_token) {
        Reach const reach = reach_of(shared);
        if (columns.token == first_token && columns.head == 0) {
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            float const factor = row_unit(reach, row_gate[lane_row() + 8 * upper]);
            multiply_row(factor, upper, gradient);
            if constexpr (kIsKey) {
              products[0][upper] *= factor;
            }
          }
        }
        add(shared, key, value, slot, gradient, [&](Product& s, Product& u, Weight& weight) {
          if (columns.token > first_token && reach.factorises) {
            weigh_factorised(shared, work, slot, s, u, weight, products[0]);
          } else {
            weigh_exactly(shared, work, slot, columns.token, row_gate, s, u, weight, products[0]);
          }
        });
      }
      slot ^= 1;
      more = next.token >= work.first_token;
    } while (more);
  }

 private:
  using KeyTile = WarpgroupTile<Tiling::kRows, HeadDim>;
  using ValueTile = WarpgroupTile<Tiling::kRows, ValueDim>;
  using QueryTile = WarpgroupTile<kTileQueries, HeadDim>;
  using OutputTile = WarpgroupTile<kTileQueries, ValueDim>;

  // Of the thread's warpgroup.
  CUTE_DEVICE static int first_row() { return this_thread() / 128 * kTileRows; }
  // Of rows g and g + 8 of the thread's warp, the first.
  CUTE_DEVICE static int lane_row() {
    return Tiling::first_row(this_thread() / 32) + this_thread() % 32 / 4;
  }

  CUTE_DEVICE static Reach reach_of(SharedStorage const& shared) {
    return shared.reach[this_thread() / 32];
  }

  CUTE_DEVICE static float row_unit(Reach const& reach, detail::CumulativeGate const& gate) {
    return reach.factorises ? detail::exp2(reach.reference.since(gate)) : 1.0f;
  }

  template <class Gradient>
  CUTE_DEVICE static void multiply_row(float factor, int upper, Gradient& gradient) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      gradient(cute::make_coord(0, upper), 0, n) *= factor;
      gradient(cute::make_coord(1, upper), 0, n) *= factor;
    }
  }

  // Adds what a tile of columns gives; `weigh` makes weights of s and, for gradients of keys, u.
  template <class Gradient, class Weigh>
  CUTE_DEVICE static void add(SharedStorage const& shared, Element const* key, Element const* value,
                              int slot, Gradient& gradient, Weigh const& weigh) {
    typename KeyTile::Start const keys(key, first_row());
    typename QueryTile::Start const queries(shared.query + slot * (kTileQueries * HeadDim));
    typename OutputTile::Start const d_outputs(shared.d_output + slot * (kTileQueries * ValueDim));
    Product s, u;
    cute::warpgroup_arrive();
    start_scores<Element, HeadDim>(keys, queries, s);
    if constexpr (kIsKey) {
      typename ValueTile::Start const values(value, first_row());
      start_scores<Element, ValueDim>(values, d_outputs, u);
      finish_scores(s, u);
    } else {
      finish_scores(s);
    }
    Weight weight;
    weigh(s, u, weight);
    if constexpr (kIsKey) {
      start_sums<Element, kWidth>(weight, queries, &gradient(0));
    } else {
      start_sums<Element, kWidth>(weight, d_outputs, &gradient(0));
    }
    finish_sums<kWidth / 2>(weight, &gradient(0));
  }

  // c_i C_i of a tile's columns, for the warp; zero for columns without weight and those beyond
  // the end, whose inverse is zero.
  //
  // Where all of a row's keys decay far, inverse_i may be the largest of floats and the decay below
  // the least: exponentials are taken in two halves. Later keys of zero meet such factors alone,
  // and the product must be zero: a factor is finite.
  CUTE_DEVICE static float const* set_factors(SharedStorage& shared, Work const& work, int slot) {
    detail::CumulativeGate const reference = reach_of(shared).reference;
    float* const factors = shared.factor[this_thread() / 32];
#pragma unroll
    for (int i = 0; i < kTileQueries; i += 32) {
      int const column = this_thread() % 32 + i;
      float const inverse = shared.inverse[slot][column];
      float const gate = shared.gate[slot][column].since(reference);
      float const half = detail::exp2(fmaf(0.5f, gate, work.half_unit()));
      factors[column] = inverse > 0.0f ? cute::min(inverse * half * half, FLT_MAX) : 0.0f;
    }
    __syncwarp();
    return factors + first_column(this_thread());
  }

  // The weight of an element, in s; for keys also that times the score, in u. Its factors are one
  // of the column, one of the row, and the square of `root`: one after the other, for the first two
  // may be infinite together where a key is zero.
  CUTE_DEVICE static void weigh(float root, float factor, float row_factor, float delta, float& s,
                                float& u) {
    float const score = s * root;
    float const weight = score * factor * row_factor;
    if constexpr (kIsKey) {
      float const d_score = weight * (u - delta);
      s = d_score * root;
      u = d_score * score;
    } else {
      s = weight * score;
    }
  }

  // Columns after the warpgroup's rows, in units of R_j.
  CUTE_DEVICE static void weigh_factorised(SharedStorage& shared, Work const& work, int slot,
                                           Product& s, Product& u, Weight& weight,
                                           float (&products)[2]) {
    float const* const factors = set_factors(shared, work, slot);
    float const* const deltas = shared.delta[kIsKey ? slot : 0] + first_column(this_thread());
#pragma unroll
    for (int n = 0; n < kTileQueries / 8; ++n) {
      float2 const factor = column_pair(factors, n);
      float2 delta{};
      if constexpr (kIsKey) {
        delta = column_pair(deltas, n);
      }
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) {
        weigh(1.0f, i % 2 == 0 ? factor.x : factor.y, 1.0f, i % 2 == 0 ? delta.x : delta.y, s[i],
              u[i]);
      }
      add_up(u, n, products);
      pack_columns<Element>(s, n, weight);
    }
  }

  // Any columns, in units of 1.
  CUTE_DEVICE static void weigh_exactly(SharedStorage& shared, Work const& work, int slot,
                                        int token, detail::CumulativeGate const* row_gates,
                                        Product& s, Product& u, Weight& weight,
                                        float (&products)[2]) {
    int const lane = this_thread() % 32;
    Reach const reach = reach_of(shared);
    float const* const factors = set_factors(shared, work, slot);
    detail::CumulativeGate const row_gate[2] = {row_gates[lane_row()], row_gates[lane_row() + 8]};
    float const row_factor[2] = {row_unit(reach, row_gate[0]), row_unit(reach, row_gate[1])};
    // Of the warp's rows, from the first column on.
    int const first_row = work.first_token + Tiling::first_row(this_thread() / 32) - token;
    float const half_unit = work.half_unit();
    float const* const inverses = shared.inverse[slot] + first_column(lane);
    float const* const deltas = shared.delta[kIsKey ? slot : 0] + first_column(lane);
#pragma unroll
    for (int n = 0; n < kTileQueries / 8; ++n) {
      if (8 * n + 7 < first_row) {
        continue;  // these see none of the rows: the mask leaves nothing of them
      }
      float2 const inverse = column_pair(inverses, n);
      float2 const factor = column_pair(factors, n);
      float4 const gates =
          *reinterpret_cast<float4 const*>(&shared.gate[slot][8 * n + 2 * (lane % 4)]);
      float2 delta{};
      if constexpr (kIsKey) {
        delta = column_pair(deltas, n);
      }
      if (reach.factorises && 8 * n >= first_row + 15) {
#pragma unroll
        for (int i = 4 * n; i < 4 * n + 4; ++i) {
          weigh(1.0f, i % 2 == 0 ? factor.x : factor.y, row_factor[i / 2 % 2],
                i % 2 == 0 ? delta.x : delta.y, s[i], u[i]);
        }
      } else {
#pragma unroll
        for (int i = 4 * n; i < 4 * n + 4; ++i) {
          float const c = i % 2 == 0 ? inverse.x : inverse.y;
          detail::CumulativeGate const gate = i % 2 == 0 ? detail::CumulativeGate{gates.x, gates.y}
                                                         : detail::CumulativeGate{gates.z, gates.w};
          float const decay = gate.since(row_gate[i / 2 % 2]);
          // Of E_ij times the unit.
          float const root = c > 0.0f ? detail::exp2(fmaf(0.5f, decay, half_unit)) : 0.0f;
          weigh(root, c, 1.0f, i % 2 == 0 ? delta.x : delta.y, s[i], u[i]);
        }
      }
      __syncwarp();  // else registers would have all columns' factors at once
    }
    if (first_row + 15 > 0) {
#pragma unroll
      for (int i = 0; i < kTileQueries / 2; ++i) {
        // Not a product with zero: the exponential of a difference that is no decay may be huge.
        int const column = i / 4 * 8 + i % 2 + 2 * (lane % 4);
        bool const is_seen = column >= first_row + lane / 4 + 8 * (i / 2 % 2);
        s[i] = is_seen ? s[i] : 0.0f;
        u[i] = is_seen ? u[i] : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kTileQueries / 8; ++n) {
      add_up(u, n, products);
      pack_columns<Element>(s, n, weight);
    }
  }

  // Of the n-th eight columns.
  CUTE_DEVICE static void add_up(Product const& u, int n, float (&products)[2]) {
    if constexpr (kIsKey) {
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) {
        products[i / 2 % 2] += u[i];
      }
    }
  }
};

}  // namespace retention::collective::sm90
