// The gradient of log gates. With L = cumsum(log_gate), whose gradient dL comes from the kernels of
// queries and keys, and for a token t of a chunk that ends before token e,
//
//     d log_gate_t = sum_{t <= j < e} dL_j + <dS, S> + <dz, z>
//
// where S and z are the state after the chunk and dS and dz its gradient: what tokens of later
// chunks have of t, they have through that state. The sum over their dL is the same number, but
// with the roundings of all of them, however little of the chunk's state is left there.
//
// For the same reason the products must be those that dL has terms of. S consists of what was left
// of the state before the chunk, S' and z', and of the chunk's keys, so that they are
//
//     sum_j (k_j . dk_j of the state) / 2 + exp(G) (<dS, S'> + <dz, z'>)
//
// with the state as queries read it, dS as keys read it, and G the chunk's cumulative gate. Terms
// of dL_j cancel against the first sum, as far as they do not cross t, to the last digits of fp32.
//
// Nothing that comes from after a reset (detail/cumulative_gate.hpp) has to do with gates up to it,
// whatever those terms are: sums end there, and a reset's own gradient is 0.
//
// Three kernels, one after the other, every sum in an order of its own and in double precision:
//
// - `StateProducts`, where there are states on both sides of a chunk: parts of those products;
// - `GateGradientSums`, where chunks have more than one piece: the sum over each piece of a chunk;
// - `GateGradient`: the sums from each token on, within its piece and over the pieces after it.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/gate_tile.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/packed.hpp"
#include "retention/detail/reduce.hpp"
#include "retention/kernel/gradient_exponents.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/row_tiles.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

template <class Element>
struct StateProducts {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kParts = 16;  // blocks that share a state
  // Whether numbers of this type are stored with exponents.
  static constexpr bool kScaled = cute::is_same_v<Element, cute::half_t>;

  struct SharedStorage {
    double warps[kWarps];
  };

  struct Params {
    // Before each chunk, by `state_slots`, and after each, by `gradient_slots`; 16-byte aligned.
    Element const* states;               // [slots, h, D, dv]
    Element const* key_sums;             // [slots, h, D]
    Element const* state_gradients;      // [slots, h, D, dv]
    Element const* key_sum_gradients;    // [slots, h, D]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start
    TokenStride gate_stride;
    double* products;     // [slots, h, kParts], to be added up
    Exponents exponents;  // for fp16
    GradientExponents gradient_exponents;
    Sequences sequences;  // those listed get products
    int heads;
    int state_dim;         // D, a multiple of 8
    int value_dim;         // dv
    bool initial_states;   // whether the state before a sequence's first chunk is not zero
    bool final_gradients;  // whether the gradient after its last chunk is not zero
  };

  /// (chunk and part, part fastest; head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.sequences.most_chunks()) * kParts,
                static_cast<unsigned>(params.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const part = static_cast<int>(blockIdx.x % kParts);
    int const number = static_cast<int>(blockIdx.x / kParts);
    int const head = blockIdx.y;
    if (number >= params.sequences.num_chunks()) {
      return;
    }
    Chunk const chunk = params.sequences.find(number);
    Sequence const sequence = params.sequences.get(chunk.sequence);
    std::int64_t const start = std::int64_t{chunk.index} * sequence.chunk_size;
    std::int64_t const end = cute::min(start + sequence.chunk_size, std::int64_t{sequence.length});
    if (start >= end) {
      return;  // a number without a chunk
    }
    bool const has_state = params.initial_states || start > 0;
    bool const has_gradient = params.final_gradients || end < sequence.length;
    std::int64_t const item = (sequence.first_slot + chunk.index) * params.heads + head;
    double sum = 0.0;
    if (has_state && has_gradient) {
      float const decay =
          detail::exp2(params.gate[params.gate_stride.at(sequence, end - 1, head)].total());
      // Nothing is left of the state where that is zero: its product need not be finite.
      if (decay != 0.0f) {
        std::int64_t const sums = params.state_dim;
        std::int64_t const elements = sums * params.value_dim;
        auto const place = [&](Slots slots) {
          return params.sequences.slot(sequence, chunk.index, slots) * params.heads + head;
        };
        std::int64_t const before = place(state_slots(params.initial_states));
        std::int64_t const after = place(gradient_slots(params.final_gradients));
        double const state = product(params.states + before * elements,
                                     params.state_gradients + after * elements, elements, part);
        double const key_sum = product(params.key_sums + before * sums,
                                       params.key_sum_gradients + after * sums, sums, part);
        sum = scaled(state, params.exponents.state, params.gradient_exponents.state, item) +
              scaled(key_sum, params.exponents.key_sum, params.gradient_exponents.key_sum, item);
        sum *= double{decay};
      }
    }
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
  // The thread's part of a part of the product of `size` numbers. Those of two are exact in fp32,
  // the sum of eight need not be.
  CUTE_DEVICE static double product(Element const* x, Element const* y, std::int64_t size,
                                    int part) {
    double sum = 0.0;
#pragma unroll 2
    for (std::int64_t i = 8 * (part * kThreads + static_cast<int>(threadIdx.x)); i < size;
         i += 8 * kParts * kThreads) {
      uint4 const a = *reinterpret_cast<uint4 const*>(x + i);
      uint4 const b = *reinterpret_cast<uint4 const*>(y + i);
      auto const pair = [](std::uint32_t u, std::uint32_t v) {
        return fmaf(detail::unpack_lo<Element>(u), detail::unpack_lo<Element>(v),
                    detail::unpack_hi<Element>(u) * detail::unpack_hi<Element>(v));
      };
      sum += double{(pair(a.x, b.x) + pair(a.y, b.y)) + (pair(a.z, b.z) + pair(a.w, b.w))};
    }
    return sum;
  }

  // What is stored of both is 2^-exponent times the number.
  CUTE_DEVICE static double scaled(double x, int const* exponents, int const* gradient_exponents,
                                   std::int64_t slot_head) {
    if constexpr (kScaled) {
      auto const power = [&](int const* e) {
        return double{detail::power_of_two(e == nullptr ? 0 : e[slot_head])};
      };
      return x * power(exponents) * power(gradient_exponents);
    } else {
      return x;
    }
  }
};

/// A piece of a chunk, and the heads of it that a block takes.
struct GatePiece {
  static constexpr int kTokens = 1024;

  Sequence sequence;
  std::int64_t slot;      // of the chunk
  std::int64_t sum_slot;  // of the piece
  int chunk_start;        // in the sequence
  int chunk_tokens;
  int index;        // of the piece in its chunk
  int size;         // of a whole piece
  int first_token;  // in the sequence
  int tokens;       // 0 where there is no such piece
  int first_head;
  int heads;

  CUTE_DEVICE GatePiece(Sequences const& sequences, int all_heads, int number)
      : size(piece_tokens(sequences)) {
    PackedTiles const tiles{sequences, size};
    typename PackedTiles::Tile tile;
    if (sequences.packed()) {
      tile = tiles.find(number);
    } else {
      Chunk const chunk = sequences.find(number / tiles.in_chunk());
      tile = {chunk.sequence, chunk.index, number % tiles.in_chunk()};
    }
    sequence = sequences.get(tile.sequence);
    slot = sequence.first_slot + tile.chunk;
    int const pieces_before = tile.chunk * tiles.in_chunk() + tile.index;
    sum_slot =
        sequences.packed()
            ? static_cast<std::int64_t>(tiles.start(static_cast<int>(sequence.first_token))) +
                  sequence.index + pieces_before
            : number;
    index = tile.index;
    std::int64_t const start =
        cute::min(std::int64_t{tile.chunk} * sequence.chunk_size, std::int64_t{sequence.length});
    std::int64_t const end = cute::min(start + sequence.chunk_size, std::int64_t{sequence.length});
    std::int64_t const first = start + std::int64_t{index} * size;
    chunk_start = static_cast<int>(start);
    chunk_tokens = static_cast<int>(end - start);
    first_token = static_cast<int>(cute::min(first, std::int64_t{sequence.length}));
    tokens =
        static_cast<int>(cute::max(cute::min(end - first, std::int64_t{size}), std::int64_t{0}));
    first_head = static_cast<int>(blockIdx.y) * collective::GateTile::kHeads;
    heads = cute::min(cute::Int<collective::GateTile::kHeads>{}, all_heads - first_head);
  }

  /// Whether there is a product of the states on both sides of the chunk: see `StateProducts`.
  CUTE_DEVICE bool has_product(bool of_single_chunks) const {
    return of_single_chunks || sequence.length > sequence.chunk_size;
  }

  CUTE_HOST_DEVICE static int piece_tokens(Sequences const& sequences) {
    return cute::min(+kTokens, sequences.chunk_size);
  }
  /// Numbers of pieces.
  CUTE_HOST_DEVICE static int count(Sequences const& sequences) {
    PackedTiles const tiles{sequences, piece_tokens(sequences)};
    return sequences.packed() ? tiles.count()
                              : static_cast<int>(sequences.num_slots()) * tiles.in_chunk();
  }
  /// Slots of pieces, of each head.
  CUTE_HOST_DEVICE static std::int64_t num_slots(Sequences const& sequences) {
    PackedTiles const tiles{sequences, piece_tokens(sequences)};
    return sequences.packed() ? std::int64_t{tiles.start(sequences.length)} + sequences.count
                              : sequences.num_slots() * tiles.in_chunk();
  }
  CUTE_HOST static std::int64_t turn_blocks(Sequences const& sequences) {
    return PackedTiles{sequences, piece_tokens(sequences)}.turn_blocks();
  }
  /// (piece; heads)
  CUTE_HOST static dim3 grid(Sequences const& sequences, int heads) {
    constexpr int kHeads = collective::GateTile::kHeads;
    PackedTiles const tiles{sequences, piece_tokens(sequences)};
    std::int64_t const blocks = sequences.packed() ? tiles.most() : num_slots(sequences);
    return dim3(static_cast<unsigned>(blocks),
                static_cast<unsigned>((heads + kHeads - 1) / kHeads));
  }
};

/// Of a piece of a chunk, dL of the tokens before its first reset.
struct GatePieceSum {
  double sum;
  std::int64_t resets;  // not 0 where there are any
};

struct GateGradientSums : OneItem<GateGradientSums> {
  using Tile = collective::GateTile;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = 4;

  struct SharedStorage {
    float tile[Tile::kSize];
    float log_gate[Tile::kSize];
  };

  struct Params {
    float const* d_gate;    // [b, t, h] the gradient of the cumulative log gate
    float const* log_gate;  // [b, t, h]
    TokenStride d_gate_stride;
    TokenStride log_gate_stride;
    GatePieceSum* sums;  // [h, slots of pieces]
    Sequences sequences;
    int heads;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return GatePiece::grid(params.sequences, params.heads);
  }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return GatePiece::turn_blocks(params.sequences);
  }
  CUTE_DEVICE static int count(Params const& params) { return GatePiece::count(params.sequences); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    GatePiece const piece(params.sequences, params.heads, number);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    if (piece.tokens <= 0) {
      return;
    }
    Tile::Part const part(params.d_gate_stride, thread);
    float const* source =
        params.d_gate + part.offset +
        params.d_gate_stride.at(piece.sequence, piece.first_token, piece.first_head);
    Tile::Part const gate_part(params.log_gate_stride, thread);
    float const* gate_source =
        params.log_gate + gate_part.offset +
        params.log_gate_stride.at(piece.sequence, piece.first_token, piece.first_head);
    float next[Tile::kLoads], next_gate[Tile::kLoads];
    part.load(source, piece.heads, piece.tokens, next);
    gate_part.load(gate_source, piece.heads, piece.tokens, next_gate);
    int const first = Tile::position(warp, Tile::kLaneTokens * lane);
    double sum = 0.0;
    bool resets = false;  // the same in all of a warp
#pragma unroll 1
    for (int left = piece.tokens; left > 0; left -= Tile::kTokens) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        shared.tile[part.position(i)] = next[i];
        shared.log_gate[gate_part.position(i)] = next_gate[i];
      }
      source += Tile::kTokens * params.d_gate_stride.token;
      gate_source += Tile::kTokens * params.log_gate_stride.token;
      part.load(source, piece.heads, left - Tile::kTokens, next);
      gate_part.load(gate_source, piece.heads, left - Tile::kTokens, next_gate);
      __syncthreads();
      double own = 0.0;
      bool own_resets = false;
#pragma unroll
      for (int i = 0; i < Tile::kLaneTokens; ++i) {
        own_resets = own_resets || detail::is_reset(shared.log_gate[first + i]);
        own += own_resets ? 0.0 : double{shared.tile[first + i]};
      }
      unsigned const lanes = __ballot_sync(0xffffffffu, static_cast<int>(own_resets));
      // Whether any lane before this one has a reset.
      bool const is_behind = resets || (lanes & ((1u << lane) - 1)) != 0;
      sum += is_behind ? 0.0 : own;
      resets = resets || lanes != 0;
      __syncthreads();
    }
    sum = detail::reduce_warp(sum, detail::Plus{});
    if (warp < piece.heads && lane == 0) {
      params.sums[(piece.first_head + warp) * GatePiece::num_slots(params.sequences) +
                  piece.sum_slot] = {sum, resets};
    }
  }
};

struct GateGradient : OneItem<GateGradient> {
  using Tile = collective::GateTile;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kMinBlocks = 3;
  static constexpr int kParts = 16;  // of the products of `StateProducts`, one a lane

  struct SharedStorage {
    float tile[Tile::kSize];
    float log_gate[Tile::kSize];
  };

  struct Params {
    float const* d_gate;        // [b, t, h] the gradient of the cumulative log gate
    float const* log_gate;      // [b, t, h]
    float* d_log_gate;          // [b, t, h]
    TokenStride d_gate_stride;  // of state_d_gate as well
    TokenStride log_gate_stride;
    TokenStride d_log_gate_stride;
    float const* state_d_gate;  // [b, t, h] k . dk / 2 of the state after the chunk; null for none
    GatePieceSum const* sums;   // [h, slots of pieces]; unused where chunks are one
    double const* products;     // [slots, h, kParts]; null for none
    bool products_of_single_chunks;  // whether sequences of one chunk have them as well
    Sequences sequences;
    int heads;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return GatePiece::grid(params.sequences, params.heads);
  }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return GatePiece::turn_blocks(params.sequences);
  }
  CUTE_DEVICE static int count(Params const& params) { return GatePiece::count(params.sequences); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    GatePiece const piece(params.sequences, params.heads, number);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    if (piece.tokens <= 0) {
      return;
    }
    int const last_tile = (piece.tokens - 1) / Tile::kTokens * Tile::kTokens;
    auto const last = [&](TokenStride const& stride) {
      return stride.at(piece.sequence, piece.first_token + last_tile, piece.first_head);
    };
    Tile::Part const load_part(params.d_gate_stride, thread);
    Tile::Part const gate_part(params.log_gate_stride, thread);
    Tile::Part const store_part(params.d_log_gate_stride, thread);
    float const* source = params.d_gate + load_part.offset + last(params.d_gate_stride);
    float const* gate_source = params.log_gate + gate_part.offset + last(params.log_gate_stride);
    float* target = params.d_log_gate + store_part.offset + last(params.d_log_gate_stride);
    float next[Tile::kLoads], next_gate[Tile::kLoads];
    load_part.load(source, piece.heads, piece.tokens - last_tile, next);
    gate_part.load(gate_source, piece.heads, piece.tokens - last_tile, next_gate);
    double carry = warp < piece.heads ? after(params, piece, warp, lane) : 0.0;
#pragma unroll 1
    for (int first = last_tile; first >= 0; first -= Tile::kTokens) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        shared.tile[load_part.position(i)] = next[i];
        shared.log_gate[gate_part.position(i)] = next_gate[i];
      }
      // The tile before arrives during the scan.
      source -= Tile::kTokens * params.d_gate_stride.token;
      gate_source -= Tile::kTokens * params.log_gate_stride.token;
      load_part.load(source, piece.heads, first > 0 ? Tile::kTokens : 0, next);
      gate_part.load(gate_source, piece.heads, first > 0 ? Tile::kTokens : 0, next_gate);
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
    double sum = 0.0;
    // In a sequence's last chunk, those without tokens have no sum.
    int const pieces = cute::ceil_div(piece.chunk_tokens, piece.size);
    GatePieceSum const* const sums = params.sums + (head * GatePiece::num_slots(params.sequences) +
                                                    piece.sum_slot - piece.index);
    bool resets = false;  // in those pieces; the same in all of a warp
#pragma unroll 1
    for (int start = piece.index + 1; start < pieces && !resets; start += 32) {
      int const index = start + lane;
      GatePieceSum const own = index < pieces ? sums[index] : GatePieceSum{0.0, 0};
      unsigned const lanes = __ballot_sync(0xffffffffu, static_cast<int>(own.resets != 0));
      sum += (lanes & ((1u << lane) - 1)) != 0 ? 0.0 : own.sum;
      resets = lanes != 0;
    }
    if (resets) {
      return detail::reduce_warp(sum, detail::Plus{});
    }
    if (params.state_d_gate != nullptr) {
      float const* const terms =
          params.state_d_gate + params.d_gate_stride.at(piece.sequence, piece.chunk_start, head);
#pragma unroll 4
      for (int token = lane; token < piece.chunk_tokens; token += 32) {
        sum += terms[token * params.d_gate_stride.token];
      }
    }
    if (params.products != nullptr && lane < kParts &&
        piece.has_product(params.products_of_single_chunks)) {
      sum += params.products[(piece.slot * params.heads + head) * kParts + lane];
    }
    return detail::reduce_warp(sum, detail::Plus{});
  }

  // Sums of one head's tile from each token on, in place, on top of `carry`, up to the next reset;
  // returns the first of them.
  CUTE_DEVICE static double scan(SharedStorage& shared, int head, int lane, double carry) {
    int const first = Tile::position(head, Tile::kLaneTokens * lane);
    float* const values = shared.tile + first;
    double inclusive = 0.0;
    bool resets = false;
#pragma unroll
    for (int i = Tile::kLaneTokens - 1; i >= 0; --i) {
      bool const is_reset = detail::is_reset(shared.log_gate[first + i]);
      resets = resets || is_reset;
      inclusive = is_reset ? 0.0 : inclusive + values[i];
    }
    // Of this lane, which is the lowest, and those behind it: which have a reset.
    unsigned const lanes = __ballot_sync(0xffffffffu, static_cast<int>(resets)) >> lane;
#pragma unroll
    for (unsigned delta = 1; delta < 32; delta *= 2) {
      double const behind = __shfl_down_sync(0xffffffffu, inclusive, delta);
      bool const reaches =
          static_cast<unsigned>(lane) + delta < 32 && (lanes & ((1u << delta) - 1)) == 0;
      inclusive = reaches ? inclusive + behind : inclusive;
    }
    inclusive += lanes == 0 ? carry : 0.0;
    double const behind = __shfl_down_sync(0xffffffffu, inclusive, 1);
    double sum = lane == 31 ? carry : behind;
#pragma unroll
    for (int i = Tile::kLaneTokens - 1; i >= 0; --i) {
      sum = detail::is_reset(shared.log_gate[first + i]) ? 0.0 : sum + values[i];
      values[i] = static_cast<float>(sum);
    }
    return __shfl_sync(0xffffffffu, inclusive, 0);
  }
};

}  // namespace retention::kernel
