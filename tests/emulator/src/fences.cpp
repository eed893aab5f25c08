// What orders blocks: fences, and the atomics between them. Blocks run one after the other, so an
// atomic has seen all that came before it, at its place.

#include <algorithm>

#include "block.hpp"

namespace emulator::detail {

namespace {

using Progress = std::shared_ptr<Knowledge const>;

void join(Progress& into, Progress const& from) {
  if (into == from) {
    return;
  }
  auto behind = [](Progress const& one, Progress const& other) {
    return one == nullptr || std::equal(one->begin(), one->end(), other->begin(),
                                        [](auto a, auto b) { return a <= b; });
  };
  if (behind(into, from)) {
    into = from;
  } else if (!behind(from, into)) {
    auto joined = std::make_shared<Knowledge>(*into);
    std::transform(joined->begin(), joined->end(), from->begin(), joined->begin(),
                   [](auto a, auto b) { return std::max(a, b); });
    into = std::move(joined);
  }
}

void join(Blocks& into, Blocks const& from) {
  for (auto const& [mark, progress] : from) {
    join(into[mark], progress);
  }
}

void join(FenceKnowledge& into, FenceKnowledge const& from) {
  join(into.fenced, from.fenced);
  join(into.seen, from.seen);
  join(into.known, from.known);
  join(into.unfenced, from.unfenced);
}

bool covers(Blocks const& blocks, std::uint32_t mark, Epoch epoch) {
  auto const found = blocks.find(mark);
  return found != blocks.end() &&
         epoch.clock() <= (*found->second)[static_cast<std::size_t>(epoch.thread())];
}

std::shared_ptr<FenceKnowledge> copy_of(std::shared_ptr<FenceKnowledge const> const& fences) {
  return fences == nullptr ? std::make_shared<FenceKnowledge>()
                           : std::make_shared<FenceKnowledge>(*fences);
}

}  // namespace

bool Launch::happened_before(std::uint32_t mark, Epoch epoch, Thread const& thread) const {
  return mark == block_mark_
             ? happened_before(epoch, thread)
             : thread.fences != nullptr && covers(thread.fences->known, mark, epoch);
}

// What in this block happens before what the running thread does next.
Blocks Launch::own_progress() const {
  Thread const& thread = threads_[static_cast<std::size_t>(current_)];
  auto progress = std::make_shared<Knowledge>(*thread.known);
  (*progress)[static_cast<std::size_t>(thread.linear)] = thread.clock;
  return {{block_mark_, std::move(progress)}};
}

void Launch::join_fences(std::vector<int> const& from, std::vector<int> const& to) {
  std::shared_ptr<FenceKnowledge const> first;
  std::shared_ptr<FenceKnowledge> joined;  // once there are two
  FenceKnowledge const* previous = nullptr;
  for (int const t : from) {
    auto const& fences = threads_[static_cast<std::size_t>(t)].fences;
    if (fences == nullptr || fences.get() == previous) {
      continue;
    }
    previous = fences.get();
    if (first == nullptr) {
      first = fences;
    } else if (fences != first) {
      if (joined == nullptr) {
        joined = copy_of(first);
      }
      join(*joined, *fences);
    }
  }
  if (first != nullptr) {
    for (int const t : to) {
      threads_[static_cast<std::size_t>(t)].fences = joined == nullptr ? first : joined;
    }
  }
}

void Launch::thread_fence() {
  Thread& thread = self();
  auto fences = copy_of(thread.fences);
  join(fences->known, fences->seen);
  // Threads of one block may meet at an atomic, too.
  auto const own = fences->known.find(block_mark_);
  if (own != fences->known.end()) {
    join(thread.known, own->second);
  }
  join(fences->fenced, fences->known);
  join(fences->fenced, own_progress());
  thread.fences = std::move(fences);
  ++thread.clock;
}

void Launch::exchange_releases(std::uintptr_t address, bool stores) {
  Array* const array = arrays().find(address);
  if (array == nullptr) {
    return;  // in shared memory barriers alone order
  }
  atomics_seen_ = true;
  Thread& thread = self();
  auto const start = reinterpret_cast<std::uintptr_t>(array->data);
  AtomicPlace& place = array->places[(address - start) / kPlaceBytes];
  auto fences = copy_of(thread.fences);
  join(fences->seen, place.released);
  join(fences->unfenced, place.unfenced);
  if (stores) {
    join(place.released, fences->fenced);
    join(fences->unfenced, own_progress());
    join(place.unfenced, fences->unfenced);
  }
  thread.fences = std::move(fences);
  ++thread.clock;
}

void Launch::remember_atomic(Array& array, std::size_t i) {
  Thread const& thread = self();
  GlobalCell& cell = array.cells[i];
  AtomicPlace& place = array.places[i / kPlaceCells];
  if (cell.writer != 0 && cell.writer != GlobalCell::kAtomic) {
    place.store_mark = cell.writer;
    place.store = cell.write;
  }
  place.mark = block_mark_;
  place.last = Epoch::of(thread.linear, thread.clock);
  cell.writer = GlobalCell::kAtomic;
}

void Launch::check_after_write(Array const& array, std::size_t i, Access kind, void* site) {
  Thread const& thread = self();
  GlobalCell const& cell = array.cells[i];
  if (cell.writer != GlobalCell::kAtomic) {
    if (!happened_before(cell.writer, cell.write, thread)) {
      fail_race(array, i, "written", cell.writer, cell.write, kind, site);
    }
    return;
  }
  auto const found = array.places.find(i / kPlaceCells);
  if (found == array.places.end()) {
    return;  // an ordinary store of the other half, in order, came since
  }
  AtomicPlace const& place = found->second;
  if (kind != Access::kAtomic) {
    // The last atomic has seen the others.
    if (!happened_before(place.mark, place.last, thread)) {
      fail_race(array, i, "touched by an atomic", place.mark, place.last, kind, site);
    }
  } else if (place.store && !happened_before(place.store_mark, place.store, thread)) {
    fail_race(array, i, "written", place.store_mark, place.store, kind, site);
  }
}

void Launch::check_after_reads(Array& array, std::size_t i, Access kind, void* site) {
  Thread const& thread = self();
  GlobalCell& cell = array.cells[i];
  if (cell.reader == GlobalCell::kMany) {
    fail_race(array, i, "read", 0, Epoch{}, kind, site);
  }
  auto check = [&](std::uint32_t mark, Epoch const(&reads)[GlobalCell::kReads]) {
    for (Epoch const read : reads) {
      if (read && !happened_before(mark, read, thread)) {
        fail_race(array, i, "read", mark, read, kind, site);
      }
    }
  };
  if (cell.reader == GlobalCell::kListed) {
    for (Reader const& reader : array.readers[i]) {
      check(reader.mark, reader.reads);
    }
    array.readers.erase(i);
  } else {
    check(cell.reader, cell.reads);
  }
  cell.reader = 0;
  for (Epoch& read : cell.reads) {
    read = Epoch{};
  }
}

// Of a cell that another block has read.
void Launch::remember_read_of_many(Array& array, std::size_t i) {
  Thread const& thread = self();
  GlobalCell& cell = array.cells[i];
  if (cell.reader == GlobalCell::kMany) {
    return;
  }
  if (!atomics_seen_) {
    cell.reader = GlobalCell::kMany;  // nothing will order them: no need to know who they were
    return;
  }
  std::vector<Reader>& readers = array.readers[i];
  if (cell.reader != GlobalCell::kListed) {
    Reader before{cell.reader, {}};
    std::copy(std::begin(cell.reads), std::end(cell.reads), before.reads);
    readers.push_back(before);
    cell.reader = GlobalCell::kListed;
  }
  if (readers.back().mark != block_mark_) {
    readers.push_back({block_mark_, {}});
  }
  Reader& mine = readers.back();
  bool const first = !mine.reads[0] || happened_before(mine.reads[0], thread);
  mine.reads[first ? 0 : 1] = Epoch::of(thread.linear, thread.clock);
}

Dim3 Launch::block_of(std::uint32_t mark) const {
  Dim3 const grid = config_.grid;
  unsigned const linear = mark - 1;
  return {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
}

void Launch::fail_race(Array const& array, std::size_t cell, char const* before, std::uint32_t mark,
                       Epoch epoch, Access kind, void* site) {
  char const* const now = kind == Access::kLoad    ? "read"
                          : kind == Access::kStore ? "written"
                                                   : "touched by an atomic";
  std::string text =
      "`" + array.name + "` at byte " + std::to_string(cell * kCellBytes) + ": " + before;
  if (mark == 0) {
    text += " by other blocks and " + std::string(now) + " by this one in the same launch";
  } else {
    text += " by thread " + std::to_string(epoch.thread());
    text += mark == block_mark_ ? "" : " of block " + to_text(block_of(mark));
    text += " and " + std::string(now) + " by thread " + std::to_string(self().linear);
    text += mark == block_mark_ ? " of the same block with no barrier between"
                                : " of this one in the same launch: " + missing_order(mark, epoch);
  }
  fail(Fault::kRace, text, site);
}

// Why what another block did does not happen before what the running thread does now.
std::string Launch::missing_order(std::uint32_t mark, Epoch epoch) const {
  auto const& fences = threads_[static_cast<std::size_t>(current_)].fences;
  if (fences != nullptr && covers(fences->seen, mark, epoch)) {
    return "no __threadfence() between this block's atomic and this access";
  }
  if (fences != nullptr && covers(fences->unfenced, mark, epoch)) {
    return "no __threadfence() between that access and the atomic of its block";
  }
  bool seen = false;
  for (Thread const& thread : threads_) {
    if (thread.fences != nullptr) {
      if (covers(thread.fences->unfenced, mark, epoch)) {
        return "no barrier between this block's atomic and this access";
      }
      seen = seen || thread.fences->unfenced.count(mark) != 0;
    }
  }
  return seen ? "that access was not before the atomic of its block, or with no barrier between"
              : "no atomic of this block came after one of that block at the same place";
}

}  // namespace emulator::detail
