// The rows that gradients are made of, on the emulator against float64 loops.

#include "retention/kernel/gradient_rows.hpp"

#include <algorithm>
#include <cfloat>
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
using retention::kernel::GradientRange;
using retention::test::exponent_of;
using retention::test::first_slot_of;
using retention::test::Order;
using retention::test::saturated;
using retention::test::SequenceLayout;
using retention::test::written;
using std::size_t;

struct Case {
  char const* name;
  std::vector<int> lengths = {100};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  int group = 1;
  float log_gate = -0.1f;    // cumulative gates fall by this at most a token; 0 for none
  bool strided = false;      // heads before tokens, and gaps between the rows
  float query_scale = 1.0f;  // of row i, times 4^(i % 5 - 2)
  bool zeros = false;        // some queries are zero
  bool weightless = false;   // some normalisers are at most FLT_MIN
  bool not_finite = false;   // a d_output and a normaliser
  int resets = 0;            // every so many tokens; 0 for none
  float normalizer = 1.0f;   // magnitude
  float value_scale = 1.0f;
};

template <class Element, int HeadDim, int ValueDim>
void run(Case const& c, std::uint64_t seed) {
  using Kernel = retention::kernel::GradientRows<
      retention::kernel::GradientRowsTraits<Element, HeadDim, ValueDim>>;
  constexpr bool kIsHalf = std::is_same_v<Element, cute::half_t>;
  constexpr int kExponent = kIsHalf ? 7 : 0;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;

  size_t const d = HeadDim, dv = ValueDim;
  size_t const sequences = c.lengths.size();
  auto const heads = static_cast<size_t>(c.heads), group = static_cast<size_t>(c.group);
  SequenceLayout const layout(c.lengths, c.packed);

  typename Kernel::Params params{};
  params.query_stride = layout.strides(heads * group, d, c.strided);
  params.d_output_stride = layout.strides(heads * group, dv, c.strided);
  params.output_stride = layout.strides(heads * group, dv, c.strided);
  params.output_stride.batch += 16;  // a stride of its own
  params.normalizer_stride = layout.strides(heads * group, 1, c.strided);
  params.gate_stride = layout.strides(heads, 1, c.strided);
  params.prepared_query_stride = layout.strides(heads * group, d, c.strided);
  params.prepared_query_stride.batch += 8;
  params.row_stride = layout.strides(Order::kHeadsTokens, heads * group);
  GlobalArray<Element> query("query", layout.size_of(params.query_stride, heads * group, d), true);
  GlobalArray<Element> d_output("d_output",
                                layout.size_of(params.d_output_stride, heads * group, dv), true);
  size_t const output_size = layout.size_of(params.output_stride, heads * group, dv);
  GlobalArray<Element> output("output", output_size, true);
  GlobalArray<Element> residual("residual", output_size, true);
  GlobalArray<float> normalizer("normalizer",
                                layout.size_of(params.normalizer_stride, heads * group, 1), true);
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(params.gate_stride, heads, 1), true);
  GlobalArray<Element> prepared("prepared_query",
                                layout.size_of(params.prepared_query_stride, heads * group, d));
  size_t const rows = layout.size_of(params.row_stride, heads * group, 1);
  GlobalArray<float> inverse("inverse", rows), delta("delta", rows), weight("weight", rows),
      scale("scale", rows);
  params.query = query.data();
  params.d_output = d_output.data();
  params.output = output.data();
  params.residual = residual.data();
  params.normalizer = normalizer.data();
  params.gate = c.log_gate != 0.0f ? gate.data() : nullptr;
  params.prepared_query = prepared.data();
  params.inverse = inverse.data();
  params.delta = delta.data();
  params.weight = weight.data();
  params.scale = scale.data();
  params.sequences = layout.in_chunks(128);
  params.heads = c.heads;
  params.group = c.group;
  auto const tiles = params.tiles();
  GlobalArray<GradientRange> ranges("ranges", static_cast<size_t>(tiles.num_slots()) * heads);
  params.ranges = kIsHalf ? ranges.data() : nullptr;

  auto store = [&](Element& target, float x) {
    target = saturated<Element>(x);
    return float(target);
  };
  for (size_t s = 0; s < sequences; ++s) {
    std::vector<retention::test::GateSum> cumulative(heads);
    for (size_t t = 0; t < static_cast<size_t>(c.lengths[s]); ++t) {
      for (size_t h = 0; h < heads && c.log_gate != 0.0f; ++h) {
        float const log_gate = retention::test::with_resets(c.resets, t, c.log_gate * uniform(rng));
        gate[layout.at(params.gate_stride, s, t, h)] = cumulative[h].add(log_gate, t % 128 == 0);
      }
      for (size_t n = 0; n < heads * group; ++n) {
        float const magnitude =
            c.zeros && rng() % 4 == 0
                ? 0.0f
                : std::ldexp(c.query_scale, 2 * static_cast<int>((t + n) % 5) - 4);
        for (size_t i = 0; i < d; ++i) {
          store(query[layout.at(params.query_stride, s, t, n) + i], magnitude * normal(rng));
        }
        for (size_t e = 0; e < dv; ++e) {
          float const o = c.value_scale * normal(rng);
          float const rounded = store(output[layout.at(params.output_stride, s, t, n) + e], o);
          store(residual[layout.at(params.output_stride, s, t, n) + e], o - rounded);
          store(d_output[layout.at(params.d_output_stride, s, t, n) + e], normal(rng));
        }
        float& z = normalizer[layout.at(params.normalizer_stride, s, t, n)];
        z = c.normalizer * std::exp(3.0f * normal(rng));
        if (c.weightless && rng() % 2 == 0) {
          float const small[] = {0.0f, FLT_MIN, 0x1p-140f, std::nextafter(FLT_MIN, 1.0f)};
          z = small[rng() % 4];
        }
        if (c.not_finite && t == 10) {
          z = std::numeric_limits<float>::quiet_NaN();
        }
        if (c.not_finite && t == 20) {
          d_output[layout.at(params.d_output_stride, s, t, n) + 3] =
              Element(std::numeric_limits<float>::infinity());
        }
      }
    }
  }

  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }

  bool queries_right = true, numbers_right = true;
  // The same number, or one within `bound` of it.
  auto near = [](double actual, double expected, double bound) {
    return std::isnan(expected) ? std::isnan(actual)
                                : actual == expected || std::abs(actual - expected) <= bound;
  };
  double worst_delta = 0.0;
  size_t valid_rows = 0;
  struct Range {
    double weight = 0.0, weight_delta = 0.0, state = 0.0, key_sum = 0.0, gradient = 0.0,
           delta = 0.0;
  };
  std::vector<Range> expected_ranges(ranges.size());
  std::vector<bool> used(ranges.size(), false);
  for (size_t s = 0; s < sequences; ++s) {
    size_t const first_slot = first_slot_of(tiles, s);
    for (size_t t = 0; t < static_cast<size_t>(c.lengths[s]); ++t) {
      for (size_t n = 0; n < heads * group; ++n) {
        ++valid_rows;
        Element const* q = &query[layout.at(params.query_stride, s, t, n)];
        Element const* qs = &prepared[layout.at(params.prepared_query_stride, s, t, n)];
        double largest = 0.0;
        for (size_t i = 0; i < d; ++i) {
          largest = std::max(largest, std::abs(double{float(q[i])}));
        }
        int const wanted = exponent_of(largest);
        int const e = kIsHalf ? std::clamp(wanted, -23, 16) : std::clamp(wanted, -126, 126);
        double const z = normalizer[layout.at(params.normalizer_stride, s, t, n)];
        bool const has_weight = !(z <= double{FLT_MIN});
        double rescaled_largest = 0.0;
        for (size_t i = 0; i < d; ++i) {
          double const expected = has_weight ? std::ldexp(double{float(q[i])}, kExponent - e) : 0.0;
          queries_right = queries_right && double{float(qs[i])} == expected;
          rescaled_largest = std::max(rescaled_largest, std::abs(expected));
        }
        if (has_weight && largest != 0.0 && e == wanted) {
          queries_right = queries_right && rescaled_largest < std::ldexp(1.0, kExponent) &&
                          rescaled_largest >= std::ldexp(1.0, kExponent - 1);
        }

        size_t const row = layout.at(params.row_stride, s, t, n);
        numbers_right = numbers_right &&
                        (largest == 0.0 || double{scale[row]} == std::ldexp(1.0, kExponent - e));
        double const x = has_weight ? std::ldexp(1.0 / z, -2 * kExponent) : 0.0;
        numbers_right = numbers_right && near(inverse[row], x, 0x1p-22 * x + 0x1p-149);
        double g = 0.0;
        if (c.log_gate != 0.0f) {
          CumulativeGate const& pair = gate[layout.at(params.gate_stride, s, t, n / group)];
          g = double{pair.high} + double{pair.low};
        }
        double const w = std::exp2(g) * x;
        // The exponential's argument is rounded; below the normal numbers it may be 0.
        numbers_right = numbers_right &&
                        near(weight[row], w, 0x1p-21 * (1 - g) * w + 0x1p-126 * std::max(1.0, x));
        double product = 0.0, magnitude = 0.0, norm = 0.0;
        for (size_t i = 0; i < dv; ++i) {
          double const gradient = float(d_output[layout.at(params.d_output_stride, s, t, n) + i]);
          size_t const o = layout.at(params.output_stride, s, t, n) + i;
          double const term = gradient * (double{float(output[o])} + double{float(residual[o])});
          product += term;
          magnitude += std::abs(term);
          norm += gradient * gradient;
        }
        product = has_weight ? product : 0.0;
        // fp32: an addition and its product round, as do sums of dv terms.
        double const bound = 0x1p-20 * magnitude;
        if (std::isfinite(product)) {
          worst_delta = std::max(worst_delta, std::abs(delta[row] - product) / bound);
          numbers_right = numbers_right && near(delta[row], product, bound);
        } else {
          numbers_right = numbers_right && !std::isfinite(delta[row]);
        }

        size_t const slot = (first_slot + t / 64) * heads + n / group;
        Range& r = expected_ranges[slot];
        used[slot] = true;
        double const finite_w = std::isfinite(w) ? w : 0.0;
        double const finite_x = std::isfinite(x) ? x : 0.0;
        double const finite_norm = std::isfinite(norm) ? std::sqrt(norm) : 0.0;
        double const finite_delta = std::isfinite(product) ? std::abs(product) : 0.0;
        double const phi = std::ldexp(1.0, 2 * kExponent);
        r.weight = std::max(r.weight, finite_w);
        r.weight_delta = std::max(r.weight_delta, finite_w * finite_delta);
        r.state += finite_w * phi * finite_norm;
        r.key_sum += finite_w * phi * finite_delta;
        r.gradient = std::max(r.gradient, std::sqrt(finite_x) * finite_norm);
        r.delta = std::max(r.delta, std::sqrt(finite_x) * finite_delta);
      }
    }
  }
  RETENTION_CHECK(queries_right);
  RETENTION_CHECK(numbers_right);
  // Nothing but the rows of tokens has been written: the rest still reads as NaN.
  RETENTION_CHECK_EQUAL(written(prepared), valid_rows * d);
  RETENTION_CHECK_EQUAL(written(scale), valid_rows);
  for (size_t i = 0; i < ranges.size() && kIsHalf; ++i) {
    if (!used[i]) {
      RETENTION_CHECK(std::isnan(ranges[i].weight));
      continue;
    }
    Range const& r = expected_ranges[i];
    auto close = [](double actual, double expected) {
      return expected > double{FLT_MAX}
                 ? actual >= double{FLT_MAX}
                 : std::abs(actual - expected) <= 0x1p-14 * expected + 0x1p-110;
    };
    RETENTION_CHECK(close(ranges[i].weight, r.weight) && close(ranges[i].state, r.state) &&
                    close(ranges[i].gradient, r.gradient));
    // Of delta, that is with the errors of cancellation.
    double const slack = 0x1p-12 * static_cast<double>(dv) * c.value_scale;
    RETENTION_CHECK(close(ranges[i].key_sum, r.key_sum) ||
                    std::abs(ranges[i].key_sum - r.key_sum) <= slack * r.state);
    RETENTION_CHECK(std::abs(ranges[i].delta - r.delta) <= slack * r.gradient);
    RETENTION_CHECK(close(ranges[i].weight_delta, r.weight_delta) ||
                    std::abs(ranges[i].weight_delta - r.weight_delta) <=
                        slack * static_cast<double>(dv) * r.weight);
  }
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << (kIsHalf ? ", fp16" : ", bf16")
            << ", seed " << seed << ": delta within " << worst_delta << " of its bound\n";
}

template <class Element, int HeadDim, int ValueDim>
void run_all_cases(std::uint64_t seed) {
  constexpr bool kIsHalf = std::is_same_v<Element, cute::half_t>;
  auto run_case = [&](char const* name, auto set) {
    Case c{name};
    set(c);
    run<Element, HeadDim, ValueDim>(c, seed++);
  };
  run_case("one tile", [](Case& c) { c.lengths = {64}; });
  run_case("batch, two heads", [](Case& c) { c.lengths = {150, 150}, c.heads = 2; });
  run_case("shared key heads, strided",
           [](Case& c) { c.lengths = {70, 70}, c.heads = 2, c.group = 3, c.strided = true; });
  run_case("packed, no gates", [](Case& c) {
    c.lengths = {0, 65, 0, 1, 130, 64, 0}, c.packed = true, c.heads = 2, c.log_gate = 0.0f;
  });
  run_case("packed, strided",
           [](Case& c) { c.lengths = {3, 0, 90}, c.packed = true, c.group = 2, c.strided = true; });
  run_case("zero rows", [](Case& c) { c.zeros = true; });
  run_case("rows without weight", [](Case& c) { c.weightless = true; });
  run_case("not finite", [](Case& c) { c.not_finite = true, c.lengths = {70}; });
  run_case("tiny queries",
           [](Case& c) { c.query_scale = kIsHalf ? 0x1p-22f : 0x1p-122f, c.normalizer = 1e-12f; });
  run_case("huge queries", [](Case& c) {
    c.query_scale = kIsHalf ? 3e4f : 1e38f, c.normalizer = 1e12f, c.value_scale = 100.0f;
  });
  run_case("steep gates", [](Case& c) { c.log_gate = -20.0f; });
  run_case("resets", [](Case& c) { c.resets = 41; });
  run_case("huge normalisers", [](Case& c) { c.normalizer = 0x1p+120f; });
}

}  // namespace

RETENTION_TEST(gradient_rows) {
  run_all_cases<cute::bfloat16_t, 64, 64>(0);
  run_all_cases<cute::half_t, 64, 64>(100);
  run_all_cases<cute::bfloat16_t, 32, 128>(200);
  run_all_cases<cute::half_t, 128, 32>(300);
}
