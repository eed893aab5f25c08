// How the compiled library was built.

#pragma once

#include <string>
#include <vector>

#include "retention/device/forward.hpp"

namespace retention::device {

/// Version of the CUDA toolkit, such as "13.0.88"; empty without CUDA.
RETENTION_API std::string toolkit_version();

/// What device code was compiled for: sm_NN is machine code, compute_NN is PTX. Empty without CUDA.
RETENTION_API std::vector<std::string> architectures();

}  // namespace retention::device
