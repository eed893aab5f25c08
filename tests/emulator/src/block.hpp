// One block of threads: its fibers, their meeting points, and its shared memory.

#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "emulator/emulator.hpp"
#include "emulator/fiber.hpp"
#include "memory.hpp"
#include "warpgroup.hpp"

namespace emulator::detail {

constexpr std::size_t kStackBytes = 256 << 10;  // of a fiber

/// What fences and atomics tell a thread of other blocks, and others of its own. Barriers join it.
struct FenceKnowledge {
  Blocks fenced;    // what happened before a fence, and an atomic now would release
  Blocks seen;      // what the atomics that were seen had released
  Blocks known;     // the same up to the last fence: it happened before what the thread does now
  Blocks unfenced;  // what would be known if there were a fence everywhere; for reports
};

struct AsyncCopy {
  char* target;
  std::size_t bytes;
  char data[16];
};

struct Thread {
  Context context;
  Dim3 index;
  int linear = 0;
  bool done = false;
  char const* waits_for = "";
  int waits_at = 0;  // which barrier, where it is one

  // Everything another thread did up to known[other] happens before what this thread does now.
  std::uint32_t clock = 1;
  std::shared_ptr<Knowledge const> known;
  std::shared_ptr<FenceKnowledge const> fences;  // null where neither fence nor atomic was met

  std::vector<std::uint32_t> proxy_fences;  // the clock at each

  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;
};

struct Warp {
  char const* operation = nullptr;  // what the lanes that arrived are in
  std::uint32_t mask = 0;
  std::uint32_t arrived = 0;
  void* operands[32] = {};
};

struct Barrier {
  int threads = 0;
  void* site = nullptr;  // of the __syncthreads() that the first thread came to
  std::vector<int> arrived;
  std::vector<int> waiting;
};

/// Combines the lanes' operands once all of them are there.
using Combine = void (*)(void* const* operands, std::uint32_t mask);

class Launch {
 public:
  Launch(LaunchConfig const& config, void (*entry)(void const*, char*), void const* params,
         std::size_t params_bytes);

  Report run();

  Thread& self() { return threads_[static_cast<std::size_t>(current_)]; }
  LaunchConfig const& config() const { return config_; }
  Dim3 block_index() const { return block_index_; }
  int num_threads() const { return static_cast<int>(threads_.size()); }

  /// `site` is where a __syncthreads() stands, which must be one place for the whole block; null
  /// for other barriers.
  void barrier(int id, int threads, bool wait, void* site);
  /// A warp-wide instruction: returns once every lane of `mask` has called it.
  void warp_collective(char const* operation, std::uint32_t mask, void* operand, Combine combine,
                       bool synchronizes);

  enum class Access { kLoad, kStore, kAtomic };
  /// One access of the running thread. `aligned` says that the machine needs it naturally aligned;
  /// `site` is its return address, for the report.
  void access(std::uintptr_t address, std::size_t bytes, Access kind, bool aligned, void* site) {
    if (address - stack_ >= kStackBytes) {
      access_memory(address, bytes, kind, aligned, site);
    } else if (accumulators_in_flight_ != 0) {
      check_accumulators(address, bytes, kind, site);
    }
  }
  /// Whether an access to `address` needs no check: most are to the running thread's own stack.
  bool is_own(std::uintptr_t address) const {
    return address - stack_ < kStackBytes && accumulators_in_flight_ == 0;
  }
  /// A load of shared memory that lane `receiver` as well as the calling one gets to see.
  void load_shared(std::uintptr_t address, std::size_t bytes, int receiver, char const* what,
                   void* site);
  void copy_async(std::uintptr_t source, std::uintptr_t target, std::size_t bytes, bool predicate,
                  void* site);
  void copy_async_wait(std::size_t pending, bool everything);

  /// Where in shared memory `address` is.
  std::uint32_t shared_address(std::uintptr_t address, void* site);
  void fence_proxy_async();
  void thread_fence();
  /// Of an atomic of the running thread, whose access has been checked: it sees what those before
  /// it released and, if it `stores`, releases.
  void exchange_releases(std::uintptr_t address, bool stores);
  /// The threads of a warpgroup meet, and order nothing.
  void warpgroup_arrive();
  // Of the running thread's warp, whose lanes have met.
  void warpgroup_start(void* const* calls);
  void warpgroup_commit();
  void warpgroup_wait(unsigned pending, void* site);

  [[noreturn]] void fail(Fault fault, std::string const& what, void* site = nullptr);
  /// Called in a signal handler.
  [[noreturn]] void crash(std::uintptr_t address, void* site);

  void thread_main();

 private:
  void run_block(unsigned linear);
  void check_barriers_are_met();
  void suspend(char const* why, int barrier = 0);
  void switch_to_next(Context& from);
  void exchange_knowledge(std::vector<int> const& from, std::vector<int> const& to);
  void join_fences(std::vector<int> const& from, std::vector<int> const& to);
  bool happened_before(Epoch epoch, Thread const& thread) const;
  std::uint64_t random();
  void check_alignment(std::uintptr_t address, std::size_t bytes, void* site);
  void access_memory(std::uintptr_t address, std::size_t bytes, Access kind, bool aligned,
                     void* site);
  void touch_shared(std::size_t offset, std::size_t bytes, bool store, bool async, void* site);
  void check_accumulators(std::uintptr_t address, std::size_t bytes, Access kind, void* site);
  void check_nothing_in_flight();
  bool fenced(Epoch write, Thread const& thread) const;
  void find_pieces(WarpgroupOperand const& operand, std::uint32_t* pieces, void* site);
  void check_pieces(WarpgroupProduct& product, int first, void* site);
  void finish_product(WarpgroupProduct& product, int first, void* site);
  void touch_global(Array& array, std::uintptr_t address, std::size_t bytes, Access kind,
                    bool aligned, void* site);
  void remember_read(SharedCell& cell, Knowledge const& known, int me, Epoch now);
  bool happened_before(std::uint32_t mark, Epoch epoch, Thread const& thread) const;
  void check_after_write(Array const& array, std::size_t cell, Access kind, void* site);
  void check_after_reads(Array& array, std::size_t cell, Access kind, void* site);
  void remember_read_of_many(Array& array, std::size_t cell);
  void remember_atomic(Array& array, std::size_t cell);
  [[noreturn]] void fail_race(Array const& array, std::size_t cell, char const* before,
                              std::uint32_t mark, Epoch epoch, Access kind, void* site);
  std::string missing_order(std::uint32_t mark, Epoch epoch) const;
  Blocks own_progress() const;
  Dim3 block_of(std::uint32_t mark) const;
  std::string deadlock_text() const;

  LaunchConfig config_;
  void (*entry_)(void const*, char*);
  std::uintptr_t params_;
  std::size_t params_bytes_;
  Report report_;

  Context main_;
  std::vector<Thread> threads_;
  std::vector<int> runnable_;
  int current_ = -1;
  int alive_ = 0;
  std::uint64_t random_state_;
  Dim3 block_index_;
  std::uint32_t block_mark_ = 0;  // 1 + linear block index
  bool atomics_seen_ = false;     // in any block
  std::vector<Warp> warps_;
  std::vector<Barrier> barriers_;
  std::vector<std::vector<int>> warpgroups_;      // who has arrived
  std::vector<WarpgroupQueue> warpgroup_queues_;  // of each warp
  std::vector<std::unique_ptr<WarpgroupProduct>> spare_products_;
  std::vector<std::unique_ptr<WarpgroupAccumulators>> spare_accumulators_;
  int accumulators_in_flight_ = 0;
  char* const stacks_;        // of all fibers
  std::uintptr_t stack_ = 0;  // lowest address of the running fiber's

  std::vector<char> shared_pages_;
  char* shared_ = nullptr;
  std::vector<SharedCell> cells_;
};

/// Whether it happened before what the thread `me`, which has this knowledge, does now.
inline bool happened_before(Epoch epoch, Knowledge const& known, int me) {
  return epoch.thread() == me || epoch.clock() <= known[static_cast<std::size_t>(epoch.thread())];
}

inline bool Launch::happened_before(Epoch epoch, Thread const& thread) const {
  return detail::happened_before(epoch, *thread.known, thread.linear);
}

inline void Launch::remember_read(SharedCell& cell, Knowledge const& known, int me, Epoch now) {
  // A read that happened before this one need not be kept: who follows this one follows it.
  Epoch* slot = nullptr;
  for (Epoch& read : cell.reads) {
    if (!read || detail::happened_before(read, known, me)) {
      slot = &read;
      break;
    }
  }
  *(slot != nullptr ? slot : &cell.reads[random() % SharedCell::kReads]) = now;
}

/// While one lives, announced accesses are the emulator's own and not the kernel's: the linker may
/// have chosen an instrumented copy of an inline function that both use.
class Inside {
 public:
  Inside() : before_(inside) { inside = true; }
  ~Inside() { inside = before_; }
  Inside(Inside const&) = delete;
  Inside& operator=(Inside const&) = delete;

  static bool inside;

 private:
  bool before_;
};

std::string to_text(Dim3 index);

extern Launch* active;  // the launch whose fibers are running, or null
Arrays& arrays();

}  // namespace emulator::detail
