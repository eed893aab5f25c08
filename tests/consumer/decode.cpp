// Prompts of several sequences, and then a token of each at a time, on a stream of the current
// device.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <retention/device/decode.hpp>
#include <retention/symmetric_power.hpp>
#include <string>
#include <vector>

namespace {

using Element = __nv_bfloat16;
using retention::device::SlotStrides;
using retention::device::Strides;

constexpr int kHeads = 2, kQueryHeads = 8, kDim = 64, kValueDim = 64;
constexpr int kSlots = 8, kWindow = 96;

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

void check(retention::device::Status const& status) {
  if (!status) {
    std::fprintf(stderr, "retention: %s\n", status.message().c_str());
    std::exit(1);
  }
}

template <class T>
T* allocate(std::size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)));
  check(cudaMemset(memory, 0, count * sizeof(T)));
  return static_cast<T*>(memory);
}

template <class T>
T* copy_to_device(std::vector<T> const& host) {
  T* const memory = allocate<T>(host.size());
  check(cudaMemcpy(memory, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

Element* random_normal(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<Element> result(count);
  for (Element& x : result) {
    x = __float2bfloat16(normal(generator));
  }
  return copy_to_device(result);
}

/// Of every token the same, channel / 64: so is, then, every average of values.
Element* values(std::size_t tokens) {
  std::vector<Element> result(tokens * kHeads * kValueDim);
  for (std::size_t i = 0; i < result.size(); ++i) {
    result[i] = __float2bfloat16(static_cast<float>(i % kValueDim) / 64);
  }
  return copy_to_device(result);
}

/// A slot's parts are one after the other here; they may lie anywhere.
retention::device::DecodePool make_pool() {
  std::size_t const rows = static_cast<std::size_t>(retention::state_dim(kDim, 2));
  std::size_t const heads = std::size_t{kSlots} * kHeads;
  auto const strides = [](std::size_t size) {
    return SlotStrides::contiguous(kHeads, static_cast<std::int64_t>(size));
  };
  retention::device::DecodePool pool;
  pool.head_dim = kDim;
  pool.value_dim = kValueDim;
  pool.heads = kHeads;
  pool.slots = kSlots;
  pool.ring = kWindow;
  pool.high = allocate<Element>(heads * rows * kValueDim);
  pool.high_strides = strides(rows * kValueDim);
  pool.low = allocate<std::int16_t>(heads * rows * kValueDim);
  pool.low_strides = pool.high_strides;
  pool.key_sum = allocate<float>(heads * rows);
  pool.key_sum_strides = strides(rows);
  pool.keys = allocate<Element>(heads * pool.ring * kDim);
  pool.keys_strides = strides(std::size_t{kWindow} * kDim);
  pool.values = allocate<Element>(heads * pool.ring * kValueDim);
  pool.values_strides = strides(std::size_t{kWindow} * kValueDim);
  pool.log_gates = allocate<float>(heads * pool.ring);
  pool.log_gates_strides = strides(kWindow);
  pool.cursors = allocate<retention::Cursor>(kSlots);  // zeros: all slots are empty
  return pool;
}

/// The tensors of a prefill or a step, of so many tokens of every row, or of all of them.
template <class Arguments>
void give_tokens(Arguments& a, int rows, int tokens, bool packed, unsigned seed) {
  std::size_t const all = packed ? tokens : static_cast<std::size_t>(rows) * tokens;
  a.rows = rows;
  a.tokens = tokens;
  a.query_heads = kQueryHeads;
  a.query = random_normal(all * kQueryHeads * kDim, seed);
  a.query_strides = Strides::contiguous(tokens, kQueryHeads, kDim);
  a.key = random_normal(all * kHeads * kDim, seed + 1);
  a.key_strides = Strides::contiguous(tokens, kHeads, kDim);
  a.value = values(all);
  a.value_strides = Strides::contiguous(tokens, kHeads, kValueDim);
  a.log_gate = copy_to_device(std::vector<float>(all * kHeads, -0.01f));
  a.log_gate_strides = Strides::contiguous(tokens, kHeads, 1);
  a.output = allocate<Element>(all * kQueryHeads * kValueDim);
  a.output_strides = Strides::contiguous(tokens, kQueryHeads, kValueDim);
}

/// Behind the kernels on the same stream: how far outputs are from what they should be, squared, on
/// average.
double squared_error(void const* output, std::size_t tokens, cudaStream_t stream) {
  std::vector<Element> result(tokens * kQueryHeads * kValueDim);
  check(cudaMemcpyAsync(result.data(), output, result.size() * sizeof(Element),
                        cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  double error = 0;
  for (std::size_t i = 0; i < result.size(); ++i) {
    double const difference = __bfloat162float(result[i]) - static_cast<float>(i % kValueDim) / 64;
    error += difference * difference;
  }
  return error / static_cast<double>(result.size());
}

}  // namespace

int main() {
  constexpr int rows = 4;
  retention::device::DecodePool const pool = make_pool();
  int const* const slots = copy_to_device(std::vector<int>{5, 0, 3, 6});
  unsigned* const arrivals = allocate<unsigned>(std::size_t{rows} * (kHeads + 1));  // zeros
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  // Prompts end to end. All of their tokens go into the states.
  std::vector<int> const cu_seqlens{0, 700, 1100, 1500, 4096};
  retention::device::DecodePrefillArguments prompts;
  prompts.pool = pool;
  give_tokens(prompts, rows, cu_seqlens.back(), /*packed=*/true, 0);
  prompts.slots = slots;
  prompts.cu_seqlens = copy_to_device(cu_seqlens);
  prompts.arrivals = arrivals;
  check(retention::device::can_implement(prompts));
  check(retention::device::run(prompts, allocate<char>(workspace_size(prompts)), stream));
  double const of_prompts =
      squared_error(prompts.output, static_cast<std::size_t>(prompts.tokens), stream);

  // Then a token at a time. Every window of them is folded into the states.
  constexpr int steps = 300;
  retention::device::DecodeStepArguments step;
  step.pool = pool;
  give_tokens(step, rows * steps, 1, /*packed=*/false, 2);  // those of all steps
  auto const* const queries = static_cast<Element const*>(step.query);
  auto const* const keys = static_cast<Element const*>(step.key);
  step.rows = rows;
  step.slots = slots;
  step.window = kWindow;
  step.arrivals = arrivals;
  check(retention::device::can_implement(step));
  char* const workspace = allocate<char>(retention::device::workspace_size(step) + 1);
  double of_steps = 0;
  for (int i = 0; i < steps; ++i) {
    std::size_t const row = static_cast<std::size_t>(i) * rows;
    step.query = queries + row * kQueryHeads * kDim;
    step.key = keys + row * kHeads * kDim;
    check(retention::device::run(step, workspace, stream));
    of_steps += squared_error(step.output, rows, stream) / steps;
  }

  // Outputs below 1 are rounded to 8 bits, what they are made of before them too.
  double const error = std::sqrt(std::fmax(of_prompts, of_steps));
  std::printf("%d tokens of prompts, %d steps of %d sequences: error %.2g\n", prompts.tokens, steps,
              rows, error);
  return error < 0.01 ? 0 : 1;
}
