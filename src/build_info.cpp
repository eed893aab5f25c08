// Compiled by the CUDA compiler where there is one.

#include "retention/device/build_info.hpp"

#include <sstream>

namespace retention::device {

#define RETENTION_STRINGIFY_VALUE(x) #x
#define RETENTION_STRINGIFY(x) RETENTION_STRINGIFY_VALUE(x)

std::string toolkit_version() {
#ifdef __CUDACC__
  return RETENTION_STRINGIFY(__CUDACC_VER_MAJOR__) "." RETENTION_STRINGIFY(
      __CUDACC_VER_MINOR__) "." RETENTION_STRINGIFY(__CUDACC_VER_BUILD__);
#else
  return {};
#endif
}

std::vector<std::string> architectures() {
  std::vector<std::string> result;
#ifdef __CUDACC__
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
#endif
  return result;
}

}  // namespace retention::device
