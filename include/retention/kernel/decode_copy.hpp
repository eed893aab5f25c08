// Copies of slots, as if all sources were read before any target is written: beams may change
// places.
//
// A block has some words of all slots at one time: it reads them from every source into shared
// memory, and then writes them to every target. No slot is twice among the targets.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/decode_pool.hpp"

namespace retention::kernel {

struct DecodeCopy {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWords = 8192;  // of 4 bytes, in shared memory
  static constexpr int kMaxSlots = kWords;
  static constexpr int kMaxTensors = 7;

  struct SharedStorage {
    std::uint32_t words[kWords];
  };

  /// [slots, heads, words] of 4 bytes, words contiguous. A null pointer stands for none.
  struct Tensor {
    std::uint32_t* data;
    std::int64_t slot_stride;  // in words
    std::int64_t head_stride;
    int heads;
    int words;
  };

  struct Params {
    int const* source;  // [count]
    int const* target;  // [count]
    int count;          // at most kMaxSlots
    SlotCursors cursors;
    Tensor tensors[kMaxTensors];

    /// Pairs with a slot that is not there stand for nothing.
    CUTE_HOST_DEVICE bool has(int pair) const {
      return cursors.has(source[pair]) && cursors.has(target[pair]);
    }
    /// Words of a slot that a block has at one time.
    CUTE_HOST_DEVICE int words() const { return kWords / count; }
  };

  /// Those of a pool with states of `state` and rings of `ring` elements a slot and head.
  template <class Element>
  CUTE_HOST static void set_tensors(Params& params, DecodePool<Element> const& pool, int heads,
                                    int state_dim, int head_dim, int value_dim) {
    params.cursors = pool.cursors;
    Tensor* next = params.tensors;
    auto const add = [&](auto const& part, std::int64_t elements) {
      constexpr auto kInWord =
          static_cast<std::int64_t>(sizeof(std::uint32_t) / sizeof(*part.data));
      *next++ = {reinterpret_cast<std::uint32_t*>(part.data), part.slot_stride / kInWord,
                 part.head_stride / kInWord, heads, static_cast<int>(elements / kInWord)};
    };
    add(pool.high, std::int64_t{state_dim} * value_dim);
    add(pool.low, std::int64_t{state_dim} * value_dim);
    add(pool.key_sum, state_dim);
    add(pool.keys, std::int64_t{pool.ring} * head_dim);
    add(pool.values, std::int64_t{pool.ring} * value_dim);
    add(pool.log_gates, pool.ring);
    constexpr int kCursorWords = sizeof(Cursor) / sizeof(std::uint32_t);
    *next++ = {reinterpret_cast<std::uint32_t*>(pool.cursors.data),
               kCursorWords * pool.cursors.stride, 0, 1, kCursorWords};
  }

  /// (parts of the largest tensor, heads, tensors)
  CUTE_HOST static dim3 grid(Params const& params) {
    int words = 1, heads = 1;
    for (Tensor const& tensor : params.tensors) {
      words = cute::max(words, tensor.words);
      heads = cute::max(heads, tensor.heads);
    }
    return dim3(static_cast<unsigned>((words + params.words() - 1) / params.words()),
                static_cast<unsigned>(heads), kMaxTensors);
  }

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    auto& shared = *reinterpret_cast<SharedStorage*>(smem);
    Tensor const& tensor = params.tensors[blockIdx.z];
    int const width = params.words();
    int const first = static_cast<int>(blockIdx.x) * width;
    int const head = static_cast<int>(blockIdx.y);
    if (tensor.data == nullptr || first >= tensor.words || head >= tensor.heads) {
      return;
    }
    int const words = cute::min(width, tensor.words - first);
    auto const at = [&](int slot, int word) {
      return tensor.data + slot * tensor.slot_stride + head * tensor.head_stride + first + word;
    };
    auto const for_each = [&](auto const& body) {
      for (int i = static_cast<int>(threadIdx.x); i < params.count * words; i += kThreads) {
        int const pair = i / words;
        if (params.has(pair)) {
          body(pair, i % words, shared.words[i]);
        }
      }
    };
    for_each(
        [&](int pair, int word, std::uint32_t& held) { held = *at(params.source[pair], word); });
    __syncthreads();
    for_each([&](int pair, int word, std::uint32_t const& held) {
      *at(params.target[pair], word) = held;
    });
  }
};

}  // namespace retention::kernel
