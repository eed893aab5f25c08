#include "reference.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

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
      auto add = [&](Sum& sum, size_t i, double term) {
        sum.value[i] = decay * sum.value[i] + term;
        sum.magnitude[i] = decay * sum.magnitude[i] + std::abs(term);
      };
      add(running.key_sum, m, phi);
      for (size_t e = 0; e < dv; ++e) {
        add(running.state, m * dv + e, phi * value[e]);
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

}  // namespace retention::test
