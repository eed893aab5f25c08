// Hopper's wgmma: a warpgroup of four warps multiplies 64 rows, which registers hold as they do for
// mma.m16n8k16, 16 a warp, or which are in shared memory too, by a tile in shared memory, while its
// threads go on with something else.
//
// Columns of a tile come in groups of 64 (or all 32), whose rows of 128 (64) bytes have the swizzle
// of StagedTileLayout: it is one that the instruction knows, if the tile starts at a multiple of
// 1024 bytes. Narrower values stay with mma: two to four times as many operands would have to be
// made for a product, and registers are too few for those.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"

namespace retention::collective {

/// Whether there are main loops by wgmma for values of this width.
template <int ValueDim>
inline constexpr bool kFitsWarpgroups = ValueDim % 64 == 0;

/// Whether they are taken on the device that is compiled for, which has wgmma if it is sm_90a; in
/// tests the emulator may. For device code alone.
template <int ValueDim>
#if defined(CUTE_ARCH_MMA_SM90A_ENABLED) || defined(RETENTION_EMULATE_WARPGROUP)
inline constexpr bool kTakesWarpgroups = kFitsWarpgroups<ValueDim>;
#else
inline constexpr bool kTakesWarpgroups = false;
#endif

/// What tiles that wgmma reads are aligned to: by where they are in a block's shared memory. As an
/// alignment of their type it would round up what the block needs, which is too much for some
/// devices.
inline constexpr int kWarpgroupTileAlignment = 1024;
/// Whether such a tile may follow one of this layout, of 16-bit elements.
template <class Layout>
inline constexpr bool kKeepsAlignment = 2 * cute::cosize_v<Layout> % kWarpgroupTileAlignment == 0;

/// Of a tile of the state the row that is row k of the B operand: see `ExpandApply`.
CUTE_HOST_DEVICE constexpr int operand_row(int k) {
  return (k & ~15) | (k & 1) << 3 | (k & 14) >> 1;
}

/// The contiguous dimension of the B operand, [N, K].
using Major = cute::SM90::GMMA::Major;

template <class Element, int N, Major kMajor>
struct WarpgroupOperation;
#define RETENTION_WARPGROUP_OPERATION(element, n, name)                                    \
  template <Major kMajor>                                                                  \
  struct WarpgroupOperation<element, n, kMajor> {                                          \
    using type = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##name##_RS<Major::K, kMajor>; \
  };
RETENTION_WARPGROUP_OPERATION(cute::bfloat16_t, 32, BF16)
RETENTION_WARPGROUP_OPERATION(cute::bfloat16_t, 64, BF16)
RETENTION_WARPGROUP_OPERATION(cute::bfloat16_t, 128, BF16)
RETENTION_WARPGROUP_OPERATION(cute::half_t, 32, F16)
RETENTION_WARPGROUP_OPERATION(cute::half_t, 64, F16)
RETENTION_WARPGROUP_OPERATION(cute::half_t, 128, F16)
#undef RETENTION_WARPGROUP_OPERATION

/// With both operands in shared memory, of rows that are contiguous.
template <class Element>
struct SharedWarpgroupOperation;
template <>
struct SharedWarpgroupOperation<cute::bfloat16_t> {
  using type = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>;
};
template <>
struct SharedWarpgroupOperation<cute::half_t> {
  using type = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K>;
};

/// A tile of StagedTileLayout<Rows, Columns, 1> as an operand.
template <int Rows, int Columns>
struct WarpgroupTile {
  static_assert(Columns == 32 || Columns % 64 == 0, "swizzles of rows of 64 and 128 bytes");
  using Layout = StagedTileLayout<Rows, Columns, 1>;

  /// Where a tile starts, or its rows from a multiple of eight on. The rest of its descriptor is
  /// known when this is compiled, and so takes no register for each of the operands.
  class Start {
   public:
    template <class Element>
    CUTE_DEVICE explicit Start(Element const* tile, int row = 0)
        : low_(__shfl_sync(
              0xffffffffu,
              ((cute::cast_smem_ptr_to_uint(tile + Layout{}(row, 0, 0)) >> 4) & 0x3fff) | kLeading
                                                                                              << 16,
              0)) {}

    /// The descriptor of an operand that starts there in the tile.
    CUTE_DEVICE std::uint64_t at(int row, int column) const {
      auto const offset = static_cast<std::uint32_t>(byte_offset<Layout>(row, column)) / 16;
      return std::uint64_t{kHigh} << 32 | (low_ + offset);
    }

   private:
    // In units of 16 bytes: from one group of 64 columns to the next, where there are more and they
    // are N, and from eight rows to the next.
    static constexpr std::uint32_t kLeading = byte_offset<Layout>(0, 64 % Columns) / 16;
    static constexpr std::uint32_t kStride = byte_offset<Layout>(8, 0) / 16;
    static constexpr auto kSwizzle =
        Columns == 32 ? cute::SM90::GMMA::LayoutType::B64 : cute::SM90::GMMA::LayoutType::B128;
    static constexpr std::uint32_t kHigh = kStride | static_cast<std::uint32_t>(kSwizzle) << 30;

    std::uint32_t low_;
  };
};

/// c (+)= a b: of each of its 16 rows a warp has the A operand and the sums as in mma.m16n8k16,
/// c[N / 8][4] one after another. Starts the product: until `warpgroup_wait`, neither `a` nor `c`
/// may be touched.
template <class Element, int N, Major kMajor, std::size_t... I>
CUTE_DEVICE void warpgroup_multiply(std::uint32_t const (&a)[4], std::uint64_t b, float* c,
                                    bool adds, std::index_sequence<I...>) {
  WarpgroupOperation<Element, N, kMajor>::type::fma(
      a[0], a[1], a[2], a[3], b, c[I]...,
      adds ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <class Element, int N, Major kMajor>
CUTE_DEVICE void warpgroup_multiply(std::uint32_t const (&a)[4], std::uint64_t b, float* c,
                                    bool adds) {
  warpgroup_multiply<Element, N, kMajor>(a, b, c, adds, std::make_index_sequence<N / 2>{});
}

/// The same of 64 columns, of rows of A that descriptor `a` is of.
template <class Element, std::size_t... I>
CUTE_DEVICE void warpgroup_multiply_shared(std::uint64_t a, std::uint64_t b, float (&c)[32],
                                           bool adds, std::index_sequence<I...>) {
  SharedWarpgroupOperation<Element>::type::fma(
      a, b, c[I]..., adds ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <class Element>
CUTE_DEVICE void warpgroup_multiply_shared(std::uint64_t a, std::uint64_t b, float (&c)[32],
                                           bool adds) {
  warpgroup_multiply_shared<Element>(a, b, c, adds, std::make_index_sequence<32>{});
}

/// Of this thread's cp.async, waits for all groups but the last `Pending`. Where they went all
/// threads may read after the next barrier, and with `Warpgroups` so may wgmma.
template <int Pending, bool Warpgroups>
CUTE_DEVICE void wait_for_copies() {
  cute::cp_async_wait<Pending>();
  if constexpr (Warpgroups) {
    cute::tma_store_fence();  // fence.proxy.async.shared::cta
  }
}

/// After `warpgroup_wait`: what wgmma read or wrote is in these registers until here, and what is
/// done with them comes after.
template <int N>
CUTE_DEVICE void hold(float* x) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    cute::warpgroup_fence_operand(x[i]);
  }
}
template <int M>
CUTE_DEVICE void hold(std::uint32_t (&x)[M][4]) {
#pragma unroll
  for (int i = 0; i < 4 * M; ++i) {
    cute::warpgroup_fence_operand(x[i / 4][i % 4]);
  }
}

}  // namespace retention::collective
