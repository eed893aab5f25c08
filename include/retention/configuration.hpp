// The configurations that kernels exist for. This table drives what is compiled, what is
// dispatched to, what an error message offers and what the tests run.

#pragma once

#include <cstddef>
#include <string>

namespace retention {

enum class ElementType { kBFloat16, kFloat16 };

/// A set of kernels is compiled for each.
struct Configuration {
  ElementType element;
  int head_dim;
  int value_dim;
  int degree;
};

// The build reads this table too: each entry is written out.
inline constexpr Configuration kConfigurations[] = {
    {ElementType::kBFloat16, 32, 32, 2},   {ElementType::kBFloat16, 32, 64, 2},
    {ElementType::kBFloat16, 32, 128, 2},  {ElementType::kBFloat16, 64, 32, 2},
    {ElementType::kBFloat16, 64, 64, 2},   {ElementType::kBFloat16, 64, 128, 2},
    {ElementType::kBFloat16, 128, 32, 2},  {ElementType::kBFloat16, 128, 64, 2},
    {ElementType::kBFloat16, 128, 128, 2}, {ElementType::kFloat16, 32, 32, 2},
    {ElementType::kFloat16, 32, 64, 2},    {ElementType::kFloat16, 32, 128, 2},
    {ElementType::kFloat16, 64, 32, 2},    {ElementType::kFloat16, 64, 64, 2},
    {ElementType::kFloat16, 64, 128, 2},   {ElementType::kFloat16, 128, 32, 2},
    {ElementType::kFloat16, 128, 64, 2},   {ElementType::kFloat16, 128, 128, 2},
};

constexpr bool operator==(Configuration const& a, Configuration const& b) {
  return a.element == b.element && a.head_dim == b.head_dim && a.value_dim == b.value_dim &&
         a.degree == b.degree;
}

inline char const* to_string(ElementType element) {
  return element == ElementType::kBFloat16 ? "bf16" : "fp16";
}

/// For example "bf16_d64_dv128_p2".
inline std::string to_string(Configuration const& c) {
  return std::string(to_string(c.element)) + "_d" + std::to_string(c.head_dim) + "_dv" +
         std::to_string(c.value_dim) + "_p" + std::to_string(c.degree);
}

}  // namespace retention
