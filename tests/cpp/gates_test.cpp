// Cumulative log gates on the emulator against float64 sums.

#include "retention/kernel/gates.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::kernel::Gates;
using retention::test::Order;
using std::size_t;

enum class Fill { kMild, kSixty, kInfinite, kResets, kPositive, kOne, kNaN };

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {128};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  Fill fill = Fill::kMild;
  Order in = Order::kTokensHeads;
  Order out = Order::kTokensHeads;
};

float draw(Fill fill, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  float const mild = -0.05f * std::abs(normal(rng));
  switch (fill) {
    case Fill::kMild:
    case Fill::kResets:
    case Fill::kNaN:
      return mild;
    case Fill::kSixty:
      return -60.0f;
    case Fill::kInfinite:
      return rng() % 4 == 0 ? -std::numeric_limits<float>::infinity() : mild;
    case Fill::kPositive:
      return normal(rng);
    case Fill::kOne:
      break;
  }
  return -1.0f / 3.0f;  // rounding errors of equal terms add up
}

void run(Case const& c, std::uint64_t seed) {
  std::mt19937 rng(static_cast<unsigned>(seed));
  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  auto const in_stride = layout.strides(c.in, heads);
  auto const out_stride = layout.strides(c.out, heads);
  GlobalArray<float> log_gate("log_gate", layout.size_of(in_stride, heads), true);
  // Pairs, as floats: what has not been written reads as NaN.
  GlobalArray<float> gate("gate", 2 * layout.size_of(out_stride, heads));
  for (size_t s = 0; s < sequences; ++s) {
    for (int t = 0; t < c.lengths[s]; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        log_gate[layout.at(in_stride, s, t, h)] = retention::test::with_resets(
            c.fill == Fill::kResets ? 2 : 0, static_cast<size_t>(t), draw(c.fill, rng));
      }
    }
    if (c.fill == Fill::kNaN) {
      log_gate[layout.at(in_stride, s, c.lengths[s] / 2, 0)] =
          std::numeric_limits<float>::quiet_NaN();
    }
  }

  Gates::Params const params{log_gate.data(),
                             reinterpret_cast<CumulativeGate*>(gate.data()),
                             in_stride,
                             out_stride,
                             layout.in_chunks(c.chunk_size),
                             c.heads};
  if (!retention::test::launch<Gates>(params, seed)) {
    return;
  }

  double worst = 0.0;
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      double sum = 0.0, magnitude = 0.0;
      bool right = true;
      for (int t = 0; t < c.lengths[s]; ++t) {
        if (t % c.chunk_size == 0) {
          sum = magnitude = 0.0;
        }
        double const x = double{log_gate[layout.at(in_stride, s, t, h)]};
        double const log2_gate = std::max(x, -267.0) / std::log(2.0);
        sum += std::isnan(x) ? x : log2_gate;
        magnitude += std::abs(log2_gate);
        float const* const pair = gate.data() + 2 * layout.at(out_stride, s, t, h);
        if (std::isnan(sum)) {
          right = right && std::isnan(pair[0]) && std::isnan(pair[1]);
          continue;
        }
        // The upper part is the sum's rounding to fp32; the lower, half of its last place at most,
        // is rounded too. Two orders of summation in float64 may differ by a little.
        right = right && pair[0] == static_cast<float>(double{pair[0]} + pair[1]);
        double const bound = 0x1p-48 * std::abs(sum) + 1e-12 * magnitude;
        double const error = std::abs(double{pair[0]} + pair[1] - sum);
        worst = std::max(worst, error == 0.0 ? 0.0 : error / bound);
        right = right && error <= bound;
      }
      RETENTION_CHECK(right);
    }
  }
  // Nothing but gates has been written: the rest still reads as NaN.
  if (c.fill != Fill::kNaN) {
    RETENTION_CHECK_EQUAL(retention::test::written(gate), 2 * layout.starts.back() * heads);
  }
  std::cout << c.name << ", seed " << seed << ": worst error " << worst << " of its bound\n";
}

}  // namespace

RETENTION_TEST(gates) {
  std::uint64_t seed = 0;
  run({"one chunk", 64, {64}}, seed++);
  run({"one token", 64, {1}, false, 3}, seed++);
  run({"batch, eight heads", 64, {200, 200, 200}, false, 8}, seed++);
  run({"three heads, chunks of 192", 192, {500, 500}, false, 3}, seed++);
  run({"eleven heads", 64, {130}, false, 11}, seed++);
  run({"chunk longer than the sequence", 1024, {100}, false, 8}, seed++);
  run({"chunk longer than a tile", 640, {1500}, false, 3}, seed++);
  run({"one long chunk", 1 << 20, {20000}, false, 1, Fill::kOne}, seed++);
  run({"long chunk of three heads", 20000, {20000}, false, 3, Fill::kOne}, seed++);
  for (Order const in : {Order::kTokensHeads, Order::kHeadsTokens, Order::kGaps}) {
    for (Order const out : {Order::kTokensHeads, Order::kHeadsTokens, Order::kGaps}) {
      run({"strides", 300, {400, 400}, false, 9, Fill::kMild, in, out}, seed++);
    }
  }
  for (int const heads : {1, 3, 8}) {
    Case c{"packed", 64, {65, 0, 1, 130, 0, 0, 64, 7}, true, heads};
    run(c, seed++);
    c.out = Order::kHeadsTokens;
    run(c, seed++);
  }
  run({"packed, empty ends", 192, {0, 0, 400, 0}, true, 2}, seed++);
  run({"-60 each", 64, {150}, false, 3, Fill::kSixty}, seed++);
  run({"-inf", 64, {150}, false, 3, Fill::kInfinite}, seed++);
  run({"resets", 512, {700}, false, 3, Fill::kResets}, seed++);
  run({"positive", 64, {150}, false, 3, Fill::kPositive}, seed++);
  run({"NaN", 64, {300}, false, 3, Fill::kNaN}, seed++);
}
