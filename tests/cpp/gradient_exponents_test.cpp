// The choice of exponents for fp16 gradients on the emulator against float64 loops.

#include "retention/kernel/gradient_exponents.hpp"

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
using retention::kernel::ChooseGradientExponents;
using retention::kernel::ChunkRange;
using retention::kernel::GradientRange;
using retention::kernel::StateRange;
using retention::test::exponent_of;
using retention::test::first_slot_of;
using std::size_t;

enum class Gates { kNone, kMild, kSixty, kResets, kPositive, kNaN };

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {320};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  Gates gates = Gates::kMild;
  float final = 0.0f;      // magnitude of the final gradients; 0 for none
  float magnitude = 1.0f;  // of the rows' numbers
  float spread = 1.0f;     // of their logarithms
  bool zeros = false;      // most tiles have no rows that weigh or whose gradient is not zero
};

void run(Case const& c, std::uint64_t seed) {
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  auto const where = layout.in_chunks(c.chunk_size);
  auto const tiles = where.segments(ChooseGradientExponents::kTileTokens);
  auto const slots = static_cast<size_t>(where.num_slots()) * heads;
  GlobalArray<GradientRange> rows("rows", static_cast<size_t>(tiles.num_slots()) * heads, true);
  GlobalArray<ChunkRange> ranges("ranges", slots, true);
  constexpr size_t kParts = ChooseGradientExponents::kStateParts;
  GlobalArray<StateRange> final_ranges("final_ranges", sequences * heads * kParts, true);
  GlobalArray<int> weight("weight", slots), delta("delta", slots), state("state", slots),
      key_sum("key_sum", slots), score("score", slots);

  auto draw = [&](float magnitude) { return magnitude * std::exp(c.spread * normal(rng)); };
  // Slots without a tile or a chunk keep NaN.
  for (size_t s = 0; s < sequences; ++s) {
    size_t const first_tile = first_slot_of(tiles, s);
    size_t const first_slot = first_slot_of(where, s);
    for (size_t h = 0; h < heads; ++h) {
      for (int t = 0; t < c.lengths[s]; t += 64) {
        GradientRange& x = rows[(first_tile + static_cast<size_t>(t / 64)) * heads + h];
        x = {};
        if (!c.zeros || rng() % 4 == 0) {
          x.weight = draw(c.magnitude);
          x.weight_delta = draw(c.magnitude);
          x.gradient = draw(c.magnitude);
          x.delta = draw(c.magnitude);
        }
        if (!c.zeros || rng() % 4 == 0) {
          x.state = draw(16384 * c.magnitude);
          x.key_sum = draw(16384 * c.magnitude);
        }
      }
      for (int t = 0; t < c.lengths[s]; t += c.chunk_size) {
        float gate = 0.0f;
        switch (c.gates) {
          case Gates::kNone:
            break;
          case Gates::kMild:
            gate = -std::abs(normal(rng));
            break;
          case Gates::kSixty:
            gate = -60.0f;
            break;
          case Gates::kResets:
            gate = -385.0f * static_cast<float>(c.chunk_size);
            break;
          case Gates::kPositive:
            gate = normal(rng);
            break;
          case Gates::kNaN:
            gate = t / c.chunk_size == 2 ? std::numeric_limits<float>::quiet_NaN() : -0.1f;
            break;
        }
        auto const chunk = static_cast<size_t>(t / c.chunk_size);
        float const value = c.zeros && rng() % 2 == 0 ? 0.0f : std::abs(normal(rng));
        ranges[(first_slot + chunk) * heads + h] = {1.0f, 1.0f, value, 1.0f, gate};
      }
      float const given = std::ldexp(c.final, -static_cast<int>(s + h));
      for (size_t part = 0; part < kParts; ++part) {
        final_ranges[(s * heads + h) * kParts + part] = {0.25f * given, 0.125f * given};
      }
      final_ranges[(s * heads + h) * kParts + rng() % kParts].state = given;
      final_ranges[(s * heads + h) * kParts + rng() % kParts].key_sum = 0.5f * given;
    }
  }

  constexpr int kValueDim = 40;
  ChooseGradientExponents::Params const params{
      rows.data(),    ranges.data(), c.final != 0.0f ? final_ranges.data() : nullptr,
      weight.data(),  delta.data(),  state.data(),
      key_sum.data(), score.data(),  where,
      c.heads,        kValueDim};
  if (!retention::test::launch<ChooseGradientExponents>(params, seed)) {
    return;
  }

  constexpr double kLargest = 0x1.fffffep127;
  bool right[5] = {true, true, true, true, true};
  for (size_t s = 0; s < sequences; ++s) {
    size_t const first_tile = first_slot_of(tiles, s);
    size_t const first_slot = first_slot_of(where, s);
    for (size_t h = 0; h < heads; ++h) {
      double const given = std::ldexp(double{c.final}, -static_cast<int>(s + h));
      double state_bound = 0.0, key_sum_bound = 0.0, log2_decay = 0.0;
      bool lost = false;
      int const chunks = (c.lengths[s] + c.chunk_size - 1) / c.chunk_size;
      for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        size_t const slot = (first_slot + static_cast<size_t>(chunk)) * heads + h;
        // Rounded up by less than 2^-9: it shows where the bound is that close to a power of two.
        auto stored_right = [&](int actual, double bound) {
          if (lost || std::isnan(bound)) {
            return std::abs(actual) <= 120;
          }
          auto const expected = [&](double x) {
            return x == 0.0 ? 0 : std::clamp(exponent_of(std::min(x, kLargest)) - 15, -120, 120);
          };
          bool const none = bound < 0x1p-125 && actual == 0;
          return none || (actual >= expected(bound) && actual <= expected(bound * (1 + 0x1p-9)));
        };
        right[0] =
            right[0] && stored_right(state[slot], state_bound + std::exp2(log2_decay) * given);
        right[1] = right[1] &&
                   stored_right(key_sum[slot], key_sum_bound + std::exp2(log2_decay) * 0.5 * given);
        lost = lost || state_bound > kLargest || key_sum_bound > kLargest;

        GradientRange sum{};
        double state_sum = 0.0, key_sum_sum = 0.0;
        for (int t = chunk * c.chunk_size; t < std::min((chunk + 1) * c.chunk_size, c.lengths[s]);
             t += 64) {
          GradientRange const& x = rows[(first_tile + static_cast<size_t>(t / 64)) * heads + h];
          sum.weight = std::max(sum.weight, x.weight);
          sum.weight_delta = std::max(sum.weight_delta, x.weight_delta);
          sum.gradient = std::max(sum.gradient, x.gradient);
          sum.delta = std::max(sum.delta, x.delta);
          state_sum += x.state;
          key_sum_sum += x.key_sum;
        }
        // At most 1, and more than a quarter.
        auto below_one = [](int actual, double x) {
          double const scaled = std::ldexp(x, actual);
          bool const limited = actual == 120 && scaled <= 1.0;
          return x == 0.0 ? actual == 0 : limited || (scaled <= 1.0 && scaled > 0.25);
        };
        right[2] = right[2] && below_one(weight[slot], sum.weight);
        right[3] = right[3] && below_one(delta[slot], sum.weight_delta);
        double const gradient = 2.0 * (std::sqrt(double{kValueDim}) * double{ranges[slot].value} *
                                           double{sum.gradient} +
                                       double{sum.delta});
        double const scaled = std::ldexp(gradient, score[slot]);
        right[4] = right[4] &&
                   (gradient == 0.0 ? score[slot] == 0
                                    : scaled < 0x1p15 && (scaled > 0x1p13 || score[slot] == 120));

        double const gate = ranges[slot].gate;
        double const decay = std::exp2(gate);
        state_bound = decay * state_bound + state_sum;
        key_sum_bound = decay * key_sum_bound + key_sum_sum;
        log2_decay += gate;
        lost = lost || std::isnan(gate);
      }
    }
  }
  RETENTION_CHECK(right[0]);
  RETENTION_CHECK(right[1]);
  RETENTION_CHECK(right[2]);
  RETENTION_CHECK(right[3]);
  RETENTION_CHECK(right[4]);
  std::cout << c.name << ", seed " << seed << '\n';
}

/// A case with the settings that `set` changes.
template <class Set>
void run_case(char const* name, std::uint64_t seed, Set set) {
  Case c{name};
  set(c);
  run(c, seed);
}

}  // namespace

RETENTION_TEST(gradient_exponents) {
  std::uint64_t seed = 0;
  run_case("one chunk", seed++, [](Case& c) { c.lengths = {1}; });
  run_case("one long chunk", seed++, [](Case& c) { c.chunk_size = 1 << 20, c.lengths = {9000}; });
  for (Gates const gates :
       {Gates::kNone, Gates::kMild, Gates::kSixty, Gates::kResets, Gates::kPositive, Gates::kNaN}) {
    for (float const final : {0.0f, 1e-30f, 1.0f, 1e30f}) {
      run_case("packed", seed++, [&](Case& c) {
        c.chunk_size = 128, c.lengths = {65, 0, 1, 700, 0, 128}, c.packed = true, c.heads = 3;
        c.gates = gates, c.final = final;
      });
      run_case("batch, wide spread", seed++, [&](Case& c) {
        c.chunk_size = 192, c.lengths = {1000, 1000}, c.heads = 2;
        c.gates = gates, c.final = final, c.spread = 10.0f;
      });
    }
  }
  run_case("zeros", seed++, [](Case& c) { c.lengths = {3000}, c.zeros = true; });
  run_case("zeros, final", seed++, [](Case& c) {
    c.lengths = {3000}, c.zeros = true, c.final = 3.0f, c.gates = Gates::kNone;
  });
  run_case("tiny", seed++, [](Case& c) { c.magnitude = 1e-30f; });
  run_case("huge", seed++, [](Case& c) { c.magnitude = 1e30f; });
  // More chunks than a round of the scan takes, three rounds.
  for (Gates const gates : {Gates::kNone, Gates::kMild, Gates::kSixty}) {
    run_case("many chunks", seed++, [&](Case& c) {
      c.lengths = {1250 * 64}, c.heads = 2, c.gates = gates, c.final = 1e20f;
    });
  }
}
