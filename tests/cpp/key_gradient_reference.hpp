// The gradients of keys and values as float64 loops, for one sequence and one key head.

#pragma once

#include <cstddef>
#include <vector>

namespace retention::test {

struct KeyGradientInputs {
  int tokens = 0;
  int head_dim = 0;
  int value_dim = 0;
  int group = 1;
  std::vector<double> query;     // [group, t, d]
  std::vector<double> key;       // [t, d]
  std::vector<double> value;     // [t, dv]
  std::vector<double> d_output;  // [group, t, dv]
  std::vector<double> gate;      // [t] log gates; empty for none
  // Of the final state. Empty for none.
  std::vector<double> d_final_state;    // [D, dv]
  std::vector<double> d_final_key_sum;  // [D]
};

/// Of each query. One whose weights sum to no more than the least normal float has none, and no
/// gradient.
struct QueryRows {
  std::vector<double> normalizer;  // [group, t] sum of weights
  std::vector<double> inverse;     // [group, t] of that, or 0
  std::vector<double> delta;       // [group, t] do . o
};

QueryRows query_rows(KeyGradientInputs const& inputs);

struct KeyGradients {
  std::vector<double> d_key;            // [t, d]
  std::vector<double> d_key_magnitude;  // [t, d] of its terms, before do . v - delta
  std::vector<double> d_value;          // [t, dv]
  // k . dk / 2 of what comes from after the key's chunk, and |k| |dk| / 2.
  std::vector<double> state_gate;       // [t]
  std::vector<double> state_gate_size;  // [t]
};

KeyGradients key_gradients(KeyGradientInputs const& inputs, QueryRows const& rows, int chunk_size);

struct StateGradient {
  std::vector<double> state;    // [D, dv]
  std::vector<double> key_sum;  // [D]
};

/// After each chunk, without multiplicity.
std::vector<StateGradient> state_gradients(KeyGradientInputs const& inputs, QueryRows const& rows,
                                           int chunk_size);

}  // namespace retention::test
