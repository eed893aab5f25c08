// CuTe's ldmatrix wrappers, answered by the emulator.

#pragma once

#define SM75_U32x1_LDSM_N SM75_U32x1_LDSM_N_device
#define SM75_U32x2_LDSM_N SM75_U32x2_LDSM_N_device
#define SM75_U32x4_LDSM_N SM75_U32x4_LDSM_N_device
#define SM75_U16x2_LDSM_T SM75_U16x2_LDSM_T_device
#define SM75_U16x4_LDSM_T SM75_U16x4_LDSM_T_device
#define SM75_U16x8_LDSM_T SM75_U16x8_LDSM_T_device
#define SM75_U32x1_MOVM_T SM75_U32x1_MOVM_T_device
#include_next <cute/arch/copy_sm75.hpp>
#undef SM75_U32x1_LDSM_N
#undef SM75_U32x2_LDSM_N
#undef SM75_U32x4_LDSM_N
#undef SM75_U16x2_LDSM_T
#undef SM75_U16x4_LDSM_T
#undef SM75_U16x8_LDSM_T
#undef SM75_U32x1_MOVM_T

#include "emulator/emulator.hpp"

namespace cute {

namespace emulated {

template <bool Transposed>
struct LoadMatrix1 {
  using SRegisters = uint128_t[1];
  using DRegisters = uint32_t[1];

  static void copy(uint128_t const& smem_src, uint32_t& dst) {
    uint32_t out[1];
    ::emulator::load_matrix(&smem_src, out, 1, Transposed);
    dst = out[0];
  }
};

template <bool Transposed>
struct LoadMatrix2 {
  using SRegisters = uint128_t[1];
  using DRegisters = uint32_t[2];

  static void copy(uint128_t const& smem_src, uint32_t& dst0, uint32_t& dst1) {
    uint32_t out[2];
    ::emulator::load_matrix(&smem_src, out, 2, Transposed);
    dst0 = out[0];
    dst1 = out[1];
  }
};

template <bool Transposed>
struct LoadMatrix4 {
  using SRegisters = uint128_t[1];
  using DRegisters = uint32_t[4];

  static void copy(uint128_t const& smem_src, uint32_t& dst0, uint32_t& dst1, uint32_t& dst2,
                   uint32_t& dst3) {
    uint32_t out[4];
    ::emulator::load_matrix(&smem_src, out, 4, Transposed);
    dst0 = out[0];
    dst1 = out[1];
    dst2 = out[2];
    dst3 = out[3];
  }
};

}  // namespace emulated

// Structs, not aliases: CuTe's copy traits are specialised for each name.
struct SM75_U32x1_LDSM_N : emulated::LoadMatrix1<false> {};
struct SM75_U32x2_LDSM_N : emulated::LoadMatrix2<false> {};
struct SM75_U32x4_LDSM_N : emulated::LoadMatrix4<false> {};
struct SM75_U16x2_LDSM_T : emulated::LoadMatrix1<true> {};
struct SM75_U16x4_LDSM_T : emulated::LoadMatrix2<true> {};
struct SM75_U16x8_LDSM_T : emulated::LoadMatrix4<true> {};

struct SM75_U32x1_MOVM_T {
  using SRegisters = uint32_t[1];
  using DRegisters = uint32_t[1];

  static void copy(uint32_t src, uint32_t& dst) { dst = ::emulator::transpose_matrix(src); }
};

}  // namespace cute
