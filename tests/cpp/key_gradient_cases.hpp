// Cases for the kernels whose rows are keys, and their inputs: what the kernels before them would
// have made, from float64.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "element.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"
#include "key_gradient_reference.hpp"
#include "retention/kernel/key_rows.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::test {

using emulator::GlobalArray;
using std::size_t;

struct KeyGradientCase {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {128};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  int group = 1;  // query heads a key head
  bool gated = true;
  bool final = false;      // whether the final state has a gradient
  bool strided = false;    // heads before tokens, and gaps between the rows
  float log_gate = 0.05f;  // magnitude
  bool steady = false;     // every log gate is -log_gate, else random
  bool rising = false;     // some log gates are positive
  float cliff = 0.0f;      // what token 64 forgets besides, as a log gate
  float key_scale = 1.0f;
  float value_scale = 1.0f;
  float d_output_scale = 1.0f;
  bool zeros = false;  // some rows of queries and of keys are zero
  int keys = 1 << 30;  // keys after so many tokens of a sequence are zero
  int resets = 0;      // every so many tokens; 0 for none
};

/// A case with the settings that `set` changes.
template <class Set>
KeyGradientCase make_case(char const* name, Set set) {
  KeyGradientCase c{name};
  set(c);
  return c;
}

/// The inputs of a case, and what to expect.
template <class Element, int HeadDim, int ValueDim>
class KeyGradientProblem {
 public:
  static constexpr bool kIsHalf = std::is_same_v<Element, cute::half_t>;
  static constexpr ElementType kElement = kIsHalf ? ElementType::kFloat16 : ElementType::kBFloat16;
  static constexpr int kQueryExponent = kIsHalf ? 7 : 0;

  KeyGradientProblem(KeyGradientCase const& c, std::uint64_t seed)
      : layout(c.lengths, c.packed), c_(c), rng_(static_cast<unsigned>(seed)) {
    auto const heads = static_cast<size_t>(c.heads);
    size_t const query_heads = heads * static_cast<size_t>(c.group);
    params.query_stride = layout.strides(query_heads, kDim, true);
    params.key_stride = layout.strides(heads, kDim, c.strided);
    params.value_stride = layout.strides(heads, kValue, c.strided);
    params.d_output_stride = layout.strides(query_heads, kValue, c.strided);
    params.gate_stride =
        layout.strides(c.strided ? Order::kHeadsTokens : Order::kTokensHeads, heads);
    params.row_stride = layout.strides(Order::kHeadsTokens, query_heads);
    query_ = {"query", layout.size_of(params.query_stride, query_heads, kDim), true};
    key_ = {"key", layout.size_of(params.key_stride, heads, kDim), true};
    value_ = {"value", layout.size_of(params.value_stride, heads, kValue), true};
    d_output_ = {"d_output", layout.size_of(params.d_output_stride, query_heads, kValue), true};
    gate_ = {"gate", layout.size_of(params.gate_stride, heads, 1), true};
    inverse_ = {"inverse", layout.size_of(params.row_stride, query_heads, 1), true};
    delta_ = {"delta", inverse_.size(), true};
    params.sequences = layout.in_chunks(c.chunk_size);
    auto const slot_heads = static_cast<size_t>(params.sequences.num_slots()) * heads;
    d_states_ = {"d_states", slot_heads * kState * kValue, true};
    d_key_sums_ = {"d_key_sums", slot_heads * kState, true};
    key_exponents_ = {"key exponents", c.lengths.size() * heads, true};
    state_exponents_ = {"state exponents", slot_heads, true};
    key_sum_exponents_ = {"key sum exponents", slot_heads, true};
    score_exponents_ = {"score exponents", slot_heads, true};
    params.query = query_.data();
    params.key = key_.data();
    params.value = value_.data();
    params.d_output = d_output_.data();
    params.gate = c.gated ? gate_.data() : nullptr;
    params.inverse = inverse_.data();
    params.delta = delta_.data();
    params.d_states = d_states_.data();
    params.d_key_sums = d_key_sums_.data();
    if (kIsHalf) {
      params.exponents.key = key_exponents_.data();
      params.gradient_exponents = {nullptr, nullptr, state_exponents_.data(),
                                   key_sum_exponents_.data(), score_exponents_.data()};
    }
    params.heads = c.heads;
    params.group = c.group;
    params.final_gradients = c.final;
    for (size_t s = 0; s < c.lengths.size(); ++s) {
      for (size_t h = 0; h < heads; ++h) {
        fill(s, h);
      }
    }
  }

  SequenceLayout const layout;
  kernel::KeyRowsParams<Element> params{};

  /// Calls visit(sequence, head, inputs, gradients).
  template <class Visit>
  void for_each_head(Visit visit) const {
    for (size_t i = 0; i < inputs_.size(); ++i) {
      auto const heads = static_cast<size_t>(c_.heads);
      visit(i / heads, i % heads, inputs_[i], expected_[i]);
    }
  }

  /// A relative error over a head of a tensor, in roundings. What the format itself cannot hold
  /// does not count: near the end of fp16's range the gradient's own rounding errors are larger.
  class Error {
   public:
    /// `magnitude` is that of fp32 terms that cancel.
    void add(double actual, double expected, double magnitude = 0.0) {
      double const difference = actual - expected;
      error_ += difference * difference;
      size_ += expected * expected;
      magnitude_ += magnitude * magnitude;
      double const format = rounded(kElement, expected) - expected;
      if (std::abs(expected) < 0x1p-14) {
        format_ += format * format;
      }
    }
    double roundings() const {
      if (size_ == 0.0) {
        return error_ == 0.0 ? 0.0 : 1e9;
      }
      double const excess =
          std::sqrt(error_) - std::sqrt(kIsHalf ? format_ : 0.0) - 1e-6 * std::sqrt(magnitude_);
      double const relative = std::max(excess, 0.0) / std::sqrt(size_);
      return (relative >= 0.0 ? relative : 1e9) / roundoff(kElement);
    }

   private:
    double error_ = 0.0, size_ = 0.0, format_ = 0.0, magnitude_ = 0.0;
  };

  std::string title() const {
    return std::string(c_.name) + ": d " + std::to_string(HeadDim) + ", dv " +
           std::to_string(ValueDim) + ", " + to_string(kElement);
  }

 private:
  static constexpr size_t kDim = HeadDim, kValue = ValueDim;
  static constexpr size_t kState = static_cast<size_t>(SymmetricPower<HeadDim, 2>::kStateDim);

  void fill_row(Element* row, size_t width, float magnitude, std::vector<double>& copy) {
    for (size_t i = 0; i < width; ++i) {
      row[i] = saturated<Element>(magnitude * normal_(rng_));
      copy.push_back(float(row[i]));
    }
  }

  // e with all |x| < 2^e.
  static int exponent_of(double const* x, size_t n) {
    double largest = 0.0;
    for (size_t i = 0; i < n; ++i) {
      largest = std::max(largest, std::abs(x[i]));
    }
    return largest == 0.0 ? -100 : std::ilogb(largest) + 1;
  }

  void fill(size_t s, size_t h) {
    auto const length = static_cast<size_t>(c_.lengths[s]);
    auto const group = static_cast<size_t>(c_.group), heads = static_cast<size_t>(c_.heads);
    KeyGradientInputs in;
    in.tokens = c_.lengths[s];
    in.head_dim = HeadDim;
    in.value_dim = ValueDim;
    in.group = c_.group;
    // Heads differ in their exponents.
    float const key_scale = std::ldexp(c_.key_scale, 3 * static_cast<int>(h));
    float const d_output_scale = std::ldexp(c_.d_output_scale, 10 * static_cast<int>(h));
    GateSum cumulative;
    for (size_t t = 0; t < length; ++t) {
      fill_row(&key_[layout.at(params.key_stride, s, t, h)], kDim,
               (c_.zeros && t % 3 == 1) || t >= static_cast<size_t>(c_.keys) ? 0.0f : key_scale,
               in.key);
      fill_row(&value_[layout.at(params.value_stride, s, t, h)], kValue, c_.value_scale, in.value);
      if (c_.gated) {
        float const draw = c_.steady ? 1.0f : c_.rising ? normal_(rng_) : std::abs(normal_(rng_));
        float const log_gate =
            with_resets(c_.resets, t, -c_.log_gate * draw - (t == 64 ? c_.cliff : 0.0f));
        gate_[layout.at(params.gate_stride, s, t, h)] =
            cumulative.add(log_gate, t % static_cast<size_t>(c_.chunk_size) == 0);
        in.gate.push_back(log_gate);
      }
    }
    for (size_t n = 0; n < group; ++n) {
      for (size_t t = 0; t < length; ++t) {
        Element* row = &query_[layout.at(params.query_stride, s, t, h * group + n)];
        std::vector<double> query;
        fill_row(row, kDim, c_.zeros && t % 4 == 3 ? 0.0f : 1.0f, query);
        int const e = exponent_of(query.data(), kDim);
        for (size_t i = 0; i < kDim; ++i) {
          in.query.push_back(std::ldexp(query[i], kQueryExponent - e));
        }
        fill_row(&d_output_[layout.at(params.d_output_stride, s, t, h * group + n)], kValue,
                 d_output_scale, in.d_output);
      }
    }
    if (c_.final && length > 0) {
      for (size_t i = 0; i < kState * kValue; ++i) {
        in.d_final_state.push_back(d_output_scale / (key_scale * key_scale) * normal_(rng_));
      }
      for (size_t i = 0; i < kState; ++i) {
        in.d_final_key_sum.push_back(d_output_scale * c_.value_scale / (key_scale * key_scale) *
                                     normal_(rng_));
      }
    }
    QueryRows const rows = query_rows(in);
    for (size_t n = 0; n < group; ++n) {
      for (size_t t = 0; t < length; ++t) {
        size_t const row = n * length + t;
        size_t const offset = layout.at(params.row_stride, s, t, h * group + n);
        inverse_[offset] = static_cast<float>(rows.inverse[row]);
        delta_[offset] = static_cast<float>(rows.delta[row]);
        Element* query = &query_[layout.at(params.query_stride, s, t, h * group + n)];
        for (size_t i = 0; i < kDim; ++i) {
          query[i] = Element(rows.inverse[row] > 0.0 ? static_cast<float>(in.query[row * kDim + i])
                                                     : 0.0f);
        }
      }
    }
    key_exponents_[s * heads + h] = exponent_of(in.key.data(), in.key.size());
    auto const gradients = state_gradients(in, rows, c_.chunk_size);
    size_t const first_slot = first_slot_of(params.sequences, s);
    for (size_t chunk = 0; chunk < gradients.size(); ++chunk) {
      size_t const slot = (first_slot + chunk) * heads + h;
      score_exponents_[slot] = score_exponent(in, rows, chunk);
      if (chunk + 1 == gradients.size() && !c_.final) {
        continue;  // left as NaN: nobody may read it
      }
      size_t const place =
          slot_of(params.sequences, s, chunk, kernel::gradient_slots(c_.final)) * heads + h;
      state_exponents_[slot] = store(gradients[chunk].state, &d_states_[place * kState * kValue]);
      key_sum_exponents_[slot] = store(gradients[chunk].key_sum, &d_key_sums_[place * kState]);
    }
    expected_.push_back(key_gradients(in, rows, c_.chunk_size));
    inputs_.push_back(std::move(in));
  }

  // In fp16 as close below 2^15 as a power of two brings it.
  static int store(std::vector<double> const& from, Element* to) {
    int const e = kIsHalf ? exponent_of(from.data(), from.size()) - 15 : 0;
    for (size_t i = 0; i < from.size(); ++i) {
      to[i] = Element(static_cast<float>(std::ldexp(from[i], -e)));
    }
    return e;
  }

  // y with 2 |da| 2^y < 2^15, from norms.
  int score_exponent(KeyGradientInputs const& in, QueryRows const& rows, size_t chunk) const {
    auto const length = static_cast<size_t>(in.tokens), c = static_cast<size_t>(c_.chunk_size);
    size_t const start = chunk * c, end = std::min(start + c, length);
    auto const norm = [](double const* x, size_t n) {
      double sum = 0.0;
      for (size_t i = 0; i < n; ++i) {
        sum += x[i] * x[i];
      }
      return std::sqrt(sum);
    };
    double value = 0.0, bound = 0.0;
    for (size_t t = 0; t < end; ++t) {
      value = std::max(value, norm(&in.value[t * kValue], kValue));
    }
    for (size_t row = 0; row < rows.inverse.size(); ++row) {
      if (row % length >= start && row % length < end) {
        bound = std::max(bound, std::sqrt(rows.inverse[row]) * 4.0 * value *
                                    norm(&in.d_output[row * kValue], kValue));
      }
    }
    return bound == 0.0 ? 0 : 14 - std::ilogb(bound);
  }

  KeyGradientCase const c_;
  std::mt19937 rng_;
  std::normal_distribution<float> normal_;
  GlobalArray<Element> query_, key_, value_, d_output_, d_states_, d_key_sums_;
  GlobalArray<detail::CumulativeGate> gate_;
  GlobalArray<float> inverse_, delta_;
  GlobalArray<int> key_exponents_, state_exponents_, key_sum_exponents_;
  GlobalArray<int> score_exponents_;
  std::vector<KeyGradientInputs> inputs_;
  std::vector<KeyGradients> expected_;
};

/// Where states are large, few of them: those that a case with them needs take long.
template <int HeadDim, int ValueDim>
std::vector<KeyGradientCase> key_gradient_cases() {
  using Case = KeyGradientCase;
  std::vector<Case> cases = {
      {"one chunk", 128, {100}},
      {"packed", 64, {65, 0, 1}, true, 1, 1, true, true},
      {"quadratic", 320, {300}, false, 1, 5},
      {"quadratic, packed, strided", 320, {0, 33, 150, 0, 1, 90}, true, 2, 2, true, false, true},
      // Columns after a warp's rows, whose decay is taken apart.
      make_case("gates in a long chunk",
                [](Case& c) {
                  c.log_gate = 0.1f, c.chunk_size = 128, c.lengths = {128}, c.final = true;
                }),
      make_case("steep gates in a long chunk",
                [](Case& c) {
                  c.log_gate = 3.0f, c.steady = true, c.chunk_size = 320, c.lengths = {300};
                }),
      // Too steep for factors in fp16.
      make_case("falling gates in a long chunk",
                [](Case& c) {
                  c.log_gate = 0.5f, c.steady = true, c.chunk_size = 192, c.lengths = {150};
                }),
      make_case("early keys alone",
                [](Case& c) {
                  c.log_gate = 0.1f, c.steady = true, c.chunk_size = 320, c.lengths = {320},
                  c.keys = 30;
                }),
      make_case("early keys alone, all but no gates",
                [](Case& c) {
                  c.log_gate = 0.01f, c.steady = true, c.chunk_size = 320, c.lengths = {320},
                  c.keys = 40;
                }),
      // The last normalizers are near the least of floats, and some below: they are none.
      make_case("early keys alone, steeper gates",
                [](Case& c) {
                  c.log_gate = 0.35f, c.steady = true, c.chunk_size = 320, c.lengths = {320},
                  c.keys = 20, c.key_scale = 8.0f;
                }),
      // In fp16, what keys of zero are multiplied by would be infinite.
      make_case("early keys alone, before a cliff",
                [](Case& c) {
                  c.log_gate = 0.01f, c.steady = true, c.cliff = 105.0f, c.chunk_size = 256;
                  c.lengths = {160}, c.keys = 40, c.key_scale = 100.0f;
                }),
      make_case("zero rows, nothing after", [](Case& c) { c.zeros = true, c.lengths = {40}; }),
      make_case("keys of 100, large values and gradients",
                [](Case& c) {
                  c.key_scale = 100.0f, c.value_scale = 100.0f, c.d_output_scale = 30.0f,
                  c.lengths = {50};
                }),
  };
  std::vector<Case> const others = {
      {"chunks", 64, {100}, false, 2},
      {"long chunk", 192, {200}},
      {"shared key heads, no gates", 64, {70}, false, 1, 3, false},
      {"final gradients, strided", 128, {70, 70}, false, 1, 2, true, true, true},
      {"quadratic, packed, final gradients", 128, {5, 0, 40}, true, 1, 3, true, true},
      make_case("steep gates",
                [](Case& c) { c.log_gate = 60.0f, c.steady = true, c.lengths = {100}; }),
      make_case("rising gates",
                [](Case& c) { c.log_gate = 0.25f, c.rising = true, c.lengths = {100}; }),
      make_case(
          "early keys alone, no gates",
          [](Case& c) { c.gated = false, c.chunk_size = 128, c.lengths = {150}, c.keys = 40; }),
      make_case("shared key heads, steep gates, packed",
                [](Case& c) {
                  c.log_gate = 3.0f, c.steady = true, c.chunk_size = 128;
                  c.lengths = {1, 140, 0, 70}, c.packed = true, c.group = 3, c.heads = 2;
                }),
      make_case("zero rows", [](Case& c) { c.zeros = true, c.lengths = {70}; }),
      make_case("keys of 30000, large gradients",
                [](Case& c) {
                  c.key_scale = 30000.0f, c.d_output_scale = 100.0f, c.lengths = {40};
                  c.final = true;
                }),
      make_case("small keys, tiny gradients",
                [](Case& c) { c.key_scale = 1e-3f, c.d_output_scale = 1e-3f, c.lengths = {100}; }),
  };
  std::vector<Case> const resets = {
      make_case(
          "resets",
          [](Case& c) { c.resets = 41, c.chunk_size = 192, c.lengths = {260}, c.final = true; }),
      make_case("resets at every second token, shared key heads, packed",
                [](Case& c) {
                  c.resets = 2, c.chunk_size = 320, c.lengths = {1, 290, 0, 70}, c.packed = true;
                  c.group = 3, c.heads = 2;
                }),
      make_case("resets, no weight after the last keys",
                [](Case& c) { c.resets = 3, c.chunk_size = 192, c.lengths = {150}, c.keys = 80; }),
  };
  bool const is_large = SymmetricPower<HeadDim, 2>::kStateDim * ValueDim > 200000;
  if (!is_large) {
    cases.insert(cases.end(), others.begin(), others.end());
    cases.insert(cases.end(), resets.begin(), resets.end());
  }
  cases.push_back(make_case("resets at every third token", [](Case& c) {
    c.resets = 3, c.chunk_size = 320, c.lengths = {300}, c.group = 2;
  }));
  return cases;
}

}  // namespace retention::test
