// The mainloop that applies a state to queries: o_i += phi(q_i)^T S.
//
// phi(q) is never stored. Its rows are the A operand of mma.m16n8k16 (M = query rows, K = state
// rows): 16 consecutive state rows are two elements a, a + 1 of block I times the eight of block J,
// so lane (g, t) needs for row g the pair q[8 J + 2 t], which stays in registers as long as J does,
// times q[8 I + a], which comes from shared memory, two values of a in a load.
//
// A warp has 64 query rows. Per 16 state rows and 64 columns, 16 wavefronts of shared memory for
// the state and 8 for the factors serve 32 mma.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"
#include "retention/detail/packed.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::collective {

/// How the warps of a block share a tile of query rows and the columns of V.
template <int ValueDim, int Warps_>
struct RowTiling {
  static constexpr int kWarps = Warps_;
  static constexpr int kValueTile = ValueDim < 64 ? ValueDim : 64;  // columns of a warp
  static constexpr int kColumnWarps = ValueDim / kValueTile;
  static constexpr int kMmaRows = 4;  // mma tiles of 16 rows in a warp
  static constexpr int kWarpRows = 16 * kMmaRows;
  static constexpr int kRows = kWarpRows * (kWarps / kColumnWarps);

  static_assert(ValueDim % kValueTile == 0 && kWarps % kColumnWarps == 0, "whole warps");
};

/// The output of a warp in fp32 registers: (MMA, rows / 16, columns / 8).
template <class Tiling>
using OutputLayout =
    cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<Tiling::kMmaRows>,
                             cute::Int<Tiling::kValueTile / 8>>>;

template <class Element_, int HeadDim, int ValueDim, class Tiling_>
struct ExpandApply {
  using Element = Element_;
  using Tiling = Tiling_;

  static constexpr int kStages = 3;
  static constexpr int kTileRows = 64;  // state rows of one block pair
  static constexpr int kBlocks = HeadDim / 8;
  static constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
  static constexpr int kStateDim = kPairs * kTileRows;
  static constexpr int kThreads = 32 * Tiling::kWarps;
  static constexpr int kMmaRows = Tiling::kMmaRows;

  using QueryLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;     // [row, d, 1]
  using StateLayout = StagedTileLayout<kTileRows, ValueDim, kStages>;  // [state row, dv, stage]

  struct SharedStorage {
    alignas(128) Element state[cute::cosize_v<StateLayout>];
    alignas(128) Element key_sum[kStateDim];
  };

  using MmaAtom = cute::MMA_Atom<typename MmaOperation<Element>::type>;

  /// The part that does not need the tile of queries, so that its loads overlap those.
  CUTE_DEVICE ExpandApply(SharedStorage& shared, Element const* state, Element const* key_sum,
                          int thread)
      : shared_(shared), loader_(state, ValueDim, thread) {
    for (int i = 8 * thread; i < kStateDim; i += 8 * kThreads) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(key_sum + i),
          *reinterpret_cast<cute::uint128_t*>(shared.key_sum + i));
    }
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      load(stage, stage);
    }
  }

  /// Adds to `output` [64, kValueTile] and to `normalizer`, rows g and g + 8 of each mma tile.
  /// A lane's share of a normalizer is its part of a sum over the four lanes of a quad.
  template <class Output>
  CUTE_DEVICE void operator()(Element* query_smem, int warp, int lane, Output& output,
                              float (&normalizer)[kMmaRows][2]) {
    int const first_row = warp / Tiling::kColumnWarps * Tiling::kWarpRows;
    int const first_column = warp % Tiling::kColumnWarps * Tiling::kValueTile;
    cute::Tensor query = cute::make_tensor(cute::make_smem_ptr(query_smem), QueryLayout{});
    int const group = lane / 4;
    int const quad = lane % 4;
    // Rows 8 apart lie a constant apart, whatever the swizzle does to the columns: one address a
    // block serves them all.
    auto block = [&](int index) { return &query(first_row + group, 8 * index, 0); };
    auto pair = [&](Element const* first, int m, int upper, int column) {
      return *reinterpret_cast<std::uint32_t const*>(
          first + QueryLayout{}(16 * m + 8 * upper, 0, 0) + column);
    };

    int stage = 0;
    int pair_index = 0;
#pragma unroll 1
    for (int J = 0; J < kBlocks; ++J) {
      std::uint32_t native[kMmaRows][2];
#pragma unroll 1
      for (int I = 0; I <= J; ++I, ++pair_index) {
        cute::cp_async_wait<kStages - 2>();
        __syncthreads();
        load(stage == 0 ? kStages - 1 : stage - 1, pair_index + kStages - 1);
        if (I == 0) {
          // Here, and not above: the first tile's barrier covers the queries as well.
#pragma unroll
          for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              native[m][half] = pair(block(J), m, half, 2 * quad);
            }
          }
          add_key_sum(query, first_row, lane, J, native, normalizer);
        }
        Element const* outer = block(I);
#pragma unroll
        for (int k = 0; k < kTileRows / 16; ++k) {
          cute::Tensor b = cute::make_tensor<Element>(
              cute::Shape<cute::_4, cute::Int<Tiling::kValueTile / 8>>{});
          load_rows_transposed(shared_.state, StateLayout{}, 16 * k, first_column, stage, lane, b);
#pragma unroll
          for (int m = 0; m < kMmaRows; ++m) {
            cute::Tensor a = cute::make_tensor<Element>(cute::Shape<cute::_8>{});
            cute::Tensor a_pairs = cute::recast<std::uint32_t>(a);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              std::uint32_t const factors = pair(outer, m, half, 2 * k);
              a_pairs(half) =
                  detail::multiply<Element>(detail::broadcast_lo(factors), native[m][half]);
              a_pairs(half + 2) =
                  detail::multiply<Element>(detail::broadcast_hi(factors), native[m][half]);
            }
#pragma unroll
            for (int n = 0; n < Tiling::kValueTile / 8; ++n) {
              cute::gemm(MmaAtom{}, a, b(cute::_, n), output(cute::_, m, n));
            }
          }
        }
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
    }
  }

 private:
  CUTE_DEVICE void load(int stage, int pair_index) {
    if (pair_index < kPairs) {
      loader_.load(shared_.state, stage, kTileRows);
    }
    cute::cp_async_fence();
  }

  // sum_{I <= J} q_I^T z_IJ q_J for one J, where z_IJ is the [8, 8] block of the sum of keys.
  template <class Query>
  CUTE_DEVICE void add_key_sum(Query const& query, int first_row, int lane, int J,
                               std::uint32_t const (&native)[kMmaRows][2],
                               float (&normalizer)[kMmaRows][2]) const {
    float product[kMmaRows][4] = {};  // [row, b]
#pragma unroll 1
    for (int I = 0; I <= J; I += 2) {
      // Rows of z_IJ and z_{I+1}J as the B operand; beyond the diagonal there is nothing to add.
      int const block = lane / 8 % 2 == 0 || I == J ? I : I + 1;
      Element const* row = shared_.key_sum + 64 * (J * (J + 1) / 2 + block) + lane % 8 * 8;
      std::uint32_t b[2];
      cute::SM75_U16x4_LDSM_T::copy(*reinterpret_cast<cute::uint128_t const*>(row), b[0], b[1]);
      b[1] = I == J ? 0 : b[1];
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        std::uint32_t a[4];
        load_mma_a(query, first_row + 16 * m, 8 * I, lane, a);
        float (&c)[4] = product[m];
        MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1],
                                         c[0], c[1], c[2], c[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        normalizer[m][half] +=
            product[m][2 * half] * detail::unpack_lo<Element>(native[m][half]) +
            product[m][2 * half + 1] * detail::unpack_hi<Element>(native[m][half]);
      }
    }
  }

  SharedStorage& shared_;
  TileLoader<Element, kThreads, kTileRows, ValueDim, StateLayout> loader_;
};

}  // namespace retention::collective
