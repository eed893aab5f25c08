// The device built-ins and warp-wide instructions, and the compiler's announcements of accesses.

#include "emulator/emulator.hpp"

#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "block.hpp"
#include "elements.hpp"

#if defined(__x86_64__) && !defined(EMULATOR_USE_UCONTEXT)
// emulator_switch(from, to): saves the callee-saved registers and the stack pointer, and goes on
// where `to` was saved.
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

using detail::active;
using detail::bfloat16_value;
using detail::float16_value;
using detail::Inside;
using detail::Launch;

char const* to_string(Fault fault) {
  switch (fault) {
    case Fault::kNone:
      return "no fault";
    case Fault::kOutOfBounds:
      return "out of bounds";
    case Fault::kMisaligned:
      return "misaligned";
    case Fault::kUninitialized:
      return "uninitialized";
    case Fault::kAsyncPending:
      return "cp.async pending";
    case Fault::kWarpgroupPending:
      return "wgmma pending";
    case Fault::kProxy:
      return "no proxy fence";
    case Fault::kRace:
      return "race";
    case Fault::kDivergence:
      return "divergence";
    case Fault::kDeadlock:
      return "deadlock";
    case Fault::kCrash:
      return "crash";
  }
  return "unknown";
}

namespace detail {

namespace {

// The backstop for code without instrumentation: a guard page was hit.
void on_signal(int signal_number, siginfo_t* info, void*) {
  if (active == nullptr) {
    signal(signal_number, SIG_DFL);
    return;
  }
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal_number);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  Inside const guard;
  active->crash(reinterpret_cast<std::uintptr_t>(info->si_addr), nullptr);
}

class SignalGuard {
 public:
  SignalGuard() {
    static char stack[64 << 10];
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof(stack);
    sigaltstack(&alternate, &stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~SignalGuard() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  stack_t stack_;
  struct sigaction segv_, bus_;
};

}  // namespace

void* allocate(std::size_t bytes, char const* name, bool read_only) {
  return arrays().allocate(bytes, name, read_only);
}

void release(void* data) { arrays().release(data); }

Report run(LaunchConfig const& config, void (*entry)(void const*, char*), void const* params,
           std::size_t params_bytes) {
  if (active != nullptr) {
    throw std::logic_error("a launch inside a launch");
  }
  Launch launch(config, entry, params, params_bytes);
  SignalGuard const guard;
  active = &launch;
  Report report = launch.run();
  Inside::inside = true;
  active = nullptr;
  return report;
}

}  // namespace detail

Dim3 thread_index() {
  Inside const guard;
  return active->self().index;
}
Dim3 block_index() {
  Inside const guard;
  return active->block_index();
}
Dim3 block_dim() {
  Inside const guard;
  return active->config().block;
}
Dim3 grid_dim() {
  Inside const guard;
  return active->config().grid;
}

void barrier_sync(int id, int threads) {
  Inside const guard;
  active->barrier(id, threads, true, nullptr);
}
void barrier_arrive(int id, int threads) {
  Inside const guard;
  active->barrier(id, threads, false, nullptr);
}
void sync_threads() {
  Inside const guard;
  active->barrier(0, active->num_threads(), true, __builtin_return_address(0));
}
void sync_warp(std::uint32_t mask) {
  Inside const guard;
  active->warp_collective("__syncwarp", mask, nullptr, nullptr, true);
}

namespace {

constexpr std::uint32_t kFullWarp = 0xffffffffu;

template <class Operand>
void collective(char const* operation, std::uint32_t mask, Operand& operand,
                detail::Combine combine) {
  active->warp_collective(operation, mask, &operand, combine, false);
}

template <class Operand>
Operand& lane(void* const* operands, int i) {
  return *static_cast<Operand*>(operands[i]);
}

struct ShuffleOperand {
  std::uint64_t value;
  int operand, width;
  std::uint64_t result;
};

template <Shuffle Kind>
void combine_shuffle(void* const* operands, std::uint32_t mask) {
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) {
      continue;
    }
    auto& me = lane<ShuffleOperand>(operands, i);
    int const base = i / me.width * me.width;
    int source = i;
    if (Kind == Shuffle::kIndex) {
      source = base + (me.operand & (me.width - 1));
    } else if (Kind == Shuffle::kXor) {
      source = i ^ me.operand;
    } else if (Kind == Shuffle::kUp) {
      source = i - me.operand;
    } else {
      source = i + me.operand;
    }
    // A source beyond the segment leaves the lane its own value.
    if (source < base || source >= base + me.width) {
      source = i;
    }
    if ((mask >> source & 1) == 0) {
      active->fail(Fault::kDivergence,
                   "a shuffle reads lane " + std::to_string(source) + ", which does not take part");
    }
    me.result = lane<ShuffleOperand>(operands, source).value;
  }
}

}  // namespace

std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t value, int operand,
                      int width) {
  Inside const guard;
  ShuffleOperand mine{value, operand, width, 0};
  switch (kind) {
    case Shuffle::kIndex:
      collective("__shfl_sync", mask, mine, combine_shuffle<Shuffle::kIndex>);
      break;
    case Shuffle::kXor:
      collective("__shfl_xor_sync", mask, mine, combine_shuffle<Shuffle::kXor>);
      break;
    case Shuffle::kUp:
      collective("__shfl_up_sync", mask, mine, combine_shuffle<Shuffle::kUp>);
      break;
    case Shuffle::kDown:
      collective("__shfl_down_sync", mask, mine, combine_shuffle<Shuffle::kDown>);
      break;
  }
  return mine.result;
}

std::uint32_t ballot(std::uint32_t mask, bool predicate) {
  Inside const guard;
  struct Operand {
    bool predicate;
    std::uint32_t result;
  } mine{predicate, 0};
  collective("__ballot_sync", mask, mine, [](void* const* operands, std::uint32_t lanes) {
    std::uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) {
      if (lanes >> i & 1) {
        votes |= std::uint32_t{lane<Operand>(operands, i).predicate} << i;
      }
    }
    for (int i = 0; i < 32; ++i) {
      if (lanes >> i & 1) {
        lane<Operand>(operands, i).result = votes;
      }
    }
  });
  return mine.result;
}

void load_matrix(void const* row, std::uint32_t* out, int count, bool transposed) {
  Inside const guard;
  struct Operand {
    std::uint16_t const* row;
    std::uint32_t* out;
    int count;
    bool transposed;
  } mine{static_cast<std::uint16_t const*>(row), out, count, transposed};
  Launch& launch = *active;
  int const self = launch.self().linear;
  // Only the first 8 * count lanes' addresses are used.
  if (self % 32 < 8 * count) {
    auto const address = reinterpret_cast<std::uintptr_t>(row);
    if (address % 16 != 0) {
      launch.fail(Fault::kMisaligned, "ldmatrix row at an address that is no multiple of 16",
                  __builtin_return_address(0));
    }
    launch.load_shared(address, 16, self ^ 1, "ldmatrix", __builtin_return_address(0));
  }
  char const* const names[2][5] = {
      {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"},
      {"", "ldmatrix.x1.trans", "ldmatrix.x2.trans", "", "ldmatrix.x4.trans"}};
  collective(names[transposed][count], kFullWarp, mine, [](void* const* operands, std::uint32_t) {
    auto const& first = lane<Operand>(operands, 0);
    for (int m = 0; m < first.count; ++m) {
      for (int l = 0; l < 32; ++l) {
        // Element (g, 2t) and (g, 2t + 1), or the same of the transpose.
        int const g = l / 4, t = l % 4;
        std::uint32_t lo, hi;
        if (first.transposed) {
          lo = lane<Operand>(operands, 8 * m + 2 * t).row[g];
          hi = lane<Operand>(operands, 8 * m + 2 * t + 1).row[g];
        } else {
          lo = lane<Operand>(operands, 8 * m + g).row[2 * t];
          hi = lane<Operand>(operands, 8 * m + g).row[2 * t + 1];
        }
        lane<Operand>(operands, l).out[m] = lo | hi << 16;
      }
    }
  });
}

std::uint32_t transpose_matrix(std::uint32_t fragment) {
  Inside const guard;
  struct Operand {
    std::uint32_t in, out;
  } mine{fragment, 0};
  collective("movmatrix.trans", kFullWarp, mine, [](void* const* operands, std::uint32_t) {
    std::uint32_t matrix[8][8];
    for (int l = 0; l < 32; ++l) {
      std::uint32_t const in = lane<Operand>(operands, l).in;
      matrix[l / 4][2 * (l % 4)] = in & 0xffff;
      matrix[l / 4][2 * (l % 4) + 1] = in >> 16;
    }
    for (int l = 0; l < 32; ++l) {
      int const g = l / 4, t = l % 4;
      lane<Operand>(operands, l).out = matrix[2 * t][g] | matrix[2 * t + 1][g] << 16;
    }
  });
  return mine.out;
}

namespace {

struct MmaOperand {
  std::uint32_t a[4], b[2];
  float c[4], d[4];
};

// A [16, 16]: register i of lane (g, t) holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and next.
// B [16, 8]:  register i holds rows 2t + 8 i and next, column g.
// C [16, 8]:  register i holds row g + 8 (i / 2), column 2t + i % 2.
struct MmaTile {
  std::uint16_t a[16][16], b[16][8];
  float sum[16][8];
};

template <float (*Value)(std::uint32_t)>
[[gnu::always_inline]] inline void multiply(MmaTile& tile) {
  float a[16][16], b[16][8];
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      a[m][k] = Value(tile.a[m][k]);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) {
      b[k][n] = Value(tile.b[k][n]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) {
        sum[n] += a[m][k] * b[k][n];
      }
    }
    std::memcpy(tile.sum[m], sum, sizeof(sum));
  }
}

EMULATOR_VECTORS void multiply_bfloat16(MmaTile& tile) { multiply<bfloat16_value>(tile); }
EMULATOR_VECTORS void multiply_float16(MmaTile& tile) { multiply<float16_value>(tile); }

template <void (*Multiply)(MmaTile&)>
void combine_mma(void* const* operands, std::uint32_t) {
  MmaTile tile;
  for (int l = 0; l < 32; ++l) {
    auto const& in = lane<MmaOperand>(operands, l);
    int const g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        tile.a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] =
            static_cast<std::uint16_t>(in.a[i] >> 16 * half);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        tile.b[2 * t + 8 * i + half][g] = static_cast<std::uint16_t>(in.b[i] >> 16 * half);
      }
    }
  }
  Multiply(tile);
  for (int l = 0; l < 32; ++l) {
    auto& out = lane<MmaOperand>(operands, l);
    for (int i = 0; i < 4; ++i) {
      out.d[i] = out.c[i] + tile.sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
    }
  }
}

}  // namespace

void mma_16x8x16(Element type, std::uint32_t const (&a)[4], std::uint32_t const (&b)[2],
                 float const (&c)[4], float (&d)[4]) {
  Inside const guard;
  MmaOperand mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}, {}};
  if (type == Element::kBFloat16) {
    collective("mma.bf16", kFullWarp, mine, combine_mma<multiply_bfloat16>);
  } else {
    collective("mma.f16", kFullWarp, mine, combine_mma<multiply_float16>);
  }
  std::memcpy(d, mine.d, sizeof(mine.d));
}

void copy_async(void const* source, void* target, std::size_t bytes, bool predicate) {
  Inside const guard;
  active->copy_async(reinterpret_cast<std::uintptr_t>(source),
                     reinterpret_cast<std::uintptr_t>(target), bytes, predicate,
                     __builtin_return_address(0));
}

void copy_async_commit() {
  Inside const guard;
  auto& thread = active->self();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void copy_async_wait(int pending, bool everything) {
  Inside const guard;
  active->copy_async_wait(static_cast<std::size_t>(pending), everything);
}

std::uint32_t shared_address(void const* pointer) {
  Inside const guard;
  return active->shared_address(reinterpret_cast<std::uintptr_t>(pointer),
                                __builtin_return_address(0));
}

void fence_proxy_async() {
  Inside const guard;
  active->fence_proxy_async();
}

void warpgroup_arrive() {
  Inside const guard;
  active->warpgroup_arrive();
}

namespace {

void start_warpgroup_mma(detail::WarpgroupCall call) {
  // A name for each instruction: lanes that are at different ones diverge.
  static char const* const names[2][2][2][3] = {
      {{{"wgmma.n32.bf16", "wgmma.n64.bf16", "wgmma.n128.bf16"},
        {"wgmma.n32.bf16.trans", "wgmma.n64.bf16.trans", "wgmma.n128.bf16.trans"}},
       {{"wgmma.n32.f16", "wgmma.n64.f16", "wgmma.n128.f16"},
        {"wgmma.n32.f16.trans", "wgmma.n64.f16.trans", "wgmma.n128.f16.trans"}}},
      {{{"wgmma.ss.n32.bf16", "wgmma.ss.n64.bf16", "wgmma.ss.n128.bf16"},
        {"wgmma.ss.n32.bf16.trans", "wgmma.ss.n64.bf16.trans", "wgmma.ss.n128.bf16.trans"}},
       {{"wgmma.ss.n32.f16", "wgmma.ss.n64.f16", "wgmma.ss.n128.f16"},
        {"wgmma.ss.n32.f16.trans", "wgmma.ss.n64.f16.trans", "wgmma.ss.n128.f16.trans"}}}};
  char const* const name =
      names[call.a_is_shared][call.type != Element::kBFloat16][call.n_contiguous][call.n / 64];
  collective(name, kFullWarp, call,
             [](void* const* operands, std::uint32_t) { active->warpgroup_start(operands); });
}

}  // namespace

void warpgroup_mma(Element type, int n, bool n_contiguous, std::uint32_t const (&a)[4],
                   std::uint64_t b, float* d, bool adds) {
  Inside const guard;
  start_warpgroup_mma({{a[0], a[1], a[2], a[3]},
                       0,
                       b,
                       d,
                       adds,
                       type,
                       n,
                       n_contiguous,
                       false,
                       __builtin_return_address(0)});
}

void warpgroup_mma(Element type, int n, bool n_contiguous, std::uint64_t a, std::uint64_t b,
                   float* d, bool adds) {
  Inside const guard;
  start_warpgroup_mma(
      {{}, a, b, d, adds, type, n, n_contiguous, true, __builtin_return_address(0)});
}

void warpgroup_commit() {
  Inside const guard;
  active->warp_collective(
      "warpgroup_commit_batch()", kFullWarp, nullptr,
      [](void* const*, std::uint32_t) { active->warpgroup_commit(); }, false);
}

void warpgroup_wait(int pending) {
  Inside const guard;
  struct Operand {
    unsigned pending;
    void* site;
  } mine{static_cast<unsigned>(pending), __builtin_return_address(0)};
  collective("warpgroup_wait()", kFullWarp, mine, [](void* const* operands, std::uint32_t) {
    auto const& any = lane<Operand>(operands, 0);
    active->warpgroup_wait(any.pending, any.site);
  });
}

void thread_fence() {
  Inside const guard;
  active->thread_fence();
}

namespace {

std::uint32_t update(Atomic operation, std::uint32_t old, std::uint32_t operand) {
  switch (operation) {
    case Atomic::kAdd:
      return old + operand;
    case Atomic::kAddFloat: {
      float sum, term;
      std::memcpy(&sum, &old, sizeof(sum));
      std::memcpy(&term, &operand, sizeof(term));
      sum += term;
      std::memcpy(&old, &sum, sizeof(sum));
      return old;
    }
    case Atomic::kIncrement:
      return old >= operand ? 0 : old + 1;
    case Atomic::kExchange:
    case Atomic::kCompareExchange:
      return operand;
    case Atomic::kMax:
      return std::max(old, operand);
    case Atomic::kMaxSigned:
      return static_cast<std::int32_t>(old) < static_cast<std::int32_t>(operand) ? operand : old;
  }
  return old;
}

}  // namespace

std::uint32_t atomic(Atomic operation, void* address, std::uint32_t operand,
                     std::uint32_t expected) {
  Inside const guard;
  auto const place = reinterpret_cast<std::uintptr_t>(address);
  active->access(place, sizeof(operand), Launch::Access::kAtomic, /*aligned=*/true,
                 __builtin_return_address(0));
  std::uint32_t old;
  std::memcpy(&old, address, sizeof(old));
  // One that compares and finds something else is a load.
  bool const stores = operation != Atomic::kCompareExchange || old == expected;
  active->exchange_releases(place, stores);
  if (stores) {
    std::uint32_t const value = update(operation, old, operand);
    std::memcpy(address, &value, sizeof(value));
  }
  return old;
}

}  // namespace emulator

// The interface that `-fsanitize=thread` compiles against.
#define EMULATOR_ANNOUNCE(name, parameters, bytes, kind, aligned)                                \
  void __tsan_##name parameters {                                                                \
    auto const place = reinterpret_cast<std::uintptr_t>(address);                                \
    if (!::emulator::detail::Inside::inside && !::emulator::detail::active->is_own(place)) {     \
      ::emulator::detail::Inside const guard;                                                    \
      ::emulator::detail::active->access(place, bytes, ::emulator::detail::Launch::Access::kind, \
                                         aligned, __builtin_return_address(0));                  \
    }                                                                                            \
  }
#define EMULATOR_ANNOUNCE_SIZE(bytes)                                            \
  EMULATOR_ANNOUNCE(read##bytes, (void* address), bytes, kLoad, true)            \
  EMULATOR_ANNOUNCE(write##bytes, (void* address), bytes, kStore, true)          \
  EMULATOR_ANNOUNCE(volatile_read##bytes, (void* address), bytes, kLoad, true)   \
  EMULATOR_ANNOUNCE(volatile_write##bytes, (void* address), bytes, kStore, true) \
  EMULATOR_ANNOUNCE(unaligned_read##bytes, (void* address), bytes, kLoad, false) \
  EMULATOR_ANNOUNCE(unaligned_write##bytes, (void* address), bytes, kStore, false)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

EMULATOR_ANNOUNCE_SIZE(1)
EMULATOR_ANNOUNCE_SIZE(2)
EMULATOR_ANNOUNCE_SIZE(4)
EMULATOR_ANNOUNCE_SIZE(8)
EMULATOR_ANNOUNCE_SIZE(16)
EMULATOR_ANNOUNCE(read_range, (void* address, unsigned long bytes), bytes, kLoad, false)
EMULATOR_ANNOUNCE(write_range, (void* address, unsigned long bytes), bytes, kStore, false)

}  // extern "C"
