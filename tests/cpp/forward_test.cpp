// The forward pass through the host API against float64 loops: on the emulator, for the
// configuration that TEST_ELEMENT, TEST_HEAD_DIM and TEST_VALUE_DIM name; on a CUDA device, for all
// that were compiled. Exits with 77, which ctest reports as skipped, where there is no device.

#include "retention/device/forward.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "device.hpp"
#include "element.hpp"
#include "reference.hpp"
#include "retention/symmetric_power.hpp"

namespace {

using retention::Configuration;
using retention::device::ForwardArguments;
using retention::device::Strides;
using retention::test::Array;
using retention::test::decode;
using retention::test::encode;
using retention::test::Inputs;
using retention::test::State;
using retention::test::Sum;
using std::size_t;

struct Case {
  char const* name;
  std::vector<int> lengths = {100};  // one a sequence; rows of a batch unless `packed`
  int chunk_size = 0;
  int segment_tokens = 0;
  bool packed = false;
  int heads = 1;
  int group = 1;      // query heads a key head
  double gate = 0.0;  // log gates are uniform between this and 0; 0 for none
  bool initial = false;
  bool final = false;
  bool strided = false;  // heads before tokens, and gaps between the rows
  double key_magnitude = 1.0;
  double query_magnitude = 1.0;
  double value_magnitude = 1.0;
};

// A [b, t, heads, width] tensor in memory.
struct Layout {
  Strides strides;
  size_t size;

  Layout(Case const& c, size_t batch, size_t tokens, size_t heads, size_t width) {
    auto const row = static_cast<std::int64_t>(c.strided ? width + 8 : width);
    auto const t = static_cast<std::int64_t>(tokens), h = static_cast<std::int64_t>(heads);
    strides = c.strided ? Strides{h * t * row, row, t * row} : Strides::contiguous(t, h, row);
    size = batch * tokens * heads * static_cast<size_t>(row);
  }
  size_t at(size_t row, size_t token, size_t head) const {
    return row * static_cast<size_t>(strides.batch) + token * static_cast<size_t>(strides.token) +
           head * static_cast<size_t>(strides.head);
  }
};

// The plain formula with every result rounded to the element type, as a framework without kernels
// computes it: the yardstick of errors.
std::vector<double> plain_formula(retention::ElementType element, Inputs const& in,
                                  State const& initial) {
  auto const d = static_cast<size_t>(in.head_dim), dv = static_cast<size_t>(in.value_dim);
  auto const D = initial.key_sum.value.size();
  auto const tokens = static_cast<size_t>(in.tokens);
  auto const round = [&](double x) { return retention::test::rounded(element, x); };
  std::vector<double> output(tokens * dv, 0.0);
  std::vector<double> weights(tokens);
  for (size_t i = 0; i < tokens; ++i) {
    double norm = 0.0, gate = 0.0;
    for (size_t j = i + 1; j-- > 0;) {
      double score = 0.0;
      for (size_t x = 0; x < d; ++x) {
        score += double{in.query[i * d + x]} * in.key[j * d + x];
      }
      score = round(round(score) / std::sqrt(static_cast<double>(d)));
      weights[j] = round(round(score * score) * round(std::exp(gate)));
      norm += weights[j];
      gate += in.gate.empty() ? 0.0 : static_cast<double>(in.gate[j]);
    }
    std::vector<double> sums(dv, 0.0);
    for (size_t e = 0; e < dv; ++e) {
      for (size_t j = 0; j <= i; ++j) {
        sums[e] += weights[j] * in.value[j * dv + e];
      }
    }
    if (D > 0) {
      double const factor = round(std::exp(gate)) / static_cast<double>(d);
      for (size_t m = 0; m < D; ++m) {
        auto const row = static_cast<std::int64_t>(m);
        auto const a = static_cast<size_t>(retention::row_factor(row, 0, in.head_dim, 2));
        auto const b = static_cast<size_t>(retention::row_factor(row, 1, in.head_dim, 2));
        double const phi = round(double{in.query[i * d + a]} * in.query[i * d + b]);
        norm += factor * phi * round(initial.key_sum.value[m]);
        for (size_t e = 0; e < dv; ++e) {
          sums[e] += factor * phi * round(initial.state.value[m * dv + e]);
        }
      }
    }
    for (size_t e = 0; e < dv; ++e) {
      output[i * dv + e] = norm == 0.0 ? 0.0 : round(round(sums[e]) / round(norm));
    }
  }
  return output;
}

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

void run_case(Configuration const& configuration, Case const& c, std::uint64_t seed) {
  retention::ElementType const element = configuration.element;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;

  auto const d = static_cast<size_t>(configuration.head_dim);
  auto const dv = static_cast<size_t>(configuration.value_dim);
  auto const D = static_cast<size_t>(retention::state_dim(configuration.head_dim, 2));
  auto const heads = static_cast<size_t>(c.heads), group = static_cast<size_t>(c.group);
  size_t const sequences = c.lengths.size();
  size_t total = 0;
  for (int const length : c.lengths) {
    total += static_cast<size_t>(length);
  }
  // Rows of a batch have one length.
  size_t const batch = c.packed ? 1 : sequences, tokens = total / batch;

  Layout const query_layout(c, batch, tokens, heads * group, d);
  Layout const key_layout(c, batch, tokens, heads, d);
  Layout const value_layout(c, batch, tokens, heads, dv);
  Layout const gate_layout(c, batch, tokens, heads, 1);
  Layout const output_layout(c, batch, tokens, heads * group, dv);
  Array<std::uint16_t> query("query", query_layout.size), key("key", key_layout.size);
  Array<std::uint16_t> value("value", value_layout.size), output("output", output_layout.size);
  Array<std::uint16_t> residual("output_residual", output_layout.size);
  Array<float> gate("log_gate", gate_layout.size);
  Array<float> normalizer("normalizer", batch * tokens * heads * group);
  Array<int> cu_seqlens("cu_seqlens", sequences + 1);
  Array<float> initial_state("initial_state", c.initial ? sequences * heads * D * dv : 1);
  Array<float> initial_key_sum("initial_key_sum", c.initial ? sequences * heads * D : 1);
  Array<float> final_state("final_state", c.final ? sequences * heads * D * dv : 1);
  Array<float> final_key_sum("final_key_sum", c.final ? sequences * heads * D : 1);

  // Of each sequence and query head: what the reference takes. Those of a key head share its part.
  std::vector<Inputs> inputs(sequences * heads * group);
  std::vector<State> initial(sequences * heads);
  cu_seqlens[0] = 0;
  for (size_t s = 0; s < sequences; ++s) {
    cu_seqlens[s + 1] = cu_seqlens[s] + c.lengths[s];
    auto const length = static_cast<size_t>(c.lengths[s]);
    size_t const row = c.packed ? 0 : s, first = c.packed ? static_cast<size_t>(cu_seqlens[s]) : 0;
    auto fill = [&](std::uint16_t* target, size_t width, double magnitude,
                    std::vector<float>& copy) {
      for (size_t i = 0; i < width; ++i) {
        target[i] = encode(element, magnitude * normal(rng));
        copy.push_back(static_cast<float>(decode(element, target[i])));
      }
    };
    for (size_t h = 0; h < heads; ++h) {
      Inputs in{c.lengths[s], configuration.head_dim, configuration.value_dim, {}, {}, {}, {}};
      for (size_t t = 0; t < length; ++t) {
        fill(&key[key_layout.at(row, first + t, h)], d, c.key_magnitude, in.key);
        fill(&value[value_layout.at(row, first + t, h)], dv, c.value_magnitude, in.value);
        if (c.gate != 0.0) {
          in.gate.push_back(static_cast<float>(c.gate * uniform(rng)));
          gate[gate_layout.at(row, first + t, h)] = in.gate.back();
        }
      }
      State& start = initial[s * heads + h];
      if (c.initial) {
        // A state that is one: of a sequence before this one.
        Inputs before{20, configuration.head_dim, configuration.value_dim, {}, {}, {}, {}};
        for (size_t i = 0; i < 20 * d; ++i) {
          before.key.push_back(static_cast<float>(c.key_magnitude * normal(rng)));
        }
        for (size_t i = 0; i < 20 * dv; ++i) {
          before.value.push_back(static_cast<float>(c.value_magnitude * normal(rng)));
        }
        start = retention::test::chunk_states(before, {}, 64).back();
        auto take = [](Sum& sum, float* target) {
          for (size_t i = 0; i < sum.value.size(); ++i) {
            target[i] = static_cast<float>(sum.value[i]);
            sum.value[i] = static_cast<double>(target[i]);
            sum.magnitude[i] = std::abs(sum.value[i]);
          }
        };
        take(start.state, &initial_state[(s * heads + h) * D * dv]);
        take(start.key_sum, &initial_key_sum[(s * heads + h) * D]);
      }
      for (size_t n = 0; n < group; ++n) {
        in.query.clear();
        for (size_t t = 0; t < length; ++t) {
          fill(&query[query_layout.at(row, first + t, h * group + n)], d, c.query_magnitude,
               in.query);
        }
        inputs[(s * heads + h) * group + n] = in;
      }
    }
  }

  ForwardArguments a;
  a.element = element;
  a.head_dim = configuration.head_dim;
  a.value_dim = configuration.value_dim;
  a.sequences = static_cast<int>(sequences);
  a.tokens = static_cast<int>(tokens);
  a.heads = c.heads;
  a.query_heads = c.heads * c.group;
  a.query = query.upload();
  a.query_strides = query_layout.strides;
  a.key = key.upload();
  a.key_strides = key_layout.strides;
  a.value = value.upload();
  a.value_strides = value_layout.strides;
  a.log_gate = c.gate != 0.0 ? gate.upload() : nullptr;
  a.log_gate_strides = gate_layout.strides;
  a.cu_seqlens = c.packed ? cu_seqlens.upload() : nullptr;
  a.initial_state = c.initial ? initial_state.upload() : nullptr;
  a.initial_key_sum = c.initial ? initial_key_sum.upload() : nullptr;
  a.output = output.upload();
  a.output_strides = output_layout.strides;
  bool const refines = c.final;  // some cases do, some do not
  a.output_residual = refines ? residual.upload() : nullptr;
  a.normalizer = normalizer.upload();
  a.final_state = c.final ? final_state.upload() : nullptr;
  a.final_key_sum = c.final ? final_key_sum.upload() : nullptr;
  a.chunk_size = c.chunk_size;
  a.segment_tokens = c.segment_tokens;
  std::string const problem = retention::test::run_forward(a, seed);
  RETENTION_CHECK_EQUAL(problem, std::string());
  if (!problem.empty()) {
    return;
  }
  output.download();
  residual.download();
  normalizer.download();
  if (c.final) {
    final_state.download();
    final_key_sum.download();
  }

  double const u = retention::test::roundoff(element);
  std::vector<Errors> errors(inputs.size());
  retention::test::parallel_for(inputs.size(), [&](size_t index) {
    size_t const s = index / (heads * group), n = index % (heads * group);
    size_t const row = c.packed ? 0 : s, first = c.packed ? static_cast<size_t>(cu_seqlens[s]) : 0;
    Errors& sum = errors[index];
    Inputs const& in = inputs[index];
    State const& start = initial[s * heads + n / group];
    auto const expected = retention::test::attend(in, start, 1.0);
    auto const plain =
        plain_formula(element, of_unit_magnitude(in, c), of_unit_magnitude(start, c));
    for (size_t t = 0; t < static_cast<size_t>(in.tokens); ++t) {
      for (size_t e = 0; e < dv; ++e) {
        double const o = expected.output[t * dv + e];
        size_t const at = output_layout.at(row, first + t, n) + e;
        double const actual = decode(element, output[at]);
        sum.actual += (actual - o) * (actual - o);
        sum.plain += (plain[t * dv + e] - o) * (plain[t * dv + e] - o);
        if (refines) {
          double const rest = decode(element, residual[at]);
          double const units = std::abs(rest) / retention::test::spacing(element, actual);
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
      double const actual = std::ldexp(
          double{normalizer[(row * tokens + first + t) * heads * group + n]}, 2 * exponent);
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
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t h = 0; c.final && h < heads; ++h) {
      auto const expected = retention::test::chunk_states(inputs[(s * heads + h) * group],
                                                          initial[s * heads + h], 1 << 30)
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
      compare(&final_state[(s * heads + h) * D * dv], expected.state, 2);
      compare(&final_key_sum[(s * heads + h) * D], expected.key_sum, 1);
    }
  }
  // Of the whole output: single rows may owe more to the cancellation of a state's terms.
  double const error = std::sqrt(all.actual / all.size) / u;
  double const plain_error = std::sqrt(all.plain / all.size) / u;
  double const normalizer_error = std::sqrt(all.normalizer / all.normalizer_size) / u;
  std::cout << c.name << ": " << to_string(configuration) << ": error " << error
            << " roundings (plain formula " << plain_error << "), normalizer " << normalizer_error
            << ", state " << state_error << " of its bound\n";
  RETENTION_CHECK(error <= 2 * plain_error + 1);
  // The error without the output's rounding: less, over the whole tensor.
  RETENTION_CHECK(all.worst_residual <= 0.5);
  RETENTION_CHECK(all.refined <= (refines ? 0.9 : 0.0) * all.actual);
  // Phi and the state are rounded, twice and up to twice; sums and exponentials are in fp32.
  RETENTION_CHECK(normalizer_error <= 2);
  RETENTION_CHECK(all.worst_normalizer <= 4 * u);
  RETENTION_CHECK(state_error <= 1.0);
}

void run_configuration(Configuration const& configuration, bool small) {
  std::uint64_t seed = 0;
  auto run = [&](Case const& c) { run_case(configuration, c, seed++); };
  // name, lengths, chunk, segment, packed, heads, group, gate, initial, final, strided, magnitudes
  run({"one chunk", {100}, 0, 0, false, 1, 1, -0.1});
  run({"chunks", {150, 150}, 64, 0, false, 2, 1, -0.2, false, true});
  run({"segments", {330}, 64, 128, false, 1, 2, -0.05, true, true});
  run({"packed", {70, 0, 1, 140}, 64, 64, true, 1, 1, -0.1, true, true});
  run({"packed, one chunk", {70, 0, 33}, 0, 0, true, 2, 3, 0.0});
  run({"strong gates, strided", {90, 90}, 64, 0, false, 2, 2, -60.0, true, true, true});
  run({"large keys", {130}, 64, 0, false, 1, 1, -0.1, false, true, false, 100.0, 1e3, 10.0});
  // A host takes long for their references: the size that most models have must do.
  bool const usual = configuration.head_dim == 64 && configuration.value_dim == 64;
  if (retention::test::kOnDevice && usual && !small) {
    run({"long", {1700}, 512, 0, false, 2, 2, -0.01, true, true});
    run({"long, one chunk", {1500}, 0, 0, false, 1, 1, -0.01});
    run({"long, packed", {1000, 0, 1, 63, 64, 65, 1500}, 256, 512, true, 2, 2, -0.02, true, true});
    run({"many sequences", std::vector<int>(300, 40), 64, 0, true, 2, 1, -0.02, false, true});
    run({"long, no gates", {1300}, 128, 0, false, 3, 1, 0.0, false, true, true});
    run({"long, strong gates", {1500}, 128, 256, false, 1, 1, -60.0, true, true});
    run({"many heads a group", {300}, 128, 0, false, 1, 16, -0.05});
  }
}

}  // namespace

// Arguments, on a device: `small` leaves out the long cases, as a sanitizer needs it; anything else
// is a part of the name of the configurations to run.
int main(int count, char** arguments) {
  if (!retention::test::device_available()) {
    std::cout << "skipped: no CUDA device\n";
    return 77;
  }
  bool small = false;
  std::string wanted;
  for (int i = 1; i < count; ++i) {
    std::string const argument = arguments[i];
    small = small || argument == "small";
    wanted = argument == "small" ? wanted : argument;
  }
  for (Configuration const& configuration : retention::test::configurations()) {
    if (to_string(configuration).find(wanted) != std::string::npos) {
      run_configuration(configuration, small);
    }
  }
  return retention::test::finish();
}
