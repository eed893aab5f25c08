// The memory of many sequences that are decoded: slots of a pool, which belongs to the caller.
//
// Per slot and key head there are the state, into which old tokens were folded, and a ring of the
// recent ones, which are read one by one. A state in fp32 is two planes of 16 bits: `high`, its
// bits rounded to their upper half, which is a bf16, and `low`, the bits less those of the high
// plane. A step reads the high plane alone, half the bytes; a fold reads and writes both, and loses
// nothing.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/cursor.hpp"

namespace retention::kernel {

/// A part of the pool, [slots, heads, ...]; what follows the heads is contiguous.
template <class T>
struct SlotTensor {
  T* data;
  std::int64_t slot_stride;  // in elements
  std::int64_t head_stride;

  CUTE_HOST_DEVICE T* at(int slot, int head) const {
    return data + slot * slot_stride + head * head_stride;
  }
};

/// The cursors of a pool, and which slots it has.
struct SlotCursors {
  Cursor* data;
  std::int64_t stride;  // from slot to slot, in cursors
  int slots;
  int null_slot;  // slots up to this one stand for nothing, as those beyond the last

  CUTE_HOST_DEVICE bool has(int slot) const {
    return slot > null_slot && slot >= 0 && slot < slots;
  }
  CUTE_HOST_DEVICE Cursor* at(int slot) const { return data + slot * stride; }
};

template <class Element>
struct DecodePool {
  SlotTensor<cute::bfloat16_t> high;  // [slots, heads, D, dv]
  SlotTensor<std::int16_t> low;       // the same; null where states are bf16
  SlotTensor<float> key_sum;          // [slots, heads, D]
  SlotTensor<Element> keys;           // [slots, heads, ring, d]
  SlotTensor<Element> values;         // [slots, heads, ring, dv]
  SlotTensor<float> log_gates;        // [slots, heads, ring]; null without gates
  SlotCursors cursors;
  int ring;  // tokens it can hold

  CUTE_HOST_DEVICE bool has(int slot) const { return cursors.has(slot); }
  CUTE_HOST_DEVICE Cursor* cursor(int slot) const { return cursors.at(slot); }

  /// Where the ring has a token, counted from its oldest.
  CUTE_HOST_DEVICE int place(Cursor const& cursor, int token) const {
    int const place = cursor.start + token;
    return place < ring ? place : place - ring;
  }
};

}  // namespace retention::kernel
