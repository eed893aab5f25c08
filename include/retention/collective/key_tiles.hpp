// Tiles of a chunk's keys, values and gates in shared memory, for main loops inside a chunk: copied
// while those before are in use. And which rows of queries they are for.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective {

/// A tile of rows: row r stands for head r % group of its token r / group.
struct TileRows {
  int group;
  int first_token;  // in the chunk
  int tokens;
  int reciprocal;  // 2^16 / group, rounded up

  TileRows() = default;

  CUTE_DEVICE TileRows(int group_, int first_token_, int tokens_)
      : group(group_),
        first_token(first_token_),
        tokens(tokens_),
        reciprocal((65535 + group_) / group_) {}

  CUTE_DEVICE int count() const { return tokens * group; }  // rows that stand for something
  CUTE_DEVICE int end_token() const { return first_token + tokens; }
  /// r / group for r < 256: the error of the product, below r / 2^16, is smaller than 1 / group.
  CUTE_DEVICE int tile_token(int row) const { return row * reciprocal >> 16; }
  CUTE_DEVICE int head(int row) const { return row - tile_token(row) * group; }
  /// In the chunk. A row attends to no later token than its own.
  CUTE_DEVICE int token(int row) const { return first_token + tile_token(row); }
};

/// What a loop needs beside its registers, all of which its operands take: it stays in shared
/// memory, out of reach of whoever moves code out of loops.
template <class Element>
struct KeyWork {
  Element const* key;  // of the chunk's first token, as value and gate
  Element const* value;
  detail::CumulativeGate const* gate;  // null for none
  std::int64_t key_stride;
  std::int64_t value_stride;
  std::int64_t gate_stride;
  TileRows rows;
  float unit;  // what weights are multiplied by where there is no gate, whose rows have it else
};

/// The gates of the lane's columns 8 n and 8 n + 1 of a tile, `offset` bytes from those of each
/// eight keys.
struct ColumnGates {
  detail::CumulativeGate gate[2];
};
template <int kKeys>
CUTE_DEVICE ColumnGates column_gates(detail::CumulativeGate const (&gates)[kKeys], int offset,
                                     int n) {
  float4 const x =
      *reinterpret_cast<float4 const*>(reinterpret_cast<char const*>(gates + 8 * n) + offset);
  return {{{x.x, x.y}, {x.z, x.w}}};
}

/// Tiles of `TileKeys` keys, `LoadTiles` of which are loaded at a time, while one of those before
/// is in use.
template <class Element_, int HeadDim, int ValueDim, int Threads, int TileKeys, int LoadTiles>
struct KeyTiles {
  using Element = Element_;

  static constexpr int kTileKeys = TileKeys;
  static constexpr int kLoadTiles = LoadTiles;
  static constexpr int kLoadKeys = kLoadTiles * kTileKeys;
  static constexpr int kSlots = 2 * kLoadTiles;
  static constexpr int kThreads = Threads;

  using KeyLayout = StagedTileLayout<kTileKeys, HeadDim, kSlots>;     // [key, d, slot]
  using ValueLayout = StagedTileLayout<kTileKeys, ValueDim, kSlots>;  // [key, dv, slot]

  /// Where a thread reads of the next tile.
  struct alignas(16) Source {
    Element const* key;
    Element const* value;
  };

  struct SharedStorage {
    alignas(128) Element key[cute::cosize_v<KeyLayout>];
    alignas(128) Element value[cute::cosize_v<ValueLayout>];
    alignas(16) detail::CumulativeGate gate[kSlots][kTileKeys];
    // Each thread's own: here they take no registers.
    Source source[kThreads];
    detail::CumulativeGate const* gate_source[kLoadKeys];
  };

  using Work = KeyWork<Element>;

  /// Of a warp's rows, tokens in the chunk.
  struct alignas(8) Reach {
    int first_token;
    int last_token;  // -1 where no row stands for anything

    Reach() = default;

    CUTE_DEVICE Reach(TileRows const& rows, int first_row, int warp_rows)
        : first_token(rows.token(first_row)) {
      int const last_row = cute::min(first_row + warp_rows, rows.count()) - 1;
      last_token = last_row < first_row ? -1 : rows.token(last_row);
    }
  };

  /// Starts the first loads.
  CUTE_DEVICE static void prefetch(SharedStorage& shared, Work const& work) {
    int const thread = this_thread();
    shared.source[thread] = {
        work.key + thread / kKeyPieces * work.key_stride + thread % kKeyPieces * 8,
        work.value + thread / kValuePieces * work.value_stride + thread % kValuePieces * 8};
    if (thread < kLoadKeys) {
      shared.gate_source[thread] = work.gate + thread * work.gate_stride;
    }
    load(shared, work, 0);
  }

  /// Starts the copies of the next keys, the first of which is `first_key`.
  CUTE_DEVICE static void load(SharedStorage& shared, Work const& work, int first_key) {
    int const left = work.rows.end_token() - first_key;
    if (left > 0) {
      int const thread = this_thread();
      int const slot = first_key / kTileKeys % kSlots;
      Source const source = shared.source[thread];
      shared.source[thread] = {
          copy<HeadDim, KeyLayout>(source.key, work.key_stride, shared.key, slot, left, thread),
          copy<ValueDim, ValueLayout>(source.value, work.value_stride, shared.value, slot, left,
                                      thread)};
      if (work.gate != nullptr && thread < kLoadKeys) {
        detail::CumulativeGate const* gate = shared.gate_source[thread];
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<detail::CumulativeGate>::copy(
            *gate, shared.gate[slot][thread], thread < left);
        shared.gate_source[thread] = gate + kLoadKeys * work.gate_stride;
      }
    }
    cute::cp_async_fence();
  }

  /// Starts the copy of kLoadKeys rows, zeros from row `left` on. Returns where the next ones are.
  /// That is in another register than any address of a copy: an instruction that changes one has to
  /// wait until the copy was issued.
  template <int Columns, class Layout>
  CUTE_DEVICE static Element const* copy(Element const* source, std::int64_t stride, Element* tiles,
                                         int slot, int left, int thread) {
    constexpr int kPieces = Columns / 8;
    constexpr int kStepRows = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kTileKeys % kStepRows == 0, "steps of whole rows");
    static_assert(kStepRows % 8 == 0, "steps differ by whole periods of the swizzle");
    int const row = thread / kPieces;
    Element* target = tiles + Layout{}(row, thread % kPieces * 8, 0) + Layout{}(0, 0, 1) * slot;
#pragma unroll
    for (int step = 0; step < kLoadKeys; step += kStepRows) {
      // Where the predicate is false nothing is read.
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<cute::uint128_t const*>(source),
          *reinterpret_cast<cute::uint128_t*>(target + Layout{}(step % kTileKeys, 0, 0) +
                                              Layout{}(0, 0, 1) * (step / kTileKeys)),
          row + step < left);
      source += kStepRows * stride;
    }
    return source;
  }

  CUTE_DEVICE static ColumnGates column_gates(SharedStorage const& shared, int slot, int offset,
                                              int n) {
    return collective::column_gates(shared.gate[slot], offset, n);
  }

  /// Read anew, for registers are short: what follows from it need not be kept. The mask tells the
  /// compiler that it is not negative.
  CUTE_DEVICE static int this_thread() {
#if defined(__CUDA_ARCH__)
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread & (kThreads - 1);
#else
    return static_cast<int>(threadIdx.x) & (kThreads - 1);
#endif
  }

 private:
  static constexpr int kKeyPieces = HeadDim / 8;  // of 16 bytes in a row
  static constexpr int kValuePieces = ValueDim / 8;
};

/// For mma.sync. Of long rows more at a time would leave one block less room.
template <class Element, int HeadDim, int ValueDim, int Threads>
using WarpKeyTiles = KeyTiles<Element, HeadDim, ValueDim, Threads, 32, HeadDim <= 64 ? 2 : 1>;

}  // namespace retention::collective
