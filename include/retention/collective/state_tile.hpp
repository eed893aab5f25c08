// The tile of the state that a warp of `ExpandReduce` owns, between registers and memory.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/expand_reduce.hpp"
#include "retention/detail/packed.hpp"

namespace retention::collective {

/// With `Multiplicity`, what is in memory is the state times the multiplicity of its rows, 1 in a
/// diagonal block pair, else 2; the accumulators are without it.
///
/// A state in memory, [D, ValueDim] from the first of the warp's columns on, is one of those of
/// kernel/sequence_states.hpp, or for `store_rounded` a pointer.
template <class Mainloop, int ValueDim, bool Multiplicity>
struct StateTile {
  using Element = typename Mainloop::Element;
  using Accumulators = typename Mainloop::Accumulators;

  static constexpr int kValueTile = Mainloop::kValueTile;
  // Whether numbers of this type need powers of two to stay in range.
  static constexpr bool kScaled = cute::is_same_v<Element, cute::half_t>;

  /// Eight rows of the state in shared memory, on their way from a warp's registers to memory. The
  /// padding lets the lanes of a warp write their pairs to different banks.
  struct alignas(16) Rows {
    Element data[8][kValueTile + 8];
  };

  CUTE_DEVICE static void clear(Accumulators& accumulators) {
    cute::clear(Mainloop::state_tensor(accumulators));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      accumulators.key_sum[i] = 0.0f;
    }
  }

  CUTE_DEVICE static void multiply(float state_factor, float sum_factor,
                                   Accumulators& accumulators) {
    cute::Tensor state = Mainloop::state_tensor(accumulators);
#pragma unroll
    for (int i = 0; i < cute::size(state); ++i) {
      state(i) *= state_factor;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      accumulators.key_sum[i] *= sum_factor;
    }
  }

  /// Accumulators = factor times what is in memory; the sum of keys where the warp stores it.
  template <class State>
  CUTE_DEVICE static void load(State const& state, bool first_columns, float state_factor,
                               float sum_factor, Mainloop const& mainloop,
                               Accumulators& accumulators) {
    bool const loads_sum = has_key_sum(mainloop, first_columns);
    int const group = mainloop.lane / 4;
    int const column = 2 * (mainloop.lane % 4);
    cute::Tensor target = Mainloop::state_tensor(accumulators);
    for_each(
        mainloop, accumulators,
        [&](int i, int x, int row, int stride, float multiplicity) {
          float const factor = multiplicity == 1.0f ? state_factor : 0.5f * state_factor;
#pragma unroll
          for (int n = 0; n < kValueTile / 8; ++n) {
            float2 const loaded = state.load((row + group * stride) * ValueDim + column + 8 * n);
            target(cute::make_coord(0, i), x, n) = factor * loaded.x;
            target(cute::make_coord(1, i), x, n) = factor * loaded.y;
          }
        },
        [&](int row, float& sum, float multiplicity) {
          float const factor = multiplicity == 1.0f ? sum_factor : 0.5f * sum_factor;
          sum = loads_sum ? factor * state.load_sum(row) : 0.0f;
        });
  }

  /// Memory = factor times the accumulators; `first_columns`: whether the warp's columns are the
  /// state's first, whose owner stores the sum of keys.
  template <class State>
  CUTE_DEVICE static void store(State const& state, bool first_columns, float state_factor,
                                float sum_factor, Mainloop const& mainloop,
                                Accumulators& accumulators) {
    int const group = mainloop.lane / 4;
    int const column = 2 * (mainloop.lane % 4);
    bool const stores_sum = has_key_sum(mainloop, first_columns);
    for_each(
        mainloop, accumulators,
        [&](int i, int x, int row, int stride, float multiplicity) {
          float const factor = state_factor * multiplicity;
#pragma unroll
          for (int n = 0; n < kValueTile / 8; ++n) {
            float2 const sum = pair(accumulators, i, x, n);
            state.store((row + group * stride) * ValueDim + column + 8 * n,
                        make_float2(factor * sum.x, factor * sum.y));
          }
        },
        [&](int row, float sum, float multiplicity) {
          if (stores_sum) {
            state.store_sum(row, sum_factor * multiplicity * sum);
          }
        });
  }

  /// The same, rounded to `Element`; factors other than 1 in fp16 only. `rows` is the warp's own.
  CUTE_DEVICE static void store_rounded(Element* state, Element* key_sum, bool first_columns,
                                        float state_factor, float sum_factor,
                                        Mainloop const& mainloop, Rows& rows,
                                        Accumulators& accumulators) {
    constexpr int kPieces = kValueTile / 8;  // of 16 bytes, in a row
    int const lane = detail::recomputed(mainloop.lane);
    bool const stores_sum = has_key_sum(mainloop, first_columns);
    // A lane writes its pairs, and reads pieces that make full sectors of memory.
    Element* written = &rows.data[lane / 4][2 * (lane % 4)];
    Element const* read = &rows.data[lane / kPieces][lane % kPieces * 8];
    for_each(
        mainloop, accumulators,
        [&](int i, int x, int row, int stride, float multiplicity) {
          float const factor = state_factor * multiplicity;
#pragma unroll
          for (int n = 0; n < kValueTile / 8; ++n) {
            float2 const sum = pair(accumulators, i, x, n);
            std::uint32_t rounded;
            if constexpr (kScaled) {
              rounded = detail::pack<Element>(factor * sum.x, factor * sum.y);
            } else {
              rounded = detail::pack<Element>(sum.x, sum.y);
              if constexpr (Multiplicity) {
                // Doubling is exact after rounding as well, and takes half the instructions there.
                rounded = detail::multiply<Element>(rounded, detail::pack<Element>(factor, factor));
              }
            }
            *reinterpret_cast<std::uint32_t*>(written + 8 * n) = rounded;
          }
          __syncwarp();
          Element* target = state + (row + lane / kPieces * stride) * ValueDim + lane % kPieces * 8;
#pragma unroll
          for (int y = 0; y < 8; y += 32 / kPieces) {
            *reinterpret_cast<uint4*>(target + y * stride * ValueDim) =
                *reinterpret_cast<uint4 const*>(read + y * (kValueTile + 8));
          }
        },
        [&](int row, float sum, float multiplicity) {
          if (stores_sum) {
            key_sum[row] = Element(sum_factor * multiplicity * sum);
          }
        });
  }

 private:
  // Calls visit_row(i, x, row, stride, multiplicity) for each native block i and value x, where the
  // elements y are rows `row` + y * `stride` of the state, and visit_sum(row, sum, multiplicity)
  // for the lane's part of the sum of keys.
  template <class VisitRow, class VisitSum>
  CUTE_DEVICE static void for_each(Mainloop const& mainloop, Accumulators& accumulators,
                                   VisitRow visit_row, VisitSum visit_sum) {
    int const lane = detail::recomputed(mainloop.lane);
    int const first_outer = detail::recomputed(mainloop.first_outer);
    StateUnit const unit{
        detail::recomputed(mainloop.unit.outer),
        {detail::recomputed(mainloop.unit.native[0]), detail::recomputed(mainloop.unit.native[1])}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const stride = unit.stride_outer(i);
      float const multiplicity = !Multiplicity || unit.outer == unit.native[i] ? 1.0f : 2.0f;
#pragma unroll
      for (int x = 0; x < Mainloop::kOuterTile; ++x) {
        visit_row(i, x, unit.row(i) + (first_outer + x) * stride, unit.stride_native(i),
                  multiplicity);
        // Keeps the rows apart: interleaved, their conversions need more registers than there are.
        __syncwarp();
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        visit_sum(unit.row(i) + lane / 4 * unit.stride_native(i) + (2 * (lane % 4) + c) * stride,
                  accumulators.key_sum[2 * i + c], multiplicity);
      }
    }
  }

  // The lane's pair of neighbouring columns in n8 tile n.
  CUTE_DEVICE static float2 pair(Accumulators& accumulators, int i, int x, int n) {
    cute::Tensor state = Mainloop::state_tensor(accumulators);
    return make_float2(state(cute::make_coord(0, i), x, n), state(cute::make_coord(1, i), x, n));
  }

  // The unit's sum of keys is summed by each of the warps that share it; one of them stores it.
  CUTE_DEVICE static bool has_key_sum(Mainloop const& mainloop, bool first_columns) {
    return first_columns && mainloop.first_outer == 0;
  }
};

}  // namespace retention::collective
