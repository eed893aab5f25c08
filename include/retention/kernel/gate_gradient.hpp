// The gradient of log gates. With L = cumsum(log_gate), whose gradient dL comes from the kernels of
// queries and keys, and within a sequence of T tokens,
//
//     d log_gate_t = sum_{t <= j < T} dL_j + <dS_T, S_T> + <dz_T, z_T>
//
// where the products are those of a final state with its gradient. Three kernels, one after the
// other, every sum in an order of its own and in double precision:
//
// - `StateProduct`, if there is such a gradient: parts of its product with the state;
// - `GateGradientSums`: the sum over each piece of a sequence;
// - `GateGradient`: the sums from each token on, within its piece and over the pieces after it.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/gate_tile.hpp"
#include "retention/detail/reduce.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

struct StateProduct {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kParts = 32;  // blocks that share a state

  struct SharedStorage {
    double warps[kWarps];
  };

  struct Params {
    float const* state;             // [count, h, D, dv], 16-byte aligned, as all of these
    float const* key_sum;           // [count, h, D]
    float const* state_gradient;    // [count, h, D, dv]
    float const* key_sum_gradient;  // [count, h, D]
    double* products;               // [count, h, kParts], to be added up
    int count;                      // sequences
    int heads;
    int state_dim;  // D, a multiple of 4
    int value_dim;  // dv
  };

  /// (sequence and part, part fastest; head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.count) * kParts, static_cast<unsigned>(params.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const part = static_cast<int>(blockIdx.x % kParts);
    std::int64_t const item =
        static_cast<std::int64_t>(blockIdx.x / kParts) * params.heads + blockIdx.y;
    std::int64_t const sums = params.state_dim;
    std::int64_t const elements = sums * params.value_dim;
    double sum =
        product(params.state + item * elements, params.state_gradient + item * elements, elements,
                part) +
        product(params.key_sum + item * sums, params.key_sum_gradient + item * sums, sums, part);
    sum = detail::reduce_warp(sum, detail::Plus{});
    if (threadIdx.x % 32 == 0) {
      shared.warps[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) {
        sum += shared.warps[warp];
      }
      params.products[item * kParts + part] = sum;
    }
  }

 private:
  // The thread's part of a part of the product of `size` floats.
  CUTE_DEVICE static double product(float const* x, float const* y, std::int64_t size, int part) {
    double sum = 0.0;
#pragma unroll 4
    for (std::int64_t i = 4 * (part * kThreads + static_cast<int>(threadIdx.x)); i < size;
         i += 4 * kParts * kThreads) {
      float4 const a = *reinterpret_cast<float4 const*>(x + i);
      float4 const b = *reinterpret_cast<float4 const*>(y + i);
      sum += double{a.x} * double{b.x} + double{a.y} * double{b.y} + double{a.z} * double{b.z} +
             double{a.w} * double{b.w};
    }
    return sum;
  }
};

/// A piece of a sequence, and the heads of it that a block takes.
struct GatePiece {
  static constexpr int kTokens = 1024;

  Sequences pieces;
  Sequence sequence;
  int sequence_index;
  int index;  // of the piece in its sequence
  std::int64_t first_token;
  int tokens;  // at most 0 where the slot has no piece
  int first_head;
  int heads;

  CUTE_DEVICE GatePiece(Sequences const& sequences, int all_heads)
      : pieces(sequences.segments(kTokens)) {
    Chunk const piece = pieces.find(static_cast<int>(blockIdx.x));
    sequence = pieces.get(piece.sequence);
    sequence_index = piece.sequence;
    index = piece.index;
    first_token = static_cast<std::int64_t>(index) * kTokens;
    tokens = static_cast<int>(
        cute::min(sequence.length - first_token, static_cast<std::int64_t>(kTokens)));
    first_head = static_cast<int>(blockIdx.y) * collective::GateTile::kHeads;
    heads = cute::min(cute::Int<collective::GateTile::kHeads>{}, all_heads - first_head);
  }

  /// (piece, heads)
  CUTE_HOST static dim3 grid(Sequences const& sequences, int heads) {
    constexpr int kHeads = collective::GateTile::kHeads;
    return dim3(static_cast<unsigned>(sequences.segments(kTokens).num_slots()),
                static_cast<unsigned>((heads + kHeads - 1) / kHeads));
  }
};

struct GateGradientSums {
  using Tile = collective::GateTile;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = 4;

  struct SharedStorage {
    float tile[Tile::kSize];
  };

  struct Params {
    float const* d_gate;  // [b, t, h] the gradient of the cumulative log gate
    TokenStride d_gate_stride;
    double* sums;  // [h, slots of pieces]
    Sequences sequences;
    int heads;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return GatePiece::grid(params.sequences, params.heads);
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    GatePiece const piece(params.sequences, params.heads);
    if (piece.tokens <= 0) {
      return;
    }
    Tile::Part const part(params.d_gate_stride, thread);
    float const* source =
        params.d_gate + part.offset +
        params.d_gate_stride.at(piece.sequence, piece.first_token, piece.first_head);
    float next[Tile::kLoads];
    part.load(source, piece.heads, piece.tokens, next);
    float const* const values = shared.tile + Tile::position(warp, Tile::kLaneTokens * lane);
    double sum = 0.0;
#pragma unroll 1
    for (int left = piece.tokens; left > 0; left -= Tile::kTokens) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        shared.tile[part.position(i)] = next[i];
      }
      source += Tile::kTokens * params.d_gate_stride.token;
      part.load(source, piece.heads, left - Tile::kTokens, next);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Tile::kLaneTokens; ++i) {
        sum += values[i];
      }
      __syncthreads();
    }
    sum = detail::reduce_warp(sum, detail::Plus{});
    if (warp < piece.heads && lane == 0) {
      params.sums[(piece.first_head + warp) * piece.pieces.num_slots() + blockIdx.x] = sum;
    }
  }
};

struct GateGradient {
  using Tile = collective::GateTile;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = 4;
  static constexpr int kParts = StateProduct::kParts;
  static_assert(kParts == 32, "one a lane");

  struct SharedStorage {
    float tile[Tile::kSize];
  };

  struct Params {
    float const* d_gate;  // [b, t, h] the gradient of the cumulative log gate
    float* d_log_gate;    // [b, t, h]
    TokenStride d_gate_stride;
    TokenStride d_log_gate_stride;
    double const* sums;      // [h, slots of pieces]
    double const* products;  // [count, h, kParts]; null for none
    Sequences sequences;
    int heads;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return GatePiece::grid(params.sequences, params.heads);
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    GatePiece const piece(params.sequences, params.heads);
    if (piece.tokens <= 0) {
      return;
    }
    int const last_tile = (piece.tokens - 1) / Tile::kTokens * Tile::kTokens;
    auto const last = [&](TokenStride const& stride) {
      return stride.at(piece.sequence, piece.first_token + last_tile, piece.first_head);
    };
    Tile::Part const load_part(params.d_gate_stride, thread);
    Tile::Part const store_part(params.d_log_gate_stride, thread);
    float const* source = params.d_gate + load_part.offset + last(params.d_gate_stride);
    float* target = params.d_log_gate + store_part.offset + last(params.d_log_gate_stride);
    float next[Tile::kLoads];
    load_part.load(source, piece.heads, piece.tokens - last_tile, next);
    double carry = warp < piece.heads ? after(params, piece, warp, lane) : 0.0;
#pragma unroll 1
    for (int first = last_tile; first >= 0; first -= Tile::kTokens) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        shared.tile[load_part.position(i)] = next[i];
      }
      // The tile before arrives during the scan.
      source -= Tile::kTokens * params.d_gate_stride.token;
      load_part.load(source, piece.heads, first > 0 ? Tile::kTokens : 0, next);
      __syncthreads();
      carry = scan(shared, warp, lane, carry);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        if (store_part.within(i, piece.heads, piece.tokens - first)) {
          target[i * store_part.step] = shared.tile[store_part.position(i)];
        }
      }
      target -= Tile::kTokens * params.d_log_gate_stride.token;
      __syncthreads();
    }
  }

 private:
  // What comes after the piece.
  CUTE_DEVICE static double after(Params const& params, GatePiece const& piece, int warp,
                                  int lane) {
    int const head = piece.first_head + warp;
    int const pieces = cute::ceil_div(piece.sequence.length, cute::Int<GatePiece::kTokens>{});
    double const* sums = params.sums + head * piece.pieces.num_slots() + piece.sequence.first_slot;
    double sum = 0.0;
#pragma unroll 4
    for (int index = piece.index + 1 + lane; index < pieces; index += 32) {
      sum += sums[index];
    }
    if (params.products != nullptr) {
      std::int64_t const item =
          static_cast<std::int64_t>(piece.sequence_index) * params.heads + head;
      sum += params.products[item * kParts + lane];
    }
    return detail::reduce_warp(sum, detail::Plus{});
  }

  // Sums of one head's tile from each token on, in place, on top of `carry`; returns the first of
  // them.
  CUTE_DEVICE static double scan(SharedStorage& shared, int head, int lane, double carry) {
    float* const values = shared.tile + Tile::position(head, Tile::kLaneTokens * lane);
    double total = 0.0;
#pragma unroll
    for (int i = 0; i < Tile::kLaneTokens; ++i) {
      total += values[i];
    }
    double inclusive = total;
#pragma unroll
    for (unsigned delta = 1; delta < 32; delta *= 2) {
      double const behind = __shfl_down_sync(0xffffffffu, inclusive, delta);
      inclusive = static_cast<unsigned>(lane) + delta < 32 ? inclusive + behind : inclusive;
    }
    double const behind = __shfl_down_sync(0xffffffffu, inclusive, 1);
    double sum = lane == 31 ? carry : carry + behind;
#pragma unroll
    for (int i = Tile::kLaneTokens - 1; i >= 0; --i) {
      sum += values[i];
      values[i] = static_cast<float>(sum);
    }
    return carry + __shfl_sync(0xffffffffu, inclusive, 0);
  }
};

}  // namespace retention::kernel
