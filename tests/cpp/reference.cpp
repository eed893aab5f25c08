#include "reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "decays.hpp"
#include "element.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::test {

namespace {

using std::size_t;

struct Row {
  size_t first, second;  // factors
  double multiplicity;
};

std::vector<Row> state_rows(int head_dim) {
  std::vector<Row> rows(static_cast<size_t>(state_dim(head_dim, 2)));
  for (size_t m = 0; m < rows.size(); ++m) {
    auto const row = static_cast<std::int64_t>(m);
    rows[m] = {static_cast<size_t>(row_factor(row, 0, head_dim, 2)),
               static_cast<size_t>(row_factor(row, 1, head_dim, 2)),
               static_cast<double>(row_multiplicity(row, head_dim, 2))};
  }
  return rows;
}

double gate_of(Inputs const& inputs, size_t t) {
  return inputs.gate.empty() ? 0.0 : static_cast<double>(inputs.gate[t]);
}

}  // namespace

std::vector<State> chunk_states(Inputs const& inputs, State running, int chunk_size) {
  auto const d = static_cast<size_t>(inputs.head_dim), dv = static_cast<size_t>(inputs.value_dim);
  auto const rows = state_rows(inputs.head_dim);
  if (running.state.value.empty()) {
    running = {Sum(rows.size() * dv), Sum(rows.size())};
  }
  std::vector<State> states;
  for (size_t t = 0; t < static_cast<size_t>(inputs.tokens); ++t) {
    if (t % static_cast<size_t>(chunk_size) == 0) {
      states.push_back(running);
    }
    double const decay = std::exp(gate_of(inputs, t));
    float const* key = inputs.key.data() + t * d;
    float const* value = inputs.value.data() + t * dv;
    for (size_t m = 0; m < rows.size(); ++m) {
      double const phi = rows[m].multiplicity * double{key[rows[m].first]} * key[rows[m].second];
      auto add = [&](double& sum, double& magnitude, double term) {
        sum = decay * sum + term;
        magnitude = decay * magnitude + std::abs(term);
      };
      add(running.key_sum.value[m], running.key_sum.magnitude[m], phi);
      double* const sums = running.state.value.data() + m * dv;
      double* const magnitudes = running.state.magnitude.data() + m * dv;
      for (size_t e = 0; e < dv; ++e) {
        add(sums[e], magnitudes[e], phi * value[e]);
      }
    }
  }
  states.push_back(running);
  return states;
}

std::vector<State> state_gradients(GradientInputs const& inputs, State running, int chunk_size,
                                   StatePart const& part) {
  auto const d = static_cast<size_t>(inputs.head_dim), dv = static_cast<size_t>(inputs.value_dim);
  auto const group = static_cast<size_t>(inputs.group), size = static_cast<size_t>(chunk_size);
  auto const tokens = static_cast<size_t>(inputs.tokens), chunks = (tokens + size - 1) / size;
  auto const columns = static_cast<size_t>(part.columns);
  auto const all_rows = state_rows(inputs.head_dim);
  std::vector<State> states(chunks + 1);
  states[chunks] = running;
  for (size_t chunk = chunks; chunk-- > 0;) {
    double const decay =
        inputs.chunk_gate.empty() ? 1.0 : std::exp(double{inputs.chunk_gate[chunk]});
    auto scale = [&](std::vector<double>& x) {
      for (double& element : x) {
        element *= decay;
      }
    };
    for (Sum* sum : {&running.state, &running.key_sum}) {
      scale(sum->value);
      scale(sum->magnitude);
    }
    for (size_t i = chunk * size * group; i < std::min((chunk + 1) * size, tokens) * group; ++i) {
      float const* query = inputs.query.data() + i * d;
      float const* d_output =
          inputs.d_output.data() + i * dv + static_cast<size_t>(part.first_column);
      for (size_t m = 0; m < part.rows.size(); ++m) {
        Row const& row = all_rows[static_cast<size_t>(part.rows[m])];
        double const phi = double{inputs.weight[i]} * query[row.first] * query[row.second];
        auto add = [](Sum& sum, size_t at, double term) {
          sum.value[at] += term;
          sum.magnitude[at] += std::abs(term);
        };
        add(running.key_sum, m, -phi * inputs.delta[i]);
        for (size_t e = 0; e < columns; ++e) {
          add(running.state, m * columns + e, phi * d_output[e]);
        }
      }
    }
    states[chunk] = running;
  }
  return states;
}

Output attend(Inputs const& inputs, State const& initial, double scale) {
  auto const d = static_cast<size_t>(inputs.head_dim), dv = static_cast<size_t>(inputs.value_dim);
  auto const tokens = static_cast<size_t>(inputs.tokens);
  auto const rows = state_rows(inputs.head_dim);
  Output out{std::vector<double>(tokens * dv, 0.0), std::vector<double>(tokens, 0.0),
             std::vector<double>(tokens, 0.0)};
  double total_gate = 0.0;
  for (size_t i = 0; i < tokens; ++i) {
    total_gate += gate_of(inputs, i);
    float const* query = inputs.query.data() + i * d;
    double* sum = out.output.data() + i * dv;
    double gate = 0.0;  // from j, exclusive, to i
    for (size_t j = i + 1; j-- > 0;) {
      double product = 0.0, magnitude = 0.0;
      for (size_t c = 0; c < d; ++c) {
        double const term = double{query[c]} * inputs.key[j * d + c];
        product += term;
        magnitude += std::abs(term);
      }
      double const weight = scale * product * scale * product * std::exp(gate);
      out.normalizer[i] += weight;
      out.magnitude[i] += scale * magnitude * scale * magnitude * std::exp(gate);
      for (size_t e = 0; e < dv; ++e) {
        sum[e] += weight * inputs.value[j * dv + e];
      }
      gate += gate_of(inputs, j);
    }
    if (!initial.state.value.empty()) {
      double const factor = scale * scale * std::exp(total_gate);
      for (size_t m = 0; m < rows.size(); ++m) {
        double const phi = factor * query[rows[m].first] * query[rows[m].second];
        out.normalizer[i] += phi * initial.key_sum.value[m];
        out.magnitude[i] += std::abs(phi * initial.key_sum.value[m]);
        for (size_t e = 0; e < dv; ++e) {
          sum[e] += phi * initial.state.value[m * dv + e];
        }
      }
    }
    for (size_t e = 0; e < dv; ++e) {
      // 0 / 0 is 0: a query that nothing attends to gives zero.
      sum[e] = out.normalizer[i] == 0.0 ? 0.0 : sum[e] / out.normalizer[i];
    }
  }
  return out;
}

namespace {

void add(Sum& sum, size_t i, double term) {
  sum.value[i] += term;
  sum.magnitude[i] += std::abs(term);
}

// dx += weight J(x)^T dphi, the Jacobian of phi with or without its multiplicities; `size` is that
// of dphi's own terms.
void add_through_phi(std::vector<Row> const& rows, float const* x, bool multiplicity,
                     std::vector<double> const& dphi, std::vector<double> const& size, Sum& dx,
                     size_t first) {
  for (size_t m = 0; m < rows.size(); ++m) {
    double const factor = multiplicity ? rows[m].multiplicity : 1.0;
    auto const add_one = [&](size_t to, size_t other) {
      dx.value[first + to] += factor * dphi[m] * x[other];
      dx.magnitude[first + to] += std::abs(factor * size[m] * x[other]);
    };
    add_one(rows[m].first, rows[m].second);
    add_one(rows[m].second, rows[m].first);
  }
}

}  // namespace

std::vector<double> plain_formula(ElementType element, Inputs const& in, State const& initial) {
  auto const d = static_cast<size_t>(in.head_dim), dv = static_cast<size_t>(in.value_dim);
  auto const D = initial.key_sum.value.size();
  auto const tokens = static_cast<size_t>(in.tokens);
  auto const rows = state_rows(in.head_dim);
  auto const round = [&](double x) { return rounded(element, x); };
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
        float const* const query = in.query.data() + i * d;
        double const phi = round(double{query[rows[m].first]} * query[rows[m].second]);
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

Gradients attend_gradient(std::vector<Inputs> const& queries, State const& initial,
                          std::vector<std::vector<float>> const& d_outputs, State const& d_final) {
  Inputs const& in = queries[0];
  auto const d = static_cast<size_t>(in.head_dim), dv = static_cast<size_t>(in.value_dim);
  auto const tokens = static_cast<size_t>(in.tokens);
  auto const rows = state_rows(in.head_dim);
  size_t const D = rows.size();
  bool const has_initial = !initial.state.value.empty();
  Gradients out{std::vector<Sum>(queries.size(), Sum(tokens * d)),
                Sum(tokens * d),
                Sum(tokens * dv),
                Sum(tokens),
                {}};
  if (has_initial) {
    out.initial = {Sum(D * dv), Sum(D)};
  }
  Decays const decays(in.gate, tokens);
  Sum d_total(tokens);
  std::vector<double> dphi(D), size(D);

  for (size_t n = 0; n < queries.size(); ++n) {
    auto const expected = attend(queries[n], initial, 1.0);
    for (size_t i = 0; i < tokens; ++i) {
      double const z = expected.normalizer[i];
      if (z == 0.0) {
        continue;
      }
      float const* query = queries[n].query.data() + i * d;
      float const* d_output = d_outputs[n].data() + i * dv;
      double delta = 0.0, delta_size = 0.0;
      for (size_t e = 0; e < dv; ++e) {
        delta += d_output[e] * expected.output[i * dv + e];
        delta_size += std::abs(d_output[e] * expected.output[i * dv + e]);
      }
      for (size_t j = 0; j <= i; ++j) {
        float const* key = in.key.data() + j * d;
        double score = 0.0, product = 0.0, product_size = 0.0;
        for (size_t c = 0; c < d; ++c) {
          score += double{query[c]} * key[c];
        }
        for (size_t e = 0; e < dv; ++e) {
          product += double{d_output[e]} * in.value[j * dv + e];
          product_size += std::abs(double{d_output[e]} * in.value[j * dv + e]);
        }
        double const decay = decays.between(j, i) / z;
        double const d_score = 2 * score * decay * (product - delta);
        double const d_score_size = 2 * std::abs(score) * decay * (product_size + delta_size);
        for (size_t c = 0; c < d; ++c) {
          out.query[n].value[i * d + c] += d_score * key[c];
          out.query[n].magnitude[i * d + c] += std::abs(d_score_size * key[c]);
          out.key.value[j * d + c] += d_score * query[c];
          out.key.magnitude[j * d + c] += std::abs(d_score_size * query[c]);
        }
        for (size_t e = 0; e < dv; ++e) {
          add(out.value, j * dv + e, score * score * decay * d_output[e]);
        }
        d_total.value[i] += score * d_score / 2;
        d_total.value[j] -= score * d_score / 2;
        d_total.magnitude[j] += std::abs(score * d_score_size / 2);
      }
      if (has_initial) {
        double const decay = decays.over(0, i) / z;
        double change = 0.0;
        for (size_t m = 0; m < D; ++m) {
          double const phi = double{query[rows[m].first]} * query[rows[m].second];
          double from_state = 0.0, from_size = 0.0;
          for (size_t e = 0; e < dv; ++e) {
            double const term = d_output[e] * initial.state.value[m * dv + e];
            from_state += term;
            from_size += std::abs(term);
            add(out.initial.state, m * dv + e, decay * phi * d_output[e]);
          }
          add(out.initial.key_sum, m, -decay * phi * delta);
          dphi[m] = decay * (from_state - delta * initial.key_sum.value[m]);
          size[m] = decay * (from_size + std::abs(delta * initial.key_sum.value[m]));
          change += phi * dphi[m];
        }
        add_through_phi(rows, query, false, dphi, size, out.query[n], i * d);
        d_total.value[i] += change;
      }
    }
  }
  if (!d_final.state.value.empty()) {
    double const whole = tokens == 0 ? 1.0 : decays.over(0, tokens - 1);
    double change = 0.0;  // of the last cumulative gate
    for (size_t j = 0; j < tokens; ++j) {
      float const* key = in.key.data() + j * d;
      double const decay = decays.between(j, tokens - 1);
      double own = 0.0;
      for (size_t m = 0; m < D; ++m) {
        double const phi = rows[m].multiplicity * double{key[rows[m].first]} * key[rows[m].second];
        double from_state = d_final.key_sum.value[m], from_size = std::abs(from_state);
        for (size_t e = 0; e < dv; ++e) {
          double const term = in.value[j * dv + e] * d_final.state.value[m * dv + e];
          from_state += term;
          from_size += std::abs(term);
          add(out.value, j * dv + e, decay * phi * d_final.state.value[m * dv + e]);
        }
        dphi[m] = decay * from_state;
        size[m] = decay * from_size;
        own += phi * dphi[m];
      }
      add_through_phi(rows, key, true, dphi, size, out.key, j * d);
      d_total.value[j] -= own;
      d_total.magnitude[j] += std::abs(own);
      change += own;
    }
    if (has_initial) {
      for (size_t m = 0; m < D; ++m) {
        add(out.initial.key_sum, m, whole * d_final.key_sum.value[m]);
        change += whole * d_final.key_sum.value[m] * initial.key_sum.value[m];
        for (size_t e = 0; e < dv; ++e) {
          double const term = whole * d_final.state.value[m * dv + e];
          add(out.initial.state, m * dv + e, term);
          change += term * initial.state.value[m * dv + e];
        }
      }
    }
    if (tokens > 0) {
      add(d_total, tokens - 1, change);
    }
  }
  for (size_t t = tokens; t-- > 0;) {
    bool const is_last = t + 1 == tokens;
    out.gate.value[t] = d_total.value[t] + (is_last ? 0.0 : out.gate.value[t + 1]);
    // Terms from before a gate that leaves nothing have nothing to do with those after it.
    out.gate.magnitude[t] = decays.over(t, t) == 0.0 ? 0.0
                            : is_last ? d_total.magnitude[t]
                                      : d_total.magnitude[t] + out.gate.magnitude[t + 1];
  }
  return out;
}

}  // namespace retention::test
