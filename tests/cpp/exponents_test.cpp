// The choice of exponents for fp16 on the emulator against float64 loops.

#include "retention/kernel/exponents.hpp"

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

using cute::half_t;
using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::kernel::ChooseExponents;
using retention::kernel::ChunkRange;
using retention::kernel::StateRange;
using retention::kernel::StateRanges;
using retention::test::first_slot_of;
using retention::test::launch;
using std::size_t;
using Ranges = retention::kernel::ChunkRanges<half_t>;

enum class Gates { kNone, kMild, kSixty, kInfinite, kPositive, kTwentySix, kOverflow, kNaN };
enum class Fill {
  kNormal,
  kLargest,    // 65504 throughout: the bounds are reached
  kSubnormal,  // 2^-24 throughout
  kZero,
  kNotFinite,  // an infinity and a NaN among normal numbers
  kNeedle,     // one number in eight rows
};

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {128};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int heads = 1;
  Gates gates = Gates::kMild;
  Fill key = Fill::kNormal;
  Fill value = Fill::kNormal;
  float initial = 0.0f;  // magnitude of the initial state; 0 for none
  bool strided = false;  // heads before tokens, and gaps between the rows
  size_t head_dim = 32;
  size_t value_dim = 40;
};

void fill_row(Fill fill, half_t* row, size_t width, bool special, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < width; ++i) {
    switch (fill) {
      case Fill::kNormal:
      case Fill::kNotFinite:
        row[i] = half_t(normal(rng));
        break;
      case Fill::kLargest:
        row[i] = half_t(-65504.0f);
        break;
      case Fill::kSubnormal:
        row[i] = half_t(0x1p-24f);
        break;
      case Fill::kZero:
      case Fill::kNeedle:
        row[i] = half_t(i % 2 == 0 ? 0.0f : -0.0f);
        break;
    }
  }
  if (fill == Fill::kNeedle && rng() % 8 == 0) {
    row[rng() % width] = half_t(normal(rng));
  }
  if (fill == Fill::kNotFinite && special) {
    row[0] = half_t(-std::numeric_limits<float>::infinity());
    row[width - 1] = half_t::bitcast(0x7e00);
    row[width - 2] = half_t::bitcast(0xffff);
  }
}

// The smallest e with x < 2^e, within limits; 0 for 0.
int exponent(double x, int stored, int limit) {
  if (x == 0.0) {
    return 0;
  }
  int e = limit + stored;
  if (x < std::numeric_limits<double>::infinity()) {
    std::frexp(x, &e);
  }
  return std::clamp(e - stored, -limit, limit);
}

int exponents_seen = 0;
int exponents_above_least = 0;

double finite(double x) { return std::isfinite(x) ? std::abs(x) : 0.0; }

void run(Case const& c, std::uint64_t seed) {
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  size_t const d = c.head_dim, dv = c.value_dim, D = d * (d + 8) / 2;
  retention::test::SequenceLayout const layout(c.lengths, c.packed);
  auto const key_stride = layout.strides(heads, d, c.strided);
  auto const value_stride = layout.strides(heads, dv, c.strided);
  auto const gate_stride = layout.strides(heads, 1, c.strided);
  bool const gated = c.gates != Gates::kNone;
  GlobalArray<half_t> key("key", layout.size_of(key_stride, heads, d), true);
  GlobalArray<half_t> value("value", layout.size_of(value_stride, heads, dv), true);
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(gate_stride, heads), true);
  // What lies between the rows must not count.
  std::fill(key.begin(), key.end(), half_t(60000.0f));
  std::fill(value.begin(), value.end(), half_t(60000.0f));
  for (size_t s = 0; s < sequences; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      retention::test::GateSum cumulative;
      for (int t = 0; t < c.lengths[s]; ++t) {
        bool const special = t == c.lengths[s] / 2;
        fill_row(c.key, key.data() + layout.at(key_stride, s, t, h), d, special, rng);
        fill_row(c.value, value.data() + layout.at(value_stride, s, t, h), dv, special, rng);
        float x = -0.05f * std::abs(normal(rng));
        if (c.gates == Gates::kSixty) {
          x = -60.0f;
        } else if (c.gates == Gates::kInfinite && rng() % 8 == 0) {
          x = -std::numeric_limits<float>::infinity();
        } else if (c.gates == Gates::kPositive) {
          x = -2.0f * x;
        } else if (c.gates == Gates::kTwentySix) {
          x = -26.0f;
        } else if (c.gates == Gates::kOverflow && t % 8 == 0) {
          x = t < c.lengths[s] / 2 ? 60.0f : -90.0f;
        } else if (c.gates == Gates::kNaN && special) {
          x = std::numeric_limits<float>::quiet_NaN();
        }
        gate[layout.at(gate_stride, s, t, h)] = cumulative.add(x, t % c.chunk_size == 0);
      }
    }
  }

  auto const where = layout.in_chunks(c.chunk_size);
  auto const slots = static_cast<size_t>(where.num_slots());
  bool const has_initial = c.initial != 0.0f;
  // Each sequence and head has a magnitude of its own.
  auto const initial_of = [&](size_t i) {
    return c.initial * std::ldexp(1.0f, -3 * static_cast<int>(i % 5));
  };
  GlobalArray<float> initial_state("initial_state", has_initial ? sequences * heads * D * dv : 1);
  GlobalArray<float> initial_sum("initial_key_sum", has_initial ? sequences * heads * D : 1);
  if (has_initial) {
    for (size_t i = 0; i < sequences * heads; ++i) {
      float const largest = initial_of(i);
      for (size_t j = 0; j < D * dv; ++j) {
        initial_state[i * D * dv + j] = largest * std::min(0.25f * std::abs(normal(rng)), 0.9f);
      }
      for (size_t j = 0; j < D; ++j) {
        initial_sum[i * D + j] = largest * std::min(0.25f * std::abs(normal(rng)), 0.9f);
      }
      initial_state[i * D * dv + rng() % (D * dv - 8)] = -largest;
      initial_sum[i * D + rng() % (D - 8)] = largest;
      initial_state[(i + 1) * D * dv - 1] = std::numeric_limits<float>::quiet_NaN();
      initial_sum[(i + 1) * D - 3] = -std::numeric_limits<float>::infinity();
    }
  }
  GlobalArray<ChunkRange> ranges("ranges", slots * heads);
  GlobalArray<StateRange> initial_ranges("initial_ranges",
                                         sequences * heads * size_t{Ranges::kStateParts});
  GlobalArray<int> key_exponent("key_exponent", sequences * heads);
  GlobalArray<int> score_exponent("score_exponent", sequences * heads);
  GlobalArray<int> state_exponent("state_exponent", slots * heads);
  GlobalArray<int> sum_exponent("key_sum_exponent", slots * heads);

  Ranges::Params first{};
  first.key = key.data();
  first.value = value.data();
  first.gate = gated ? gate.data() : nullptr;
  first.key_stride = key_stride;
  first.value_stride = value_stride;
  first.gate_stride = gate_stride;
  if (has_initial) {
    first.initial = {initial_state.data(), initial_sum.data(), {}};
  }
  first.ranges = ranges.data();
  first.initial_ranges = initial_ranges.data();
  first.sequences = where;
  first.heads = c.heads;
  first.head_dim = static_cast<int>(d);
  first.value_dim = static_cast<int>(dv);
  first.state_dim = static_cast<int>(D);
  ChooseExponents::Params const second{ranges.data(),
                                       has_initial ? initial_ranges.data() : nullptr,
                                       key_exponent.data(),
                                       score_exponent.data(),
                                       state_exponent.data(),
                                       sum_exponent.data(),
                                       where,
                                       c.heads,
                                       static_cast<int>(d)};
  if (!launch<Ranges>(first, seed) || !launch<ChooseExponents>(second, seed)) {
    return;
  }

  if (has_initial) {
    // By themselves, as for other states.
    GlobalArray<StateRange> alone("state ranges", initial_ranges.size());
    StateRanges::Params const states{{initial_state.data(), initial_sum.data(), {}},
                                     alone.data(),
                                     static_cast<int>(sequences),
                                     {c.heads, static_cast<int>(D), static_cast<int>(dv)}};
    if (!launch<StateRanges>(states, seed)) {
      return;
    }
    bool same = true;
    for (size_t i = 0; i < alone.size(); ++i) {
      same = same && alone[i].state == initial_ranges[i].state &&
             alone[i].key_sum == initial_ranges[i].key_sum;
    }
    RETENTION_CHECK(same);
  }

  auto const log2_gate = [&](size_t s, int t, size_t h) {
    CumulativeGate const& pair = gate[layout.at(gate_stride, s, t, h)];
    return double{pair.high} + double{pair.low};
  };
  for (size_t s = 0; s < sequences; ++s) {
    int const chunks = (c.lengths[s] + c.chunk_size - 1) / c.chunk_size;
    size_t const first_slot = first_slot_of(where, s);
    for (size_t h = 0; h < heads; ++h) {
      // Of each chunk: max |k|, max |k|_2^2, max |v|, n, G.
      struct Expected {
        double key = 0.0, norm = 0.0, value = 0.0, count = 0.0, gate = 0.0;
      };
      std::vector<Expected> expected(static_cast<size_t>(chunks));
      double key_max = 0.0, norm_max = 0.0, value_max = 0.0;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        Expected& e = expected[static_cast<size_t>(chunk)];
        int const begin = chunk * c.chunk_size;
        int const end = std::min(begin + c.chunk_size, c.lengths[s]);
        e.gate = gated ? log2_gate(s, end - 1, h) : 0.0;
        for (int t = begin; t < end; ++t) {
          double norm = 0.0;
          for (size_t i = 0; i < d; ++i) {
            double const x = finite(float(key[layout.at(key_stride, s, t, h) + i]));
            e.key = std::max(e.key, x);
            norm += x * x;
          }
          e.norm = std::max(e.norm, norm);
          for (size_t i = 0; i < dv; ++i) {
            e.value = std::max(e.value, finite(float(value[layout.at(value_stride, s, t, h) + i])));
          }
          e.count += gated ? std::exp2(e.gate - log2_gate(s, t, h)) : 1.0;
        }
        key_max = std::max(key_max, e.key);
        norm_max = std::max(norm_max, e.norm);
        value_max = std::max(value_max, e.value);
        ChunkRange const& range = ranges[(first_slot + static_cast<size_t>(chunk)) * heads + h];
        RETENTION_CHECK(range.key == e.key);
        RETENTION_CHECK(range.norm >= e.norm && range.norm <= e.norm * (1 + 0x1p-14));
        RETENTION_CHECK(range.value == e.value);
        if (std::isnan(e.gate)) {
          continue;
        }
        RETENTION_CHECK(range.gate == static_cast<float>(e.gate));
        if (e.count < double{std::numeric_limits<float>::max()}) {
          RETENTION_CHECK(range.count >= e.count * (1 - 1e-12));
          // 2^-21 (1 + |G - g|) from exponentials of differences that matter, and a few roundings.
          RETENTION_CHECK(range.count <= e.count * (1 + (gated ? 0x1p-15 : 0.0)));
        }
      }
      RETENTION_CHECK_EQUAL(key_exponent[s * heads + h], exponent(key_max, 0, 40));
      // A bound of the scores, rounded up by less than 2^-12.
      double const score = std::sqrt(static_cast<double>(d) * norm_max);
      RETENTION_CHECK(score_exponent[s * heads + h] >= exponent(score, 0, 40));
      RETENTION_CHECK(score_exponent[s * heads + h] <= exponent(score * (1 + 0x1p-12), 0, 40));

      double initial_max = 0.0, initial_sum_max = 0.0;
      if (has_initial) {
        initial_max = initial_sum_max = double{initial_of(s * heads + h)};
      }
      double count = 0.0, log2_decay = 0.0;
      // The state itself at row (block pair (0, 1), 0, 0), whose multiplicity is 2, and column 0.
      bool const constant = (c.key == Fill::kLargest || c.key == Fill::kSubnormal) &&
                            (c.value == Fill::kLargest || c.value == Fill::kSubnormal);
      double state = has_initial && d > 8 ? initial_state[((s * heads + h) * D + 64) * dv] : 0.0;
      bool lost[2] = {false, false};
      for (int chunk = 0; chunk < chunks; ++chunk) {
        Expected const& e = expected[static_cast<size_t>(chunk)];
        size_t const slot_head = (first_slot + static_cast<size_t>(chunk)) * heads + h;
        double const key_bound =
            2.0 * count * key_max * key_max + std::exp2(log2_decay) * initial_sum_max;
        double const state_bound =
            2.0 * count * key_max * key_max * value_max + std::exp2(log2_decay) * initial_max;
        exponents_seen += 2;
        auto check = [&](int actual, double bound, bool& is_lost) {
          // Anything within the limits will do for a state that fp32 lost.
          is_lost = is_lost || std::isnan(bound);
          if (is_lost) {
            RETENTION_CHECK(std::abs(actual) <= 120);
            return;
          }
          is_lost = bound > double{std::numeric_limits<float>::max()};
          bound = std::min(bound, double{std::numeric_limits<float>::max()});
          // Rounded up by less than 2^-9: it shows where the bound is that close to a power of two.
          int const least = exponent(bound, 15, 120);
          int const most = exponent(std::min(bound * (1 + 0x1p-9), 0x1.fffffep127), 15, 120);
          // A bound that fp32 cannot hold may as well be none.
          bool const none = bound < 0x1p-125 && actual == 0;
          RETENTION_CHECK(none || (least <= actual && actual <= most));
          exponents_above_least += !none && actual > least;
        };
        check(sum_exponent[slot_head], key_bound, lost[1]);
        lost[0] = lost[0] || lost[1];
        check(state_exponent[slot_head], state_bound, lost[0]);
        double const stored = std::abs(std::ldexp(state, -state_exponent[slot_head]));
        RETENTION_CHECK(lost[0] || !std::isfinite(state) || stored < 0x1p15);
        // Equal keys and values reach the bound.
        RETENTION_CHECK(!constant || has_initial || chunk == 0 || lost[0] ||
                        stored >= 0x1p14 * (1 - 0x1p-9));
        if (d > 8) {
          double update = 0.0;
          int const begin = chunk * c.chunk_size;
          for (int t = begin; t < std::min(begin + c.chunk_size, c.lengths[s]); ++t) {
            half_t const* k = key.data() + layout.at(key_stride, s, t, h);
            double const v = float(value[layout.at(value_stride, s, t, h)]);
            double const decay = gated ? std::exp2(e.gate - log2_gate(s, t, h)) : 1.0;
            update += decay * 2.0 * double{float(k[0])} * double{float(k[8])} * v;
          }
          state = std::exp2(e.gate) * state + update;
        }
        // The states' own decay is beyond fp32 then.
        lost[1] = lost[1] || std::exp2(e.gate) > double{std::numeric_limits<float>::max()};
        count = std::exp2(e.gate) * count + e.count;
        log2_decay += e.gate;
      }
    }
  }
  std::cout << c.name << ", seed " << seed << "\n";
}

}  // namespace

RETENTION_TEST(exponents) {
  std::uint64_t seed = 0;
  run({"batch", 64, {200, 200}, false, 3}, seed++);
  run({"one token", 64, {1}}, seed++);
  run({"chunks of 192, eight heads", 192, {500}, false, 8}, seed++);
  run({"chunk longer than the sequence", 1024, {100}, false, 3}, seed++);
  run({"one long chunk", 1 << 20, {5000}}, seed++);
  run({"wide rows",
       64,
       {100},
       false,
       2,
       Gates::kMild,
       Fill::kNormal,
       Fill::kNormal,
       1.0f,
       false,
       128,
       128},
      seed++);
  for (Gates const gates : {Gates::kNone, Gates::kMild, Gates::kSixty, Gates::kInfinite,
                            Gates::kPositive, Gates::kNaN}) {
    for (float const initial : {0.0f, 1e-30f, 1.0f, 1e30f}) {
      Case c{"packed", 64, {65, 0, 1, 200, 0, 64}, true, 2, gates};
      c.initial = initial;
      c.strided = initial == 1.0f;
      run(c, seed++);
    }
  }
  Fill const fills[] = {Fill::kLargest, Fill::kSubnormal, Fill::kZero, Fill::kNotFinite};
  for (Fill const key : fills) {
    for (Fill const value : fills) {
      for (Gates const gates : {Gates::kNone, Gates::kMild}) {
        Case c{"extremes", 64, {300}, false, 1, gates, key, value};
        run(c, seed++);
        c.initial = 3e38f;
        run(c, seed++);
      }
    }
  }
  run({"needles", 64, {3000}, false, 2, Gates::kMild, Fill::kNeedle, Fill::kNeedle}, seed++);
  // Decays out of fp32's range of states that stay within, and the other way round.
  for (float const initial : {0.0f, 3e38f}) {
    Case c{"decay", 2, {30}, false, 1, Gates::kTwentySix, Fill::kSubnormal, Fill::kSubnormal};
    c.initial = initial;
    run(c, seed++);
    c.gates = Gates::kOverflow;
    run(c, seed++);
    c.key = c.value = Fill::kNormal;
    c.chunk_size = 64;
    c.lengths = {3000};
    run(c, seed++);
  }
  // More chunks than a round of the scan takes, three rounds.
  for (Gates const gates : {Gates::kNone, Gates::kMild, Gates::kSixty, Gates::kPositive}) {
    Case c{"many chunks", 2, {2500}, false, 1, gates};
    c.initial = 1e20f;
    c.head_dim = c.value_dim = 8;
    run(c, seed++);
  }
  run({"NaN among many chunks", 2, {2500, 2500}, false, 1, Gates::kNaN}, seed++);
  std::cout << exponents_above_least << " of " << exponents_seen
            << " exponents are one above the least\n";
}
