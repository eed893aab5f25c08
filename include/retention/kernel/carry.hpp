// Joins sequences whose segments `ChunkStates` or `StateGradients` walked over at the same time.
// The first segment of the walk, which is backwards for gradients, started from what was given,
// every other from zero; each state of segment s lacks what came before the segment in the walk,
// decayed. With n = 0, 1, .. the segments and chunks in the order of the walk:
//
//     S_c += exp(sum of G from the segment's first chunk to before chunk c) carry_n
//     carry_1 = end_0,   carry_{n+1} = exp(sum of G of the segment) carry_n + end_n
//
// and z likewise; end_n is what segment n alone ends with. A thread owns 16 bytes of the state of
// one sequence and head, and keeps their carry in fp32 registers.
//
// With `outer` states, of what is somewhere else, there is a carry_0 too: the first segment lacks
// what they have, and what it ends with is end_0 + exp(..) carry_0.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/detail/cumulative_gate.hpp"
#include "retention/detail/packed.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/kernel/sequence_states.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::kernel {

enum class Direction {
  kForward,   // states before each chunk, from the first to the last
  kBackward,  // their gradients, after each chunk, from the last to the first
};

template <class Element_, int HeadDim, int ValueDim, Direction Walk = Direction::kForward>
struct CarryTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
  static constexpr Direction kDirection = Walk;
};

template <class Traits>
struct Carry {
  using Element = typename Traits::Element;

  static constexpr bool kBackward = Traits::kDirection == Direction::kBackward;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPiece = 8;     // elements of a thread, 16 bytes
  static constexpr int kUnrolled = 8;  // chunks in flight
  static constexpr int kStateDim = static_cast<int>(SymmetricPower<Traits::kHeadDim, 2>::kStateDim);
  static constexpr int kStateSize = kStateDim * Traits::kValueDim;
  static constexpr int kStateBlocks = kStateSize / (kPiece * kThreads);
  static constexpr int kKeySumBlocks = (kStateDim + kPiece * kThreads - 1) / (kPiece * kThreads);
  // Blocks of one sequence and head.
  static constexpr int kBlocks = kStateBlocks + kKeySumBlocks;
  static constexpr bool kScaled = cute::is_same_v<Element, cute::half_t>;
  static_assert(kStateSize % (kPiece * kThreads) == 0, "a block holds state or sum of keys");

  struct SharedStorage {
    float factor[kThreads];  // of the carry, at each of a batch of chunks
    float scale[kThreads];   // 2^-exponent of what is stored there
    float warps[kWarps];
  };

  struct Params {
    Element* states;    // [slots, h, D, dv] of each chunk, updated; null to skip
    Element* key_sums;  // [slots, h, D], updated; with states
    Slots slots;        // of states
    // [count, h, ..] of what comes before the first segment of the walk; null for nothing.
    float const* outer_state;
    float const* outer_key_sum;
    // What each segment alone ends with; of the last of a walk with `ends` only. A segment has a
    // slot as a chunk has (`Sequences::segments`).
    float const* segment_state;          // [slots of segments, h, D, dv]
    float const* segment_key_sum;        // [slots of segments, h, D]
    detail::CumulativeGate const* gate;  // [b, t, h] since the chunk's start; null for none
    TokenStride gate_stride;
    int const* state_exponents;    // [slots, h] of states, fp16 only; null for zeros
    int const* key_sum_exponents;  // [slots, h] of key_sums
    // What sequences end with: [count, h, ..] final states, or gradients of the initial ones; not
    // given to skip.
    SequenceStates ends;
    Sequences sequences;  // those listed are joined
    int heads;
    int segment_tokens;  // a multiple of the chunk size
  };

  /// (piece of the state and sequence, piece fastest; head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(kBlocks) * static_cast<unsigned>(params.sequences.listed),
                static_cast<unsigned>(params.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const head = blockIdx.y;
    int const place = static_cast<int>(blockIdx.x / kBlocks);
    int const block = static_cast<int>(blockIdx.x % kBlocks);
    if (place >= params.sequences.num_listed()) {
      return;
    }
    Sequence const sequence = params.sequences.get(place);
    Sequences const cut = params.sequences.segments(params.segment_tokens);
    Sequence const in_segments = cut.get(place);
    int const chunks = cute::ceil_div(sequence.length, sequence.chunk_size);
    int const segment_chunks = cute::ceil_div(in_segments.chunk_size, sequence.chunk_size);
    bool const enters = params.outer_state != nullptr;
    if (chunks <= segment_chunks && !params.ends.given() && !enters) {
      return;  // one segment, and nobody asks for its end
    }

    bool const is_state = block < kStateBlocks;
    std::int64_t const size = is_state ? kStateSize : kStateDim;
    int const element = kPiece * (kThreads * (is_state ? block : block - kStateBlocks) + thread);
    bool const owns = element < size;  // others help with the factors
    Element* const target = is_state ? params.states : params.key_sums;
    float const* const ends = is_state ? params.segment_state : params.segment_key_sum;
    int const* const exponents = is_state ? params.state_exponents : params.key_sum_exponents;

    std::int64_t const first_end = cut.slot(in_segments, 0,
                                            params.ends.given() ? Slots::kAll
                                            : kBackward         ? Slots::kButFirst
                                                                : Slots::kButLast) *
                                       params.heads +
                                   head;
    int const segments = cute::max(cute::ceil_div(chunks, segment_chunks), 1);
    auto load_end = [&](int segment, float (&x)[kPiece]) {
      load(ends + (first_end + static_cast<std::int64_t>(segment) * params.heads) * size + element,
           x);
    };
    float carry[kPiece] = {};
    if (owns && enters) {
      std::int64_t const sequence_head =
          static_cast<std::int64_t>(sequence.index) * params.heads + head;
      load((is_state ? params.outer_state : params.outer_key_sum) + sequence_head * size + element,
           carry);
    } else if (owns) {
      load_end(kBackward ? segments - 1 : 0, carry);
    }
    for (int walked = enters ? 0 : 1; walked < segments; ++walked) {
      int const segment = kBackward ? segments - 1 - walked : walked;
      int const first = segment * segment_chunks;
      int const count = cute::min(segment_chunks, chunks - first);
      float log_decay = 0.0f;
#pragma unroll 1
      for (int start = 0; start < count; start += kThreads) {
        int const batch = cute::min(cute::Int<kThreads>{}, count - start);
        int const chunk = kBackward ? first + count - 1 - start : first + start;
        log_decay =
            load_factors(params, shared, sequence, head, chunk, batch, log_decay, exponents);
        if (params.states != nullptr && owns) {
          std::int64_t const slot_head =
              params.sequences.slot(sequence, chunk, params.slots) * params.heads + head;
          add(shared, batch, carry, target + slot_head * size + element,
              (kBackward ? -1 : 1) * params.heads * size);
        }
      }
      if (owns && (params.ends.given() || walked + 1 < segments)) {
        float own[kPiece];
        load_end(segment, own);
        float const decay = detail::exp2(log_decay);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          carry[i] = decay == 0.0f ? own[i] : decay * carry[i] + own[i];
        }
      }
    }
    if (params.ends.given() && owns) {
      store_end(params, carry);
    }
  }

 private:
  // Where it goes is found again, since registers are short.
  CUTE_DEVICE static void store_end(Params const& params, float const (&carry)[kPiece]) {
    int const index = detail::recomputed(static_cast<int>(blockIdx.x));
    int const block = index % kBlocks;
    int const sequence = params.sequences.get(index / kBlocks).index;
    int const element = kPiece * (kThreads * (block < kStateBlocks ? block : block - kStateBlocks) +
                                  detail::recomputed(static_cast<int>(threadIdx.x)));
    params.ends.write({params.heads, kStateDim, Traits::kValueDim}, sequence, sequence,
                      static_cast<int>(blockIdx.y), [&](auto const& end) {
#pragma unroll
                        for (int i = 0; i < kPiece; i += 2) {
                          if (block < kStateBlocks) {
                            end.store(element + i, make_float2(carry[i], carry[i + 1]));
                          } else {
                            end.store_sum(element + i, carry[i]);
                            end.store_sum(element + i + 1, carry[i + 1]);
                          }
                        }
                      });
  }

  CUTE_DEVICE static void load(float const* source, float (&x)[kPiece]) {
#pragma unroll
    for (int i = 0; i < kPiece; i += 4) {
      float4 const y = *reinterpret_cast<float4 const*>(source + i);
      x[i] = y.x;
      x[i + 1] = y.y;
      x[i + 2] = y.z;
      x[i + 3] = y.w;
    }
  }

  // Puts the factors of `count` chunks into shared memory, given the log of the first; returns the
  // log of the factor after them. All threads of a block take part.
  CUTE_DEVICE static float load_factors(Params const& params, SharedStorage& shared,
                                        Sequence const& sequence, int head, int first_chunk,
                                        int count, float log_decay, int const* exponents) {
    int const thread = threadIdx.x;
    int const warp = thread / 32;
    int const lane = thread % 32;
    int const chunk = kBackward ? first_chunk - thread : first_chunk + thread;
    float gate = 0.0f;
    float scale = 1.0f;
    if (thread < count) {
      if (params.gate != nullptr) {
        std::int64_t const end = (chunk + std::int64_t{1}) * sequence.chunk_size;
        std::int64_t const last = cute::min(end, std::int64_t{sequence.length}) - 1;
        gate = params.gate[params.gate_stride.at(sequence, last, head)].total();
      }
      if constexpr (kScaled) {
        if (exponents != nullptr) {
          int const exponent = exponents[(sequence.first_slot + chunk) * params.heads + head];
          scale = detail::power_of_two(-exponent);
        }
      }
    }
    float inclusive = gate;
#pragma unroll
    for (unsigned delta = 1; delta < 32; delta *= 2) {
      float const before = __shfl_up_sync(0xffffffffu, inclusive, delta);
      inclusive = static_cast<unsigned>(lane) < delta ? inclusive : before + inclusive;
    }
    float const before = __shfl_up_sync(0xffffffffu, inclusive, 1);
    if (lane == 31) {
      shared.warps[warp] = inclusive;
    }
    __syncthreads();  // by now, the factors of the batch before have been used as well
    float warp_log = log_decay;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) {
        warp_log = log_decay;
      }
      log_decay += shared.warps[i];
    }
    shared.factor[thread] = detail::exp2(lane == 0 ? warp_log : warp_log + before);
    shared.scale[thread] = scale;
    __syncthreads();
    return log_decay;
  }

  // target[chunk * stride] += factor * carry for `count` chunks in the order of the walk.
  CUTE_DEVICE static void add(SharedStorage const& shared, int count, float const (&carry)[kPiece],
                              Element* target, std::int64_t stride) {
#pragma unroll 1
    for (int start = 0; start < count; start += kUnrolled) {
      uint4 stored[kUnrolled];
      float factor[kUnrolled];
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) {
        // Nothing of the carry is left where the factor is 0.
        factor[i] = start + i < count ? shared.factor[start + i] : 0.0f;
        if (factor[i] != 0.0f) {
          stored[i] = *reinterpret_cast<uint4 const*>(target + i * stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) {
        if (factor[i] != 0.0f) {
          // Two factors: their product may be out of fp32's range where the result is not.
          float const scale = kScaled ? shared.scale[start + i] : 1.0f;
          auto const sum = [&](std::uint32_t pair, int j) {
            float lo = factor[i] * carry[j];
            float hi = factor[i] * carry[j + 1];
            if constexpr (kScaled) {
              lo *= scale;
              hi *= scale;
            }
            return detail::pack<Element>(detail::unpack_lo<Element>(pair) + lo,
                                         detail::unpack_hi<Element>(pair) + hi);
          };
          *reinterpret_cast<uint4*>(target + i * stride) = uint4{
              sum(stored[i].x, 0), sum(stored[i].y, 2), sum(stored[i].z, 4), sum(stored[i].w, 6)};
        }
      }
      target += kUnrolled * stride;
    }
  }
};

}  // namespace retention::kernel
