// The causal mainloop inside a chunk for the gradient of queries by Hopper's wgmma:
// dq_i += sum_{j <= i} da_ij k_j, with
//
//     da_ij = s_ij exp(g_i - g_j) (u_ij r_i - delta_i r_i),  s_ij = q_i . k_j,  u_ij = do_i . v_j
//
// for cumulative log gates g and factors r and delta r of the rows, and beside it q_i . dq_i in
// fp32, as gradients of gates need it: without the rounding of da.
//
// A block is a warpgroup with several tiles of 64 rows. Of one after the other it multiplies
// queries and a tile of 64 keys, and gradients of outputs and the values; da is made of both in
// registers, and is the A operand of the product with the keys, which is under way during the next
// two.
//
// Keys before the first token i0 of the block's rows have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both: one exponential a key serves all of
// the rows, and R_i is one factor with r_i. For others see RowDecays.

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

  static constexpr int kMmaRows = Tiling::kMmaRows;  // tiles of 64 rows
  static_assert(Tiling::kWarps == 4 && Tiling::kMmaPitch == kTileRows, "a warpgroup a block");
  static_assert(kTileKeys == kTileColumns);

  /// Of rows g and g + 8 of each mma tile, a lane's part of q_i . dq_i.
  using QueryProducts = float[kMmaRows][2];
  using RowFactors = QueryFactors<Tiling::kRows>;

  struct SharedStorage : Tiles::SharedStorage {
    alignas(8) float root[Tiling::kWarps][kTileKeys];  // each warp's own
  };

  /// The row from whose token on R_i decays the rows of a thread's warp.
  CUTE_DEVICE static int reference_row(int) { return 0; }

  /// Adds to `gradient`, (MMA, rows / 64, d / 8), of the warp's rows, and to `products` in the same
  /// units. The tiles of rows `query` and `d_output` and what else there is of the rows are in
  /// shared memory, as `work` is. What the other threads wrote or copied there needs no barrier
  /// before.
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
      Operands const operands(shared, query, d_output, first_key / kTileKeys % kSlots);
      bool const is_early = first_key + kTileKeys <= work.rows.first_token;
      if (kOverlaps && is_early && work.rows.count() > kTileRows * (kMmaRows - 1)) {
        add_to_all(shared, work, operands, rows, gradient, products);
      } else {
        add(shared, work, operands, rows, first_key, is_early, gradient, products);
      }
    } while ((first_key += kTileKeys) < work.rows.end_token());
  }

 private:
  using QueryTile = WarpgroupTile<Tiling::kRows, HeadDim>;
  using OutputTile = WarpgroupTile<Tiling::kRows, ValueDim>;
  using KeyTile = WarpgroupTile<kTileKeys, HeadDim>;
  using ValueTile = WarpgroupTile<kTileKeys, ValueDim>;
  static constexpr int kSums = kMmaRows * HeadDim / 2;  // of a lane

  // Whether a product is under way during the next ones: gradients of long rows leave no registers
  // for its weights.
  static constexpr bool kOverlaps = HeadDim <= 64;

  struct Operands {
    typename QueryTile::Start query;
    typename OutputTile::Start d_output;
    typename KeyTile::Start key;
    typename ValueTile::Start value;
    int slot;

    CUTE_DEVICE Operands(SharedStorage const& shared, Element const* queries,
                         Element const* d_outputs, int slot_)
        : query(queries),
          d_output(d_outputs),
          key(shared.key + slot_ * (kTileKeys * HeadDim)),
          value(shared.value + slot_ * (kTileKeys * ValueDim)),
          slot(slot_) {}
  };

  // s and u of the m-th tile of rows; what was started before is done as well.
  CUTE_DEVICE static void multiply(Operands const& operands, int m, Product& s, Product& u,
                                   Weight& weight) {
    cute::warpgroup_arrive();
    start_scores<Element, HeadDim>(operands.query, kTileRows * m, operands.key, s);
    start_scores<Element, ValueDim>(operands.d_output, kTileRows * m, operands.value, u);
    finish_scores(weight, s, u);
  }

  // s E (u r - delta r), given the root of E, in s, and the sums of it times s.
  CUTE_DEVICE static void weigh(float root, typename RowFactors::Factor const& factor, float u,
                                float& s, float& product) {
    float const rooted = s * root;
    float const w = rooted * fmaf(u, factor.scale, factor.shift);
    product = w * rooted;
    s = w * root;
  }

  CUTE_DEVICE static void pack(Product const& s, Weight& weight) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      pack_columns<Element>(s, n, weight);
    }
  }

  struct RowPair {
    typename RowFactors::Factor factor[2];  // of rows g and g + 8

    CUTE_DEVICE RowPair(typename RowFactors::Factor const* factors, int m) {
      int const row =
          kTileRows * m + Tiling::first_row(this_thread() / 32) + this_thread() % 32 / 4;
      factor[0] = factors[row];
      factor[1] = factors[row + 8];
    }
  };

  // Roots of C_j.
  CUTE_DEVICE static float const* set_roots(SharedStorage& shared, Work const& work,
                                            RowFactors const& rows, int slot) {
    return set_column_decays<true, Tiles>(shared, slot, work.gate, rows.gate[0], 1.0f,
                                          shared.root[this_thread() / 32]);
  }

  CUTE_DEVICE static void weigh_early(float const* roots, RowFactors const& rows, int m, Product& s,
                                      Product const& u, QueryProducts& products) {
    RowPair const pair(rows.early_factor, m);
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      float2 const root = column_pair(roots, n);
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) {
        float product;
        weigh(i % 2 == 0 ? root.x : root.y, pair.factor[i / 2 % 2], u[i], s[i], product);
        products[m][i / 2 % 2] += product;
      }
    }
  }

  CUTE_DEVICE static void weigh_late(SharedStorage const& shared, Work const& work,
                                     RowFactors const& rows, int slot, int first_key, int m,
                                     Product& s, Product const& u, QueryProducts& products) {
    int const thread = this_thread();
    RowDecays<true> const decays(work.rows, kTileRows * m + Tiling::first_row(thread / 32),
                                 first_key, thread % 32);
    RowPair const pair(rows.factor, m);
    auto const weigh_one = [&](int i, float root) {
      float product;
      weigh(root, pair.factor[i / 2 % 2], u[i], s[i], product);
      // Not a product with zero: what later keys and values give may be anything.
      products[m][i / 2 % 2] += decays.sees(i) ? product : 0.0f;
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

  // A tile of keys all of which are before the block's rows, of which each row tile has some.
  template <class Gradient>
  CUTE_DEVICE static void add_to_all(SharedStorage& shared, Work const& work,
                                     Operands const& operands, RowFactors const& rows,
                                     Gradient& gradient, QueryProducts& products) {
    float const* const roots = set_roots(shared, work, rows, operands.slot);
    Weight weight;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      Product s, u;  // anew: a product that starts from zeros waits for no register
      multiply(operands, m, s, u, weight);
      weigh_early(roots, rows, m, s, u, products);
      pack(s, weight);
      start_sums<Element, HeadDim>(weight, operands.key, &gradient(0, m, 0));
    }
    finish_sums<kSums>(weight, &gradient(0));
  }

  // Another one, one row tile after the other: ptxas does not let wgmma run on over a branch.
  template <class Gradient>
  CUTE_DEVICE static void add(SharedStorage& shared, Work const& work, Operands const& operands,
                              RowFactors const& rows, int first_key, bool is_early,
                              Gradient& gradient, QueryProducts& products) {
    float const* const roots = is_early ? set_roots(shared, work, rows, operands.slot) : nullptr;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      int const last_row = cute::min(kTileRows * (m + 1), work.rows.count()) - 1;
      if (last_row < kTileRows * m || work.rows.token(last_row) < first_key) {
        continue;  // none sees these; the same for the whole block
      }
      Product s, u;
      Weight weight;
      multiply(operands, m, s, u, weight);
      if (is_early) {
        weigh_early(roots, rows, m, s, u, products);
      } else {
        weigh_late(shared, work, rows, operands.slot, first_key, m, s, u, products);
      }
      pack(s, weight);
      start_sums<Element, HeadDim>(weight, operands.key, &gradient(0, m, 0));
      finish_sums<kSums>(weight, &gradient(0));
    }
  }
};

}  // namespace retention::collective::sm90
