// Copies of slots on the emulator: as if all sources were read first, and nobody else's memory
// moves.

#include "retention/kernel/decode_copy.hpp"

#include <random>
#include <utility>

#include "kernel_test.hpp"

namespace {

using emulator::GlobalArray;
using retention::Cursor;
using retention::kernel::DecodeCopy;
using retention::kernel::DecodePool;
using std::size_t;

// Small ones: the kernel takes a pool's tensors as words.
constexpr int kSlots = 9, kHeads = 2, kStateDim = 24, kHeadDim = 8, kValueDim = 16, kRing = 5;

struct Memory {
  size_t slot_size;  // with a gap
  GlobalArray<std::uint32_t> words;

  Memory(char const* name, size_t size, std::mt19937& rng)
      : slot_size(size + 4), words(name, kSlots * slot_size) {
    for (std::uint32_t& word : words) {
      word = static_cast<std::uint32_t>(rng());
    }
  }

  template <class T>
  retention::kernel::SlotTensor<T> as() {
    auto const in_word = static_cast<std::int64_t>(4 / sizeof(T));
    auto const heads = static_cast<std::int64_t>(slot_size - 4) / kHeads;
    return {reinterpret_cast<T*>(words.data()), in_word * static_cast<std::int64_t>(slot_size),
            in_word * heads};
  }
};

void run(std::vector<std::pair<int, int>> const& pairs, bool planes, int null_slot,
         std::uint64_t seed) {
  std::mt19937 rng(static_cast<unsigned>(seed));
  constexpr size_t kState = kHeads * kStateDim * kValueDim / 2;
  Memory memory[] = {{"high", kState, rng},
                     {"low", kState, rng},
                     {"key_sum", kHeads * kStateDim, rng},
                     {"keys", kHeads * kRing * kHeadDim / 2, rng},
                     {"values", kHeads * kRing * kValueDim / 2, rng},
                     {"gates", kHeads * kRing, rng},
                     {"cursors", sizeof(Cursor) / 4, rng}};
  auto& [high, low, key_sum, keys, values, gates, cursors] = memory;
  cursors.slot_size -= 4;
  DecodePool<cute::half_t> pool{high.as<cute::bfloat16_t>(),
                                low.as<std::int16_t>(),
                                key_sum.as<float>(),
                                keys.as<cute::half_t>(),
                                values.as<cute::half_t>(),
                                gates.as<float>(),
                                reinterpret_cast<Cursor*>(cursors.words.data()),
                                1,
                                kSlots,
                                null_slot,
                                kRing};
  pool.low.data = planes ? pool.low.data : nullptr;
  GlobalArray<int> source("source", pairs.size(), true), target("target", pairs.size(), true);
  for (size_t i = 0; i < pairs.size(); ++i) {
    source[i] = pairs[i].first;
    target[i] = pairs[i].second;
  }
  DecodeCopy::Params params{};
  params.source = source.data();
  params.target = target.data();
  params.count = static_cast<int>(pairs.size());
  DecodeCopy::set_tensors(params, pool, kHeads, kStateDim, kHeadDim, kValueDim);

  std::vector<std::vector<std::uint32_t>> expected;
  for (Memory& each : memory) {
    std::vector<std::uint32_t> const before(each.words.begin(), each.words.end());
    expected.push_back(before);
    bool const gap = &each != &cursors;
    for (auto const& [from, to] : pairs) {
      auto const there = [&](int slot) { return slot > null_slot && slot >= 0 && slot < kSlots; };
      for (size_t i = 0; there(from) && there(to) && i < each.slot_size - (gap ? 4 : 0); ++i) {
        if (&each != &low || planes) {
          expected.back()[static_cast<size_t>(to) * each.slot_size + i] =
              before[static_cast<size_t>(from) * each.slot_size + i];
        }
      }
    }
  }
  if (!retention::test::launch<DecodeCopy>(params, seed)) {
    return;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    RETENTION_CHECK(std::equal(expected[i].begin(), expected[i].end(), memory[i].words.begin()));
  }
}

}  // namespace

RETENTION_TEST(decode_copy) {
  run({{3, 5}}, true, -1, 0);
  run({{0, 1}, {1, 2}, {2, 0}}, true, -1, 1);                   // in a circle
  run({{4, 1}, {4, 2}, {4, 3}, {4, 4}, {8, 8}}, false, -1, 2);  // one to many
  run({{-1, 2}, {2, -1}, {9, 3}, {3, 9}, {0, 7}, {6, 0}}, true, -1, 3);
  run({{0, 7}, {6, 0}, {1, 8}}, true, 0, 4);  // 0 stands for nothing
  // As many as leave a block only a few words of each.
  std::vector<std::pair<int, int>> many(700, {-1, -1});
  many[3] = {1, 0};
  many[650] = {0, 1};
  run(many, true, -1, 5);
}
