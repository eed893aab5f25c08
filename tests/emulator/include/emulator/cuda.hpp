// The device built-ins, for kernels compiled by a host compiler. Included ahead of everything else,
// by headers.hpp, so that kernel sources need not know.

#pragma once

// First: the runtime headers use words such as threadIdx as parameter names.
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "emulator/emulator.hpp"

#define RETENTION_EMULATOR 1

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())

inline void __syncthreads() { ::emulator::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulator::sync_warp(mask); }

namespace emulator::detail {

template <class T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator::detail

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return ::emulator::detail::shuffle_value(::emulator::Shuffle::kIndex, mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return ::emulator::detail::shuffle_value(::emulator::Shuffle::kXor, mask, value, lanes, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::emulator::detail::shuffle_value(::emulator::Shuffle::kUp, mask, value,
                                           static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return ::emulator::detail::shuffle_value(::emulator::Shuffle::kDown, mask, value,
                                           static_cast<int>(delta), width);
}

inline void __barrier_sync_count(unsigned barrier, unsigned threads) {
  ::emulator::barrier_sync(static_cast<int>(barrier), static_cast<int>(threads));
}
/// bar.arrive, for which CUDA has no function.
inline void __barrier_arrive_count(unsigned barrier, unsigned threads) {
  ::emulator::barrier_arrive(static_cast<int>(barrier), static_cast<int>(threads));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::emulator::ballot(mask, predicate != 0);
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return (__ballot_sync(mask, predicate) & mask) == mask;
}

// Caches are not modelled: what these say about them is not checked.
template <class T>
T __ldg(T const* address) {
  return *address;
}
template <class T>
T __ldcs(T const* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline void __threadfence() { ::emulator::thread_fence(); }
inline void __threadfence_system() { ::emulator::thread_fence(); }

namespace emulator::detail {

template <class T>
T atomic_value(Atomic operation, T* address, T value, T expected = T{}) {
  static_assert(sizeof(T) == 4, "atomics of 4 bytes alone are emulated");
  std::uint32_t operand, old;
  std::memcpy(&operand, &value, sizeof(T));
  std::memcpy(&old, &expected, sizeof(T));
  old = atomic(operation, address, operand, old);
  std::memcpy(&value, &old, sizeof(T));
  return value;
}

}  // namespace emulator::detail

inline int atomicAdd(int* address, int value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kAdd, address, value);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kAdd, address, value);
}
inline float atomicAdd(float* address, float value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kAddFloat, address, value);
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kIncrement, address, limit);
}
inline int atomicExch(int* address, int value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kExchange, address, value);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kExchange, address, value);
}
inline float atomicExch(float* address, float value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kExchange, address, value);
}
inline int atomicCAS(int* address, int expected, int value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kCompareExchange, address, value,
                                          expected);
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kCompareExchange, address, value,
                                          expected);
}
inline int atomicMax(int* address, int value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kMaxSigned, address, value);
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return ::emulator::detail::atomic_value(::emulator::Atomic::kMax, address, value);
}

// Launches never overlap here: the one before is complete, and what it wrote is visible.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
