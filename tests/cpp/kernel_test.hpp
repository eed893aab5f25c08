// What tests of single kernels on the emulator share: where tokens are in tensors, numbers of the
// element type, and the launch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cute/tensor.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "emulator/emulator.hpp"
#include "emulator_launcher.hpp"
#include "retention/detail/cumulative_gate.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::test {

/// Of a [b, t, h, *] tensor in memory.
enum class Order {
  kTokensHeads,  // [b, t, h, *]
  kHeadsTokens,  // [b, h, t, *]
  kGaps,         // [b, t, h, *] with gaps between heads, tokens and rows of the batch
};

/// Sequences, and where their tokens are in [b, t, h, *] tensors: in rows of a batch, or packed.
/// Offsets are worked out here a second time: those of the kernels are under test.
struct SequenceLayout {
  std::size_t sequences;
  bool packed;
  std::size_t batch;
  std::size_t tokens;                     // in a row of the batch
  std::vector<std::size_t> starts = {0};  // [sequences + 1] tokens of the sequences before
  int first_token;                        // where the first one starts
  emulator::GlobalArray<kernel::SequenceList::Entry> list;  // all of them, empty ones too
  emulator::GlobalArray<int> listed;

  SequenceLayout(std::vector<int> const& lengths, bool packed_, int first_token_ = 0)
      : sequences(lengths.size()),
        packed(packed_),
        batch(packed ? 1 : sequences),
        first_token(first_token_),
        list("sequences", sequences, true),
        listed("number of sequences", 1, true) {
    for (int const length : lengths) {
      starts.push_back(starts.back() + static_cast<std::size_t>(length));
    }
    int const longest = *std::max_element(lengths.begin(), lengths.end());
    tokens = packed ? starts.back() : static_cast<std::size_t>(longest);
    for (std::size_t s = 0; s < sequences; ++s) {
      list[s] = {static_cast<int>(s), first_token + static_cast<int>(starts[s]), lengths[s], 1};
    }
    listed[0] = static_cast<int>(sequences);
  }

  kernel::Sequences in_chunks(int chunk_size) const {
    auto const count = static_cast<int>(sequences);
    kernel::SequenceList const all{list.data(), listed.data()};
    return {packed ? all : kernel::SequenceList{},
            first_token + static_cast<int>(tokens),
            chunk_size,
            count,
            count,
            chunk_size,
            chunk_size};
  }

  kernel::TokenStride strides(Order order, std::size_t heads, std::size_t width = 1) const {
    auto const t = static_cast<std::int64_t>(tokens), h = static_cast<std::int64_t>(heads);
    auto const w = static_cast<std::int64_t>(width);
    switch (order) {
      case Order::kTokensHeads:
        return {t * h * w, h * w, w};
      case Order::kHeadsTokens:
        return {h * t * w, w, t * w};
      case Order::kGaps:
        break;
    }
    return {t * (3 * h * w + 2) + 5, 3 * h * w + 2, 3 * w};
  }
  /// Contiguous, or [b, h, t, width + 8] where `strided`.
  kernel::TokenStride strides(std::size_t heads, std::size_t width, bool strided) const {
    return strided ? strides(Order::kHeadsTokens, heads, width + 8)
                   : strides(Order::kTokensHeads, heads, width);
  }

  /// The least that a tensor needs: an access beyond its last element is out of bounds.
  std::size_t size_of(kernel::TokenStride const& stride, std::size_t heads,
                      std::size_t width = 1) const {
    return static_cast<std::size_t>(stride.batch) * (batch - 1) +
           static_cast<std::size_t>(stride.token) * (tokens - 1) +
           static_cast<std::size_t>(stride.head) * (heads - 1) + width;
  }

  /// Where token t of sequence s is.
  std::size_t at(kernel::TokenStride const& stride, std::size_t s, std::size_t t,
                 std::size_t h) const {
    return (packed ? 0 : s) * static_cast<std::size_t>(stride.batch) +
           ((packed ? starts[s] : 0) + t) * static_cast<std::size_t>(stride.token) +
           h * static_cast<std::size_t>(stride.head);
  }
  std::size_t at(kernel::TokenStride const& stride, std::size_t s, int t, std::size_t h) const {
    return at(stride, s, static_cast<std::size_t>(t), h);
  }
};

/// Cumulative log gates as kernel::Gates leaves them.
class GateSum {
 public:
  detail::CumulativeGate add(float log_gate, bool starts_chunk) {
    sum_ =
        (starts_chunk ? 0.0 : sum_) + detail::kLog2E * double{detail::limited_log_gate(log_gate)};
    return detail::CumulativeGate::from(sum_);
  }

 private:
  double sum_ = 0.0;
};

inline std::size_t first_slot_of(kernel::Sequences const& sequences, std::size_t s) {
  return static_cast<std::size_t>(sequences.get(static_cast<int>(s)).first_slot);
}

/// Of a chunk among those that have slots.
inline std::size_t slot_of(kernel::Sequences const& sequences, std::size_t s, std::size_t chunk,
                           kernel::Slots slots) {
  return static_cast<std::size_t>(
      sequences.slot(sequences.get(static_cast<int>(s)), static_cast<int>(chunk), slots));
}

/// Whether a kernel takes so long on the emulator that it runs only the cases that its size makes a
/// difference to.
template <int HeadDim, int ValueDim>
constexpr bool kLarge = HeadDim * ValueDim > 64 * 64;

/// Relative error of one conversion to Element, at most.
template <class Element>
constexpr double kRoundoff = std::is_same_v<Element, cute::bfloat16_t> ? 0x1p-8 : 0x1p-11;

/// Never infinite, however large the draw.
template <class Element>
Element saturated(float x) {
  constexpr float kLargest = std::is_same_v<Element, cute::bfloat16_t> ? 3e38f : 65504.0f;
  return Element(std::clamp(x, -kLargest, kLargest));
}

/// Stores 2^-e x and returns e: in fp16 such that the largest is in [2^13, 2^14), else 0.
template <class Element>
int store_scaled(std::vector<double> const& x, Element* target) {
  double largest = 0.0;
  for (double const y : x) {
    largest = std::max(largest, std::abs(y));
  }
  bool const scaled = std::is_same_v<Element, cute::half_t> && largest > 0.0;
  int const e = scaled ? std::ilogb(largest) - 13 : 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    target[i] = Element(static_cast<float>(std::ldexp(x[i], -e)));
  }
  return e;
}

/// The least e with |x| < 2^e; 0 for 0.
inline int exponent_of(double x) {
  int e = 0;
  std::frexp(x, &e);
  return e;
}

/// Launches and says whether there was no fault.
template <class Kernel>
bool launch(typename Kernel::Params const& params, std::uint64_t seed) {
  device::Status const status = EmulatorLauncher{seed}.launch<Kernel>(params);
  RETENTION_CHECK_EQUAL(status.message(), std::string());
  return status.ok();
}

/// How many elements have been written: the others still read as NaN.
template <class T>
std::size_t written(emulator::GlobalArray<T>& array) {
  return static_cast<std::size_t>(std::count_if(
      array.begin(), array.end(), [](T const& x) { return !std::isnan(static_cast<float>(x)); }));
}

}  // namespace retention::test
