// The powers of two that keep fp16 in range, whatever the magnitude of keys and values and the
// length of the sequence (`Exponents`). Two kernels, one after the other:
//
// - `ChunkRanges` reads keys and values once and leaves a few numbers a chunk;
// - `ChooseExponents` walks over the chunks of a sequence and bounds the state before each, by a
//   scan (`BoundScan`) that serves gradients as well.
//
// With N_c the decayed number of tokens before chunk c, L_c the cumulative log gate there, G_c that
// of chunk c alone, and maxima over the whole sequence,
//
//     N_0 = 0,  N_{c+1} = exp(G_c) N_c + n_c,    n_c = sum_{j in chunk c} exp(G_c - g_j)
//     |S_c| <= 2 N_c max|k|^2 max|v| + exp(L_c) max|S_0|
//     |z_c| <= 2 N_c max|k|^2        + exp(L_c) max|z_0|
//
// where 2 is the largest multiplicity of a row. Numbers that are not finite do not count: they
// spoil the rows from their own token on, and must not take the precision of those before.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/packed.hpp"
#include "retention/detail/reduce.hpp"
#include "retention/kernel/items.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/kernel/sequence_states.hpp"

namespace retention::detail {

constexpr float kLargestFloat = 0x1.fffffep127f;

/// Not below 2^x and above it by a little, where the result is a normal number.
CUTE_DEVICE float exp2_above(float x) {
  // The rounding error of x grows with it, exp2f's own is two units of the last place.
  return exp2f(x) * (1.0f + 0x1p-21f * (1.0f + fabsf(x)));
}

/// The smallest e with x < 2^e, for x >= 2^-127; at least -126, and 129 for what is not finite.
CUTE_DEVICE int exponent_above(float x) {
  return static_cast<int>(__float_as_uint(x) >> 23 & 0xff) - 126;
}

/// |x|, or 0 where x is not finite.
CUTE_DEVICE float finite_magnitude(float x) {
  float const magnitude = fabsf(x);
  return magnitude <= kLargestFloat ? magnitude : 0.0f;
}

}  // namespace retention::detail

namespace retention::kernel {

/// What the exponents need to know of one chunk and head.
struct ChunkRange {
  float key;    // max |k| over the elements
  float norm;   // max of the squared Euclidean norm of a key, or a little more
  float value;  // max |v|
  float count;  // n_c or a little more
  float gate;   // G_c, in the units of `exp2`
};

/// The same of a part of a state.
struct alignas(8) StateRange {
  float state;    // max |S|
  float key_sum;  // max |z|
};

/// The ranges of fp32 states.
struct StateRanges {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kParts = 32;  // blocks that share a state

  struct SharedStorage {
    StateRange warps[kWarps];
  };

  struct Params {
    SequenceStates states;  // [count, h, ..]
    StateRange* ranges;     // [count, h, kParts]
    int count;              // sequences
    StateShape shape;       // D a multiple of 4
  };

  /// (sequence and part, part fastest; head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.count) * kParts,
                static_cast<unsigned>(params.shape.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    find(params, *reinterpret_cast<SharedStorage*>(smem), static_cast<int>(blockIdx.x));
  }

  /// The work of block `index`, of head blockIdx.y.
  CUTE_DEVICE static void find(Params const& params, SharedStorage& shared, int index) {
    int const thread = threadIdx.x;
    int const sequence = index / kParts;
    int const head = blockIdx.y;
    int const part = index % kParts;
    float state = 0.0f;
    float key_sum = 0.0f;
    params.states.read(params.shape, sequence, sequence, head, [&](auto const& given) {
      state = max_magnitude(static_cast<int>(params.shape.size()), part,
                            [&](int at) { return given.load(at); });
      key_sum = max_magnitude(params.shape.state_dim, part, [&](int row) {
        return make_float2(given.load_sum(row), given.load_sum(row + 1));
      });
    });

    state = detail::reduce_warp(state, detail::Maximum{});
    key_sum = detail::reduce_warp(key_sum, detail::Maximum{});
    if (thread % 32 == 0) {
      shared.warps[thread / 32] = {state, key_sum};
    }
    __syncthreads();
    if (thread == 0) {
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) {
        state = fmaxf(state, shared.warps[warp].state);
        key_sum = fmaxf(key_sum, shared.warps[warp].key_sum);
      }
      std::int64_t const item = std::int64_t{sequence} * params.shape.heads + head;
      params.ranges[item * kParts + part] = {state, key_sum};
    }
  }

 private:
  // The thread's part of max |x| over a part of `size` floats, of which `load` has two at a time.
  template <class Load>
  CUTE_DEVICE static float max_magnitude(int size, int part, Load const& load) {
    float result = 0.0f;
#pragma unroll 8
    for (int i = 2 * (part * kThreads + static_cast<int>(threadIdx.x)); i < size;
         i += 2 * kParts * kThreads) {
      float2 const x = load(i);
      result = fmaxf(result, fmaxf(detail::finite_magnitude(x.x), detail::finite_magnitude(x.y)));
    }
    return result;
  }
};

template <class Element_>
struct ChunkRanges : OneItem<ChunkRanges<Element_>> {
  using Element = Element_;
  static_assert(cute::is_same_v<Element, cute::half_t>, "other types have range enough");

  static constexpr int kThreads = StateRanges::kThreads;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLoads = 4;  // 16-byte loads of a thread in flight
  static constexpr int kStateParts = StateRanges::kParts;

  struct SharedStorage {
    union {
      float warps[4][kWarps];
      StateRanges::SharedStorage initial;
    };
  };

  struct Params {
    Element const* key;                  // [b, t, h, d], rows 16-byte aligned
    Element const* value;                // [b, t, h, dv], rows 16-byte aligned
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride gate_stride;
    SequenceStates initial;      // [count, h, ..]; not given for zero
    ChunkRange* ranges;          // [slots, h]
    StateRange* initial_ranges;  // [count, h, kStateParts]; with initial states
    Sequences sequences;
    int heads;
    int head_dim;   // d, 8 times a power of two
    int value_dim;  // dv, a multiple of 8
    int state_dim;  // D, a multiple of 4; with initial states
  };

  /// (sequence and part of its initial state, part fastest, then chunk; head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(state_parts(params) + params.sequences.most_chunks()),
                static_cast<unsigned>(params.heads));
  }
  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return state_parts(params) +
           params.sequences.turn_blocks(params.sequences.length / params.sequences.chunk_size);
  }
  CUTE_DEVICE static int count(Params const& params) {
    return static_cast<int>(state_parts(params)) + params.sequences.num_chunks();
  }

  CUTE_DEVICE static void work(Params const& params, char* smem, int number) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const parts = static_cast<int>(state_parts(params));
    if (number >= parts) {
      chunk_range(params, shared, number - parts);
    } else {
      StateRanges::find({params.initial,
                         params.initial_ranges,
                         params.sequences.count,
                         {params.heads, params.state_dim, params.value_dim}},
                        shared.initial, number);
    }
  }

 private:
  CUTE_HOST_DEVICE static std::int64_t state_parts(Params const& params) {
    return params.initial.given() ? static_cast<std::int64_t>(params.sequences.count) * kStateParts
                                  : 0;
  }

  CUTE_DEVICE static void chunk_range(Params const& params, SharedStorage& shared, int number) {
    int const thread = threadIdx.x;
    int const head = blockIdx.y;
    Chunk const chunk = params.sequences.find(number);
    Sequence const sequence = params.sequences.get(chunk.sequence);
    std::int64_t const first = static_cast<std::int64_t>(chunk.index) * sequence.chunk_size;
    if (first >= sequence.length) {
      return;  // a number without a chunk
    }
    int const tokens = cute::min(sequence.chunk_size, sequence.length - static_cast<int>(first));

    Element const* keys = params.key + params.key_stride.at(sequence, first, head);
    float key = max_magnitude(keys, params.key_stride.token, params.head_dim, tokens);
    float norm = max_norm(keys, params.key_stride.token, params.head_dim, tokens);
    float value = max_magnitude(params.value + params.value_stride.at(sequence, first, head),
                                params.value_stride.token, params.value_dim, tokens);
    float count = static_cast<float>(tokens);
    detail::CumulativeGate end_gate{0.0f, 0.0f};
    if (params.gate != nullptr) {
      detail::CumulativeGate const* gate =
          params.gate + params.gate_stride.at(sequence, first, head);
      end_gate = gate[(tokens - 1) * params.gate_stride.token];
      count = 0.0f;
#pragma unroll 4
      for (int token = thread; token < tokens; token += kThreads) {
        count += detail::exp2_above(end_gate.since(gate[token * params.gate_stride.token]));
      }
    }

    key = detail::reduce_warp(key, detail::Maximum{});
    norm = detail::reduce_warp(norm, detail::Maximum{});
    value = detail::reduce_warp(value, detail::Maximum{});
    if (params.gate != nullptr) {
      count = detail::reduce_warp(count, detail::Plus{});
    }
    if (thread % 32 == 0) {
      shared.warps[0][thread / 32] = key;
      shared.warps[1][thread / 32] = value;
      shared.warps[2][thread / 32] = count;
      shared.warps[3][thread / 32] = norm;
    }
    __syncthreads();
    if (thread == 0) {
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) {
        key = fmaxf(key, shared.warps[0][warp]);
        value = fmaxf(value, shared.warps[1][warp]);
        count += params.gate == nullptr ? 0.0f : shared.warps[2][warp];
        norm = fmaxf(norm, shared.warps[3][warp]);
      }
      norm *= 1.0f + 0x1p-16f;  // rounding of up to 128 terms
      // Each term went through tokens / kThreads + 13 additions.
      float const additions = static_cast<float>(tokens / kThreads + 16);
      count *= params.gate == nullptr ? 1.0f : 1.0f + 0x1p-23f * additions;
      std::int64_t const slot = sequence.first_slot + chunk.index;
      params.ranges[slot * params.heads + head] = {key, norm, value, count, end_gate.total()};
    }
  }

  // Of two fp16 numbers, in the order of their magnitudes; not finite ones are below 0x400, where
  // no finite one is.
  CUTE_DEVICE static std::uint32_t ranks(std::uint32_t pair) {
    return ((pair & 0x7fff7fff) + 0x04000400) & 0x7fff7fff;
  }

  // The thread's part of max |x| over `tokens` rows of `width` elements.
  CUTE_DEVICE static float max_magnitude(Element const* rows, std::int64_t row_stride, int width,
                                         int tokens) {
    int const pieces = width / 8;  // 16 bytes each, at most kThreads
    int const row_step = kThreads / pieces;
    int row = static_cast<int>(threadIdx.x) / pieces;
    int const piece = static_cast<int>(threadIdx.x) % pieces;
    std::uint32_t low = 0x400;
    std::uint32_t high = 0;
#pragma unroll 1
    while (row < tokens) {
      uint4 x[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        x[i] = row < tokens ? *reinterpret_cast<uint4 const*>(rows + row * row_stride + 8 * piece)
                            : uint4{0, 0, 0, 0};
        row += row_step;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        std::uint32_t const pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          std::uint32_t const rank = ranks(pairs[j]);
          low = cute::max(low, rank & 0xffff);
          high = cute::max(high, rank);  // the lower half decides among equal upper halves only
        }
      }
    }
    std::uint32_t const magnitude = cute::max(low, high >> 16) - 0x400;
    return float(Element::bitcast(static_cast<std::uint16_t>(magnitude)));
  }

  // The thread's part of the largest squared norm of `tokens` rows of `width` elements: the lanes
  // of a row are neighbours.
  CUTE_DEVICE static float max_norm(Element const* rows, std::int64_t row_stride, int width,
                                    int tokens) {
    int const pieces = width / 8;
    int const piece = static_cast<int>(threadIdx.x) % pieces;
    float largest = 0.0f;
#pragma unroll 1
    for (int start = 0; start < tokens; start += kThreads / pieces) {
      int const row = start + static_cast<int>(threadIdx.x) / pieces;
      uint4 const x = row < tokens
                          ? *reinterpret_cast<uint4 const*>(rows + row * row_stride + 8 * piece)
                          : uint4{0, 0, 0, 0};
      std::uint32_t const pairs[4] = {x.x, x.y, x.z, x.w};
      float norm = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float const lo = detail::finite_magnitude(detail::unpack_lo<Element>(pairs[j]));
        float const hi = detail::finite_magnitude(detail::unpack_hi<Element>(pairs[j]));
        norm += lo * lo + hi * hi;
      }
      for (int lanes = 1; lanes < pieces; lanes *= 2) {
        norm += __shfl_xor_sync(0xffffffffu, norm, lanes);
      }
      largest = fmaxf(largest, norm);
    }
    return largest;
  }
};

/// A bound of a state from that some chunks before: S -> decay S + state, z -> decay z + key_sum.
struct BoundStep {
  float decay = 1.0f;
  float state = 0.0f;
  float key_sum = 0.0f;
  double log2_decay = 0.0;  // a given state may be in range after a decay that is not

  /// Of all of a state within `bound` + 2^log2_decay `given`.
  CUTE_DEVICE float with_given(float bound, float given) const {
    if (given != 0.0f) {
      // The margin covers log2f, exp2f and the rounding of a sum that is below 256.
      float const log2_given = static_cast<float>(log2_decay) + log2f(given) + 0x1p-12f;
      bound += exp2f(log2_given);
    }
    // Sums of bounds round, once a step of the scan.
    return fminf(bound * (1.0f + 0x1p-12f), detail::kLargestFloat);
  }
};

/// Bounds of the states along a sequence, in whichever direction they were made, from what each
/// chunk does to them.
template <int kThreads_>
struct BoundScan {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / 32;
  // What is stored is below 2^15, half of fp16's range: room for the rounding of its terms.
  static constexpr int kStoredExponent = 15;
  // 2^e and 2^-e are normal fp32 numbers; 2^(128 - 15) is the largest power that fp32 states need.
  static constexpr int kMinStateExponent = -120;

  struct SharedStorage {
    BoundStep warps[kWarps];
  };

  /// For i < count, all threads of the block together: the thread that has called load(i), for step
  /// i, next calls store(i, before) with the steps before i as one.
  template <class Load, class Store>
  CUTE_DEVICE static void run(SharedStorage& shared, int count, Load load, Store store) {
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    BoundStep carry;
#pragma unroll 1
    for (int start = 0; start < count; start += kThreads) {
      int const i = start + thread;
      BoundStep inclusive;
      if (i < count) {
        inclusive = load(i);
      }
#pragma unroll
      for (unsigned delta = 1; delta < 32; delta *= 2) {
        BoundStep const before = shuffle_up(inclusive, delta);
        if (static_cast<unsigned>(lane) >= delta) {
          inclusive = then(before, inclusive);
        }
      }
      __syncthreads();  // the totals of the previous round have been read
      if (lane == 31) {
        shared.warps[warp] = inclusive;
      }
      BoundStep step = shuffle_up(inclusive, 1);
      __syncthreads();
      BoundStep before = carry;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp) {
          before = carry;
        }
        carry = then(carry, shared.warps[w]);
      }
      step = lane == 0 ? before : then(before, step);
      if (i < count) {
        store(i, step);
      }
    }
  }

  /// The exponent that a state within `bound` is stored with.
  CUTE_DEVICE static int stored(float bound) {
    return bound == 0.0f ? 0
                         : cute::max(detail::exponent_above(bound) - kStoredExponent,
                                     cute::Int<kMinStateExponent>{});
  }

 private:
  CUTE_DEVICE static BoundStep then(BoundStep const& first, BoundStep const& second) {
    // Positive gates can make decays and bounds infinite, and their products NaN: no bound, which
    // `with_given` takes for the largest.
    auto const carried = [&](float bound) { return bound == 0.0f ? 0.0f : second.decay * bound; };
    return {second.decay * first.decay, carried(first.state) + second.state,
            carried(first.key_sum) + second.key_sum, first.log2_decay + second.log2_decay};
  }

  CUTE_DEVICE static BoundStep shuffle_up(BoundStep const& step, unsigned delta) {
    return {__shfl_up_sync(0xffffffffu, step.decay, delta),
            __shfl_up_sync(0xffffffffu, step.state, delta),
            __shfl_up_sync(0xffffffffu, step.key_sum, delta),
            __shfl_up_sync(0xffffffffu, step.log2_decay, delta)};
  }
};

struct ChooseExponents : OneItem<ChooseExponents> {
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = 2;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kStateParts = StateRanges::kParts;
  using Scan = BoundScan<kThreads>;

  struct Params {
    ChunkRange const* ranges;          // [slots, h]
    StateRange const* initial_ranges;  // [count, h, kStateParts]; null without an initial state
    int* key;                          // [count, h]
    int* score;                        // [count, h]
    int* state;                        // [slots, h]
    int* key_sum;                      // [slots, h]
    Sequences sequences;
    int heads;
    int head_dim;
  };

  struct SharedStorage {
    Scan::SharedStorage scan;
    float maxima[5][kWarps];
  };

  /// (sequence, head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.sequences.listed),
                static_cast<unsigned>(params.heads));
  }

  CUTE_HOST static std::int64_t turn_blocks(Params const& params) {
    return params.sequences.turn_blocks(params.sequences.length / params.sequences.chunk_size);
  }
  CUTE_DEVICE static int count(Params const& params) { return params.sequences.num_listed(); }

  CUTE_DEVICE static void work(Params const& params, char* smem, int place) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    Sequence const sequence = params.sequences.get(place);
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    int const head = blockIdx.y;
    int const chunks = cute::ceil_div(sequence.length, sequence.chunk_size);
    std::int64_t const item = static_cast<std::int64_t>(sequence.index) * params.heads + head;
    std::int64_t const first = sequence.first_slot * params.heads + head;

    float maxima[5] = {};  // |k|, |v|, |S_0|, |z_0|, |k|_2^2
#pragma unroll 4
    for (int chunk = thread; chunk < chunks; chunk += kThreads) {
      ChunkRange const range = params.ranges[first + std::int64_t{chunk} * params.heads];
      maxima[0] = fmaxf(maxima[0], range.key);
      maxima[1] = fmaxf(maxima[1], range.value);
      maxima[4] = fmaxf(maxima[4], range.norm);
    }
    if (params.initial_ranges != nullptr && thread < kStateParts) {
      StateRange const range = params.initial_ranges[item * kStateParts + thread];
      maxima[2] = range.state;
      maxima[3] = range.key_sum;
    }
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      maxima[i] = detail::reduce_warp(maxima[i], detail::Maximum{});
      if (lane == 0) {
        shared.maxima[i][warp] = maxima[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      maxima[i] = detail::reduce_warp(shared.maxima[i][lane % kWarps], detail::Maximum{});
    }
    if (thread == 0) {
      // From -23 to 16 for fp16.
      params.key[item] = maxima[0] == 0.0f ? 0 : detail::exponent_above(maxima[0]);
      // Elements of a query are below 1: its norm is below sqrt(d).
      float const score = sqrtf(static_cast<float>(params.head_dim) * maxima[4]);
      params.score[item] = score == 0.0f ? 0 : detail::exponent_above(score * (1.0f + 0x1p-20f));
    }
    float const token_bound = 2.0f * maxima[0] * maxima[0];

    Scan::run(
        shared.scan, chunks,
        [&](int chunk) {
          ChunkRange const range = params.ranges[first + std::int64_t{chunk} * params.heads];
          float const key_sum = range.count * token_bound;
          // Without gates every step is exact, and stays so.
          return BoundStep{range.gate == 0.0f ? 1.0f : detail::exp2_above(range.gate),
                           key_sum * maxima[1], key_sum, static_cast<double>(range.gate)};
        },
        [&](int chunk, BoundStep const& before) {
          std::int64_t const offset = first + std::int64_t{chunk} * params.heads;
          params.state[offset] = Scan::stored(before.with_given(before.state, maxima[2]));
          params.key_sum[offset] = Scan::stored(before.with_given(before.key_sum, maxima[3]));
        });
  }
};

}  // namespace retention::kernel
