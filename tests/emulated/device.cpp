// The emulated device, as src/device.cpp is the real one.

#include "compiled.hpp"

namespace retention::device {

// Few, so that segments of a short sequence have several chunks.
int multiprocessors() { return 4; }

}  // namespace retention::device
