// What every translation unit with kernels in it includes first, compiled once for all of them: the
// device built-ins, and CuTe.

#pragma once

#include "emulator/cuda.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cute/tensor.hpp>
#include <iostream>
#include <random>
#include <string>
#include <type_traits>
#include <vector>
