// What the host side of all passes checks of pointers and strides, and how it says so.

#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "retention/device/forward_plan.hpp"

namespace retention::device {

/// The beginning of a message.
inline std::string got(char const* name, std::int64_t value) {
  return std::string(name) + ": got " + std::to_string(value) + ", expected ";
}

/// Kernels copy rows of tensors so many bytes at a time.
inline constexpr int kRowBytes = 16;

inline bool is_aligned(void const* data, std::size_t bytes = kRowBytes) {
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
}

/// Whether rows that lie these strides apart, in elements, are aligned to one another.
inline bool are_aligned(std::initializer_list<std::int64_t> strides, int element_bytes) {
  bool aligned = true;
  for (std::int64_t const stride : strides) {
    aligned = aligned && stride % (kRowBytes / element_bytes) == 0;
  }
  return aligned;
}

inline Status check_rows(char const* name, void const* data, int element_bytes,
                         std::initializer_list<std::int64_t> strides) {
  if (is_aligned(data) && are_aligned(strides, element_bytes)) {
    return {};
  }
  return Status(std::string(name) +
                ": expected a 16-byte aligned pointer and strides that are multiples of " +
                std::to_string(kRowBytes / element_bytes));
}

/// What comes from somewhere else.
inline Status check_outer(char const* name, OuterState const& x) {
  bool const there = x.state != nullptr && x.key_sum != nullptr;
  return there && is_aligned(x.state) && is_aligned(x.key_sum)
             ? Status{}
             : Status(std::string(name) + ": expected two 16-byte aligned pointers, not null");
}

/// Of a call that needs so many bytes.
inline Status check_workspace(void const* workspace, std::size_t bytes) {
  bool const fits = workspace != nullptr && is_aligned(workspace, Regions::kAlignment);
  return bytes == 0 || fits ? Status{} : Status("workspace: expected memory aligned to 256 bytes");
}

}  // namespace retention::device
