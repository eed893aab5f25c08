// Gradients of log gates on the emulator against float64 sums.

#include "retention/kernel/gate_gradient.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "element.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::kernel::GateGradient;
using retention::kernel::GateGradientSums;
using retention::kernel::GatePiece;
using retention::kernel::GatePieceSum;
using retention::kernel::StateProducts;
using retention::test::decode;
using retention::test::encode;
using retention::test::first_slot_of;
using retention::test::launch;
using retention::test::Order;
using retention::test::slot_of;
using std::size_t;

enum class Fill { kNormal, kCancelling, kNaN };

// Where there are states with gradients.
enum class States {
  kNone,
  kBetween,  // chunks
  kInitial,  // and before the first
  kFinal,    // and after the last
  kAll,
};

struct Case {
  char const* name;
  std::vector<int> lengths = {100};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  int chunk_size = 0;  // all of a sequence is one chunk
  States states = States::kNone;
  Fill fill = Fill::kNormal;
  Order in = Order::kTokensHeads;
  Order out = Order::kTokensHeads;
  int resets = 0;  // every so many tokens; 0 for none
  int state_dim = 192;
  int value_dim = 8;
};

template <class Element>
void run_case(Case const& c, std::uint64_t seed) {
  using Products = StateProducts<Element>;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  auto const D = static_cast<size_t>(c.state_dim), dv = static_cast<size_t>(c.value_dim);
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  auto const in_stride = layout.strides(c.in, heads);
  auto const out_stride = layout.strides(c.out, heads);
  GlobalArray<float> d_gate("d_gate", layout.size_of(in_stride, heads), true);
  GlobalArray<float> log_gate("log_gate", layout.size_of(out_stride, heads), true);
  GlobalArray<float> d_log_gate("d_log_gate", layout.size_of(out_stride, heads));
  for (size_t s = 0; s < sequences; ++s) {
    for (int t = 0; t < c.lengths[s]; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        float& x = d_gate[layout.at(in_stride, s, t, h)];
        x = normal(rng);
        auto const token = static_cast<size_t>(t) + 17 * h;
        log_gate[layout.at(out_stride, s, t, h)] =
            retention::test::with_resets(c.resets, token, -std::abs(normal(rng)));
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
  int const chunk_size =
      c.chunk_size != 0 ? c.chunk_size : (static_cast<int>(layout.tokens) / 64 + 1) * 64;
  auto const where = layout.in_chunks(chunk_size);
  auto const slots = static_cast<size_t>(where.num_slots());
  size_t const elements = D * dv, items = slots * heads;
  bool const has_states = c.states != States::kNone;
  bool const has_initial = c.states == States::kInitial || c.states == States::kAll;
  bool const has_final = c.states == States::kFinal || c.states == States::kAll;
  // NaN where there is no state before a chunk or no gradient after it.
  auto const states = [&](char const* name, size_t width) {
    return GlobalArray<std::uint16_t>(name, has_states ? items * width : 0);
  };
  auto state = states("states", elements), d_state = states("state_gradients", elements);
  auto key_sum = states("key_sums", D), d_key_sum = states("key_sum_gradients", D);
  GlobalArray<int> state_exponents("state_exponents", items), d_state_exponents("", items);
  GlobalArray<int> key_sum_exponents("key_sum_exponents", items), d_key_sum_exponents("", items);
  GlobalArray<float> state_d_gate("state_d_gate", d_gate.size());
  GlobalArray<CumulativeGate> gate("gate", d_gate.size());
  // What comes from after each chunk, and its terms' absolute values.
  struct After {
    double sum = 0.0, magnitude = 0.0, product = 0.0, product_magnitude = 0.0;
  };
  std::vector<After> after(items);
  constexpr bool kIsHalf = std::is_same_v<Element, cute::half_t>;
  retention::ElementType const element =
      kIsHalf ? retention::ElementType::kFloat16 : retention::ElementType::kBFloat16;
  // 16-bit numbers, stored as 2^-exponent of what they stand for.
  auto const fill = [&](GlobalArray<std::uint16_t>& x, GlobalArray<int>& exponents, size_t item,
                        size_t place, size_t width) {
    std::vector<double> values(width);
    int const exponent = kIsHalf ? static_cast<int>(rng() % 41) - 20 : 0;
    exponents[item] = exponent;
    for (size_t i = 0; i < width; ++i) {
      x[place * width + i] = encode(element, normal(rng));
      values[i] = std::ldexp(decode(element, x[place * width + i]), exponent);
    }
    return values;
  };
  for (size_t s = 0; has_states && s < sequences; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      for (int first = 0; first < c.lengths[s]; first += chunk_size) {
        int const end = std::min(first + chunk_size, c.lengths[s]);
        size_t const item =
            (first_slot_of(where, s) + static_cast<size_t>(first / chunk_size)) * heads + h;
        After& x = after[item];
        bool const has_gradient = has_final || end < c.lengths[s];
        for (int t = first; t < end; ++t) {
          float& term = state_d_gate[layout.at(in_stride, s, t, h)];
          term = has_gradient ? normal(rng) : 0.0f;
          x.sum += double{term};
          x.magnitude += std::abs(double{term});
        }
        // Where nothing is left of a state, it need not be finite.
        bool const forgets = rng() % 4 == 0;
        double const end_gate = forgets ? -1000.0 : -std::abs(normal(rng));
        gate[layout.at(in_stride, s, end - 1, h)] = CumulativeGate::from(end_gate);
        if (!has_gradient || !(has_initial || first > 0) || forgets) {
          continue;
        }
        double const decay = std::exp2(end_gate);
        auto const add = [&](std::vector<double> const& y, std::vector<double> const& z) {
          for (size_t i = 0; i < y.size(); ++i) {
            x.product += decay * y[i] * z[i];
            x.product_magnitude += std::abs(decay * y[i] * z[i]);
          }
        };
        auto const place = [&](retention::kernel::Slots which) {
          return slot_of(where, s, static_cast<size_t>(first / chunk_size), which) * heads + h;
        };
        size_t const at = place(retention::kernel::state_slots(has_initial));
        size_t const d_at = place(retention::kernel::gradient_slots(has_final));
        add(fill(state, state_exponents, item, at, elements),
            fill(d_state, d_state_exponents, item, d_at, elements));
        add(fill(key_sum, key_sum_exponents, item, at, D),
            fill(d_key_sum, d_key_sum_exponents, item, d_at, D));
      }
    }
  }

  bool const has_pieces = chunk_size > GatePiece::kTokens;
  GlobalArray<double> products("products", items * size_t{Products::kParts});
  GlobalArray<GatePieceSum> sums(
      "sums", has_pieces ? static_cast<size_t>(GatePiece::num_slots(where)) * heads : 0);
  typename Products::Params product{};
  auto const data = [](GlobalArray<std::uint16_t>& x) {
    return reinterpret_cast<Element const*>(x.data());
  };
  product.states = data(state);
  product.key_sums = data(key_sum);
  product.state_gradients = data(d_state);
  product.key_sum_gradients = data(d_key_sum);
  if (kIsHalf) {
    product.exponents = {nullptr, nullptr, state_exponents.data(), key_sum_exponents.data()};
    product.gradient_exponents.state = d_state_exponents.data();
    product.gradient_exponents.key_sum = d_key_sum_exponents.data();
  }
  product.gate = gate.data();
  product.gate_stride = in_stride;
  product.products = products.data();
  product.sequences = where;
  product.heads = c.heads;
  product.state_dim = c.state_dim;
  product.value_dim = c.value_dim;
  product.initial_states = has_initial;
  product.final_gradients = has_final;
  GateGradientSums::Params const first{d_gate.data(), log_gate.data(), in_stride, out_stride,
                                       sums.data(),   where,           c.heads};
  GateGradient::Params second{};
  second.d_gate = d_gate.data();
  second.log_gate = log_gate.data();
  second.d_log_gate = d_log_gate.data();
  second.d_gate_stride = in_stride;
  second.log_gate_stride = out_stride;
  second.d_log_gate_stride = out_stride;
  second.state_d_gate = has_states ? state_d_gate.data() : nullptr;
  second.sums = sums.data();
  second.products = has_states ? products.data() : nullptr;
  second.products_of_single_chunks = has_initial && has_final;
  second.sequences = where;
  second.heads = c.heads;
  if ((has_states && !launch<Products>(product, seed)) ||
      (has_pieces && !launch<GateGradientSums>(first, seed)) ||
      !launch<GateGradient>(second, seed)) {
    return;
  }

  double worst = 0.0;
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      double sum = 0.0, magnitude = 0.0, rounding = 0.0;
      bool right = true;
      for (int t = c.lengths[s] - 1; t >= 0; --t) {
        if (t + 1 == c.lengths[s] || (t + 1) % chunk_size == 0) {
          After const& given =
              after[(first_slot_of(where, s) + static_cast<size_t>(t / chunk_size)) * heads + h];
          sum = given.sum + given.product;
          magnitude = given.magnitude;
          // Sums of eight products in fp32, and the decay.
          rounding =
              0x1p-22 * given.product_magnitude / std::sqrt(static_cast<double>(elements) / 8.0) +
              0x1p-21 * std::abs(given.product);
        }
        double const x = double{d_gate[layout.at(in_stride, s, t, h)]};
        sum += x;
        magnitude += std::abs(x);
        float const actual = d_log_gate[layout.at(out_stride, s, t, h)];
        if (log_gate[layout.at(out_stride, s, t, h)] < -1e3f) {
          // From here on terms have nothing to do with gates before, and nothing comes through.
          sum = magnitude = rounding = 0.0;
          right = right && actual == 0.0f;
          continue;
        }
        if (std::isnan(sum)) {
          right = right && std::isnan(actual);
          continue;
        }
        // The rounding to fp32, and what two orders of summation in float64 may differ by.
        double const bound = 0x1p-24 * std::abs(sum) + 1e-13 * magnitude + rounding;
        double const error = std::abs(actual - sum);
        worst = std::max(worst, error == 0.0 ? 0.0 : error / bound);
        right = right && error <= bound;
      }
      RETENTION_CHECK(right);
    }
  }
  // Nothing but gradients has been written: the rest still reads as NaN.
  if (c.fill != Fill::kNaN) {
    RETENTION_CHECK_EQUAL(retention::test::written(d_log_gate), layout.starts.back() * heads);
  }
  std::cout << c.name << ", seed " << seed << ": worst error " << worst << " of its bound\n";
}

void run(Case const& c, std::uint64_t seed) {
  // Of a state alone the type is one of two; then one after the other.
  if (c.chunk_size != 0 && seed % 2 == 1) {
    run_case<cute::half_t>(c, seed);
  } else {
    run_case<cute::bfloat16_t>(c, seed);
  }
}

}  // namespace

RETENTION_TEST(gate_gradient) {
  std::uint64_t seed = 0;
  run({"one tile", {128}}, seed++);
  run({"one token", {1}, false, 3}, seed++);
  run({"one chunk, initial state", {100}, false, 2, 0, States::kInitial}, seed++);
  run({"batch, eight heads", {200, 200, 200}, false, 8, 64, States::kAll}, seed++);
  run({"eleven heads", {130}, false, 11, 128, States::kFinal}, seed++);
  run({"pieces", {1024, 1024}, false, 2}, seed++);
  run({"pieces, one token more", {2049}, false, 3, 0, States::kAll}, seed++);
  run({"chunks of pieces", {5200, 5200}, false, 2, 2112, States::kBetween}, seed++);
  run({"chunks of pieces, the last of one", {4230}, false, 1, 2112, States::kAll}, seed++);
  run({"chunks of one piece", {3000}, false, 2, 1024, States::kBetween}, seed++);
  run({"long, one chunk", {50000}, false, 1, 0, States::kFinal}, seed++);
  run({"long", {20000}, false, 1, 256, States::kAll}, seed++);
  run({"long, cancelling", {40000}, false, 2, 0, States::kNone, Fill::kCancelling}, seed++);
  for (Order const in : {Order::kTokensHeads, Order::kHeadsTokens, Order::kGaps}) {
    for (Order const out : {Order::kTokensHeads, Order::kHeadsTokens, Order::kGaps}) {
      run({"strides", {1100, 1100}, false, 9, 0, States::kFinal, Fill::kNormal, in, out}, seed++);
    }
  }
  for (int const heads : {1, 3, 8}) {
    Case c{"packed", {65, 0, 1, 1530, 0, 0, 64, 7, 2100}, true, heads};
    run(c, seed++);
    c.chunk_size = 128;
    c.states = States::kBetween;
    run(c, seed++);
    c.states = States::kAll;
    c.in = Order::kHeadsTokens;
    run(c, seed++);
  }
  for (int const resets : {2, 3, 41, 700, 2300}) {
    for (int const chunk_size : {64, 2112, 0}) {
      Case c{"resets", {5200}, false, 2, chunk_size, States::kAll, Fill::kCancelling};
      c.resets = resets;
      run(c, seed++);
    }
    Case c{"resets, NaN", {65, 0, 1, 1530}, true, 9, 0, States::kNone, Fill::kNaN};
    c.resets = resets;
    c.out = Order::kHeadsTokens;
    run(c, seed++);
  }
  run({"packed, empty ends", {0, 0, 1400, 0}, true, 2, 256, States::kInitial}, seed++);
  run({"NaN", {1300, 1300}, false, 3, 0, States::kNone, Fill::kNaN}, seed++);
  Case large{"large state", {70, 70}, false, 2, 64, States::kAll};
  large.state_dim = 2304;
  large.value_dim = 64;
  run(large, seed++);
}
