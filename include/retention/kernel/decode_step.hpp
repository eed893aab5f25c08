// A step of decoding: the next 1 to 16 tokens of every sequence of a batch join its ring, and their
// queries read state and ring,
//
//   o_i = (e^{L_i} phi(q_i) S + sum_j w_ij v_j) / (e^{L_i} phi(q_i) z + sum_j w_ij),
//   w_ij = (q_i . k_j)^2 e^{sum of the log gates of j + 1 ... i},
//
// with L_i the log gates of the ring up to token i. A token costs the bytes of S, so S is read once
// for all query heads of a key head and all new tokens.
//
// A batch that does not fill the device is split: every block of a head takes a slice of the
// state's block pairs and a share of the tokens that are read one by one, and the last of them to
// arrive adds up what they found, in their order.
//
// What a block reads comes as one stream through a few stages of shared memory, by cp.async:
// first the block pairs, then tiles of 32 tokens. It starts as soon as the slot's cursor is known,
// before queries and gates are, since at batch 1 a step is a chain of waits for memory and little
// else. Sums stay in the same registers all the way: between pairs and tokens they are decayed.
//
// Products with the state are mma.m16n8k16 in bf16 for both element types, since the high plane is
// bf16: M = 16 query rows, of the new tokens and the heads of a group, K = state rows. phi is made
// in fp32 and rounded once, in the order of expand_apply.hpp. Tokens take the same shape: their
// scores are products of the rows as they came, and the squares, in fp32, are two bf16 each, which
// one mma takes together: K = 8 tokens twice.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"
#include "retention/detail/dependent_launch.hpp"
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
  int total;              // tokens of packed tensors
  int const* slots;       // [rows]
  int rows;
  int tokens;  // in a row, or at most where they are packed
  int heads;
  int group;  // query heads of a key head
  DecodePool<Element> pool;
  int parts;  // blocks of a head, one for each slice of `slice_pairs` block pairs, at least two
  int slice_pairs;
  float* partial;      // [rows, heads, parts, tokens * group, dv + 4], where there are several
  unsigned* arrivals;  // [rows * heads + rows], zeros before and after
};

template <class Element_, int HeadDim, int ValueDim, int MmaRows>
struct DecodeStep {
  using Element = Element_;
  using Params = DecodeStepParams<Element>;
  using Power = SymmetricPower<HeadDim, 2>;
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  using ScoreMma = typename collective::MmaOperation<Element>::type;

  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMaxTokens = 16;
  static constexpr int kRows = 16 * MmaRows;  // queries at one time
  // Of their loads on the way the memory's bandwidth comes; with many queries it is not the limit.
  static constexpr bool kFewRegisters = HeadDim * MmaRows <= 64 && ValueDim == 64;
  static constexpr int kMinBlocks = ValueDim > 64 || HeadDim* MmaRows > 256 ? 2
                                    : kFewRegisters                         ? 4
                                                                            : 3;
  // Warps share the 64 rows of a block pair and the tokens of a tile, or the queries.
  static constexpr int kRowWarps = MmaRows;
  static constexpr int kPairWarps = kWarps / kRowWarps;
  static constexpr int kTileRows = 64;
  static constexpr int kTileTokens = 32;
  static constexpr int kStages = 4;
  static constexpr int kBlocks = HeadDim / 8;
  static constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
  static constexpr int kStateDim = kPairs * kTileRows;
  static constexpr int kQueryPitch = HeadDim + 4;     // eight rows and four columns: all banks
  static constexpr int kProductPitch = ValueDim + 8;  // likewise, of pairs of columns
  static constexpr int kPartialPitch = ValueDim + 4;  // numerators, the normalizer, and nothing
  // Of all blocks at one time, what the L2 cache holds.
  static constexpr int kPrefetchedPairs = 64 * 1024 / (kTileRows * ValueDim * 2);
  static constexpr bool kStartsEarly = true;
  static_assert(MmaRows == 1 || MmaRows == 2 || MmaRows == 4, "warps share queries evenly");
  static_assert(kStateDim == Power::kStateDim, "one order of the state");

  using StateLayout = collective::StagedTileLayout<kTileRows, ValueDim, 1>;
  using KeyLayout = collective::StagedTileLayout<kTileTokens, HeadDim, 1>;
  using ValueLayout = collective::StagedTileLayout<kTileTokens, ValueDim, 1>;

  struct TokenTile {
    alignas(128) Element key[kTileTokens * HeadDim];
    alignas(128) Element value[kTileTokens * ValueDim];
  };

  /// A block pair, or a tile of tokens.
  struct Stage {
    union {
      alignas(128) cute::bfloat16_t rows[kTileRows * ValueDim];
      TokenTile tokens;
    };
    float sums[kTileRows];  // of keys, by state rows; or the tokens' log gates
  };

  // Of parts, a row for each and a query, that fit where the stages were.
  static constexpr int kMergedRows =
      static_cast<int>(kStages * sizeof(Stage) / (kPartialPitch * sizeof(float)));
  static_assert(kMergedRows >= kPairs / 2, "all parts of a query");

  struct SharedStorage {
    union {
      Stage stage[kStages];
      float products[kPairWarps][kRows][kProductPitch];  // of the warps
      float merged[kMergedRows][kPartialPitch];
    };
    alignas(16) float query[kRows][kQueryPitch];
    float normalizer[kPairWarps][kRows];
    float new_gate[kMaxTokens];
    float since_start[kMaxTokens];          // log gates of the new tokens up to each
    float between[kMaxTokens][kMaxTokens];  // of those after j up to i
    float old_gates[kWarps];                // of the ring, in parts
    float passed[kWarps];                   // of its tokens that are newer than this block's
    int is_last;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.rows) * params.heads * params.parts);
  }

  /// One block's view of its sequence, and its share.
  struct Work {
    int row;
    int head;
    int part;
    int slot;
    std::int64_t first_token;
    int tokens;
    Cursor cursor;
    // What it reads: `pairs` block pairs, none of an empty state, and then tiles of tokens, of
    // which 0 has the new ones, and from 1 on they have those in the ring, the newest first.
    int first_pair;
    int pairs;
    int first_tile;
    int items;

    CUTE_DEVICE int queries(Params const& params) const { return tokens * params.group; }
    /// The first token of the ring in a tile, and how many there are.
    CUTE_DEVICE int tile_start(int tile) const {
      return cute::max(cursor.length - tile * kTileTokens, 0);
    }
    CUTE_DEVICE int tile_tokens(int tile) const {
      return tile == 0 ? tokens : tile_start(tile - 1) - tile_start(tile);
    }
  };

  /// Of a lane's rows, its warp's `group` and `group + 8`, as mma leaves them.
  struct Sums {
    float numerator[ValueDim / 8][4];
    float normalizer[2];
  };

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    auto& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = static_cast<int>(threadIdx.x);
    int const block = static_cast<int>(blockIdx.x);
    Work work;
    work.part = block % params.parts;
    work.head = block / params.parts % params.heads;
    work.row = block / params.parts / params.heads;
    detail::let_next_kernel_start();
    if (thread < 32) {
      prefetch(params, work, thread);
    }
    detail::wait_for_earlier_kernels();
    work.slot = params.slots[work.row];
    work.first_token = 0;
    work.tokens = params.tokens;
    if (params.cu_seqlens != nullptr) {
      // Nobody on the host has read these: whatever they are, no access may leave the tensors.
      auto const bound = [&](int row) {
        return cute::min(cute::max(params.cu_seqlens[row], 0), params.total);
      };
      work.first_token = bound(work.row);
      work.tokens = bound(work.row + 1) - static_cast<int>(work.first_token);
    }
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
    bool const has_state = work.cursor.folded > 0;
    work.first_pair = work.part * params.slice_pairs;
    work.pairs = has_state ? cute::min(params.slice_pairs, kPairs - work.first_pair) : 0;
    int const tiles = 1 + cute::ceil_div(work.cursor.length, int{kTileTokens});
    work.first_tile = tiles * work.part / params.parts;
    work.items = work.pairs + tiles * (work.part + 1) / params.parts - work.first_tile;

    int const queries = work.queries(params);
    // Of a whole head, the block says at once that it has read the cursor, and waits for the answer
    // at its end; of a part, when it says that its sums are there.
    bool const whole = params.parts == 1;
    unsigned before = 0;
    for (int start = 0; start < queries; start += kRows) {
      if (start > 0) {
        __syncthreads();  // the products of those before have been read
      }
#pragma unroll 1
      for (int item = 0; item < kStages - 1; ++item) {
        load(params, shared.stage[item], work, item, thread);
      }
      load_queries(params, shared, work, start, thread);
      if (start == 0) {
        load_gates(params, shared, work, thread);
      }
      __syncthreads();
      if (start == 0) {
        sum_new_gates(shared, work, thread);
        if (whole && thread == 0) {
          before = arrive(row_counter(params, work), params.heads);
        }
      }
      Sums sums = {};
      read(params, shared, work, start, thread, sums);
      finish(params, shared, work, start, thread, sums);
    }
    if (!whole) {
      add_parts(params, shared, work, thread);
    } else if (thread == 0 && is_last(before, params.heads)) {
      move_cursor(params, work);
    }
  }

 private:
  /// What the block will most likely read, while earlier kernels are still at work: where rows are
  /// few, waits are what a step takes.
  CUTE_DEVICE static void prefetch(Params const& params, Work const& work, int lane) {
    int const slot = detail::guess(params.slots + work.row);
    if (params.parts == 1 || !params.pool.has(slot)) {
      return;
    }
    constexpr int kLine = 128;  // bytes
    detail::prefetch_line(params.pool.cursor(slot));
    for (int first = lane * kLine / 4; params.log_gate != nullptr && first < params.pool.ring;
         first += 32 * kLine / 4) {
      detail::prefetch_line(params.pool.log_gates.at(slot, work.head) + first);
    }
    if (lane > 0) {
      return;
    }
    int const first_pair = work.part * params.slice_pairs;
    int const pairs =
        cute::min(cute::min(params.slice_pairs, kPairs - first_pair), int{kPrefetchedPairs});
    DecodePool<Element> const& pool = params.pool;
    auto const fetch = [&](auto const* data, std::int64_t first, std::int64_t count) {
      detail::prefetch(data + first, static_cast<std::uint32_t>(count * sizeof(*data)));
    };
    fetch(pool.high.at(slot, work.head), std::int64_t{first_pair} * kTileRows * ValueDim,
          std::int64_t{pairs} * kTileRows * ValueDim);
    fetch(pool.key_sum.at(slot, work.head), std::int64_t{first_pair} * kTileRows,
          std::int64_t{pairs} * kTileRows);
    // Parts share the ring as it lies.
    int const tokens = cute::ceil_div(pool.ring, params.parts);
    int const first_token = work.part * tokens;
    int const count = cute::min(tokens, pool.ring - first_token);
    if (count > 0) {
      fetch(pool.keys.at(slot, work.head), std::int64_t{first_token} * HeadDim,
            std::int64_t{count} * HeadDim);
      fetch(pool.values.at(slot, work.head), std::int64_t{first_token} * ValueDim,
            std::int64_t{count} * ValueDim);
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
  CUTE_DEVICE static void load_gates(Params const& params, SharedStorage& shared, Work const& work,
                                     int thread) {
    bool const gated = params.log_gate != nullptr;
    if (thread < work.tokens) {
      shared.new_gate[thread] =
          gated ? *row_of(params.log_gate, params.gate_stride, params, work, thread, work.head)
                : 0.0f;
    }
    float old_gates = 0.0f, passed = 0.0f;
    if (gated) {
      float const* gates = params.pool.log_gates.at(work.slot, work.head);
      int const newer = work.tile_start(cute::max(work.first_tile - 1, 0));
      for (int i = thread; i < work.cursor.length; i += kThreads) {
        float const gate = gates[params.pool.place(work.cursor, i)];
        old_gates += gate;
        passed += i >= newer ? gate : 0.0f;
      }
      old_gates = detail::reduce_warp(old_gates, detail::Plus{});
      passed = detail::reduce_warp(passed, detail::Plus{});
    }
    if (thread % 32 == 0) {
      shared.old_gates[thread / 32] = old_gates;
      shared.passed[thread / 32] = passed;
    }
  }

  CUTE_DEVICE static void sum_new_gates(SharedStorage& shared, Work const& work, int thread) {
    for (int i = thread; i < work.tokens * kMaxTokens; i += kThreads) {
      int const query = i / kMaxTokens, key = i % kMaxTokens;
      float between = 0.0f;
      for (int t = key + 1; t <= query; ++t) {
        between += shared.new_gate[t];
      }
      shared.between[query][key] = between;
      if (key == 0) {
        shared.since_start[query] = shared.new_gate[0] + between;
      }
    }
  }

  CUTE_DEVICE static float total(float const (&of_warps)[kWarps]) {
    return of_warps[0] + of_warps[1] + (of_warps[2] + of_warps[3]);
  }

  CUTE_DEVICE static unsigned* row_counter(Params const& params, Work const& work) {
    return params.arrivals + std::int64_t{params.rows} * params.heads + work.row;
  }

  /// Nobody needs the cursor as it was any more when the row's last block has arrived.
  CUTE_DEVICE static void move_cursor(Params const& params, Work const& work) {
    Cursor* cursor = params.pool.cursor(work.slot);
    cursor->length += work.tokens;
    cursor->seen += work.tokens;
  }

  /// Queries of one magnitude, in fp32: that of a row cancels in its output.
  CUTE_DEVICE static void load_queries(Params const& params, SharedStorage& shared,
                                       Work const& work, int start, int thread) {
    constexpr int kWarpRows = kRows / kWarps;
    int const lane = thread % 32, warp = thread / 32;
    // All at once: it is one wait.
    float x[kWarpRows][HeadDim / 32];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      int const query = start + warp + kWarps * r;
      bool const there = query < work.queries(params);
      Element const* source =
          row_of(params.query, params.query_stride, params, work, query / params.group,
                 work.head * params.group + query % params.group);
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i) {
        x[r][i] = there ? float(source[lane + 32 * i]) : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i) {
        largest = fmaxf(largest, fabsf(x[r][i]));
      }
      largest = detail::reduce_warp(largest, detail::Maximum{});
      int exponent = 0;
      if (largest > 0.0f && largest <= 3.4e38f) {
        frexpf(largest, &exponent);
      }
      float const scale = detail::power_of_two(-exponent);
#pragma unroll
      for (int i = 0; i < HeadDim / 32; ++i) {
        shared.query[warp + kWarps * r][lane + 32 * i] = scale * x[r][i];
      }
    }
  }

  // ---- What is read -----------------------------------------------------------------------------

  // In a tile the rows of the state are in the order of k: those that ldmatrix needs at once are
  // neighbours, and free of bank conflicts.
  CUTE_HOST_DEVICE static constexpr int tile_row(int row) {
    return (row & ~15) | (row & 4) << 1 | (row & 3) << 1 | (row & 8) >> 3;
  }

  /// Starts the copy of an item, if there is one.
  CUTE_DEVICE static void load(Params const& params, Stage& stage, Work const& work, int item,
                               int thread) {
    if (item < work.pairs) {
      load_pair(params, stage, work, work.first_pair + item, thread);
    } else if (item < work.items) {
      load_tokens(params, stage, work, work.first_tile + item - work.pairs, thread);
    }
    cute::cp_async_fence();
  }

  template <class Target, class Source>
  CUTE_DEVICE static void copy_piece(Source const* source, Target* target) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
        *reinterpret_cast<cute::uint128_t const*>(source),
        *reinterpret_cast<cute::uint128_t*>(target));
  }

  CUTE_DEVICE static void load_pair(Params const& params, Stage& stage, Work const& work, int pair,
                                    int thread) {
    constexpr int kPieces = ValueDim / 8, kStepRows = kThreads / kPieces;
    int const row = thread / kPieces, column = thread % kPieces * 8;
    cute::bfloat16_t const* source = params.pool.high.at(work.slot, work.head) +
                                     std::int64_t{pair} * kTileRows * ValueDim + 8 * thread;
#pragma unroll
    for (int step = 0; step < kTileRows; step += kStepRows) {
      // Whole multiples of 16 rows lie a constant apart.
      copy_piece(source + step * ValueDim, stage.rows +
                                               StateLayout{}(tile_row(row + step % 16), column, 0) +
                                               StateLayout{}(step & ~15, 0, 0));
    }
    if (thread < kTileRows / 4) {
      copy_piece(params.pool.key_sum.at(work.slot, work.head) + pair * kTileRows + 4 * thread,
                 stage.sums + 4 * thread);
    }
  }

  /// A tile of tokens; what it has no tokens for is zeros.
  CUTE_DEVICE static void load_tokens(Params const& params, Stage& stage, Work work, int tile,
                                      int thread) {
    // Addresses of these few tiles would hold registers all through the loop over block pairs.
    thread = detail::recomputed(thread);
    work.slot = detail::recomputed(work.slot);
    work.head = detail::recomputed(work.head);
    DecodePool<Element> const& pool = params.pool;
    int const count = work.tile_tokens(tile);
    auto const load = [&](auto const& ring, Element const* data, TokenStride const& stride,
                          Element* target, auto layout) {
      constexpr int kPieces = decltype(cute::size<1>(layout))::value / 8;
      constexpr int kStepRows = kThreads / kPieces;
      int const row = thread / kPieces, column = thread % kPieces * 8;
      Element const* old = ring.at(work.slot, work.head);
#pragma unroll
      for (int step = 0; step < kTileTokens; step += kStepRows) {
        int const token = cute::min(row + step, count - 1);
        Element const* source =
            tile == 0 ? row_of(data, stride, params, work, token, work.head)
                      : old + std::int64_t{pool.place(work.cursor, work.tile_start(tile) + token)} *
                                  (8 * kPieces);
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<cute::uint128_t const*>(source + column),
            *reinterpret_cast<cute::uint128_t*>(target + layout(row, column, 0) +
                                                layout(step, 0, 0)),
            row + step < count);
      }
    };
    load(pool.keys, params.key, params.key_stride, stage.tokens.key, KeyLayout{});
    load(pool.values, params.value, params.value_stride, stage.tokens.value, ValueLayout{});
    if (params.log_gate != nullptr && thread < kTileTokens) {
      int const token = cute::min(thread, count - 1);
      float const* source =
          tile == 0 ? row_of(params.log_gate, params.gate_stride, params, work, token, work.head)
                    : pool.log_gates.at(work.slot, work.head) +
                          pool.place(work.cursor, work.tile_start(tile) + token);
      cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<std::uint32_t>::copy(
          *reinterpret_cast<std::uint32_t const*>(source),
          *reinterpret_cast<std::uint32_t*>(stage.sums + thread), thread < count);
    }
  }

  CUTE_DEVICE static void read(Params const& params, SharedStorage& shared, Work const& work,
                               int start, int thread, Sums& sums) {
    int const lane = thread % 32, warp = thread / 32;
    int const row = 16 * (warp % kRowWarps) + lane / 4;  // and that + 8
    float const* queries = shared.query[row];
    // Of a single token few rows are queries at all.
    bool const has_upper = start + 16 * (warp % kRowWarps) + 8 < work.queries(params);
    int J = 0;
    while ((J + 1) * (J + 2) / 2 <= work.first_pair) {
      ++J;
    }
    int I = work.first_pair - J * (J + 1) / 2;
    float passed = 0.0f;  // log gates of the ring's tokens after those of the next tile
#pragma unroll 1
    for (int item = 0; item < work.items; ++item) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      load(params, shared.stage[(item + kStages - 1) % kStages], work, item + kStages - 1, thread);
      Stage const& stage = shared.stage[item % kStages];
      if (item < work.pairs) {
        apply_pair(stage, queries, has_upper, I, J, warp / kRowWarps, lane, sums);
        if (++I > J) {
          I = 0;
          ++J;
        }
        if (item == work.pairs - 1) {
          decay(params, shared, work, start + row, sums);
        }
      } else {
        int const tile = work.first_tile + item - work.pairs;
        if (tile == 0 && start == 0) {
          append(params, stage, work, thread);
        }
        passed = item == work.pairs ? total(shared.passed) : passed;
        add_tokens(params, shared, stage, work, start, row, tile, warp / kRowWarps, lane, passed,
                   sums);
      }
    }
  }

  /// A query's token; rows that nobody asks for take the last one's gates.
  CUTE_DEVICE static int token_of(Params const& params, Work const& work, int query) {
    return cute::min(query / params.group, work.tokens - 1);
  }

  /// The state is from before all tokens of the ring.
  CUTE_DEVICE static void decay(Params const& params, SharedStorage const& shared, Work const& work,
                                int query, Sums& sums) {
    float const old_gates = total(shared.old_gates);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int const token = token_of(params, work, query + 8 * upper);
      float const decay = expf(old_gates + shared.since_start[token]);
      sums.normalizer[upper] *= decay;
#pragma unroll
      for (auto& c : sums.numerator) {
        c[2 * upper] *= decay;
        c[2 * upper + 1] *= decay;
      }
    }
  }

  /// Adds what the queries read from a block pair.
  CUTE_DEVICE static void apply_pair(Stage const& stage, float const* queries, bool has_upper,
                                     int I, int J, int pair_warp, int lane, Sums& sums) {
    int const quad = lane % 4;
#pragma unroll
    for (int step = 0; step < 4 / kPairWarps; ++step) {
      int const k = pair_warp + kPairWarps * step;
      // Of k = 8 x + 2 t + s: element 2 k + s of block I and t + 4 x of block J.
      std::uint32_t a[4] = {};
      float const* key_sum = stage.sums + 16 * k;
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        if (upper == 0 || has_upper) {
          float const* row = queries + upper * 8 * kQueryPitch;
          float const outer[2] = {row[8 * I + 2 * k], row[8 * I + 2 * k + 1]};
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            float const native = row[8 * J + quad + 4 * x];
            float const phi[2] = {outer[0] * native, outer[1] * native};
            sums.normalizer[upper] +=
                phi[0] * key_sum[quad + 4 * x] + phi[1] * key_sum[8 + quad + 4 * x];
            a[2 * x + upper] = detail::pack<cute::bfloat16_t>(phi[0], phi[1]);
          }
        }
      }
      cute::Tensor b =
          cute::make_tensor<cute::bfloat16_t>(cute::Shape<cute::_4, cute::Int<ValueDim / 8>>{});
      collective::load_rows_transposed(stage.rows, StateLayout{}, 16 * k, 0, 0, lane, b);
      cute::Tensor registers = cute::recast<std::uint32_t>(b);
#pragma unroll
      for (int n = 0; n < ValueDim / 8; ++n) {
        multiply<Mma>(a, registers(0, n), registers(1, n), sums.numerator[n]);
      }
    }
  }

  template <class Operation>
  CUTE_DEVICE static void multiply(std::uint32_t const (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                   float (&c)[4]) {
    Operation::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
  }

  /// Adds what the queries read from a tile of tokens, eight of them a warp and turn. `passed`:
  /// the log gates of the ring's tokens after the tile; then of those after the next.
  CUTE_DEVICE static void add_tokens(Params const& params, SharedStorage const& shared,
                                     Stage const& stage, Work const& work, int start, int row,
                                     int tile, int pair_warp, int lane, float& passed, Sums& sums) {
    lane = detail::recomputed(lane);
    row = detail::recomputed(row);
    float const* queries = shared.query[row];
    int const quad = lane % 4;
    bool const is_new = tile == 0;
    int const count = work.tile_tokens(tile);
    float after = 0.0f;  // log gates of the ring after token `lane`
    if (!is_new && params.log_gate != nullptr) {
      float from = stage.sums[lane];  // and those after it in the tile
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        float const later = __shfl_down_sync(0xffffffffu, from, static_cast<unsigned>(lanes));
        from += lane + lanes < 32 ? later : 0.0f;
      }
      float const next = __shfl_down_sync(0xffffffffu, from, 1);
      after = passed + (lane < 31 ? next : 0.0f);
      passed += __shfl_sync(0xffffffffu, from, 0);
    }
    int const readers[2] = {token_of(params, work, start + row),
                            token_of(params, work, start + row + 8)};
#pragma unroll 1
    for (int first = 8 * pair_warp; first < count; first += 8 * kPairWarps) {
      float score[4] = {};
#pragma unroll
      for (int e = 0; e < HeadDim; e += 32) {
        std::uint32_t b[4];
        cute::SM75_U32x4_LDSM_N::copy(
            *reinterpret_cast<cute::uint128_t const*>(
                stage.tokens.key + KeyLayout{}(first + lane % 8, e + lane / 8 * 8, 0)),
            b[0], b[1], b[2], b[3]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          std::uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Their element type has all bits of queries: they differ by powers of two.
            float const* x =
                queries + i % 2 * 8 * kQueryPitch + e + 16 * half + i / 2 * 8 + 2 * quad;
            a[i] = detail::pack<Element>(x[0], x[1]);
          }
          multiply<ScoreMma>(a, b[2 * half], b[2 * half + 1], score);
        }
      }
      // Of scores, lane (g, t) has rows g and g + 8 and tokens 2 t and 2 t + 1, which is what it
      // needs of the next product's other side.
      float weight[4];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        int const token = first + 2 * quad + s;
        float const old_gates = __shfl_sync(0xffffffffu, after, token);
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          int const reader = readers[upper];
          bool const seen = token < count && (!is_new || token <= reader);
          float const gates = is_new ? shared.between[reader][cute::min(token, count - 1)]
                                     : old_gates + shared.since_start[reader];
          float const x = score[2 * upper + s];
          weight[2 * upper + s] = seen ? x * x * expf(gates) : 0.0f;
          sums.normalizer[upper] += weight[2 * upper + s];
        }
      }
      // A weight is the sum of two bf16 but for 2^-17 of it: tokens k and k + 8 of K are one.
      std::uint32_t a[4];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        split(weight[2 * upper], weight[2 * upper + 1], a[upper], a[2 + upper]);
      }
#pragma unroll
      for (int n = 0; n < ValueDim / 8; n += 4) {
        std::uint32_t b[4];
        cute::SM75_U16x8_LDSM_T::copy(
            *reinterpret_cast<cute::uint128_t const*>(
                stage.tokens.value + ValueLayout{}(first + lane % 8, 8 * n + lane / 8 * 8, 0)),
            b[0], b[1], b[2], b[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (cute::is_same_v<Element, cute::bfloat16_t>) {
            multiply<Mma>(a, b[i], b[i], sums.numerator[n + i]);
          } else {
            // So is a value in fp16, of which nothing is lost.
            std::uint32_t high, low;
            split(detail::unpack_lo<Element>(b[i]), detail::unpack_hi<Element>(b[i]), high, low);
            multiply<Mma>(a, high, high, sums.numerator[n + i]);
            multiply<Mma>(a, low, low, sums.numerator[n + i]);
          }
        }
      }
    }
  }

  /// Two numbers in bf16, and what that leaves of them.
  CUTE_DEVICE static void split(float x, float y, std::uint32_t& high, std::uint32_t& low) {
    high = detail::pack<cute::bfloat16_t>(x, y);
    low = detail::pack<cute::bfloat16_t>(x - detail::unpack_lo<cute::bfloat16_t>(high),
                                         y - detail::unpack_hi<cute::bfloat16_t>(high));
  }

  /// The new tokens join the ring of their head.
  CUTE_DEVICE static void append(Params const& params, Stage const& stage, Work work, int thread) {
    thread = detail::recomputed(thread);
    work.slot = detail::recomputed(work.slot);
    DecodePool<Element> const& pool = params.pool;
    auto const place = [&](int token) {
      return std::int64_t{pool.place(work.cursor, work.cursor.length + token)};
    };
    auto const store = [&](Element const* tile, auto layout, Element* ring) {
      constexpr int kPieces = decltype(cute::size<1>(layout))::value / 8;
      for (int piece = thread; piece < work.tokens * kPieces; piece += kThreads) {
        int const token = piece / kPieces, column = piece % kPieces * 8;
        *reinterpret_cast<cute::uint128_t*>(ring + place(token) * (8 * kPieces) + column) =
            *reinterpret_cast<cute::uint128_t const*>(tile + layout(token, column, 0));
      }
    };
    store(stage.tokens.key, KeyLayout{}, pool.keys.at(work.slot, work.head));
    store(stage.tokens.value, ValueLayout{}, pool.values.at(work.slot, work.head));
    if (params.log_gate != nullptr && thread < work.tokens) {
      pool.log_gates.at(work.slot, work.head)[place(thread)] = stage.sums[thread];
    }
  }

  // ---- What comes of it -------------------------------------------------------------------------

  /// A part's numerators and normalizers of the queries from `query` on.
  CUTE_DEVICE static float* partial_of(Params const& params, Work const& work, int part,
                                       int query) {
    std::int64_t const head = std::int64_t{work.row} * params.heads + work.head;
    return params.partial +
           ((head * params.parts + part) * params.tokens * params.group + query) * kPartialPitch;
  }

  /// Adds up what the warps have of the queries from `start` on.
  CUTE_DEVICE static void finish(Params const& params, SharedStorage& shared, Work const& work,
                                 int start, int thread, Sums& sums) {
    int const lane = thread % 32, warp = thread / 32;
    int const group = lane / 4, quad = lane % 4;
    int const rows = cute::min(work.queries(params) - start, int{kRows});
    cute::cp_async_wait<0>();
    __syncthreads();  // the stages are free for products
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int const row = 16 * (warp % kRowWarps) + group + 8 * upper;
      float normalizer = sums.normalizer[upper];
      normalizer += __shfl_xor_sync(0xffffffffu, normalizer, 1);
      normalizer += __shfl_xor_sync(0xffffffffu, normalizer, 2);
      if (row < rows) {
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          *reinterpret_cast<float2*>(&shared.products[warp / kRowWarps][row][8 * n + 2 * quad]) =
              make_float2(sums.numerator[n][2 * upper], sums.numerator[n][2 * upper + 1]);
        }
        if (quad == 0) {
          shared.normalizer[warp / kRowWarps][row] = normalizer;
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < rows * ValueDim; i += kThreads) {
      int const m = i / ValueDim, column = i % ValueDim;
      float numerator = 0.0f, normalizer = 0.0f;
#pragma unroll
      for (int w = 0; w < kPairWarps; ++w) {
        numerator += shared.products[w][m][column];
        normalizer += shared.normalizer[w][m];
      }
      if (params.parts == 1) {
        store(params, work, start + m, column, numerator, normalizer);
      } else {
        float* target = partial_of(params, work, work.part, start + m);
        target[column] = numerator;
        if (column == 0) {
          *reinterpret_cast<float4*>(target + ValueDim) = make_float4(normalizer, 0.0f, 0.0f, 0.0f);
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

  /// The last part of a head to arrive adds up all of them, in their order. They come to shared
  /// memory first: all loads are one wait, whatever their number.
  CUTE_DEVICE static void add_parts(Params const& params, SharedStorage& shared, Work const& work,
                                    int thread) {
    __syncthreads();
    if (thread == 0) {
      unsigned* of_head = params.arrivals + std::int64_t{work.row} * params.heads + work.head;
      int const row_blocks = params.heads * params.parts;
      auto const [in_head, in_row] =
          arrive(of_head, params.parts, row_counter(params, work), row_blocks);
      shared.is_last = is_last(in_head, params.parts) ? 1 : 0;
      if (is_last(in_row, row_blocks)) {
        move_cursor(params, work);
      }
    }
    __syncthreads();
    if (shared.is_last == 0) {
      return;
    }
    int const queries = work.queries(params);
    int const at_once = kMergedRows / params.parts;
    for (int start = 0; start < queries; start += at_once) {
      int const count = cute::min(queries - start, at_once);
      for (int part = thread / 32; part < params.parts; part += kWarps) {
        float const* source = partial_of(params, work, part, start);
        float* target = shared.merged[part * count];
        for (int i = thread % 32 * 4; i < count * kPartialPitch; i += 32 * 4) {
          copy_piece(source + i, target + i);
        }
      }
      cute::cp_async_fence();
      cute::cp_async_wait<0>();
      __syncthreads();
      for (int i = thread; i < count * ValueDim; i += kThreads) {
        int const m = i / ValueDim, column = i % ValueDim;
        float numerator = 0.0f, normalizer = 0.0f;
#pragma unroll 4
        for (int part = 0; part < params.parts; ++part) {
          float const* sums = shared.merged[part * count + m];
          numerator += sums[column];
          normalizer += sums[ValueDim];
        }
        store(params, work, start + m, column, numerator, normalizer);
      }
      __syncthreads();
    }
  }
};

}  // namespace retention::kernel
