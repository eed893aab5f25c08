// What a main loop inside a chunk needs of the rows whose gradients it makes, beside the rows.

#pragma once

#include <cute/tensor.hpp>

#include "retention/detail/cumulative_gate.hpp"

namespace retention::collective {

/// In shared memory, of each row; the factors of rows that have no gradient are zero.
template <int Rows>
struct QueryFactors {
  /// r and -delta r.
  struct alignas(8) Factor {
    float scale;
    float shift;
  };

  detail::CumulativeGate gate[Rows];
  Factor factor[Rows];
  Factor early_factor[Rows];  // both times R, for keys before the row that R decays from
};

}  // namespace retention::collective
