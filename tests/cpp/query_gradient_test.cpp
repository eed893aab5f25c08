// The query gradient kernel on the emulator against float64 loops over all earlier tokens, with
// prepared rows and states from float64 as well.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"
#include "reference.hpp"
#include "retention/kernel/query_gradient.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::test::first_slot_of;
using retention::test::Inputs;
using retention::test::kRoundoff;
using retention::test::State;
using retention::test::store_scaled;
using std::size_t;

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {128};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  int group = 1;  // query heads a key head
  bool gated = true;
  bool initial = false;
  bool strided = false;    // heads before tokens, and gaps between the rows
  float log_gate = 0.05f;  // magnitude; every log gate is negative
  bool steady = false;     // every log gate is -log_gate, else random
  float query_scale = 1.0f;
  float key_scale = 1.0f;
  float value_scale = 1.0f;
  float gradient_scale = 1.0f;
  bool zeros = false;  // some rows of queries and of keys are zero
  int keys = 1 << 30;  // keys after so many tokens of a sequence are zero
  int resets = 0;      // every so many tokens; 0 for none
};

/// The tokens of a sequence and head, and what came before them. Vectors of [token, width].
struct Tokens {
  size_t before = 0;  // tokens that the initial state is made of
  std::vector<float> key, value;
  std::vector<double> gate;  // log gates
};

/// A prepared row, and its gradient.
struct Row {
  double normalizer = 0.0;  // of the prepared query
  double delta = 0.0;
  double largest = 0.0;            // |v|_2 of what it attends to
  std::vector<double> gradient;    // of the prepared query: [d]
  std::vector<double> magnitude;   // of its terms, before do . v - delta
  double product_magnitude = 0.0;  // of the terms of q . dq / 2, whose sum is zero
};

double dot(float const* x, float const* y, size_t n) {
  double sum = 0.0;
  for (size_t i = 0; i < n; ++i) {
    sum += double{x[i]} * y[i];
  }
  return sum;
}

/// Token i with `query` and the gradient `d_output` of its output.
Row differentiate(Tokens const& in, size_t i, std::vector<float> const& query,
                  std::vector<float> const& d_output) {
  size_t const d = query.size(), dv = d_output.size();
  Row row{0.0, 0.0, 0.0, std::vector<double>(d, 0.0), std::vector<double>(d, 0.0), 0.0};
  std::vector<double> score, decay, product;
  retention::test::Decays const decays(in.gate, in.before + i + 1);
  for (size_t j = 0; j <= in.before + i; ++j) {
    score.push_back(dot(query.data(), &in.key[j * d], d));
    decay.push_back(decays.between(j, in.before + i));
    product.push_back(dot(d_output.data(), &in.value[j * dv], dv));
    double const weight = score[j] * score[j] * decay[j];
    row.normalizer += weight;
    row.delta += weight * product[j];
    row.largest = std::max(row.largest, std::sqrt(dot(&in.value[j * dv], &in.value[j * dv], dv)));
  }
  row.delta /= row.normalizer;
  for (size_t j = 0; j <= in.before + i; ++j) {
    double const factor = 2 * score[j] * decay[j] / row.normalizer;
    double const terms = std::abs(product[j]) + std::abs(row.delta);
    row.product_magnitude += 0.5 * std::abs(factor * score[j]) * terms;
    for (size_t c = 0; c < d; ++c) {
      double const key = in.key[j * d + c];
      row.gradient[c] += factor * (product[j] - row.delta) * key;
      row.magnitude[c] += std::abs(factor * key) * terms;
    }
  }
  return row;
}

template <class Element, int HeadDim, int ValueDim>
void run(Case const& c, std::uint64_t seed) {
  using Kernel = retention::kernel::QueryGradient<
      retention::kernel::QueryGradientTraits<Element, HeadDim, ValueDim>>;
  constexpr bool kExponents = std::is_same_v<Element, cute::half_t>;
  constexpr int kQueryExponent = kExponents ? 7 : 0;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;

  auto const heads = static_cast<size_t>(c.heads), group = static_cast<size_t>(c.group);
  size_t const sequences = c.lengths.size(), query_heads = heads * group;
  size_t const d = HeadDim, dv = ValueDim, D = Kernel::Contract::kStateDim;
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  typename Kernel::Params params{};
  params.query_stride = layout.strides(query_heads, d, c.strided);
  params.key_stride = layout.strides(heads, d, c.strided);
  params.value_stride = layout.strides(heads, dv, c.strided);
  params.d_output_stride = layout.strides(query_heads, dv, c.strided);
  params.gate_stride = layout.strides(heads, 1, c.strided);
  params.row_stride = layout.strides(query_heads, 1, c.strided);
  params.d_query_stride = layout.strides(query_heads, d, c.strided);
  GlobalArray<Element> query("query", layout.size_of(params.query_stride, query_heads, d), true);
  GlobalArray<Element> key("key", layout.size_of(params.key_stride, heads, d), true);
  GlobalArray<Element> value("value", layout.size_of(params.value_stride, heads, dv), true);
  GlobalArray<Element> d_output("d_output", layout.size_of(params.d_output_stride, query_heads, dv),
                                true);
  GlobalArray<Element> d_query("d_query", layout.size_of(params.d_query_stride, query_heads, d));
  GlobalArray<float> d_gate("d_gate", layout.size_of(params.row_stride, query_heads, 1));
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(params.gate_stride, heads, 1), true);
  size_t const rows = layout.size_of(params.row_stride, query_heads, 1);
  GlobalArray<float> inverse("inverse", rows, true), delta("delta", rows, true);
  GlobalArray<float> scale("scale", rows, true);
  params.sequences = layout.in_chunks(c.chunk_size);
  auto const slots = static_cast<size_t>(params.sequences.num_slots());
  GlobalArray<Element> states("states", slots * heads * D * dv, true);
  GlobalArray<Element> key_sums("key sums", slots * heads * D, true);
  GlobalArray<int> state_exponents("state exponents", slots * heads, true);
  GlobalArray<int> key_sum_exponents("key sum exponents", slots * heads, true);
  GlobalArray<int> weight_exponents("weight exponents", slots * heads, true);
  GlobalArray<int> score_exponents("score exponents", slots * heads, true);
  if (kExponents) {
    params.exponents.state = state_exponents.data();
    params.exponents.key_sum = key_sum_exponents.data();
    params.gradient_exponents.weight = weight_exponents.data();
    params.gradient_exponents.score = score_exponents.data();
  }
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.d_output = d_output.data();
  params.gate = c.gated ? gate.data() : nullptr;
  params.inverse = inverse.data();
  params.delta = delta.data();
  params.scale = scale.data();
  params.states = states.data();
  params.key_sums = key_sums.data();
  params.d_query = d_query.data();
  params.d_gate = d_gate.data();
  params.heads = c.heads;
  params.group = c.group;
  params.initial_states = c.initial;

  auto random = [&](float magnitude) {
    return float(retention::test::saturated<Element>(magnitude * normal(rng)));
  };
  auto put = [](float const* from, size_t width, Element* to) {
    for (size_t i = 0; i < width; ++i) {
      to[i] = Element(from[i]);
    }
  };
  std::vector<Row> expected(layout.starts.back() * query_heads);
  for (size_t s = 0; s < sequences; ++s) {
    auto const length = static_cast<size_t>(c.lengths[s]);
    size_t const first_slot = first_slot_of(params.sequences, s);
    for (size_t h = 0; h < heads; ++h) {
      Tokens in;
      in.before = c.initial ? 30 : 0;
      Inputs inputs{c.lengths[s], HeadDim, ValueDim, {}, {}, {}, {}};
      retention::test::GateSum chunk_gate;
      for (size_t j = 0; j < in.before + length; ++j) {
        size_t const t = j - in.before;
        bool const zero =
            j >= in.before && ((c.zeros && t % 3 == 1) || t >= static_cast<size_t>(c.keys));
        for (size_t i = 0; i < d; ++i) {
          in.key.push_back(zero ? 0.0f : random(c.key_scale));
        }
        for (size_t i = 0; i < dv; ++i) {
          in.value.push_back(random(c.value_scale));
        }
        in.gate.push_back(0.0);
        if (j >= in.before) {
          put(&in.key[j * d], d, &key[layout.at(params.key_stride, s, t, h)]);
          put(&in.value[j * dv], dv, &value[layout.at(params.value_stride, s, t, h)]);
          if (c.gated) {
            float const log_gate = retention::test::with_resets(
                c.resets, t, -c.log_gate * (c.steady ? 1.0f : std::abs(normal(rng))));
            inputs.gate.push_back(log_gate);
            in.gate.back() = log_gate;
            gate[layout.at(params.gate_stride, s, t, h)] =
                chunk_gate.add(log_gate, t % static_cast<size_t>(c.chunk_size) == 0);
          }
        }
      }

      // The states before the chunks, those alone that somebody may read.
      inputs.key.assign(in.key.begin() + static_cast<std::ptrdiff_t>(in.before * d), in.key.end());
      inputs.value.assign(in.value.begin() + static_cast<std::ptrdiff_t>(in.before * dv),
                          in.value.end());
      State start;
      if (c.initial) {
        Inputs const before{
            static_cast<int>(in.before), HeadDim, ValueDim, {}, in.key, in.value, {}};
        start = retention::test::chunk_states(before, {}, 1 << 20).back();
      }
      // Beyond its last chunk a sequence has a state that this kernel does not need.
      size_t const chunks =
          (length + static_cast<size_t>(c.chunk_size) - 1) / static_cast<size_t>(c.chunk_size);
      std::vector<State> before_chunks;
      if (chunks > 1 || c.initial) {
        inputs.tokens =
            static_cast<int>((chunks == 0 ? 0 : chunks - 1) * static_cast<size_t>(c.chunk_size));
        before_chunks = retention::test::chunk_states(inputs, start, c.chunk_size);
      }
      for (size_t chunk = c.initial ? 0 : 1; chunk < chunks; ++chunk) {
        size_t const slot = (first_slot + chunk) * heads + h;
        size_t const place = retention::test::slot_of(params.sequences, s, chunk,
                                                      retention::kernel::state_slots(c.initial)) *
                                 heads +
                             h;
        int const e = store_scaled(before_chunks[chunk].state.value, &states[place * D * dv]);
        int const sum_e = store_scaled(before_chunks[chunk].key_sum.value, &key_sums[place * D]);
        if (kExponents) {
          state_exponents[slot] = e;
          key_sum_exponents[slot] = sum_e;
        }
      }

      std::vector<double> largest_weight(chunks, 0.0), largest_score(chunks, 0.0);
      for (size_t t = 0; t < length; ++t) {
        size_t const chunk = t / static_cast<size_t>(c.chunk_size);
        double const row_gate =
            c.gated ? gate[layout.at(params.gate_stride, s, t, h)].total() : 0.0;
        for (size_t n = h * group; n < (h + 1) * group; ++n) {
          std::vector<float> q(d), d_o(dv);
          float magnitude = 0.0f;
          for (float& x : q) {
            x = c.zeros && t % 4 == 3 ? 0.0f : random(c.query_scale);
            magnitude = std::max(magnitude, std::abs(x));
          }
          for (float& x : d_o) {
            x = random(c.gradient_scale);
          }
          int const exponent = kQueryExponent - retention::test::exponent_of(magnitude);
          for (float& x : q) {
            x = std::ldexp(x, exponent);
          }
          Row& row = expected[(layout.starts[s] + t) * query_heads + n];
          row = differentiate(in, t, q, d_o);
          size_t const place = layout.at(params.row_stride, s, t, n);
          scale[place] = std::ldexp(1.0f, exponent);
          if (!(std::ldexp(row.normalizer, -2 * kQueryExponent) > FLT_MIN)) {
            // No weight: then the gradient of the output may be anything.
            row.normalizer = 0.0;
            std::fill(q.begin(), q.end(), 0.0f);
            std::fill(d_o.begin(), d_o.end(), std::numeric_limits<float>::quiet_NaN());
            inverse[place] = 0.0f;
            delta[place] = std::numeric_limits<float>::quiet_NaN();
          } else {
            inverse[place] = static_cast<float>(1.0 / row.normalizer);
            delta[place] = static_cast<float>(row.delta);
            largest_weight[chunk] =
                std::max(largest_weight[chunk], std::exp2(row_gate) / row.normalizer);
            largest_score[chunk] =
                std::max(largest_score[chunk], 2 * std::sqrt(dot(d_o.data(), d_o.data(), dv)) *
                                                   row.largest / std::sqrt(row.normalizer));
          }
          put(q.data(), d, &query[layout.at(params.query_stride, s, t, n)]);
          put(d_o.data(), dv, &d_output[layout.at(params.d_output_stride, s, t, n)]);
        }
      }
      for (size_t chunk = 0; chunk < chunks && kExponents; ++chunk) {
        auto const below = [](double x, int e) { return x > 0.0 ? e - std::ilogb(x) - 1 : 0; };
        weight_exponents[(first_slot + chunk) * heads + h] = below(largest_weight[chunk], 0);
        score_exponents[(first_slot + chunk) * heads + h] = below(largest_score[chunk], 14);
      }
    }
  }

  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }

  double error = 0.0, size = 0.0, magnitude = 0.0, count = 0.0;
  double product_error = 0.0, product_magnitude = 0.0;
  bool zero = true;
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t t = 0; t < static_cast<size_t>(c.lengths[s]); ++t) {
      for (size_t n = 0; n < query_heads; ++n) {
        Row const& row = expected[(layout.starts[s] + t) * query_heads + n];
        double const factor = scale[layout.at(params.row_stride, s, t, n)];
        double const product = d_gate[layout.at(params.row_stride, s, t, n)];
        if (row.normalizer == 0.0) {
          zero = zero && product == 0.0;
        } else {
          product_error += product * product;
          product_magnitude += row.product_magnitude * row.product_magnitude;
        }
        for (size_t i = 0; i < d; ++i) {
          double const x = float(d_query[layout.at(params.d_query_stride, s, t, n) + i]);
          if (row.normalizer == 0.0) {
            zero = zero && x == 0.0;
            continue;
          }
          error += std::pow(x - factor * row.gradient[i], 2);
          size += std::pow(factor * row.gradient[i], 2);
          magnitude += std::pow(factor * row.magnitude[i], 2);
          count += 1.0;
        }
      }
    }
  }
  double const u = kRoundoff<Element>;
  error = std::sqrt(error);
  size = std::sqrt(size);
  magnitude = std::sqrt(magnitude);
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << ", "
            << (kExponents ? "fp16" : "bf16") << ", seed " << seed << ": error " << error / size / u
            << " roundings, of the terms' magnitude " << error / magnitude << ", size "
            << size / std::sqrt(count) << '\n';
  RETENTION_CHECK(zero);
  // Over all rows: the state, da and the gradient are each rounded once, by u / sqrt(3) on average,
  // and errors of terms average out; 0.50 to 0.65 was seen, and 0.86 where few rows are larger than
  // all others. Where one weight dominates, do . v and delta cancel, both fp32.
  RETENTION_CHECK(error <= u * size + 1e-6 * magnitude);
  // q . dq: of fp32 products and sums, but for a state, whose elements are rounded.
  bool const has_state =
      c.initial || *std::max_element(c.lengths.begin(), c.lengths.end()) > c.chunk_size;
  product_error = std::sqrt(product_error / product_magnitude);
  std::cout << "  q . dq, of the terms' magnitude: " << product_error << '\n';
  RETENTION_CHECK(product_error <= 1e-6 + (has_state ? 0.5 * u : 0.0));
}

/// A case with the settings that `set` changes.
template <class Set>
Case make_case(char const* name, Set set) {
  Case c{name};
  set(c);
  return c;
}

template <class Element, int HeadDim, int ValueDim>
void run_all_cases(std::uint64_t seed) {
  constexpr bool kIsHalf = std::is_same_v<Element, cute::half_t>;
  std::vector<Case> cases = {
      {"one chunk", 128, {100}},
      {"initial, strided", 64, {40, 40}, false, 1, 2, true, true, true},
      {"quadratic, packed, strided", 640, {0, 33, 150, 0, 0, 1, 90}, true, 2, 3, true, false, true},
      make_case("gates in a long chunk",
                [](Case& c) { c.log_gate = 0.2f, c.chunk_size = 320, c.lengths = {330}; }),
      make_case("zero rows, nothing before", [](Case& c) { c.zeros = true, c.lengths = {40}; }),
  };
  // A state of many elements takes its time on the emulator.
  std::vector<Case> const more = {
      {"chunks, strided", 64, {130, 130}, false, 1, 1, true, false, true},
      {"chunks, heads", 64, {100}, false, 2},
      {"shared key heads, no gates", 64, {129}, false, 1, 3, false},
      {"packed", 64, {65, 0, 1, 70}, true, 1, 1, true, true},
      {"quadratic", 256, {200, 200}, false, 1, 5},
      make_case("steep gates",
                [](Case& c) { c.log_gate = 60.0f, c.steady = true, c.initial = true; }),
      make_case("steep gates in a long chunk",  // a warp's last rows: exp(-3 * 31) is 0
                [](Case& c) {
                  c.log_gate = 3.0f, c.steady = true, c.chunk_size = 192, c.lengths = {192},
                  c.initial = true;
                }),
      // The bound that fp16 scales da by takes weights for as large as a sum of them.
      make_case("early keys alone",
                [](Case& c) {
                  c.log_gate = kIsHalf ? 0.01f : 0.25f, c.steady = true, c.chunk_size = 320,
                  c.lengths = {320}, c.keys = 40;
                }),
      make_case("zero rows", [](Case& c) { c.zeros = true, c.initial = true, c.lengths = {70}; }),
      make_case("keys of 100, large values, small gradients",
                [](Case& c) {
                  c.key_scale = 100.0f, c.value_scale = 1000.0f, c.gradient_scale = 1e-3f,
                  c.initial = true, c.lengths = {70};
                }),
      make_case("keys of 30000, large gradients",
                [](Case& c) {
                  c.key_scale = 30000.0f, c.query_scale = 6e4f, c.gradient_scale = 3e4f,
                  c.initial = true, c.lengths = {70};
                }),
      make_case(
          "resets",
          [](Case& c) { c.resets = 41, c.chunk_size = 192, c.lengths = {260}, c.initial = true; }),
      make_case("resets at every second token, shared key heads, packed",
                [](Case& c) {
                  c.resets = 2, c.chunk_size = 256, c.lengths = {70, 0, 140}, c.packed = true,
                  c.group = 3;
                }),
      make_case("resets, no weight after the last keys",
                [](Case& c) { c.resets = 3, c.chunk_size = 192, c.lengths = {150}, c.keys = 80; }),
      // Of few tokens a block, and of one a warpgroup.
      {"40 query heads a key head", 128, {70}, false, 1, 40},
      {"64 query heads a key head", 64, {66}, false, 1, 64},
  };
  if (!retention::test::kLarge<HeadDim, ValueDim>) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  cases.push_back(make_case("resets at every third token", [](Case& c) {
    c.resets = 3, c.log_gate = 0.5f, c.chunk_size = 384, c.lengths = {330};
  }));
  for (Case const& c : cases) {
    run<Element, HeadDim, ValueDim>(c, seed++);
  }
}

}  // namespace

RETENTION_TEST(query_gradient) {
  run_all_cases<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(0);
}
