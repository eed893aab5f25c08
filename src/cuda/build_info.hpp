#pragma once

#include <string>
#include <vector>

namespace retention::cuda {

// Version of the CUDA toolkit that compiled this library, such as "13.0.88".
std::string toolkit_version();

// What device code was compiled for: sm_NN is machine code, compute_NN is PTX.
std::vector<std::string> architectures();

}  // namespace retention::cuda
