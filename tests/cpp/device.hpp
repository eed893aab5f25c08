// Where a test of the host API runs: on the emulator, which the build has included ahead of
// everything else, or on a CUDA device.

#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "retention/device/forward.hpp"

#ifdef RETENTION_EMULATOR
#include "emulator/emulator.hpp"
#include "retention/device/forward_kernels.hpp"
#else
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <thread>
#endif

namespace retention::test {

#ifdef RETENTION_EMULATOR

inline constexpr bool kOnDevice = false;

/// One after the other: the emulator sees what threads do, and knows of none but its own.
template <class Body>
void parallel_for(std::size_t count, Body const& body) {
  for (std::size_t i = 0; i < count; ++i) {
    body(i);
  }
}

inline bool device_available() { return true; }

/// Memory that host and device see as one.
template <class T>
class Array : public emulator::GlobalArray<T> {
 public:
  using emulator::GlobalArray<T>::GlobalArray;
  T* upload() { return this->data(); }
  void download() {}
};

inline std::vector<Configuration> configurations() {
  constexpr bool kIsBFloat16 = std::is_same_v<cute::TEST_ELEMENT, cute::bfloat16_t>;
  return {{kIsBFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16, TEST_HEAD_DIM,
           TEST_VALUE_DIM, 2}};
}

struct EmulatorLauncher {
  std::uint64_t seed;

  template <class Kernel>
  device::Status launch(typename Kernel::Params const& params) const {
    dim3 const grid = Kernel::grid(params);
    emulator::LaunchConfig const config{
        {grid.x, grid.y, grid.z}, {Kernel::kThreads}, sizeof(typename Kernel::SharedStorage), seed};
    auto const report = emulator::launch<Kernel>(config, params);
    return report.ok() ? device::Status{} : device::Status{report.text};
  }
};

/// Empty, or what went wrong.
inline std::string run_forward(device::ForwardArguments const& arguments, std::uint64_t seed) {
  using Kernels = device::ForwardKernels<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>;
  constexpr int kMultiprocessors = 4;
  auto const plan = device::ForwardPlan::make(arguments, kMultiprocessors);
  emulator::GlobalArray<char> workspace("workspace", plan.workspace_bytes + 1);
  return Kernels::run(plan, workspace.data(), EmulatorLauncher{seed}).message();
}

#else

inline constexpr bool kOnDevice = true;

template <class Body>
void parallel_for(std::size_t count, Body const& body) {
  std::atomic<std::size_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (std::size_t index = next++; index < count; index = next++) {
        body(index);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

inline bool device_available() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

inline void require(cudaError_t error) {
  if (error != cudaSuccess) {
    std::cerr << "CUDA: " << cudaGetErrorString(error) << '\n';
    std::exit(1);
  }
}

/// An array of the host and one of the device. Bytes are 0xff at first: NaN.
template <class T>
class Array {
 public:
  Array(char const*, std::size_t size) : host_(size) {
    std::memset(host_.data(), 0xff, size * sizeof(T));
    require(cudaMalloc(&device_, size * sizeof(T)));
  }
  Array(Array const&) = delete;
  Array& operator=(Array const&) = delete;
  ~Array() { cudaFree(device_); }

  T& operator[](std::size_t i) { return host_[i]; }
  T* upload() {
    require(cudaMemcpy(device_, host_.data(), host_.size() * sizeof(T), cudaMemcpyHostToDevice));
    return device_;
  }
  void download() {
    require(cudaMemcpy(host_.data(), device_, host_.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }

 private:
  std::vector<T> host_;
  T* device_ = nullptr;
};

inline std::vector<Configuration> configurations() { return device::compiled_configurations(); }

inline std::string run_forward(device::ForwardArguments const& arguments, std::uint64_t) {
  std::size_t const bytes = device::workspace_size(arguments);
  Array<char> workspace("workspace", bytes + 1);
  char* const data = workspace.upload();
  device::Status const status = device::run(arguments, data, nullptr);
  cudaError_t const error = cudaDeviceSynchronize();
  return !status                ? status.message()
         : error != cudaSuccess ? cudaGetErrorString(error)
                                : std::string();
}

#endif

}  // namespace retention::test
