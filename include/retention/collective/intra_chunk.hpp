// The causal mainloop inside a chunk: o_i += sum_{j <= i} w_ij v_j and n_i += sum_{j <= i} w_ij,
// with w_ij = (scale q_i . k_j)^2 exp(g_i - g_j) for cumulative log gates g.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/tile.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective {

template <class Element_, int HeadDim, int ValueDim, class Tiling_>
struct IntraChunk {
  using Element = Element_;
  using Tiling = Tiling_;

  static constexpr int kStages = 2;
  static constexpr int kTileKeys = 64;
  static constexpr int kThreads = 32 * Tiling::kWarps;
  static constexpr int kMmaRows = Tiling::kMmaRows;

  using QueryLayout = StagedTileLayout<Tiling::kRows, HeadDim, 1>;     // [row, d, 1]
  using KeyLayout = StagedTileLayout<kTileKeys, HeadDim, kStages>;     // [key, d, stage]
  using ValueLayout = StagedTileLayout<kTileKeys, ValueDim, kStages>;  // [key, dv, stage]

  struct SharedStorage {
    alignas(128) Element key[cute::cosize_v<KeyLayout>];
    alignas(128) Element value[cute::cosize_v<ValueLayout>];
    float gate[kStages][kTileKeys];
  };

  using MmaAtom = cute::MMA_Atom<typename MmaOperation<Element>::type>;

  /// Keys, values and gates start at the first token of the chunk; `keys` of them matter.
  CUTE_DEVICE IntraChunk(SharedStorage& shared, Element const* key, std::int64_t key_stride,
                         Element const* value, std::int64_t value_stride, float const* gate,
                         std::int64_t gate_stride, int keys, int thread)
      : shared_(shared),
        key_loader_(key, key_stride, thread),
        value_loader_(value, value_stride, thread),
        gate_(gate == nullptr ? nullptr : gate + thread * gate_stride),
        gate_stride_(gate_stride),
        keys_(keys),
        thread_(thread) {
    if (gate == nullptr && thread < kTileKeys) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        shared.gate[stage][thread] = 0.0f;
      }
    }
    load(0, keys);
  }

  /// `row_token` and `row_gate` give, in shared memory, the position in the chunk of each row's
  /// token and its cumulative log gate; rows are in the order of their tokens.
  template <class Output>
  CUTE_DEVICE void operator()(Element* query_smem, int const* row_token, float const* row_gate,
                              float scale, int warp, int lane, Output& output,
                              float (&normalizer)[kMmaRows][2]) {
    int const first_row = warp / Tiling::kColumnWarps * Tiling::kWarpRows;
    int const first_column = warp % Tiling::kColumnWarps * Tiling::kValueTile;
    cute::Tensor query = cute::make_tensor(cute::make_smem_ptr(query_smem), QueryLayout{});
    cute::Tensor key = cute::make_tensor(cute::make_smem_ptr(shared_.key), KeyLayout{});

    int stage = 0;
#pragma unroll 1
    for (int first_key = 0; first_key < keys_; first_key += kTileKeys, stage ^= 1) {
      cute::cp_async_wait<0>();
      __syncthreads();
      load(stage ^ 1, keys_ - first_key - kTileKeys);
      int const last_token = row_token[first_row + Tiling::kWarpRows - 1];
#pragma unroll 1
      for (int block = 0; block < kTileKeys; block += 16) {
        if (first_key + block > last_token) {
          break;  // no row of this warp attends that far
        }
        float score[kMmaRows][2][4] = {};  // [row, key]
#pragma unroll
        for (int k = 0; k < HeadDim; k += 16) {
          std::uint32_t b[4];
          // (keys 0-7, low d), (keys 0-7, high d), (keys 8-15, low d), (keys 8-15, high d)
          cute::SM75_U32x4_LDSM_N::copy(
              *reinterpret_cast<cute::uint128_t const*>(
                  &key(block + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8, stage)),
              b[0], b[1], b[2], b[3]);
#pragma unroll
          for (int m = 0; m < kMmaRows; ++m) {
            std::uint32_t a[4];
            load_mma_a(query, first_row + 16 * m, k, lane, a);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              float (&c)[4] = score[m][n];
              MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3],
                                               b[2 * n], b[2 * n + 1], c[0], c[1], c[2], c[3]);
            }
          }
        }

        cute::Tensor b =
            cute::make_tensor<Element>(cute::Shape<cute::_4, cute::Int<Tiling::kValueTile / 8>>{});
        load_rows_transposed(shared_.value, ValueLayout{}, block, first_column, stage, lane, b);
        float2 gate[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          gate[n] = *reinterpret_cast<float2 const*>(
              &shared_.gate[stage][block + 8 * n + 2 * (lane % 4)]);
        }
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
          cute::Tensor a = cute::make_tensor<Element>(cute::Shape<cute::_8>{});
          cute::Tensor a_pairs = cute::recast<std::uint32_t>(a);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int const row = first_row + 16 * m + 8 * half + lane / 4;
            int const token = row_token[row];
            float const gate_i = row_gate[row];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              int const j = first_key + block + 8 * n + 2 * (lane % 4);
              float const lo =
                  weight(scale * score[m][n][2 * half], gate_i - gate[n].x, j <= token);
              float const hi =
                  weight(scale * score[m][n][2 * half + 1], gate_i - gate[n].y, j + 1 <= token);
              normalizer[m][half] += lo + hi;
              a_pairs(2 * n + half) = detail::pack<Element>(lo, hi);
            }
          }
#pragma unroll
          for (int n = 0; n < Tiling::kValueTile / 8; ++n) {
            cute::gemm(MmaAtom{}, a, b(cute::_, n), output(cute::_, m, n));
          }
        }
      }
    }
  }

 private:
  // Not the exponential of a positive difference, and no large negative number either: what a row
  // does not attend to is exactly zero.
  CUTE_DEVICE static float weight(float product, float gate, bool attends) {
    float const w = product * product * detail::exp_nonpositive(cute::min(gate, 0.0f));
    return attends ? w : 0.0f;
  }

  // `left` keys remain, those of this tile included.
  CUTE_DEVICE void load(int stage, int left) {
    if (left > 0) {
      key_loader_.load(shared_.key, stage, left);
      value_loader_.load(shared_.value, stage, left);
      if (gate_ != nullptr && thread_ < kTileKeys) {
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(*gate_, shared_.gate[stage][thread_],
                                                           thread_ < left);
        gate_ += kTileKeys * gate_stride_;
      }
    }
    cute::cp_async_fence();
  }

  SharedStorage& shared_;
  TileLoader<Element, kThreads, kTileKeys, HeadDim, KeyLayout> key_loader_;
  TileLoader<Element, kThreads, kTileKeys, ValueDim, ValueLayout> value_loader_;
  float const* gate_;
  std::int64_t gate_stride_;
  int keys_;
  int thread_;
};

}  // namespace retention::collective
