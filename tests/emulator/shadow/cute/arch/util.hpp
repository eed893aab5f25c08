// CuTe's conversion of a pointer to a shared address, answered by the emulator.

#pragma once

#define cast_smem_ptr_to_uint cast_smem_ptr_to_uint_device
#include_next <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint

#include "emulator/emulator.hpp"

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(void const* ptr) { return ::emulator::shared_address(ptr); }

}  // namespace cute
