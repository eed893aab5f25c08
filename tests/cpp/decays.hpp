// Log gates of any size, down to -inf, and what they leave from one token to another.

#pragma once

#include <cmath>
#include <cstddef>
#include <iterator>
#include <limits>
#include <vector>

namespace retention::test {

/// The log gate of token t where every `every`-th one forgets what came before it, as users write
/// that, in one way after the other; `otherwise` that of the others, and of all of them for 0.
inline float with_resets(int every, std::size_t t, float otherwise) {
  constexpr float kResets[] = {-1e4f, -1e6f, -1e9f, std::numeric_limits<float>::lowest(),
                               -std::numeric_limits<float>::infinity()};
  auto const step = static_cast<std::size_t>(every);
  return every == 0 || t % step != step - 1 ? otherwise : kResets[t / step % std::size(kResets)];
}

/// exp of the sum of the log gates between tokens. A difference of sums since the first token would
/// have the rounding errors of all gates before, and be NaN where those are infinite.
class Decays {
 public:
  /// All 0 where `log_gates` is empty.
  template <class T>
  Decays(std::vector<T> const& log_gates, std::size_t tokens)
      : resets_(tokens + 1, 0), sums_(tokens + 1, 0.0) {
    for (std::size_t t = 0; t < tokens; ++t) {
      double const log_gate = log_gates.empty() ? 0.0 : static_cast<double>(log_gates[t]);
      bool const is_reset = log_gate < -1e3;  // whose exp is 0
      resets_[t + 1] = resets_[t] + is_reset;
      sums_[t + 1] = is_reset ? 0.0 : sums_[t] + log_gate;
    }
  }

  /// From what was there before token `from` to token `to`, the gates of both included.
  double over(std::size_t from, std::size_t to) const {
    return resets_[from] != resets_[to + 1] ? 0.0 : std::exp(sums_[to + 1] - sums_[from]);
  }
  /// From token j to token i.
  double between(std::size_t j, std::size_t i) const { return over(j + 1, i); }

 private:
  std::vector<int> resets_;   // before each token
  std::vector<double> sums_;  // since the last of them
};

}  // namespace retention::test
