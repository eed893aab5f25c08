#include "block.hpp"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <stdexcept>

// Bounds of the image that this is part of, a program or a module, as the linker defines them:
// constants live there.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;

namespace emulator::detail {

Launch* active = nullptr;
bool Inside::inside = true;

Arrays& arrays() {
  static Arrays instance;
  return instance;
}

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kBarriers = 16;
constexpr char const* kBarrier = "barrier";

constexpr std::size_t kGuard = 4096;

// Stacks outlive a launch: mapping them again for each would cost more than most launches.
char* all_stacks() {
  static char* const pages = [] {
    std::size_t const bytes = kMaxThreads * (kStackBytes + kGuard);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(static_cast<char*>(memory) + static_cast<std::size_t>(i) * (kStackBytes + kGuard),
               kGuard, PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return pages;
}

char* stack_of(char* stacks, int thread) {
  return stacks + static_cast<std::size_t>(thread) * (kStackBytes + kGuard) + kGuard;
}

// The innermost source line at `site` that is not inside CuTe nor one of the emulator's built-ins;
// empty if it cannot be told.
std::string find_source_line(void* site) {
  Dl_info info;
  link_map* image = nullptr;
  if (dladdr1(site, &info, reinterpret_cast<void**>(&image), RTLD_DL_LINKMAP) == 0) {
    return "";
  }
  bool const is_program = image->l_name[0] == '\0';
  std::string const file =
      is_program ? "/proc/" + std::to_string(getpid()) + "/exe" : std::string(image->l_name);
  char offset[32];
  std::snprintf(
      offset, sizeof(offset), "0x%zx",
      static_cast<std::size_t>(reinterpret_cast<std::uintptr_t>(site) - image->l_addr - 1));
  std::string const command = "addr2line -i -e '" + file + "' " + offset + " 2>/dev/null";
  std::string found;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[1024];
    while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) {
      std::string line = buffer;
      line.erase(line.find_last_not_of("\r\n") + 1);
      bool const passed = line.find("/cute/") != std::string::npos ||
                          line.find("/emulator/cuda.hpp") != std::string::npos;
      if (found.empty() && !passed && line[0] != '?') {
        found = line.substr(line.find_last_of('/') + 1);
      }
    }
    pclose(pipe);
  }
  return found;
}

// Asks once for each place.
std::string source_line(void* site) {
  static std::map<void*, std::string> known{{nullptr, ""}};
  auto const [found, is_new] = known.try_emplace(site);
  if (is_new) {
    found->second = find_source_line(site);
  }
  return found->second;
}

char const* name_of(Launch::Access kind) {
  switch (kind) {
    case Launch::Access::kLoad:
      return "load";
    case Launch::Access::kStore:
      return "store";
    case Launch::Access::kAtomic:
      return "atomic";
  }
  return "access";
}

// Whether two places are one line of the source, of which the compiler made several copies.
bool same_line(void* one, void* other) {
  static std::map<std::pair<void*, void*>, bool> known;
  auto const [found, is_new] = known.try_emplace({one, other}, false);
  if (is_new) {
    found->second = source_line(one) == source_line(other);
  }
  return found->second;
}

}  // namespace

std::string to_text(Dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

Launch::Launch(LaunchConfig const& config, void (*entry)(void const*, char*), void const* params,
               std::size_t params_bytes)
    : config_(config),
      entry_(entry),
      params_(reinterpret_cast<std::uintptr_t>(params)),
      params_bytes_(params_bytes),
      random_state_(config.seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du),
      stacks_(all_stacks()) {
  std::size_t const n = std::size_t{config.block.x} * config.block.y * config.block.z;
  if (n == 0 || n > kMaxThreads) {
    throw std::invalid_argument("a block has 1 to 1024 threads");
  }
  threads_.resize(n);
  constexpr std::size_t kAlignment = 1024;
  shared_pages_.resize(config.shared_bytes + kAlignment);
  auto const base = reinterpret_cast<std::uintptr_t>(shared_pages_.data());
  shared_ = shared_pages_.data() + (kAlignment - base % kAlignment);
  cells_.resize(config.shared_bytes / kCellBytes + 1);
}

std::uint64_t Launch::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_ >> 11;
}

Report Launch::run() {
  Dim3 const grid = config_.grid;
  std::vector<unsigned> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[random() % i]);
  }
  arrays().forget_accesses();
  for (unsigned const block : order) {
    run_block(block);
    if (!report_.ok()) {
      break;
    }
  }
  return report_;
}

void Launch::run_block(unsigned linear) {
  Dim3 const block = config_.block;
  block_mark_ = linear + 1;
  block_index_ = block_of(block_mark_);
  std::memset(shared_, 0xff, config_.shared_bytes);
  std::fill(cells_.begin(), cells_.end(), SharedCell{});
  warps_.assign((threads_.size() + 31) / 32, Warp{});
  barriers_.assign(kBarriers, Barrier{});
  warpgroups_.assign((threads_.size() + kWarpgroupThreads - 1) / kWarpgroupThreads, {});
  warpgroup_queues_.clear();
  warpgroup_queues_.resize(warps_.size());
  auto const nothing = std::make_shared<Knowledge const>(threads_.size(), 0u);
  runnable_.clear();
  for (int i = 0; i < num_threads(); ++i) {
    auto const u = static_cast<unsigned>(i);
    Thread& thread = threads_[u];
    thread = Thread{};
    thread.linear = i;
    thread.index = {u % block.x, u / block.x % block.y, u / block.x / block.y};
    thread.known = nothing;
    thread.context.prepare(stack_of(stacks_, i), kStackBytes, [] { active->thread_main(); });
    runnable_.push_back(i);
  }
  alive_ = num_threads();
  switch_to_next(main_);
  if (report_.ok() && alive_ > 0) {
    report_ = {Fault::kDeadlock, deadlock_text()};
  }
  if (report_.ok()) {
    check_barriers_are_met();
  }
  if (report_.ok() && accumulators_in_flight_ != 0) {
    check_nothing_in_flight();
  }
}

// Whoever has arrived and gone on may have nobody who waits for it, but in vain.
void Launch::check_barriers_are_met() {
  for (std::size_t id = 0; id < barriers_.size(); ++id) {
    Barrier const& barrier = barriers_[id];
    if (!barrier.arrived.empty()) {
      report_ = {Fault::kDeadlock,
                 std::string(to_string(Fault::kDeadlock)) + ": block " + to_text(block_index_) +
                     " ends, seed " + std::to_string(config_.seed) + ", and at barrier " +
                     std::to_string(id) + " only " + std::to_string(barrier.arrived.size()) +
                     " of " + std::to_string(barrier.threads) + " threads have arrived."};
      return;
    }
  }
}

void Launch::thread_main() {
  auto const entry = entry_;
  auto const params = reinterpret_cast<void const*>(params_);
  char* const smem = shared_;
  Inside::inside = false;
  entry(params, smem);
  Inside::inside = true;
  Thread& thread = self();
  thread.done = true;
  --alive_;
  switch_to_next(thread.context);
}

// Continues some runnable thread, or the launch itself when none is left.
void Launch::switch_to_next(Context& from) {
  if (runnable_.empty()) {
    Context::switch_to(from, main_);
    return;
  }
  // Odd seeds mostly let one warp run as far ahead as it can; even ones shuffle fairly.
  std::uint64_t const r = random();
  bool const newest = config_.seed % 2 == 1 && r % 16 != 0;
  std::size_t const pick = newest ? runnable_.size() - 1 : (r >> 4) % runnable_.size();
  int const next = runnable_[pick];
  runnable_[pick] = runnable_.back();
  runnable_.pop_back();
  current_ = next;
  stack_ = reinterpret_cast<std::uintptr_t>(stack_of(stacks_, next));
  Context& to = self().context;
  if (&to != &from) {
    Context::switch_to(from, to);
  }
}

void Launch::suspend(char const* why, int barrier) {
  Thread& thread = self();
  thread.waits_for = why;
  thread.waits_at = barrier;
  switch_to_next(thread.context);
}

std::string Launch::deadlock_text() const {
  std::map<std::string, int> counts;
  for (Thread const& thread : threads_) {
    std::string why = thread.waits_for;
    if (why == kBarrier) {
      why += " " + std::to_string(thread.waits_at);
    }
    ++counts[thread.done ? "have returned" : "wait at " + why];
  }
  std::string text = std::string(to_string(Fault::kDeadlock)) + ": no thread can go on in block " +
                     to_text(block_index_) + ", seed " + std::to_string(config_.seed) + ":";
  for (auto const& [what, count] : counts) {
    text += " " + std::to_string(count) + " " + what + ";";
  }
  text.back() = '.';
  return text;
}

// What any of `from` did before now happens before what each of `to` does from now on.
void Launch::exchange_knowledge(std::vector<int> const& from, std::vector<int> const& to) {
  auto joined = std::make_shared<Knowledge>(threads_.size(), 0u);
  Knowledge const* previous = nullptr;
  for (int const t : from) {
    Thread const& thread = threads_[static_cast<std::size_t>(t)];
    // Threads that last met at the same place share what they learned there.
    if (thread.known.get() != previous) {
      previous = thread.known.get();
      for (std::size_t i = 0; i < joined->size(); ++i) {
        (*joined)[i] = std::max((*joined)[i], (*previous)[i]);
      }
    }
  }
  for (int const t : from) {
    auto const u = static_cast<std::size_t>(t);
    (*joined)[u] = std::max((*joined)[u], threads_[u].clock++);
  }
  for (int const t : to) {
    threads_[static_cast<std::size_t>(t)].known = joined;
  }
  join_fences(from, to);
}

void Launch::barrier(int id, int threads, bool wait, void* site) {
  if (id < 0 || id >= kBarriers || threads <= 0 || threads > num_threads() ||
      (threads % 32 != 0 && threads != num_threads())) {
    fail(Fault::kDivergence, "barrier " + std::to_string(id) + " for " + std::to_string(threads) +
                                 " threads, in a block of " + std::to_string(num_threads()));
  }
  Barrier& barrier = barriers_[static_cast<std::size_t>(id)];
  if (!barrier.arrived.empty() && barrier.threads != threads) {
    fail(Fault::kDivergence, "barrier " + std::to_string(id) + " expects " +
                                 std::to_string(barrier.threads) + " threads for some and " +
                                 std::to_string(threads) + " for others");
  }
  if (barrier.arrived.empty()) {
    barrier.site = site;
  } else if (barrier.site != site && !same_line(barrier.site, site)) {
    fail(Fault::kDivergence,
         "__syncthreads() here, where other threads are at " + source_line(barrier.site), site);
  }
  barrier.threads = threads;
  int const me = current_;
  barrier.arrived.push_back(me);
  if (wait) {
    barrier.waiting.push_back(me);
  }
  if (static_cast<int>(barrier.arrived.size()) == threads) {
    exchange_knowledge(barrier.arrived, barrier.waiting);
    for (int const t : barrier.waiting) {
      if (t != me) {
        runnable_.push_back(t);
      }
    }
    barrier = Barrier{};
    return;
  }
  if (wait) {
    suspend(kBarrier, id);
  }
}

void Launch::warp_collective(char const* operation, std::uint32_t mask, void* operand,
                             Combine combine, bool synchronizes) {
  int const me = current_;
  int const lane = me % 32, first = me - lane;
  Warp& warp = warps_[static_cast<std::size_t>(me / 32)];
  std::uint32_t const present =
      num_threads() - first >= 32 ? 0xffffffffu : (1u << (num_threads() - first)) - 1;
  mask &= present;
  if ((mask >> lane & 1) == 0) {
    fail(Fault::kDivergence, std::string(operation) + " called by a lane outside its mask");
  }
  if (warp.arrived != 0 && (warp.operation != operation || warp.mask != mask)) {
    fail(Fault::kDivergence, std::string("one lane is at ") + operation +
                                 " while others of its warp wait at " + warp.operation +
                                 (warp.operation == operation ? " with another mask" : ""));
  }
  warp.operation = operation;
  warp.mask = mask;
  warp.operands[lane] = operand;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    suspend(operation);
    return;
  }
  warp.arrived = 0;
  if (combine != nullptr) {
    combine(warp.operands, mask);
  }
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) != 0 && i != lane) {
      runnable_.push_back(first + i);
    }
  }
  if (synchronizes) {
    std::vector<int> lanes;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) {
        lanes.push_back(first + i);
      }
    }
    exchange_knowledge(lanes, lanes);
  }
}

void Launch::fail(Fault fault, std::string const& what, void* site) {
  std::string const line = source_line(site);
  report_ = {fault, std::string(to_string(fault)) + ": " + what + " [thread " +
                        to_text(self().index) + ", block " + to_text(block_index_) + ", seed " +
                        std::to_string(config_.seed) + (line.empty() ? "" : ", at " + line) + "]"};
  runnable_.clear();
  Context::switch_to(self().context, main_);
  __builtin_unreachable();
}

void Launch::crash(std::uintptr_t address, void* site) {
  fail(Fault::kCrash, "memory fault at " + arrays().locate(address), site);
}

void Launch::access_memory(std::uintptr_t address, std::size_t bytes, Access kind, bool aligned,
                           void* site) {
  bool const store = kind != Access::kLoad;
  auto const shared = reinterpret_cast<std::uintptr_t>(shared_);
  if (address - shared < config_.shared_bytes) {
    std::size_t const offset = address - shared;
    if (bytes > config_.shared_bytes - offset) {
      fail(Fault::kOutOfBounds, "access across the end of shared memory", site);
    }
    if (aligned) {
      check_alignment(address, bytes, site);
    }
    touch_shared(offset, bytes, store, /*async=*/false, site);
    return;
  }
  if (!store) {
    auto const image = reinterpret_cast<std::uintptr_t>(&__ehdr_start);
    if (address - params_ < params_bytes_ ||
        address - image < reinterpret_cast<std::uintptr_t>(&_end) - image) {
      return;
    }
  }
  if (Array* array = arrays().find(address)) {
    touch_global(*array, address, bytes, kind, aligned, site);
    return;
  }
  std::string const what = name_of(kind) + std::string(store ? " to " : " from ");
  std::uintptr_t const past_shared = address - shared - config_.shared_bytes;
  constexpr std::uintptr_t kNear = 1 << 16;
  if (past_shared < kNear || shared - address < kNear) {
    fail(Fault::kOutOfBounds,
         what + (past_shared < kNear
                     ? std::to_string(past_shared) + " bytes past the end of shared memory"
                     : std::to_string(shared - address) + " bytes before shared memory"),
         site);
  }
  fail(Fault::kOutOfBounds, what + arrays().locate(address), site);
}

void Launch::check_alignment(std::uintptr_t address, std::size_t bytes, void* site) {
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && address % bytes != 0) {
    fail(Fault::kMisaligned,
         std::to_string(bytes) + " bytes at an address that is " + std::to_string(address % bytes) +
             " past a multiple of them",
         site);
  }
}

void Launch::touch_shared(std::size_t offset, std::size_t bytes, bool store, bool async,
                          void* site) {
  Thread& thread = self();
  int const me = thread.linear;
  Epoch const now = Epoch::of(me, thread.clock);
  Knowledge const& known = *thread.known;
  auto where = [&](std::size_t cell) {
    return "shared memory at offset " + std::to_string(cell * kCellBytes);
  };
  for (std::size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    SharedCell& cell = cells_[i];
    if (cell.async_thread != 0) {
      fail(Fault::kAsyncPending,
           std::string(store ? "store to " : "load from ") + where(i) +
               ", the target of a cp.async of thread " + std::to_string(cell.async_thread - 1) +
               " that has not been waited for",
           site);
    }
    if (!store && !cell.write) {
      fail(Fault::kUninitialized, "load from " + where(i) + ", which nobody has written", site);
    }
    if (cell.write && !detail::happened_before(cell.write, known, me)) {
      fail(Fault::kRace,
           where(i) + ": written by thread " + std::to_string(cell.write.thread()) + " and " +
               (store ? "written" : "read") + " by thread " + std::to_string(thread.linear) +
               " with no barrier between",
           site);
    }
    if (store) {
      for (Epoch& read : cell.reads) {
        if (read && !detail::happened_before(read, known, me)) {
          fail(Fault::kRace,
               where(i) + ": read by thread " + std::to_string(read.thread()) +
                   " and written by thread " + std::to_string(thread.linear) +
                   " with no barrier between",
               site);
        }
        read = Epoch{};
      }
      cell.write = now;
      cell.async_thread = async ? static_cast<std::uint32_t>(thread.linear) + 1 : 0;
      continue;
    }
    remember_read(cell, known, me, now);
  }
}

std::uint32_t Launch::shared_address(std::uintptr_t address, void* site) {
  std::uintptr_t const offset = address - reinterpret_cast<std::uintptr_t>(shared_);
  if (offset >= config_.shared_bytes) {
    fail(Fault::kOutOfBounds, "the shared address of what is outside shared memory", site);
  }
  return static_cast<std::uint32_t>(offset);
}

void Launch::touch_global(Array& array, std::uintptr_t address, std::size_t bytes, Access kind,
                          bool aligned, void* site) {
  std::size_t const offset = address - reinterpret_cast<std::uintptr_t>(array.data);
  bool const store = kind != Access::kLoad;
  if (bytes > array.bytes - offset) {
    fail(Fault::kOutOfBounds,
         std::string(name_of(kind)) + " across the end of `" + array.name + "`", site);
  }
  if (store && array.read_only) {
    fail(Fault::kOutOfBounds,
         std::string(name_of(kind)) + " to `" + array.name + "` at byte " + std::to_string(offset) +
             ", an input",
         site);
  }
  if (aligned) {
    check_alignment(address, bytes, site);
  }
  if (array.read_only) {
    return;  // nobody writes it
  }
  array.touched = true;
  Thread& thread = self();
  Epoch const now = Epoch::of(thread.linear, thread.clock);
  for (std::size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    GlobalCell& cell = array.cells[i];
    if (cell.writer != 0 && !(cell.writer == block_mark_ && happened_before(cell.write, thread))) {
      check_after_write(array, i, kind, site);
    }
    if (store) {
      if (cell.reader != 0) {
        check_after_reads(array, i, kind, site);
      }
      if (kind == Access::kAtomic) {
        remember_atomic(array, i);
      } else {
        if (cell.writer == GlobalCell::kAtomic) {
          array.places.erase(i / kPlaceCells);
        }
        cell.writer = block_mark_;
        cell.write = now;
      }
    } else if (cell.reader == 0 || cell.reader == block_mark_) {
      cell.reader = block_mark_;
      bool const first = !cell.reads[0] || happened_before(cell.reads[0], thread);
      cell.reads[first ? 0 : 1] = now;
    } else {
      remember_read_of_many(array, i);
    }
  }
}

void Launch::load_shared(std::uintptr_t address, std::size_t bytes, int receiver, char const* what,
                         void* site) {
  auto const shared = reinterpret_cast<std::uintptr_t>(shared_);
  if (address - shared >= config_.shared_bytes) {
    fail(Fault::kOutOfBounds, std::string(what) + " outside shared memory", site);
  }
  access(address, bytes, Access::kLoad, /*aligned=*/true, site);
  Thread const& other = threads_[static_cast<std::size_t>(receiver)];
  std::size_t const cell = (address - shared) / kCellBytes;
  for (std::size_t i = cell; i < cell + bytes / kCellBytes; ++i) {
    if (!happened_before(cells_[i].write, other)) {
      fail(Fault::kRace,
           std::string(what) + " reads for lane " + std::to_string(receiver % 32) + " what lane " +
               std::to_string(cells_[i].write.thread() % 32) + " wrote with no __syncwarp between",
           site);
    }
  }
}

void Launch::copy_async(std::uintptr_t source, std::uintptr_t target, std::size_t bytes,
                        bool predicate, void* site) {
  AsyncCopy copy{reinterpret_cast<char*>(target), bytes, {}};
  if (predicate) {
    if (arrays().find(source) == nullptr) {
      fail(Fault::kOutOfBounds, "cp.async from " + arrays().locate(source), site);
    }
    access(source, bytes, Access::kLoad, /*aligned=*/true, site);
    std::memcpy(copy.data, reinterpret_cast<void const*>(source), bytes);
  }
  std::size_t const offset = target - reinterpret_cast<std::uintptr_t>(shared_);
  if (offset >= config_.shared_bytes || bytes > config_.shared_bytes - offset) {
    fail(Fault::kOutOfBounds, "cp.async to an address outside shared memory", site);
  }
  check_alignment(target, bytes, site);
  touch_shared(offset, bytes, /*store=*/true, /*async=*/true, site);
  std::memset(copy.target, 0xff, bytes);
  self().open_copies.push_back(copy);
}

void Launch::copy_async_wait(std::size_t pending, bool everything) {
  Thread& thread = self();
  if (everything) {
    thread.copy_groups.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
  }
  while (thread.copy_groups.size() > pending) {
    for (AsyncCopy const& copy : thread.copy_groups.front()) {
      std::memcpy(copy.target, copy.data, copy.bytes);
      auto const first = static_cast<std::size_t>(copy.target - shared_) / kCellBytes;
      for (std::size_t i = first; i < first + copy.bytes / kCellBytes; ++i) {
        // From here on it is this thread's own store, which others see after a barrier.
        cells_[i].write = Epoch::of(thread.linear, thread.clock);
        cells_[i].async_thread = 0;
      }
    }
    thread.copy_groups.pop_front();
  }
}

}  // namespace emulator::detail
