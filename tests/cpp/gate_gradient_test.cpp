// Gradients of log gates on the emulator against float64 sums.

#include "retention/kernel/gate_gradient.hpp"

#include <algorithm>
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
using retention::kernel::GateGradient;
using retention::kernel::GateGradientSums;
using retention::kernel::GatePiece;
using retention::kernel::StateProduct;
using retention::kernel::TokenStride;
using std::size_t;

enum class Fill { kNormal, kCancelling, kNaN };

enum class Order {
  kTokensHeads,  // [b, t, h]
  kHeadsTokens,  // [b, h, t]
  kGaps,         // [b, t, h] with gaps between heads, tokens and rows
};

struct Case {
  char const* name;
  std::vector<int> lengths = {100};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  bool final = false;  // whether a final state has a gradient
  Fill fill = Fill::kNormal;
  Order in = Order::kTokensHeads;
  Order out = Order::kTokensHeads;
  int state_dim = 192;
  int value_dim = 8;
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

template <class Kernel>
bool launch(typename Kernel::Params const& params, std::uint64_t seed) {
  dim3 const grid = Kernel::grid(params);
  auto const report = emulator::launch<Kernel>(
      {{grid.x, grid.y, grid.z}, {Kernel::kThreads}, sizeof(typename Kernel::SharedStorage), seed},
      params);
  RETENTION_CHECK_EQUAL(report.text, std::string());
  return report.ok();
}

void run(Case const& c, std::uint64_t seed) {
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  auto const D = static_cast<size_t>(c.state_dim), dv = static_cast<size_t>(c.value_dim);
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
  GlobalArray<float> d_gate("d_gate", size_of(in_stride), true);
  GlobalArray<float> d_log_gate("d_log_gate", size_of(out_stride));
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
        float& x = d_gate[at(in_stride, s, t, h)];
        x = normal(rng);
        if (c.fill == Fill::kCancelling) {
          // Pairs far apart cancel but for a millionth: in fp32 little of the sums would be right.
          bool const late = 2 * t >= c.lengths[s];
          x = late ? -1e4f + 1e-2f * normal(rng) : 1e4f + 1e-2f * normal(rng);
        } else if (c.fill == Fill::kNaN && t == c.lengths[s] / 2 && h == 0) {
          x = std::numeric_limits<float>::quiet_NaN();
        }
      }
    }
  }
  size_t const items = sequences * heads;
  GlobalArray<float> state("state", items * D * dv, true);
  GlobalArray<float> state_gradient("state_gradient", items * D * dv, true);
  GlobalArray<float> key_sum("key_sum", items * D, true);
  GlobalArray<float> key_sum_gradient("key_sum_gradient", items * D, true);
  for (GlobalArray<float>* x : {&state, &state_gradient, &key_sum, &key_sum_gradient}) {
    for (float& y : *x) {
      y = normal(rng);
    }
  }

  retention::kernel::Sequences const where{c.packed ? cu_seqlens.data() : nullptr, tokens, 64,
                                           static_cast<int>(sequences)};
  auto const slots = static_cast<size_t>(where.segments(GatePiece::kTokens).num_slots());
  GlobalArray<double> products("products", items * size_t{StateProduct::kParts});
  GlobalArray<double> sums("sums", heads * slots);
  StateProduct::Params const product{state.data(),
                                     key_sum.data(),
                                     state_gradient.data(),
                                     key_sum_gradient.data(),
                                     products.data(),
                                     static_cast<int>(sequences),
                                     c.heads,
                                     c.state_dim,
                                     c.value_dim};
  GateGradientSums::Params const first{d_gate.data(), in_stride, sums.data(), where, c.heads};
  GateGradient::Params const second{d_gate.data(), d_log_gate.data(),
                                    in_stride,     out_stride,
                                    sums.data(),   c.final ? products.data() : nullptr,
                                    where,         c.heads};
  if ((c.final && !launch<StateProduct>(product, seed)) || !launch<GateGradientSums>(first, seed) ||
      !launch<GateGradient>(second, seed)) {
    return;
  }

  double worst = 0.0;
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      double sum = 0.0, magnitude = 0.0;
      auto add = [&](float x, float y) {
        sum += double{x} * double{y};
        magnitude += std::abs(double{x} * double{y});
      };
      if (c.final) {
        size_t const item = s * heads + h;
        for (size_t i = 0; i < D * dv; ++i) {
          add(state[item * D * dv + i], state_gradient[item * D * dv + i]);
        }
        for (size_t i = 0; i < D; ++i) {
          add(key_sum[item * D + i], key_sum_gradient[item * D + i]);
        }
      }
      bool right = true;
      for (int t = c.lengths[s] - 1; t >= 0; --t) {
        add(d_gate[at(in_stride, s, t, h)], 1.0f);
        float const actual = d_log_gate[at(out_stride, s, t, h)];
        if (std::isnan(sum)) {
          right = right && std::isnan(actual);
          continue;
        }
        // The rounding to fp32, and what two orders of summation in float64 may differ by.
        double const bound = 0x1p-24 * std::abs(sum) + 1e-13 * magnitude;
        double const error = std::abs(actual - sum);
        worst = std::max(worst, error == 0.0 ? 0.0 : error / bound);
        right = right && error <= bound;
      }
      RETENTION_CHECK(right);
    }
  }
  // Nothing but gradients has been written: the rest still reads as NaN.
  if (c.fill != Fill::kNaN) {
    size_t written = 0, expected = 0;
    for (float const x : d_log_gate) {
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
  run({"one tile", {128}}, seed++);
  run({"one token", {1}, false, 3}, seed++);
  run({"batch, eight heads", {200, 200, 200}, false, 8, true}, seed++);
  run({"eleven heads", {130}, false, 11, true}, seed++);
  run({"pieces", {1024, 1024}, false, 2}, seed++);
  run({"pieces, one token more", {2049}, false, 3, true}, seed++);
  run({"long", {50000}, false, 1, true}, seed++);
  run({"long, cancelling", {40000}, false, 2, false, Fill::kCancelling}, seed++);
  for (Order const in : {Order::kTokensHeads, Order::kHeadsTokens, Order::kGaps}) {
    for (Order const out : {Order::kTokensHeads, Order::kHeadsTokens, Order::kGaps}) {
      run({"strides", {1100, 1100}, false, 9, true, Fill::kNormal, in, out}, seed++);
    }
  }
  for (int const heads : {1, 3, 8}) {
    Case c{"packed", {65, 0, 1, 1530, 0, 0, 64, 7, 2100}, true, heads};
    run(c, seed++);
    c.final = true;
    c.in = Order::kHeadsTokens;
    run(c, seed++);
  }
  run({"packed, empty ends", {0, 0, 1400, 0}, true, 2, true}, seed++);
  run({"NaN", {1300, 1300}, false, 3, false, Fill::kNaN}, seed++);
  Case large{"large state", {70, 70}, false, 2, true};
  large.state_dim = 2304;
  large.value_dim = 64;
  run(large, seed++);
  return retention::test::finish();
}
