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
// A block is a warpgroup with several tiles of 64 rows. Of one after the other it multiplies the
// rows and a tile of 64 columns; weights are made of the products in registers, and are the A
// operand of that with the columns, which is under way during the next ones.
//
// Columns come from the last to the first. Those after the 16 rows that a warp has of a row tile
// have E_ij = C_i R_j, where C_i = exp(g_i - r), R_j = exp(r - g_j) and r is the largest gate of
// the 16: one exponential a column serves all of them. Weights s^2 C_i c_i are then at most their
// true values, which are probabilities: relative to any other row they might be out of range. Down
// to the row tile, gradients are sums in units of R_j, what comes from a state included; they are
// multiplied by it once, and then the columns of the tile's own tokens follow, in units of 1. Where
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

  static constexpr int kMmaRows = Tiling::kMmaRows;           // tiles of 64 rows
  static constexpr int kWidth = kIsKey ? HeadDim : ValueDim;  // of the gradient
  static_assert(Tiling::kWarps == 4 && Tiling::kMmaPitch == kTileRows, "a warpgroup a block");
  static_assert(kTileQueries == kTileColumns);
  /// Of rows g and g + 8 of each mma tile, a lane's part of k_j . dk_j.
  using KeyProducts = float[kMmaRows][2];
  // What the decay between 16 rows may be, as a power of two: it costs weights as much of their
  // range.
  static constexpr float kMaxSpan = cute::is_same_v<Element, cute::half_t> ? 10.0f : 64.0f;

  using KeyLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;     // [row, d, 1]
  using ValueLayout = StagedTileLayout<Tiling::kRows, ValueDim, 1>;  // [row, dv, 1]

  /// Of the 16 rows that a warp has of a row tile.
  struct Reach {
    detail::CumulativeGate reference;  // r
    bool factorises;                   // whether columns after the row tile do
  };

  struct SharedStorage : Tiles::SharedStorage {
    // Each warp's own: of a row tile and the next.
    alignas(16) float factor[2][Tiling::kWarps][kTileQueries];
    detail::CumulativeGate reference[Tiling::kWarps][kMmaRows];
    int factorises[Tiling::kWarps][kMmaRows];
  };

  /// To be called before `scale` and `run`, when `row_gate` is in shared memory: of every row of
  /// the tile; that of the chunk's last token for rows that stand for nothing.
  CUTE_DEVICE static void set_reach(SharedStorage& shared, Work const&,
                                    detail::CumulativeGate const* row_gate) {
    int const warp = this_thread() / 32;
    int const lane = this_thread() % 32;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      detail::CumulativeGate const own =
          row_gate[Tiling::first_row(warp) + Tiling::kMmaPitch * m + lane % 16];
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
        shared.reference[warp][m] = high;
        shared.factorises[warp][m] = factorises;
      }
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
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      Reach const reach = reach_of(shared, m);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        detail::CumulativeGate const gate = row_gate[row_of(m) + 8 * upper];
        float const decay = end_gate.since(reach.factorises ? reach.reference : gate);
        multiply_row(detail::exp2(decay + static_cast<float>(exponent)), m, upper, gradient);
      }
    }
  }

  /// R_j, which sums are over before `run`, for a row of this gate in the m-th row tile.
  CUTE_DEVICE static float row_unit(SharedStorage const& shared, int m,
                                    detail::CumulativeGate const& gate) {
    return row_unit(reach_of(shared, m), gate);
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
      Operands const operands(shared, key, value, slot);
      if (kOverlaps && columns.token >= work.first_token + Tiling::kRows &&
          work.rows == Tiling::kRows && all_factorise(shared)) {
        add_to_all(shared, work, operands, gradient, products);
      } else {
        add(shared, work, operands, columns, row_gate, gradient, products);
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
  static constexpr int kSums = kMmaRows * kWidth / 2;  // of a lane

  // Whether a product is under way during the next ones: gradients of long keys leave no registers
  // for its weights.
  static constexpr bool kOverlaps = !kIsKey || HeadDim <= 64;

  struct Operands {
    typename KeyTile::Start key;
    typename ValueTile::Start value;
    typename QueryTile::Start query;
    typename OutputTile::Start d_output;
    int slot;

    CUTE_DEVICE Operands(SharedStorage const& shared, Element const* keys, Element const* values,
                         int slot_)
        : key(keys),
          value(kIsKey ? values : keys),
          query(shared.query + slot_ * (kTileQueries * HeadDim)),
          d_output(shared.d_output + slot_ * (kTileQueries * ValueDim)),
          slot(slot_) {}
  };

  // The lane's first row of a row tile.
  CUTE_DEVICE static int row_of(int m) {
    return Tiling::first_row(this_thread() / 32) + Tiling::kMmaPitch * m + this_thread() % 32 / 4;
  }

  CUTE_DEVICE static Reach reach_of(SharedStorage const& shared, int m) {
    int const warp = this_thread() / 32;
    return {shared.reference[warp][m], shared.factorises[warp][m] != 0};
  }

  CUTE_DEVICE static float row_unit(Reach const& reach, detail::CumulativeGate const& gate) {
    return reach.factorises ? detail::exp2(reach.reference.since(gate)) : 1.0f;
  }

  template <class Gradient>
  CUTE_DEVICE static void multiply_row(float factor, int m, int upper, Gradient& gradient) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      gradient(cute::make_coord(0, upper), m, n) *= factor;
      gradient(cute::make_coord(1, upper), m, n) *= factor;
    }
  }

  // Of all warps: they take one way together.
  CUTE_DEVICE static bool all_factorise(SharedStorage const& shared) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < Tiling::kWarps * kMmaRows; ++i) {
      all = all && shared.factorises[i / kMmaRows][i % kMmaRows] != 0;
    }
    return all;
  }

  // s and, for gradients of keys, u of the m-th tile of rows; what was started before is done as
  // well.
  CUTE_DEVICE static void multiply(Operands const& operands, int m, Product& s, Product& u,
                                   Weight& weight) {
    cute::warpgroup_arrive();
    start_scores<Element, HeadDim>(operands.key, kTileRows * m, operands.query, s);
    if constexpr (kIsKey) {
      start_scores<Element, ValueDim>(operands.value, kTileRows * m, operands.d_output, u);
      finish_scores(weight, s, u);
    } else {
      finish_scores(weight, s);
    }
  }

  // Starts gradient += W B, where B are the columns.
  template <class Gradient>
  CUTE_DEVICE static void apply(Operands const& operands, int m, Weight const& weight,
                                Gradient& gradient) {
    if constexpr (kIsKey) {
      start_sums<Element, kWidth>(weight, operands.query, &gradient(0, m, 0));
    } else {
      start_sums<Element, kWidth>(weight, operands.d_output, &gradient(0, m, 0));
    }
  }

  // c_i C_i of a row tile's columns, for the warp; zero for columns without weight and those beyond
  // the end, whose inverse is zero.
  //
  // Where all of a row's keys decay far, inverse_i may be the largest of floats and the decay below
  // the least: exponentials are taken in two halves. Later keys of zero meet such factors alone,
  // and the product must be zero: a factor is finite.
  CUTE_DEVICE static float const* set_factors(SharedStorage& shared, Work const& work, int slot,
                                              int m) {
    int const warp = this_thread() / 32;
    detail::CumulativeGate const reference = shared.reference[warp][m];
    float* const factors = shared.factor[m % 2][warp];
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

  // Columns after the row tile, in units of R_j.
  CUTE_DEVICE static void weigh_factorised(SharedStorage const& shared, float const* factors,
                                           int slot, Product& s, Product& u, Weight& weight,
                                           float (&products)[2]) {
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
                                        int token, detail::CumulativeGate const* row_gates, int m,
                                        Product& s, Product& u, Weight& weight,
                                        float (&products)[2]) {
    int const lane = this_thread() % 32;
    int const warp = this_thread() / 32;
    Reach const reach = reach_of(shared, m);
    float const* const factors = set_factors(shared, work, slot, m);
    detail::CumulativeGate const row_gate[2] = {row_gates[row_of(m)], row_gates[row_of(m) + 8]};
    float const row_factor[2] = {row_unit(reach, row_gate[0]), row_unit(reach, row_gate[1])};
    // Of the warp's rows, from the first column on.
    int const first_row =
        work.first_token + Tiling::first_row(warp) + Tiling::kMmaPitch * m - token;
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

  // Columns after all of the block's rows, whose decays all factorise.
  template <class Gradient>
  CUTE_DEVICE static void add_to_all(SharedStorage& shared, Work const& work,
                                     Operands const& operands, Gradient& gradient,
                                     KeyProducts& products) {
    Weight weight;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      float const* const factors = set_factors(shared, work, operands.slot, m);
      Product s, u;  // anew: a product that starts from zeros waits for no register
      multiply(operands, m, s, u, weight);
      weigh_factorised(shared, factors, operands.slot, s, u, weight, products[m]);
      apply(operands, m, weight, gradient);
    }
    finish_sums<kSums>(weight, &gradient(0));
  }

  // Others, one row tile after the other: ptxas does not let wgmma run on over a branch.
  template <class Gradient>
  CUTE_DEVICE static void add(SharedStorage& shared, Work const& work, Operands const& operands,
                              Columns const& columns, detail::CumulativeGate const* row_gate,
                              Gradient& gradient, KeyProducts& products) {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      int const first_token = work.first_token + kTileRows * m;
      if (kTileRows * m >= work.rows || columns.token + kTileQueries <= first_token) {
        continue;  // no row that these see; the same for the whole block
      }
      Reach const reach = reach_of(shared, m);
      if (columns.token == first_token && columns.head == 0) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          float const factor = row_unit(reach, row_gate[row_of(m) + 8 * upper]);
          multiply_row(factor, m, upper, gradient);
          if constexpr (kIsKey) {
            products[m][upper] *= factor;
          }
        }
      }
      Product s, u;
      Weight weight;
      multiply(operands, m, s, u, weight);
      if (columns.token > first_token && reach.factorises) {
        weigh_factorised(shared, set_factors(shared, work, operands.slot, m), operands.slot, s, u,
                         weight, products[m]);
      } else {
        weigh_exactly(shared, work, operands.slot, columns.token, row_gate, m, s, u, weight,
                      products[m]);
      }
      apply(operands, m, weight, gradient);
      finish_sums<kSums>(weight, &gradient(0));
    }
  }
};

}  // namespace retention::collective::sm90
