// The Python module retention._C.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <climits>
#include <cstdint>
#include <retention/device/build_info.hpp>
#include <retention/device/forward.hpp>
#include <retention/symmetric_power.hpp>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

[[noreturn]] void raise_value_error(std::string const& message) {
  throw nb::value_error(message.c_str());
}

int check_degree(std::int64_t degree) {
  if (degree <= 0 || degree % 2 != 0 || degree > INT_MAX) {
    raise_value_error("degree: expected a positive even integer, got " + std::to_string(degree));
  }
  return static_cast<int>(degree);
}

int check_head_dim(std::int64_t head_dim, int degree) {
  if (head_dim <= 0 || head_dim % 8 != 0 || head_dim > INT_MAX) {
    raise_value_error("head_dim: expected a positive multiple of 8, got " +
                      std::to_string(head_dim));
  }
  if (!retention::is_supported(static_cast<int>(head_dim), degree)) {
    raise_value_error("head_dim, degree: expected a state whose rows fit 64-bit integers, got " +
                      std::to_string(head_dim) + " and " + std::to_string(degree));
  }
  return static_cast<int>(head_dim);
}

int block_width(std::int64_t degree) { return retention::block_width(check_degree(degree)); }

std::int64_t state_dim(std::int64_t head_dim, std::int64_t degree) {
  int const p = check_degree(degree);
  return retention::state_dim(check_head_dim(head_dim, p), p);
}

nb::tuple symmetric_power_row(std::int64_t row, std::int64_t head_dim, std::int64_t degree) {
  int const p = check_degree(degree);
  int const d = check_head_dim(head_dim, p);
  std::int64_t const rows = retention::state_dim(d, p);
  if (row < 0 || row >= rows) {
    raise_value_error("row: expected 0 <= row < " + std::to_string(rows) + ", got " +
                      std::to_string(row));
  }
  nb::list factors;
  for (int position = 0; position < p; ++position) {
    factors.append(retention::row_factor(row, position, d, p));
  }
  return nb::make_tuple(nb::tuple(factors), retention::row_multiplicity(row, d, p));
}

nb::dict build_info() {
  std::string const cutlass = RETENTION_CUTLASS_VERSION;
  std::string const toolkit = retention::device::toolkit_version();
  nb::list architectures;
  for (std::string const& architecture : retention::device::architectures()) {
    architectures.append(architecture);
  }
  nb::list kernels;
  for (auto const& configuration : retention::device::compiled_configurations()) {
    kernels.append("forward_" + retention::to_string(configuration));
  }
  auto const string_or_none = [](std::string const& text) {
    return text.empty() ? nb::object(nb::none()) : nb::cast(text);
  };
  nb::dict info;
  info["version"] = RETENTION_VERSION;
  info["compiler"] = RETENTION_COMPILER;
  info["cuda"] = !toolkit.empty();
  info["cuda_toolkit"] = string_or_none(toolkit);
  info["cuda_architectures"] = architectures;
  info["cutlass"] = string_or_none(cutlass);
  info["kernels"] = kernels;
  return info;
}

}  // namespace

NB_MODULE(_C, module) {
  module.doc() = "Compiled part of retention: the order of the state's rows, and the build.";

  module.def(
      "block_width", &block_width, "degree"_a,
      R"(Elements in one block of the symmetric power: 8 for degree 2, 2 for degree 4, else 1.

Raises ValueError unless `degree` is positive and even.)");

  module.def("state_dim", &state_dim, "head_dim"_a, "degree"_a = 2,
             R"(Rows of the state, D: C(blocks + degree - 1, degree) * width ** degree, with
width = block_width(degree) and blocks = head_dim / width. For degree 2 that is
head_dim * (head_dim + 8) / 2.

Raises ValueError unless `head_dim` is a positive multiple of 8, `degree` is
positive and even, and the rows fit 64-bit integers.)");

  module.def("symmetric_power_row", &symmetric_power_row, "row"_a, "head_dim"_a, "degree"_a = 2,
             nb::sig("def symmetric_power_row(row: int, head_dim: int, degree: int = 2) -> "
                     "tuple[tuple[int, ...], int]"),
             R"(What row `row` of a state holds: (factors, multiplicity).

The row of an expanded query is the product of x[i] for i in `factors`, of which
there are `degree`; that of an expanded key is the same times `multiplicity`.

Raises ValueError for a `row` outside [0, state_dim(head_dim, degree)), and for
what state_dim refuses.)");

  module.def("build_info", &build_info, nb::sig("def build_info() -> dict[str, object]"),
             R"(How this module was compiled, as a dict:

version             of the package
compiler            the C++ compiler's name and version
cuda                whether the CUDA part was built
cuda_toolkit        its version, or None without CUDA
cuda_architectures  what device code was compiled for: sm_NN is machine code,
                    compute_NN is PTX; empty without CUDA
cutlass             the version of CUTLASS found, or None
kernels             names of the compiled kernels; empty where there are none)");
}
