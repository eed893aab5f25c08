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

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::emulator::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return (__ballot_sync(mask, predicate) & mask) == mask;
}

template <class T>
T __ldg(T const* address) {
  return *address;
}

inline float atomicAdd(float* address, float value) {
  return ::emulator::atomic_add(address, value);
}
inline int atomicAdd(int* address, int value) { return ::emulator::atomic_add(address, value); }

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
