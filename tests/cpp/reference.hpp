// The definition of power retention of degree 2 as float64 loops, for one sequence and one head.
// Beside every sum stands the sum of the magnitudes of its terms: rounding errors are relative to
// that, not to a sum in which terms may cancel.

#pragma once

#include <vector>

#include "retention/configuration.hpp"

namespace retention::test {

struct Sum {
  std::vector<double> value;
  std::vector<double> magnitude;

  Sum() = default;
  explicit Sum(std::size_t n) : value(n, 0.0), magnitude(n, 0.0) {}
};

struct State {
  Sum state;    // [D, dv]
  Sum key_sum;  // [D]
};

struct Inputs {
  int tokens = 0;
  int head_dim = 0;
  int value_dim = 0;
  std::vector<float> query;  // [t, d]
  std::vector<float> key;    // [t, d]
  std::vector<float> value;  // [t, dv]
  std::vector<float> gate;   // [t] log gates; empty for none
};

/// The state before each chunk, and, last, the one after all of them.
std::vector<State> chunk_states(Inputs const& inputs, State initial, int chunk_size);

/// What the gradient of a state is made of: the queries of a key head, by token and head of the
/// group.
struct GradientInputs {
  int tokens = 0;
  int group = 0;
  int head_dim = 0;
  int value_dim = 0;
  std::vector<float> query;       // [t, group, d]
  std::vector<float> d_output;    // [t, group, dv]
  std::vector<float> weight;      // [t, group]
  std::vector<float> delta;       // [t, group]
  std::vector<float> chunk_gate;  // [chunks] log gate of a whole chunk; empty for none
};

/// A part of a state: some rows, and neighbouring columns.
struct StatePart {
  std::vector<int> rows;
  int first_column = 0;
  int columns = 0;
};

/// A part of the gradient of the state before each chunk, and, last, of the one after all of them,
/// which is `final`: [rows, columns] and [rows]. Without multiplicity.
std::vector<State> state_gradients(GradientInputs const& inputs, State final, int chunk_size,
                                   StatePart const& part);

struct Output {
  std::vector<double> output;      // [t, dv]: sum_j w_ij v_j / sum_j w_ij
  std::vector<double> normalizer;  // [t]: sum_j w_ij
  std::vector<double> magnitude;   // [t]: of all its terms, as a state has them: they may cancel
};

/// Attends to the tokens up to each query and to the initial state (empty for none).
Output attend(Inputs const& inputs, State const& initial, double scale);

/// The plain formula with every result rounded to the element type, as a framework without kernels
/// computes it: the yardstick of errors. [t, dv]
std::vector<double> plain_formula(ElementType element, Inputs const& in, State const& initial);

/// Of one key head and the query heads that share it.
struct Gradients {
  std::vector<Sum> query;  // [t, d] of each query head
  Sum key;                 // [t, d]
  Sum value;               // [t, dv]
  Sum gate;                // [t]
  State initial;           // empty without an initial state
};

/// The gradients of sum(output * d_output), with `queries[n]` and `d_outputs[n]` [t, dv] those of
/// query head n, plus those of <state, d_final> (empty for none).
Gradients attend_gradient(std::vector<Inputs> const& queries, State const& initial,
                          std::vector<std::vector<float>> const& d_outputs, State const& d_final);

}  // namespace retention::test
