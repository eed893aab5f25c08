// The mainloop that takes a state back through the Jacobian of phi: for rows x_i and y_i,
//
//     dphi_i = state_scale S y_i + f_i key_sum_scale z             f_i a factor of the row
//     dx_i[8 I + a] += dphi_i[a, b] x_i[8 J + b]                   for every block pair I <= J, and
//     dx_i[8 J + b] += dphi_i[a, b] x_i[8 I + a]                   both also where I == J
//
// dphi is never stored. Its 64 elements of a block pair are eight n8 tiles of mma.m16n8k16, one for
// each a, with y as the A operand, which registers hold throughout, and rows of the state as the B
// operand (K = dv). Lane (g, t) is left with b = 2 t and 2 t + 1 of rows g and g + 8. So the second
// sum, the *native* one, is the lane's own: sums over I are kept in shared memory, for the loop
// over pairs is not unrolled. The first, the *outer* one, is spread over the four lanes of a quad:
// with I fixed and J innermost it stays in registers, and a quad adds up its parts once for every
// I.
//
// Per pair, a warp needs dv wavefronts of shared memory for the state, 4 for x and 16 for the
// native sums; they serve dv mma. By wgmma (warpgroup.hpp) the eight tiles are one of N = 64; while
// the rows of a warpgroup are multiplied, others go through the Jacobian.

#pragma once

#include <cstddef>

#include <cute/tensor.hpp>

#include "retention/collective/row_tiling.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::collective {

/// The rows of a block, with wgmma or without.
template <int ValueDim, int Warps, bool Warpgroups>
using ContractTiling = cute::conditional_t<Warpgroups && kFitsWarpgroups<ValueDim>,
                                           WarpgroupTiling<>, RowTiling<2, Warps>>;

/// `Multiplicity`: whether dphi is to be multiplied by the multiplicity of its rows, 2 where I < J.
template <class Element_, int HeadDim, int ValueDim, class Tiling_, bool Multiplicity>
struct Contract {
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
  static constexpr int kRows = Tiling::kRows;

  static_assert(kStateDim == SymmetricPower<HeadDim, 2>::kStateDim, "one order of the state");
  static_assert(HeadDim % 16 == 0 && ValueDim % 32 == 0, "what ldmatrix loads at once");

  using RowLayout = StagedTileLayout<kRows, HeadDim, 1>;               // x: [row, d, 1]
  using ValueLayout = StagedTileLayout<kRows, ValueDim, 1>;            // y: [row, dv, 1]
  using StateLayout = StagedTileLayout<kTileRows, ValueDim, kStages>;  // [state row, dv, stage]

  /// dx of a warp's rows in fp32 registers: (MMA, rows / 16, d / 8), that of 16 rows one after
  /// another.
  using GradientLayout = cute::Layout<
      cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<kMmaRows>, cute::Int<kBlocks>>,
      cute::Stride<cute::Stride<cute::_1, cute::_2>, cute::Int<HeadDim / 2>, cute::_4>>;

  struct SharedStorage {
    alignas(128) Element state[cute::cosize_v<StateLayout>];
    alignas(128) Element key_sum[kStateDim];
    // Of block J and mma tile m, in each thread the four of a C fragment: its own.
    float4 gradient[kBlocks][kMmaRows][kThreads];
  };
  static_assert(offsetof(SharedStorage, state) == 0, "whoever aligns the one aligns the other");

  CUTE_DEVICE Contract(SharedStorage& shared, Element const* state, Element const* key_sum,
                       int thread)
      : shared_(shared),
        state_(state + thread / kPieces * ValueDim + thread % kPieces * 8),
        key_sum_(key_sum),
        offset_(StateLayout{}(thread / kPieces, thread % kPieces * 8, 0)),
        thread_(thread) {}

  /// Starts the first loads. They overlap those of x and y, which may be on their way as well, by
  /// cp.async committed before.
  CUTE_DEVICE void prefetch() {
#pragma unroll 1
    for (int i = 8 * thread_; i < kStateDim; i += 8 * kThreads) {
      copy(key_sum_ + i, shared_.key_sum + i);
    }
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      load(stage);
    }
  }

  /// Writes `gradient`, dx of the 32 rows of the tiles x and y from `first_row` on; f is at
  /// `sum_factor_smem`. Warps whose rows stand for nothing compute as the others do: all meet at
  /// the same barriers.
  template <class Gradient>
  CUTE_DEVICE void operator()(Element* x_smem, Element* y_smem, float const* sum_factor_smem,
                              float state_scale, float key_sum_scale, int first_row, int lane,
                              Gradient& gradient) {
    cute::Tensor x = cute::make_tensor(cute::make_smem_ptr(x_smem), RowLayout{});
    cute::cp_async_wait<kStages - 2>();
    __syncthreads();  // x and y are there
    {
      cute::Tensor y = cute::make_tensor(cute::make_smem_ptr(y_smem), ValueLayout{});
      add_state(x, y, first_row, lane);
    }
    add_key_sum(x, sum_factor_smem, state_scale, key_sum_scale, first_row, lane);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        float4 const sums = shared_.gradient[block][m][thread_];
        gradient(0, m, block) = sums.x;
        gradient(1, m, block) = sums.y;
        gradient(2, m, block) = sums.z;
        gradient(3, m, block) = sums.w;
      }
    }
  }

 private:
  // Whether x[8 I + a] is read for every pair: y takes so many registers that it cannot be kept.
  static constexpr bool kReloadOuter = ValueDim > 64;

  static constexpr int kPieces = ValueDim / 8;  // of 16 bytes in a row of the state
  static constexpr int kStepRows = kThreads / kPieces;
  static_assert(kStepRows % 8 == 0 && kTileRows % kStepRows == 0, "steps of whole swizzles");

  CUTE_DEVICE static void copy(Element const* source, Element* target) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
        *reinterpret_cast<cute::uint128_t const*>(source),
        *reinterpret_cast<cute::uint128_t*>(target));
  }

  CUTE_HOST_DEVICE static constexpr int pair_index(int I, int J) { return J * (J + 1) / 2 + I; }

  // Starts the copy of the next pair's rows.
  CUTE_DEVICE void load(int stage) {
    if (next_outer_ < kBlocks) {
      Element const* source = state_ + pair_index(next_outer_, next_native_) * kTileRows * ValueDim;
      Element* target = shared_.state + offset_ + stage * (kTileRows * ValueDim);
#pragma unroll
      for (int row = 0; row < kTileRows; row += kStepRows) {
        copy(source + row * ValueDim, target + StateLayout{}(row, 0, 0));
      }
      if (++next_native_ == kBlocks) {
        next_native_ = ++next_outer_;
      }
    }
    cute::cp_async_fence();
  }

  using Values = std::uint32_t[kMmaRows][ValueDim / 16][4];  // y as the A operand: [row, dv]
  using Outer = float[kMmaRows][2][8];                       // [m, upper, a]
  using Native = float[kMmaRows][2][2];                      // [m, upper, b]

  // The gradient of S alone, in shared memory.
  template <class X, class Y>
  CUTE_DEVICE void add_state(X const& x, Y const& y, int first_row, int lane) {
    int const group = lane / 4;
    int const quad = lane % 4;
    Values values;
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int k = 0; k < ValueDim / 16; ++k) {
        load_mma_a(y, first_row + 16 * m, 16 * k, lane, values[m][k]);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        shared_.gradient[block][m][thread_] = {0.0f, 0.0f, 0.0f, 0.0f};
      }
    }

    int stage = 0;
#pragma unroll 1
    for (int I = 0; I < kBlocks; ++I) {
      Outer outer;  // x[8 I + a]
      if constexpr (!kReloadOuter) {
        load_outer(x, first_row + group, I, outer);
      }
      Outer outer_sum = {};  // dx[8 I + a], of the lane's b
#pragma unroll 1
      for (int J = I; J < kBlocks; ++J) {
        wait_for_copies<kStages - 2, kWarpgroups>();
        __syncthreads();
        load(stage == 0 ? kStages - 1 : stage - 1);
        if constexpr (kReloadOuter) {
          load_outer(x, first_row + group, I, outer);
        }
        float const multiplicity = Multiplicity && I < J ? 2.0f : 1.0f;
        Native native;  // x[8 J + b]
        load_native(x, first_row + group, J, quad, multiplicity, native);
        Native native_sum = {};  // dx[8 J + b]
        // Takes the products with the eight rows of a value of a through the Jacobian.
        auto const add = [&](int m, int a, float const* c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            native_sum[m][i / 2][i % 2] =
                fmaf(c[i], outer[m][i / 2][a], native_sum[m][i / 2][i % 2]);
            outer_sum[m][i / 2][a] = fmaf(c[i], native[m][i / 2][i % 2], outer_sum[m][i / 2][a]);
          }
        };
        if constexpr (kWarpgroups) {
          float c[kTileRows / 2];  // dphi: [a, 4]
          multiply_by_warpgroup(values[0], stage, c);
#pragma unroll
          for (int a = 0; a < 8; ++a) {
            add(0, a, &c[4 * a]);
          }
        } else {
#pragma unroll
          for (int a = 0; a < 8; ++a) {
            float c[kMmaRows][4] = {};  // dphi
            multiply(values, stage, a, lane, c);
#pragma unroll
            for (int m = 0; m < kMmaRows; ++m) {
              add(m, a, c[m]);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          float4& sums = shared_.gradient[J][m][thread_];
          float4 const before = sums;
          sums = {fmaf(multiplicity, native_sum[m][0][0], before.x),
                  fmaf(multiplicity, native_sum[m][0][1], before.y),
                  fmaf(multiplicity, native_sum[m][1][0], before.z),
                  fmaf(multiplicity, native_sum[m][1][1], before.w)};
        }
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        float4& sums = shared_.gradient[I][m][thread_];
        float4 result = sums;
        add_quad(outer_sum[m][0], quad, result.x, result.y);
        add_quad(outer_sum[m][1], quad, result.z, result.w);
        sums = result;
      }
    }
  }

  // The products with a pair's rows of the state.
  CUTE_DEVICE void multiply_by_warpgroup(std::uint32_t const (&values)[ValueDim / 16][4], int stage,
                                         float (&product)[kTileRows / 2]) const {
    using Tile = WarpgroupTile<kTileRows, ValueDim>;
    typename Tile::Start const b(shared_.state + stage * (kTileRows * ValueDim));
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < ValueDim / 16; ++k) {
      warpgroup_multiply<Element, kTileRows, Major::K>(values[k], b.at(0, 16 * k), product, k > 0);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    hold<kTileRows / 2>(product);
  }

  // c += the products of all rows with the eight rows of the state of a.
  CUTE_DEVICE void multiply(Values const& values, int stage, int a, int lane,
                            float (&c)[kMmaRows][4]) const {
    Element const* tile = shared_.state + stage * (kTileRows * ValueDim);
#pragma unroll
    for (int k = 0; k < ValueDim / 16; k += 2) {
      // State rows of a, columns (0-7), (8-15), (16-23), (24-31)
      std::uint32_t b[4];
      cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<cute::uint128_t const*>(
                                        tile + StateLayout{}(lane % 8, 16 * k + lane / 8 * 8, 0) +
                                        StateLayout{}(8 * a, 0, 0)),
                                    b[0], b[1], b[2], b[3]);
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        multiply(values[m][k], b[0], b[1], c[m]);
        multiply(values[m][k + 1], b[2], b[3], c[m]);
      }
    }
  }

  template <class X>
  CUTE_DEVICE static void load_native(X const& x, int row, int J, int quad, float multiplicity,
                                      Native& native) {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        auto const pair = *reinterpret_cast<std::uint32_t const*>(
            &x(row, 8 * J + 2 * quad, 0) + RowLayout{}(16 * m + 8 * upper, 0, 0));
        native[m][upper][0] = multiplicity * detail::unpack_lo<Element>(pair);
        native[m][upper][1] = multiplicity * detail::unpack_hi<Element>(pair);
      }
    }
  }

  template <class X>
  CUTE_DEVICE static void load_outer(X const& x, int row, int I, Outer& outer) {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        uint4 const bits = *reinterpret_cast<uint4 const*>(&x(row, 8 * I, 0) +
                                                           RowLayout{}(16 * m + 8 * upper, 0, 0));
        std::uint32_t const pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          outer[m][upper][2 * i] = detail::unpack_lo<Element>(pairs[i]);
          outer[m][upper][2 * i + 1] = detail::unpack_hi<Element>(pairs[i]);
        }
      }
    }
  }

  // Of eight sums that the four lanes of a quad have parts of, adds those of 2 t and 2 t + 1 to
  // `even` and `odd` of lane t: each step leaves a lane half of what it had.
  CUTE_DEVICE static void add_quad(float const (&parts)[8], int quad, float& even, float& odd) {
    bool const upper = quad >= 2;
    float half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const given = upper ? parts[i] : parts[i + 4];
      half[i] = (upper ? parts[i + 4] : parts[i]) + __shfl_xor_sync(0xffffffffu, given, 2);
    }
    bool const last = quad % 2 == 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const given = last ? half[i] : half[i + 2];
      float const sum = (last ? half[i + 2] : half[i]) + __shfl_xor_sync(0xffffffffu, given, 1);
      (i == 0 ? even : odd) += sum;
    }
  }

  // Scales what is in shared memory and adds f (Z + Z^T) x, where Z is the [d, d] matrix of blocks
  // that z consists of, 0 below its diagonal. Blocks are taken two by two.
  template <class X>
  CUTE_DEVICE void add_key_sum(X const& x, float const* sum_factor, float state_scale,
                               float key_sum_scale, int first_row, int lane) {
    constexpr int kSteps = kBlocks / 2;
    float const scale = Multiplicity ? 2.0f * key_sum_scale : key_sum_scale;
    int const low = lane / 8 % 2;  // the block's place among the two of K that ldmatrix loads,
    int const high = lane / 16;    // and among the two of N
#pragma unroll 1
    for (int n = 0; n < kSteps; ++n) {
      float c[2][kMmaRows][4] = {};
#pragma unroll 1
      for (int k = 0; k < kSteps; ++k) {
        std::uint32_t a[kMmaRows][4];
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          load_mma_a(x, first_row + 16 * m, 16 * k, lane, a[m]);
        }
        if (k >= n) {
          // The block (2 n + 1, 2 k) is not there where k == n: any other in its place is one of 0.
          int const pair = pair_index(2 * n + (k == n ? high & low : high), 2 * k + low);
          std::uint32_t b[4];
          cute::SM75_U32x4_LDSM_N::copy(key_sum_row(pair, lane), b[0], b[1], b[2], b[3]);
          b[2] = k == n ? 0 : b[2];
          multiply_blocks(a, b, k == n, c);
        }
        if (k <= n) {
          int const pair = pair_index(2 * k + (k == n ? high & low : low), 2 * n + high);
          std::uint32_t b[4];
          cute::SM75_U16x8_LDSM_T::copy(key_sum_row(pair, lane), b[0], b[1], b[2], b[3]);
          b[1] = k == n ? 0 : b[1];
          multiply_blocks(a, b, k == n, c);
        }
      }
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        int const row = first_row + 16 * m + lane / 4;
        float const lower = scale * sum_factor[row];
        float const upper = scale * sum_factor[row + 8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float4& sums = shared_.gradient[2 * n + i][m][thread_];
          float4 const state = sums;
          sums = {fmaf(lower, c[i][m][0], state_scale * state.x),
                  fmaf(lower, c[i][m][1], state_scale * state.y),
                  fmaf(upper, c[i][m][2], state_scale * state.z),
                  fmaf(upper, c[i][m][3], state_scale * state.w)};
        }
      }
    }
  }

  // The row of its block of z that a lane loads.
  CUTE_DEVICE cute::uint128_t const& key_sum_row(int pair, int lane) const {
    return *reinterpret_cast<cute::uint128_t const*>(shared_.key_sum + kTileRows * pair +
                                                     8 * (lane % 8));
  }

  // c += x (two blocks) times z (two by two blocks: [n, k]).
  CUTE_DEVICE static void multiply_blocks(std::uint32_t const (&a)[kMmaRows][4],
                                          std::uint32_t (&b)[4], bool diagonal,
                                          float (&c)[2][kMmaRows][4]) {
    if (Multiplicity && diagonal) {
      // Not the others twice, which may be too large for fp16: see `scale`.
      std::uint32_t const half = detail::pack<Element>(0.5f, 0.5f);
      b[0] = detail::multiply<Element>(b[0], half);
      b[3] = detail::multiply<Element>(b[3], half);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
        multiply(a[m], b[2 * i], b[2 * i + 1], c[i][m]);
      }
    }
  }

  CUTE_DEVICE static void multiply(std::uint32_t const (&a)[4], std::uint32_t b_low,
                                   std::uint32_t b_high, float (&c)[4]) {
    MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b_low, b_high,
                                     c[0], c[1], c[2], c[3]);
  }

  SharedStorage& shared_;
  Element const* state_;
  Element const* key_sum_;
  int offset_;
  int thread_;
  int next_outer_ = 0;  // the pair that is loaded next
  int next_native_ = 0;
};

}  // namespace retention::collective
