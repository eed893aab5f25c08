// The gradient of every key of a chunk: from the queries of the chunk that see it, and from the
// gradient of the state after the chunk.
//
//     dk_j = 2 sum_{i >= j} da_ij qs_i + exp(G - g_j) J(k_j)^T (dS v_j + dz)
//     da_ij = s_ij exp(g_i - g_j) inverse_i (do_i . v_j - delta_i),     s_ij = qs_i . k_j
//
// over all query heads that read the key head, for query rows as kernel/gradient_rows.hpp prepares
// them, with G the cumulative gate of the chunk's last token and J the Jacobian of phi_k. With a
// chunk as long as the sequence only a final state has a gradient: that is the quadratic form.
//
// A weight is homogeneous of degree 2 in its query and its key, so that the gradient of the
// cumulative log gate is half of q_j . dq_j, over the same heads, less k_j . dk_j. The first would
// be zero in exact arithmetic. But sums of both over many tokens cancel but for what crosses their
// ends, and errors do so too only where both have the same.

#pragma once

#include <cstdint>

#include "retention/collective/contract.hpp"
#include "retention/collective/tile.hpp"
#include "retention/kernel/key_rows.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim, int Warps = 4>
struct KeyGradientTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr int kWarps = Warps;
};

template <class Traits>
struct KeyGradient : OneItem<KeyGradient<Traits>> {
  using Element = typename Traits::Element;

  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  // Long rows leave no register for turns, and take far longer than idle blocks.
  static constexpr bool kTakesTurns = kHeadDim <= 64;
  // Shared memory has room for one block of long rows.
  static constexpr int kMinBlocks = kHeadDim > 64 ? 1 : 2;
  static constexpr bool kHasExponents = cute::is_same_v<Element, cute::half_t>;

  static constexpr bool kWarpgroups = collective::kTakesWarpgroups<kValueDim>;
  template <bool Warpgroups>
  using TilingOf = collective::ContractTiling<kValueDim, Traits::kWarps, Warpgroups>;
  template <bool Warpgroups>
  using ContractOf = collective::Contract<Element, kHeadDim, kValueDim, TilingOf<Warpgroups>, true>;
  template <bool Warpgroups>
  using IntraOf = IntraKeyGradientOf<Element, kHeadDim, kValueDim, TilingOf,
                                     collective::RowGradient::kKey, Warpgroups>;
  using Contract = ContractOf<kWarpgroups>;
  using Tiling = TilingOf<kWarpgroups>;
  using Intra = IntraOf<kWarpgroups>;
  static constexpr int kRows = Tiling::kRows;
  template <bool Warpgroups>
  static constexpr int kThreadsOf = 32 * TilingOf<Warpgroups>::kWarps;
  static constexpr int kThreads = kThreadsOf<kWarpgroups>;
  template <bool Warpgroups>
  using RowsOf = KeyRows<TilingOf<Warpgroups>::kRows>;
  using Rows = RowsOf<kWarpgroups>;

  template <bool Warpgroups>
  struct StorageOf {
    alignas(128) Element key[cute::cosize_v<typename IntraOf<Warpgroups>::KeyLayout>];
    alignas(128) Element value[cute::cosize_v<typename IntraOf<Warpgroups>::ValueLayout>];
    union {
      typename ContractOf<Warpgroups>::SharedStorage contract;
      typename IntraOf<Warpgroups>::SharedStorage intra;
    };
    // Kept here for the loop inside the chunk and the epilogue: registers are short.
    typename IntraOf<Warpgroups>::Work work;
    int exponent;     // of da in the accumulators
    Element* target;  // the first row's gradient; null for not wanted
    float* gate_target;
    float* state_gate_target;
    float const* gate_source;
    // And that of the chunk's last token.
    detail::CumulativeGate row_gate[TilingOf<Warpgroups>::kRows + 1];
    float ones[TilingOf<Warpgroups>::kRows];
  };
  using SharedStorage = StorageOf<kWarpgroups>;
  static_assert(collective::kKeepsAlignment<typename Intra::KeyLayout>, "tiles of wgmma follow");
  static_assert(collective::kKeepsAlignment<typename Intra::ValueLayout>, "tiles of wgmma follow");

  struct Params : KeyRowsParams<Element> {
    Element* d_key;             // [b, t, h, d]; null for not wanted, as all of these
    float* d_gate;              // [b, t, h] of the cumulative log gate
    float* state_d_gate;        // [b, t, h] k . dk / 2 of the state alone
    float const* query_d_gate;  // [b, t, hq] q . dq / 2, with d_gate
    TokenStride d_key_stride;
    TokenStride d_gate_stride;  // of state_d_gate as well
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
    std::int64_t const slot_head = rows.slot_head(params, head);
    int const score_exponent = exponent(params.gradient_exponents.score, slot_head);
    typename Intra::Work const work = intra_work<Intra>(params, rows, head, score_exponent);
    if (thread == 0) {
      shared.work = work;
      shared.exponent = score_exponent;
      shared.target =
          params.d_key == nullptr ? nullptr : params.d_key + rows.at(params.d_key_stride, head);
      auto const gates = [&](float* x) {
        return x == nullptr ? nullptr : x + rows.at(params.d_gate_stride, head);
      };
      shared.gate_target = gates(params.d_gate);
      shared.state_gate_target = gates(params.state_d_gate);
      shared.gate_source = params.query_d_gate + rows.at(params.row_stride, head * params.group);
    }
    bool const has_state = rows.has_state(params);
    std::int64_t const state_head = rows.state_head(params, head);
    Contract contract(shared.contract,
                      params.d_states + state_head * Contract::kStateDim * kValueDim,
                      params.d_key_sums + state_head * Contract::kStateDim, thread);
    if (has_state) {
      contract.prefetch();
    } else {
      Intra::prefetch(shared.intra, work);
    }
    load_row_gates<Intra>(work, shared.row_gate, thread);
    auto const as_it_is = [](std::uint32_t pair) { return pair; };
    load_rows<kThreads, kRows, kHeadDim, typename Intra::KeyLayout>(
        params.key + rows.at(params.key_stride, head), params.key_stride.token, rows.count,
        shared.key, thread, as_it_is);
    load_rows<kThreads, kRows, kValueDim, typename Intra::ValueLayout>(
        params.value + rows.at(params.value_stride, head), params.value_stride.token, rows.count,
        shared.value, thread, as_it_is);

    cute::Tensor gradient = cute::make_tensor<float>(typename Contract::GradientLayout{});
    typename Intra::KeyProducts registers;
    typename Intra::KeyProducts& products = Intra::products_in(shared.intra, registers);
    if (has_state) {
      for (int row = thread; row < kRows; row += kThreads) {
        shared.ones[row] = 1.0f;
      }
      int const state_exponent = exponent(params.gradient_exponents.state, slot_head);
      int const key_sum_exponent = exponent(params.gradient_exponents.key_sum, slot_head);
      contract(shared.key, shared.value, shared.ones, detail::power_of_two(state_exponent),
               detail::power_of_two(key_sum_exponent), Tiling::first_row(thread / 32), thread % 32,
               gradient);
      __syncthreads();  // the queries come where the state was
      Intra::prefetch(shared.intra, shared.work);
      Intra::set_reach(shared.intra, shared.work, shared.row_gate);
      // Without the factor 2 of da.
      Intra::scale(shared.intra, shared.row_gate, shared.row_gate[kRows], shared.exponent - 1,
                   gradient);
      multiply_keys(shared, gradient, products);
    } else {
      cute::clear(gradient);
#pragma unroll
      for (int m = 0; m < Tiling::kMmaRows; ++m) {
        products[m][0] = products[m][1] = 0.0f;
      }
      __syncthreads();  // the rows and their gates are there
      Intra::set_reach(shared.intra, shared.work, shared.row_gate);
    }
    if (shared.state_gate_target != nullptr) {
      store_state_gates(shared, params.d_gate_stride.token, products);
    }
    Intra::run(shared.intra, shared.work, shared.key, shared.value, shared.row_gate, gradient,
               products);

    int const last_thread = Intra::this_thread();
    float const unit = detail::power_of_two(1 - shared.exponent);
    if (shared.target != nullptr) {
      store_rows<Tiling>(shared.target, params.d_key_stride.token, shared.work.rows, unit,
                         last_thread, gradient);
    }
    if (shared.gate_target != nullptr) {
      store_gates(shared, params.row_stride, params.d_gate_stride.token, -0.5f * unit, last_thread,
                  products);
    }
  }

 private:
  CUTE_DEVICE static int exponent(int const* exponents, std::int64_t index) {
    return !kHasExponents || exponents == nullptr ? 0 : exponents[index];
  }

  CUTE_DEVICE static float sum_of_quad(float sum) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return sum;
  }

  // k . dk of what comes from the state, a lane's part.
  template <class Gradient>
  CUTE_DEVICE static void multiply_keys(SharedStorage& shared, Gradient const& gradient,
                                        typename Intra::KeyProducts& products) {
    cute::Tensor key =
        cute::make_tensor(cute::make_smem_ptr(shared.key), typename Intra::KeyLayout{});
    int const thread = Intra::this_thread();
    int const row = Tiling::first_row(thread / 32) + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < Tiling::kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float& sum = products[m][upper];
        sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          auto const pair = *reinterpret_cast<std::uint32_t const*>(
              &key(row + 16 * m + 8 * upper, 8 * n + 2 * (thread % 4), 0));
          sum = fmaf(detail::unpack_lo<Element>(pair), gradient(cute::make_coord(0, upper), m, n),
                     sum);
          sum = fmaf(detail::unpack_hi<Element>(pair), gradient(cute::make_coord(1, upper), m, n),
                     sum);
        }
      }
    }
  }

  // k . dk / 2, of which there is no more than what comes from the state.
  CUTE_DEVICE static void store_state_gates(SharedStorage const& shared, std::int64_t stride,
                                            typename Intra::KeyProducts const& products) {
    int const thread = Intra::this_thread();
    int const first_row = Tiling::first_row(thread / 32) + thread % 32 / 4;
    float const unit = 0.5f * detail::power_of_two(1 - shared.exponent);
#pragma unroll
    for (int m = 0; m < Tiling::kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        int const row = first_row + 16 * m + 8 * upper;
        float const sum = sum_of_quad(products[m][upper]);
        if (thread % 4 == 0 && row < shared.work.rows) {
          shared.state_gate_target[row * stride] =
              unit * Intra::row_unit(shared.intra, m, shared.row_gate[row]) * sum;
        }
      }
    }
  }

  // What queries have, and factor k . dk.
  CUTE_DEVICE static void store_gates(SharedStorage& shared, TokenStride const& row_stride,
                                      std::int64_t stride, float factor, int thread,
                                      typename Intra::KeyProducts const& products) {
    int const lane = thread % 32;
    int const first_row = Tiling::first_row(thread / 32) + lane / 4;
#pragma unroll
    for (int m = 0; m < Tiling::kMmaRows; ++m) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        int const row = first_row + 16 * m + 8 * upper;
        bool const valid = row < shared.work.rows;
        float sum = factor * products[m][upper];
        if (valid) {
          float const* source = shared.gate_source + row * row_stride.token;
          for (int head = lane % 4; head < shared.work.group; head += 4) {
            sum += source[head * row_stride.head];
          }
        }
        sum = sum_of_quad(sum);
        if (lane % 4 == 0 && valid) {
          shared.gate_target[row * stride] = sum;
        }
      }
    }
  }
};

}  // namespace retention::kernel
