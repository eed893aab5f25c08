// The causal mainloop inside a chunk by Hopper's wgmma: o_i += sum_{j <= i} w_ij v_j and
// n_i += sum_{j <= i} w_ij, with w_ij = f (q_i . k_j)^2 exp(g_i - g_j) for cumulative log gates g.
//
// A warpgroup has 64 rows. It multiplies its queries and a tile of 64 keys, both in shared memory,
// and then the weights, which are made of the scores in registers, and the values. While it makes
// weights, the tensor cores have products of other warpgroups. A producer copies keys and values
// (tile_stream.hpp); warpgroups go through the tiles that their rows see, each at its own pace.
//
// Keys before the warpgroup's first token i0 have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both. So have later ones where gates are
// mild. Outputs and normalisers are sums in units of R_i, what comes from a state included, and are
// multiplied by it once. From the first tile on that is not mild they are in units of 1, and every
// weight has an exponential.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/sm90/products.hpp"
#include "retention/collective/sm90/row_decays.hpp"
#include "retention/collective/sm90/tile_stream.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

template <class Element_, int HeadDim, int ValueDim, class Tiling_>
struct IntraChunk {
  using Element = Element_;
  using Tiling = Tiling_;
  using Stream =
      TileStream<Element, HeadDim, ValueDim, Tiling::kWarpgroups, Tiling::kWarpgroups == 2 ? 4 : 3>;
  using SharedStorage = typename Stream::SharedStorage;
  using Work = typename Stream::Work;

  static constexpr int kTileKeys = Stream::kTileKeys;
  static constexpr int kRowThreads = 32 * Tiling::kWarps;
  /// With the producer's.
  static constexpr int kThreads = kRowThreads + Stream::kProducers;

  static_assert(Tiling::kMmaRows == 1 && kTileKeys == kTileColumns);

  CUTE_DEVICE static int this_thread() { return Stream::this_thread(); }

  /// The same in all lanes of a warp, and known to be.
  CUTE_DEVICE static int this_warpgroup() {
    return __shfl_sync(0xffffffffu, this_thread() / 128, 0);
  }

  /// What comes from the state: `Apply` is ExpandApply, of the same tile of rows.
  template <class Apply, class Output>
  CUTE_DEVICE static void apply_state(SharedStorage& shared, Work const& work, Element* query,
                                      Output& output) {
    int const warpgroup = this_warpgroup();
    if (WarpgroupReach(work.rows, warpgroup).last_token < 0) {
      return;  // nothing comes for it
    }
    constexpr int kParts = Stream::kStateParts;
    int slot = 0;
    auto const next = [&](int rows) {
      if (rows % kParts == 0) {
        Stream::wait(slot, warpgroup);
      }
      return Stream::state_part(shared, slot, rows % kParts);
    };
    auto const done = [&](int rows) {
      if (rows % kParts == kParts - 1) {
        Stream::release_state(work.rows, rows / kParts, slot);
        slot = Stream::after(slot);
      }
    };
    Apply::apply(query, Tiling::first_row(this_thread() / 32), this_thread() % 32, next, done,
                 output);
  }

  /// The row from whose token on R_i decays, for a row: the first of its warpgroup.
  CUTE_DEVICE static int reference_row(int row) { return row / kTileRows * kTileRows; }

  /// Of the tile of rows: `query` and, plus log2(unit), the gate of each row, both in shared
  /// memory, ready for wgmma. `output` and `normalizer` are over R_i; what is added to them and
  /// returned is not.
  template <class Output>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* query,
                              detail::CumulativeGate const* row_gate, Output& output,
                              float (&normalizer)[1][2]) {
    int const warpgroup = this_warpgroup();
    int const last_token = WarpgroupReach(work.rows, warpgroup).last_token;
    bool over_rows = true;  // whether sums are over R_i
    int slot = work.state == nullptr ? 0 : Stream::kStateTiles % Stream::kSlots;
#pragma unroll 1
    for (int first_key = 0; first_key <= last_token; first_key += kTileKeys) {
      Stream::wait(slot, warpgroup);
      KeyKind const kind = shared.kind[slot][warpgroup];
      typename QueryTile::Start const queries(query, kTileRows * warpgroup);
      typename KeyTile::Start const keys(shared.key + slot * (kTileKeys * HeadDim));
      Product score;
      cute::warpgroup_arrive();
      start_scores<Element, HeadDim>(queries, keys, score);
      finish_scores(score);
      if (kind == KeyKind::kEarlier || (kind == KeyKind::kMild && over_rows)) {
        weigh_by_factors(shared.factor[slot][warpgroup], score);
      } else {
        if (over_rows) {
          decay(row_gate, output, normalizer[0]);
          over_rows = false;
        }
        weigh_by_gates(shared, row_gate, slot, score);
      }
      if (kind != KeyKind::kEarlier) {
        mask(work.rows, first_key, score);
      }
      Weight weight;
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        pack_columns<Element>(score, n, weight);
      }
      typename ValueTile::Start const values(shared.value + slot * (kTileKeys * ValueDim));
      start_sums<Element, ValueDim>(weight, values, &output(0));
      add_weights(weight, normalizer[0]);
      finish_sums<ValueDim / 2>(weight, &output(0));
      Stream::release(work.rows, first_key, slot);
      slot = Stream::after(slot);
    }
    if (over_rows && work.gate != nullptr) {
      decay(row_gate, output, normalizer[0]);
    }
  }

 private:
  using QueryTile = WarpgroupTile<Tiling::kRows, HeadDim>;
  using KeyTile = WarpgroupTile<kTileKeys, HeadDim>;
  using ValueTile = WarpgroupTile<kTileKeys, ValueDim>;

  // Of rows g and g + 8 of the thread's warp, the first.
  CUTE_DEVICE static int lane_row() {
    return Tiling::first_row(this_thread() / 32) + this_thread() % 32 / 4;
  }

  // To the normalisers of rows g and g + 8: a lane's part of a sum over the four that share these.
  // What is divided by is the sum of the weights as they were rounded: in fp16 the smallest have
  // few digits left, and where one of them is all that a row has, its error cancels.
  CUTE_DEVICE static void add_weights(Weight const& weight, float (&normalizer)[2]) {
    // A quarter of all of the sum, in each column of a C fragment.
    float sums[2][4] = {};
    std::uint32_t const quarters = detail::pack<Element>(0.25f, 0.25f);
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      std::uint32_t const(&a)[4] = weight[k];
      float (&c)[4] = sums[k % 2];
      MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], quarters,
                                       quarters, c[0], c[1], c[2], c[3]);
    }
    normalizer[0] += sums[0][0] + sums[1][0];
    normalizer[1] += sums[0][2] + sums[1][2];
    hold<2>(normalizer);  // before the wait for the sums of values, not after
  }

  // In units of R_i, by C_j times the unit. One factor after the other: a square may be infinite
  // where the decay is 0.
  CUTE_DEVICE static void weigh_by_factors(float const (&factors)[kTileKeys], Product& score) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      float2 const factor = column_pair(factors + first_column(this_thread()), n);
#pragma unroll
      for (int i = 4 * n; i < 4 * n + 4; ++i) {
        score[i] = score[i] * (i % 2 == 0 ? factor.x : factor.y) * score[i];
      }
    }
  }

  // Of any gates, by an exponential for each. Weights that `mask` leaves out may be anything.
  CUTE_DEVICE static void weigh_by_gates(SharedStorage const& shared,
                                         detail::CumulativeGate const* row_gates, int slot,
                                         Product& score) {
    int const offset =
        static_cast<int>(sizeof(detail::CumulativeGate)) * first_column(this_thread());
    detail::CumulativeGate const row_gate[2] = {row_gates[lane_row()], row_gates[lane_row() + 8]};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      auto const key = column_gates(shared.gate[slot], offset, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const decay = detail::exp2(row_gate[i / 2].since(key.gate[i % 2]));
        score[4 * n + i] = score[4 * n + i] * decay * score[4 * n + i];
      }
      hold<4>(&score[4 * n]);  // before the next gates are read, for which there are no registers
    }
  }

  // Not a product with zero: the exponential of a difference that is no decay may be huge.
  CUTE_DEVICE static void mask(TileRows const& rows, int first_key, Product& score) {
    int const thread = this_thread();
    RowDecays<false> const decays(rows, Tiling::first_row(thread / 32), first_key, thread % 32);
    if (!decays.sees_all()) {
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
    detail::CumulativeGate const first_gate = row_gates[reference_row(lane_row())];
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
