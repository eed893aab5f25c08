// The causal mainloop inside a chunk by Hopper's wgmma: o_i += sum_{j <= i} w_ij v_j and
// n_i += sum_{j <= i} w_ij, with w_ij = f (q_i . k_j)^2 exp(g_i - g_j) for cumulative log gates g.
//
// A block is a warpgroup with several tiles of 64 rows. Of one after the other it multiplies
// queries and a tile of 64 keys, both in shared memory, and then the weights, which are made of the
// scores in registers, and the values. While it makes weights, the tensor cores have products of
// another block of the multiprocessor. Row tiles that end before a tile of keys leave it out.
//
// Keys before the first token i0 of the block's rows have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both: one exponential a key serves all of
// the rows. Up to there, outputs and normalisers are sums in units of R_i, what comes from a state
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
struct IntraChunk : KeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps, 64, 1> {
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

  struct SharedStorage : Tiles::SharedStorage {
    alignas(8) float factor[Tiling::kWarps][kTileKeys];  // each warp's own
  };

  /// The row from whose token on R_i decays the rows of a thread's warp.
  CUTE_DEVICE static int reference_row(int) { return 0; }

  /// Of the tile of rows: `query` and, plus log2(unit), the gate of each row, both in shared memory
  /// as `work` is. `output` and `normalizer` are over R_i; what is added to them and returned is
  /// not.
  template <class Output>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* query,
                              detail::CumulativeGate const* row_gate, Output& output,
                              float (&normalizer)[kMmaRows][2]) {
    int first_key = 0;
#pragma unroll 1
    do {
      wait_for_copies<0, true>();  // of the queries as well
      __syncthreads();
      load(shared, work, first_key + kTileKeys);
      Operands const operands(shared, query, first_key / kTileKeys % kSlots);
      int const first_token = work.rows.first_token;
      if (first_key + kTileKeys <= first_token) {
        // C_j times the unit.
        float const* const factors =
            set_column_decays<false, Tiles>(shared, operands.slot, work.gate, row_gate[0],
                                            work.unit, shared.factor[this_thread() / 32]);
        auto const weigh_early = [&](int, Product& score) {
#pragma unroll
          for (int n = 0; n < kTileKeys / 8; ++n) {
            float2 const factor = column_pair(factors, n);
#pragma unroll
            for (int i = 4 * n; i < 4 * n + 4; ++i) {
              score[i] = score[i] * (i % 2 == 0 ? factor.x : factor.y) * score[i];
            }
          }
        };
        if (work.rows.count() > kTileRows * (kMmaRows - 1)) {
          add_to_all(operands, weigh_early, output, normalizer);
        } else {
          add(work, operands, first_key, weigh_early, output, normalizer);
        }
      } else {
        if (first_key <= first_token && work.gate != nullptr) {
          decay(row_gate, output, normalizer);
        }
        auto const weigh_late = [&](int m, Product& score) {
          weigh(shared, work, row_gate, operands.slot, first_key, m, score);
        };
        add(work, operands, first_key, weigh_late, output, normalizer);
      }
    } while ((first_key += kTileKeys) < work.rows.end_token());
  }

 private:
  using QueryTile = WarpgroupTile<Tiling::kRows, HeadDim>;
  using KeyTile = WarpgroupTile<kTileKeys, HeadDim>;
  using ValueTile = WarpgroupTile<kTileKeys, ValueDim>;
  static constexpr int kSums = kMmaRows * ValueDim / 2;  // of a lane

  static_assert(Tiling::kWarps == 4 && Tiling::kMmaPitch == kTileRows, "a warpgroup a block");
  static_assert(kTileKeys == kTileColumns);

  struct Operands {
    typename QueryTile::Start query;
    typename KeyTile::Start key;
    typename ValueTile::Start value;
    int slot;

    CUTE_DEVICE Operands(SharedStorage const& shared, Element const* queries, int slot_)
        : query(queries),
          key(shared.key + slot_ * (kTileKeys * HeadDim)),
          value(shared.value + slot_ * (kTileKeys * ValueDim)),
          slot(slot_) {}
  };

  // score = Q K^T of the m-th tile of rows; what was started before is done as well.
  CUTE_DEVICE static void multiply(Operands const& operands, int m, Product& score,
                                   Weight& weight) {
    cute::warpgroup_arrive();
    start_scores<Element, HeadDim>(operands.query, kTileRows * m, operands.key, score);
    finish_scores(weight, score);
  }

  // Weights as an operand, and to the normalisers of rows g and g + 8. What is divided by is the
  // sum of the weights as they were rounded: in fp16 the smallest have few digits left, and where
  // one of them is all that a row has, its error cancels.
  CUTE_DEVICE static void pack(Product const& score, Weight& weight, float (&normalizer)[2]) {
#pragma unroll
    for (int i = 0; i < kTileKeys / 4; ++i) {
      std::uint32_t const pair = detail::pack<Element>(score[2 * i], score[2 * i + 1]);
      weight[i / 4][i % 4] = pair;
      normalizer[i % 2] += detail::unpack_lo<Element>(pair) + detail::unpack_hi<Element>(pair);
    }
  }

  // Adds what a tile of keys gives; `weigh(m, score)` makes weights of scores. Of row tiles without
  // a row that attends that far nothing is done: one after the other, since ptxas does not let
  // wgmma run on over a branch.
  template <class Weigh, class Output>
  CUTE_DEVICE static void add(Work const& work, Operands const& operands, int first_key,
                              Weigh const& weigh, Output& output,
                              float (&normalizer)[kMmaRows][2]) {
    int const rows = work.rows.count();
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      int const last_row = cute::min(kTileRows * (m + 1), rows) - 1;
      if (last_row < kTileRows * m || work.rows.token(last_row) < first_key) {
        continue;  // the same for the whole block
      }
      Product score;
      Weight weight;
      multiply(operands, m, score, weight);
      weigh(m, score);
      pack(score, weight, normalizer[m]);
      start_sums<Element, ValueDim>(weight, operands.value, &output(0, m, 0));
      finish_sums<kSums>(weight, &output(0));
    }
  }

  // The same where every row tile has such rows: each product with values is under way during the
  // next one with queries.
  template <class Weigh, class Output>
  CUTE_DEVICE static void add_to_all(Operands const& operands, Weigh const& weigh, Output& output,
                                     float (&normalizer)[kMmaRows][2]) {
    Weight weight;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      Product score;  // anew: a product that starts from zeros waits for no register
      multiply(operands, m, score, weight);
      weigh(m, score);
      pack(score, weight, normalizer[m]);
      start_sums<Element, ValueDim>(weight, operands.value, &output(0, m, 0));
    }
    finish_sums<kSums>(weight, &output(0));
  }

  // Scores to weights, in place.
  CUTE_DEVICE static void weigh(SharedStorage const& shared, Work const& work,
                                detail::CumulativeGate const* row_gates, int slot, int first_key,
                                int m, Product& score) {
    int const thread = this_thread();
    RowDecays<false> const decays(work.rows, kTileRows * m + Tiling::first_row(thread / 32),
                                  first_key, thread % 32);
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
                                float (&normalizer)[kMmaRows][2]) {
    int const thread = this_thread();
    int const first_row = Tiling::first_row(thread / 32) + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float const factor =
            detail::exp2(row_gates[first_row + kTileRows * m + 8 * upper].since(row_gates[0]));
        normalizer[m][upper] *= factor;
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          output(cute::make_coord(0, upper), m, n) *= factor;
          output(cute::make_coord(1, upper), m, n) *= factor;
        }
      }
    }
  }
};

}  // namespace retention::collective::sm90
