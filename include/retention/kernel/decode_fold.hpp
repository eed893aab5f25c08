// Folding the oldest tokens of rings into states, in place: at the start of a step, so that these
// tokens are confirmed, for whoever rejects drafts has taken them back by then. Which slots fold is
// seen on the device: those that have a window's tokens beyond the `keep` that are to stay. A
// launch is the same for all of them, and can be replayed.
//
//   S = e^{G} S + sum_j e^{sum of the log gates after j} phi_k(k_j) v_j^T,   z likewise
//
// is expand-reduce over one window with S in fp32 registers: M = 16 state rows, K = tokens. Of the
// two planes of S nothing is lost; a bf16 state is rounded at random, up or down in proportion to
// what is lost, so that thousands of folds do not add up to a drift.
//
// Few rows fold in a step, and which ones only the device knows. So every block lists them, and
// takes an even share of the block pairs of all their heads. The last block to finish moves the
// cursors: until then, others may still list rows by them.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"
#include "retention/detail/dependent_launch.hpp"
#include "retention/detail/packed.hpp"
#include "retention/kernel/decode_arrival.hpp"
#include "retention/kernel/decode_pool.hpp"
#include "retention/kernel/state_planes.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::kernel {

template <class Element_>
struct DecodeFoldParams {
  using Element = Element_;

  int const* slots;  // [rows], each at most once
  int rows;
  int heads;
  DecodePool<Element> pool;
  int window;          // at most DecodeFold::kMaxWindow; 0: no windows
  int keep;            // tokens that stay in the ring
  int blocks;          // that share the work
  unsigned* arrivals;  // [1], zero before and after
};

template <class Element_, int HeadDim, int ValueDim>
struct DecodeFold {
  using Element = Element_;
  using Params = DecodeFoldParams<Element>;
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;

  static constexpr int kWarps = 4;  // each has 16 of the 64 rows of a block pair
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMinBlocks = cute::max(HeadDim, ValueDim) > 64 ? 2 : 3;
  static constexpr int kMaxWindow = 512;
  static constexpr int kTileTokens = 128;  // most windows are one tile, that is loaded once
  static constexpr int kTileRows = 64;
  static constexpr int kBlocks = HeadDim / 8;
  static constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
  static constexpr int kPitch = kTileTokens + 8;  // of keys: four rows and quads, all banks
  static constexpr int kThreadRows = 4;           // that a thread looks at, at one time
  static constexpr int kListedRows = kThreadRows * kThreads;
  static constexpr int kLeastPairs = 2;  // that are worth a block
  static constexpr bool kStartsEarly = true;

  using ValueLayout = collective::StagedTileLayout<kTileTokens, ValueDim, 1>;

  struct SharedStorage {
    alignas(128) cute::bfloat16_t value[cute::cosize_v<ValueLayout>];
    float key[HeadDim][kPitch];  // transposed
    float gate[kMaxWindow];
    float weight[kMaxWindow];  // of each token: what is left of it at the window's end
    float decay;               // of the whole window
    int row[kListedRows];      // that fold
    int warp_rows[kThreadRows][kWarps];
    int is_last;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.blocks));
  }

  /// Tokens to fold: up to the end of the slot's window, if there are as many; else 0. Without
  /// windows, all that need not stay, as many as one fold can take.
  CUTE_HOST_DEVICE static int tokens_to_fold(Cursor const& cursor, int window, int keep) {
    if (window == 0) {
      return cute::max(cute::min(cursor.length - keep, int{kMaxWindow}), 0);
    }
    auto const beyond = static_cast<int>((cursor.folded - cursor.phase) % window);
    int const missing = beyond > 0 ? window - beyond : beyond < 0 ? -beyond : window;
    return cursor.length - keep >= missing ? missing : 0;
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    auto& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = static_cast<int>(threadIdx.x);
    detail::let_next_kernel_start();
    if (blockIdx.x == 0) {
      for (int row = thread; row < params.rows; row += kThreads) {
        int const slot = detail::guess(params.slots + row);
        if (params.pool.has(slot)) {
          detail::prefetch_line(params.pool.cursor(slot));
        }
      }
    }
    detail::wait_for_earlier_kernels();
    bool any = false;
    for (int first = 0; first < params.rows; first += kListedRows) {
      int const rows = list_rows(params, shared, first, thread);
      if (rows > 0) {
        fold_share(params, shared, rows, thread);
        any = true;
      }
    }
    if (any && is_last_arrival(shared.is_last, params.arrivals, params.blocks, thread)) {
      for (int row = thread; row < params.rows; row += kThreads) {
        move_cursor(params, row);
      }
    }
  }

 private:
  CUTE_DEVICE static int tokens_of_row(Params const& params, int row) {
    int const slot = params.slots[row];
    return params.pool.has(slot)
               ? tokens_to_fold(*params.pool.cursor(slot), params.window, params.keep)
               : 0;
  }

  CUTE_DEVICE static void move_cursor(Params const& params, int row) {
    if (int const tokens = tokens_of_row(params, row); tokens > 0) {
      Cursor& cursor = *params.pool.cursor(params.slots[row]);
      cursor.start = params.pool.place(cursor, tokens);
      cursor.length -= tokens;
      cursor.folded += tokens;
    }
  }

  /// Lists which of some rows fold, in their order. Returns how many.
  CUTE_DEVICE static int list_rows(Params const& params, SharedStorage& shared, int first,
                                   int thread) {
    int const lane = thread % 32, warp = thread / 32;
    // In most steps this is all that a block does: two waits, for all slots and all cursors.
    int slots[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      int const row = first + kThreads * i + thread;
      slots[i] = row < params.rows ? params.slots[row] : -1;
    }
    Cursor cursors[kThreadRows] = {};
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      if (params.pool.has(slots[i])) {
        cursors[i] = *params.pool.cursor(slots[i]);
      }
    }
    unsigned lanes[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      bool const folds =
          params.pool.has(slots[i]) && tokens_to_fold(cursors[i], params.window, params.keep) > 0;
      lanes[i] = __ballot_sync(0xffffffffu, folds);
      if (lane == 0) {
        shared.warp_rows[i][warp] = cute::popcount(lanes[i]);
      }
    }
    __syncthreads();
    int count = 0;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      int place = count;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        place += w < warp ? shared.warp_rows[i][w] : 0;
        count += shared.warp_rows[i][w];
      }
      if ((lanes[i] >> lane & 1) != 0) {
        shared.row[place + cute::popcount(lanes[i] & ((1u << lane) - 1))] =
            first + kThreads * i + thread;
      }
    }
    __syncthreads();
    return count;
  }

  /// Of the block pairs of all heads of the listed rows, those of this block.
  CUTE_DEVICE static void fold_share(Params const& params, SharedStorage& shared, int rows,
                                     int thread) {
    std::int64_t const all = std::int64_t{rows} * params.heads * kPairs;
    std::int64_t const share =
        cute::max(cute::ceil_div(all, std::int64_t{params.blocks}), std::int64_t{kLeastPairs});
    std::int64_t next = share * blockIdx.x;
    std::int64_t const end = cute::min(next + share, all);
    while (next < end) {
      std::int64_t const head = next / kPairs;  // of all listed rows
      auto const first_pair = static_cast<int>(next % kPairs);
      auto const pairs = static_cast<int>(cute::min(end - next, std::int64_t{kPairs - first_pair}));
      int const row = shared.row[head / params.heads];
      fold_pairs(params, shared, params.slots[row], static_cast<int>(head % params.heads),
                 first_pair, first_pair + pairs, thread);
      next += pairs;
    }
  }

  CUTE_DEVICE static void fold_pairs(Params const& params, SharedStorage& shared, int slot,
                                     int head, int first_pair, int end_pair, int thread) {
    Cursor const cursor = *params.pool.cursor(slot);
    int const tokens = tokens_to_fold(cursor, params.window, params.keep);
    __syncthreads();  // nobody reads the tokens and weights of another head any more
    load_gates(params, shared, slot, head, cursor, tokens, thread);
    load_tokens(params, shared, slot, head, cursor, 0, cute::min(tokens, int{kTileTokens}), thread);
    __syncthreads();
    weigh(shared, tokens, thread);
    __syncthreads();
    int J = 0;
    while ((J + 1) * (J + 2) / 2 <= first_pair) {
      ++J;
    }
    int I = first_pair - J * (J + 1) / 2;
    int loaded = 0;  // the first token of the tile in shared memory
#pragma unroll 1
    for (int pair = first_pair; pair < end_pair; ++pair) {
      fold_pair(params, shared, slot, head, cursor, tokens, pair, I, J, loaded, thread);
      if (++I > J) {
        I = 0;
        ++J;
      }
    }
  }

  CUTE_DEVICE static void load_gates(Params const& params, SharedStorage& shared, int slot,
                                     int head, Cursor const& cursor, int tokens, int thread) {
    bool const gated = params.pool.log_gates.data != nullptr;
#pragma unroll
    for (int i = 0; i < kMaxWindow / kThreads; ++i) {
      int const token = thread + kThreads * i;
      if (token < tokens) {
        shared.gate[token] =
            gated ? params.pool.log_gates.at(slot, head)[params.pool.place(cursor, token)] : 0.0f;
      }
    }
  }

  /// Sums of gates from the window's end, never their differences: one of them may be -inf.
  CUTE_DEVICE static void weigh(SharedStorage& shared, int tokens, int thread) {
    if (thread >= 32) {
      return;
    }
    float passed = 0.0f;
    for (int end = tokens; end > 0; end -= 32) {
      int const token = end - 1 - thread;
      float const own = token >= 0 ? shared.gate[token] : 0.0f;
      float sum = own;  // and those after it in these 32
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        float const later = __shfl_up_sync(0xffffffffu, sum, static_cast<unsigned>(lanes));
        sum += thread >= lanes ? later : 0.0f;
      }
      float const after = __shfl_up_sync(0xffffffffu, sum, 1);
      if (token >= 0) {
        shared.weight[token] = expf(passed + (thread > 0 ? after : 0.0f));
      }
      passed += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (thread == 0) {
      shared.decay = expf(passed);
    }
  }

  /// Where a tile has column `column` of V: lane t of a quad, whose sums of four mma are of columns
  /// 2 t and 2 t + 1, then has eight neighbours of the state.
  CUTE_HOST_DEVICE static constexpr int tile_column(int column) {
    return (column & ~31) | (column & 6) << 2 | (column & 24) >> 2 | (column & 1);
  }

  CUTE_DEVICE static void load_tokens(Params const& params, SharedStorage& shared, int slot,
                                      int head, Cursor const& cursor, int first, int count,
                                      int thread) {
    // A thread has one token of the tile, 8 elements at a time: lanes write to different banks.
    static_assert(kThreads == kTileTokens, "a token each");
    DecodePool<Element> const& pool = params.pool;
    bool const there = thread < count;
    std::int64_t const place = there ? pool.place(cursor, first + thread) : 0;
    Element const* key = pool.keys.at(slot, head) + place * HeadDim;
    Element const* value = pool.values.at(slot, head) + place * ValueDim;
    load_row<HeadDim>(key, there, [&](int e, std::uint32_t pair) {
      shared.key[e][thread] = detail::unpack_lo<Element>(pair);
      shared.key[e + 1][thread] = detail::unpack_hi<Element>(pair);
    });
    load_row<ValueDim>(value, there, [&](int e, std::uint32_t pair) {
      *reinterpret_cast<std::uint32_t*>(shared.value + ValueLayout{}(thread, tile_column(e), 0)) =
          detail::pack<cute::bfloat16_t>(detail::unpack_lo<Element>(pair),
                                         detail::unpack_hi<Element>(pair));
    });
  }

  /// Calls `store` with every two elements of a row, or with zeros; eight loads are one wait.
  template <int Columns, class Store>
  CUTE_DEVICE static void load_row(Element const* row, bool there, Store const& store) {
    constexpr int kAtOnce = cute::min(Columns, 64);
#pragma unroll 1
    for (int first = 0; first < Columns; first += kAtOnce) {
      alignas(16) std::uint32_t pairs[kAtOnce / 2] = {};
      if (there) {
#pragma unroll
        for (int e = 0; e < kAtOnce; e += 8) {
          copy(row + first + e, pairs + e / 2);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce / 2; ++i) {
        store(first + 2 * i, pairs[i]);
      }
    }
  }

  CUTE_DEVICE static void fold_pair(Params const& params, SharedStorage& shared, int slot, int head,
                                    Cursor const& cursor, int tokens, int pair, int I, int J,
                                    int& loaded, int thread) {
    int const lane = thread % 32, warp = thread / 32;
    int const group = lane / 4, quad = lane % 4;
    // Rows 8 a + b of the block pair: a = 2 warp and 2 warp + 1, b = the lane's group.
    std::int64_t const row = std::int64_t{pair} * kTileRows + 16 * warp + group;
    float const decay = shared.decay;
    float sums[ValueDim / 8][4];
    load_state(params, slot, head, cursor, row, quad, decay, sums);
    float key_sums[2] = {};
    float const multiplicity = I == J ? 1.0f : 2.0f;
    for (int first = 0; first < tokens; first += kTileTokens) {
      int const count = cute::min(tokens - first, int{kTileTokens});
      if (loaded != first) {
        __syncthreads();
        load_tokens(params, shared, slot, head, cursor, first, count, thread);
        __syncthreads();
        loaded = first;
      }
#pragma unroll 1
      for (int step = 0; step < count; step += 16) {
        std::uint32_t a[4];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          int const token = step + 8 * x + 2 * quad;
          float native[2];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            native[s] = first + token + s < tokens
                            ? multiplicity * shared.weight[first + token + s] *
                                  shared.key[8 * J + group][token + s]
                            : 0.0f;
          }
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            float const* outer = shared.key[8 * I + 2 * warp + upper] + token;
            float const phi[2] = {outer[0] * native[0], outer[1] * native[1]};
            key_sums[upper] += phi[0] + phi[1];
            a[2 * x + upper] = detail::pack<cute::bfloat16_t>(phi[0], phi[1]);
          }
        }
        cute::Tensor b =
            cute::make_tensor<cute::bfloat16_t>(cute::Shape<cute::_4, cute::Int<ValueDim / 8>>{});
        // Steps lie a constant apart, whatever the swizzle does.
        collective::load_rows_transposed(shared.value, ValueLayout{}, step, 0, 0, lane, b);
        cute::Tensor registers = cute::recast<std::uint32_t>(b);
#pragma unroll
        for (int n = 0; n < ValueDim / 8; ++n) {
          float (&c)[4] = sums[n];
          Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], registers(0, n), registers(1, n),
                   c[0], c[1], c[2], c[3]);
        }
      }
    }
    store_state(params, slot, head, cursor, row, quad, sums);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float sum = key_sums[upper];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quad == 0) {
        float* target = params.pool.key_sum.at(slot, head) + row + 8 * upper;
        *target = sum + (cursor.folded > 0 ? decay * *target : 0.0f);
      }
    }
  }

  // ---- The state
  // ---------------------------------------------------------------------------------

  // Eight neighbouring elements a lane, of columns 32 c + 8 t on, in the sums of four mma.
  CUTE_DEVICE static void load_state(Params const& params, int slot, int head, Cursor const& cursor,
                                     std::int64_t row, int quad, float decay,
                                     float (&sums)[ValueDim / 8][4]) {
    bool const there = cursor.folded > 0;
    bool const has_low = params.pool.low.data != nullptr;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
      for (int c = 0; c < ValueDim / 32; ++c) {
        std::int64_t const at = (row + 8 * upper) * ValueDim + 32 * c + 8 * quad;
        alignas(16) std::uint32_t high[4] = {};
        alignas(16) std::uint32_t low[4] = {};
        if (there) {
          copy(params.pool.high.at(slot, head) + at, high);
          if (has_low) {
            copy(params.pool.low.at(slot, head) + at, low);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Of a bf16 state the rest is 0.
          float2 const x = join_planes({high[i], low[i]});
          sums[4 * c + i][2 * upper] = there ? decay * x.x : 0.0f;
          sums[4 * c + i][2 * upper + 1] = there ? decay * x.y : 0.0f;
        }
      }
    }
  }

  CUTE_DEVICE static void store_state(Params const& params, int slot, int head,
                                      Cursor const& cursor, std::int64_t row, int quad,
                                      float const (&sums)[ValueDim / 8][4]) {
    bool const has_low = params.pool.low.data != nullptr;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
#pragma unroll
      for (int c = 0; c < ValueDim / 32; ++c) {
        std::int64_t const at = (row + 8 * upper) * ValueDim + 32 * c + 8 * quad;
        alignas(16) std::uint32_t high[4] = {};
        alignas(16) std::uint32_t low[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 const x = make_float2(sums[4 * c + i][2 * upper], sums[4 * c + i][2 * upper + 1]);
          if (has_low) {
            PlanePair const pair = split_planes(x);
            high[i] = pair.high;
            low[i] = pair.low;
          } else {
            auto const place = static_cast<std::uint64_t>(head) * kPairs * kTileRows * ValueDim +
                               static_cast<std::uint64_t>(at + 2 * i);
            high[i] = round_at_random(x, random_bits(slot, place, cursor.folded));
          }
        }
        copy(high, params.pool.high.at(slot, head) + at);
        if (has_low) {
          copy(low, params.pool.low.at(slot, head) + at);
        }
      }
    }
  }

  // 16 bytes.
  template <class Source, class Target>
  CUTE_DEVICE static void copy(Source const* source, Target* target) {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<uint4 const*>(source);
  }
};

}  // namespace retention::kernel
