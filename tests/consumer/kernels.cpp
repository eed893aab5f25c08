// retention::kernels adds CUTLASS to the headers. Its users compile kernels, with a compiler for
// CUDA; here it is enough that both are found.

#include <cutlass/version.h>

#include <cstdio>
#include <retention/symmetric_power.hpp>

static_assert(CUTLASS_MAJOR >= 4);

int main() {
  std::printf("CUTLASS %d.%d\n", CUTLASS_MAJOR, CUTLASS_MINOR);
  return retention::state_dim(128, 2) == 8704 ? 0 : 1;
}
