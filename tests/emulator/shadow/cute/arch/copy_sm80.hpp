// CuTe's cp.async wrappers, answered by the emulator.

#pragma once

#define SM80_CP_ASYNC_CACHEALWAYS SM80_CP_ASYNC_CACHEALWAYS_device
#define SM80_CP_ASYNC_CACHEGLOBAL SM80_CP_ASYNC_CACHEGLOBAL_device
#define SM80_CP_ASYNC_CACHEALWAYS_ZFILL SM80_CP_ASYNC_CACHEALWAYS_ZFILL_device
#define SM80_CP_ASYNC_CACHEGLOBAL_ZFILL SM80_CP_ASYNC_CACHEGLOBAL_ZFILL_device
#define cp_async_fence cp_async_fence_device
#define cp_async_wait cp_async_wait_device
#include_next <cute/arch/copy_sm80.hpp>
#undef SM80_CP_ASYNC_CACHEALWAYS
#undef SM80_CP_ASYNC_CACHEGLOBAL
#undef SM80_CP_ASYNC_CACHEALWAYS_ZFILL
#undef SM80_CP_ASYNC_CACHEGLOBAL_ZFILL
#undef cp_async_fence
#undef cp_async_wait

#include "emulator/emulator.hpp"

namespace cute {

namespace emulated {

template <class TS, class TD, int MinBytes>
struct CopyAsync {
  static_assert(sizeof(TS) == sizeof(TD), "cp.async copies between values of one size");
  static_assert(sizeof(TS) == 4 || sizeof(TS) == 8 || sizeof(TS) == 16, "4, 8 or 16 bytes");
  static_assert(sizeof(TS) >= MinBytes, "cp.async.cg copies 16 bytes");

  using SRegisters = TS[1];
  using DRegisters = TD[1];

  static void copy(TS const& gmem_src, TD& smem_dst) {
    ::emulator::copy_async(&gmem_src, &smem_dst, sizeof(TS), true);
  }
};

template <class TS, class TD, int MinBytes>
struct CopyAsyncZfill : CopyAsync<TS, TD, MinBytes> {
  static void copy(TS const& gmem_src, TD& smem_dst, bool pred) {
    ::emulator::copy_async(&gmem_src, &smem_dst, sizeof(TS), pred);
  }
};

}  // namespace emulated

template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS : emulated::CopyAsync<TS, TD, 4> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL : emulated::CopyAsync<TS, TD, 16> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL : emulated::CopyAsyncZfill<TS, TD, 4> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL : emulated::CopyAsyncZfill<TS, TD, 16> {};

inline void cp_async_fence() { ::emulator::copy_async_commit(); }

template <int N>
void cp_async_wait() {
  ::emulator::copy_async_wait(N, N == 0);
}

template <int N>
void cp_async_wait(Int<N>) {
  cp_async_wait<N>();
}

}  // namespace cute
