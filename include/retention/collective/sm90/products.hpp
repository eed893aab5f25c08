// The products of main loops by wgmma inside a chunk: scores of 64 rows and 64 columns, both in
// shared memory, and sums of what the weights that are made of them in registers give.

#pragma once

#include <cstdint>

#include <cute/tensor.hpp>

#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

/// Rows of a product, and columns of a tile.
inline constexpr int kTileRows = 64;
inline constexpr int kTileColumns = 64;

using Product = float[kTileColumns / 2];             // [column / 8][4], as accumulators are
using Weight = std::uint32_t[kTileColumns / 16][4];  // as the A operand

/// Starts product = rows columns^T, of 64 rows and a tile of columns, which have `Depth` elements.
template <class Element, int Depth, class Rows, class Columns>
CUTE_DEVICE void start_scores(Rows const& rows, Columns const& columns, Product& product) {
#pragma unroll
  for (int k = 0; k < Depth; k += 16) {
    warpgroup_multiply_shared<Element>(rows.at(0, k), columns.at(0, k), product, k > 0);
  }
}

/// Waits for scores.
template <class... Products>
CUTE_DEVICE void finish_scores(Products&... products) {
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
  (hold<kTileColumns / 2>(products), ...);
}

/// Starts sums += weight columns, of a tile of columns with N elements.
template <class Element, int N, class Columns>
CUTE_DEVICE void start_sums(Weight const& weight, Columns const& columns, float* sums) {
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < kTileColumns / 16; ++k) {
    warpgroup_multiply<Element, N, Major::MN>(weight[k], columns.at(16 * k, 0), sums, true);
  }
  cute::warpgroup_commit_batch();
}

/// Waits for all that was started, with `weight` and in these sums.
template <int kSums>
CUTE_DEVICE void finish_sums(Weight& weight, float* sums) {
  cute::warpgroup_wait<0>();
  hold(weight);
  hold<kSums>(sums);
}

/// Of the n-th eight columns.
template <class Element>
CUTE_DEVICE void pack_columns(Product const& product, int n, Weight& weight) {
#pragma unroll
  for (int i = 2 * n; i < 2 * n + 2; ++i) {
    weight[i / 4][i % 4] = detail::pack<Element>(product[2 * i], product[2 * i + 1]);
  }
}

}  // namespace retention::collective::sm90
