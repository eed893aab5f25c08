// The state order computed on the GPU equals the one computed on the host. Exits with 77, which
// ctest reports as skipped, where there is no device to run on.

#include <cuda_runtime.h>

#include <cstdint>
#include <iostream>
#include <retention/symmetric_power.hpp>
#include <vector>

#include "check.hpp"

namespace {

constexpr int kSkipped = 77;

struct Row {
  int first;
  int last;
  std::int64_t multiplicity;
};

RETENTION_HOST_DEVICE Row describe(std::int64_t row, int head_dim, int degree) {
  return {retention::row_factor(row, 0, head_dim, degree),
          retention::row_factor(row, degree - 1, head_dim, degree),
          retention::row_multiplicity(row, head_dim, degree)};
}

// rows: [state_dim(head_dim, degree)]
__global__ void describe_rows(Row* rows, int head_dim, int degree) {
  std::int64_t const row = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row < retention::state_dim(head_dim, degree)) {
    rows[row] = describe(row, head_dim, degree);
  }
}

void test_rows(int head_dim, int degree) {
  std::int64_t const count = retention::state_dim(head_dim, degree);
  auto const bytes = static_cast<std::size_t>(count) * sizeof(Row);
  Row* device_rows = nullptr;
  RETENTION_CHECK_EQUAL(cudaMalloc(&device_rows, bytes), cudaSuccess);
  constexpr int kThreads = 128;
  auto const blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  describe_rows<<<blocks, kThreads>>>(device_rows, head_dim, degree);
  RETENTION_CHECK_EQUAL(cudaGetLastError(), cudaSuccess);
  std::vector<Row> rows(static_cast<std::size_t>(count));
  RETENTION_CHECK_EQUAL(cudaMemcpy(rows.data(), device_rows, bytes, cudaMemcpyDeviceToHost),
                        cudaSuccess);
  RETENTION_CHECK_EQUAL(cudaFree(device_rows), cudaSuccess);
  std::int64_t mismatches = 0;
  for (std::int64_t row = 0; row < count; ++row) {
    Row const expected = describe(row, head_dim, degree);
    Row const& actual = rows[static_cast<std::size_t>(row)];
    mismatches += actual.first != expected.first || actual.last != expected.last ||
                  actual.multiplicity != expected.multiplicity;
  }
  RETENTION_CHECK_EQUAL(mismatches, 0);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::cout << "skipped: no CUDA device\n";
    return kSkipped;
  }
  test_rows(64, 2);
  test_rows(256, 2);
  test_rows(16, 4);
  test_rows(8, 6);
  return retention::test::finish();
}
