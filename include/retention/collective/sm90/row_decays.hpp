// The decays between the 16 rows of a warp in a row tile of wgmma and a tile of 64 keys some of
// which may come after them, and which of these the rows see.

#pragma once

#include <cute/tensor.hpp>

#include "retention/collective/key_tiles.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective::sm90 {

/// Of the columns of a tile a lane has this one and the next, and those multiples of eight after.
CUTE_DEVICE int first_column(int thread) { return 2 * (thread % 4); }
/// What these of the n-th eight columns have.
CUTE_DEVICE float2 column_pair(float const* first, int n) {
  return *reinterpret_cast<float2 const*>(first + 8 * n);
}

/// `Root`: square roots of the decays instead. Elements are those of accumulators: lane (g, t) has
/// of each n-th eight keys 2 t and 2 t + 1, for rows g and g + 8.
template <bool Root>
class RowDecays {
 public:
  /// `first_row` is the warp's first row of the tile.
  CUTE_DEVICE RowDecays(TileRows const& rows, int first_row, int first_key, int lane)
      : first_row_(first_row),
        lane_(lane),
        first_token_(rows.token(first_row) - first_key),
        last_token_(rows.token(first_row + 15) - first_key),
        last_{rows.token(first_row + lane / 4) - first_key - 2 * (lane % 4),
              rows.token(first_row + lane / 4 + 8) - first_key - 2 * (lane % 4)} {}

  /// Whether all rows of the warp see all of the tile.
  CUTE_DEVICE bool sees_all() const { return first_token_ >= 63; }
  /// Whether a row sees element i, 4 n and on of the n-th eight keys.
  CUTE_DEVICE bool sees(int i) const { return i / 4 * 8 + i % 2 <= last_[i / 2 % 2]; }

  /// Calls visit(i, decay) for each of the elements, but for those of eight keys that no row of the
  /// warp sees. Decays to what a row does not see may be anything.
  template <class Tiles, class Visit>
  CUTE_DEVICE void for_each(typename Tiles::SharedStorage const& shared, int slot,
                            detail::CumulativeGate const* row_gates, Visit const& visit) const {
    int const row = first_row_ + lane_ / 4;
    int const gate_offset = static_cast<int>(sizeof(detail::CumulativeGate)) * 2 * (lane_ % 4);
    detail::CumulativeGate const first_gate = row_gates[first_row_];
    detail::CumulativeGate const row_gate[2] = {row_gates[row], row_gates[row + 8]};
    // Keys before the first row have their decay up to it, and the row the rest.
    float const row_factor[2] = {decay(row_gate[0], first_gate), decay(row_gate[1], first_gate)};
#pragma unroll
    for (int n = 0; n < Tiles::kTileKeys / 8; ++n) {
      if (8 * n > last_token_) {
        continue;
      }
      auto const key = Tiles::column_gates(shared, slot, gate_offset, n);
      if (8 * n + 7 <= first_token_) {
        float const factor[2] = {decay(first_gate, key.gate[0]), decay(first_gate, key.gate[1])};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(4 * n + i, factor[i % 2] * row_factor[i / 2]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(4 * n + i, decay(row_gate[i / 2], key.gate[i % 2]));
        }
      }
    }
  }

  CUTE_DEVICE static float decay(detail::CumulativeGate const& to,
                                 detail::CumulativeGate const& from) {
    return detail::exp2((Root ? 0.5f : 1.0f) * to.since(from));
  }

 private:
  int first_row_;
  int lane_;
  int first_token_;  // of the warp's rows, from the tile's first key on
  int last_token_;
  int last_[2];  // of rows g and g + 8, from the lane's first key on
};

/// Of each key of a tile the decay up to a token, or its square root, or without gates `unit`, to
/// the warp's own `factors`: two exponentials a lane serve all of its rows. Returns where the
/// lane's first columns have theirs.
template <bool Root, class Tiles>
CUTE_DEVICE float const* set_column_decays(typename Tiles::SharedStorage const& shared, int slot,
                                           detail::CumulativeGate const* gates,
                                           detail::CumulativeGate const& to, float unit,
                                           float (&factors)[Tiles::kTileKeys]) {
#pragma unroll
  for (int i = 0; i < Tiles::kTileKeys; i += 32) {
    int const key = Tiles::this_thread() % 32 + i;
    factors[key] = gates == nullptr ? unit : RowDecays<Root>::decay(to, shared.gate[slot][key]);
  }
  __syncwarp();
  return factors + first_column(Tiles::this_thread());
}

}  // namespace retention::collective::sm90
