// Folds on the emulator: the state that float64 loops make of the same tokens, both planes to the
// last bit where nothing is added, and slots that do not fold as they were.

#include "retention/kernel/decode_fold.hpp"

#include <cstring>
#include <random>

#include "kernel_test.hpp"
#include "reference.hpp"

namespace {

using emulator::GlobalArray;
using retention::Cursor;
using retention::kernel::DecodePool;
using retention::test::Inputs;
using std::size_t;

struct Slot {
  int folded;
  int length;  // of its ring
  int phase = 0;
  int expected = 0;  // tokens to fold
};

struct Case {
  char const* name;
  std::vector<Slot> slots;  // all of the pool, a row each
  int heads = 1;
  int window = 16;
  int keep = 0;
  int blocks = 1;
  float log_gate = -0.05f;
  bool resets = false;
  bool planes = true;      // else bf16 states
  bool zero_keys = false;  // then nothing is added
  int ring = 50;
  int padding = 2;  // rows of it before the slots
};

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// As the pool's header defines them.
float join(cute::bfloat16_t high, std::int16_t low) {
  return from_bits((std::uint32_t{high.raw()} << 16) + static_cast<std::uint32_t>(int{low}));
}

template <class Element, int HeadDim, int ValueDim>
struct Pool {
  static constexpr size_t D = retention::SymmetricPower<HeadDim, 2>::kStateDim;
  size_t slots, heads, ring;
  GlobalArray<cute::bfloat16_t> high;
  GlobalArray<std::int16_t> low;
  GlobalArray<float> key_sum;
  GlobalArray<Element> keys, values;
  GlobalArray<float> gates;
  GlobalArray<Cursor> cursors;

  Pool(size_t slots_, size_t heads_, size_t ring_)
      : slots(slots_),
        heads(heads_),
        ring(ring_),
        high("high", slots * heads * D * ValueDim),
        low("low", slots * heads * D * ValueDim),
        key_sum("key_sum", slots * heads * D),
        keys("keys", slots * heads * ring * HeadDim),
        values("values", slots * heads * ring * ValueDim),
        gates("gates", slots * heads * ring),
        cursors("cursors", slots) {}

  DecodePool<Element> view(bool planes, bool gated) {
    auto const tensor = [&](auto& array, size_t size) {
      return retention::kernel::SlotTensor<std::remove_reference_t<decltype(array[0])>>{
          array.data(), static_cast<std::int64_t>(heads * size), static_cast<std::int64_t>(size)};
    };
    DecodePool<Element> pool{tensor(high, D * ValueDim),
                             tensor(low, D * ValueDim),
                             tensor(key_sum, D),
                             tensor(keys, ring * HeadDim),
                             tensor(values, ring * ValueDim),
                             tensor(gates, ring),
                             cursors.data(),
                             1,
                             static_cast<int>(slots),
                             -1,
                             static_cast<int>(ring)};
    pool.low.data = planes ? pool.low.data : nullptr;
    pool.log_gates.data = gated ? pool.log_gates.data : nullptr;
    return pool;
  }
};

template <class Element, int HeadDim, int ValueDim>
void run(Case const& c, std::uint64_t seed) {
  using Kernel = retention::kernel::DecodeFold<Element, HeadDim, ValueDim>;
  constexpr size_t D = Pool<Element, HeadDim, ValueDim>::D;
  size_t const slots = c.slots.size(), heads = static_cast<size_t>(c.heads);
  auto const ring = static_cast<size_t>(c.ring);
  Pool<Element, HeadDim, ValueDim> pool(slots, heads, ring);
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  bool const gated = c.log_gate != 0.0f;

  for (size_t s = 0; s < slots; ++s) {
    pool.cursors[s] = {static_cast<int>(rng() % ring),
                       c.slots[s].length,
                       c.slots[s].phase,
                       0,
                       c.slots[s].folded,
                       c.slots[s].folded + c.slots[s].length};
    for (size_t h = 0; h < heads; ++h) {
      size_t const first = (s * heads + h) * D * ValueDim;
      for (size_t i = 0; i < D * ValueDim && c.slots[s].folded > 0; ++i) {
        std::uint32_t bits = bits_of(normal(rng));
        if (c.zero_keys && i % 3 != 0) {  // any bits, and any ties
          auto const random = static_cast<std::uint32_t>(rng());
          bits = i % 3 == 1 ? random : (random & 0xffff0000) | 0x8000;
        }
        std::uint32_t const upper = std::isnan(from_bits(bits)) ? 0x7fff : (bits + 0x8000) >> 16;
        pool.high[first + i] = cute::bfloat16_t::bitcast(static_cast<std::uint16_t>(upper));
        pool.low[first + i] = static_cast<std::int16_t>(
            std::isnan(from_bits(bits)) ? -1 : static_cast<int>(bits - (upper << 16)));
      }
      for (size_t i = 0; i < D && c.slots[s].folded > 0; ++i) {
        pool.key_sum[(s * heads + h) * D + i] = normal(rng);
      }
      for (size_t t = 0; t < static_cast<size_t>(c.slots[s].length); ++t) {
        size_t const place = (static_cast<size_t>(pool.cursors[s].start) + t) % ring;
        size_t const at = (s * heads + h) * ring + place;
        for (size_t e = 0; e < HeadDim; ++e) {
          pool.keys[at * HeadDim + e] = Element(c.zero_keys ? 0.0f : normal(rng));
        }
        for (size_t e = 0; e < ValueDim; ++e) {
          pool.values[at * ValueDim + e] = Element(normal(rng));
        }
        pool.gates[at] = c.resets && t % 5 == 2 ? -std::numeric_limits<float>::infinity()
                                                : c.log_gate * (1 + 0.5f * normal(rng));
      }
    }
  }
  auto const padding = static_cast<size_t>(c.padding);
  GlobalArray<int> slot_of("slots", padding + slots, true);
  for (size_t row = 0; row < padding; ++row) {
    slot_of[row] = row % 2 == 0 ? -1 : static_cast<int>(slots);
  }
  for (size_t s = 0; s < slots; ++s) {
    slot_of[padding + s] = static_cast<int>(slots - 1 - s);
  }
  GlobalArray<unsigned> arrivals("arrivals", 1);
  arrivals[0] = 0;

  GlobalArray<cute::bfloat16_t> high_before("high before", pool.high.size());
  GlobalArray<std::int16_t> low_before("low before", pool.low.size());
  GlobalArray<float> sum_before("sum before", pool.key_sum.size());
  std::memcpy(high_before.data(), pool.high.data(), 2 * pool.high.size());
  std::memcpy(low_before.data(), pool.low.data(), 2 * pool.low.size());
  std::memcpy(sum_before.data(), pool.key_sum.data(), 4 * pool.key_sum.size());
  std::vector<Cursor> const before(pool.cursors.begin(), pool.cursors.end());

  typename Kernel::Params params{};
  params.slots = slot_of.data();
  params.rows = static_cast<int>(padding + slots);
  params.heads = c.heads;
  params.pool = pool.view(c.planes, gated);
  params.window = c.window;
  params.keep = c.keep;
  params.blocks = c.blocks;
  params.arrivals = arrivals.data();
  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }

  double worst = 0.0, bias = 0.0;
  size_t count = 0;
  for (size_t s = 0; s < slots; ++s) {
    int const folds = c.slots[s].expected;
    Cursor const& cursor = pool.cursors[s];
    RETENTION_CHECK_EQUAL(cursor.start, (before[s].start + folds) % static_cast<int>(ring));
    RETENTION_CHECK_EQUAL(cursor.length, before[s].length - folds);
    RETENTION_CHECK_EQUAL(cursor.folded, before[s].folded + folds);
    RETENTION_CHECK_EQUAL(cursor.seen, before[s].seen);
    for (size_t h = 0; h < heads; ++h) {
      size_t const first = (s * heads + h) * D * ValueDim, sums = (s * heads + h) * D;
      if (folds == 0) {
        size_t const n = 2 * D * ValueDim;
        RETENTION_CHECK(std::memcmp(&pool.high[first], &high_before[first], n) == 0);
        RETENTION_CHECK(std::memcmp(&pool.low[first], &low_before[first], n) == 0);
        RETENTION_CHECK(std::memcmp(&pool.key_sum[sums], &sum_before[sums], 4 * D) == 0);
        continue;
      }
      if (c.zero_keys) {
        bool same = true;
        for (size_t i = first; i < first + D * ValueDim; ++i) {
          bool const nan = std::isnan(join(high_before[i], low_before[i]));
          same = same && pool.high[i].raw() == (nan ? 0x7fc0 : high_before[i].raw()) &&
                 pool.low[i] == (nan ? 0 : low_before[i]);
        }
        RETENTION_CHECK(same);
        continue;
      }
      Inputs in;
      in.tokens = folds;
      in.head_dim = HeadDim;
      in.value_dim = ValueDim;
      for (size_t t = 0; t < static_cast<size_t>(folds); ++t) {
        size_t const at =
            (s * heads + h) * ring + (static_cast<size_t>(before[s].start) + t) % ring;
        for (size_t e = 0; e < HeadDim; ++e) {
          in.key.push_back(float(pool.keys[at * HeadDim + e]));
        }
        for (size_t e = 0; e < ValueDim; ++e) {
          in.value.push_back(float(pool.values[at * ValueDim + e]));
        }
        if (gated) {
          in.gate.push_back(pool.gates[at]);
        }
      }
      auto const given = [&](size_t i) {
        return double{c.planes ? join(high_before[i], low_before[i]) : float(high_before[i])};
      };
      retention::test::State initial{retention::test::Sum(D * ValueDim), retention::test::Sum(D)};
      for (size_t i = 0; i < D * ValueDim && before[s].folded > 0; ++i) {
        initial.state.value[i] = given(first + i);
      }
      for (size_t i = 0; i < D && before[s].folded > 0; ++i) {
        initial.key_sum.value[i] = double{sum_before[sums + i]};
      }
      auto const expected = retention::test::chunk_states(in, initial, 1 << 30).back();
      double decay = 0.0;
      for (float const gate : in.gate) {
        decay += gate;
      }
      decay = std::exp(decay);
      for (size_t i = 0; i < D * ValueDim; ++i) {
        double const e = expected.state.value[i];
        double const actual = c.planes ? join(pool.high[first + i], pool.low[first + i])
                                       : float(pool.high[first + i]);
        // Of the tokens' terms, phi and v are rounded to bf16; a bf16 state as a whole.
        double const kept = decay * std::abs(initial.state.value[i]);
        double bound = 0x1p-7 * expected.state.magnitude[i] + 0x1p-20 * kept;
        if (!c.planes) {
          bound += 0x1p-7 * std::abs(e) + 1e-30;
          // Where terms do not cancel, whose own roundings would be large beside the sum.
          if (expected.state.magnitude[i] + kept < 4.0 * std::abs(e)) {
            bias += (std::abs(actual) - std::abs(e)) / (0x1p-7 * std::abs(e));
            ++count;
          }
        }
        double const error = std::abs(actual - e) == 0.0 ? 0.0 : std::abs(actual - e) / bound;
        worst = error <= worst ? worst : error;
      }
      for (size_t i = 0; i < D; ++i) {
        double const e = expected.key_sum.value[i];
        double const bound =
            0x1p-20 * (expected.key_sum.magnitude[i] + decay * std::abs(initial.key_sum.value[i])) +
            1e-30;
        double const error = std::abs(double{pool.key_sum[sums + i]} - e) / bound;
        worst = error <= worst ? worst : error;
      }
    }
  }
  RETENTION_CHECK_EQUAL(arrivals[0], 0u);
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << ", seed " << seed << ": error "
            << worst << " of the bound\n";
  RETENTION_CHECK(worst <= 1.0);
  if (count > 0) {
    // Each is off by less than one unit, at random; cut off, they would be by a third on average.
    double const mean = bias / static_cast<double>(count);
    std::cout << "  bias " << mean << '\n';
    RETENTION_CHECK(std::abs(mean) <= 0.02);
  }
}

template <class Element, int HeadDim, int ValueDim>
void run_all() {
  std::uint64_t seed = 0;
  constexpr int kBlocks = 3;
  // A state of many elements takes its time on the emulator: of that, what differs by its size.
  auto const run_case = [&](Case const& c, bool large_too = false) {
    if (!retention::test::kLarge<HeadDim, ValueDim> || large_too) {
      run<Element, HeadDim, ValueDim>(c, seed);
    }
    ++seed;
  };
  // {folded, length, phase, expected}
  run_case({"one slot", {{32, 20, 0, 16}}}, true);
  run_case({"nothing in the state", {{0, 16, 0, 16}}, 2}, true);
  run_case({"more blocks than work", {{16, 17, 0, 16}, {16, 15, 0, 0}}, 1, 16, 0, 200});
  Case which{"which fold",
             {{32, 15, 0, 0},
              {32, 16, 0, 16},
              {40, 8, 0, 8},
              {40, 7, 0, 0},
              {0, 5, 5, 5},
              {5, 16, 5, 16},
              {3, 40, 0, 13}},
             1,
             16,
             0,
             kBlocks};
  which.padding = 29;  // two warps list them
  run_case(which);
  Case keep{
      "tokens that stay", {{16, 19, 0, 0}, {16, 20, 0, 16}, {0, 50, 0, 16}}, 2, 16, 4, kBlocks};
  run_case(keep);
  keep.planes = false;
  keep.name = "bf16 states";
  run_case(keep, true);
  Case resets{"resets", {{16, 20, 0, 16}, {0, 30, 0, 16}}, 1, 16, 0, kBlocks};
  resets.resets = true;
  run_case(resets);
  run_case({"no gates", {{7, 45, 4, 45}}, 1, 48, 0, kBlocks, 0.0f}, true);
  run_case({"odd window", {{0, 37, 0, 37}}, 1, 37, 0, kBlocks});
  Case many{"among many rows", {{16, 16, 0, 16}, {16, 3, 0, 0}, {0, 40, 3, 3}}, 2, 16, 0, kBlocks};
  many.padding = 510;  // that end with a list of rows, or nearly so
  run_case(many);
  Case tiles{"several tiles of tokens", {{160, 170, 0, 160}}, 1, 160, 0, kBlocks};
  tiles.ring = 180;
  run_case(tiles, true);
  Case same{"planes as they were", {{16, 16, 0, 16}}, 1, 16, 0, kBlocks, 0.0f};
  same.zero_keys = true;
  run_case(same);
}

}  // namespace

RETENTION_TEST(decode_fold) { run_all<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(); }
