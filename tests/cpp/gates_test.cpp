// Cumulative log gates on the emulator against float64 sums.

#include "retention/kernel/gates.hpp"

#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "emulator/emulator.hpp"

namespace {

using emulator::GlobalArray;
using retention::kernel::Gates;
using retention::kernel::TokenStride;
using std::size_t;

enum class Fill { kMild, kSixty, kInfinite, kPositive, kOne, kNaN };

enum class Order {
  kTokensHeads,  // [b, t, h]
  kHeadsTokens,  // [b, h, t]
  kGaps,         // [b, t, h] with gaps between heads, tokens and rows
};

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

TokenStride strides(Order order, std::int64_t tokens, std::int64_t heads) {
  switch (order) {
    case Order::kTokensHeads:
      return {tokens * heads, heads, 1};
    case Order::kHeadsTokens:
      return {heads * tokens, 1, tokens};
    case Order::kGaps:
      break;
  }
  return {tokens * (3 * heads + 2) + 5, 3 * heads + 2, 3};
}

float draw(Fill fill, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  float const mild = -0.05f * std::abs(normal(rng));
  switch (fill) {
    case Fill::kMild:
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
  std::vector<int> starts = {0};
  int longest = 0;
  for (int const length : c.lengths) {
    starts.push_back(starts.back() + length);
    longest = std::max(longest, length);
  }
  size_t const batch = c.packed ? 1 : sequences;
  int const tokens = c.packed ? starts.back() : longest;
  auto const in_stride = strides(c.in, tokens, c.heads);
  auto const out_stride = strides(c.out, tokens, c.heads);
  auto size_of = [&](TokenStride const& stride) {
    return static_cast<size_t>(stride.batch) * (batch - 1) +
           static_cast<size_t>(stride.token) * static_cast<size_t>(tokens - 1) +
           static_cast<size_t>(stride.head) * (heads - 1) + 1;
  };
  GlobalArray<float> log_gate("log_gate", size_of(in_stride), true);
  GlobalArray<float> gate("gate", size_of(out_stride));
  GlobalArray<int> cu_seqlens("cu_seqlens", sequences + 1, true);
  std::copy(starts.begin(), starts.end(), cu_seqlens.begin());
  auto at = [&](TokenStride const& stride, size_t s, int t, size_t h) {
    size_t const row = c.packed ? 0 : s;
    int const token = c.packed ? starts[s] + t : t;
    return row * static_cast<size_t>(stride.batch) +
           static_cast<size_t>(token) * static_cast<size_t>(stride.token) +
           h * static_cast<size_t>(stride.head);
  };
  for (size_t s = 0; s < sequences; ++s) {
    for (int t = 0; t < c.lengths[s]; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        log_gate[at(in_stride, s, t, h)] = draw(c.fill, rng);
      }
    }
    if (c.fill == Fill::kNaN) {
      log_gate[at(in_stride, s, c.lengths[s] / 2, 0)] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  Gates::Params const params{
      log_gate.data(),
      gate.data(),
      in_stride,
      out_stride,
      {c.packed ? cu_seqlens.data() : nullptr, tokens, c.chunk_size, static_cast<int>(sequences)},
      c.heads};
  dim3 const grid = Gates::grid(params);
  auto const report = emulator::launch<Gates>(
      {{grid.x, grid.y, grid.z}, {Gates::kThreads}, sizeof(Gates::SharedStorage), seed}, params);
  RETENTION_CHECK_EQUAL(report.text, std::string());
  if (!report.ok()) {
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
        double const x = double{log_gate[at(in_stride, s, t, h)]};
        sum += x < -200.0 ? -200.0 : x;
        magnitude += std::abs(x < -200.0 ? -200.0 : x);
        float const actual = gate[at(out_stride, s, t, h)];
        if (std::isnan(sum)) {
          right = right && std::isnan(actual);
          continue;
        }
        // The rounding to fp32, and what two orders of summation in float64 may differ by.
        double const bound = 0x1p-24 * std::abs(sum) + 1e-12 * magnitude;
        double const error = std::abs(actual - sum);
        worst = std::max(worst, error == 0.0 ? 0.0 : error / bound);
        right = right && error <= bound;
      }
      RETENTION_CHECK(right);
    }
  }
  // Nothing but gates has been written: the rest still reads as NaN.
  if (c.fill != Fill::kNaN) {
    size_t written = 0, expected = 0;
    for (float const x : gate) {
      written += !std::isnan(x);
    }
    for (int const length : c.lengths) {
      expected += static_cast<size_t>(length) * heads;
    }
    RETENTION_CHECK_EQUAL(written, expected);
  }
  std::cout << c.name << ", seed " << seed << ": worst error " << worst << " of its bound\n";
}

}  // namespace

int main() {
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
  run({"positive", 64, {150}, false, 3, Fill::kPositive}, seed++);
  run({"NaN", 64, {300}, false, 3, Fill::kNaN}, seed++);
  return retention::test::finish();
}
