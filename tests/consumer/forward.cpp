// Power retention over one sequence, on a stream of the current device.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <retention/device/forward.hpp>
#include <retention/symmetric_power.hpp>
#include <string>
#include <vector>

namespace {

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
  return static_cast<T*>(memory);
}

template <class T>
T* copy_to_device(std::vector<T> const& host) {
  T* const memory = allocate<T>(host.size());
  check(cudaMemcpy(memory, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

std::vector<__nv_bfloat16> random_normal(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> result(count);
  for (__nv_bfloat16& x : result) {
    x = __float2bfloat16(normal(generator));
  }
  return result;
}

}  // namespace

int main() {
  using retention::device::Strides;
  constexpr int t = 4096, h = 2, hq = 8, d = 64, dv = 64;
  std::size_t const state_rows = static_cast<std::size_t>(retention::state_dim(d, 2));

  // Every token has the same value, channel / 64: so has, then, every average of values.
  std::vector<__nv_bfloat16> value(std::size_t{t} * h * dv);
  for (std::size_t i = 0; i < value.size(); ++i) {
    value[i] = __float2bfloat16(static_cast<float>(i % dv) / 64);
  }
  std::vector<float> const log_gate(std::size_t{t} * h, -0.01f);

  __nv_bfloat16* const output = allocate<__nv_bfloat16>(std::size_t{t} * hq * dv);

  retention::device::ForwardArguments a;
  a.element = retention::ElementType::kBFloat16;
  a.head_dim = d;
  a.value_dim = dv;
  a.sequences = 1;
  a.tokens = t;
  a.heads = h;
  a.query_heads = hq;
  a.query = copy_to_device(random_normal(std::size_t{t} * hq * d, 0));
  a.query_strides = Strides::contiguous(t, hq, d);
  a.key = copy_to_device(random_normal(std::size_t{t} * h * d, 1));
  a.key_strides = Strides::contiguous(t, h, d);
  a.value = copy_to_device(value);
  a.value_strides = Strides::contiguous(t, h, dv);
  a.log_gate = copy_to_device(log_gate);
  a.log_gate_strides = Strides::contiguous(t, h, 1);
  a.output = output;
  a.output_strides = Strides::contiguous(t, hq, dv);
  a.normalizer = allocate<float>(std::size_t{t} * hq);
  // What the sequence leaves behind: an initial state of a later call.
  a.final_state = allocate<float>(h * state_rows * dv);
  a.final_key_sum = allocate<float>(h * state_rows);

  check(retention::device::can_implement(a));
  char* const workspace = allocate<char>(retention::device::workspace_size(a));

  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  check(retention::device::run(a, workspace, stream));

  // Behind the kernels on the same stream. An error of a kernel shows here, too.
  std::vector<__nv_bfloat16> result(std::size_t{t} * hq * dv);
  check(cudaMemcpyAsync(result.data(), output, result.size() * sizeof(result[0]),
                        cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));

  float error = 0;
  for (std::size_t i = 0; i < result.size(); ++i) {
    float const difference = __bfloat162float(result[i]) - static_cast<float>(i % dv) / 64;
    error = std::isnan(difference) ? INFINITY : std::fmax(error, std::fabs(difference));
  }
  std::printf("%d tokens, %d query heads: largest error %.2g\n", t, hq, error);
  return error < 0.02f ? 0 : 1;  // outputs below 1 are rounded to 8 bits, weights before them too
}
