// Lists of packed sequences, on the emulator, and what blocks find by them: every chunk and every
// tile once, in slots that do not overlap; and nothing out of bounds, whatever cu_seqlens holds.

#include "retention/kernel/sequence_lists.hpp"

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kernel_test.hpp"
#include "retention/kernel/row_tiles.hpp"

namespace {

using emulator::GlobalArray;
using retention::kernel::PackedTiles;
using retention::kernel::SequenceList;
using retention::kernel::SequenceLists;
using retention::kernel::Sequences;
using retention::kernel::Slots;
using std::size_t;

struct Lists {
  std::vector<int> limits;
  std::vector<int> most;
  std::vector<std::vector<SequenceList::Entry>> entries;
};

// By the kernel.
Lists make(std::vector<int> const& bounds, int tokens, std::vector<int> const& limits) {
  auto const count = static_cast<int>(bounds.size()) - 1;
  GlobalArray<int> cu_seqlens("cu_seqlens", bounds.size(), true);
  std::copy(bounds.begin(), bounds.end(), cu_seqlens.begin());
  GlobalArray<int> counts("counts", SequenceLists::kLists);
  std::vector<GlobalArray<SequenceList::Entry>> entries;
  SequenceLists::Params params{
      cu_seqlens.data(), cu_seqlens.data() + 1, count, tokens, {}, nullptr, {}};
  Lists lists{limits, {}, {}};
  for (size_t i = 0; i < SequenceLists::kLists; ++i) {
    int const most = limits[i] < 0 ? count : std::min(count, tokens / (limits[i] + 1));
    lists.most.push_back(most);
    entries.emplace_back("entries", static_cast<size_t>(most));
    params.lists[i] = {&counts[i], entries[i].data(), limits[i], most};
  }
  if (retention::test::launch<SequenceLists>(params, 0)) {
    for (size_t i = 0; i < SequenceLists::kLists; ++i) {
      RETENTION_CHECK(counts[i] >= 0 && counts[i] <= lists.most[i]);
      lists.entries.emplace_back(entries[i].begin(), entries[i].begin() + counts[i]);
    }
  }
  return lists;
}

/// Sequences of a list, in memory that kernels may read.
struct Listed {
  GlobalArray<SequenceList::Entry> entries;
  GlobalArray<int> count;
  Sequences sequences;

  Listed(std::vector<SequenceList::Entry> const& list, int tokens, int all, int chunk_size,
         int whole_until)
      : entries("entries", list.size(), true), count("count", 1, true), sequences{} {
    std::copy(list.begin(), list.end(), entries.begin());
    count[0] = static_cast<int>(list.size());
    sequences = {{entries.data(), count.data()}, tokens, chunk_size, all, count[0], whole_until,
                 (whole_until + 63) / 64 * 64};
  }
};

/// What a warp finds for every number of a tile of some tokens, or, of 0, of a chunk.
struct Find {
  static constexpr int kThreads = 32;
  struct SharedStorage {};
  struct Params {
    Sequences sequences;
    int tile;
    int count;
    PackedTiles::Tile* found;
  };
  static dim3 grid(Params const&) { return dim3(1); }
  void operator()(Params const& params, char*) const {
    Sequences const sequences = params.sequences;
    for (int number = 0; number < params.count; ++number) {
      PackedTiles::Tile found{};
      if (params.tile == 0) {
        auto const chunk = sequences.find(number);
        found = {chunk.sequence, chunk.index, 0};
      } else {
        found = PackedTiles{sequences, params.tile}.find(number);
      }
      if (threadIdx.x == 0) {
        params.found[number] = found;
      }
    }
  }
};

std::vector<PackedTiles::Tile> find_all(Sequences const& sequences, int tile, int count) {
  GlobalArray<PackedTiles::Tile> found("found", static_cast<size_t>(count));
  bool const ran = retention::test::launch<Find>({sequences, tile, count, found.data()}, 0);
  return ran ? std::vector<PackedTiles::Tile>(found.begin(), found.end())
             : std::vector<PackedTiles::Tile>{};
}

template <class Check>
void for_each_tile(Sequences const& sequences, int tile, Check check) {
  for (auto const& found : find_all(sequences, tile, PackedTiles{sequences, tile}.count())) {
    RETENTION_CHECK(found.sequence >= 0 && found.sequence < *sequences.list.count);
    auto const sequence = sequences.get(found.sequence);
    std::int64_t const start = std::int64_t{found.chunk} * sequence.chunk_size;
    std::int64_t const first = start + std::int64_t{found.index} * tile;
    if (first < std::min<std::int64_t>(start + sequence.chunk_size, sequence.length)) {
      check(found, sequence, first);
    }
  }
}

void run(std::vector<int> const& lengths, int lead, int tail, int chunk_size, int whole_until) {
  std::vector<int> bounds = {lead};
  for (int const length : lengths) {
    bounds.push_back(bounds.back() + length);
  }
  int const tokens = bounds.back() + tail;
  auto const all = static_cast<int>(lengths.size());
  Lists const lists = make(bounds, tokens, {-1, 0, chunk_size, whole_until});
  for (size_t i = 0; i < lists.entries.size(); ++i) {
    auto const& entries = lists.entries[i];
    size_t place = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      if (lengths[s] > lists.limits[i]) {
        RETENTION_CHECK(place < entries.size() && entries[place].index == static_cast<int>(s) &&
                        entries[place].first_token == bounds[s] &&
                        entries[place].length == lengths[s]);
        ++place;
      }
    }
    RETENTION_CHECK_EQUAL(place, entries.size());
    int const listed = static_cast<int>(entries.size());
    Listed const list(entries, tokens, all, chunk_size, whole_until);
    Sequences const& sequences = list.sequences;
    std::set<std::pair<int, int>> found;
    for (auto const& at : find_all(sequences, 0, listed > 0 ? sequences.num_chunks() : 0)) {
      auto const sequence = sequences.get(at.sequence);
      if (std::int64_t{at.chunk} * sequence.chunk_size < sequence.length) {
        RETENTION_CHECK(found.insert({sequence.index, at.chunk}).second);
      }
    }
    // Every chunk, and each kind of slots in order.
    size_t chunks_there = 0;
    std::int64_t free[3] = {};
    for (int p = 0; p < listed; ++p) {
      auto const sequence = sequences.get(p);
      RETENTION_CHECK(sequence.chunk_size % 64 == 0 && sequence.chunk_size > 0);
      RETENTION_CHECK(sequence.length > whole_until || sequence.length <= sequence.chunk_size);
      int const chunks = (sequence.length + sequence.chunk_size - 1) / sequence.chunk_size;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        chunks_there += found.count({sequence.index, chunk});
        for (Slots const slots : {Slots::kAll, Slots::kButFirst, Slots::kButLast}) {
          bool const none = (slots == Slots::kButFirst && chunk == 0) ||
                            (slots == Slots::kButLast && chunk == chunks - 1);
          std::int64_t& next = free[static_cast<int>(slots)];
          std::int64_t const slot = sequences.slot(sequence, chunk, slots);
          RETENTION_CHECK(none || slot >= next);
          next = none ? next : slot + 1;
        }
      }
    }
    RETENTION_CHECK_EQUAL(chunks_there, found.size());
    RETENTION_CHECK(free[0] <= sequences.num_slots());
    RETENTION_CHECK(std::max(free[1], free[2]) <= tokens / chunk_size);
    for (int const tile : {64, chunk_size, 42, 128}) {
      if (tile > chunk_size || listed == 0) {
        continue;
      }
      size_t rows = 0;
      std::set<std::pair<int, std::int64_t>> tiles;
      for_each_tile(sequences, tile, [&](auto const& at, auto const& sequence, std::int64_t first) {
        RETENTION_CHECK(tiles.insert({sequence.index, first}).second);
        std::int64_t const chunk_end = (std::int64_t{at.chunk} + 1) * sequence.chunk_size;
        std::int64_t const end = std::min<std::int64_t>(sequence.length, chunk_end);
        rows += static_cast<size_t>(std::min<std::int64_t>(tile, end - first));
      });
      size_t owned = 0;
      for (auto const& entry : entries) {
        owned += static_cast<size_t>(entry.length);
      }
      RETENTION_CHECK_EQUAL(rows, owned);
    }
  }
}

void run_random() {
  std::mt19937 rng(0);
  for (int round = 0; round < 60; ++round) {
    std::vector<int> lengths;
    int const count = 1 + static_cast<int>(rng() % (round % 10 == 0 ? 100 : 12));
    for (int i = 0; i < count; ++i) {
      lengths.push_back(static_cast<int>(rng() % 400) * (rng() % 3 != 0));
    }
    int const chunk_size = 64 * (1 + static_cast<int>(rng() % 4));
    int const whole_until = chunk_size + static_cast<int>(rng() % 200 * (rng() % 2));
    run(lengths, static_cast<int>(rng() % 100), static_cast<int>(rng() % 300), chunk_size,
        whole_until);
  }
}

// Whatever cu_seqlens holds, all is in bounds.
void run_unchecked() {
  std::mt19937 rng(1);
  for (int round = 0; round < 100; ++round) {
    std::vector<int> bounds;
    for (int i = 0; i < 20; ++i) {
      bounds.push_back(static_cast<int>(rng()) >> rng() % 31);
    }
    constexpr int kTokens = 1000;
    auto const all = static_cast<int>(bounds.size()) - 1;
    for (auto const& entries : make(bounds, kTokens, {-1, 0, 64, 300}).entries) {
      int const listed = static_cast<int>(entries.size());
      Listed const list(entries, kTokens, all, 64, 64);
      Sequences const& sequences = list.sequences;
      for (int p = 0; p < listed; ++p) {
        auto const sequence = sequences.get(p);
        RETENTION_CHECK(sequence.index >= 0 && sequence.index < all);
        RETENTION_CHECK(sequence.length >= 0 && sequence.first_token >= 0);
        RETENTION_CHECK(sequence.first_token + sequence.length <= kTokens);
        int const chunks = (sequence.length + 63) / 64;
        RETENTION_CHECK(sequence.first_slot + chunks <= sequences.num_slots());
        RETENTION_CHECK(sequences.slot(sequence, chunks - 1, Slots::kButFirst) < kTokens / 64 ||
                        chunks < 2);
      }
      if (listed > 0) {
        for_each_tile(sequences, 64, [](auto const& at, auto const&, std::int64_t first) {
          RETENTION_CHECK(at.chunk >= 0 && at.index >= 0 && first >= 0);
        });
      }
    }
  }
}

}  // namespace

RETENTION_TEST(sequence_lists) {
  run({5}, 0, 0, 64, 64);
  run({0, 0, 0}, 0, 7, 64, 64);
  run({0, 70, 0, 0, 300, 64, 65, 1, 0}, 0, 0, 64, 100);
  run(std::vector<int>(5000, 1), 3, 70, 128, 200);  // more than a block has threads for
  std::vector<int> empty(9000, 0);
  empty[0] = 400;
  empty[4097] = 1000;
  empty.back() = 3;
  run(empty, 0, 1000, 64, 500);
  run_random();
  run_unchecked();
}
