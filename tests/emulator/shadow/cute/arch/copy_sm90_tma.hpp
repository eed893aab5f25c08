// CuTe's fence.proxy.async.shared::cta, answered by the emulator.

#pragma once

#define tma_store_fence tma_store_fence_device
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef tma_store_fence

#include "emulator/emulator.hpp"

namespace cute {

inline void tma_store_fence() { ::emulator::fence_proxy_async(); }

}  // namespace cute
