// The causal mainloop inside a chunk for the gradient of queries by Hopper's wgmma:
// dq_i += sum_{j <= i} da_ij k_j, with
//
//     da_ij = s_ij exp(g_i - g_j) (u_ij r_i - delta_i r_i),  s_ij = q_i . k_j,  u_ij = do_i . v_j
//
// for cumulative log gates g and factors r and delta r of the rows, and beside it q_i . dq_i in
// fp32, as gradients of gates need it: without the rounding of da.
//
// A warpgroup has 64 rows. It multiplies its queries and a tile of 64 keys, and gradients of its
// outputs and the values; da is made of both in registers, and is the A operand of the product with
// the keys. Meanwhile the tensor cores have products of other warpgroups. One whose rows end before
// a tile of keys leaves it out.
//
// Keys before the warpgroup's first token i0 have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both: one exponential a key serves all of
// its rows, and R_i is one factor with r_i. For others see RowDecays.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/key_tiles.hpp"
#include "retention/collective/query_factors.hpp"
#include "retention/collective/sm90/products.hpp"
#include "retention/collective/sm90/row_decays.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

template <class Element_, int HeadDim, int ValueDim, class Tiling_>
struct IntraQueryGradient : KeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1> {
  using Tiles = KeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1>;
  using Element = Element_;
  using Tiling = Tiling_;
  using Tiles::kSlots;
  using Tiles::kTileKeys;
  using Tiles::load;
  using Tiles::prefetch;
  using Tiles::this_thread;
  using typename Tiles::Work;

  static_assert(Tiling::kMmaRows == 1 && kTileKeys == kTileColumns);

  /// Of rows g and g + 8 of a warp, a lane's part of q_i . dq_i.
  using QueryProducts = float[1][2];
  using RowFactors = QueryFactors<Tiling::kRows>;

  struct SharedStorage : Tiles::SharedStorage {
    alignas(8) float root[Tiling::kWarps][kTileKeys];  // each warp's own
  };

  /// The row from whose token on R_i decays, for a row: the first of its warpgroup.
  CUTE_DEVICE static int reference_row(int row) { return row / kTileRows * kTileRows; }

  /// Adds to `gradient`, (MMA, 1, d / 8), of the warp's rows, and to `products` in the same units.
  /// The tiles of rows `query` and `d_output` and what else there is of the rows are in shared
  /// memory, as `work` is. What the other threads wrote or copied there needs no barrier before.
  template <class Gradient>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* query,
                              Element const* d_output, RowFactors const& rows, Gradient& gradient,
                              QueryProducts& products) {
    int first_key = 0;
#pragma unroll 1
    do {
      wait_for_copies<0, true>();  // of the rows as well
      __syncthreads();
      load(shared, work, first_key + kTileKeys);
      int const row = first_row();
      int const last_row = cute::min(row + kTileRows, work.rows.count()) - 1;
      // The same for the whole warpgroup.
      if (last_row >= row && work.rows.token(last_row) >= first_key) {
        int const slot = first_key / kTileKeys % kSlots;
        if (first_key + kTileKeys <= work.rows.token(row)) {
          add(shared, query, d_output, slot, gradient, [&](Product& s, Product const& u) {
            weigh_early(shared, work, rows, slot, s, u, products[0]);
          });
        } else {
          add(shared, query, d_output, slot, gradient, [&](Product& s, Product const& u) {
            weigh_late(shared, work, rows, slot, first_key, s, u, products[0]);
          });
        }
      }
    } while ((first_key += kTileKeys) < work.rows.end_token());
  }

 private:
  using QueryTile = WarpgroupTile<Tiling::kRows, HeadDim>;
  using OutputTile = WarpgroupTile<Tiling::kRows, ValueDim>;
  using KeyTile = WarpgroupTile<kTileKeys, HeadDim>;
  using ValueTile = WarpgroupTile<kTileKeys, ValueDim>;

  // Of the thread's warpgroup.
  CUTE_DEVICE static int first_row() { return this_thread() / 128 * kTileRows; }

  // Adds what a tile of keys gives; `weigh` makes da of s and u, in s.
  template <class Gradient, class Weigh>
  CUTE_DEVICE static void add(SharedStorage const& shared, Element const* query,
                              Element const* d_output, int slot, Gradient& gradient,
                              Weigh const& weigh) {
    typename QueryTile::Start const queries(query, first_row());
    typename OutputTile::Start const d_outputs(d_output, first_row());
    typename KeyTile::Start const keys(shared.key + slot * (kTileKeys * HeadDim));
    typename ValueTile::Start const values(shared.value + slot * (kTileKeys * ValueDim));
    Product s, u;
    cute::warpgroup_arrive();
    start_scores<Element, HeadDim>(queries, keys, s);
    start_scores<Element, ValueDim>(d_outputs, values, u);
    finish_scores(s, u);
    weigh(s, u);
    Weight weight;
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      pack_columns<Element>(s, n, weight);
    }
    start_sums<Element, HeadDim>(weight, keys, &gradient(0));
    finish_sums<HeadDim / 2>(weight, &gradient(0));
  }

  // s E (u r - delta r), given the root of E, in s, and the sums of it times s.
  CUTE_DEVICE static void weigh(float root, typename RowFactors::Factor const& factor, float u,
                                float& s, float& product) {
    float const rooted = s * root;
    float const w = rooted * fmaf(u, factor.scale, factor.shift);
    product = w * rooted;
    s = w * root;
  }

  struct RowPair {
    typename RowFactors::Factor factor[2];  // of rows g and g + 8

    CUTE_DEVICE explicit RowPair(typename RowFactors::Factor const* factors) {
      int const row = Tiling::first_row(this_thread() / 32) + this_thread() % 32 / 4;
      factor[0] = factors[row];
      factor[1] = factors[row + 8];
    }
  };

  // Of keys before the warpgroup's rows.
  CUTE_DEVICE static void weigh_early(SharedStorage& shared, Work const& work,
                                      RowFactors const& rows, int slot, Product& s,
                                      Product const& u, float (&products)[2]) {
    // Roots of C_j.
    float const* const roots = set_column_decays<true, Tiles>(
        shared, slot, work.gate, rows.gate[first_row()], 1.0f, shared.root[this_thread() / 32]);
    RowPair const pair(rows.early_factor);
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      float2 const root = column_pair(roots, n);
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) {
        float product;
        weigh(i % 2 == 0 ? root.x : root.y, pair.factor[i / 2 % 2], u[i], s[i], product);
        products[i / 2 % 2] += product;
      }
    }
  }

  // Of others.
  CUTE_DEVICE static void weigh_late(SharedStorage const& shared, Work const& work,
                                     RowFactors const& rows, int slot, int first_key, Product& s,
                                     Product const& u, float (&products)[2]) {
    int const thread = this_thread();
    RowDecays<true> const decays(work.rows, Tiling::first_row(thread / 32), first_key, thread % 32);
    RowPair const pair(rows.factor);
    auto const weigh_one = [&](int i, float root) {
      float product;
      weigh(root, pair.factor[i / 2 % 2], u[i], s[i], product);
      // Not a product with zero: what later keys and values give may be anything.
      products[i / 2 % 2] += decays.sees(i) ? product : 0.0f;
    };
    if (work.gate == nullptr) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i) {
        weigh_one(i, 1.0f);
      }
    } else {
      decays.template for_each<Tiles>(shared, slot, rows.gate, weigh_one);
    }
    if (!decays.sees_all()) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i) {
        s[i] = decays.sees(i) ? s[i] : 0.0f;
      }
    }
  }
};

}  // namespace retention::collective::sm90
