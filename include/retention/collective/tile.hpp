// Shared-memory tiles of 16-bit elements, and how they are filled.

#pragma once

#include <cute/tensor.hpp>

namespace retention::collective {

/// The tensor-core instruction for an element type, with fp32 accumulators.
template <class Element>
struct MmaOperation;
template <>
struct MmaOperation<cute::bfloat16_t> {
  using type = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};
template <>
struct MmaOperation<cute::half_t> {
  using type = cute::SM80_16x8x16_F32F16F16F32_TN;
};

// Rows of 8 x 16 bytes, or of 4: the 16-byte pieces of eight consecutive rows fall into different
// banks, which is what ldmatrix reads at once.
template <int Columns>
using SwizzledRows = cute::conditional_t<
    Columns % 64 == 0,
    decltype(cute::composition(
        cute::Swizzle<3, 3, 3>{},
        cute::Layout<cute::Shape<cute::_8, cute::_64>, cute::Stride<cute::_64, cute::_1>>{})),
    decltype(cute::composition(
        cute::Swizzle<2, 3, 3>{},
        cute::Layout<cute::Shape<cute::_8, cute::_32>, cute::Stride<cute::_32, cute::_1>>{}))>;

/// [Rows, Columns, Stages] of 16-bit elements, free of bank conflicts under ldmatrix.
template <int Rows, int Columns, int Stages>
using StagedTileLayout = decltype(cute::tile_to_shape(
    SwizzledRows<Columns>{},
    cute::Shape<cute::Int<Rows>, cute::Int<Columns>, cute::Int<Stages>>{}));

/// The A operand of mma.m16n8k16 from a [row, column] tile: rows `row` and on, columns `column` and
/// on.
template <class Tile>
CUTE_DEVICE void load_mma_a(Tile const& tile, int row, int column, int lane,
                            std::uint32_t (&a)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(
      *reinterpret_cast<cute::uint128_t const*>(&tile(row + lane % 16, column + lane / 16 * 8, 0)),
      a[0], a[1], a[2], a[3]);
}

/// The B operand of mma.m16n8k16 for K = 16 rows from `row` on and N = the columns from `column`
/// on, of a tile whose columns are contiguous; `row` is a multiple of 16. b: (4 elements of the
/// operand, N / 8).
template <class Element, class Layout, class Fragment>
CUTE_DEVICE void load_rows_transposed(Element const* tile, Layout const& layout, int row,
                                      int column, int stage, int lane, Fragment& b) {
  cute::Tensor pairs = cute::recast<std::uint32_t>(b);  // (2, N / 8)
#pragma unroll
  for (int n = 0; n < cute::size<1>(b); n += 2) {
    // (rows 0-7, columns 0-7), (rows 8-15, 0-7), (rows 0-7, 8-15), (rows 8-15, 8-15)
    Element const* source = tile + layout(lane % 16, column + 8 * n + lane / 16 * 8, 0) +
                            layout(row, 0, 0) + layout(0, 0, stage);
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<cute::uint128_t const*>(source), pairs(0, n),
                                  pairs(1, n), pairs(0, n + 1), pairs(1, n + 1));
  }
}

/// In bytes, where an element of a tile is. Rows a multiple of 8 apart lie a constant apart: one
/// offset serves all of a tile.
template <class Element, class Layout>
CUTE_HOST_DEVICE constexpr int tile_offset(int row, int column, int stage = 0) {
  return static_cast<int>(sizeof(Element)) * Layout{}(row, column, stage);
}

/// The offset `columns` further, a multiple of 16, from that of one of a row's first 16 columns:
/// the swizzle flips bits of the column, and so does this.
template <class Element, class Layout>
CUTE_HOST_DEVICE constexpr int advance_columns(int offset, int columns) {
  return (offset ^ static_cast<int>(sizeof(Element)) * (columns % 64)) +
         tile_offset<Element, Layout>(0, columns / 64 * 64);
}

template <class Element>
CUTE_DEVICE cute::uint128_t const& at_offset(Element const* tile, int offset) {
  return *reinterpret_cast<cute::uint128_t const*>(reinterpret_cast<char const*>(tile) + offset);
}

/// threadIdx.x, read anew, for registers are short: what follows from it need not be kept. The mask
/// tells the compiler that it is not negative.
template <int Threads>
CUTE_DEVICE int this_thread() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & (Threads - 1);
#else
  return static_cast<int>(threadIdx.x) & (Threads - 1);
#endif
}

/// Rows and columns change places among the four lanes of a quad: lane t ends with x[t] of each.
CUTE_DEVICE void transpose_quad(std::uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    bool const upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) == 0) {
        std::uint32_t const received = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i | bit], bit);
        (upper ? x[i] : x[i | bit]) = received;
      }
    }
  }
}

/// `source` + `offset`, in a way that the compiler cannot trace: the sum is in the registers of
/// `source` where this stands, and not moved there after its uses.
template <class T>
CUTE_HOST_DEVICE T const* advanced(T const* source, std::int64_t offset) {
  source += offset;
  asm volatile("" : "+l"(source));
  return source;
}

/// A thread's part in copying [Rows, Columns] tiles of a [tokens, Columns] matrix, tile after tile.
template <class Element, int Threads, int Rows, int Columns, class Layout>
class TileLoader {
  static constexpr int kPieces = Columns / 8;  // 16 bytes each
  static constexpr int kStepRows = Threads / kPieces;
  static constexpr int kSteps = Rows / kStepRows;
  static_assert(Threads % kPieces == 0 && Rows % kStepRows == 0, "a step copies whole rows");
  static_assert(kStepRows % 8 == 0, "steps differ by whole periods of the swizzle");

 public:
  /// `source` points at the first element of the first tile.
  CUTE_DEVICE TileLoader(Element const* source, std::int64_t row_stride, int thread)
      : row_(thread / kPieces),
        source_(source + (row_ - Rows) * row_stride + thread % kPieces * 8),
        step_(kStepRows * row_stride),
        offset_(Layout{}(row_, thread % kPieces * 8, 0)) {}

  /// Starts the copy of the next tile; rows from `valid_rows` on become zero.
  CUTE_DEVICE void load(Element* tiles, int stage, int valid_rows) {
    Element* target = tiles + offset_ + stage * (Rows * Columns);
    // Before the copies: one holds the registers of its address for a while.
    source_ = advanced(source_, kSteps * step_);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // Where the predicate is false nothing is read.
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(source_ + step * step_),
          *reinterpret_cast<cute::uint128_t*>(target + Layout{}(step * kStepRows, 0, 0)),
          row_ + step * kStepRows < valid_rows);
    }
  }

 private:
  int row_;
  Element const* source_;  // in the tile before the next
  std::int64_t step_;
  int offset_;
};

}  // namespace retention::collective
