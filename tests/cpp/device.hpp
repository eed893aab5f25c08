// Where a test of the host API runs: on the emulator, which the build has included ahead of
// everything else, or on a CUDA device.

#pragma once

#include <cstdint>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "retention/device/backward.hpp"
#include "retention/device/decode.hpp"
#include "retention/device/forward.hpp"

#ifdef RETENTION_EMULATOR
#include "emulator/emulator.hpp"
#include "retention/device/backward_plan.hpp"
#include "retention/device/decode_plan.hpp"
#include "retention/device/forward_plan.hpp"
#else
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
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

// Of host_kernels.hpp, which may be compiled apart, for all tests of a configuration to share.
std::vector<Configuration> configurations();
/// Of a plan; or of a call's arguments, where it takes no workspace and needs no plan.
template <class Plan>
device::Status run_kernels(Plan const& plan, void* workspace, std::uint64_t seed);
/// The kernels of a backward plan that serve a gradient, a letter each. None is run.
template <class Plan>
device::Status record_kernels(Plan const& plan, std::string& kernels);

using Memory = emulator::GlobalArray<char>;
inline constexpr int kMultiprocessors = 4;

inline auto plan(device::ForwardArguments const& arguments) {
  return device::ForwardPlan::make(arguments, kMultiprocessors);
}
inline auto plan(device::BackwardArguments const& arguments) {
  return device::BackwardPlan::make(arguments, kMultiprocessors);
}
inline auto plan(device::DecodeStepArguments const& arguments) {
  return device::DecodeStepPlan::make(arguments, kMultiprocessors);
}
inline auto plan(device::DecodePrefillArguments const& arguments) {
  return device::DecodePrefillPlan::make(arguments, kMultiprocessors);
}

template <class Arguments>
std::size_t workspace_bytes(Arguments const& arguments) {
  return plan(arguments).workspace_bytes;
}

// A template, so that a test compiles no kernels but those it runs.
template <class Arguments>
device::Status run(Arguments const& arguments, Memory& workspace, std::uint64_t seed) {
  return run_kernels(plan(arguments), workspace.data(), seed);
}

inline device::Status run_parts(device::ForwardArguments const& arguments,
                                device::OuterState const& earlier, Memory& workspace,
                                std::uint64_t seed) {
  using Part = device::ForwardPart;
  device::Status status;
  for (Part const part : {Part::kStates, Part::kCarry, Part::kOutput}) {
    auto in_part = plan(arguments);
    in_part.part = part;
    in_part.earlier = earlier;
    status = status ? run_kernels(in_part, workspace.data(), seed++) : status;
  }
  return status;
}
inline device::Status run_parts(device::BackwardArguments const& arguments,
                                device::OuterState const& later, Memory& workspace,
                                std::uint64_t seed) {
  using Part = device::BackwardPart;
  device::Status status;
  for (Part const part : {Part::kStateGradients, Part::kQueryGradient, Part::kKeyGradients}) {
    auto const in_part = device::BackwardPlan::make(arguments, kMultiprocessors, part, later);
    status = status ? run_kernels(in_part, workspace.data(), seed++) : status;
  }
  return status;
}
inline std::size_t parts_workspace_bytes(device::BackwardArguments const& arguments) {
  return device::BackwardPlan::make(arguments, kMultiprocessors,
                                    device::BackwardPart::kStateGradients)
      .workspace_bytes;
}

/// A call on slots that takes no workspace.
template <class Arguments>
device::Status run(Arguments const& arguments, std::uint64_t seed) {
  if constexpr (std::is_same_v<Arguments, device::DecodeFoldArguments>) {
    return run_kernels(device::DecodeFoldPlan::make(arguments, kMultiprocessors), nullptr, seed);
  } else {
    return run_kernels(arguments, nullptr, seed);
  }
}

/// A call that is made again and again with the same arguments; on a device by a graph.
class Repeated {
 public:
  template <class Arguments>
  device::Status run(Arguments const& arguments, Memory& workspace, std::uint64_t seed) {
    return test::run(arguments, workspace, seed);
  }
};

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

  std::size_t size() const { return host_.size(); }
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

/// Of the device. Bytes are 0xff at first: NaN.
class Memory {
 public:
  Memory(char const*, std::size_t bytes) {
    require(cudaMalloc(&data_, bytes));
    require(cudaMemset(data_, 0xff, bytes));
  }
  Memory(Memory const&) = delete;
  Memory& operator=(Memory const&) = delete;
  ~Memory() { cudaFree(data_); }

  char* data() { return data_; }

 private:
  char* data_ = nullptr;
};

template <class Arguments>
std::size_t workspace_bytes(Arguments const& arguments) {
  return device::workspace_size(arguments);
}

/// What the call said, or what went wrong when it ran.
inline device::Status finished(device::Status status) {
  cudaError_t const error = cudaDeviceSynchronize();
  return status && error != cudaSuccess ? device::Status(cudaGetErrorString(error)) : status;
}

template <class Arguments>
device::Status run(Arguments const& arguments, Memory& workspace, std::uint64_t) {
  return finished(device::run(arguments, workspace.data(), nullptr));
}

inline device::Status run_parts(device::ForwardArguments const& arguments,
                                device::OuterState const& earlier, Memory& workspace,
                                std::uint64_t) {
  // One after another: nvcc takes the assignment of a Status for one that is ignored.
  if (auto status = device::run_states(arguments, workspace.data(), nullptr); !status) {
    return finished(status);
  }
  if (auto status = device::run_carry(arguments, earlier, workspace.data(), nullptr); !status) {
    return finished(status);
  }
  return finished(device::run_output(arguments, workspace.data(), nullptr));
}
inline device::Status run_parts(device::BackwardArguments const& arguments,
                                device::OuterState const& later, Memory& workspace, std::uint64_t) {
  if (auto status = device::run_state_gradients(arguments, workspace.data(), nullptr); !status) {
    return finished(status);
  }
  if (auto status = device::run_query_gradient(arguments, workspace.data(), nullptr); !status) {
    return finished(status);
  }
  return finished(device::run_key_gradients(arguments, later, workspace.data(), nullptr));
}
inline std::size_t parts_workspace_bytes(device::BackwardArguments const& arguments) {
  return device::parts_workspace_size(arguments);
}

/// A call on slots that takes no workspace.
template <class Arguments>
device::Status run(Arguments const& arguments, std::uint64_t) {
  return finished(device::run(arguments, nullptr));
}

/// A call that is made again and again with the same arguments: once as it is, for kernels are
/// loaded then, and from the second time on by a graph.
class Repeated {
 public:
  Repeated() { require(cudaStreamCreate(&stream_)); }
  Repeated(Repeated const&) = delete;
  Repeated& operator=(Repeated const&) = delete;
  ~Repeated() {
    if (graph_ != nullptr) {
      cudaGraphExecDestroy(graph_);
    }
    cudaStreamDestroy(stream_);
  }

  template <class Arguments>
  device::Status run(Arguments const& arguments, Memory& workspace, std::uint64_t) {
    if (first_) {
      first_ = false;
      return finished(device::run(arguments, workspace.data(), stream_));
    }
    if (graph_ == nullptr) {
      cudaGraph_t captured = nullptr;
      require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
      device::Status const status = device::run(arguments, workspace.data(), stream_);
      require(cudaStreamEndCapture(stream_, &captured));
      if (!status) {
        return status;
      }
      require(cudaGraphInstantiate(&graph_, captured, 0));
      require(cudaGraphDestroy(captured));
    }
    require(cudaGraphLaunch(graph_, stream_));
    return finished({});
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  bool first_ = true;
};

#endif

/// Empty, or what went wrong.
template <class Arguments>
std::string run_forward(Arguments const& arguments, std::uint64_t seed) {
  Memory workspace("workspace", workspace_bytes(arguments) + 1);
  return run(arguments, workspace, seed).message();
}

/// The same in parts.
inline std::string run_forward_parts(device::ForwardArguments const& arguments,
                                     device::OuterState const& earlier, std::uint64_t seed) {
  Memory workspace("workspace", workspace_bytes(arguments) + 1);
  return run_parts(arguments, earlier, workspace, seed).message();
}

/// Forward and backward; `keeps` the workspace of forward, for its states. In parts, with what is
/// `later`.
template <class Arguments>
std::string run_backward(Arguments arguments, bool keeps, std::uint64_t seed,
                         device::OuterState const& later = {}) {
  Memory forward_workspace("forward workspace", workspace_bytes(arguments.forward) + 1);
  if (device::Status status = run(arguments.forward, forward_workspace, seed); !status) {
    return "forward: " + status.message();
  }
  arguments.forward_workspace = keeps ? forward_workspace.data() : nullptr;
  if (later.state != nullptr) {
    Memory workspace("workspace", parts_workspace_bytes(arguments) + 1);
    return run_parts(arguments, later, workspace, seed).message();
  }
  Memory workspace("workspace", workspace_bytes(arguments) + 1);
  return run(arguments, workspace, seed).message();
}

/// The main function of a test. Arguments, on a device: `unchecked` leaves out the long cases and
/// all comparisons, as a sanitizer needs it; anything else is a part of the name of the
/// configurations to run.
template <class Run>
int run_configurations(int count, char** arguments, Run run_configuration) {
  if (!device_available()) {
    std::cout << "skipped: no CUDA device\n";
    return 77;
  }
  bool unchecked = false;
  std::string wanted;
  for (int i = 1; i < count; ++i) {
    std::string const argument = arguments[i];
    unchecked = unchecked || argument == "unchecked";
    wanted = argument == "unchecked" ? wanted : argument;
  }
  for (Configuration const& configuration : configurations()) {
    if (to_string(configuration).find(wanted) != std::string::npos) {
      run_configuration(configuration, unchecked);
    }
  }
  return finish();
}

}  // namespace retention::test

#if defined(RETENTION_EMULATOR) && !defined(TEST_KERNELS_APART)
#include "host_kernels.hpp"
#endif
