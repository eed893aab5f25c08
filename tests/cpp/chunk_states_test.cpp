// The chunk-state kernel on the emulator against float64 loops.

#include <cmath>
#include <iostream>
#include <random>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"
#include "reference.hpp"
#include "retention/kernel/chunk_states.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::test::exponent_of;
using retention::test::first_slot_of;
using retention::test::Inputs;
using retention::test::kRoundoff;
using retention::test::slot_of;
using retention::test::State;
using retention::test::Sum;
using std::size_t;

enum class Gates {
  kNone,
  kMild,
  kStrong,    // many of -60, some of -10^4
  kResets,    // every third token
  kPositive,  // unusual, yet allowed
};

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {128};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  Gates gates = Gates::kMild;
  bool initial = false;
  int segment_chunks = 0;  // chunks in a segment; 0: one segment a sequence
  bool strided = false;    // heads before tokens, and gaps between the rows
  // Keys and values lie evenly between -1 and 1 times these, or are normally distributed where that
  // is 0. It holds for the last head of the last sequence; keys of each one before are smaller by
  // 2^4. With a magnitude goes a choice of exponents.
  float key_magnitude = 0.0f;
  float value_magnitude = 1.0f;
  int first_token = 0;  // of the first packed sequence
  bool ends = true;     // whether the state after a sequence's last token is wanted
};

float draw_gate(Gates gates, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  switch (gates) {
    case Gates::kStrong:
      return rng() % 40 == 0  ? -1e4f
             : rng() % 3 == 0 ? -60.0f
                              : -0.015625f * static_cast<float>(rng() % 8);
    case Gates::kPositive:
      return 0.02f * normal(rng) + 0.01f;
    default:
      return -0.05f * std::abs(normal(rng));
  }
}

template <class Element, int HeadDim, int ValueDim>
void run(Case const& c, std::uint64_t seed) {
  using Kernel = retention::kernel::ChunkStates<
      retention::kernel::ChunkStatesTraits<Element, HeadDim, ValueDim>>;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;

  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  size_t const d = HeadDim, dv = ValueDim, D = Kernel::kStateDim;
  retention::test::SequenceLayout const layout(c.lengths, c.packed, c.first_token);
  auto const key_stride = layout.strides(heads, d, c.strided);
  auto const value_stride = layout.strides(heads, dv, c.strided);
  auto const gate_stride = layout.strides(heads, 1, c.strided);
  GlobalArray<Element> key("key", layout.size_of(key_stride, heads, d), true);
  GlobalArray<Element> value("value", layout.size_of(value_stride, heads, dv), true);
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(gate_stride, heads), true);

  typename Kernel::Params params{};
  params.sequences = layout.in_chunks(c.chunk_size);
  // More than all tokens in a segment: then the item of a packed sequence is its index.
  int const one_segment = (params.sequences.length / c.chunk_size + 1) * c.chunk_size;
  params.segment_tokens = c.segment_chunks == 0 ? one_segment : c.segment_chunks * c.chunk_size;
  auto const segment_sequences = params.sequences.segments(params.segment_tokens);
  auto const items = static_cast<size_t>(segment_sequences.num_slots());
  GlobalArray<float> initial("initial_state", sequences * heads * D * dv, true);
  GlobalArray<float> initial_sum("initial_key_sum", sequences * heads * D, true);
  GlobalArray<float> final_state("final_state", items * heads * D * dv);
  GlobalArray<float> final_sum("final_key_sum", items * heads * D);
  if (c.initial) {
    for (float& x : initial) {
      x = normal(rng);
    }
    for (float& x : initial_sum) {
      x = normal(rng);
    }
  }

  auto present = params.sequences;  // the tokens that are there
  present.length = static_cast<int>(layout.tokens);
  auto const slots = static_cast<size_t>(present.num_slots());
  bool const gated = c.gates != Gates::kNone;
  bool const scaled = std::is_same_v<Element, cute::half_t> && c.key_magnitude != 0.0f;
  // The slots before that of the first sequence are not there.
  size_t const no_slots = first_slot_of(params.sequences, 0);
  GlobalArray<Element> states("states", slots * heads * D * dv);
  GlobalArray<Element> key_sums("key_sums", slots * heads * D);
  GlobalArray<int> key_exponent("exponents.key", sequences * heads, true);
  GlobalArray<int> state_exponent("exponents.state", slots * heads, true);
  GlobalArray<int> sum_exponent("exponents.key_sum", slots * heads, true);

  auto key_magnitude_of = [&](size_t s, size_t h) {
    return std::ldexp(c.key_magnitude,
                      -4 * static_cast<int>(sequences * heads - 1 - (s * heads + h)));
  };

  // Each sequence and head: inputs for the reference, and the same in the kernel's tensors.
  std::vector<Inputs> inputs(sequences * heads);
  for (size_t s = 0; s < sequences; ++s) {
    auto const length = static_cast<size_t>(c.lengths[s]);
    for (size_t h = 0; h < heads; ++h) {
      Inputs& in = inputs[s * heads + h];
      in = {static_cast<int>(length), HeadDim, ValueDim, {}, {}, {}, {}};
      auto draw = [&](float magnitude) {
        return Element(c.key_magnitude == 0.0f
                           ? normal(rng)
                           : std::uniform_real_distribution<float>(-magnitude, magnitude)(rng));
      };
      float const key_magnitude = key_magnitude_of(s, h);
      retention::test::GateSum cumulative;
      for (size_t t = 0; t < length; ++t) {
        for (size_t i = 0; i < d; ++i) {
          Element const x = key[layout.at(key_stride, s, t, h) + i] = draw(key_magnitude);
          in.key.push_back(float(x));
        }
        for (size_t i = 0; i < dv; ++i) {
          Element const x = value[layout.at(value_stride, s, t, h) + i] = draw(c.value_magnitude);
          in.value.push_back(float(x));
        }
        if (gated) {
          in.gate.push_back(retention::test::with_resets(c.gates == Gates::kResets ? 3 : 0, t,
                                                         draw_gate(c.gates, rng)));
          gate[layout.at(gate_stride, s, t, h)] =
              cumulative.add(in.gate.back(), t % static_cast<size_t>(c.chunk_size) == 0);
        }
      }
      if (scaled) {
        // What bounds a state of that many such tokens and the initial one.
        double const bound = 2.0 * double(length) * key_magnitude * key_magnitude + 6.0;
        key_exponent[s * heads + h] = exponent_of(key_magnitude);
        auto const chunks =
            (length + static_cast<size_t>(c.chunk_size) - 1) / static_cast<size_t>(c.chunk_size);
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
          size_t const slot = first_slot_of(params.sequences, s) - no_slots + chunk;
          // A slack that differs from slot to slot.
          state_exponent[slot * heads + h] =
              exponent_of(bound * std::max(c.value_magnitude, 1.0f)) - 15 +
              static_cast<int>(chunk % 2);
          sum_exponent[slot * heads + h] = exponent_of(bound) - 15;
        }
      }
    }
  }

  params.key = key.data() - c.first_token * key_stride.token;
  params.value = value.data() - c.first_token * value_stride.token;
  params.gate = gated ? gate.data() - c.first_token * gate_stride.token : nullptr;
  params.key_stride = key_stride;
  params.value_stride = value_stride;
  params.gate_stride = gate_stride;
  if (c.initial) {
    params.initial = {initial.data(), initial_sum.data(), {}};
  }
  params.states = states.data() - no_slots * heads * D * dv;
  params.key_sums = key_sums.data() - no_slots * heads * D;
  if (scaled) {
    params.exponents = {key_exponent.data(), nullptr, state_exponent.data() - no_slots * heads,
                        sum_exponent.data() - no_slots * heads};
  }
  params.ends = {final_state.data(), final_sum.data(), {}};
  params.heads = c.heads;
  params.sequence_ends = c.ends;
  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }

  // One rounding of the weighed key, one of phi (S only), one of what is stored (states only); the
  // fp32 sums and exponentials stay far below: 2^-18.
  double const u = kRoundoff<Element>;
  // Half the spacing of the smallest numbers: only fp16 has them in range.
  double const spacing = std::is_same_v<Element, cute::half_t> ? 0x1p-25 : 0.0;
  double worst = 0.0;
  auto compare = [&](auto const* actual, Sum const& expected, double roundings, double stored,
                     double underflow, int exponent) {
    for (size_t i = 0; i < expected.value.size(); ++i) {
      double const bound =
          (roundings * u + 0x1p-18) * expected.magnitude[i] +
          stored * (u * std::abs(expected.value[i]) + std::ldexp(spacing, exponent)) + underflow;
      double const error =
          std::abs(std::ldexp(double(float(actual[i])), exponent) - expected.value[i]);
      worst = std::max(worst, error == 0.0 ? 0.0 : error / bound);
      // Written so that NaN fails.
      if (!(error <= bound)) {
        std::cerr << c.name << ": [" << i << "] is "
                  << std::ldexp(double(float(actual[i])), exponent) << ", not " << expected.value[i]
                  << ", with an error above " << bound << '\n';
        return false;
      }
    }
    return true;
  };
  size_t stored = 0, ended = 0;
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      Inputs const& in = inputs[s * heads + h];
      // The weighed key and its product with another one, both times 2^f, may fall among the
      // smallest numbers.
      double const largest_key = c.key_magnitude == 0.0f ? 6.0 : key_magnitude_of(s, h);
      double const largest_value = c.key_magnitude == 0.0f ? 6.0 : c.value_magnitude;
      int const x = scaled ? key_exponent[s * heads + h] : 0;
      double const per_term = 2 * std::ldexp(spacing, scaled ? -(15 - x - std::max(x, 0)) : 0);
      double const sum_underflow = double(in.tokens) * per_term * largest_key;
      double const underflow = (sum_underflow + double(in.tokens) * per_term) * largest_value;
      int const chunks = (in.tokens + c.chunk_size - 1) / c.chunk_size;
      int const per_segment = params.segment_tokens / c.chunk_size;
      int const segments = std::max(1, (chunks + per_segment - 1) / per_segment);
      for (int segment = 0; segment < segments; ++segment) {
        // The reference of a segment is that of its tokens alone.
        auto const first =
            static_cast<size_t>(std::min(segment * per_segment * c.chunk_size, in.tokens));
        auto const end =
            static_cast<size_t>(std::min((segment + 1) * per_segment * c.chunk_size, in.tokens));
        Inputs part{static_cast<int>(end - first), HeadDim, ValueDim, {}, {}, {}, {}};
        part.key.assign(in.key.begin() + static_cast<long>(first * d),
                        in.key.begin() + static_cast<long>(end * d));
        part.value.assign(in.value.begin() + static_cast<long>(first * dv),
                          in.value.begin() + static_cast<long>(end * dv));
        if (gated) {
          part.gate.assign(in.gate.begin() + static_cast<long>(first),
                           in.gate.begin() + static_cast<long>(end));
        }
        size_t const item =
            slot_of(segment_sequences, s, static_cast<size_t>(segment),
                    c.ends ? retention::kernel::Slots::kAll : retention::kernel::Slots::kButLast) *
                heads +
            h;
        State start;
        size_t const sequence = s * heads + h;
        if (c.initial && segment == 0) {
          start = {Sum(D * dv), Sum(D)};
          for (size_t i = 0; i < D * dv; ++i) {
            start.state.value[i] = initial[sequence * D * dv + i];
            start.state.magnitude[i] = std::abs(start.state.value[i]);
          }
          for (size_t i = 0; i < D; ++i) {
            start.key_sum.value[i] = initial_sum[sequence * D + i];
            start.key_sum.magnitude[i] = std::abs(start.key_sum.value[i]);
          }
        }
        auto const expected = retention::test::chunk_states(part, start, c.chunk_size);
        size_t const first_chunk = first_slot_of(params.sequences, s) - no_slots +
                                   static_cast<size_t>(segment * per_segment);
        for (size_t chunk = 0; chunk + 1 < expected.size(); ++chunk) {
          size_t const slot = (first_chunk + chunk) * heads + h;
          if (!c.initial && segment == 0 && chunk == 0) {
            continue;  // zero, and nobody reads it
          }
          size_t const place =
              (slot_of(params.sequences, s, static_cast<size_t>(segment * per_segment) + chunk,
                       retention::kernel::state_slots(c.initial)) -
               no_slots) *
                  heads +
              h;
          ++stored;
          RETENTION_CHECK(compare(states.data() + place * D * dv, expected[chunk].state, 2, 1,
                                  underflow, scaled ? state_exponent[slot] : 0));
          RETENTION_CHECK(compare(key_sums.data() + place * D, expected[chunk].key_sum, 1, 1,
                                  sum_underflow, scaled ? sum_exponent[slot] : 0));
        }
        if (segment == segments - 1 && !c.ends) {
          continue;  // nobody asked for it
        }
        ++ended;
        RETENTION_CHECK(
            compare(final_state.data() + item * D * dv, expected.back().state, 2, 0, underflow, 0));
        RETENTION_CHECK(
            compare(final_sum.data() + item * D, expected.back().key_sum, 1, 0, sum_underflow, 0));
      }
    }
  }
  // No other state has been written.
  RETENTION_CHECK_EQUAL(retention::test::written(key_sums), stored * D);
  RETENTION_CHECK_EQUAL(retention::test::written(final_sum), ended * D);
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << ", "
            << (std::is_same_v<Element, cute::half_t> ? "fp16" : "bf16") << ", seed " << seed
            << ": worst error " << worst << " of its bound\n";
}

// Every block pair belongs to exactly one unit.
void test_units() {
  for (int const blocks : {4, 8, 16, 32}) {
    int const pairs = blocks * (blocks + 1) / 2;
    std::vector<int> seen(static_cast<size_t>(pairs), 0);
    for (int u = 0; u < pairs / 2; ++u) {
      auto const unit = retention::collective::StateUnit::make(u);
      for (int i = 0; i < 2; ++i) {
        RETENTION_CHECK(unit.outer < blocks && unit.native[i] < blocks);
        ++seen[static_cast<size_t>(unit.row(i) / 64)];
      }
    }
    for (int const count : seen) {
      RETENTION_CHECK_EQUAL(count, 1);
    }
  }
}

template <class Element, int HeadDim, int ValueDim>
void run_all_cases(std::uint64_t seed) {
  using G = Gates;
  // A large state takes its time on the emulator.
  auto test = [&](Case const& c, bool large_too = false) {
    if (!retention::test::kLarge<HeadDim, ValueDim> || large_too) {
      run<Element, HeadDim, ValueDim>(c, seed);
    }
    ++seed;
  };
  test({"whole chunks", 64, {128}});
  test({"partial tile, two heads", 128, {150}, false, 2}, true);
  test({"initial, strided", 64, {100, 100}, false, 1, G::kMild, true, 0, true});
  test({"no gates", 64, {70}, false, 1, G::kNone});
  test({"packed", 64, {65, 0, 1, 130}, true, 1, G::kMild, true});
  test({"segments", 64, {260}, false, 1, G::kMild, true, 2}, true);
  test({"strong gates", 128, {200}, false, 1, G::kStrong, true});
  test({"large keys and values", 64, {130}, false, 1, G::kMild, true, 2, false, 3000, 1000}, true);
  test({"resets", 1024, {1100}, false, 1, G::kResets, true});
}

/// What depends little on the configuration.
template <class Element, int HeadDim, int ValueDim>
void run_further_cases(std::uint64_t seed) {
  using G = Gates;
  auto test = [&](Case const& c) { run<Element, HeadDim, ValueDim>(c, seed++); };
  test({"packed segments", 64, {65, 0, 300, 1, 64}, true, 2, G::kMild, true, 2});
  test({"as many segments as chunks", 128, {129, 129}, false, 1, G::kNone, true, 1});
  {
    Case ends{"no final states", 64, {65, 0, 200, 64}, true, 1, G::kMild, true, 2};
    ends.ends = false;
    test(ends);
  }
  test({"positive gates", 128, {200}, false, 1, G::kPositive, true});
  test({"far", 64, {130, 5}, true, 1, G::kMild, true, 0, false, 0, 1, 1 << 30});
  test({"keys of 100", 64, {130, 130}, false, 2, G::kMild, true, 2, false, 100, 1000});
  test({"keys of 100, ungated", 64, {700}, false, 1, G::kNone, true, 0, false, 100, 1000});
  test({"keys of 30000", 64, {300}, false, 1, G::kNone, true, 0, false, 30000, 1000});
  test({"keys of 30000, gated", 128, {65, 0, 140}, true, 2, G::kStrong, true, 0, false, 30000});
  test({"keys of 2^-12", 64, {300}, false, 1, G::kNone, false, 0, false, 0x1p-12f, 1000});
  test({"keys of 2^-12, gated", 64, {150, 150}, false, 1, G::kMild, false, 0, false, 0x1p-12f});
}

}  // namespace

RETENTION_TEST(chunk_states) {
  test_units();
  run_all_cases<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(0);
  if constexpr (TEST_HEAD_DIM <= 64 && TEST_VALUE_DIM <= 64) {
    run_further_cases<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(100);
  }
}
