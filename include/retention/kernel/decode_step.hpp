// A step of decoding: the next 1 to 16 tokens of every sequence of a batch join its ring, and their
// queries read state and ring,
//
//   o_i = (e^{L_i} phi(q_i) S + sum_j w_ij v_j) / (e^{L_i} phi(q_i) z + sum_j w_ij),
//   w_ij = (q_i . k_j)^2 e^{sum of the log gates of j + 1 ... i},
//
// with L_i the log gates of the ring up to token i. A token costs the bytes of S, so S is read once
// for all query heads of a key head and all new tokens.
//
// A batch that does not fill the device is split: blocks take slices of the state's block pairs,
// one more takes the ring, and the last of a head to arrive adds up what they found, in their
// order.
//
// Products with the state are mma.m16n8k16 in bf16 for both element types, since the high plane is
// bf16: M = 16 query rows, of the new tokens and the heads of a group, K = state rows. phi is made
// in fp32 and rounded once, in the order of expand_apply.hpp. Everything else is fp32.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"
#include "retention/detail/packed.hpp"
#include "retention/detail/reduce.hpp"
#include "retention/kernel/decode_arrival.hpp"
#include "retention/kernel/decode_pool.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::kernel {

template <class Element_>
struct DecodeStepParams {
  using Element = Element_;

  // [rows, tokens, heads, *], or packed, [total, heads, *], with `cu_seqlens`
  Element const* query;
  Element const* key;
  Element const* value;
  float const* log_gate;  // null without gates
  Element* output;
  TokenStride query_stride;
  TokenStride key_stride;
  TokenStride value_stride;
  TokenStride gate_stride;
  TokenStride output_stride;
  int const* cu_seqlens;  // [rows + 1], or null
  int const* slots;       // [rows]
  int rows;
  int tokens;  // in a row, or at most where they are packed
  int heads;
  int group;  // query heads of a key head
  DecodePool<Element> pool;
  // Blocks of a head: 1, or one for each slice of `slice_pairs` block pairs and one for the ring.
  int parts;
  int slice_pairs;
  float* partial;      // [rows, heads, parts, tokens * group, dv + 1], where there are several
  unsigned* arrivals;  // [rows * heads + rows], zeros before and after
};

template <class Element_, int HeadDim, int ValueDim, int MmaRows>
struct DecodeStep {
  using Element = Element_;
  using Params = DecodeStepParams<Element>;
  using Power = SymmetricPower<HeadDim, 2>;
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;

  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMinBlocks = 2;
  static constexpr int kMaxTokens = 16;
  static constexpr int kRows = 16 * MmaRows;  // queries at one time
  // Warps share the 64 rows of a block pair, or the queries.
  static constexpr int kRowWarps = MmaRows;
  static constexpr int kPairWarps = kWarps / kRowWarps;
  static constexpr int kTileRows = 64;
  static constexpr int kStages = 4;
  static constexpr int kBlocks = HeadDim / 8;
  static constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
  static constexpr int kStateDim = kPairs * kTileRows;
  static constexpr int kRingTile = 32;
  static constexpr int kPitch = HeadDim + 2;  // of keys: lanes read words of different banks
  static constexpr int kColumnGroups = kThreads / ValueDim;
  static constexpr int kGroupRows = kRows / kColumnGroups;
  static_assert(MmaRows == 1 || MmaRows == 2 || MmaRows == 4, "warps share queries evenly");
  static_assert(kStateDim == Power::kStateDim, "one order of the state");

  using StateLayout = collective::StagedTileLayout<kTileRows, ValueDim, kStages>;

  struct StateTiles {
    alignas(128) cute::bfloat16_t rows[cute::cosize_v<StateLayout>];
    float key_sum[kStages][kTileRows];
  };

  struct RingTile {
    Element key[kRingTile * kPitch];
    Element value[kRingTile * ValueDim];
    float weight[kRows][kRingTile + 1];
  };

  struct SharedStorage {
    union {
      StateTiles state;
      float products[kPairWarps][kRows][ValueDim];  // of the warps
      RingTile tile;
    };
    alignas(16) float query[kRows][HeadDim];
    float normalizer[kWarps][kRows];
    float ring_normalizer[kRows];
    float since_start[kMaxTokens];          // log gates of the new tokens up to each
    float between[kMaxTokens][kMaxTokens];  // of those after j up to i
    float after[kRingTile];                 // of those after each of a tile, up to the new ones
    float warp_sum[kWarps];
    int is_last;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.rows) * params.heads * params.parts);
  }

  /// One block's view of its sequence.
  struct Work {
    int row;
    int head;
    int part;
    int slot;
    std::int64_t first_token;
    int tokens;
    Cursor cursor;
    float old_gates;  // log gates of all tokens in the ring

    CUTE_DEVICE int queries(Params const& params) const { return tokens * params.group; }
  };

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    auto& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = static_cast<int>(threadIdx.x);
    int const block = static_cast<int>(blockIdx.x);
    Work work;
    work.part = block % params.parts;
    work.head = block / params.parts % params.heads;
    work.row = block / params.parts / params.heads;
    work.slot = params.slots[work.row];
    int const first = params.cu_seqlens == nullptr ? 0 : params.cu_seqlens[work.row];
    work.first_token = first;
    work.tokens =
        params.cu_seqlens == nullptr ? params.tokens : params.cu_seqlens[work.row + 1] - first;
    bool const there = params.pool.has(work.slot);
    if (there) {
      work.cursor = *params.pool.cursor(work.slot);
    }
    // What nobody could ask for is not done: more tokens than there is room for in the ring.
    int const given = work.tokens;
    int const room = there ? params.pool.ring - work.cursor.length : 0;
    work.tokens = cute::min(cute::min(given, room), cute::min(params.tokens, int{kMaxTokens}));
    if (work.tokens < given && work.part == 0) {
      store_zeros(params, work, cute::max(work.tokens, 0), given, thread);
    }
    if (work.tokens <= 0) {
      return;
    }
    sum_gates(params, shared, work, thread);

    bool const reads_ring = params.parts == 1 || work.part == params.parts - 1;
    bool const reads_state = params.parts == 1 || !reads_ring;
    int const queries = work.queries(params);
    for (int start = 0; start < queries; start += kRows) {
      load_queries(params, shared, work, start, thread);
      __syncthreads();
      // Of thread c + ValueDim * i, rows i, i + kColumnGroups, ... of column c.
      float sums[kGroupRows];
      clear(sums);
      if (reads_state && work.cursor.folded > 0) {
        apply_state(params, shared, work, start, thread, sums);
      } else {
        clear_normalizers(shared, thread);
      }
      if (reads_ring) {
        read_ring(params, shared, work, start, thread, sums);
      }
      __syncthreads();
      finish(params, shared, work, start, thread, sums);
      __syncthreads();
    }
    if (reads_ring) {
      append(params, work, thread);
    }
    arrive(params, shared, work, thread);
  }

 private:
  CUTE_DEVICE static void clear(float (&sums)[kGroupRows]) {
#pragma unroll
    for (float& sum : sums) {
      sum = 0.0f;
    }
  }

  CUTE_DEVICE static void clear_normalizers(SharedStorage& shared, int thread) {
    for (int i = thread; i < kWarps * kRows; i += kThreads) {
      shared.normalizer[i / kRows][i % kRows] = 0.0f;
    }
  }

  /// Element `e` of a token's row in a tensor of `heads`.
  template <class T>
  CUTE_DEVICE static T* row_of(T* data, TokenStride const& stride, Params const& params,
                               Work const& work, int token, int head) {
    std::int64_t const batch = params.cu_seqlens == nullptr ? work.row : 0;
    return data + batch * stride.batch + (work.first_token + token) * stride.token +
           head * stride.head;
  }

  CUTE_DEVICE static void store_zeros(Params const& params, Work const& work, int from, int to,
                                      int thread) {
    int const columns = params.group * ValueDim;
    for (int i = from * columns + thread; i < to * columns; i += kThreads) {
      int const head = work.head * params.group + i % columns / ValueDim;
      *(row_of(params.output, params.output_stride, params, work, i / columns, head) +
        i % ValueDim) = Element(0.0f);
    }
  }

  /// Sums of gates, never their differences: one of them may be -inf.
  CUTE_DEVICE static void sum_gates(Params const& params, SharedStorage& shared, Work& work,
                                    int thread) {
    bool const gated = params.log_gate != nullptr;
    float sum = 0.0f;
    if (gated) {
      float const* gates = params.pool.log_gates.at(work.slot, work.head);
      for (int i = thread; i < work.cursor.length; i += kThreads) {
        sum += gates[params.pool.place(work.cursor, i)];
      }
      sum = detail::reduce_warp(sum, detail::Plus{});
    }
    if (thread % 32 == 0) {
      shared.warp_sum[thread / 32] = sum;
    }
    for (int i = thread; i < kMaxTokens * kMaxTokens; i += kThreads) {
      int const query = i / kMaxTokens, key = i % kMaxTokens;
      float between = 0.0f;
      for (int t = key + 1; gated && t <= query && query < work.tokens; ++t) {
        between += *row_of(params.log_gate, params.gate_stride, params, work, t, work.head);
      }
      shared.between[query][key] = between;
      if (key == 0 && query < work.tokens) {
        float const own =
            gated ? *row_of(params.log_gate, params.gate_stride, params, work, 0, work.head) : 0.0f;
        shared.since_start[query] = own + between;
      }
    }
    __syncthreads();
    work.old_gates =
        shared.warp_sum[0] + shared.warp_sum[1] + (shared.warp_sum[2] + shared.warp_sum[3]);
  }

  /// Queries of one magnitude, in fp32: that of a row cancels in its output.
  CUTE_DEVICE static void load_queries(Params const& params, SharedStorage& shared,
                                       Work const& work, int start, int thread) {
    int const lane = thread % 32;
    for (int m = thread / 32; m < kRows; m += kWarps) {
      int const query = start + m;
      bool const there = query < work.queries(params);
      float x[HeadDim / 32];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i) {
        x[i] = 0.0f;
        if (there) {
          Element const* source =
              row_of(params.query, params.query_stride, params, work, query / params.group,
                     work.head * params.group + query % params.group);
          x[i] = float(source[lane + 32 * i]);
        }
        largest = fmaxf(largest, fabsf(x[i]));
      }
      largest = detail::reduce_warp(largest, detail::Maximum{});
      int exponent = 0;
      if (largest > 0.0f && largest <= 3.4e38f) {
        frexpf(largest, &exponent);
      }
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i) {
        shared.query[m][lane + 32 * i] = ldexpf(x[i], -exponent);
      }
    }
  }

  // ---- The state --------------------------------------------------------------------------------

  // In a tile the rows of the state are in the order of k: those that ldmatrix needs at once are
  // neighbours, and free of bank conflicts.
  CUTE_HOST_DEVICE static constexpr int tile_row(int row) {
    return (row & ~15) | (row & 4) << 1 | (row & 3) << 1 | (row & 8) >> 3;
  }

  struct PairLoader {
    cute::bfloat16_t const* state;
    float const* key_sum;
    int next;
    int end;

    /// Starts the copy of the next block pair, if there is one.
    CUTE_DEVICE void load(SharedStorage& shared, int stage, int thread) {
      if (next < end) {
        constexpr int kPieces = ValueDim / 8;
        cute::bfloat16_t const* source = state + std::int64_t{next} * kTileRows * ValueDim;
#pragma unroll
        for (int piece = thread; piece < kTileRows * kPieces; piece += kThreads) {
          cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
              *reinterpret_cast<cute::uint128_t const*>(source + 8 * piece),
              *reinterpret_cast<cute::uint128_t*>(
                  shared.state.rows +
                  StateLayout{}(tile_row(piece / kPieces), piece % kPieces * 8, stage)));
        }
        if (thread < kTileRows / 4) {
          cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
              *reinterpret_cast<cute::uint128_t const*>(key_sum + next * kTileRows + 4 * thread),
              *reinterpret_cast<cute::uint128_t*>(&shared.state.key_sum[stage][4 * thread]));
        }
        ++next;
      }
      cute::cp_async_fence();
    }
  };

  CUTE_DEVICE static void apply_state(Params const& params, SharedStorage& shared, Work const& work,
                                      int start, int thread, float (&sums)[kGroupRows]) {
    int const lane = thread % 32, warp = thread / 32;
    int const group = lane / 4, quad = lane % 4;
    int const row_warp = warp % kRowWarps, pair_warp = warp / kRowWarps;
    int const first_pair = params.parts == 1 ? 0 : work.part * params.slice_pairs;
    int const end_pair =
        params.parts == 1 ? kPairs : cute::min(first_pair + params.slice_pairs, int{kPairs});
    PairLoader loader{params.pool.high.at(work.slot, work.head),
                      params.pool.key_sum.at(work.slot, work.head), first_pair, end_pair};
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      loader.load(shared, stage, thread);
    }
    float output[ValueDim / 8][4] = {};
    float normalizer[2] = {};
    float const* rows[2] = {shared.query[16 * row_warp + group],
                            shared.query[16 * row_warp + group + 8]};
    int stage = 0;
    int J = 0;
    while ((J + 1) * (J + 2) / 2 <= first_pair) {
      ++J;
    }
    int I = first_pair - J * (J + 1) / 2;
#pragma unroll 1
    for (int pair = first_pair; pair < end_pair; ++pair) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      loader.load(shared, stage == 0 ? kStages - 1 : stage - 1, thread);
#pragma unroll
      for (int step = 0; step < 4 / kPairWarps; ++step) {
        int const k = pair_warp + kPairWarps * step;
        // Of k = 8 x + 2 t + s: element 2 k + s of block I and t + 4 x of block J.
        std::uint32_t a[4];
        float const* key_sum = shared.state.key_sum[stage] + 16 * k;
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          float const outer[2] = {rows[upper][8 * I + 2 * k], rows[upper][8 * I + 2 * k + 1]};
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            float const native = rows[upper][8 * J + quad + 4 * x];
            float const phi[2] = {outer[0] * native, outer[1] * native};
            normalizer[upper] +=
                phi[0] * key_sum[quad + 4 * x] + phi[1] * key_sum[8 + quad + 4 * x];
            a[2 * x + upper] = detail::pack<cute::bfloat16_t>(phi[0], phi[1]);
          }
        }
        cute::Tensor b =
            cute::make_tensor<cute::bfloat16_t>(cute::Shape<cute::_4, cute::Int<ValueDim / 8>>{});
        collective::load_rows_transposed(shared.state.rows, StateLayout{}, 16 * k, 0, stage, lane,
                                         b);
        cute::Tensor registers = cute::recast<std::uint32_t>(b);
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          float (&c)[4] = output[n];
          Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], registers(0, n), registers(1, n),
                   c[0], c[1], c[2], c[3]);
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
      if (++I > J) {
        I = 0;
        ++J;
      }
    }
    cute::cp_async_wait<0>();
    __syncthreads();  // the tiles are free for products

#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int const row = 16 * row_warp + group + 8 * upper;
#pragma unroll
      for (int n = 0; n < ValueDim / 8; ++n) {
        float* target = &shared.products[pair_warp][row][8 * n + 2 * quad];
        target[0] = output[n][2 * upper];
        target[1] = output[n][2 * upper + 1];
      }
      normalizer[upper] += __shfl_xor_sync(0xffffffffu, normalizer[upper], 1);
      normalizer[upper] += __shfl_xor_sync(0xffffffffu, normalizer[upper], 2);
      if (quad == 0) {
        shared.normalizer[pair_warp][row] = normalizer[upper];
      }
    }
    for (int i = thread; i < (kWarps - kPairWarps) * kRows; i += kThreads) {
      shared.normalizer[kPairWarps + i / kRows][i % kRows] = 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      int const m = thread / ValueDim + kColumnGroups * i;
      float const decay = state_decay(params, shared, work, start + m);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kPairWarps; ++w) {
        sum += shared.products[w][m][thread % ValueDim];
      }
      sums[i] = decay * sum;
    }
    __syncthreads();  // products are free for the ring
  }

  CUTE_DEVICE static float state_decay(Params const& params, SharedStorage const& shared,
                                       Work const& work, int query) {
    int const token = query / params.group;
    return token < work.tokens ? expf(work.old_gates + shared.since_start[token]) : 0.0f;
  }

  // ---- The ring ---------------------------------------------------------------------------------

  /// The new tokens, then those in the ring from the newest to the oldest, so that decays are sums
  /// of the gates passed so far.
  CUTE_DEVICE static void read_ring(Params const& params, SharedStorage& shared, Work const& work,
                                    int start, int thread, float (&sums)[kGroupRows]) {
    for (int m = thread; m < kRows; m += kThreads) {
      shared.ring_normalizer[m] = 0.0f;
    }
    load_new(params, shared, work, thread);
    __syncthreads();
    int const rows = cute::min(work.queries(params) - start, int{kRows});
    add_tile(params, shared, start, rows, true, work.tokens, thread, sums);
    float passed = 0.0f;
    for (int end = work.cursor.length; end > 0; end -= kRingTile) {
      int const first = cute::max(end - kRingTile, 0);
      __syncthreads();
      passed = load_old(params, shared, work, first, end - first, passed, thread);
      __syncthreads();
      add_tile(params, shared, start, rows, false, end - first, thread, sums);
    }
  }

  CUTE_DEVICE static void load_new(Params const& params, SharedStorage& shared, Work const& work,
                                   int thread) {
    for (int i = thread; i < work.tokens * HeadDim / 2; i += kThreads) {
      int const token = i / (HeadDim / 2), pair = i % (HeadDim / 2);
      *reinterpret_cast<std::uint32_t*>(shared.tile.key + token * kPitch + 2 * pair) =
          *(reinterpret_cast<std::uint32_t const*>(
                row_of(params.key, params.key_stride, params, work, token, work.head)) +
            pair);
    }
    for (int i = thread; i < work.tokens * ValueDim / 2; i += kThreads) {
      int const token = i / (ValueDim / 2), pair = i % (ValueDim / 2);
      *reinterpret_cast<std::uint32_t*>(shared.tile.value + token * ValueDim + 2 * pair) =
          *(reinterpret_cast<std::uint32_t const*>(
                row_of(params.value, params.value_stride, params, work, token, work.head)) +
            pair);
    }
  }

  /// Tokens `first` and on of the ring. Returns the log gates passed when they have been read.
  CUTE_DEVICE static float load_old(Params const& params, SharedStorage& shared, Work const& work,
                                    int first, int count, float passed, int thread) {
    DecodePool<Element> const& pool = params.pool;
    Element const* keys = pool.keys.at(work.slot, work.head);
    Element const* values = pool.values.at(work.slot, work.head);
    for (int i = thread; i < count * HeadDim / 2; i += kThreads) {
      int const token = i / (HeadDim / 2), pair = i % (HeadDim / 2);
      std::int64_t const place = pool.place(work.cursor, first + token);
      *reinterpret_cast<std::uint32_t*>(shared.tile.key + token * kPitch + 2 * pair) =
          *(reinterpret_cast<std::uint32_t const*>(keys + place * HeadDim) + pair);
    }
    for (int i = thread; i < count * ValueDim / 2; i += kThreads) {
      int const token = i / (ValueDim / 2), pair = i % (ValueDim / 2);
      std::int64_t const place = pool.place(work.cursor, first + token);
      *reinterpret_cast<std::uint32_t*>(shared.tile.value + token * ValueDim + 2 * pair) =
          *(reinterpret_cast<std::uint32_t const*>(values + place * ValueDim) + pair);
    }
    if (params.log_gate == nullptr) {
      if (thread < count) {
        shared.after[thread] = 0.0f;
      }
      return 0.0f;
    }
    // Every warp for itself: all of them need the total.
    int const lane = thread % 32;
    float const gate =
        lane < count
            ? pool.log_gates.at(work.slot, work.head)[pool.place(work.cursor, first + lane)]
            : 0.0f;
    float from = gate;  // and those after it in the tile
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      float const later = __shfl_down_sync(0xffffffffu, from, static_cast<unsigned>(lanes));
      from += lane + lanes < 32 ? later : 0.0f;
    }
    float const after = __shfl_down_sync(0xffffffffu, from, 1);
    if (thread < count) {
      shared.after[thread] = passed + (lane < 31 ? after : 0.0f);
    }
    return passed + __shfl_sync(0xffffffffu, from, 0);
  }

  /// Adds what the queries read from a tile of `count` tokens.
  CUTE_DEVICE static void add_tile(Params const& params, SharedStorage& shared, int start, int rows,
                                   bool is_new, int count, int thread, float (&sums)[kGroupRows]) {
    int const lane = thread % 32;
    for (int m = thread / 32; m < rows; m += kWarps) {
      int const token = (start + m) / params.group;
      float weight = 0.0f;
      if (lane < count && (!is_new || lane <= token)) {
        float score = 0.0f;
#pragma unroll 8
        for (int i = 0; i < HeadDim / 2; ++i) {
          std::uint32_t const pair =
              *reinterpret_cast<std::uint32_t const*>(shared.tile.key + lane * kPitch + 2 * i);
          score += shared.query[m][2 * i] * detail::unpack_lo<Element>(pair);
          score += shared.query[m][2 * i + 1] * detail::unpack_hi<Element>(pair);
        }
        float const gates =
            is_new ? shared.between[token][lane] : shared.after[lane] + shared.since_start[token];
        weight = score * score * expf(gates);
      }
      shared.tile.weight[m][lane] = weight;
      weight = detail::reduce_warp(weight, detail::Plus{});
      if (lane == 0) {
        shared.ring_normalizer[m] += weight;
      }
    }
    __syncthreads();
    int const column = thread % ValueDim;
    for (int token = 0; token < count; ++token) {
      float const value = float(shared.tile.value[token * ValueDim + column]);
#pragma unroll
      for (int i = 0; i < kGroupRows; ++i) {
        int const m = thread / ValueDim + kColumnGroups * i;
        if (m < rows) {
          sums[i] += shared.tile.weight[m][token] * value;
        }
      }
    }
  }

  /// The new tokens join the ring of their head.
  CUTE_DEVICE static void append(Params const& params, Work const& work, int thread) {
    DecodePool<Element> const& pool = params.pool;
    Element* keys = pool.keys.at(work.slot, work.head);
    Element* values = pool.values.at(work.slot, work.head);
    for (int i = thread; i < work.tokens * HeadDim; i += kThreads) {
      std::int64_t const place = pool.place(work.cursor, work.cursor.length + i / HeadDim);
      keys[place * HeadDim + i % HeadDim] =
          row_of(params.key, params.key_stride, params, work, i / HeadDim, work.head)[i % HeadDim];
    }
    for (int i = thread; i < work.tokens * ValueDim; i += kThreads) {
      std::int64_t const place = pool.place(work.cursor, work.cursor.length + i / ValueDim);
      values[place * ValueDim + i % ValueDim] = row_of(params.value, params.value_stride, params,
                                                       work, i / ValueDim, work.head)[i % ValueDim];
    }
    if (params.log_gate != nullptr && thread < work.tokens) {
      pool.log_gates.at(work.slot,
                        work.head)[pool.place(work.cursor, work.cursor.length + thread)] =
          *row_of(params.log_gate, params.gate_stride, params, work, thread, work.head);
    }
  }

  // ---- What comes of it -------------------------------------------------------------------------

  /// A part's numerators and normalizers of the queries from `start` on.
  CUTE_DEVICE static float* partial_of(Params const& params, Work const& work, int part,
                                       int query) {
    std::int64_t const head = std::int64_t{work.row} * params.heads + work.head;
    return params.partial +
           ((head * params.parts + part) * params.tokens * params.group + query) * (ValueDim + 1);
  }

  CUTE_DEVICE static void finish(Params const& params, SharedStorage const& shared,
                                 Work const& work, int start, int thread,
                                 float const (&sums)[kGroupRows]) {
    bool const reads_ring = params.parts == 1 || work.part == params.parts - 1;
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      int const m = thread / ValueDim + kColumnGroups * i, column = thread % ValueDim;
      int const query = start + m;
      if (query < work.queries(params)) {
        float normalizer = 0.0f;
#pragma unroll
        for (int w = 0; w < kPairWarps; ++w) {
          normalizer += shared.normalizer[w][m];
        }
        normalizer *= state_decay(params, shared, work, query);
        normalizer += reads_ring ? shared.ring_normalizer[m] : 0.0f;
        if (params.parts == 1) {
          store(params, work, query, column, sums[i], normalizer);
        } else {
          float* target = partial_of(params, work, work.part, query);
          target[column] = sums[i];
          if (column == 0) {
            target[ValueDim] = normalizer;
          }
        }
      }
    }
  }

  CUTE_DEVICE static void store(Params const& params, Work const& work, int query, int column,
                                float numerator, float normalizer) {
    Element* target = row_of(params.output, params.output_stride, params, work,
                             query / params.group, work.head * params.group + query % params.group);
    target[column] = Element(normalizer == 0.0f ? 0.0f : numerator / normalizer);
  }

  CUTE_DEVICE static void arrive(Params const& params, SharedStorage& shared, Work const& work,
                                 int thread) {
    if (params.parts > 1) {
      unsigned* counter = params.arrivals + std::int64_t{work.row} * params.heads + work.head;
      if (!is_last_arrival(shared.is_last, counter, params.parts, thread)) {
        return;
      }
      for (int i = thread; i < work.queries(params) * ValueDim; i += kThreads) {
        int const query = i / ValueDim, column = i % ValueDim;
        float numerator = 0.0f, normalizer = 0.0f;
        for (int part = 0; part < params.parts; ++part) {
          float const* source = partial_of(params, work, part, query);
          numerator += source[column];
          normalizer += source[ValueDim];
        }
        store(params, work, query, column, numerator, normalizer);
      }
    }
    // Nobody needs the cursor as it was any more when the last head has come this far.
    unsigned* counter = params.arrivals + std::int64_t{params.rows} * params.heads + work.row;
    if (is_last_arrival(shared.is_last, counter, params.heads, thread) && thread == 0) {
      Cursor* cursor = params.pool.cursor(work.slot);
      cursor->length = work.cursor.length + work.tokens;
      cursor->seen = work.cursor.seen + work.tokens;
    }
  }
};

}  // namespace retention::kernel
