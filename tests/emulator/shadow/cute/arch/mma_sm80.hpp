// CuTe's mma.m16n8k16 wrappers with fp32 accumulators, answered by the emulator.

#pragma once

#define SM80_16x8x16_F32F16F16F32_TN SM80_16x8x16_F32F16F16F32_TN_device
#define SM80_16x8x16_F32BF16BF16F32_TN SM80_16x8x16_F32BF16BF16F32_TN_device
#include_next <cute/arch/mma_sm80.hpp>
#undef SM80_16x8x16_F32F16F16F32_TN
#undef SM80_16x8x16_F32BF16BF16F32_TN

#include "emulator/emulator.hpp"

namespace cute {

namespace emulated {

template <::emulator::Element Type>
struct Mma16x8x16 {
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];

  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t const& a0,
                  uint32_t const& a1, uint32_t const& a2, uint32_t const& a3, uint32_t const& b0,
                  uint32_t const& b1, float const& c0, float const& c1, float const& c2,
                  float const& c3) {
    uint32_t const a[4] = {a0, a1, a2, a3};
    uint32_t const b[2] = {b0, b1};
    float const c[4] = {c0, c1, c2, c3};
    float d[4];
    ::emulator::mma_16x8x16(Type, a, b, c, d);
    d0 = d[0];
    d1 = d[1];
    d2 = d[2];
    d3 = d[3];
  }
};

}  // namespace emulated

struct SM80_16x8x16_F32F16F16F32_TN : emulated::Mma16x8x16<::emulator::Element::kFloat16> {};
struct SM80_16x8x16_F32BF16BF16F32_TN : emulated::Mma16x8x16<::emulator::Element::kBFloat16> {};

}  // namespace cute
