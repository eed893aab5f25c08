// A step of decoding on the emulator against float64 loops over all tokens of each sequence: those
// folded into the state, those in the ring, the new ones. What is nobody's stays as it was.

#include "retention/kernel/decode_step.hpp"

#include <cstring>
#include <random>

#include "kernel_test.hpp"
#include "reference.hpp"

namespace {

using emulator::GlobalArray;
using retention::Cursor;
using retention::kernel::DecodePool;
using retention::kernel::TokenStride;
using retention::test::Inputs;
using std::size_t;

struct Row {
  int slot;
  int folded;  // tokens in the state
  int recent;  // in the ring
  int tokens = 1;
};

struct Case {
  char const* name;
  std::vector<Row> rows;
  int heads = 1;
  int group = 1;
  int slice_pairs = 0;      // 0: one block a head
  float log_gate = -0.05f;  // 0: no gates
  int resets = 0;           // every so many tokens one of -inf; 0: none
  bool packed = false;
  bool strided = false;
  bool far = false;  // slot 0 is 2^32 elements away: no sequence has it
  int null_slot = -1;
  int ring = 40;
};

struct Bits {
  std::vector<unsigned char> bytes;

  template <class T>
  explicit Bits(GlobalArray<T>& array) : bytes(array.size() * sizeof(T)) {
    std::memcpy(bytes.data(), array.data(), bytes.size());
  }
};

template <class Element, int HeadDim, int ValueDim, int MmaRows>
void run(Case const& c, std::uint64_t seed) {
  using Kernel = retention::kernel::DecodeStep<Element, HeadDim, ValueDim, MmaRows>;
  constexpr size_t D = Kernel::kStateDim;
  auto const heads = static_cast<size_t>(c.heads), group = static_cast<size_t>(c.group);
  auto const ring = static_cast<size_t>(c.ring);
  size_t const slots = 5, gap = c.strided ? 16 : 0;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;

  // Dirty: what nobody wrote reads as NaN.
  GlobalArray<cute::bfloat16_t> high("high", slots * (heads * D * ValueDim + gap));
  GlobalArray<float> key_sum("key_sum", slots * (heads * D + gap));
  GlobalArray<Element> keys("keys", slots * (heads * ring * HeadDim + gap));
  GlobalArray<Element> values("values", slots * (heads * ring * ValueDim + gap));
  GlobalArray<float> gates("gates", slots * (heads * ring + gap));
  GlobalArray<Cursor> cursors("cursors", slots);
  auto const slot_tensor = [&](auto& array, size_t size) {
    using T = std::remove_reference_t<decltype(array[0])>;
    auto const slot_stride = static_cast<std::int64_t>(heads * size + gap);
    auto const head_stride = static_cast<std::int64_t>(size);
    if (c.far) {  // slot 1 is the array's first
      constexpr std::int64_t kFar = std::int64_t{1} << 32;
      auto const start = reinterpret_cast<std::uintptr_t>(array.data()) - kFar * sizeof(T);
      return retention::kernel::SlotTensor<T>{reinterpret_cast<T*>(start), kFar, head_stride};
    }
    return retention::kernel::SlotTensor<T>{array.data(), slot_stride, head_stride};
  };
  // Of a slot and head: worked out here a second time.
  auto const start_of = [&](auto& array, size_t size, int slot, size_t h) {
    size_t const slots_before = c.far ? 0 : static_cast<size_t>(slot);
    return array.data() + slots_before * (heads * size + gap) + h * size;
  };
  DecodePool<Element> const pool{slot_tensor(high, D * ValueDim),
                                 {},
                                 slot_tensor(key_sum, D),
                                 slot_tensor(keys, ring * HeadDim),
                                 slot_tensor(values, ring * ValueDim),
                                 slot_tensor(gates, ring),
                                 cursors.data(),
                                 1,
                                 static_cast<int>(slots),
                                 c.null_slot,
                                 c.ring};

  size_t const rows = c.rows.size();
  int most = 0;
  std::vector<int> starts = {0};
  for (Row const& row : c.rows) {
    most = std::max(most, row.tokens);
    starts.push_back(starts.back() + row.tokens);
  }
  auto const tokens = static_cast<size_t>(most);
  size_t const total = c.packed ? static_cast<size_t>(starts.back()) : rows * tokens;
  auto const stride = [&](size_t count, size_t width) {
    auto const w = static_cast<std::int64_t>(width + (c.strided ? 8 : 0));
    auto const token = w * static_cast<std::int64_t>(count);
    return TokenStride{token * most, token, w};
  };
  auto const size_of = [&](TokenStride const& s) { return total * static_cast<size_t>(s.token); };
  typename Kernel::Params params{};
  params.query_stride = stride(heads * group, HeadDim);
  params.key_stride = stride(heads, HeadDim);
  params.value_stride = stride(heads, ValueDim);
  params.gate_stride = stride(heads, 1);
  params.output_stride = stride(heads * group, ValueDim);
  GlobalArray<Element> query("query", size_of(params.query_stride), true);
  GlobalArray<Element> key("key", size_of(params.key_stride), true);
  GlobalArray<Element> value("value", size_of(params.value_stride), true);
  GlobalArray<float> log_gate("log_gate", size_of(params.gate_stride), true);
  GlobalArray<Element> output("output", size_of(params.output_stride));
  GlobalArray<int> slot_of("slots", rows, true);
  GlobalArray<int> cu_seqlens("cu_seqlens", rows + 1, true);
  std::copy(starts.begin(), starts.end(), cu_seqlens.begin());

  auto const at = [&](TokenStride const& s, size_t row, size_t token, size_t head) {
    size_t const first = c.packed ? static_cast<size_t>(starts[row]) : row * tokens;
    return (first + token) * static_cast<size_t>(s.token) + head * static_cast<size_t>(s.head);
  };
  auto const there = [&](Row const& row) {
    return row.slot > c.null_slot && row.slot >= 0 && row.slot < static_cast<int>(slots);
  };
  // [row][head][query head of the group]: all tokens of a sequence.
  std::vector<std::vector<std::vector<Inputs>>> inputs(rows);
  for (size_t r = 0; r < rows; ++r) {
    Row const& row = c.rows[r];
    slot_of[r] = row.slot;
    auto const folded = static_cast<size_t>(row.folded), recent = static_cast<size_t>(row.recent);
    size_t const before = folded + recent, count = before + static_cast<size_t>(row.tokens);
    auto const s = static_cast<size_t>(std::max(row.slot, 0));
    int const start = static_cast<int>(rng() % ring);
    if (there(row)) {
      cursors[s] = {start, row.recent, 0, 0, row.folded, row.folded + row.recent};
    }
    for (size_t h = 0; h < heads; ++h) {
      Inputs in;
      in.tokens = static_cast<int>(count);
      in.head_dim = HeadDim;
      in.value_dim = ValueDim;
      auto const draw = [&](std::vector<float>& target, size_t n, float scale) {
        for (size_t i = 0; i < n; ++i) {
          target.push_back(float(Element(scale * normal(rng))));
        }
      };
      draw(in.key, count * HeadDim, 1.0f);
      draw(in.value, count * ValueDim, 1.0f);
      for (size_t t = 0; t < count && c.log_gate != 0.0f; ++t) {
        bool const reset = c.resets > 0 && t % static_cast<size_t>(c.resets) == 1;
        in.gate.push_back(reset ? -std::numeric_limits<float>::infinity()
                                : c.log_gate * (1.0f + 0.5f * normal(rng)));
      }
      if (there(row)) {
        Inputs first = in;
        first.tokens = row.folded;
        auto const state = retention::test::chunk_states(first, {}, 1 << 30).back();
        for (size_t i = 0; i < D * ValueDim && row.folded > 0; ++i) {
          start_of(high, D * ValueDim, row.slot, h)[i] =
              cute::bfloat16_t(static_cast<float>(state.state.value[i]));
        }
        for (size_t i = 0; i < D && row.folded > 0; ++i) {
          start_of(key_sum, D, row.slot, h)[i] = static_cast<float>(state.key_sum.value[i]);
        }
        for (size_t t = 0; t < recent; ++t) {
          size_t const place = (static_cast<size_t>(start) + t) % ring;
          for (size_t e = 0; e < HeadDim; ++e) {
            start_of(keys, ring * HeadDim, row.slot, h)[place * HeadDim + e] =
                Element(in.key[(folded + t) * HeadDim + e]);
          }
          for (size_t e = 0; e < ValueDim; ++e) {
            start_of(values, ring * ValueDim, row.slot, h)[place * ValueDim + e] =
                Element(in.value[(folded + t) * ValueDim + e]);
          }
          if (c.log_gate != 0.0f) {
            start_of(gates, ring, row.slot, h)[place] = in.gate[folded + t];
          }
        }
      }
      inputs[r].emplace_back(group, in);
      for (size_t t = 0; t < static_cast<size_t>(row.tokens); ++t) {
        for (size_t e = 0; e < HeadDim; ++e) {
          key[at(params.key_stride, r, t, h) + e] = Element(in.key[(before + t) * HeadDim + e]);
        }
        for (size_t e = 0; e < ValueDim; ++e) {
          value[at(params.value_stride, r, t, h) + e] =
              Element(in.value[(before + t) * ValueDim + e]);
        }
        log_gate[at(params.gate_stride, r, t, h)] = c.log_gate != 0.0f ? in.gate[before + t] : 0.0f;
      }
      for (size_t n = 0; n < group; ++n) {
        std::vector<float>& q = inputs[r][h][n].query;
        // Of any magnitude, which cancels, and aligned with some key: a query that hardly sees any
        // reads from a state what is left of larger numbers.
        constexpr int kStep = std::is_same_v<Element, cute::half_t> ? 4 : 8;
        float const scale = std::ldexp(1.0f, kStep * (static_cast<int>(n % 5) - 2));
        draw(q, count * HeadDim, 1.0f);
        for (size_t t = 0; t < static_cast<size_t>(row.tokens); ++t) {
          size_t const seen = rng() % (before + t + 1);
          for (size_t e = 0; e < HeadDim; ++e) {
            q[(before + t) * HeadDim + e] += in.key[seen * HeadDim + e];
            q[(before + t) * HeadDim + e] *= scale;
            query[at(params.query_stride, r, t, h * group + n) + e] =
                Element(q[(before + t) * HeadDim + e]);
            q[(before + t) * HeadDim + e] =
                float(query[at(params.query_stride, r, t, h * group + n) + e]);
          }
        }
      }
    }
  }

  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.log_gate = c.log_gate != 0.0f ? log_gate.data() : nullptr;
  params.output = output.data();
  params.cu_seqlens = c.packed ? cu_seqlens.data() : nullptr;
  params.total = static_cast<int>(total);
  params.slots = slot_of.data();
  params.rows = static_cast<int>(rows);
  params.tokens = most;
  params.heads = c.heads;
  params.group = c.group;
  params.pool = pool;
  params.slice_pairs = c.slice_pairs == 0 ? Kernel::kPairs : c.slice_pairs;
  params.parts = c.slice_pairs == 0 ? 1 : (Kernel::kPairs + c.slice_pairs - 1) / c.slice_pairs;
  auto const parts = static_cast<size_t>(params.parts);
  GlobalArray<float> partial("partial", rows * heads * parts * tokens * group * (ValueDim + 4) + 1);
  GlobalArray<unsigned> arrivals("arrivals", rows * (heads + 1));
  std::fill(arrivals.begin(), arrivals.end(), 0u);
  params.partial = partial.data();
  params.arrivals = arrivals.data();

  Bits const states_before(high), sums_before(key_sum), cursors_before(cursors);
  GlobalArray<Element> keys_before("keys before", keys.size());
  std::copy(keys.begin(), keys.end(), keys_before.begin());
  if (!retention::test::launch<Kernel>(params, seed)) {
    return;
  }
  // Whatever the order of blocks, the bits are the same.
  Bits const first_output(output), cursors_after(cursors);
  std::memcpy(cursors.data(), cursors_before.bytes.data(), cursors_before.bytes.size());
  if (!retention::test::launch<Kernel>(params, seed + 1001)) {
    return;
  }
  RETENTION_CHECK(Bits(output).bytes == first_output.bytes);
  RETENTION_CHECK(Bits(cursors).bytes == cursors_after.bytes);
  // States are read; of the rings nothing but the places of new tokens is written.
  RETENTION_CHECK(Bits(high).bytes == states_before.bytes);
  RETENTION_CHECK(Bits(key_sum).bytes == sums_before.bytes);
  for (unsigned const count : arrivals) {
    RETENTION_CHECK_EQUAL(count, 0u);
  }

  double error = 0.0, size = 0.0;  // sums of squares
  for (size_t r = 0; r < rows; ++r) {
    Row const& row = c.rows[r];
    auto const n = static_cast<size_t>(row.tokens);
    size_t const before = static_cast<size_t>(row.folded + row.recent);
    if (there(row)) {
      Cursor const& cursor = cursors[static_cast<size_t>(row.slot)];
      RETENTION_CHECK_EQUAL(cursor.length, row.recent + row.tokens);
      RETENTION_CHECK_EQUAL(cursor.seen, static_cast<std::int64_t>(before + n));
      RETENTION_CHECK_EQUAL(cursor.folded, row.folded);
    }
    for (size_t h = 0; h < heads; ++h) {
      for (size_t g = 0; g < group; ++g) {
        Inputs const& in = inputs[r][h][g];
        auto const expected = retention::test::attend(in, {}, 1.0);
        for (size_t t = 0; t < n; ++t) {
          for (size_t e = 0; e < ValueDim; ++e) {
            double const actual = float(output[at(params.output_stride, r, t, h * group + g) + e]);
            if (!there(row)) {
              RETENTION_CHECK(actual == 0.0);
              continue;
            }
            double const o = expected.output[(before + t) * ValueDim + e];
            error += (actual - o) * (actual - o);
            size += o * o;
          }
        }
      }
      for (size_t t = 0; there(row) && t < n; ++t) {
        Cursor const& cursor = cursors[static_cast<size_t>(row.slot)];
        size_t const place = (static_cast<size_t>(cursor.start + row.recent) + t) % ring;
        bool same = true;
        for (size_t e = 0; e < HeadDim; ++e) {
          Element const actual = start_of(keys, ring * HeadDim, row.slot, h)[place * HeadDim + e];
          same = same && actual == key[at(params.key_stride, r, t, h) + e];
          keys_before[static_cast<size_t>(start_of(keys, ring * HeadDim, row.slot, h) -
                                          keys.data()) +
                      place * HeadDim + e] = actual;
        }
        for (size_t e = 0; e < ValueDim; ++e) {
          same = same && start_of(values, ring * ValueDim, row.slot, h)[place * ValueDim + e] ==
                             value[at(params.value_stride, r, t, h) + e];
        }
        if (c.log_gate != 0.0f) {
          same = same && start_of(gates, ring, row.slot, h)[place] ==
                             log_gate[at(params.gate_stride, r, t, h)];
        }
        RETENTION_CHECK(same);
      }
    }
  }
  RETENTION_CHECK(Bits(keys).bytes == Bits(keys_before).bytes);
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << ", rows " << MmaRows
            << ", seed " << seed << ": error " << std::sqrt(error / size) << '\n';
  // phi and the high plane are rounded to bf16, and so may be the output; all else is fp32.
  RETENTION_CHECK(error <= 6.25 * 0x1p-18 * size);
}

template <class Element, int HeadDim, int ValueDim>
void run_all() {
  std::uint64_t seed = 0;
  // A state of many elements takes its time on the emulator: of that, what differs by its size.
  auto const run_both = [&](Case const& c, bool large_too = false) {
    if (!retention::test::kLarge<HeadDim, ValueDim> || large_too) {
      run<Element, HeadDim, ValueDim, 1>(c, seed);
      run<Element, HeadDim, ValueDim, 4>(c, seed + 1);
    }
    seed += 2;
  };
  // name, rows {slot, folded, recent, tokens}, heads, group, slice, gate
  run_both({"state and ring", {{2, 20, 7}}});
  run_both({"nothing before", {{0, 0, 0}}});
  run_both({"ring alone", {{1, 0, 39, 1}}});
  run_both({"state alone", {{4, 30, 0, 1}}});
  constexpr int kPairs = HeadDim / 8 * (HeadDim / 8 + 1) / 2;
  constexpr int kSlice = retention::test::kLarge<HeadDim, ValueDim> ? kPairs / 3 : 3;
  run_both({"split", {{2, 20, 7}}, 1, 1, kSlice}, true);
  run_both({"split, two tiles of the ring", {{1, 5, 38}}, 1, 1, kSlice, -0.02f});
  run_both({"several tokens", {{3, 10, 20, 16}}, 1, 2, kSlice}, true);
  Case batch{"batch, padding", {{3, 9, 5, 2}, {-1, 0, 0, 2}, {0, 0, 3, 2}, {7, 0, 0, 2}}, 2, 3};
  batch.strided = true;
  run_both(batch);
  batch.name = "batch, padding, split";
  batch.slice_pairs = kSlice;
  run_both(batch);
  batch.name = "slots up to 0 are padding";
  batch.null_slot = 0;
  run_both(batch);
  Case ragged{"ragged", {{1, 5, 0, 1}, {4, 0, 30, 7}, {2, 12, 20, 3}}, 2, 2, kSlice};
  ragged.packed = true;
  run_both(ragged, true);
  Case far{"far apart", {{1, 10, 5, 1}}, 2, 1, kSlice};
  far.far = true;
  run_both(far);
  Case resets{"resets", {{1, 10, 25, 3}, {2, 1, 30, 3}}, 1, 2};
  resets.resets = 7;
  run_both(resets);
  run_both({"no gates", {{0, 11, 13, 2}}, 1, 1, kSlice, 0.0f});
  run_both({"strong gates", {{0, 11, 13, 2}}, 1, 1, 0, -30.0f});
  run_both({"many heads in a group", {{0, 6, 4, 5}}, 1, 20});
}

}  // namespace

RETENTION_TEST(decode_step) { run_all<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(); }
