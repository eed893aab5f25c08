// Where the states of sequences lie: in fp32, one after the other, or in the slots of a pool.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/decode_pool.hpp"
#include "retention/kernel/state_planes.hpp"

namespace retention::kernel {

/// The states of a head: [D, dv] each, with a sum of keys, [D].
struct StateShape {
  int heads;
  int state_dim;  // D
  int value_dim;  // dv

  CUTE_HOST_DEVICE std::int64_t size() const { return std::int64_t{state_dim} * value_dim; }
};

/// A state in fp32. `Float` may be const.
template <class Float = float>
struct FloatState {
  Float* state;
  Float* key_sum;

  /// Two neighbours, from an even place on.
  CUTE_DEVICE float2 load(int at) const { return *reinterpret_cast<float2 const*>(state + at); }
  CUTE_DEVICE void store(int at, float2 x) const { *reinterpret_cast<float2*>(state + at) = x; }
  CUTE_DEVICE float load_sum(int row) const { return key_sum[row]; }
  CUTE_DEVICE void store_sum(int row, float x) const { key_sum[row] = x; }

  /// The same from some column on.
  CUTE_DEVICE FloatState from(int column) const { return {state + column, key_sum}; }
};

/// A state in a slot of a pool, in two planes or in the high one alone.
struct PooledState {
  cute::bfloat16_t* high;
  std::int16_t* low;  // null: there is none
  float* key_sum;
  int slot;
  std::uint64_t place;  // of the first element, in the slot
  std::int64_t folded;

  CUTE_DEVICE float2 load(int at) const {
    return join_planes({word(high + at), low == nullptr ? 0 : word(low + at)});
  }
  CUTE_DEVICE void store(int at, float2 x) const {
    if (low == nullptr) {
      word(high + at) =
          round_at_random(x, random_bits(slot, place + static_cast<std::uint64_t>(at), folded));
    } else {
      PlanePair const pair = split_planes(x);
      word(high + at) = pair.high;
      word(low + at) = pair.low;
    }
  }
  CUTE_DEVICE float load_sum(int row) const { return key_sum[row]; }
  CUTE_DEVICE void store_sum(int row, float x) const { key_sum[row] = x; }

  CUTE_DEVICE PooledState from(int column) const {
    return {high + column, low == nullptr ? nullptr : low + column,    key_sum,
            slot,          place + static_cast<std::uint64_t>(column), folded};
  }

 private:
  template <class T>
  CUTE_DEVICE static std::uint32_t& word(T* data) {
    return *reinterpret_cast<std::uint32_t*>(data);
  }
};

/// States in a pool.
struct PooledStates {
  SlotTensor<cute::bfloat16_t> high;  // [slots, heads, D, dv]
  SlotTensor<std::int16_t> low;       // the same; null where states are bf16
  SlotTensor<float> key_sum;          // [slots, heads, D]
  SlotCursors cursors;
  int const* slots;  // [count], of each sequence; null: there is no pool

  CUTE_HOST_DEVICE bool given() const { return slots != nullptr; }
};

/// One state for each of some items, of sequences or of their segments.
struct SequenceStates {
  float* state;    // [items, h, D, dv]; null where they are in a pool, or not there at all
  float* key_sum;  // [items, h, D]; with state
  PooledStates pool;

  CUTE_HOST_DEVICE bool given() const { return state != nullptr || pool.given(); }

  /// Calls `visit` with the state of a sequence and head, in fp32 that of `item`, if there is one:
  /// a slot may be empty, or not there. Returns whether there was.
  template <class Visit>
  CUTE_DEVICE bool read(StateShape const& shape, std::int64_t item, int sequence, int head,
                        Visit const& visit) const {
    return find(shape, item, sequence, head, 1, visit);
  }

  /// The same of one to be written, which may be empty.
  template <class Visit>
  CUTE_DEVICE void write(StateShape const& shape, std::int64_t item, int sequence, int head,
                         Visit const& visit) const {
    find(shape, item, sequence, head, 0, visit);
  }

 private:
  template <class Visit>
  CUTE_DEVICE bool find(StateShape const& shape, std::int64_t item, int sequence, int head,
                        std::int64_t least_folded, Visit const& visit) const {
    if (!pool.given()) {
      std::int64_t const place = item * shape.heads + head;
      visit(FloatState<>{state + place * shape.size(), key_sum + place * shape.state_dim});
      return true;
    }
    int const slot = pool.slots[sequence];
    if (!pool.cursors.has(slot)) {
      return false;
    }
    std::int64_t const folded = pool.cursors.at(slot)->folded;
    if (folded < least_folded) {
      return false;
    }
    visit(PooledState{pool.high.at(slot, head),
                      pool.low.data == nullptr ? nullptr : pool.low.at(slot, head),
                      pool.key_sum.at(slot, head), slot,
                      static_cast<std::uint64_t>(head * shape.size()), folded});
    return true;
  }
};

}  // namespace retention::kernel
