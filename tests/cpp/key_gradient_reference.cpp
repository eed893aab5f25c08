#include "key_gradient_reference.hpp"

#include <cfloat>
#include <cmath>

#include "decays.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::test {

namespace {

using std::size_t;

double dot(double const* x, double const* y, size_t n) {
  double sum = 0.0;
  for (size_t i = 0; i < n; ++i) {
    sum += x[i] * y[i];
  }
  return sum;
}

/// Calls visit(row of the state, first factor, second factor).
template <class Visit>
void for_each_state_row(int head_dim, Visit visit) {
  auto const rows = static_cast<size_t>(state_dim(head_dim, 2));
  for (size_t m = 0; m < rows; ++m) {
    auto const row = static_cast<std::int64_t>(m);
    visit(m, static_cast<size_t>(row_factor(row, 0, head_dim, 2)),
          static_cast<size_t>(row_factor(row, 1, head_dim, 2)));
  }
}

}  // namespace

QueryRows query_rows(KeyGradientInputs const& inputs) {
  auto const d = static_cast<size_t>(inputs.head_dim), dv = static_cast<size_t>(inputs.value_dim);
  auto const tokens = static_cast<size_t>(inputs.tokens);
  auto const count = static_cast<size_t>(inputs.group) * tokens;
  QueryRows rows{std::vector<double>(count), std::vector<double>(count),
                 std::vector<double>(count)};
  Decays const decays(inputs.gate, tokens);
  for (size_t row = 0; row < count; ++row) {
    size_t const i = row % tokens;
    double sum = 0.0, product = 0.0;
    for (size_t j = 0; j <= i; ++j) {
      double const score = dot(&inputs.query[row * d], &inputs.key[j * d], d);
      double const weight = score * score * decays.between(j, i);
      sum += weight;
      product += weight * dot(&inputs.d_output[row * dv], &inputs.value[j * dv], dv);
    }
    rows.normalizer[row] = sum;
    rows.inverse[row] = sum > FLT_MIN ? 1.0 / sum : 0.0;
    rows.delta[row] = product * rows.inverse[row];
  }
  return rows;
}

KeyGradients key_gradients(KeyGradientInputs const& inputs, QueryRows const& rows, int chunk_size) {
  auto const d = static_cast<size_t>(inputs.head_dim), dv = static_cast<size_t>(inputs.value_dim);
  auto const tokens = static_cast<size_t>(inputs.tokens);
  KeyGradients gradients{std::vector<double>(tokens * d), std::vector<double>(tokens * d),
                         std::vector<double>(tokens * dv), std::vector<double>(tokens),
                         std::vector<double>(tokens)};
  auto const c = static_cast<size_t>(chunk_size);
  Decays const decays(inputs.gate, tokens);
  for (size_t j = 0; j < tokens; ++j) {
    std::vector<double> from_state(d);
    double const* key = &inputs.key[j * d];
    double const* value = &inputs.value[j * dv];
    double* d_key = &gradients.d_key[j * d];
    double* magnitude = &gradients.d_key_magnitude[j * d];
    double* d_value = &gradients.d_value[j * dv];
    for (size_t row = 0; row < rows.inverse.size(); ++row) {
      size_t const i = row % tokens;
      if (i < j) {
        continue;
      }
      double const* query = &inputs.query[row * d];
      double const* d_output = &inputs.d_output[row * dv];
      double const score = dot(query, key, d);
      double const factor = score * decays.between(j, i) * rows.inverse[row];
      double const product = dot(d_output, value, dv), delta = rows.delta[row];
      for (size_t e = 0; e < d; ++e) {
        double const d_product = 2.0 * factor * query[e];
        d_key[e] += d_product * (product - delta);
        from_state[e] += i / c > j / c ? d_product * (product - delta) : 0.0;
        magnitude[e] += std::abs(d_product) * (std::abs(product) + std::abs(delta));
      }
      for (size_t e = 0; e < dv; ++e) {
        d_value[e] += score * factor * d_output[e];
      }
    }
    if (!inputs.d_final_state.empty()) {
      double const decay = decays.between(j, tokens - 1);
      for_each_state_row(inputs.head_dim, [&](size_t m, size_t first, size_t second) {
        double const factor = decay * static_cast<double>(row_multiplicity(
                                          static_cast<std::int64_t>(m), inputs.head_dim, 2));
        double const* state = &inputs.d_final_state[m * dv];
        double const d_phi = factor * (dot(state, value, dv) + inputs.d_final_key_sum[m]);
        for (double* sum : {d_key, from_state.data()}) {
          sum[first] += d_phi * key[second];
          sum[second] += d_phi * key[first];
        }
        double const phi = factor * key[first] * key[second];
        for (size_t e = 0; e < dv; ++e) {
          d_value[e] += phi * state[e];
        }
      });
    }
    gradients.state_gate[j] = 0.5 * dot(key, from_state.data(), d);
    gradients.state_gate_size[j] =
        0.5 * std::sqrt(dot(key, key, d) * dot(from_state.data(), from_state.data(), d));
  }
  return gradients;
}

std::vector<StateGradient> state_gradients(KeyGradientInputs const& inputs, QueryRows const& rows,
                                           int chunk_size) {
  auto const d = static_cast<size_t>(inputs.head_dim), dv = static_cast<size_t>(inputs.value_dim);
  auto const tokens = static_cast<size_t>(inputs.tokens), c = static_cast<size_t>(chunk_size);
  auto const state_rows = static_cast<size_t>(state_dim(inputs.head_dim, 2));
  Decays const decays(inputs.gate, tokens);
  StateGradient running{inputs.d_final_state, inputs.d_final_key_sum};
  running.state.resize(state_rows * dv);
  running.key_sum.resize(state_rows);
  std::vector<StateGradient> gradients((tokens + c - 1) / c);
  for (size_t chunk = gradients.size(); chunk-- > 0;) {
    gradients[chunk] = running;
    if (chunk == 0) {
      break;
    }
    size_t const start = chunk * c, end = std::min(start + c, tokens);
    double const decay = decays.over(start, end - 1);
    for_each_state_row(inputs.head_dim, [&](size_t m, size_t first, size_t second) {
      double* state = &running.state[m * dv];
      for (size_t e = 0; e < dv; ++e) {
        state[e] *= decay;
      }
      running.key_sum[m] *= decay;
      for (size_t n = 0; n < static_cast<size_t>(inputs.group); ++n) {
        for (size_t i = start; i < end; ++i) {
          size_t const row = n * tokens + i;
          double const* query = &inputs.query[row * d];
          double const factor =
              decays.over(start, i) * rows.inverse[row] * query[first] * query[second];
          running.key_sum[m] -= factor * rows.delta[row];
          for (size_t e = 0; e < dv; ++e) {
            state[e] += factor * inputs.d_output[row * dv + e];
          }
        }
      }
    });
  }
  return gradients;
}

}  // namespace retention::test
