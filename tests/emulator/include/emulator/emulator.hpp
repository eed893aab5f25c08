// Runs a CUDA kernel on the CPU, thread by thread: every CUDA thread is a fiber, and a launch is
// one sequential, seeded, reproducible interleaving of them.
//
// A kernel is a struct with `SharedStorage`, `Params` and `operator()(Params const&, char* smem)`.
// Its translation unit is compiled with `-fsanitize=thread`, which makes the compiler announce
// every load and store; the emulator answers those announcements itself (no sanitizer library is
// linked) and so sees each access the kernel makes, through CuTe or through a plain pointer.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

/// What a launch can be stopped for.
enum class Fault {
  kNone,
  kOutOfBounds,       // an access outside the arrays, shared memory and stacks of the launch
  kMisaligned,        // an access whose address is not a multiple of its size
  kUninitialized,     // a load of a shared word that nobody has written
  kAsyncPending,      // a touch of a cp.async target before the matching wait
  kWarpgroupPending,  // a touch of an accumulator of wgmma before the matching wait
  kProxy,             // wgmma on what no fence.proxy.async of its writer followed
  kRace,              // two threads, one writing, with no barrier between; or two blocks, with
                      // no fences and atomic between
  kDivergence,        // lanes of a warp at different warp-wide instructions
  kDeadlock,          // a barrier that not every thread reaches, whether or not one waits there
  kCrash,             // a memory fault in code that was not compiled with instrumentation
};

char const* to_string(Fault fault);

struct Report {
  Fault fault = Fault::kNone;
  std::string text;  // what, which array or shared offset, which thread, which block, where

  bool ok() const { return fault == Fault::kNone; }
};

struct LaunchConfig {
  Dim3 grid;
  Dim3 block;
  std::size_t shared_bytes = 0;
  std::uint64_t seed = 0;
};

namespace detail {

void* allocate(std::size_t bytes, char const* name, bool read_only);
void release(void* data);
Report run(LaunchConfig const& config, void (*entry)(void const* params, char* smem),
           void const* params, std::size_t params_bytes);

}  // namespace detail

/// Memory of the emulated device. It ends at an unmapped page, starts after another, and every
/// access of a kernel must fall inside one such array. Fresh memory reads as NaN.
template <class T>
class GlobalArray {
 public:
  GlobalArray() = default;
  GlobalArray(char const* name, std::size_t size, bool read_only = false)
      : size_(size), data_(static_cast<T*>(detail::allocate(size * sizeof(T), name, read_only))) {}
  GlobalArray(GlobalArray&& other) noexcept
      : size_(std::exchange(other.size_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  GlobalArray& operator=(GlobalArray&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~GlobalArray() {
    if (data_ != nullptr) {
      detail::release(data_);
    }
  }

  T* data() { return data_; }
  T const* data() const { return data_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return data_[i]; }
  T const& operator[](std::size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  std::size_t size_ = 0;
  T* data_ = nullptr;
};

/// Runs `Kernel` over the grid and says what, if anything, was wrong. Stops at the first fault.
template <class Kernel>
Report launch(LaunchConfig const& config, typename Kernel::Params const& params) {
  return detail::run(
      config,
      [](void const* p, char* smem) {
        Kernel{}(*static_cast<typename Kernel::Params const*>(p), smem);
      },
      &params, sizeof(params));
}

// What the device built-ins and CuTe's instruction wrappers are made of. Called by fibers only.

Dim3 thread_index();
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();

/// bar.sync / bar.arrive: `threads` threads meet at barrier `id`; id 0 is __syncthreads.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void sync_threads();
void sync_warp(std::uint32_t mask);

enum class Shuffle { kIndex, kXor, kUp, kDown };
std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t value, int operand,
                      int width);
std::uint32_t ballot(std::uint32_t mask, bool predicate);

/// ldmatrix.m8n8.x{count}: lane 8 i + r passes row r of matrix i; out[i] is the lane's pair.
void load_matrix(void const* row, std::uint32_t* out, int count, bool transposed);
/// movmatrix.trans of one 8 x 8 matrix spread over the warp.
std::uint32_t transpose_matrix(std::uint32_t fragment);

enum class Element { kBFloat16, kFloat16 };
/// mma.m16n8k16 with fp32 accumulators.
void mma_16x8x16(Element type, std::uint32_t const (&a)[4], std::uint32_t const (&b)[2],
                 float const (&c)[4], float (&d)[4]);

/// cp.async: `source` is read now, `target` reads as NaN until the matching wait.
void copy_async(void const* source, void* target, std::size_t bytes, bool predicate);
void copy_async_commit();
/// Waits until at most `pending` committed groups remain; all of them and the open one if 0 with
/// `everything` set (cp.async.wait_all).
void copy_async_wait(int pending, bool everything);

/// Where in shared memory, which starts at a multiple of 1024, `pointer` points to.
std::uint32_t shared_address(void const* pointer);

/// fence.proxy.async: what this thread wrote to shared memory wgmma may read after a barrier.
void fence_proxy_async();

/// wgmma.fence, wgmma.commit_group and wgmma.wait_group.
void warpgroup_arrive();
void warpgroup_commit();
void warpgroup_wait(int pending);

/// wgmma.m64n{n}k16 with A in registers and fp32 accumulators, the lane's n / 2 at `d`: they read
/// as NaN until the matching wait, and so late B is read. `b` is its descriptor, `n_contiguous`
/// which of its dimensions is.
void warpgroup_mma(Element type, int n, bool n_contiguous, std::uint32_t const (&a)[4],
                   std::uint64_t b, float* d, bool adds);
/// The same with A in shared memory, its rows contiguous: `a` is its descriptor.
void warpgroup_mma(Element type, int n, bool n_contiguous, std::uint64_t a, std::uint64_t b,
                   float* d, bool adds);

/// fence.acq_rel of the device.
void thread_fence();

enum class Atomic { kAdd, kAddFloat, kIncrement, kExchange, kCompareExchange, kMax, kMaxSigned };
/// An atomic read-modify-write of 4 bytes of global memory; returns what was there. No race with
/// another one, and what a fence came before is released by it.
std::uint32_t atomic(Atomic operation, void* address, std::uint32_t operand,
                     std::uint32_t expected = 0);

}  // namespace emulator
