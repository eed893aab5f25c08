// The emulated device, as src/device.cpp is the real one.

#include <cstdlib>

#include "compiled.hpp"

namespace retention::device {

// Few, so that segments of a short sequence have several chunks.
int multiprocessors() { return 4; }

// A test can take some of it away.
std::size_t shared_bytes() {
  char const* const bytes = std::getenv("RETENTION_EMULATED_SHARED_BYTES");
  return bytes == nullptr ? 227 * 1024 : std::strtoul(bytes, nullptr, 10);
}

bool may_have_warpgroups() { return false; }

}  // namespace retention::device
