// The forward pass through the host API against float64 loops: on the emulator, for the
// configuration that TEST_ELEMENT, TEST_HEAD_DIM and TEST_VALUE_DIM name; on a CUDA device, for all
// that were compiled. Exits with 77, which ctest reports as skipped, where there is no device.

#include "retention/device/forward.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <string>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "device.hpp"
#include "element.hpp"
#include "reference.hpp"
#include "retention/symmetric_power.hpp"

namespace {

using retention::Configuration;
using retention::device::ForwardArguments;
using retention::test::Array;
using retention::test::Call;
using retention::test::Case;
using retention::test::decode;
using retention::test::Inputs;
using retention::test::plain_formula;
using retention::test::State;
using retention::test::Sum;
using std::size_t;

/// The same with keys and queries of magnitude 1, where the plain formula is at its best.
Inputs of_unit_magnitude(Inputs inputs, Case const& c) {
  for (float& x : inputs.query) {
    x = static_cast<float>(x / c.query_magnitude);
  }
  for (float& x : inputs.key) {
    x = static_cast<float>(x / c.key_magnitude);
  }
  return inputs;
}

State of_unit_magnitude(State state, Case const& c) {
  for (Sum* sum : {&state.state, &state.key_sum}) {
    for (double& x : sum->value) {
      x /= c.key_magnitude * c.key_magnitude;
    }
  }
  return state;
}

struct Errors {
  double actual = 0.0;   // sums of squares
  double refined = 0.0;  // of output + residual
  double plain = 0.0;
  double size = 0.0;
  double normalizer = 0.0;
  double normalizer_size = 0.0;
  double worst_normalizer = 0.0;  // relative to the magnitude of its terms
  double worst_residual = 0.0;    // in units of output's last place

  void worsen_normalizer(double error) {
    worst_normalizer = error <= worst_normalizer ? worst_normalizer : error;  // NaN too
  }
};

void run_case(Configuration const& configuration, Case const& c, std::uint64_t seed,
              bool unchecked) {
  Call call(configuration, c, seed);
  size_t const d = call.d, dv = call.dv, D = call.D, heads = call.heads, group = call.group;
  ForwardArguments a = call.upload();
  bool const refines = c.final;  // some cases do, some do not
  if (!refines) {
    a.output_residual = nullptr;
  }
  size_t const elements = c.parts ? call.states() * D : 0;
  Array<float> half_state("half of the states", elements * dv + 1);
  Array<float> half_key_sum("half of the sums of keys", elements + 1);
  for (size_t i = 0; i < elements * dv; ++i) {
    half_state[i] = call.initial_state[i] / 2;
  }
  for (size_t i = 0; i < elements; ++i) {
    half_key_sum[i] = call.initial_key_sum[i] / 2;
  }
  std::string problem;
  if (c.parts) {
    a.initial_state = half_state.upload();
    a.initial_key_sum = half_key_sum.upload();
    problem = retention::test::run_forward_parts(a, {a.initial_state, a.initial_key_sum}, seed);
  } else {
    problem = retention::test::run_forward(a, seed);
  }
  RETENTION_CHECK_EQUAL(problem, std::string());
  if (!problem.empty() || unchecked) {
    return;
  }
  call.download();

  for (size_t t = 0; t < call.tokens; ++t) {
    for (size_t n = 0; n < heads * group && !call.is_owned(t); ++n) {
      size_t const at = call.output_layout.at(0, t, n);
      bool zero = call.normalizer[t * heads * group + n] == 0.0f;
      for (size_t e = 0; e < dv; ++e) {
        zero = zero && call.output[at + e] == 0 && (!refines || call.residual[at + e] == 0);
      }
      RETENTION_CHECK(zero);
    }
  }
  double const u = retention::test::roundoff(call.element);
  std::vector<Errors> errors(call.inputs.size());
  retention::test::parallel_for(call.inputs.size(), [&](size_t index) {
    size_t const s = index / (heads * group), n = index % (heads * group);
    size_t const row = call.row(s), first = call.first_token(s);
    Errors& sum = errors[index];
    Inputs const& in = call.inputs[index];
    State const& start = call.initial[s * heads + n / group];
    auto const expected = retention::test::attend(in, start, 1.0);
    auto const plain =
        plain_formula(call.element, of_unit_magnitude(in, c), of_unit_magnitude(start, c));
    for (size_t t = 0; t < static_cast<size_t>(in.tokens); ++t) {
      for (size_t e = 0; e < dv; ++e) {
        double const o = expected.output[t * dv + e];
        size_t const at = call.output_layout.at(row, first + t, n) + e;
        double const actual = decode(call.element, call.output[at]);
        sum.actual += (actual - o) * (actual - o);
        sum.plain += (plain[t * dv + e] - o) * (plain[t * dv + e] - o);
        if (refines) {
          double const rest = decode(call.element, call.residual[at]);
          double const units = std::abs(rest) / retention::test::spacing(call.element, actual);
          sum.worst_residual = units <= sum.worst_residual ? sum.worst_residual : units;  // NaN too
          sum.refined += (actual + rest - o) * (actual + rest - o);
        }
        sum.size += o * o;
      }
      double largest = 0.0;
      for (size_t x = 0; x < d; ++x) {
        largest = std::max(largest, std::abs(double{in.query[t * d + x]}));
      }
      int exponent = 0;
      std::frexp(largest, &exponent);
      double const actual =
          std::ldexp(double{call.normalizer[(row * call.tokens + first + t) * heads * group + n]},
                     2 * exponent);
      double const difference = std::abs(actual - expected.normalizer[t]);
      sum.worsen_normalizer(difference == 0.0 ? 0.0 : difference / expected.magnitude[t]);
      sum.normalizer += difference * difference;
      sum.normalizer_size += expected.normalizer[t] * expected.normalizer[t];
    }
  });
  Errors all;
  for (Errors const& each : errors) {
    all.actual += each.actual;
    all.refined += each.refined;
    all.worst_residual = std::max(all.worst_residual, each.worst_residual);
    all.plain += each.plain;
    all.size += each.size;
    all.normalizer += each.normalizer;
    all.normalizer_size += each.normalizer_size;
    all.worsen_normalizer(each.worst_normalizer);
  }

  double state_error = 0.0;
  for (size_t s = 0; s < call.sequences; ++s) {
    for (size_t h = 0; c.final && h < heads; ++h) {
      auto const expected = retention::test::chunk_states(call.inputs[(s * heads + h) * group],
                                                          call.initial[s * heads + h], 1 << 30)
                                .back();
      // The decayed key and phi are rounded once each; fp32 sums, exponentials and carries are far
      // below. fp16 has numbers so small that they lose digits, next to keys of a larger one.
      auto compare = [&](float const* actual, Sum const& sum, double roundings) {
        double const largest = *std::max_element(sum.magnitude.begin(), sum.magnitude.end());
        for (size_t i = 0; i < sum.value.size(); ++i) {
          double const bound = (roundings * 2 * u + 0x1p-16) * sum.magnitude[i] + 0x1p-24 * largest;
          double const difference = std::abs(actual[i] - sum.value[i]);
          double const error = difference == 0.0 ? 0.0 : difference / bound;
          state_error = error <= state_error ? state_error : error;  // NaN too
        }
      };
      compare(&call.final_state[(s * heads + h) * D * dv], expected.state, 2);
      compare(&call.final_key_sum[(s * heads + h) * D], expected.key_sum, 1);
    }
  }
  // Of the whole output: single rows may owe more to the cancellation of a state's terms.
  // Of no tokens, no error.
  auto const relative = [&](double error, double size) {
    return error == 0.0 ? 0.0 : std::sqrt(error / size) / u;
  };
  double const error = relative(all.actual, all.size);
  double const plain_error = relative(all.plain, all.size);
  double const normalizer_error = relative(all.normalizer, all.normalizer_size);
  std::cout << c.name << ": " << to_string(configuration) << ": error " << error
            << " roundings (plain formula " << plain_error << "), normalizer " << normalizer_error
            << ", state " << state_error << " of its bound\n";
  RETENTION_CHECK(error <= 2 * plain_error + 1);
  // The error without the output's rounding: less, over the whole tensor; a little where gates
  // leave most rows a single token, whose value needs no rounding.
  RETENTION_CHECK(all.worst_residual <= 0.5);
  double const part = !refines ? 0.0 : c.gate < -1.0 || c.resets != 0 ? 1.0 : 0.9;
  RETENTION_CHECK(all.refined <= part * all.actual);
  // Phi and the state are rounded, twice and up to twice; sums and exponentials are in fp32.
  RETENTION_CHECK(normalizer_error <= 2);
  RETENTION_CHECK(all.worst_normalizer <= 4 * u);
  RETENTION_CHECK(state_error <= 1.0);
}

void run_configuration(Configuration const& configuration, bool unchecked) {
  std::uint64_t seed = 0;
  auto run = [&](Case const& c) { run_case(configuration, c, seed++, unchecked); };
  auto const with_resets = [](int every, Case c) {
    c.resets = every;
    return c;
  };
  // name, lengths, chunk, segment, packed, heads, group, gate, initial, final, strided, magnitudes
  run({"one chunk", {100}, 0, 0, false, 1, 1, -0.1});
  run({"packed, one chunk", {70, 0, 33}, 0, 0, true, 2, 3, 0.0});
  Case padded{"packed, padded", {0, 50, 0, 80, 0}, 64, 0, true, 1, 2, -0.1};
  padded.lead = 37;
  padded.tail = 75;
  run(padded);
  Case empty{"packed, all empty", {0, 0, 0}, 64, 0, true, 1, 1, -0.1};
  empty.tail = 150;  // more than a chunk
  run(empty);
  // A state of many elements takes its time on the emulator.
  bool const large =
      retention::state_dim(configuration.head_dim, 2) * configuration.value_dim > 50000;
  // The widest heads have no kernels of their own for it.
  bool const in_parts = configuration.element == retention::ElementType::kBFloat16 &&
                        (retention::test::kOnDevice || configuration.head_dim < 128);
  auto const run_in_parts = [&](Case c) {
    c.parts = c.initial = c.final = true;
    run(c);
  };
  if (in_parts) {
    run_in_parts({"in parts", {200}, 64, 128, false, 1, 2, -0.05});
  }
  if (!retention::test::kOnDevice && large) {
    run({"segments", {200}, 64, 128, false, 1, 2, -0.05, true, true});
    run({"strong gates, strided", {90}, 64, 0, false, 1, 1, -60.0, true, true, true});
    run(with_resets(3, {"resets, one chunk", {150}, 0, 0, false, 1, 2, -0.5}));
    return;
  }
  if (in_parts) {
    run_in_parts({"in parts, one chunk", {70, 70}, 0, 0, false, 1, 1, -0.1});
    Case packed{"in parts, packed", {0, 140, 0}, 64, 64, true, 1, 1, -0.1};
    packed.lead = 37;
    packed.tail = 75;
    run_in_parts(packed);
    run_in_parts(with_resets(90, {"in parts, resets", {150}, 64, 0, false, 1, 1, -0.1}));
  }
  run({"chunks", {150, 150}, 64, 0, false, 2, 1, -0.2, false, true});
  run({"segments", {330}, 64, 128, false, 1, 2, -0.05, true, true});
  run({"packed", {70, 0, 1, 140}, 64, 64, true, 1, 1, -0.1, true, true});
  padded.name = "packed, padded, strided, with states";
  padded.segment_tokens = 64;
  padded.initial = padded.final = padded.strided = true;
  run(padded);
  // The form of each by its own length.
  Case mixed{"packed, mixed", {0, 150, 151, 0, 64, 65, 1, 200, 0}, 64, 64, true, 1, 2, -0.1};
  mixed.whole_until = 150;
  mixed.tail = 20;
  run(mixed);
  mixed.name = "packed, mixed, with states";
  mixed.lengths = {0, 150, 151, 1, 0};
  mixed.initial = mixed.final = true;
  run(mixed);
  run({"packed, among empty ones", retention::test::among_empty(70, 200), 64, 64, true, 1, 1,
       -0.1});
  run({"packed, one token each", retention::test::one_token_each(), 64, 0, true, 1, 1, -0.1});
  run({"strong gates, strided", {90, 90}, 64, 0, false, 2, 2, -60.0, true, true, true});
  run({"large keys", {130}, 64, 0, false, 1, 1, -0.1, false, true, false, 100.0, 1e3, 10.0});
  run(with_resets(3, {"resets, one chunk", {150}, 0, 0, false, 1, 2, -0.5}));
  run(with_resets(41, {"a few resets", {200}, 64, 128, false, 1, 1, -0.05, true, true}));
  run(with_resets(2, {"resets", {290}, 192, 192, false, 1, 1, -0.2, true, true}));
  run(with_resets(3, {"resets, packed", {70, 0, 1, 140}, 64, 64, true, 1, 2, -0.1, true, true}));
  // A host takes long for their references: the size that most models have must do.
  bool const usual = configuration.head_dim == 64 && configuration.value_dim == 64;
  if (retention::test::kOnDevice && usual && !unchecked) {
    run({"long", {1700}, 512, 0, false, 2, 2, -0.01, true, true});
    run({"long, one chunk", {1500}, 0, 0, false, 1, 1, -0.01});
    run({"long, packed", {1000, 0, 1, 63, 64, 65, 1500}, 256, 512, true, 2, 2, -0.02, true, true});
    run({"many sequences", std::vector<int>(300, 40), 64, 0, true, 2, 1, -0.02, false, true});
    run({"long, no gates", {1300}, 128, 0, false, 3, 1, 0.0, false, true, true});
    run({"long, strong gates", {1500}, 128, 256, false, 1, 1, -60.0, true, true});
    run({"many heads a group", {300}, 128, 0, false, 1, 16, -0.05});
    run(with_resets(3, {"long, resets", {1700}, 512, 0, false, 2, 2, -0.01, true, true}));
    run(with_resets(2, {"long, one chunk, resets", {1500}, 2048, 0, false, 1, 1, -0.01}));
  }
}

}  // namespace

int main(int count, char** arguments) {
  return retention::test::run_configurations(count, arguments, run_configuration);
}
