// Joins sequences whose segments `ChunkStates` walked over at the same time. Segment 0 of a
// sequence started from the initial state, every other from zero; each state of segment s lacks
// what came before the segment, decayed:
//
//     S_c += exp(sum of G from the segment's first chunk to before chunk c) carry_s
//     carry_1 = final_0,   carry_{s+1} = exp(sum of G of the segment) carry_s + final_s
//
// and z likewise. A thread owns 16 bytes of the state of one sequence and head, and keeps their
// carry in fp32 registers.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/detail/packed.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::kernel {

template <class Element_, int HeadDim, int ValueDim>
struct CarryTraits {
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = ValueDim;
};

template <class Traits>
struct Carry {
  using Element = typename Traits::Element;

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
    Element* states;    // [slots, h, D, dv] before each chunk, updated; null to skip
    Element* key_sums;  // [slots, h, D], updated; with states
    // After each segment alone; of a sequence's last with sequence_final_state only. A segment is
    // an item, with a number as a chunk has a slot (`Sequences::segments`).
    float const* final_state;    // [items, h, D, dv]
    float const* final_key_sum;  // [items, h, D]
    float const* gate;           // [b, t, h] cumulative log gate since the chunk's start; or null
    TokenStride gate_stride;
    Exponents exponents;            // of states and key_sums; fp16 only
    float* sequence_final_state;    // [count, h, D, dv]; null to skip
    float* sequence_final_key_sum;  // [count, h, D]; with sequence_final_state
    Sequences sequences;
    int heads;
    int segment_tokens;  // a multiple of the chunk size
  };

  /// (piece of the state and sequence, piece fastest; head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(kBlocks) * static_cast<unsigned>(params.sequences.count),
                static_cast<unsigned>(params.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    int const thread = threadIdx.x;
    int const head = blockIdx.y;
    int const index = static_cast<int>(blockIdx.x / kBlocks);
    int const block = static_cast<int>(blockIdx.x % kBlocks);
    Sequence const sequence = params.sequences.get(index);
    int const chunks = cute::ceil_div(sequence.length, params.sequences.chunk_size);
    int const segment_chunks = params.segment_tokens / params.sequences.chunk_size;
    if (chunks <= segment_chunks && params.sequence_final_state == nullptr) {
      return;  // one segment, and nobody asks for its end
    }

    bool const is_state = block < kStateBlocks;
    std::int64_t const size = is_state ? kStateSize : kStateDim;
    int const element = kPiece * (kThreads * (is_state ? block : block - kStateBlocks) + thread);
    bool const owns = element < size;  // others help with the factors
    Element* const target = is_state ? params.states : params.key_sums;
    float const* const finals = is_state ? params.final_state : params.final_key_sum;
    float* const result = is_state ? params.sequence_final_state : params.sequence_final_key_sum;
    int const* const exponents = is_state ? params.exponents.state : params.exponents.key_sum;

    std::int64_t const first_item =
        params.sequences.segments(params.segment_tokens).get(index).first_slot * params.heads +
        head;
    float carry[kPiece] = {};
    if (owns) {
      load(finals + first_item * size + element, carry);
    }
    for (int segment = 1; segment * static_cast<std::int64_t>(segment_chunks) < chunks; ++segment) {
      int const first = segment * segment_chunks;
      int const count = cute::min(segment_chunks, chunks - first);
      float log_decay = 0.0f;
#pragma unroll 1
      for (int start = 0; start < count; start += kThreads) {
        int const batch = cute::min(cute::Int<kThreads>{}, count - start);
        log_decay = load_factors(params, shared, sequence, head, first + start, batch, log_decay,
                                 exponents);
        if (params.states != nullptr && owns) {
          std::int64_t const slot_head =
              (sequence.first_slot + first + start) * params.heads + head;
          add(shared, batch, carry, target + slot_head * size + element, params.heads * size);
        }
      }
      if (owns && (result != nullptr || first + count < chunks)) {
        float own[kPiece];
        std::int64_t const item = first_item + static_cast<std::int64_t>(segment) * params.heads;
        load(finals + item * size + element, own);
        float const decay = detail::exp_scaled(log_decay, 0.0f);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          carry[i] = decay == 0.0f ? own[i] : decay * carry[i] + own[i];
        }
      }
    }
    if (result != nullptr && owns) {
      std::int64_t const item = static_cast<std::int64_t>(index) * params.heads + head;
      float4* const out = reinterpret_cast<float4*>(result + item * size + element);
      out[0] = {carry[0], carry[1], carry[2], carry[3]};
      out[1] = {carry[4], carry[5], carry[6], carry[7]};
    }
  }

 private:
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
    int const chunk = first_chunk + thread;
    float gate = 0.0f;
    float scale = 1.0f;
    if (thread < count) {
      if (params.gate != nullptr) {
        std::int64_t const end = (chunk + std::int64_t{1}) * params.sequences.chunk_size;
        std::int64_t const last = cute::min(end, std::int64_t{sequence.length}) - 1;
        gate = params.gate[params.gate_stride.at(sequence, last, head)];
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
    shared.factor[thread] = detail::exp_scaled(lane == 0 ? warp_log : warp_log + before, 0.0f);
    shared.scale[thread] = scale;
    __syncthreads();
    return log_decay;
  }

  // target[chunk * stride] += factor * carry for `count` chunks.
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
