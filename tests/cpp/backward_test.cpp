// The gradients through the host API against float64 loops: on the emulator, for the configuration
// that TEST_ELEMENT, TEST_HEAD_DIM and TEST_VALUE_DIM name; on a CUDA device, for all that were
// compiled. Exits with 77, which ctest reports as skipped, where there is no device.

#include "retention/device/backward.hpp"

#include <cmath>
#include <cstring>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "device.hpp"
#include "element.hpp"
#include "reference.hpp"

namespace {

using retention::Configuration;
using retention::device::BackwardArguments;
using retention::test::Array;
using retention::test::Call;
using retention::test::Case;
using retention::test::decode;
using retention::test::Gradients;
using retention::test::Inputs;
using retention::test::Layout;
using retention::test::State;
using retention::test::Sum;
using std::size_t;

// Of a whole tensor: single elements may owe more to the cancellation of their terms.
struct Error {
  double error = 0.0;  // sums of squares
  double size = 0.0;
  double magnitude = 0.0;  // of the terms, before any cancels

  void add(double actual, double expected, double terms) {
    error += (actual - expected) * (actual - expected);
    size += expected * expected;
    magnitude += terms * terms;
  }
  double relative() const { return error == 0.0 ? 0.0 : std::sqrt(error / size); }
  bool is_within(double relative, double of_terms) const {
    return std::sqrt(error) <= relative * std::sqrt(size) + of_terms * std::sqrt(magnitude);
  }
  double of_terms() const { return error == 0.0 ? 0.0 : std::sqrt(error / magnitude); }
};

enum Wanted : unsigned { kQuery = 1, kKey = 2, kValue = 4, kGate = 8, kInitial = 16, kAll = 31 };

/// Where the gradients of a call go.
struct Results {
  size_t const tokens, states;
  Array<std::uint16_t> query, key, value;
  Array<float> gate, initial_state, initial_key_sum;

  explicit Results(Call const& call)
      : tokens(call.batch * call.tokens),
        states(call.c.initial ? call.states() : 0),
        query("d_query", tokens * call.heads * call.group * call.d),
        key("d_key", tokens * call.heads * call.d),
        value("d_value", tokens * call.heads * call.dv),
        gate("d_log_gate", tokens * call.heads),
        initial_state("d_initial_state", states * call.D * call.dv + 1),
        initial_key_sum("d_initial_key_sum", states * call.D + 1) {}

  /// Those of `wanted` that there are.
  void upload(BackwardArguments& a, unsigned wanted) {
    a.d_query = (wanted & kQuery) != 0 ? query.upload() : nullptr;
    a.d_key = (wanted & kKey) != 0 ? key.upload() : nullptr;
    a.d_value = (wanted & kValue) != 0 ? value.upload() : nullptr;
    bool const has_gate = (wanted & kGate) != 0 && a.forward.log_gate != nullptr;
    a.d_log_gate = has_gate ? gate.upload() : nullptr;
    bool const has_initial = (wanted & kInitial) != 0 && a.forward.initial_state != nullptr;
    a.d_initial_state = has_initial ? initial_state.upload() : nullptr;
    a.d_initial_key_sum = has_initial ? initial_key_sum.upload() : nullptr;
  }
  void download() {
    query.download();
    key.download();
    value.download();
    gate.download();
    initial_state.download();
    initial_key_sum.download();
  }
};

/// Whether `size` elements are the same bits.
template <class T>
bool equal(Array<T>& x, Array<T>& y, size_t size) {
  return std::memcmp(&x[0], &y[0], size * sizeof(T)) == 0;
}

/// What is wanted of the gradients alone is what all of them together are.
void run_part(Call const& call, BackwardArguments a, Results& all, unsigned wanted,
              std::uint64_t seed) {
  Results part(call);
  part.upload(a, wanted);
  std::string const problem = retention::test::run_backward(a, seed % 2 == 1, seed);
  RETENTION_CHECK_EQUAL(problem, std::string());
  part.download();
  size_t const keys = part.tokens * call.heads;
  RETENTION_CHECK(a.d_query == nullptr || equal(part.query, all.query, keys * call.group * call.d));
  RETENTION_CHECK(a.d_key == nullptr || equal(part.key, all.key, keys * call.d));
  RETENTION_CHECK(a.d_value == nullptr || equal(part.value, all.value, keys * call.dv));
  RETENTION_CHECK(a.d_log_gate == nullptr || equal(part.gate, all.gate, keys));
  if (a.d_initial_state != nullptr) {
    RETENTION_CHECK(equal(part.initial_state, all.initial_state, part.states * call.D * call.dv));
    RETENTION_CHECK(equal(part.initial_key_sum, all.initial_key_sum, part.states * call.D));
  }
}

void run_case(Configuration const& configuration, Case const& c, std::uint64_t seed, bool unchecked,
              std::vector<unsigned> const& parts) {
  Call call(configuration, c, seed);
  size_t const d = call.d, dv = call.dv, D = call.D, heads = call.heads, group = call.group;
  retention::device::ForwardArguments forward = call.upload();
  // A final state that nobody asked for can have no gradient; forward does the same work without.
  forward.final_state = forward.final_key_sum = nullptr;

  Layout const gate_layout(false, call.batch, call.tokens, heads, 1);
  Layout const query_layout(false, call.batch, call.tokens, heads * group, d);
  Layout const key_layout(false, call.batch, call.tokens, heads, d);
  Layout const value_layout(false, call.batch, call.tokens, heads, dv);
  size_t const final = c.final ? call.states() : 0;
  Array<std::uint16_t> d_output("d_output", call.output_layout.size);
  Results results(call);
  Array<float> d_final_state("d_final_state", final * D * dv + 1);
  Array<float> d_final_key_sum("d_final_key_sum", final * D + 1);
  std::vector<std::vector<float>> d_outputs(call.inputs.size());
  for (size_t index = 0; index < call.inputs.size(); ++index) {
    size_t const s = index / (heads * group), n = index % (heads * group);
    for (size_t t = 0; t < static_cast<size_t>(c.lengths[s]); ++t) {
      size_t const at = call.output_layout.at(call.row(s), call.first_token(s) + t, n);
      call.fill(&d_output[at], dv, c.gradient_magnitude, d_outputs[index]);
    }
  }
  for (size_t t = 0; t < call.tokens; ++t) {
    for (size_t n = 0; n < heads * group && !call.is_owned(t); ++n) {
      call.spoil(&d_output[call.output_layout.at(0, t, n)], dv, t);
    }
  }
  // As large as the gradients that outputs hand to a state: products of keys, values and 1 / z.
  std::vector<State> d_final(call.states());
  std::normal_distribution<double> normal;
  double const state_gradient =
      c.gradient_magnitude / (c.key_magnitude * c.key_magnitude * static_cast<double>(d * d));
  for (size_t index = 0; index < final; ++index) {
    d_final[index] = {Sum(D * dv), Sum(D)};
    auto fill = [&](Sum& sum, float* target, double magnitude) {
      for (size_t i = 0; i < sum.value.size(); ++i) {
        target[i] = static_cast<float>(magnitude * normal(call.rng));
        sum.value[i] = static_cast<double>(target[i]);
      }
    };
    fill(d_final[index].state, &d_final_state[index * D * dv], state_gradient);
    fill(d_final[index].key_sum, &d_final_key_sum[index * D], c.value_magnitude * state_gradient);
  }

  BackwardArguments a;
  a.forward = forward;
  a.d_output = d_output.upload();
  a.d_output_strides = call.output_layout.strides;
  a.d_final_state = c.final ? d_final_state.upload() : nullptr;
  a.d_final_key_sum = c.final ? d_final_key_sum.upload() : nullptr;
  results.upload(a, kAll);
  retention::device::OuterState later;
  if (c.parts) {  // the other half
    for (size_t i = 0; i < final * D * dv; ++i) {
      d_final_state[i] /= 2;
    }
    for (size_t i = 0; i < final * D; ++i) {
      d_final_key_sum[i] /= 2;
    }
    later = {d_final_state.upload(), d_final_key_sum.upload()};
  }
  std::string const problem = retention::test::run_backward(a, seed % 2 == 1, seed, later);
  RETENTION_CHECK_EQUAL(problem, std::string());
  if (!problem.empty() || unchecked) {
    return;
  }
  results.download();
  for (unsigned const wanted : parts) {
    run_part(call, a, results, wanted, seed);
  }

  for (size_t t = 0; t < call.tokens; ++t) {
    auto const is_zero = [&](auto& gradient, Layout const& layout, size_t width) {
      bool zero = true;
      for (size_t i = 0; i < width; ++i) {
        zero = zero && gradient[layout.at(0, t, 0) + i] == 0;
      }
      return zero;
    };
    if (!call.is_owned(t)) {
      RETENTION_CHECK(is_zero(results.query, query_layout, heads * group * d));
      RETENTION_CHECK(is_zero(results.key, key_layout, heads * d));
      RETENTION_CHECK(is_zero(results.value, value_layout, heads * dv));
      RETENTION_CHECK(c.gate == 0.0 || is_zero(results.gate, gate_layout, heads));
    }
  }

  std::vector<Gradients> expected(call.states());
  retention::test::parallel_for(expected.size(), [&](size_t index) {
    auto const part = [&](auto const& all) {
      auto const first = all.begin() + static_cast<std::ptrdiff_t>(index * group);
      return std::vector(first, first + static_cast<std::ptrdiff_t>(group));
    };
    expected[index] = retention::test::attend_gradient(part(call.inputs), call.initial[index],
                                                       part(d_outputs), d_final[index]);
  });

  Error query, key, value, gate, initial_state, initial_key_sum;
  bool resets_right = true;
  for (size_t index = 0; index < call.states(); ++index) {
    size_t const s = index / heads, h = index % heads;
    auto const rows = [&](Error& error, Array<std::uint16_t>& actual, Layout const& layout,
                          size_t head, size_t width, Sum const& sum) {
      for (size_t i = 0; i < sum.value.size(); ++i) {
        size_t const at = layout.at(call.row(s), call.first_token(s) + i / width, head);
        error.add(decode(call.element, actual[at + i % width]), sum.value[i], sum.magnitude[i]);
      }
    };
    Gradients const& g = expected[index];
    for (size_t n = 0; n < group; ++n) {
      rows(query, results.query, query_layout, h * group + n, d, g.query[n]);
    }
    rows(key, results.key, key_layout, h, d, g.key);
    rows(value, results.value, value_layout, h, dv, g.value);
    for (size_t t = 0; c.gate != 0.0 && t < g.gate.value.size(); ++t) {
      double const actual = results.gate[gate_layout.at(call.row(s), call.first_token(s) + t, h)];
      gate.add(actual, g.gate.value[t], g.gate.magnitude[t]);
      // Nothing comes through a reset.
      resets_right = resets_right && (actual == 0.0 || call.inputs[index * group].gate[t] > -1e3f);
    }
    for (size_t i = 0; i < g.initial.state.value.size(); ++i) {
      initial_state.add(results.initial_state[index * D * dv + i], g.initial.state.value[i],
                        g.initial.state.magnitude[i]);
    }
    for (size_t i = 0; i < g.initial.key_sum.value.size(); ++i) {
      initial_key_sum.add(results.initial_key_sum[index * D + i], g.initial.key_sum.value[i],
                          g.initial.key_sum.magnitude[i]);
    }
  }
  double const u = retention::test::roundoff(call.element);
  struct Named {
    char const* name;
    Error const& error;
  };
  std::cout << c.name << ": " << to_string(configuration) << ": roundings (of the terms)";
  for (Named const& x : {Named{"query", query},
                         {"key", key},
                         {"value", value},
                         {"gate", gate},
                         {"initial state", initial_state},
                         {"initial key sum", initial_key_sum}}) {
    std::cout << ", " << x.name << ' ' << x.error.relative() / u << " (" << x.error.of_terms() / u
              << ')';
  }
  std::cout << '\n';
  // Scores' gradients, phi, states and the results are rounded once each. do . v and delta cancel
  // where one weight dominates, both fp32.
  for (Error const* x : {&query, &key, &value, &initial_state}) {
    RETENTION_CHECK(x->is_within(3 * u, 1e-6));
  }
  // Of few tokens, all of whose part has the error of delta = do . o, and o's roundings.
  RETENTION_CHECK(initial_key_sum.is_within(6 * u, 1e-6));
  // Of k . dk, q . dq and a state's product with its gradient, each of which cancels.
  RETENTION_CHECK(gate.of_terms() <= 0.1 * u);
  RETENTION_CHECK(resets_right);
}

#ifdef RETENTION_EMULATOR

/// Kernels, and memory, that serve no gradient that is wanted are not taken.
void run_nothing_in_vain(Configuration const& configuration) {
  bool const scaled = configuration.element == retention::ElementType::kFloat16;
  auto const check = [&](Case const& c, unsigned wanted, std::string expected) {
    Call call(configuration, c, 0);
    Results results(call);
    BackwardArguments a;
    a.forward = call.upload();
    a.d_final_state = a.forward.final_state;  // read by none of these kernels
    a.d_final_key_sum = a.forward.final_key_sum;
    results.upload(a, kAll);
    auto const all = retention::test::plan(a);
    results.upload(a, wanted);
    auto const plan = retention::test::plan(a);
    std::string kernels;
    auto const status = retention::test::record_kernels(plan, kernels);
    RETENTION_CHECK(static_cast<bool>(status));
    if (!scaled && expected.find('r') != std::string::npos) {
      expected.erase(expected.find('r'), 1);
    }
    RETENTION_CHECK_EQUAL(kernels, expected);
    RETENTION_CHECK(plan.workspace_bytes <= all.workspace_bytes);
    // Gates alone need both the states and their gradients, and what is summed for them.
    if (c.gate != 0.0 && (wanted & kGate) == 0) {
      RETENTION_CHECK(plan.workspace_bytes + all.d_states.bytes < all.workspace_bytes);
    }
  };
  Case const segments{"segments", {140}, 64, 64, false, 1, 2, -0.05, true, true};
  check(segments, kQuery, "sQ");
  check(segments, kKey, "rScK");
  check(segments, kValue, "rScV");
  check(segments, kGate, "srQScKpG");
  check(segments, kInitial, "rSc");
  check(segments, kQuery | kValue, "srQScV");
  check(segments, kKey | kInitial, "rScK");
  check(segments, kAll, "srQScVKpG");
  Case const chunks{"chunks", {140}, 64, 192, false, 1, 1, 0.0};
  check(chunks, kQuery, "sQ");
  check(chunks, kValue, "SV");
  check(chunks, kAll, "sQSVK");
  Case const one{"one chunk", {40}, 0, 0, false, 1, 1, -0.1};
  check(one, kQuery, "Q");
  check(one, kKey, "K");
  check(one, kValue, "V");
  check(one, kGate, "QKG");
}

#endif

void run_configuration(Configuration const& configuration, bool unchecked) {
  std::uint64_t seed = 0;
  // A state of many elements takes its time on the emulator, and gradients alone as much again:
  // those are of one element type there.
  bool const large =
      retention::state_dim(configuration.head_dim, 2) * configuration.value_dim > 50000;
  bool const alone = retention::test::kOnDevice ||
                     (!large && configuration.element == retention::ElementType::kFloat16);
  auto run = [&](Case const& c, std::vector<unsigned> const& parts = {}) {
    run_case(configuration, c, seed++, unchecked, alone ? parts : std::vector<unsigned>{});
  };
  // name, lengths, chunk, segment, packed, heads, group, gate, initial, final, strided, magnitudes
  run({"one chunk", {70}, 0, 0, false, 1, 1, -0.1}, {kQuery, kKey, kValue, kGate});
  run({"segments", {70}, 64, 64, false, 1, 2, -0.05, true, true, true},
      {kQuery, kKey, kValue, kGate, kInitial, kAll & ~kGate});
  run({"packed, one chunk", {70, 0, 33}, 0, 0, true, 2, 3, 0.0}, {kQuery | kValue, kKey});
  auto const with_resets = [](int every, Case c) {
    c.resets = every;
    c.aligned = true;  // as with strong gates: a query sees few keys
    return c;
  };
  Case padded{"packed, padded", {0, 30, 0, 70, 0}, 64, 0, true, 1, 2, -0.1};
  padded.lead = 37;
  padded.tail = 75;
  run(padded);
  Case empty{"packed, all empty", {0, 0, 0}, 64, 0, true, 1, 1, -0.1};
  empty.tail = 150;  // more than a chunk
  run(empty);
  // The widest heads have no kernels of their own for it.
  bool const in_parts = configuration.element == retention::ElementType::kBFloat16 &&
                        (retention::test::kOnDevice || configuration.head_dim < 128);
  auto const run_in_parts = [&](Case c) {
    c.parts = c.initial = c.final = true;
    run(c);
  };
  if (in_parts) {
    run_in_parts({"in parts", {140}, 64, 64, false, 1, 2, -0.05});
  }
  if (retention::test::kOnDevice || !large) {
    for (int i = 0; in_parts && i < 2; ++i) {  // with the workspace of forward, and without
      run_in_parts({"in parts, three segments", {140}, 64, 64, false, 1, 1, -0.05});
      run_in_parts({"in parts, one segment", {100}, 64, 0, false, 1, 1, -0.1});
      run_in_parts({"in parts, no gates", {100}, 64, 0, false, 1, 1, 0.0});
    }
    if (in_parts) {
      run_in_parts({"in parts, one chunk", {40, 40}, 0, 0, false, 1, 1, -0.1});
      Case packed{"in parts, packed", {0, 70, 0}, 64, 64, true, 1, 1, -0.1};
      packed.lead = 37;
      packed.tail = 75;
      run_in_parts(packed);
    }
    // Odd seeds keep the workspace of forward.
    run({"three segments", {140}, 64, 64, false, 1, 1, -0.05, true});
    padded.name = "packed, padded, strided, with states";
    padded.segment_tokens = 64;
    padded.initial = padded.final = padded.strided = true;
    run(padded);
    Case small{"small values", {100}, 64, 0, false, 2, 1, -0.2, false, true, false, 1, 1, 1e-3};
    small.aligned = true;
    run(small);
    run({"packed", {70, 0, 1}, 64, 64, true, 1, 1, -0.1, true, true},
        {kQuery, kKey, kValue, kGate, kInitial, kQuery | kGate, kKey | kValue});
    // The form of each by its own length.
    Case mixed{"packed, mixed", {0, 100, 101, 0, 64, 65, 1, 0}, 64, 64, true, 1, 2, -0.1};
    mixed.whole_until = 100;
    mixed.aligned = true;  // a query may see its own key alone
    mixed.tail = 20;
    run(mixed);
    run(mixed);
    mixed.name = "packed, mixed, initial states";
    mixed.lengths = {0, 100, 101, 1, 0};
    mixed.initial = true;
    run(mixed);
    mixed.name = "packed, mixed, final states";
    mixed.final = true;
    mixed.initial = false;
    run(mixed);
    mixed.name = "packed, mixed, with states";
    mixed.initial = true;
    run(mixed);
    mixed.name = "packed, mixed, no gates";
    mixed.gate = 0.0;
    run(mixed);
    run({"packed, among empty", retention::test::among_empty(70, 200), 64, 64, true, 1, 1, -0.1});
    auto const sequences = retention::test::one_token_each(retention::test::kOnDevice ? 250 : 90);
    Case single{"packed, one token each", sequences, 64, 0, true, 1, 1, -0.1};
    single.aligned = true;
    run(single);
    Case strong{"strong gates, strided", {90}, 64, 0, false, 1, 2, -60.0, true, true, true};
    strong.aligned = true;
    run(strong);
    run({"large keys", {100}, 64, 0, false, 1, 1, -0.1, false, true, false, 100.0, 1e3, 10.0});
    run({"one chunk, initial and final states", {40}, 0, 0, false, 1, 1, -0.1, true, true});
    // Gradients take the place of states unless those are kept.
    run({"no gates", {100}, 64, 0, false, 1, 1, 0.0, true},
        {kQuery, kKey, kValue, kInitial, kQuery | kKey, kQuery | kValue, kQuery | kInitial});
    run({"no gates, kept", {100}, 64, 0, false, 1, 1, 0.0, true}, {kQuery, kKey, kInitial});
    run(with_resets(41, {"a few resets", {150}, 64, 64, false, 1, 1, -0.05, true, true}));
    run(with_resets(2, {"resets", {210}, 192, 192, false, 1, 1, -0.2, false, true}));
    run(with_resets(3, {"resets, packed", {70, 0, 1}, 64, 64, true, 1, 2, -0.1, true, true}));
  }
  run(with_resets(3, {"resets, one chunk", {150}, 0, 0, false, 1, 2, -0.5}));
  // A host takes long for their references: the size that most models have must do.
  bool const usual = configuration.head_dim == 64 && configuration.value_dim == 64;
  if (retention::test::kOnDevice && usual && !unchecked) {
    run({"long", {1700}, 512, 0, false, 2, 2, -0.01, true, true});
    run({"long, one chunk", {1500}, 0, 0, false, 1, 1, -0.01});
    run({"long, packed", {1000, 0, 1, 63, 64, 65, 1500}, 256, 512, true, 2, 2, -0.02, true, true});
    run({"many sequences", std::vector<int>(100, 40), 64, 0, true, 2, 1, -0.02, false, true});
    run({"long, no gates", {1300}, 128, 0, false, 3, 1, 0.0, false, true, true});
    run({"many heads a group", {300}, 128, 0, false, 1, 16, -0.05});
    run(with_resets(3, {"long, resets", {1700}, 512, 0, false, 2, 2, -0.01, true, true}));
    run(with_resets(2, {"long, one chunk, resets", {1500}, 2048, 0, false, 1, 1, -0.01}));
  }
#ifdef RETENTION_EMULATOR
  run_nothing_in_vain(configuration);
#endif
}

}  // namespace

int main(int count, char** arguments) {
  return retention::test::run_configurations(count, arguments, run_configuration);
}
