// The output kernel on the emulator against float64 loops, with states from float64 as well.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iostream>
#include <random>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "element.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"
#include "reference.hpp"
#include "retention/kernel/output.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::test::first_slot_of;
using retention::test::Inputs;
using retention::test::kRoundoff;
using retention::test::State;
using retention::test::store_scaled;
using retention::test::Sum;
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
  float log_gate = 0.05f;  // magnitude; the sign alternates where it is `rising`
  bool steady = false;     // every log gate is -log_gate, else random
  bool rising = false;     // some log gates are positive
  int resets = 0;          // every so many tokens; 0 for none
  float query_scale = 1.0f;
  float key_scale = 1.0f;
  float value_scale = 1.0f;
  bool zeros = false;  // some rows of queries and of keys are zero
  int keys = 1 << 30;  // keys after so many tokens of a sequence are zero
  bool exact = false;  // keys are unit vectors, queries powers of two: so are the weights
  bool residual = true;
  bool large_too = false;  // for states of any size: a large one takes its time on the emulator
};

/// e with |x| = 2^e times [1/2, 1); far below any other for 0.
int exponent_of(float x) {
  int e = -1000;
  if (x != 0.0f) {
    std::frexp(x, &e);
  }
  return e;
}

/// The query that the normaliser is defined with.
void rescale(float* row, size_t width) {
  int e = -1000;
  for (size_t i = 0; i < width; ++i) {
    e = std::max(e, exponent_of(row[i]));
  }
  for (size_t i = 0; i < width; ++i) {
    row[i] = std::ldexp(row[i], -std::clamp(e, -126, 126));
  }
}

template <class Element, int HeadDim, int ValueDim>
void run(Case const& c, std::uint64_t seed) {
  using Kernel =
      retention::kernel::Output<retention::kernel::OutputTraits<Element, HeadDim, ValueDim>>;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;

  auto const heads = static_cast<size_t>(c.heads), group = static_cast<size_t>(c.group);
  size_t const sequences = c.lengths.size();
  size_t const d = HeadDim, dv = ValueDim, D = Kernel::Apply::kStateDim;
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  typename Kernel::Params params{};
  params.query_stride = layout.strides(heads * group, d, c.strided);
  params.key_stride = layout.strides(heads, d, c.strided);
  params.value_stride = layout.strides(heads, dv, c.strided);
  params.gate_stride = layout.strides(heads, 1, c.strided);
  params.output_stride = layout.strides(heads * group, dv, c.strided);
  params.normalizer_stride = layout.strides(heads * group, 1, c.strided);
  GlobalArray<Element> query("query", layout.size_of(params.query_stride, heads * group, d), true);
  GlobalArray<Element> key("key", layout.size_of(params.key_stride, heads, d), true);
  GlobalArray<Element> value("value", layout.size_of(params.value_stride, heads, dv), true);
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(params.gate_stride, heads, 1), true);
  GlobalArray<Element> output("output", layout.size_of(params.output_stride, heads * group, dv));
  GlobalArray<Element> residual("residual", output.size());
  GlobalArray<float> normalizer("normalizer",
                                layout.size_of(params.normalizer_stride, heads * group, 1));
  params.sequences = layout.in_chunks(c.chunk_size);
  auto const slots = static_cast<size_t>(params.sequences.num_slots());
  GlobalArray<Element> states("states", slots * heads * D * dv, true);
  GlobalArray<int> score_exponents("score exponents", sequences * heads, true);
  GlobalArray<int> state_exponents("state exponents", slots * heads, true);
  GlobalArray<int> key_sum_exponents("key sum exponents", slots * heads, true);
  constexpr bool kExponents = std::is_same_v<Element, cute::half_t>;
  if (kExponents) {
    params.exponents = {nullptr, score_exponents.data(), state_exponents.data(),
                        key_sum_exponents.data()};
  }
  GlobalArray<Element> key_sums("key_sums", slots * heads * D, true);
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.gate = c.gated ? gate.data() : nullptr;
  params.states = states.data();
  params.key_sums = key_sums.data();
  params.output = output.data();
  params.residual = c.residual ? residual.data() : nullptr;
  params.normalizer = normalizer.data();
  params.heads = c.heads;
  params.group = c.group;
  params.initial_states = c.initial;

  std::vector<Inputs> inputs(sequences * heads * group);
  std::vector<State> initial(sequences * heads);
  for (size_t s = 0; s < sequences; ++s) {
    auto const length = static_cast<size_t>(c.lengths[s]);
    for (size_t h = 0; h < heads; ++h) {
      Inputs in{c.lengths[s], HeadDim, ValueDim, {}, {}, {}, {}};
      retention::test::GateSum cumulative;
      auto fill = [&](Element* row, size_t width, float magnitude, std::vector<float>& copy) {
        for (size_t i = 0; i < width; ++i) {
          row[i] = retention::test::saturated<Element>(magnitude * normal(rng));
          copy.push_back(float(row[i]));
        }
      };
      double largest_norm = 0.0;
      for (size_t t = 0; t < length; ++t) {
        fill(&key[layout.at(params.key_stride, s, t, h)], d,
             (c.zeros && t % 3 == 1) || t >= static_cast<size_t>(c.keys) ? 0.0f : c.key_scale,
             in.key);
        if (c.exact) {
          for (size_t i = 0; i < d; ++i) {
            in.key[t * d + i] = i == 7 * t % d ? 1.0f : 0.0f;
            key[layout.at(params.key_stride, s, t, h) + i] = Element(in.key[t * d + i]);
          }
        }
        fill(&value[layout.at(params.value_stride, s, t, h)], dv, c.value_scale, in.value);
        double norm = 0.0;
        for (size_t i = 0; i < d; ++i) {
          norm += double{in.key[t * d + i]} * in.key[t * d + i];
        }
        largest_norm = std::max(largest_norm, std::sqrt(norm));
        if (c.gated) {
          float const gate_t = c.steady ? 1.0f : c.rising ? normal(rng) : std::abs(normal(rng));
          in.gate.push_back(retention::test::with_resets(c.resets, t, -c.log_gate * gate_t));
          gate[layout.at(params.gate_stride, s, t, h)] =
              cumulative.add(in.gate.back(), t % static_cast<size_t>(c.chunk_size) == 0);
        }
      }
      if (kExponents) {
        score_exponents[s * heads + h] =
            exponent_of(static_cast<float>(std::sqrt(d) * largest_norm));
      }
      State& start = initial[s * heads + h];
      if (c.initial) {
        // The state of a sequence before this one, so that weights are not negative.
        Inputs before{80, HeadDim, ValueDim, {}, {}, {}, {}};
        for (size_t i = 0; i < 80 * std::max(d, dv); ++i) {
          before.key.push_back(c.key_scale * normal(rng));
          before.value.push_back(c.value_scale * normal(rng));
        }
        start = retention::test::chunk_states(before, {}, 128).back();
      }
      auto const expected = retention::test::chunk_states(in, start, c.chunk_size);
      size_t const first_slot = first_slot_of(params.sequences, s);
      for (size_t chunk = 0; chunk + 1 < expected.size(); ++chunk) {
        if (chunk == 0 && !c.initial) {
          continue;  // left as NaN: nobody may read it
        }
        size_t const slot = (first_slot + chunk) * heads + h;
        size_t const place = retention::test::slot_of(params.sequences, s, chunk,
                                                      retention::kernel::state_slots(c.initial)) *
                                 heads +
                             h;
        int const state_exponent =
            store_scaled(expected[chunk].state.value, &states[place * D * dv]);
        int const key_sum_exponent =
            store_scaled(expected[chunk].key_sum.value, &key_sums[place * D]);
        if (kExponents) {
          state_exponents[slot] = state_exponent;
          key_sum_exponents[slot] = key_sum_exponent;
        }
      }
      for (size_t n = 0; n < group; ++n) {
        in.query.clear();
        for (size_t t = 0; t < length; ++t) {
          fill(&query[layout.at(params.query_stride, s, t, h * group + n)], d,
               c.zeros && t % 4 == 3 ? 0.0f : c.query_scale, in.query);
          if (c.exact) {
            for (size_t i = 0; i < d; ++i) {
              in.query[t * d + i] = std::ldexp(1.0f, -static_cast<int>(rng() % 5));
              query[layout.at(params.query_stride, s, t, h * group + n) + i] =
                  Element(in.query[t * d + i]);
            }
          }
          rescale(&in.query[t * d], d);
        }
        inputs[(s * heads + h) * group + n] = in;
      }
    }
  }

  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }

  double error = 0.0, size = 0.0, normalizer_error = 0.0, worst = 0.0, refined = 0.0;
  bool residual_right = true;
  auto const element =
      kExponents ? retention::ElementType::kFloat16 : retention::ElementType::kBFloat16;
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t n = 0; n < heads * group; ++n) {
      Inputs const& in = inputs[s * heads * group + n];
      auto const expected = retention::test::attend(in, initial[s * heads + n / group], 1.0);
      for (size_t t = 0; t < static_cast<size_t>(in.tokens); ++t) {
        double row_error = 0.0, row_size = 0.0;
        for (size_t e = 0; e < dv; ++e) {
          double const o = expected.output[t * dv + e];
          double const difference = float(output[layout.at(params.output_stride, s, t, n) + e]) - o;
          row_error += difference * difference;
          row_size += o * o;
          if (c.residual) {
            double const stored = float(output[layout.at(params.output_stride, s, t, n) + e]);
            double const rest = float(residual[layout.at(params.output_stride, s, t, n) + e]);
            double const half = 0.5 * retention::test::spacing(element, stored);
            residual_right = residual_right && std::abs(rest) <= half;
            refined = std::max(refined, std::abs(stored + rest - o));
          }
        }
        double const z = normalizer[layout.at(params.normalizer_stride, s, t, n)];
        if (expected.normalizer[t] <= FLT_MIN) {
          RETENTION_CHECK(row_error == 0.0 && z == 0.0);
          continue;
        }
        // Weights in fp16 are multiples of 2^-24 in units that make the largest 2^13: where all of
        // a row's are small, that much of its error is the format's.
        double const step = kExponents ? std::ldexp(std::sqrt(static_cast<double>(t) + 1),
                                                    2 * score_exponents[s * heads + n / group] - 37)
                                       : 0.0;
        double const explained = step / expected.normalizer[t] * std::sqrt(row_size);
        row_error = std::pow(std::max(0.0, std::sqrt(row_error) - explained), 2);
        error += row_error;
        size += row_size;
        worst = std::max(worst, !(row_error >= 0) ? 1e9 : std::sqrt(row_error / row_size));
        double const excess = std::max(0.0, std::abs(z - expected.normalizer[t]) - step);
        double const relative = excess / expected.normalizer[t];
        normalizer_error = std::max(normalizer_error, relative >= 0 ? relative : 1e9);
      }
    }
  }
  double const u = kRoundoff<Element>;
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << ", "
            << (std::is_same_v<Element, cute::half_t> ? "fp16" : "bf16") << ", seed " << seed
            << ": error " << std::sqrt(error / size) / u << " roundings, worst row " << worst / u
            << ", normalizer " << normalizer_error / u << ", with the residual " << refined << '\n';
  // Over all rows: phi, the state, the weights and the output are each rounded once, by u / sqrt(3)
  // on average, and errors of terms average out; 0.57 to 0.64 was seen.
  RETENTION_CHECK(std::sqrt(error / size) <= u);
  // Single rows owe more to cancellation: about 1.1 and 0.4 were seen. A wrong row is off by 1 / u.
  RETENTION_CHECK(worst <= 4 * u);
  RETENTION_CHECK(normalizer_error <= 2 * u);
  RETENTION_CHECK(residual_right);
  // Weights are exact: what is left are the residual's own rounding and that of sums in fp32.
  RETENTION_CHECK(!c.exact || refined <= (kExponents ? 0x1p-19 : 0x1p-16) * c.value_scale);
  for (size_t i = 0; i < residual.size(); ++i) {
    residual_right =
        residual_right && std::isnan(float(residual[i])) == std::isnan(float(output[i]));
  }
  RETENTION_CHECK(residual_right || !c.residual);
}

/// A case with the settings that `set` changes.
template <class Set>
Case make_case(char const* name, Set set) {
  Case c{name};
  set(c);
  return c;
}

Case large_too(Case c) {
  c.large_too = true;
  return c;
}

template <class Element, int HeadDim, int ValueDim>
void run_all_cases(std::uint64_t seed) {
  constexpr bool kIsHalf = std::is_same_v<Element, cute::half_t>;
  std::vector<Case> const cases = {
      make_case("one chunk, no residual",
                [](Case& c) { c.chunk_size = 128, c.lengths = {100}, c.residual = false; }),
      make_case("weights that are powers of two",
                [](Case& c) {
                  c.chunk_size = 128, c.lengths = {100}, c.gated = false, c.exact = true,
                  c.value_scale = 4.0f;
                }),
      large_too({"chunks", 64, {150}, false, 2}),
      {"long chunk", 320, {330}},
      {"shared key heads, no gates", 64, {129}, false, 1, 3, false},
      large_too({"initial, strided", 64, {100, 100}, false, 1, 2, true, true, true}),
      {"packed", 64, {65, 0, 1, 130}, true, 1, 1, true, true},
      large_too({"quadratic", 320, {300, 300}, false, 1, 5}),
      {"quadratic, packed, strided",
       640,
       {0, 33, 270, 0, 0, 1, 290},
       true,
       2,
       3,
       true,
       false,
       true},
      {"quadratic, packed, initial", 128, {5, 0, 64, 20}, true, 1, 5, true, true},
      large_too(make_case("steep gates",
                          [](Case& c) { c.log_gate = 60.0f, c.steady = true, c.initial = true; })),
      make_case("rising gates",
                [](Case& c) { c.log_gate = 0.25f, c.rising = true, c.chunk_size = 128; }),
      // Keys before a warp's rows, whose decay is taken apart at the first of the rows.
      make_case("gates in a long chunk",
                [](Case& c) {
                  c.log_gate = 0.2f, c.chunk_size = 320, c.lengths = {400}, c.initial = true;
                }),
      make_case("steep gates in a long chunk",  // a warp's last rows: exp(-3 * 63) is 0
                [](Case& c) {
                  c.log_gate = 3.0f, c.steady = true, c.chunk_size = 320, c.lengths = {320},
                  c.initial = true;
                }),
      // In fp16 weights have few digits below 2^-14 of the largest, and nothing below 2^-24.
      make_case("early keys alone",
                [](Case& c) {
                  c.log_gate = kIsHalf ? 0.01f : 0.25f, c.steady = true, c.chunk_size = 320,
                  c.lengths = {320}, c.keys = 40;
                }),
      make_case("an early key and a state alone",
                [](Case& c) {
                  c.log_gate = kIsHalf ? 0.01f : 0.25f, c.steady = true, c.chunk_size = 192,
                  c.lengths = {260}, c.keys = 1, c.initial = true;
                }),
      make_case(
          "early keys alone, no gates",
          [](Case& c) { c.gated = false, c.chunk_size = 320, c.lengths = {330}, c.keys = 40; }),
      make_case("rising gates in a long chunk",
                [](Case& c) {
                  c.log_gate = 0.15f, c.rising = true, c.chunk_size = 320, c.lengths = {330};
                }),
      // In fp16 there is room for a rise by a factor of 4.
      make_case("gates that only rise, initial",
                [](Case& c) {
                  c.log_gate = kIsHalf ? -0.004f : -0.02f, c.steady = true, c.chunk_size = 320,
                  c.lengths = {330}, c.initial = true;
                }),
      // The first of a warp's rows is one of several of its token.
      make_case("shared key heads, gates in a long chunk",
                [](Case& c) {
                  c.log_gate = 0.1f, c.chunk_size = 192, c.lengths = {200}, c.group = 3,
                  c.initial = true;
                }),
      make_case("shared key heads, steep gates, packed",
                [](Case& c) {
                  c.log_gate = 3.0f, c.steady = true, c.chunk_size = 192,
                  c.lengths = {1, 150, 0, 90}, c.packed = true, c.group = 3, c.heads = 2;
                }),
      // Keys of a row's own tile, which factors serve, come after some that they do not.
      make_case("gates that rise steeply, shared key heads",
                [](Case& c) {
                  c.log_gate = kIsHalf ? -0.004f : -0.5f, c.steady = true, c.chunk_size = 128,
                  c.lengths = {110}, c.group = 3, c.initial = true;
                }),
      make_case("zero rows", [](Case& c) { c.zeros = true, c.initial = true, c.lengths = {70}; }),
      make_case("zero rows, nothing before", [](Case& c) { c.zeros = true, c.lengths = {40}; }),
      make_case("keys of 100, small queries, large values",
                [](Case& c) {
                  c.key_scale = 100.0f, c.query_scale = 1e-4f, c.value_scale = 1000.0f,
                  c.initial = true;
                }),
      large_too(make_case("keys of 30000, large queries",
                          [](Case& c) {
                            c.key_scale = 30000.0f, c.query_scale = 6e4f, c.initial = true,
                            c.lengths = {150};
                          })),
      make_case("resets",
                [](Case& c) {
                  c.resets = 41, c.chunk_size = 192, c.lengths = {260}, c.group = 2,
                  c.initial = true;
                }),
      make_case("resets at every third token",
                [](Case& c) {
                  c.resets = 3, c.log_gate = 0.5f, c.chunk_size = 512, c.lengths = {520},
                  c.initial = true;
                }),
      large_too(make_case("resets at every second token, shared key heads, packed",
                          [](Case& c) {
                            c.resets = 2, c.chunk_size = 256, c.lengths = {70, 0, 200},
                            c.packed = true, c.group = 3;
                          })),
      make_case("resets without weight at them",
                [](Case& c) { c.resets = 3, c.chunk_size = 192, c.lengths = {150}, c.keys = 80; }),
      // Of few tokens a block, and of one a warpgroup.
      {"40 query heads a key head", 128, {70}, false, 1, 40},
      {"64 query heads a key head", 64, {66}, false, 1, 64},
  };
  for (Case const& c : cases) {
    if (!retention::test::kLarge<HeadDim, ValueDim> || c.large_too) {
      run<Element, HeadDim, ValueDim>(c, seed);
    }
    ++seed;
  }
}

}  // namespace

RETENTION_TEST(output) { run_all_cases<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(0); }
