// The causal mainloop inside a chunk for the gradient of queries: dq_i += sum_{j <= i} da_ij k_j,
// with
//
//     da_ij = s_ij exp(g_i - g_j) (u_ij r_i - delta_i r_i),  s_ij = q_i . k_j,  u_ij = do_i . v_j
//
// for cumulative log gates g and factors r and delta r of the rows, and beside it q_i . dq_i in
// fp32, as gradients of gates need it: without the rounding of da. s and u are two products with
// the same keys' tiles; da stays in registers, as what an mma leaves in a lane is what the next one
// takes as its A operand.
//
// Keys before the first token i0 of a warp's rows have exp(g_i - g_j) = R_i C_j, where
// R_i = exp(g_i - g_i0) and C_j = exp(g_i0 - g_j) decay both: one exponential a key serves all of
// the rows, and R_i is one factor with r_i. Tiles with i0 and later keys have a mask and an
// exponential for every element.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/key_tiles.hpp"
#include "retention/collective/query_factors.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm80 {

/// A block has `Warps` warps of 32 rows.
template <class Element_, int HeadDim, int ValueDim, int Warps>
struct IntraQueryGradient : WarpKeyTiles<Element_, HeadDim, ValueDim, 32 * Warps> {
  using Tiles = WarpKeyTiles<Element_, HeadDim, ValueDim, 32 * Warps>;
  using Element = Element_;
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

  static constexpr int kMmaRows = 2;  // mma tiles of 16 rows in a warp
  static constexpr int kWarpRows = 16 * kMmaRows;
  static constexpr int kRows = kWarpRows * Warps;

  /// Of rows g and g + 8 of each mma tile, a lane's part of q_i . dq_i.
  using QueryProducts = float[kMmaRows][2];

  using QueryLayout = StagedTileLayout<kRows, HeadDim, 1>;    // q: [row, d, 1]
  using OutputLayout = StagedTileLayout<kRows, ValueDim, 1>;  // do: [row, dv, 1]

  using RowFactors = QueryFactors<kRows>;
  using Factor = typename RowFactors::Factor;

  /// Where a thread reads its first operands, in bytes from the start of each tile.
  struct alignas(16) Offsets {
    int query;
    int output;
    int key;
    int value;
    int key_rows;  // of keys as rows of a B operand
    int gate;
  };

  // Whether sums of products are in shared memory between tiles: long rows leave no registers.
  static constexpr bool kParksProducts = HeadDim > 64;
  // Whether each lane makes the decay of one key for all of its warp. A block of long rows is alone
  // on its multiprocessor, and the wait for the others takes it longer than exponentials for all.
  static constexpr bool kSharesFactors = HeadDim <= 64;

  struct SharedStorage : Tiles::SharedStorage {
    alignas(8) float root[kSharesFactors ? Warps : 1][kTileKeys];  // of C_j, each warp's own
    // Each thread's own: here they take no registers.
    Offsets offsets[kThreads];
    Reach reach[kThreads];
    QueryProducts products[kParksProducts ? kThreads : 1];
  };

  /// Starts the first loads.
  CUTE_DEVICE static void prefetch(SharedStorage& shared, Work const& work) {
    int const thread = this_thread();
    int const lane = thread % 32;
    int const first_row = thread / 32 * kWarpRows;
    // Of B operands: (keys 0-7, low columns), (0-7, high), (8-15, low), (8-15, high), and for keys
    // as rows (keys 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
    shared.offsets[thread] = {byte_offset<QueryLayout>(first_row + lane % 16, lane / 16 * 8),
                              byte_offset<OutputLayout>(first_row + lane % 16, lane / 16 * 8),
                              byte_offset<KeyLayout>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8),
                              byte_offset<ValueLayout>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8),
                              byte_offset<KeyLayout>(lane % 16, lane / 16 * 8),
                              static_cast<int>(sizeof(detail::CumulativeGate)) * 2 * (lane % 4)};
    shared.reach[thread] = {work.rows, first_row, kWarpRows};
    Tiles::prefetch(shared, work);
  }

  /// The row from whose token on R_i decays, for a row: the first of its warp.
  CUTE_DEVICE static int reference_row(int row) { return row / kWarpRows * kWarpRows; }

  /// Adds to `gradient`, (MMA, rows / 16, d / 8), of the warp's rows, and to `products` in the same
  /// units. The tiles of rows `query` and
  /// `d_output` and what else there is of the rows are in shared memory, as `work` is. What the
  /// other threads wrote or copied there needs no barrier before.
  template <class Gradient>
  CUTE_DEVICE static void run(SharedStorage& shared, Work const& work, Element const* query,
                              Element const* d_output, RowFactors const& rows, Gradient& gradient,
                              QueryProducts& products) {
    cute::cp_async_wait<0>();
    __syncthreads();
    Kept<HeadDim, kKeepQuery> kept_query;
    Kept<ValueDim, kKeepOutput> kept_output;
    keep<QueryLayout>(query, shared.offsets[this_thread()].query, kept_query);
    keep<OutputLayout>(d_output, shared.offsets[this_thread()].output, kept_output);

    if constexpr (kParksProducts) {
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        shared.products[this_thread()][m][0] = products[m][0];
        shared.products[this_thread()][m][1] = products[m][1];
        products[m][0] = products[m][1] = 0.0f;
      }
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
      if (first_key + kTileKeys <= reach.first_token) {
        add<false>(shared, work, query, d_output, kept_query, kept_output, rows, first_key,
                   gradient, products);
      } else {
        add<true>(shared, work, query, d_output, kept_query, kept_output, rows, first_key, gradient,
                  products);
      }
    } while ((first_key += kTileKeys) < work.rows.end_token());
    if constexpr (kParksProducts) {
      add_products(shared.products[this_thread()], products);
    }
  }

 private:
  CUTE_DEVICE static void add_products(QueryProducts const& sums, QueryProducts& products) {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
      products[m][0] += sums[m][0];
      products[m][1] += sums[m][1];
    }
  }

  // Which operands registers hold throughout, beside gradients and products: loading one takes as
  // many wavefronts as an operand of keys.
  static constexpr bool kKeepQuery = HeadDim <= 64;
  static constexpr bool kKeepOutput = 3 * HeadDim + ValueDim <= 256;

  /// The A operand of a warp's rows: [row, column].
  template <int Columns, bool kIsKept>
  struct Kept {
    static constexpr int kColumns = Columns;
    static constexpr bool kKept = kIsKept;
    std::uint32_t a[kMmaRows][kKept ? Columns / 16 : 1][4];
  };

  template <class Layout>
  CUTE_DEVICE static void load_rows(Element const* tile, int offset, int m, int k,
                                    std::uint32_t (&a)[4]) {
    cute::SM75_U32x4_LDSM_N::copy(
        piece_at(tile, advance_columns<Layout>(offset, 16 * k) + byte_offset<Layout>(16 * m, 0)),
        a[0], a[1], a[2], a[3]);
  }

  template <class Layout, class Operand>
  CUTE_DEVICE static void keep(Element const* tile, int offset, Operand& operand) {
    if constexpr (Operand::kKept) {
#pragma unroll
      for (int k = 0; k < Operand::kColumns / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          load_rows<Layout>(tile, offset, m, k, operand.a[m][k]);
        }
      }
    }
  }

  // Products of the warp's rows and the rows of a slot: c += A B^T. `a_offset` and `b_offset` are
  // the lane's in `rows` and `tiles`.
  template <class RowLayout, class TileLayout, class Operand>
  CUTE_DEVICE static void multiply(Operand const& operand, Element const* rows, int a_offset,
                                   Element const* tiles, int b_offset, int slot,
                                   float (&c)[kMmaRows][kTileKeys / 8][4]) {
#pragma unroll
    for (int k = 0; k < Operand::kColumns / 16; ++k) {
      std::uint32_t b[kTileKeys / 16][4];
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        cute::SM75_U32x4_LDSM_N::copy(
            piece_at(tiles, advance_columns<TileLayout>(b_offset, 16 * k) +
                                byte_offset<TileLayout>(16 * n, 0) +
                                byte_offset<TileLayout>(0, 0, 1) * slot),
            b[n][0], b[n][1], b[n][2], b[n][3]);
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        std::uint32_t a[4];
        if constexpr (Operand::kKept) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[i] = operand.a[m][k][i];
          }
        } else {
          load_rows<RowLayout>(rows, a_offset, m, k, a);
        }
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
          float (&d)[4] = c[m][n];
          MmaOperation<Element>::type::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3],
                                           b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], d[0], d[1],
                                           d[2], d[3]);
        }
      }
    }
  }

  // One tile of keys; `Diagonal` where not all of them are before the warp's first token.
  template <bool Diagonal, class Query, class Output, class Gradient>
  CUTE_DEVICE static void add(SharedStorage& shared, Work const& work, Element const* query,
                              Element const* d_output, Query const& kept_query,
                              Output const& kept_output, RowFactors const& rows, int first_key,
                              Gradient& gradient, QueryProducts& products) {
    int const thread = this_thread();
    int const lane = thread % 32;
    int const first_row = thread / 32 * kWarpRows;
    int const slot = first_key / kTileKeys % kSlots;
    Offsets const kept_offsets = kParksProducts ? Offsets{} : shared.offsets[thread];
    // Of long rows read anew at each step: registers are short.
    auto const offsets = [&]() -> Offsets const& {
      return kParksProducts ? shared.offsets[this_thread()] : kept_offsets;
    };
    if (kSharesFactors && !Diagonal && work.gate != nullptr) {
      __syncwarp();  // those of the tile before are read
      shared.root[thread / 32][lane] = root_of_decay(rows.gate[first_row], shared.gate[slot][lane]);
      __syncwarp();
    }
    float weight[kMmaRows][kTileKeys / 8][4] = {};  // s, s root(E), and then da
    multiply<QueryLayout, KeyLayout>(kept_query, query, offsets().query, shared.key, offsets().key,
                                     slot, weight);
    multiply_roots<Diagonal>(shared, work, rows, first_row, slot, offsets().gate, lane, weight);
    float product[kMmaRows][kTileKeys / 8][4] = {};  // u
    multiply<OutputLayout, ValueLayout>(kept_output, d_output, offsets().output, shared.value,
                                        offsets().value, slot, product);
    Factor const* factors = Diagonal ? rows.factor : rows.early_factor;
    Factor factor[kMmaRows][2];
#pragma unroll
    for (int i = 0; i < 2 * kMmaRows; ++i) {
      factor[i / 2][i % 2] = factors[first_row + lane / 4 + 8 * i];
    }
    for_each(weight, [&](float& w, int m, int n, int upper, int c) {
      float& u = product[m][n][2 * upper + c];
      float const root = w;
      w *= fmaf(u, factor[m][upper].scale, factor[m][upper].shift);
      u = w * root;
    });
    multiply_roots<Diagonal>(shared, work, rows, first_row, slot, offsets().gate, lane, weight);
    if constexpr (Diagonal) {
      // Not a product with zero: what later keys and values give may be anything.
      int const quad = lane % 4;
      for_each(weight, [&](float& w, int m, int n, int upper, int c) {
        int const row = first_row + lane / 4 + 16 * m + 8 * upper;
        int const last = work.rows.token(row) - first_key - 2 * quad;
        bool const is_seen = 8 * n + c <= last;
        float& p = product[m][n][2 * upper + c];
        w = is_seen ? w : 0.0f;
        p = is_seen ? p : 0.0f;
      });
    }
    if constexpr (kParksProducts) {
      QueryProducts sums = {};
      for_each(product, [&](float const& p, int m, int, int upper, int) { sums[m][upper] += p; });
      add_products(sums, shared.products[this_thread()]);
    } else {
      for_each(product,
               [&](float const& p, int m, int, int upper, int) { products[m][upper] += p; });
    }

#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      std::uint32_t a[kMmaRows][4];  // [row, key]
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const(&w)[4] = weight[m][2 * k + i / 2];
          a[m][i] = detail::pack<Element>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < HeadDim / 8; n += 2) {
        std::uint32_t b[4];
        cute::SM75_U16x8_LDSM_T::copy(
            piece_at(shared.key, advance_columns<KeyLayout>(offsets().key_rows, 8 * n) +
                                     byte_offset<KeyLayout>(16 * k, 0) +
                                     byte_offset<KeyLayout>(0, 0, 1) * slot),
            b[0], b[1], b[2], b[3]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int m = 0; m < kMmaRows; ++m) {
            float* c = &gradient(0, m, n + i);
            MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[m][0], a[m][1], a[m][2],
                                             a[m][3], b[2 * i], b[2 * i + 1], c[0], c[1], c[2],
                                             c[3]);
          }
        }
      }
    }
  }

  CUTE_DEVICE static float root_of_decay(detail::CumulativeGate const& row,
                                         detail::CumulativeGate const& key) {
    return detail::exp2(0.5f * row.since(key));
  }

  // Multiplies by the square root of E_ij, or of C_j unless `Diagonal`.
  template <bool Diagonal>
  CUTE_DEVICE static void multiply_roots(SharedStorage const& shared, Work const& work,
                                         RowFactors const& rows, int first_row, int slot,
                                         int gate_offset, int lane,
                                         float (&weight)[kMmaRows][kTileKeys / 8][4]) {
    if (work.gate == nullptr) {
      return;
    }
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      ColumnGates key;
      float column[2];  // root of C_j
      if constexpr (kSharesFactors && !Diagonal) {
        auto const pair = *reinterpret_cast<float2 const*>(
            &shared.root[first_row / kWarpRows][8 * n + 2 * (lane % 4)]);
        column[0] = pair.x;
        column[1] = pair.y;
      } else {
        key = Tiles::column_gates(shared, slot, gate_offset, n);
        if constexpr (!Diagonal) {
          column[0] = root_of_decay(rows.gate[first_row], key.gate[0]);
          column[1] = root_of_decay(rows.gate[first_row], key.gate[1]);
        }
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (Diagonal) {
            weight[m][n][i] *= root_of_decay(rows.gate[first_row + lane / 4 + 16 * m + i / 2 * 8],
                                             key.gate[i % 2]);
          } else {
            weight[m][n][i] *= column[i % 2];
          }
        }
      }
      if constexpr (Diagonal) {
        __syncwarp();  // else registers would have the rows' gates throughout
      }
    }
  }

  template <class Visit>
  CUTE_DEVICE static void for_each(float (&weight)[kMmaRows][kTileKeys / 8][4], Visit visit) {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
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
