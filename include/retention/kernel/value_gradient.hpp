// The gradient of every value of a chunk: from the queries of the chunk that see it, and from the
// gradient of the state after the chunk.
//
//     dv_j = sum_{i >= j} p_ij do_i + exp(G - g_j) phi_k(k_j)^T dS
//
// with probabilities p_ij = (k_j . q_i)^2 exp(g_i - g_j) / z_i of all query heads that read the key
// head, and G the cumulative gate of the chunk's last token. With a chunk as long as the sequence
// only a final state has a gradient: that is the quadratic form.

#pragma once

#include <cstdint>

#include "retention/collective/expand_apply.hpp"
#include "retention/collective/tile.hpp"
#include "retention/kernel/key_rows.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct ValueGradientTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr int kWarps = Warps;
};

template <class Traits>
struct ValueGradient : OneItem<ValueGradient<Traits>> {
  using Element = typename Traits::Element;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr bool kWarpgroups = collective::kTakesWarpgroups<kValueDim>;
  template <bool Warpgroups>
  using TilingOf = collective::ApplyTiling<kValueDim, Traits::kWarps, Warpgroups>;
  using Tiling = TilingOf<kWarpgroups>;
  // Long rows leave no register for turns, and take far longer than idle blocks.
  static constexpr bool kTakesTurns = kHeadDim <= 64;
  static constexpr int kRows = Tiling::kRows;
  template <bool Warpgroups>
  static constexpr int kThreadsOf = 32 * TilingOf<Warpgroups>::kWarps;
  static constexpr int kThreads = kThreadsOf<kWarpgroups>;
  static constexpr int kMinBlocks = 2;
  static constexpr bool kHasExponents = cute::is_same_v<Element, cute::half_t>;
  // Keys are scaled to magnitudes below 2^kKeyExponent, so that products of two are in range.
  static constexpr int kKeyExponent = 7;
  // Probabilities are multiplied by 2^kWeightExponent: near the end of fp16's range, so that small
  // ones keep their digits.
  static constexpr int kWeightExponent = kHasExponents ? 14 : 0;

  template <bool Warpgroups>
  using ApplyOf = collective::ExpandApply<Element, kHeadDim, kValueDim, TilingOf<Warpgroups>,
                                          collective::Expanded::kKeys>;
  using Apply = ApplyOf<kWarpgroups>;
  template <bool Warpgroups>
  using IntraOf = IntraKeyGradientOf<Element, kHeadDim, kValueDim, TilingOf,
                                     collective::RowGradient::kValue, Warpgroups>;
  using Intra = IntraOf<kWarpgroups>;
  template <bool Warpgroups>
  using RowsOf = KeyRows<TilingOf<Warpgroups>::kRows>;
  using Rows = RowsOf<kWarpgroups>;

  template <bool Warpgroups>
  struct StorageOf {
    alignas(128) Element key[cute::cosize_v<typename IntraOf<Warpgroups>::KeyLayout>];
    union {
      typename ApplyOf<Warpgroups>::SharedStorage apply;
      typename IntraOf<Warpgroups>::SharedStorage intra;
    };
    // Kept here for the loop inside the chunk and the epilogue: registers are short.
    typename IntraOf<Warpgroups>::Work work;
    int state_exponent;  // of what the state gives, in units of the accumulators
    Element* target;     // the first row's gradient
    // And that of the chunk's last token.
    detail::CumulativeGate row_gate[TilingOf<Warpgroups>::kRows + 1];
  };
  using SharedStorage = StorageOf<kWarpgroups>;
  static_assert(collective::kKeepsAlignment<typename Intra::KeyLayout>, "tiles of wgmma follow");

  struct Params : KeyRowsParams<Element> {
    Element* d_value;  // [b, t, h, dv]
    TokenStride d_value_stride;
  };

  template <bool Warpgroups>
  CUTE_HOST static dim3 grid_of(Params const& params) {
    return RowsOf<Warpgroups>::grid(params);
  }
  CUTE_HOST static dim3 grid(Params const& params) { return grid_of<kWarpgroups>(params); }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return Rows::turn_blocks(params);
  }
  CUTE_DEVICE static int count(Params const& params) { return Rows::tiles(params.sequences); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = Intra::this_thread();
    int const head = blockIdx.y;
    Rows const rows = Rows::find(params.sequences, number);
    if (rows.count <= 0) {
      return;  // the same for the whole block
    }
    int key_scale = 0;
    if constexpr (kHasExponents) {
      // At most 30, for elements are not below 2^-24: two factors of fp16.
      key_scale = cute::min(kKeyExponent - key_exponent(params, rows.sequence.index, head), 30);
    }
    typename Intra::Work const work =
        intra_work<Intra>(params, rows, head, kWeightExponent - 2 * key_scale);
    std::int64_t const slot_head = rows.slot_head(params, head);
    if (thread == 0) {
      shared.work = work;
      shared.target = params.d_value + rows.at(params.d_value_stride, head);
      shared.state_exponent = work.unit_exponent + state_exponent(params, slot_head);
    }
    cute::Tensor gradient = cute::make_tensor<float>(collective::OutputLayout<Tiling, kValueDim>{});
    cute::clear(gradient);

    bool const has_state = rows.has_state(params);
    std::int64_t const state_head = rows.state_head(params, head);
    Apply apply(shared.apply, params.d_states + state_head * Apply::kStateDim * kValueDim, thread);
    if (has_state) {
      apply.prefetch();
    } else {
      Intra::prefetch(shared.intra, work);
    }
    load_row_gates<Intra>(work, shared.row_gate, thread);
    load_rows<kThreads, kRows, kHeadDim, typename Intra::KeyLayout>(
        params.key + rows.at(params.key_stride, head), params.key_stride.token, rows.count,
        shared.key, thread, [&](std::uint32_t pair) {
          if constexpr (kHasExponents) {
            std::uint32_t const first = half_power_of_two(key_scale / 2);
            std::uint32_t const rest = half_power_of_two(key_scale - key_scale / 2);
            return detail::multiply<Element>(detail::multiply<Element>(pair, first), rest);
          } else {
            return pair;
          }
        });
    if (has_state) {
      apply(shared.key, Tiling::first_row(thread / 32), thread % 32, gradient);
      __syncthreads();  // the queries come where the state was
      Intra::prefetch(shared.intra, shared.work);
      Intra::set_reach(shared.intra, shared.work, shared.row_gate);
      Intra::scale(shared.intra, shared.row_gate, shared.row_gate[kRows], shared.state_exponent,
                   gradient);
    } else {
      __syncthreads();  // the keys and their gates are there
      Intra::set_reach(shared.intra, shared.work, shared.row_gate);
    }
    typename Intra::KeyProducts none;
    Intra::run(shared.intra, shared.work, shared.key, nullptr, shared.row_gate, gradient, none);
    int const last_thread = Intra::this_thread();
    store_rows<Tiling>(shared.target, params.d_value_stride.token, shared.work.rows,
                       detail::power_of_two(-kWeightExponent), last_thread, gradient);
  }

 private:
  CUTE_DEVICE static int key_exponent(Params const& params, int sequence, int head) {
    return params.exponents.key == nullptr
               ? 0
               : params.exponents.key[static_cast<std::int64_t>(sequence) * params.heads + head];
  }

  // Of what Apply gives, with keys as they are.
  CUTE_DEVICE static int state_exponent(Params const& params, std::int64_t slot_head) {
    int const* const exponents = params.gradient_exponents.state;
    return Apply::kExponent + (!kHasExponents || exponents == nullptr ? 0 : exponents[slot_head]);
  }

  CUTE_DEVICE static std::uint32_t half_power_of_two(int n) {
    return detail::broadcast_lo(static_cast<std::uint32_t>(n + 15) << 10);
  }
};

}  // namespace retention::kernel
