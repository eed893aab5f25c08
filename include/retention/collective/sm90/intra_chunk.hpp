// The causal mainloop inside a chunk by Hopper's wgmma: o_i += sum_{j <= i} w_ij v_j and
// n_i += sum_{j <= i} w_ij, with w_ij = f (q_i . k_j)^2 exp(g_i - g_j) for cumulative log gates g.
//
// A warpgroup has 64 rows. It multiplies its queries and a tile of 64 keys, both in shared memory,
// and then the weights, which are made of the scores in registers, and the values. While it makes
// weights, the tensor cores have products of other warpgroups. One whose rows end before a tile of
// keys leaves it out.
//
// Keys before the warpgroup's first token i0 have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both: one exponential a key serves all of
// its rows. Up to there, outputs and normalisers are sums in units of R_i, what comes from a state
// included; they are multiplied by it once. Later keys have such factors with the first token of a
// warp's 16 rows; those that are not before it have a mask and an exponential for every weight.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/key_tiles.hpp"
#include "retention/collective/sm90/products.hpp"
#include "retention/collective/sm90/row_decays.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

template <class Element_, int HeadDim, int ValueDim, class Tiling_>
struct IntraChunk : KeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1, 2,
                             ValueDim <= 64 ? 3 : 2> {
  using Tiles =
      KeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1, 2, ValueDim <= 64 ? 3 : 2>;
  using Element = Element_;
  using Tiling = Tiling_;
  using Tiles::kSlots;
  using Tiles::kTileKeys;
  using Tiles::kValueSlots;
  using Tiles::load;
  using Tiles::prefetch;
  using Tiles::this_thread;
  using typename Tiles::Work;

  static_assert(Tiling::kMmaRows == 1 && kTileKeys == kTileColumns);

  struct SharedStorage : Tiles::SharedStorage {
    alignas(8) float factor[Tiling::kWarps][kTileKeys];  // each warp's own
  };

  /// The row from whose token on R_i decays, for a row: the first of its warpgroup.
  CUTE_DEVICE static int reference_row(int row) { return row / kTileRows * kTileRows; }

  /// Of the tile of rows: `query` and, plus log2(unit), the gate of each row, both in shared memory
  /// as `work` is. `output` and `normalizer` are over R_i; what is added to them and returned is
  /// not. What the other threads wrote or copied there needs no barrier before.
  template <class Output>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* query,
                              detail::CumulativeGate const* row_gate, Output& output,
                              float (&normalizer)[1][2]) {
    int first_key = 0;
    auto const wait_for_tile = [&] {
      wait_for_copies<0, true>();  // of the queries as well
      __syncthreads();
      load(shared, work, first_key + kTileKeys);
    };
    auto const weigh_before = [&](Product& score) {
      weigh_early(shared, work, row_gate[first_row()], first_key, score);
    };
    auto const weigh_others = [&](Product& score) {
      weigh_late(shared, work, row_gate, first_key, score);
    };
    auto const add_late = [&](Reach const& reach) {
      if (first_key <= reach.first_token && work.gate != nullptr) {
        decay(row_gate, output, normalizer[0]);
      }
      Weight weight;
      start_tile(shared, query, first_key, weigh_others, weight, output, normalizer[0]);
      finish_sums<ValueDim / 2>(weight, &output(0));
    };
    if constexpr (kHasRoom) {
      wait_for_tile();
      Reach const reach(work.rows);
      Weight weight = {};
#pragma unroll 1
      while (first_key + kTileKeys <= reach.first_token) {
        start_tile(shared, query, first_key, weigh_before, weight, output, normalizer[0]);
        first_key += kTileKeys;
        wait_for_tile();
      }
      finish_sums<ValueDim / 2>(weight, &output(0));
#pragma unroll 1
      while (true) {
        if (reach.last_token >= first_key) {  // the same for the whole warpgroup
          add_late(reach);
        }
        first_key += kTileKeys;
        if (first_key >= work.rows.end_token()) {
          break;
        }
        wait_for_tile();
      }
    } else {
#pragma unroll 1
      do {
        wait_for_tile();
        Reach const reach(work.rows);
        if (reach.last_token >= first_key) {
          if (first_key + kTileKeys <= reach.first_token) {
            Weight weight;
            start_tile(shared, query, first_key, weigh_before, weight, output, normalizer[0]);
            finish_sums<ValueDim / 2>(weight, &output(0));
          } else {
            add_late(reach);
          }
        }
      } while ((first_key += kTileKeys) < work.rows.end_token());
    }
  }

 private:
  using QueryTile = WarpgroupTile<Tiling::kRows, HeadDim>;
  using KeyTile = WarpgroupTile<kTileKeys, HeadDim>;
  using ValueTile = WarpgroupTile<kTileKeys, ValueDim>;

  // Whether there are registers for a product with values that is under way during the next one
  // with queries, and for one that makes normalisers: long values leave none.
  static constexpr bool kHasRoom = ValueDim <= 64;

  // Of the thread's warpgroup, tokens in the chunk: 0 and -1 where no row stands for anything.
  struct Reach {
    int first_token;
    int last_token;

    CUTE_DEVICE explicit Reach(TileRows const& rows) {
      int const row = first_row();
      int const last_row = cute::min(row + kTileRows, rows.count()) - 1;
      first_token = last_row < row ? 0 : rows.token(row);
      last_token = last_row < row ? -1 : rows.token(last_row);
    }
  };

  // Of the thread's warpgroup.
  CUTE_DEVICE static int first_row() { return this_thread() / 128 * kTileRows; }
  // Of rows g and g + 8 of the thread's warp, the first.
  CUTE_DEVICE static int lane_row() {
    return Tiling::first_row(this_thread() / 32) + this_thread() % 32 / 4;
  }

  // Starts what a tile of keys adds; what was started before is done then. `weigh` makes weights of
  // scores, in place.
  template <class Weigh, class Output>
  CUTE_DEVICE static void start_tile(SharedStorage const& shared, Element const* query,
                                     int first_key, Weigh const& weigh, Weight& weight,
                                     Output& output, float (&normalizer)[2]) {
    int const tile = first_key / kTileKeys;
    typename QueryTile::Start const queries(query, first_row());
    typename KeyTile::Start const keys(shared.key + tile % kSlots * (kTileKeys * HeadDim));
    typename ValueTile::Start const values(shared.value +
                                           tile % kValueSlots * (kTileKeys * ValueDim));
    Product score;
    cute::warpgroup_arrive();
    start_scores<Element, HeadDim>(queries, keys, score);
    finish_scores(score);
    if constexpr (kHasRoom) {
      hold(weight);
      hold<ValueDim / 2>(&output(0));
    }
    weigh(score);
    pack(score, weight, normalizer);
    start_sums<Element, ValueDim>(weight, values, &output(0));
  }

  // Weights as an operand, and to the normalisers of rows g and g + 8: a lane's part of a sum over
  // the four that share these. What is divided by is the sum of the weights as they were rounded:
  // in fp16 the smallest have few digits left, and where one of them is all that a row has, its
  // error cancels.
  CUTE_DEVICE static void pack(Product const& score, Weight& weight, float (&normalizer)[2]) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      pack_columns<Element>(score, n, weight);
    }
    if constexpr (kHasRoom) {
      // A quarter of all of the sum, in each column of a C fragment.
      float sums[4] = {};
      std::uint32_t const quarters = detail::pack<Element>(0.25f, 0.25f);
#pragma unroll
      for (int k = 0; k < kTileKeys / 16; ++k) {
        std::uint32_t const(&a)[4] = weight[k];
        MmaOperation<Element>::type::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3],
                                         quarters, quarters, sums[0], sums[1], sums[2], sums[3]);
      }
      normalizer[0] += sums[0];
      normalizer[1] += sums[2];
    } else {
#pragma unroll
      for (int i = 0; i < kTileKeys / 4; ++i) {
        std::uint32_t const pair = weight[i / 4][i % 4];
        normalizer[i % 2] += detail::unpack_lo<Element>(pair) + detail::unpack_hi<Element>(pair);
      }
    }
  }

  // Of keys before the warpgroup's rows, in units of R_i; `first_gate` is that of the first row.
  CUTE_DEVICE static void weigh_early(SharedStorage& shared, Work const& work,
                                      detail::CumulativeGate const& first_gate, int first_key,
                                      Product& score) {
    // C_j times the unit.
    float const* const factors =
        set_column_decays<false, Tiles>(shared, first_key / kTileKeys % kSlots, work.gate,
                                        first_gate, work.unit, shared.factor[this_thread() / 32]);
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      float2 const factor = column_pair(factors, n);
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) {
        score[i] = score[i] * (i % 2 == 0 ? factor.x : factor.y) * score[i];
      }
    }
  }

  // Of others.
  CUTE_DEVICE static void weigh_late(SharedStorage const& shared, Work const& work,
                                     detail::CumulativeGate const* row_gates, int first_key,
                                     Product& score) {
    int const slot = first_key / kTileKeys % kSlots;
    int const thread = this_thread();
    RowDecays<false> const decays(work.rows, Tiling::first_row(thread / 32), first_key,
                                  thread % 32);
    // One factor after the other: a square may be infinite where the decay is 0.
    if (work.gate == nullptr) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i) {
        score[i] = score[i] * work.unit * score[i];
      }
    } else {
      decays.template for_each<Tiles>(shared, slot, row_gates, [&](int i, float decay) {
        score[i] = score[i] * decay * score[i];
      });
    }
    if (!decays.sees_all()) {
      // Not a product with zero: the exponential of a difference that is no decay may be huge.
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i) {
        score[i] = decays.sees(i) ? score[i] : 0.0f;
      }
    }
  }

  // Multiplies by R_i what there is so far.
  template <class Output>
  CUTE_DEVICE static void decay(detail::CumulativeGate const* row_gates, Output& output,
                                float (&normalizer)[2]) {
    detail::CumulativeGate const first_gate = row_gates[first_row()];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float const factor = detail::exp2(row_gates[lane_row() + 8 * upper].since(first_gate));
      normalizer[upper] *= factor;
#pragma unroll
      for (int n = 0; n < ValueDim / 8; ++n) {
        output(cute::make_coord(0, upper), 0, n) *= factor;
        output(cute::make_coord(1, upper), 0, n) *= factor;
      }
    }
  }
};

}  // namespace retention::collective::sm90
