// Joining segments on the emulator, in both directions, against one float64 recurrence over all
// chunks.

#include "retention/kernel/carry.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::kernel::Direction;
using retention::kernel::Slots;
using retention::test::first_slot_of;
using retention::test::kRoundoff;
using retention::test::Order;
using retention::test::slot_of;
using std::size_t;

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {640};  // one a sequence; rows of a batch unless `packed`
  int segment_chunks = 4;            // chunks in a segment
  bool packed = false;
  int heads = 1;
  float gate = 0.5f;  // magnitude of the log gate of a chunk; 0 for none, negative for positive
  bool initial = true;
  bool scaled = false;   // with exponents; fp16 only
  bool strided = false;  // heads before tokens, and gaps between the gates
  bool states = true;
  bool finals = true;
  bool infinite = false;  // some of what a segment hands on
  bool outer = false;     // something comes in from outside
};

template <class Element, Direction kDirection>
void run(Case const& c, std::uint64_t seed) {
  constexpr size_t kValueDim = 32;
  using Kernel =
      retention::kernel::Carry<retention::kernel::CarryTraits<Element, 32, kValueDim, kDirection>>;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  auto const segment_chunks = static_cast<size_t>(c.segment_chunks);
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  auto stride = layout.strides(Order::kTokensHeads, heads);
  if (c.strided) {
    stride = layout.strides(Order::kHeadsTokens, heads, 2);
    stride.batch += 3;
  }
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(stride, heads), true);
  auto const where = layout.in_chunks(c.chunk_size);
  auto const slots = static_cast<size_t>(where.num_slots());
  int const segment_tokens = c.segment_chunks * c.chunk_size;
  auto const segments = where.segments(segment_tokens);
  auto const items = static_cast<size_t>(segments.num_slots());
  GlobalArray<int> state_exponent("state_exponent", slots * heads, true);
  GlobalArray<int> sum_exponent("key_sum_exponent", slots * heads, true);

  // S [D, dv] and z [D] go through the same code: part 0 and part 1 of everything.
  struct Part {
    size_t size;
    GlobalArray<Element> states;
    GlobalArray<float> ends, result, outer;
    GlobalArray<int>* exponents;
    std::vector<std::vector<double>> expected, magnitude;  // [slot * heads + head]
    std::vector<std::vector<double>> expected_final, magnitude_final;
  };
  Part parts[2];
  for (int p = 0; p < 2; ++p) {
    Part& part = parts[p];
    part.size = p == 0 ? size_t{Kernel::kStateSize} : size_t{Kernel::kStateDim};
    part.states = GlobalArray<Element>(p == 0 ? "states" : "key_sums", slots * heads * part.size);
    part.ends = GlobalArray<float>(p == 0 ? "segment_state" : "segment_key_sum",
                                   items * heads * part.size, true);
    part.result = GlobalArray<float>(p == 0 ? "sequence_state" : "sequence_key_sum",
                                     sequences * heads * part.size);
    part.outer = GlobalArray<float>(p == 0 ? "outer_state" : "outer_key_sum",
                                    c.outer ? sequences * heads * part.size : 1, true);
    part.exponents = p == 0 ? &state_exponent : &sum_exponent;
    part.expected.resize(slots * heads);
    part.magnitude.resize(slots * heads);
    part.expected_final.resize(sequences * heads);
    part.magnitude_final.resize(sequences * heads);
  }

  for (size_t s = 0; s < sequences; ++s) {
    auto const chunks = static_cast<size_t>((c.lengths[s] + c.chunk_size - 1) / c.chunk_size);
    size_t const first_slot = first_slot_of(where, s);
    for (size_t h = 0; h < heads; ++h) {
      std::vector<double> decay(chunks, 1.0);
      for (size_t chunk = 0; chunk < chunks; ++chunk) {
        int const last = std::min(static_cast<int>(chunk + 1) * c.chunk_size, c.lengths[s]) - 1;
        float const g = -c.gate * (0.5f + 0.5f * std::abs(normal(rng)));
        gate[layout.at(stride, s, last, h)] =
            CumulativeGate::from(retention::detail::kLog2E * double{g});
        decay[chunk] = c.gate == 0.0f ? 1.0 : std::exp(double{g});
        for (Part& part : parts) {
          (*part.exponents)[(first_slot + chunk) * heads + h] =
              c.scaled ? static_cast<int>(rng() % 9) - 4 : 0;
        }
      }
      for (Part& part : parts) {
        std::vector<double> whole(part.size), magnitude(part.size), own(part.size);
        for (size_t i = 0; i < part.size; ++i) {
          whole[i] = own[i] = c.initial ? double{normal(rng)} : 0.0;
          magnitude[i] = std::abs(whole[i]);
          if (c.outer) {
            float& outer = part.outer[(s * heads + h) * part.size + i];
            outer = normal(rng);
            whole[i] += double{outer};
            magnitude[i] += std::abs(double{outer});
          }
        }
        auto store_end = [&](size_t segment) {
          auto const kept = c.finals                            ? Slots::kAll
                            : kDirection == Direction::kForward ? Slots::kButLast
                                                                : Slots::kButFirst;
          size_t const end = slot_of(segments, s, segment, kept) * heads + h;
          float* target = part.ends.data() + end * part.size;
          for (size_t i = 0; i < part.size; ++i) {
            target[i] = static_cast<float>(own[i]);
            own[i] = 0.0;
          }
        };
        size_t segment =
            kDirection == Direction::kForward || chunks == 0 ? 0 : (chunks - 1) / segment_chunks;
        for (size_t walked = 0; walked < chunks; ++walked) {
          size_t const chunk = kDirection == Direction::kForward ? walked : chunks - 1 - walked;
          if (chunk / segment_chunks != segment) {
            store_end(segment);
            segment = chunk / segment_chunks;
          }
          size_t const slot_head = (first_slot + chunk) * heads + h;
          part.expected[slot_head] = whole;
          part.magnitude[slot_head] = magnitude;
          size_t const next = kDirection == Direction::kForward ? chunk + 1 : chunk - 1;
          bool const ends_segment = next / segment_chunks != segment;
          for (size_t i = 0; i < part.size; ++i) {
            part.states[slot_head * part.size + i] =
                Element(static_cast<float>(std::ldexp(own[i], -(*part.exponents)[slot_head])));
            bool const infinite = c.infinite && ends_segment && i % 5 == 0;
            double const update = infinite ? INFINITY : double{normal(rng)};
            // Nothing is left of what decays to nothing, however large.
            auto decayed = [&](double x) { return decay[chunk] == 0.0 ? 0.0 : decay[chunk] * x; };
            own[i] = decayed(own[i]) + update;
            whole[i] = decayed(whole[i]) + update;
            magnitude[i] = decayed(magnitude[i]) + std::abs(update);
          }
        }
        if (c.finals) {
          store_end(segment);  // else the last one is not there: NaN
        }
        part.expected_final[s * heads + h] = whole;
        part.magnitude_final[s * heads + h] = magnitude;
      }
    }
  }

  typename Kernel::Params params{};
  params.states = c.states ? parts[0].states.data() : nullptr;
  params.key_sums = c.states ? parts[1].states.data() : nullptr;
  params.outer_state = c.outer ? parts[0].outer.data() : nullptr;
  params.outer_key_sum = c.outer ? parts[1].outer.data() : nullptr;
  params.segment_state = parts[0].ends.data();
  params.segment_key_sum = parts[1].ends.data();
  params.gate = c.gate == 0.0f ? nullptr : gate.data();
  params.gate_stride = stride;
  if (c.scaled) {
    params.state_exponents = state_exponent.data();
    params.key_sum_exponents = sum_exponent.data();
  }
  if (c.finals) {
    params.ends = {parts[0].result.data(), parts[1].result.data(), {}};
  }
  params.sequences = where;
  params.heads = c.heads;
  params.segment_tokens = segment_tokens;
  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }

  double const u = kRoundoff<Element>;
  double worst[2] = {};
  auto within = [&](double actual, double expected, double bound, double& at_worst) {
    double const error = actual == expected ? 0.0 : std::abs(actual - expected);
    at_worst = std::max(at_worst, error == 0.0 ? 0.0 : error / bound);
    return std::isinf(expected) ? error == 0.0 : error <= bound;  // false for NaN
  };
  for (Part& part : parts) {
    for (size_t s = 0; s < sequences; ++s) {
      int const chunks = (c.lengths[s] + c.chunk_size - 1) / c.chunk_size;
      size_t const first_slot = first_slot_of(where, s);
      for (size_t h = 0; h < heads; ++h) {
        for (size_t chunk = 0; c.states && chunk < static_cast<size_t>(chunks); ++chunk) {
          size_t const slot_head = (first_slot + chunk) * heads + h;
          bool right = true;
          for (size_t i = 0; i < part.size; ++i) {
            double const actual = std::ldexp(double{float(part.states[slot_head * part.size + i])},
                                             (*part.exponents)[slot_head]);
            // What was stored is rounded, and so is the sum; both are below the sum of magnitudes.
            // exp(x) in fp32 is within |x| 2^-23, and little is left of the carry for large |x|.
            double const bound = (2 * u + 0x1p-20) * part.magnitude[slot_head][i] + 0x1p-20;
            right = within(actual, part.expected[slot_head][i], bound, worst[0]) && right;
          }
          RETENTION_CHECK(right);
        }
        if (c.finals) {
          bool right = true;
          for (size_t i = 0; i < part.size; ++i) {
            size_t const item = s * heads + h;
            // fp32: the final states given, and a product and a sum each segment.
            double const bound = 0x1p-20 * part.magnitude_final[item][i] + 1e-30;
            right = within(double{part.result[item * part.size + i]}, part.expected_final[item][i],
                           bound, worst[1]) &&
                    right;
          }
          RETENTION_CHECK(right);
        }
      }
    }
  }
  std::cout << c.name << ", " << (Kernel::kBackward ? "backward, " : "")
            << (Kernel::kScaled ? "fp16" : "bf16") << ", seed " << seed << ": worst error "
            << worst[0] << " and " << worst[1] << " of the bounds\n";
}

template <class Element, Direction kDirection>
void run_all_cases(std::uint64_t seed) {
  run<Element, kDirection>({"batch"}, seed++);
  run<Element, kDirection>({"two rows, three heads", 64, {500, 500}, 3, false, 3}, seed++);
  run<Element, kDirection>({"chunks of 192", 192, {1000}, 3, false, 1, 0.2f}, seed++);
  run<Element, kDirection>({"no gates", 64, {640}, 3, false, 1, 0.0f}, seed++);
  run<Element, kDirection>({"positive gates", 64, {640}, 3, false, 1, -0.1f}, seed++);
  run<Element, kDirection>({"gates that leave nothing", 64, {640}, 4, false, 1, 3840.0f}, seed++);
  {
    Case infinite{"infinite, until nothing is left", 64, {640}, 3, false, 1, 3840.0f};
    infinite.infinite = true;
    run<Element, kDirection>(infinite, seed++);
  }
  run<Element, kDirection>({"strided gates", 64, {300, 300}, 2, false, 3, 0.5f, true, false, true},
                           seed++);
  run<Element, kDirection>({"one segment", 64, {300}, 5}, seed++);
  run<Element, kDirection>({"as many segments as chunks", 64, {300}, 1}, seed++);
  run<Element, kDirection>({"chunk longer than the sequence", 1024, {100}, 1}, seed++);
  run<Element, kDirection>({"packed", 64, {65, 0, 1, 330, 0, 64}, 2, true, 2}, seed++);
  run<Element, kDirection>(
      {"packed, strided", 64, {0, 400, 0}, 4, true, 3, 0.5f, true, false, true}, seed++);
  run<Element, kDirection>({"no initial state", 64, {300}, 3, false, 1, 0.5f, false}, seed++);
  // Segments longer than a batch of factors.
  run<Element, kDirection>({"many chunks", 1, {560}, 280, false, 1, 0.01f}, seed++);
  Case c{"states only"};
  c.finals = false;
  run<Element, kDirection>(c, seed++);
  c = {"final states only"};
  c.states = false;
  run<Element, kDirection>(c, seed++);
  c = {"from outside", 64, {640, 640}, 4, false, 2};
  c.outer = true;
  run<Element, kDirection>(c, seed++);
  c.finals = false;
  run<Element, kDirection>(c, seed++);
  c = {"from outside, one segment", 64, {300}, 5};
  c.outer = true;
  run<Element, kDirection>(c, seed++);
  c = {"from outside, packed", 64, {65, 0, 1, 330, 0, 64}, 2, true, 2};
  c.outer = true;
  run<Element, kDirection>(c, seed++);
}

template <Direction kDirection>
void run_all(std::uint64_t seed) {
  run_all_cases<cute::bfloat16_t, kDirection>(seed);
  // What depends on the element type.
  run<cute::half_t, kDirection>({"batch"}, seed + 100);
  run<cute::half_t, kDirection>({"no gates", 64, {640}, 3, false, 1, 0.0f}, seed + 101);
  run<cute::half_t, kDirection>({"packed", 64, {65, 0, 1, 330, 0, 64}, 2, true, 2}, seed + 102);
  Case c{"exponents", 64, {65, 0, 700}, 3, true, 3};
  c.scaled = true;
  run<cute::half_t, kDirection>(c, seed + 200);
  c.gate = 0.0f;
  run<cute::half_t, kDirection>(c, seed + 201);
}

}  // namespace

RETENTION_TEST(carry) {
  run_all<Direction::kForward>(0);
  run_all<Direction::kBackward>(1000);
}
