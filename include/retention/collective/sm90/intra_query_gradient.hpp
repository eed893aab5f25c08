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
#include "retention/collective/sm90/row_decays.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

/// A block has `Warps` warps, and `MmaRows` tiles of rows.
template <class Element_, int HeadDim, int ValueDim, int Warps, int MmaRows>
struct IntraQueryGradient : KeyTiles<Element_, HeadDim, ValueDim, 32 * Warps, 64, 1> {
  using Tiles = KeyTiles<Element_, HeadDim, ValueDim, 32 * Warps, 64, 1>;
  using Element = Element_;
  using Tiles::kSlots;
  using Tiles::kTileKeys;
  using Tiles::load;
  using Tiles::prefetch;
  using Tiles::this_thread;
  using typename Tiles::Work;

  static constexpr int kTileRows = 64;
  static constexpr int kRows = kTileRows * MmaRows;
  static_assert(Warps == 4, "a warpgroup a block");

  /// Of rows g and g + 8 of each mma tile, a lane's part of q_i . dq_i.
  using QueryProducts = float[MmaRows][2];
  using RowFactors = QueryFactors<kRows>;

  struct SharedStorage : Tiles::SharedStorage {
    alignas(8) float root[Warps][kTileKeys];  // each warp's own
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
      if (kOverlaps && is_early && work.rows.count() > kTileRows * (MmaRows - 1)) {
        add_to_all(shared, work, operands, rows, gradient, products);
      } else {
        add(shared, work, operands, rows, first_key, is_early, gradient, products);
      }
    } while ((first_key += kTileKeys) < work.rows.end_token());
  }

 private:
  using QueryTile = WarpgroupTile<kRows, HeadDim>;
  using OutputTile = WarpgroupTile<kRows, ValueDim>;
  using KeyTile = WarpgroupTile<kTileKeys, HeadDim>;
  using ValueTile = WarpgroupTile<kTileKeys, ValueDim>;
  using Product = float[kTileKeys / 2];             // [key / 8][4], as accumulators are
  using Weight = std::uint32_t[kTileKeys / 16][4];  // as the A operand

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
#pragma unroll
    for (int k = 0; k < HeadDim; k += 16) {
      warpgroup_multiply_shared<Element>(operands.query.at(kTileRows * m, k), operands.key.at(0, k),
                                         s, k > 0);
    }
#pragma unroll
    for (int k = 0; k < ValueDim; k += 16) {
      warpgroup_multiply_shared<Element>(operands.d_output.at(kTileRows * m, k),
                                         operands.value.at(0, k), u, k > 0);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    hold<kTileKeys / 2>(s);
    hold<kTileKeys / 2>(u);
    hold(weight);
  }

  // Starts gradient += dA K.
  template <class Gradient>
  CUTE_DEVICE static void apply(Operands const& operands, int m, Weight const& weight,
                                Gradient& gradient) {
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      warpgroup_multiply<Element, HeadDim, Major::MN>(weight[k], operands.key.at(16 * k, 0),
                                                      &gradient(0, m, 0), true);
    }
    cute::warpgroup_commit_batch();
  }

  template <class Gradient>
  CUTE_DEVICE static void finish(Weight& weight, Gradient& gradient) {
    cute::warpgroup_wait<0>();
    hold(weight);
    hold<MmaRows * HeadDim / 2>(&gradient(0));
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
    for (int i = 0; i < kTileKeys / 4; ++i) {
      weight[i / 4][i % 4] = detail::pack<Element>(s[2 * i], s[2 * i + 1]);
    }
  }

  struct RowPair {
    typename RowFactors::Factor factor[2];  // of rows g and g + 8

    CUTE_DEVICE RowPair(typename RowFactors::Factor const* factors, int m) {
      int const row = kTileRows * m + this_thread() / 32 * 16 + this_thread() % 32 / 4;
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
    RowDecays<true> const decays(work.rows, kTileRows * m + thread / 32 * 16, first_key,
                                 thread % 32);
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
    for (int m = 0; m < MmaRows; ++m) {
      Product s, u;  // anew: a product that starts from zeros waits for no register
      multiply(operands, m, s, u, weight);
      weigh_early(roots, rows, m, s, u, products);
      pack(s, weight);
      apply(operands, m, weight, gradient);
    }
    finish(weight, gradient);
  }

  // Another one, one row tile after the other: ptxas does not let wgmma run on over a branch.
  template <class Gradient>
  CUTE_DEVICE static void add(SharedStorage& shared, Work const& work, Operands const& operands,
                              RowFactors const& rows, int first_key, bool is_early,
                              Gradient& gradient, QueryProducts& products) {
    float const* const roots = is_early ? set_roots(shared, work, rows, operands.slot) : nullptr;
#pragma unroll
    for (int m = 0; m < MmaRows; ++m) {
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
      apply(operands, m, weight, gradient);
      finish(weight, gradient);
    }
  }
};

}  // namespace retention::collective::sm90
