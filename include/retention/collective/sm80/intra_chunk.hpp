// The causal mainloop inside a chunk: o_i += sum_{j <= i} w_ij v_j and n_i += sum_{j <= i} w_ij,
// with w_ij = f (q_i . k_j)^2 exp(g_i - g_j) for cumulative log gates g.
//
// Scores and weights stay in registers: what an mma leaves in a lane is what the next one takes as
// its A operand.
//
// Keys before the first token i0 of a warp's rows have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both: one exponential a key serves all of
// the rows. Up to there, outputs and normalisers are sums in units of R_i, what comes from a state
// included; they are multiplied by it once, and then the tiles with i0 and later keys follow, with
// a mask and an exponential for every weight.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/key_tiles.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm80 {

template <class Element_, int HeadDim, int ValueDim, class Tiling_>
struct IntraChunk : WarpKeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps> {
  using Tiles = WarpKeyTiles<Element_, HeadDim, ValueDim, 32 * Tiling_::kWarps>;
  using Element = Element_;
  using Tiling = Tiling_;
  using Tiles::kLoadKeys;
  using Tiles::kSlots;
  using Tiles::kThreads;
  using Tiles::kTileKeys;
  using Tiles::load;
  using Tiles::this_thread;
  using typename Tiles::KeyLayout;
  using typename Tiles::Reach;
  using typename Tiles::ValueLayout;
  using typename Tiles::Work;

  static constexpr int kMmaRows = Tiling::kMmaRows;
  // Of these, how many have scores at one time: together with the outputs that registers can hold.
  static constexpr int kScoreRows = ValueDim == 64 ? 2 : kMmaRows;

  using QueryLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;  // [row, d, 1]

  /// Where a thread reads its first operands, in bytes from the start of each tile.
  struct alignas(16) Offsets {
    int query;
    int key;
    int value;
    int gate;
  };

  struct SharedStorage : Tiles::SharedStorage {
    // Each thread's own: here they take no registers.
    alignas(16) float normalizer[kMmaRows / 2][kThreads][4];
    Offsets offsets[kThreads];
    Reach reach[kThreads];
  };

  /// Starts the first loads.
  CUTE_DEVICE static void prefetch(SharedStorage& shared, Work const& work) {
    int const thread = this_thread();
    int const lane = thread % 32;
    int const first_row = thread / 32 * Tiling::kWarpRows;
    // Keys of the B operand: (0-7, low d), (0-7, high d), (8-15, low d), (8-15, high d). Values:
    // (keys 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    shared.offsets[thread] = {byte_offset<QueryLayout>(first_row + lane % 16, lane / 16 * 8),
                              byte_offset<KeyLayout>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8),
                              byte_offset<ValueLayout>(lane % 16, lane / 16 * 8),
                              static_cast<int>(sizeof(detail::CumulativeGate)) * 2 * (lane % 4)};
    shared.reach[thread] = {work.rows, first_row, Tiling::kWarpRows};
    Tiles::prefetch(shared, work);
  }

  /// The row from whose token on R_i decays, for a row: the first of its warp.
  CUTE_DEVICE static int reference_row(int row) {
    return row / Tiling::kWarpRows * Tiling::kWarpRows;
  }

  /// Of the tile of rows: `query` and, plus log2(unit), the gate of each row, both in shared memory
  /// as `work` is. `output` and `normalizer` are over R_i, the decay since the first token of the
  /// warp's rows; what is added to them and returned is not.
  template <class Output>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* query,
                              detail::CumulativeGate const* row_gate, Output& output,
                              float (&normalizer)[kMmaRows][2]) {
#pragma unroll
    for (int i = 0; i < 2 * kMmaRows; ++i) {
      shared.normalizer[i / 4][this_thread()][i % 4] = normalizer[i / 2][i % 2];
    }
    int first_key = 0;
#pragma unroll 1
    do {
      if (first_key % kLoadKeys == 0) {
        cute::cp_async_wait<0>();
        __syncthreads();
        load(shared, work, first_key + kLoadKeys);
      }
      Reach const reach = shared.reach[this_thread()];
      if (first_key > reach.last_token) {
        continue;  // no row of this warp attends that far
      }
      int const slot = first_key / kTileKeys % kSlots;
      if (first_key + kTileKeys <= reach.first_token) {
        add<false>(shared, work, query, row_gate, first_key, slot, output);
      } else {
        if (first_key <= reach.first_token && work.gate != nullptr) {
          decay(shared, row_gate, output);
        }
        add<true>(shared, work, query, row_gate, first_key, slot, output);
      }
    } while ((first_key += kTileKeys) < work.rows.end_token());
#pragma unroll
    for (int i = 0; i < 2 * kMmaRows; ++i) {
      normalizer[i / 2][i % 2] = shared.normalizer[i / 4][this_thread()][i % 4];
    }
  }

 private:
  // One tile of keys; `Diagonal` where not all of them are before the warp's first token.
  template <bool Diagonal, class Output>
  CUTE_DEVICE static void add(SharedStorage& shared, Work const& work, Element const* query,
                              detail::CumulativeGate const* row_gate, int first_key, int slot,
                              Output& output) {
    int const thread = this_thread();
    int const lane = thread % 32;
    int const first_row = thread / 32 * Tiling::kWarpRows;
    Offsets const offsets = shared.offsets[thread];
    float factor[kTileKeys / 8][2];  // C_j times the unit
    if constexpr (!Diagonal) {
      column_factors(shared, work, row_gate[first_row], slot, offsets.gate, factor);
    }
    std::uint32_t a[kMmaRows][kTileKeys / 16][4];  // the weights: [row, key]
#pragma unroll
    for (int m = 0; m < kMmaRows; m += kScoreRows) {
      float score[kScoreRows][kTileKeys / 8][4] = {};
      multiply(shared, query, offsets, m, slot, score);
      if constexpr (Diagonal) {
        weigh(shared, work, row_gate, first_row, m, slot, offsets.gate, first_key, lane, score);
      } else {
        for_each(score, [&](float& s, int, int n, int, int c) { s = s * factor[n][c] * s; });
      }
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
          float const(&w)[4] = score[i][n];
          std::uint32_t (&pairs)[4] = a[m + i][n / 2];
          pairs[n % 2 * 2] = detail::pack<Element>(w[0], w[1]);
          pairs[n % 2 * 2 + 1] = detail::pack<Element>(w[2], w[3]);
        }
      }
      add_weights(shared, m, a);
    }

#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      std::uint32_t b[ValueDim / 8][2];
#pragma unroll
      for (int n = 0; n < ValueDim / 8; n += 2) {
        cute::SM75_U16x8_LDSM_T::copy(
            piece_at(shared.value, advance_columns<ValueLayout>(offsets.value, 8 * n) +
                                       byte_offset<ValueLayout>(16 * k, 0) +
                                       byte_offset<ValueLayout>(0, 0, 1) * slot),
            b[n][0], b[n][1], b[n + 1][0], b[n + 1][1]);
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          float* c = &output(0, m, n);
          MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[m][k][0], a[m][k][1],
                                           a[m][k][2], a[m][k][3], b[n][0], b[n][1], c[0], c[1],
                                           c[2], c[3]);
        }
      }
    }
  }

  CUTE_DEVICE static void column_factors(SharedStorage const& shared, Work const& work,
                                         detail::CumulativeGate const& row_gate, int slot,
                                         int gate_offset, float (&factor)[kTileKeys / 8][2]) {
    if (work.gate == nullptr) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 4; ++i) {
        factor[i / 2][i % 2] = work.unit;
      }
    } else {
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        auto const key = Tiles::column_gates(shared, slot, gate_offset, n);
        factor[n][0] = detail::exp2(row_gate.since(key.gate[0]));
        factor[n][1] = detail::exp2(row_gate.since(key.gate[1]));
      }
    }
  }

  // Multiplies by R_i what there is so far.
  template <class Output>
  CUTE_DEVICE static void decay(SharedStorage& shared, detail::CumulativeGate const* row_gates,
                                Output& output) {
    int const thread = this_thread();
    int const first_row = thread / 32 * Tiling::kWarpRows;
    detail::CumulativeGate const* row_gate = row_gates + first_row + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float const factor = detail::exp2(row_gate[16 * m + 8 * upper].since(row_gates[first_row]));
        shared.normalizer[m / 2][thread][m % 2 * 2 + upper] *= factor;
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          output(cute::make_coord(0, upper), m, n) *= factor;
          output(cute::make_coord(1, upper), m, n) *= factor;
        }
      }
    }
  }

  // Adds the weights of mma tiles from `first` on to their rows' normalisers, as a product with
  // ones: what is divided by is the sum of the weights as they were rounded. In fp16 the smallest
  // have few digits left, and where one of them is all that a row has, its error cancels.
  CUTE_DEVICE static void add_weights(SharedStorage& shared, int first,
                                      std::uint32_t const (&a)[kMmaRows][kTileKeys / 16][4]) {
    std::uint32_t const ones = detail::pack<Element>(1.0f, 1.0f);
    int const thread = this_thread();
#pragma unroll
    for (int m = first; m < first + kScoreRows; m += 2) {
      float sum[2][4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float (&c)[4] = sum[i];
#pragma unroll
        for (int k = 0; k < kTileKeys / 16; ++k) {
          MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[m + i][k][0], a[m + i][k][1],
                                           a[m + i][k][2], a[m + i][k][3], ones, ones, c[0], c[1],
                                           c[2], c[3]);
        }
      }
      // All four lanes of a quad have the sum, and each adds a quarter.
      float4& normalizer = *reinterpret_cast<float4*>(shared.normalizer[m / 2][thread]);
      float4 n = normalizer;
      n.x = fmaf(0.25f, sum[0][0], n.x);
      n.y = fmaf(0.25f, sum[0][2], n.y);
      n.z = fmaf(0.25f, sum[1][0], n.z);
      n.w = fmaf(0.25f, sum[1][2], n.w);
      normalizer = n;
    }
  }

  // score += Q K^T for the mma tiles of the warp's rows from `first` on.
  CUTE_DEVICE static void multiply(SharedStorage const& shared, Element const* query,
                                   Offsets const& offsets, int first, int slot,
                                   float (&score)[kScoreRows][kTileKeys / 8][4]) {
#pragma unroll
    for (int k = 0; k < HeadDim; k += 16) {
      std::uint32_t b[kTileKeys / 16][4];
      int const keys =
          advance_columns<KeyLayout>(offsets.key, k) + byte_offset<KeyLayout>(0, 0, 1) * slot;
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        cute::SM75_U32x4_LDSM_N::copy(
            piece_at(shared.key, keys + byte_offset<KeyLayout>(16 * n, 0)), b[n][0], b[n][1],
            b[n][2], b[n][3]);
      }
      int const queries = advance_columns<QueryLayout>(offsets.query, k);
#pragma unroll
      for (int m = 0; m < kScoreRows; ++m) {
        std::uint32_t a[4];
        cute::SM75_U32x4_LDSM_N::copy(
            piece_at(query, queries + byte_offset<QueryLayout>(16 * (first + m), 0)), a[0], a[1],
            a[2], a[3]);
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
          float (&c)[4] = score[m][n];
          MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3],
                                           b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], c[0], c[1],
                                           c[2], c[3]);
        }
      }
    }
  }

  // Scores to weights, in place, for the mma tiles of the warp from `first` on. The branches end
  // with a meeting point and so remain branches: run together, these steps and the products before
  // and after them would need more registers than there are.
  CUTE_DEVICE static void weigh(SharedStorage const& shared, Work const& work,
                                detail::CumulativeGate const* row_gates, int warp_row, int first,
                                int slot, int gate_offset, int first_key, int lane,
                                float (&weight)[kScoreRows][kTileKeys / 8][4]) {
    int const quad = lane % 4;
    int const first_row = warp_row + 16 * first + lane / 4;
    // One factor after the other: a square may be infinite where the decay is 0.
    if (work.gate == nullptr) {
      float const unit = work.unit;
      for_each(weight, [&](float& w, int, int, int, int) { w = w * unit * w; });
      __syncwarp();
    } else {
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        auto const key = Tiles::column_gates(shared, slot, gate_offset, n);
#pragma unroll
        for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float const decay = row_gates[first_row + 16 * m + i / 2 * 8].since(key.gate[i % 2]);
            float& w = weight[m][n][i];
            w = w * detail::exp2(decay) * w;
          }
        }
      }
      __syncwarp();
    }
    if (first_key + kTileKeys - 1 > work.rows.token(warp_row)) {
      // Not a product with zero: the exponential of a difference that is no decay may be huge.
      for_each(weight, [&](float& w, int m, int n, int upper, int c) {
        int const last = work.rows.token(first_row + 16 * m + 8 * upper) - first_key - 2 * quad;
        w = 8 * n + c <= last ? w : 0.0f;
      });
      __syncwarp();
    }
  }

  template <class Visit>
  CUTE_DEVICE static void for_each(float (&weight)[kScoreRows][kTileKeys / 8][4], Visit visit) {
#pragma unroll
    for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
          visit(weight[m][n][i], m, n, i / 2, i % 2);
        }
      }
    }
  }
};

}  // namespace retention::collective::sm80
