// Tiles of a state, and then of a chunk's keys and values, on their way from a warpgroup that does
// nothing else, the producers, to the warpgroups of a block, which take each when it has come, and
// give its slot back when they are done with it: none of them waits for another. A warp of the
// producers has a slot of its own: it waits for no copies but those of one tile, since the fence
// before wgmma reads them waits for all.
//
// With the keys come their decays, C_j = exp(g_i0 - g_j) up to the first token i0 of a warpgroup's
// rows: one exponential a key serves all of its rows, which have the rest, R_i = exp(g_i - g_i0).
// Of keys after i0 that is the inverse of a decay: where none that the rows see is larger than
// 2^kMaxRise, they may be weighed by these factors too.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/key_tiles.hpp"
#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/named_barrier.hpp"
#include "retention/detail/packed.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::collective::sm90 {

/// Of a warpgroup's 64 rows in a tile of rows, tokens in the chunk: 0 and -1 where no row stands
/// for anything. Those that have some are the first `active` ones.
struct WarpgroupReach {
  static constexpr int kRows = 64;

  int first_token;
  int last_token;

  CUTE_DEVICE WarpgroupReach(TileRows const& rows, int warpgroup) {
    int const row = warpgroup * kRows;
    int const last_row = cute::min(row + kRows, rows.count()) - 1;
    first_token = last_row < row ? 0 : rows.token(row);
    last_token = last_row < row ? -1 : rows.token(last_row);
  }

  CUTE_DEVICE static int active(TileRows const& rows) { return (rows.count() + kRows - 1) / kRows; }
};

/// What a tile of keys is to a warpgroup.
enum class KeyKind : int {
  kEarlier,  // before its rows
  kMild,     // not all of it, and factors C_j serve all that the rows see
  kSteep,    // other
};

template <class Element_, int HeadDim, int ValueDim, int Warpgroups, int Slots>
struct TileStream {
  using Element = Element_;

  // Of the state 64 rows take the place of values, and the next 64 that of keys where they fit.
  static constexpr int kStateParts = HeadDim >= ValueDim ? 2 : 1;
  static constexpr int kStateTiles =  // that come first, if any
      static_cast<int>(SymmetricPower<HeadDim, 2>::kStateDim) / (64 * kStateParts);
  static constexpr int kTileKeys = 64;
  static constexpr int kSlots = Slots;
  static constexpr int kWarpgroups = Warpgroups;
  static constexpr int kProducers = 128;  // threads
  // fp16 ends at 2^16, and weights where gates do not rise at 2^13: see `Output`.
  static constexpr float kMaxRise = cute::is_same_v<Element, cute::half_t> ? 2.0f : 20.0f;

  static_assert(kSlots <= kProducers / 32);

  using KeyLayout = StagedTileLayout<kTileKeys, HeadDim, kSlots>;     // [key, d, slot]
  using ValueLayout = StagedTileLayout<kTileKeys, ValueDim, kSlots>;  // [key, dv, slot]

  struct Work : KeyWork<Element> {
    Element const* state;  // [64 kStateParts kStateTiles, dv]; null for none
  };

  struct SharedStorage {
    alignas(128) Element key[cute::cosize_v<KeyLayout>];
    alignas(128) Element value[cute::cosize_v<ValueLayout>];
    alignas(16) detail::CumulativeGate gate[kSlots][kTileKeys];
    alignas(16) float factor[kSlots][kWarpgroups][kTileKeys];  // C_j times the unit
    KeyKind kind[kSlots][kWarpgroups];
  };

  /// Read anew, for registers are short: what follows from it need not be kept.
  CUTE_DEVICE static int this_thread() {
#if defined(__CUDA_ARCH__)
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread & 511;  // it is not negative
#else
    return static_cast<int>(threadIdx.x);
#endif
  }
  CUTE_DEVICE static int this_lane() { return this_thread() % 32; }

  /// Waits for a warpgroup's next tile, in `slot`.
  CUTE_DEVICE static void wait(int slot, int warpgroup) {
    detail::wait_at_barrier(full(slot, warpgroup), 32 + 128);
  }
  /// Gives the place of a tile of keys back, if another one comes there.
  CUTE_DEVICE static void release(TileRows const& rows, int first_key, int slot) {
    if (first_key + kSlots * kTileKeys < rows.end_token()) {
      detail::arrive_at_barrier(free(slot), free_threads(rows));
    }
  }
  /// The same of a tile of the state: keys follow.
  CUTE_DEVICE static void release_state(TileRows const& rows, int tile, int slot) {
    release(rows, (tile - kStateTiles) * kTileKeys, slot);
  }
  /// 64 rows of the state, of the tile in `slot` the first or the second.
  CUTE_DEVICE static Element* state_part(SharedStorage& shared, int slot, int part) {
    return part == 0 ? shared.value + slot * (kTileKeys * ValueDim)
                     : shared.key + slot * (kTileKeys * HeadDim);
  }

  /// All of a producer's work.
  CUTE_DEVICE static void produce(SharedStorage& shared, Work const& work) {
    int const slot = this_thread() / 32 - 4 * kWarpgroups;
    if (slot >= kSlots) {
      return;
    }
    int const end_token = work.rows.end_token();
    int const first = work.state == nullptr ? 0 : -kStateTiles * kTileKeys;
    // Tiles of the state count as keys before the first one.
#pragma unroll 1
    for (int first_key = first + slot * kTileKeys; first_key < end_token;
         first_key += kSlots * kTileKeys) {
      if (first_key >= first + kSlots * kTileKeys) {
        detail::wait_at_barrier(free(slot), free_threads(work.rows));
      }
      if (first_key < 0) {
        Element const* const state = work.state + (first_key - first) * (kStateParts * ValueDim);
#pragma unroll
        for (int part = 0; part < kStateParts; ++part) {
          copy_state(state + part * kTileKeys * ValueDim, state_part(shared, slot, part));
        }
      } else {
        copy<HeadDim, KeyLayout>(work.key + first_key * work.key_stride, work.key_stride,
                                 shared.key + slot * (kTileKeys * HeadDim), end_token - first_key);
        copy<ValueDim, ValueLayout>(work.value + first_key * work.value_stride, work.value_stride,
                                    shared.value + slot * (kTileKeys * ValueDim),
                                    end_token - first_key);
        set_factors(shared, work, slot, first_key);
      }
      wait_for_copies<0, true>();
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        int const last_token = WarpgroupReach(work.rows, w).last_token;
        if (last_token >= cute::max(first_key, 0)) {
          detail::arrive_at_barrier(full(slot, w), 32 + 128);
        }
      }
    }
  }

  CUTE_DEVICE static int after(int slot) { return slot == kSlots - 1 ? 0 : slot + 1; }

 private:
  // After that of the tiling.
  static constexpr int kFirstBarrier = WarpgroupTiling<Warpgroups>::kBarrier + 1;
  static_assert(kFirstBarrier + kSlots * (kWarpgroups + 1) <= 16, "what a block has");

  CUTE_DEVICE static int full(int slot, int warpgroup) {
    return kFirstBarrier + slot * (kWarpgroups + 1) + warpgroup;
  }
  CUTE_DEVICE static int free(int slot) { return full(slot, kWarpgroups); }
  CUTE_DEVICE static int free_threads(TileRows const& rows) {
    return 32 + 128 * WarpgroupReach::active(rows);
  }

  // A lane's part in the copy of a tile, zeros from row `left` on.
  template <int Columns, class Layout>
  CUTE_DEVICE static void copy(Element const* source, std::int64_t stride, Element* target,
                               int left) {
    constexpr int kPieces = Columns / 8;  // of 16 bytes in a row
    constexpr int kStepRows = 32 / kPieces;
    // After so many steps rows lie as they did, whole swizzles further.
    constexpr int kPeriod = kStepRows < 8 ? 8 / kStepRows : 1;
    constexpr int kPeriodRows = kPeriod * kStepRows;
    constexpr int kDistance = Layout{}(kPeriodRows, 0, 0);
    int const lane = this_lane();
    int const row = lane / kPieces;
    source += row * stride + lane % kPieces * 8;
    left -= row;
    int offset[kPeriod];
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      offset[i] = Layout{}(row + i * kStepRows, lane % kPieces * 8, 0);
    }
#pragma unroll 1
    for (int period = 0; period < kTileKeys; period += kPeriodRows) {
#pragma unroll
      for (int i = 0; i < kPeriod; ++i) {
        // Where the predicate is false nothing is read.
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<cute::uint128_t const*>(source),
            *reinterpret_cast<cute::uint128_t*>(target + offset[i]), period + i * kStepRows < left);
        source += kStepRows * stride;
      }
      target += kDistance;
    }
  }

  // The same of a tile of the state, whose rows are put in the order of the operand.
  CUTE_DEVICE static void copy_state(Element const* source, Element* target) {
    constexpr int kPieces = ValueDim / 8;
    constexpr int kStepRows = 32 / kPieces;
    constexpr int kRows = 16;  // whose order changes
    int const lane = this_lane();
    int const row = lane / kPieces;
    source += operand_row(row) * ValueDim + lane % kPieces * 8;
    // Rows of a whole swizzle later lie as these do.
    constexpr int kPeriod = kStepRows < 8 ? 8 / kStepRows : 1;
    int offset[kPeriod];
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      offset[i] = ValueLayout{}(row + i * kStepRows, lane % kPieces * 8, 0);
    }
#pragma unroll 1
    for (int first = 0; first < kTileKeys; first += kRows) {
#pragma unroll
      for (int i = 0; i < kRows / kStepRows; ++i) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
            *reinterpret_cast<cute::uint128_t const*>(source +
                                                      operand_row(i * kStepRows) * ValueDim),
            *reinterpret_cast<cute::uint128_t*>(
                target + offset[i % kPeriod] +
                ValueLayout{}(i / kPeriod * (kPeriod * kStepRows), 0, 0)));
      }
      source += kRows * ValueDim;
      target += ValueLayout{}(kRows, 0, 0);
    }
  }

  // The gates of a tile and what follows from them.
  CUTE_DEVICE static void set_factors(SharedStorage& shared, Work const& work, int slot,
                                      int first_key) {
    constexpr int kKeys = kTileKeys / 32;  // of a lane
    int const lane = this_lane();
    auto const gate_of = [&](int token) {
      return work.gate != nullptr && token < work.rows.end_token()
                 ? work.gate[token * work.gate_stride]
                 : detail::CumulativeGate{0.0f, 0.0f};
    };
    detail::CumulativeGate gate[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      gate[i] = gate_of(first_key + 32 * i + lane);
      shared.gate[slot][32 * i + lane] = gate[i];
    }
#pragma unroll
    for (int w = 0; w < kWarpgroups; ++w) {
      WarpgroupReach const reach(work.rows, w);
      detail::CumulativeGate const first_gate = gate_of(reach.first_token);
      bool mild = true;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        int const key = first_key + 32 * i + lane;
        float const rise = first_gate.since(gate[i]);
        mild = mild && (rise <= kMaxRise || key > reach.last_token);
        shared.factor[slot][w][32 * i + lane] = work.unit * detail::exp2(rise);
      }
      mild = __all_sync(0xffffffffu, mild);
      if (lane == 0) {
        shared.kind[slot][w] = first_key + kTileKeys <= reach.first_token ? KeyKind::kEarlier
                               : mild                                     ? KeyKind::kMild
                                                                          : KeyKind::kSteep;
      }
    }
  }
};

}  // namespace retention::collective::sm90
