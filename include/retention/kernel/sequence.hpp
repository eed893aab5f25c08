// Where the tokens and the states of a sequence are, for batches of equal length and packed ones.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

namespace retention::kernel {

struct Sequence {
  std::int64_t batch;        // row of the batch; 0 when packed
  std::int64_t first_token;  // in that row; 0 unless packed
  std::int64_t first_slot;   // of its chunks
  int index;                 // among all sequences
  int length;
  int chunk_size;
  bool continues;  // whether there is a state before it, where there may be any
};

/// A chunk of a sequence.
struct Chunk {
  int sequence;  // place among those listed
  int index;     // in the sequence
};

/// Which chunks of a packed sequence have slots.
enum class Slots { kAll, kButFirst, kButLast };

/// For states before chunks: that of a first chunk is there where it was given.
CUTE_HOST_DEVICE constexpr Slots state_slots(bool initial_states) {
  return initial_states ? Slots::kAll : Slots::kButFirst;
}
/// For gradients of states after chunks: likewise that of a last chunk.
CUTE_HOST_DEVICE constexpr Slots gradient_slots(bool final_gradients) {
  return final_gradients ? Slots::kAll : Slots::kButLast;
}

/// Some of the packed sequences, in their order, as kernel/sequence_lists.hpp finds them on the
/// device: batches of a fixed capacity may hold thousands of empty ones.
struct SequenceList {
  struct alignas(16) Entry {
    int index;  // among all sequences
    int first_token;
    int length;
    int continues;  // not 0: there is a state before it, where there may be any
  };
  Entry const* entries;
  int const* count;
};

/// Sequences, each cut into chunks. Every chunk has a *slot*, its place in memory, and a *number*,
/// by which blocks find their work; both in the order of sequences and chunks. Packed sequences
/// leave some of them without a chunk, so that they follow from where a sequence starts by a sum,
/// and a chunk from its number by a search, on the device.
struct Sequences {
  SequenceList list;  // of packed sequences; else null
  int length;         // tokens in each row of the batch; in all of them when packed
  int chunk_size;
  int count;   // of all sequences
  int listed;  // at most; all unless packed
  // Packed sequences of no more tokens than this are one chunk, of at least that and a multiple of
  // 64 tokens.
  int whole_until;
  int whole_chunk;

  CUTE_HOST_DEVICE bool packed() const { return list.entries != nullptr; }

  /// Chunks of a row of the batch.
  CUTE_HOST_DEVICE int max_chunks() const { return (length + chunk_size - 1) / chunk_size; }

  /// Slots::kAll of them.
  CUTE_HOST_DEVICE std::int64_t num_slots() const {
    return packed() ? static_cast<std::int64_t>(length / chunk_size) + count
                    : static_cast<std::int64_t>(count) * max_chunks();
  }

  /// The same sequences in larger parts, which consist of whole chunks.
  CUTE_HOST_DEVICE Sequences segments(int segment_tokens) const {
    return {list,
            length,
            segment_tokens,
            count,
            listed,
            cute::max(segment_tokens, whole_until),
            cute::max(segment_tokens, whole_chunk)};
  }
  /// The same sequences in pieces, whatever their chunks are.
  CUTE_HOST_DEVICE Sequences pieces(int tokens) const {
    return {list, length, tokens, count, listed, tokens, tokens};
  }

  /// Of those listed, how many there are.
  CUTE_HOST_DEVICE int num_listed() const { return packed() ? *list.count : count; }

  /// Of those listed.
  CUTE_HOST_DEVICE Sequence get(int place) const {
    if (!packed()) {
      return {place,      0,   static_cast<std::int64_t>(place) * max_chunks(), place, length,
              chunk_size, true};
    }
    SequenceList::Entry const entry = list.entries[place];
    int const size = entry.length <= whole_until ? whole_chunk : chunk_size;
    // ceil(n / c) <= floor((first + n) / c) - floor(first / c) + 1: slots never overlap, and nobody
    // has to add up the chunks of the sequences before.
    return {0,
            entry.first_token,
            static_cast<std::int64_t>(start(entry)) + entry.index,
            entry.index,
            entry.length,
            size,
            entry.continues != 0};
  }

  /// The slot of a chunk among those of some chunks. Where each sequence has one without, they are
  /// no more than chunks fit into all tokens, however many sequences there are.
  CUTE_HOST_DEVICE std::int64_t slot(Sequence const& sequence, int chunk, Slots slots) const {
    return sequence.first_slot + chunk - without_slots(sequence, slots);
  }
  /// What slots of all chunks are ahead of these.
  CUTE_HOST_DEVICE int without_slots(Sequence const& sequence, Slots slots) const {
    return !packed() || slots == Slots::kAll ? 0
                                             : sequence.index + (slots == Slots::kButFirst ? 1 : 0);
  }

  /// How many numbers there are, some of them of no chunk.
  CUTE_HOST_DEVICE int num_chunks() const {
    return packed() ? numbers(length / chunk_size) : static_cast<int>(num_slots());
  }
  /// How many there are to `search`, where all tokens have `of_tokens` and each sequence another
  /// one; none where there are no sequences.
  CUTE_HOST_DEVICE int numbers(int of_tokens) const {
    int const listed_now = *list.count;
    return listed_now == 0 ? 0 : of_tokens + listed_now;
  }
  /// At most so many.
  CUTE_HOST_DEVICE std::int64_t most_chunks() const {
    return packed() ? static_cast<std::int64_t>(length / chunk_size) + listed : num_slots();
  }

  /// The chunk of a number below num_chunks(); beyond the end of its sequence where there is none.
  /// All lanes of a warp have the same number.
  CUTE_DEVICE Chunk find(int number) const {
    if (!packed()) {
      return {number / max_chunks(), number % max_chunks()};
    }
    return search(number, [&](SequenceList::Entry const& entry) { return start(entry); });
  }

  /// The last of those listed whose first number is not above `number`, and what that is ahead of
  /// it: too much for any sequence where there is none. `first` is what the tokens before it have.
  /// Each lane looks at another one, for what takes time is one load after the other.
  template <class First>
  CUTE_DEVICE Chunk search(int number, First first) const {
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int low = 0;
    int high = *list.count;
    do {
      int const step = (high - low + 31) / 32;
      int const place = low + lane * step;
      int const own = place < high ? first(list.entries[place]) + place : INT32_MAX;
      unsigned const before = __ballot_sync(0xffffffffu, lane == 0 || own <= number);
      int const last = 31 - __clz(static_cast<int>(before));
      low += last * step;
      high = cute::min(low + step, high);
    } while (high - low > 1);
    int const ahead = number - low - first(list.entries[low]);
    return {low, ahead < 0 ? INT32_MAX : ahead};
  }

  /// Blocks that take turns, see kernel/items.hpp, where tokens make up to `of_tokens` items and
  /// each of those listed another one.
  CUTE_HOST std::int64_t turn_blocks(std::int64_t of_tokens) const {
    constexpr int kFew = 128;
    return packed() ? 2 * of_tokens + kFew : INT32_MAX;
  }

 private:
  CUTE_HOST_DEVICE int start(SequenceList::Entry const& entry) const {
    return entry.first_token / chunk_size;
  }
};

/// Powers of two that keep 16-bit floats of a narrow exponent (fp16) in range, whatever the
/// magnitude of keys and values and the length of the sequence. Null pointers stand for zeros.
struct Exponents {
  // [count, h]: the elements of every key of the sequence and head are below 2^key, and its product
  // with a query of elements below 1 is below 2^score. Scores take the tighter bound, from norms.
  int const* key;
  int const* score;
  // [slots, h]: what is stored of a state is 2^-state S, and of its sum of keys 2^-key_sum z.
  int const* state;
  int const* key_sum;
};

/// Strides, in elements, of a [b, t, h, *] tensor whose last dimension is contiguous.
struct TokenStride {
  std::int64_t batch;
  std::int64_t token;
  std::int64_t head;

  CUTE_HOST_DEVICE std::int64_t at(Sequence const& sequence, std::int64_t t, int h) const {
    return sequence.batch * batch + (sequence.first_token + t) * token + h * head;
  }
};

}  // namespace retention::kernel
