// CuTe's wgmma wrappers with fp32 accumulators, answered by the emulator: of those with A in shared
// memory, 64 columns.

#pragma once

#define warpgroup_arrive warpgroup_arrive_device
#define warpgroup_wait warpgroup_wait_device
#define warpgroup_commit_batch warpgroup_commit_batch_device
#define MMA_64x32x16_F32F16F16_RS MMA_64x32x16_F32F16F16_RS_device
#define MMA_64x64x16_F32F16F16_RS MMA_64x64x16_F32F16F16_RS_device
#define MMA_64x128x16_F32F16F16_RS MMA_64x128x16_F32F16F16_RS_device
#define MMA_64x32x16_F32BF16BF16_RS MMA_64x32x16_F32BF16BF16_RS_device
#define MMA_64x64x16_F32BF16BF16_RS MMA_64x64x16_F32BF16BF16_RS_device
#define MMA_64x128x16_F32BF16BF16_RS MMA_64x128x16_F32BF16BF16_RS_device
#define MMA_64x64x16_F32F16F16_SS MMA_64x64x16_F32F16F16_SS_device
#define MMA_64x64x16_F32BF16BF16_SS MMA_64x64x16_F32BF16BF16_SS_device
#include_next <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch
#undef MMA_64x32x16_F32F16F16_RS
#undef MMA_64x64x16_F32F16F16_RS
#undef MMA_64x128x16_F32F16F16_RS
#undef MMA_64x32x16_F32BF16BF16_RS
#undef MMA_64x64x16_F32BF16BF16_RS
#undef MMA_64x128x16_F32BF16BF16_RS
#undef MMA_64x64x16_F32F16F16_SS
#undef MMA_64x64x16_F32BF16BF16_SS

#include "emulator/emulator.hpp"

namespace cute {

// warpgroup_fence_operand does nothing on a host: fma has given the emulator the registers'
// address.

inline void warpgroup_arrive() { ::emulator::warpgroup_arrive(); }

template <int N>
void warpgroup_wait() {
  static_assert(N >= 0 && N <= 7, "WGMMA wait: N must be in range [0, 7]");
  ::emulator::warpgroup_wait(N);
}

inline void warpgroup_commit_batch() { ::emulator::warpgroup_commit(); }

namespace emulated {

template <::emulator::Element Type, int N, bool kSharedA, SM90::GMMA::Major tnspA,
          SM90::GMMA::Major tnspB, SM90::GMMA::ScaleIn scaleA, SM90::GMMA::ScaleIn scaleB>
struct WarpgroupMma {
  static_assert(tnspA == SM90::GMMA::Major::K, "of A, rows are contiguous");
  static_assert(scaleA == SM90::GMMA::ScaleIn::One && scaleB == SM90::GMMA::ScaleIn::One,
                "negated operands are not emulated");

  using DRegisters = void;
  using ARegisters = cute::conditional_t<kSharedA, uint64_t[1], uint32_t[4]>;
  using BRegisters = uint64_t[1];
  using CRegisters = float[N / 2];

  /// `rest`: N / 2 accumulators, then maybe the ScaleOut. Inlined so that a report can name the
  /// line it is called from.
  template <class... Rest, bool kInRegisters = !kSharedA, enable_if_t<kInRegisters, int> = 0>
  __attribute__((always_inline)) static void fma(uint32_t const& a0, uint32_t const& a1,
                                                 uint32_t const& a2, uint32_t const& a3,
                                                 uint64_t const& desc_b, Rest&&... rest) {
    uint32_t const a[4] = {a0, a1, a2, a3};
    start(a, desc_b, rest...);
  }
  template <class... Rest, bool kIsShared = kSharedA, enable_if_t<kIsShared, int> = 0>
  __attribute__((always_inline)) static void fma(uint64_t const& desc_a, uint64_t const& desc_b,
                                                 Rest&&... rest) {
    start(desc_a, desc_b, rest...);
  }

 private:
  template <class A, class... Rest>
  __attribute__((always_inline)) static void start(A const& a, uint64_t const& desc_b,
                                                   Rest&... rest) {
    static_assert(sizeof...(Rest) == N / 2 || sizeof...(Rest) == N / 2 + 1, "the accumulators");
    Arguments arguments;
    (arguments.take(rest), ...);
    ::emulator::warpgroup_mma(Type, N, tnspB == SM90::GMMA::Major::MN, a, desc_b,
                              arguments.adjacent ? arguments.first : nullptr,
                              arguments.scale == SM90::GMMA::ScaleOut::One);
  }

  struct Arguments {
    float* first = nullptr;
    int count = 0;
    bool adjacent = true;
    SM90::GMMA::ScaleOut scale = SM90::GMMA::ScaleOut::One;

    void take(float& accumulator) {
      first = count == 0 ? &accumulator : first;
      adjacent = adjacent && &accumulator == first + count;
      ++count;
    }
    void take(SM90::GMMA::ScaleOut scale_out) { scale = scale_out; }
  };
};

}  // namespace emulated

namespace SM90::GMMA {

// Structs, not aliases: CuTe's traits are specialised for each name.
#define EMULATOR_WARPGROUP_MMA(name, type, n, shared_a)                                      \
  template <Major tnspA, Major tnspB, ScaleIn scaleA = ScaleIn::One,                         \
            ScaleIn scaleB = ScaleIn::One>                                                   \
  struct name : emulated::WarpgroupMma<::emulator::Element::type, n, shared_a, tnspA, tnspB, \
                                       scaleA, scaleB> {}
EMULATOR_WARPGROUP_MMA(MMA_64x32x16_F32F16F16_RS, kFloat16, 32, false);
EMULATOR_WARPGROUP_MMA(MMA_64x64x16_F32F16F16_RS, kFloat16, 64, false);
EMULATOR_WARPGROUP_MMA(MMA_64x128x16_F32F16F16_RS, kFloat16, 128, false);
EMULATOR_WARPGROUP_MMA(MMA_64x32x16_F32BF16BF16_RS, kBFloat16, 32, false);
EMULATOR_WARPGROUP_MMA(MMA_64x64x16_F32BF16BF16_RS, kBFloat16, 64, false);
EMULATOR_WARPGROUP_MMA(MMA_64x128x16_F32BF16BF16_RS, kBFloat16, 128, false);
EMULATOR_WARPGROUP_MMA(MMA_64x64x16_F32F16F16_SS, kFloat16, 64, true);
EMULATOR_WARPGROUP_MMA(MMA_64x64x16_F32BF16BF16_SS, kBFloat16, 64, true);
#undef EMULATOR_WARPGROUP_MMA

}  // namespace SM90::GMMA

}  // namespace cute
