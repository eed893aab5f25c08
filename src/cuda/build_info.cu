#include "cuda/build_info.hpp"

#include <retention/symmetric_power.hpp>
#include <sstream>

#define RETENTION_STRINGIFY_VALUE(x) #x
#define RETENTION_STRINGIFY(x) RETENTION_STRINGIFY_VALUE(x)

namespace retention::cuda {

// The device compiler must read the state order exactly as the host compiler does: constants here,
// and in the function below the run-time forms, which it has to compile for the device.
static_assert(SymmetricPower<16, 2>::kStateDim == 192);
static_assert(SymmetricPower<256, 2>::kStateDim == 33792);
static_assert(SymmetricPower<16, 4>::kStateDim == 5280);
static_assert(SymmetricPower<64, 2>::factor(64 * 4 + 8 * 3 + 5, 0) == 11);
static_assert(SymmetricPower<64, 2>::factor(64 * 4 + 8 * 3 + 5, 1) == 21);
static_assert(SymmetricPower<64, 2>::multiplicity(64 * 4) == 2);

__device__ float expand_key_row(float const* key, std::int64_t row, int head_dim, int degree) {
  auto value = static_cast<float>(row_multiplicity(row, head_dim, degree));
  for (int position = 0; position < degree; ++position) {
    value *= key[row_factor(row, position, head_dim, degree)];
  }
  return value;
}

std::string toolkit_version() {
  return RETENTION_STRINGIFY(__CUDACC_VER_MAJOR__) "." RETENTION_STRINGIFY(
      __CUDACC_VER_MINOR__) "." RETENTION_STRINGIFY(__CUDACC_VER_BUILD__);
}

std::vector<std::string> architectures() {
  std::vector<std::string> result;
  std::stringstream names(RETENTION_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(names, name, ',');) {
    result.push_back(name);
  }
  if (result.empty()) {
    // The compiler's list has ten times the compute capability and does not say which are PTX.
    for (int const architecture : {__CUDA_ARCH_LIST__}) {
      result.push_back("sm_" + std::to_string(architecture / 10));
    }
  }
  return result;
}

}  // namespace retention::cuda
