// The mainloop that applies a state to queries, o_i += phi(q_i)^T S and n_i += phi(q_i)^T z, and
// the gradient of a state to keys, dv_j += phi_k(k_j)^T dS: phi_k has a multiplicity, 2 for block
// pairs I < J, and phi has none.
//
// phi(q) is never stored. Its rows are the A operand of mma.m16n8k16 (M = query rows, K = state
// rows): 16 consecutive state rows are two elements a, a + 1 of block I times the eight of block J.
// K is taken in an order that puts a and a + 1 side by side: k = 8 x + 2 t + s stands for element
// a + s of block I and t + 4 x of block J. Lane (g, t) then needs for row g the pair
// q[8 I + a], q[8 I + a + 1], one load from shared memory, times q[8 J + t + 4 x] in both halves,
// which stays in registers as long as J does: nothing is rearranged inside the loop.
//
// Per 16 state rows, a warp of 64 rows and 64 columns needs 16 wavefronts of shared memory for the
// state and 8 for the pairs, and one of 32 rows and 128 columns 32 and 4; either serves 32 mma.
// With wgmma (warpgroup.hpp) the state's rows lie in the order of k, and rows of phi are made under
// the products of those before.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/row_tiling.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::collective {

/// The rows of a block, with wgmma or without, so that no score is computed twice: a lane has 64
/// or, for dv above 32, 128 outputs by mma.
template <int ValueDim, int Warps, bool Warpgroups, int kCount = 2>
using ApplyTiling =
    cute::conditional_t<Warpgroups && kFitsWarpgroups<ValueDim>, WarpgroupTiling<kCount>,
                        RowTiling<(ValueDim > 64 ? 2 : 4), Warps>>;

/// The output of a warp in fp32 registers: (MMA, rows / 16, columns / 8), that of 16 rows one after
/// another.
template <class Tiling, int ValueDim>
using OutputLayout =
    cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<Tiling::kMmaRows>,
                             cute::Int<ValueDim / 8>>,
                 cute::Stride<cute::Stride<cute::_1, cute::_2>, cute::Int<ValueDim / 2>, cute::_4>>;

/// The rows that are expanded.
enum class Expanded { kQueries, kKeys };

template <class Element_, int HeadDim, int ValueDim, class Tiling_,
          Expanded kExpanded = Expanded::kQueries>
struct ExpandApply {
  using Element = Element_;
  using Tiling = Tiling_;

  static constexpr bool kWarpgroups = kTakesWarpgroups<ValueDim> && Tiling::kWarpgroups != 0;
  static constexpr int kStages = 3;
  static constexpr int kTileRows = 64;  // state rows of one block pair
  static constexpr int kBlocks = HeadDim / 8;
  static constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
  static constexpr int kStateDim = kPairs * kTileRows;
  static constexpr int kThreads = 32 * Tiling::kWarps;
  static constexpr int kMmaRows = Tiling::kMmaRows;

  static_assert(kStateDim == SymmetricPower<HeadDim, 2>::kStateDim, "one order of the state");
  static_assert(kBlocks % 2 == 0, "blocks J are taken two at a time");
  static_assert(ValueDim == 32 || ValueDim == 64 || ValueDim == 128, "what registers hold");

  // Keys have half their multiplicity, so that what differs from queries are pairs I == J alone:
  // the accumulators are to be multiplied by 2^kExponent.
  static constexpr int kExponent = kExpanded == Expanded::kKeys ? 1 : 0;

  using QueryLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;     // [row, d, 1]
  using StateLayout = StagedTileLayout<kTileRows, ValueDim, kStages>;  // [state row, dv, stage]

  struct SharedStorage {
    alignas(128) Element state[cute::cosize_v<StateLayout>];
  };

  using MmaAtom = cute::MMA_Atom<typename MmaOperation<Element>::type>;

  CUTE_DEVICE ExpandApply(SharedStorage& shared, Element const* state, int thread)
      : shared_(shared),
        source_(state + source_row(thread / kPieces) * ValueDim + thread % kPieces * 8),
        offset_(StateLayout{}(thread / kPieces, thread % kPieces * 8, 0)) {}

  /// Starts the first loads: they do not need the tile of queries, and overlap its own.
  CUTE_DEVICE void prefetch() {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      load(stage, stage);
    }
  }

  /// Adds to `normalizer`, rows g and g + 8 of each mma tile, those of the warp from `first_row`
  /// on: to a lane's part of a sum over the four of a quad. That is sum_{I <= J} q_I^T z_IJ q_J,
  /// where z_IJ is the [8, 8] block of the sum of keys: z_IJ q_J on the tensor cores, with z^T as
  /// the B operand straight from global memory, where its pairs lie.
  CUTE_DEVICE static void add_key_sum(Element const* key_sum, Element* query_smem, int first_row,
                                      int lane, float (&normalizer)[kMmaRows][2]) {
    static_assert(kExpanded == Expanded::kQueries, "keys have no normalizers");
    cute::Tensor query = cute::make_tensor(cute::make_smem_ptr(query_smem), QueryLayout{});
    Element const* source = key_sum + 2 * lane;  // a = lane / 4, b = 2 (lane % 4)
    auto const load_block = [&](int I, int J) {
      return J < I ? 0u
                   : *reinterpret_cast<std::uint32_t const*>(source +
                                                             kTileRows * (J * (J + 1) / 2 + I));
    };
    std::uint32_t b[kBlocks];  // one for each J, of the next I as soon as that of this one is used
#pragma unroll
    for (int J = 0; J < kBlocks; ++J) {
      b[J] = load_block(0, J);
    }
#pragma unroll 1
    for (int I = 0; I < kBlocks; ++I) {
      float product[kMmaRows][4] = {};  // [row, a]
#pragma unroll
      for (int J = 0; J < kBlocks; J += 2) {
        if (J + 1 < I) {
          continue;
        }
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          std::uint32_t a[4];
          load_mma_a(query, first_row + 16 * m, 8 * J, lane, a);
          float (&c)[4] = product[m];
          MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[J],
                                           b[J + 1], c[0], c[1], c[2], c[3]);
        }
        b[J] = load_block(I + 1, J);
        b[J + 1] = load_block(I + 1, J + 1);
      }
      Element const* outer = &query(first_row + lane / 4, 8 * I, 0);
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          std::uint32_t const factors = pair(outer, m, upper, 2 * (lane % 4));
          normalizer[m][upper] += product[m][2 * upper] * detail::unpack_lo<Element>(factors) +
                                  product[m][2 * upper + 1] * detail::unpack_hi<Element>(factors);
        }
      }
    }
  }

  /// Adds to `output` [rows, dv]. Warps whose rows stand for nothing compute as the others do: all
  /// meet at the same barriers, and a branch around the products would cost registers.
  template <class Output>
  CUTE_DEVICE void operator()(Element* smem, int first_row, int lane, Output& output) {
    if constexpr (kExpanded == Expanded::kKeys) {
      __syncthreads();  // the keys are there
    }
    int stage = 0;
    int next_pair = kStages - 1;
    auto const next = [&](int) {
      wait_for_copies<kStages - 2, kWarpgroups>();
      __syncthreads();
      load(stage == 0 ? kStages - 1 : stage - 1, next_pair++);
      return shared_.state + stage * (kTileRows * ValueDim);
    };
    auto const done = [&](int) { stage = stage == kStages - 1 ? 0 : stage + 1; };
    apply(smem, first_row, lane, next, done, output);
  }

  /// The same where somebody else loads: next(pair) waits for the tile of the pair of blocks of
  /// this number and returns it, and done(pair) gives it back.
  template <class Next, class Done, class Output>
  CUTE_DEVICE static void apply(Element* smem, int first_row, int lane, Next const& next,
                                Done const& done, Output& output) {
    cute::Tensor query = cute::make_tensor(cute::make_smem_ptr(smem), QueryLayout{});
    int const group = lane / 4;
    int const quad = lane % 4;
    // Rows 8 apart lie a constant apart, whatever the swizzle does to the columns: one address a
    // block serves them all.
    auto block = [&](int index) { return &query(first_row + group, 8 * index, 0); };
    int pair_index = 0;
#pragma unroll 1
    for (int J = 0; J < kBlocks; ++J) {
      Native native;  // q[8 J + t + 4 x] twice: [m, upper, x]
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          native[m][i / 2][i % 2] = detail::broadcast_lo(*reinterpret_cast<std::uint16_t const*>(
              block(J) + row_offset(m, i / 2) + quad + 4 * (i % 2)));
        }
      }
#pragma unroll 1
      for (int I = 0; I <= J; ++I, ++pair_index) {
        Element const* const tile = next(pair_index);
        Element const* outer = block(I);
        if constexpr (kExpanded == Expanded::kKeys) {
          if (I == J) {
            halve(native);
          }
        }
        if constexpr (kWarpgroups) {
          multiply_by_warpgroup(outer, native, tile, output);
        } else {
          multiply_by_warps(outer, native, tile, lane, output);
        }
        done(pair_index);
      }
    }
  }

 private:
  using Native = std::uint32_t[kMmaRows][2][2];

  // Adds the products with a block pair's rows of the state.
  template <class Output>
  CUTE_DEVICE static void multiply_by_warps(Element const* outer, Native const& native,
                                            Element const* tile, int lane, Output& output) {
    // The state row of k, as it lies in the tile: see `source_row`.
    int const state_lane = (lane & 24) | (lane & 1) << 2 | (lane & 7) >> 1;
#pragma unroll
    for (int k = 0; k < kTileRows / 16; ++k) {
      cute::Tensor b = cute::make_tensor<Element>(cute::Shape<cute::_4, cute::Int<ValueDim / 8>>{});
      load_rows_transposed(tile, StateLayout{}, 16 * k, 0, 0, state_lane, b);
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        cute::Tensor a = cute::make_tensor<Element>(cute::Shape<cute::_8>{});
        cute::Tensor a_pairs = cute::recast<std::uint32_t>(a);
        expand(outer, native, m, k, a_pairs);
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          cute::gemm(MmaAtom{}, a, b(cute::_, n), output(cute::_, m, n));
        }
      }
    }
  }

  // The same: while rows of phi are made, the tensor cores read those made before.
  template <class Output>
  CUTE_DEVICE static void multiply_by_warpgroup(Element const* outer, Native const& native,
                                                Element const* tile, Output& output) {
    using Tile = WarpgroupTile<kTileRows, ValueDim>;
    constexpr int kSteps = kTileRows / 16;
    typename Tile::Start const b(tile);
    std::uint32_t a[kSteps][kMmaRows][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        expand(outer, native, m, k, a[k][m]);
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        warpgroup_multiply<Element, ValueDim, Major::MN>(a[k][m], b.at(16 * k, 0), &output(0, m, 0),
                                                         true);
      }
      cute::warpgroup_commit_batch();
      if (k > 0) {
        cute::warpgroup_wait<1>();
        hold(a[k - 1]);
      }
    }
    cute::warpgroup_wait<0>();
    hold(a[kSteps - 1]);
    hold<kMmaRows * ValueDim / 2>(&output(0));
  }

  // Rows of phi as the A operand: elements 2 k and 2 k + 1 of block I times block J.
  template <class Pairs>
  CUTE_DEVICE static void expand(Element const* outer, Native const& native, int m, int k,
                                 Pairs& pairs) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      std::uint32_t const factors = pair(outer, m, upper, 2 * k);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        pairs[2 * x + upper] = detail::multiply<Element>(factors, native[m][upper][x]);
      }
    }
  }

  static constexpr int kPieces = ValueDim / 8;  // of 16 bytes in a row of the state
  static constexpr int kStepRows = kThreads / kPieces;

  CUTE_DEVICE static int row_offset(int m, int upper) {
    return QueryLayout{}(16 * m + 8 * upper, 0, 0);
  }

  // Two elements of a row g or g + 8 of an mma tile.
  CUTE_DEVICE static std::uint32_t pair(Element const* first, int m, int upper, int column) {
    return *reinterpret_cast<std::uint32_t const*>(first + row_offset(m, upper) + column);
  }

  CUTE_DEVICE static void halve(std::uint32_t (&native)[kMmaRows][2][2]) {
    std::uint32_t const half = detail::pack<Element>(0.5f, 0.5f);
#pragma unroll
    for (int i = 0; i < 4 * kMmaRows; ++i) {
      std::uint32_t& x = native[i / 4][i / 2 % 2][i % 2];
      x = detail::multiply<Element>(x, half);
    }
  }

  // In a tile the rows of the state are permuted: for wgmma they are in the order of k. For
  // ldmatrix bits 2 and 3 of their index change places: the eight rows that it needs at once,
  // elements 0-3 or 4-7 of block J for a and for a + 1, are then neighbours, and free of bank
  // conflicts.
  CUTE_HOST_DEVICE static constexpr int source_row(int row) {
    if constexpr (kWarpgroups) {
      return operand_row(row);
    } else {
      return (row & ~12) | (row & 4) << 1 | (row & 8) >> 1;
    }
  }

  CUTE_DEVICE void load(int stage, int pair_index) {
    static_assert(kStepRows % 8 == 0 && kTileRows % kStepRows == 0, "steps of whole swizzles");
    if (pair_index < kPairs) {
      Element* target = shared_.state + offset_ + stage * (kTileRows * ValueDim);
#pragma unroll
      for (int row = 0; row < kTileRows; row += kStepRows) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
            *reinterpret_cast<cute::uint128_t const*>(source_ + source_row(row) * ValueDim),
            *reinterpret_cast<cute::uint128_t*>(target + StateLayout{}(row, 0, 0)));
      }
      source_ += kTileRows * ValueDim;
    }
    cute::cp_async_fence();
  }

  SharedStorage& shared_;
  Element const* source_;
  int offset_;
};

}  // namespace retention::collective
