// Every primitive of the emulator against its scalar definition.

#include <algorithm>
#include <cmath>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <cute/numeric/numeric_types.hpp>
#include <random>
#include <set>
#include <vector>

#include "check.hpp"
#include "emulator/emulator.hpp"

namespace {

using emulator::GlobalArray;
using emulator::LaunchConfig;
using emulator::Report;

constexpr int kSeeds = 4;

template <class Kernel>
void run(LaunchConfig config, typename Kernel::Params const& params) {
  Report const report = emulator::launch<Kernel>(config, params);
  RETENTION_CHECK_EQUAL(report.text, std::string());
}

// D = A B + C for row-major A [16, 16], B [16, 8], C and D [16, 8], by the layout in the PTX
// manual.
template <class T, class Mma>
struct MmaKernel {
  struct Params {
    T const* a;
    T const* b;
    float const* c;
    float* d;
  };
  void operator()(Params const& p, char*) const {
    int const group = threadIdx.x / 4, quad = threadIdx.x % 4;
    auto pair = [](T lo, T hi) { return uint32_t{lo.raw()} | uint32_t{hi.raw()} << 16; };
    uint32_t a[4], b[2];
    float c[4], d[4];
    for (int i = 0; i < 4; ++i) {
      T const* row = p.a + (group + 8 * (i % 2)) * 16 + 2 * quad + 8 * (i / 2);
      a[i] = pair(row[0], row[1]);
      c[i] = p.c[(group + 8 * (i / 2)) * 8 + 2 * quad + i % 2];
    }
    for (int i = 0; i < 2; ++i) {
      int const row = 2 * quad + 8 * i;
      b[i] = pair(p.b[row * 8 + group], p.b[(row + 1) * 8 + group]);
    }
    Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
    for (int i = 0; i < 4; ++i) {
      p.d[(group + 8 * (i / 2)) * 8 + 2 * quad + i % 2] = d[i];
    }
  }
};

/// Random operands of a product of K = 16 or a multiple of it, and what is added to it.
template <class T>
void fill(std::mt19937& rng, GlobalArray<T>& a, GlobalArray<T>& b, GlobalArray<float>& c) {
  std::normal_distribution<float> normal;
  // fp16 covers its denormals too: the last of 16 columns of A is tiny.
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] = T(normal(rng) * (i % 16 == 15 ? 1e-6f : 1.0f));
  }
  for (T& x : b) {
    x = T(normal(rng));
  }
  for (float& x : c) {
    x = normal(rng);
  }
}

template <class T, class Mma>
void test_mma() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    std::mt19937 rng(static_cast<unsigned>(seed));
    GlobalArray<T> a("a", 16 * 16, true), b("b", 16 * 8, true);
    GlobalArray<float> c("c", 16 * 8, true), d("d", 16 * 8);
    fill(rng, a, b, c);
    run<MmaKernel<T, Mma>>({{1}, {32}, 0, static_cast<std::uint64_t>(seed)},
                           {a.data(), b.data(), c.data(), d.data()});
    for (std::size_t m = 0; m < 16; ++m) {
      for (std::size_t n = 0; n < 8; ++n) {
        double sum = c[m * 8 + n], size = std::abs(sum);
        for (std::size_t k = 0; k < 16; ++k) {
          double const term = double(float(a[m * 16 + k])) * double(float(b[k * 8 + n]));
          sum += term;
          size += std::abs(term);
        }
        // 17 additions in fp32.
        RETENTION_CHECK(std::abs(d[m * 8 + n] - sum) <= 17 * 0x1p-24 * size);
      }
    }
  }
}

// D0 = C + A B and D1 = A[:, 0:16] B[0:16, :] for A [64 G, 32], B [32, N] and C and D [64 G, N], G
// warpgroups. Each of two groups of products adds to D0; what is in flight reads as NaN.
using Major = cute::SM90::GMMA::Major;

template <class T, int N, Major kMajor>
struct WarpgroupOperation;
template <int N, Major kMajor>
struct WarpgroupOperation<cute::bfloat16_t, N, kMajor> {
  using type = cute::conditional_t<
      N == 32, cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, kMajor>,
      cute::conditional_t<N == 64, cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, kMajor>,
                          cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, kMajor>>>;
};
template <int N, Major kMajor>
struct WarpgroupOperation<cute::half_t, N, kMajor> {
  using type = cute::conditional_t<
      N == 32, cute::SM90::GMMA::MMA_64x32x16_F32F16F16_RS<Major::K, kMajor>,
      cute::conditional_t<N == 64, cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, kMajor>,
                          cute::SM90::GMMA::MMA_64x128x16_F32F16F16_RS<Major::K, kMajor>>>;
};

// Of accumulators in flight nobody may know.
__attribute__((no_sanitize("thread"), noinline)) bool is_nan(float const* x) {
  return std::isnan(*static_cast<float const volatile*>(x));
}

template <class T, int N, Major kMajor, int RowBytes>
struct WarpgroupKernel {
  using Mma = typename WarpgroupOperation<T, N, kMajor>::type;

  static constexpr int kK = 32;
  static constexpr int kWidth = RowBytes / 2;  // elements of a row of B in shared memory
  // B is [N, k] or [k, N], and if rows are short, one [.., kWidth] after another; k are those that
  // fill a row, of which some before the first stay unused.
  static constexpr int kRows = kMajor == Major::K ? N : kK;
  static constexpr int kFirst = kMajor == Major::K ? kWidth - kK : 0;
  static constexpr int kColumns = kMajor == Major::K ? kWidth : N;
  static constexpr int kTile = 1024;  // where it is in shared memory
  static constexpr int kSharedBytes = kTile + 2 * kRows * kColumns;

  struct Params {
    T const* a;
    T const* b;
    float const* c;
    float* d;  // [2, 64 G, N]
    int* nan;  // [64 G]: accumulators that read as NaN where they should
  };

  static int byte_offset(int row, int column) {
    int const offset = column / kWidth * kRows * RowBytes + row * RowBytes + column % kWidth * 2;
    return offset ^ (offset / 128 % (RowBytes / 16) * 16);
  }

  void operator()(Params const& p, char* smem) const {
    int const thread = threadIdx.x, threads = blockDim.x, warp = thread / 32;
    int const group = thread % 32 / 4, quad = thread % 4;
    for (int i = thread; i < kK * N; i += threads) {
      int const k = i / N, n = i % N;
      int const offset = kMajor == Major::K ? byte_offset(n, kFirst + k) : byte_offset(k, n);
      *reinterpret_cast<T*>(smem + kTile + offset) = p.b[i];
    }
    uint32_t a[2][4];
    for (int i = 0; i < 8; ++i) {
      T const* row = p.a + (16 * warp + group + 8 * (i % 2)) * kK + 2 * quad + 8 * (i / 2);
      a[i / 4][i % 4] = uint32_t{row[0].raw()} | uint32_t{row[1].raw()} << 16;
    }
    float d[2][N / 2];
    auto at = [&](int i) {
      return (16 * warp + group + 8 * (i / 2 % 2)) * N + i / 4 * 8 + 2 * quad + i % 2;
    };
    for (int i = 0; i < N / 2; ++i) {
      d[0][i] = p.c[at(i)];
    }

    cute::GmmaDescriptor descriptor;
    descriptor.bitfield.start_address_ =
        cute::cast_smem_ptr_to_uint(smem + kTile + byte_offset(0, kFirst)) >> 4 & 0x3fff;
    descriptor.bitfield.leading_byte_offset_ = kRows * RowBytes >> 4;
    descriptor.bitfield.stride_byte_offset_ = 8 * RowBytes >> 4;
    descriptor.bitfield.layout_type_ = static_cast<uint8_t>(
        RowBytes == 128 ? cute::SM90::GMMA::LayoutType::B128 : cute::SM90::GMMA::LayoutType::B64);
    uint64_t const b[2] = {descriptor, descriptor + (kMajor == Major::K ? 32 : 16 * RowBytes) / 16};

    cute::tma_store_fence();
    __syncthreads();
    cute::warpgroup_arrive();
    multiply(a[0], b[0], d[0], cute::SM90::GMMA::ScaleOut::One, std::make_index_sequence<N / 2>{});
    multiply(a[0], b[0], d[1], cute::SM90::GMMA::ScaleOut::Zero, std::make_index_sequence<N / 2>{});
    cute::warpgroup_commit_batch();
    multiply(a[1], b[1], d[0], cute::SM90::GMMA::ScaleOut::One, std::make_index_sequence<N / 2>{});
    cute::warpgroup_commit_batch();
    bool nan = true;
    for (int i = 0; i < N / 2; ++i) {
      nan = nan && is_nan(&d[0][i]) && is_nan(&d[1][i]);
    }
    cute::warpgroup_wait<1>();
    for (int i = 0; i < N / 2; ++i) {
      p.d[threads / 2 * N + at(i)] = d[1][i];
      nan = nan && is_nan(&d[0][i]);
    }
    cute::warpgroup_wait<0>();
    for (int i = 0; i < N / 2; ++i) {
      p.d[at(i)] = d[0][i];
    }
    p.nan[thread] = nan;
  }

  template <size_t... I>
  static void multiply(uint32_t const (&a)[4], uint64_t b, float (&d)[N / 2],
                       cute::SM90::GMMA::ScaleOut scale, std::index_sequence<I...>) {
    Mma::fma(a[0], a[1], a[2], a[3], b, d[I]..., scale);
  }
};

template <class T, int N, Major kMajor, int RowBytes>
void test_warpgroup() {
  using Kernel = WarpgroupKernel<T, N, kMajor, RowBytes>;
  constexpr std::size_t kK = Kernel::kK;
  for (unsigned seed = 0; seed < 2; ++seed) {
    std::size_t const rows = 64 * (1 + seed);
    std::mt19937 rng(seed);
    GlobalArray<T> a("a", rows * kK, true), b("b", kK * N, true);
    GlobalArray<float> c("c", rows * N, true), d("d", 2 * rows * N);
    GlobalArray<int> nan("nan", 2 * rows);
    fill(rng, a, b, c);
    run<Kernel>({{1}, {static_cast<unsigned>(2 * rows)}, Kernel::kSharedBytes, seed},
                {a.data(), b.data(), c.data(), d.data(), nan.data()});
    for (std::size_t i = 0; i < 2 * rows * N; ++i) {
      bool const second = i >= rows * N;
      std::size_t const m = i / N % rows, n = i % N;
      double sum = second ? 0 : c[m * N + n], size = std::abs(sum);
      for (std::size_t k = 0; k < (second ? 16 : kK); ++k) {
        double const term = double(float(a[m * kK + k])) * double(float(b[k * N + n]));
        sum += term;
        size += std::abs(term);
      }
      RETENTION_CHECK(std::abs(d[i] - sum) <= 34 * 0x1p-24 * size);
    }
    for (int const x : nan) {
      RETENTION_CHECK(x);
    }
  }
}

template <class T>
void test_warpgroup() {
  test_warpgroup<T, 32, Major::K, 128>();
  test_warpgroup<T, 64, Major::K, 128>();
  test_warpgroup<T, 128, Major::K, 128>();
  test_warpgroup<T, 32, Major::K, 64>();
  test_warpgroup<T, 64, Major::K, 64>();
  test_warpgroup<T, 128, Major::K, 64>();
  test_warpgroup<T, 64, Major::MN, 128>();
  test_warpgroup<T, 128, Major::MN, 128>();
  test_warpgroup<T, 32, Major::MN, 64>();
  test_warpgroup<T, 64, Major::MN, 64>();
  test_warpgroup<T, 128, Major::MN, 64>();
}

// Loads Count matrices of distinct values; lane's register i goes to out[i * 32 + lane].
template <class Load, int Count>
struct LoadMatrixKernel {
  struct Params {
    uint32_t* out;
  };
  void operator()(Params const& p, char* smem) const {
    int const lane = threadIdx.x;
    auto* values = reinterpret_cast<uint16_t*>(smem);
    for (int i = lane; i < Count * 64; i += 32) {
      values[i] = static_cast<uint16_t>(1000 + i);
    }
    __syncwarp();
    // Lanes beyond the last row pass an address nobody may look at.
    auto const& row = *reinterpret_cast<cute::uint128_t const*>(values + 8 * lane);
    uint32_t r[Count];
    if constexpr (Count == 1) {
      Load::copy(row, r[0]);
    } else if constexpr (Count == 2) {
      Load::copy(row, r[0], r[1]);
    } else {
      Load::copy(row, r[0], r[1], r[2], r[3]);
    }
    for (int i = 0; i < Count; ++i) {
      p.out[i * 32 + lane] = r[i];
    }
  }
};

template <class Load, int Count, bool Transposed>
void test_load_matrix() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    GlobalArray<uint32_t> out("out", 32 * Count);
    run<LoadMatrixKernel<Load, Count>>({{1}, {32}, Count * 128, static_cast<std::uint64_t>(seed)},
                                       {out.data()});
    for (uint32_t i = 0; i < Count; ++i) {
      for (uint32_t lane = 0; lane < 32; ++lane) {
        uint32_t const g = lane / 4, t = lane % 4;
        auto value = [&](uint32_t row, uint32_t column) {
          return 1000 + i * 64 + row * 8 + column;
        };
        uint32_t const lo = Transposed ? value(2 * t, g) : value(g, 2 * t);
        uint32_t const hi = Transposed ? value(2 * t + 1, g) : value(g, 2 * t + 1);
        RETENTION_CHECK_EQUAL(out[i * 32 + lane], lo | hi << 16);
      }
    }
  }
}

struct ShuffleKernel {
  struct Params {
    int* out;  // [7, 64]
  };
  void operator()(Params const& p, char*) const {
    int const thread = threadIdx.x;
    unsigned const all = 0xffffffffu;
    int const value = 100 + thread;
    int* out = p.out + thread;
    out[0 * 64] = __shfl_sync(all, value, (thread * 5 + 3) % 32);
    out[1 * 64] = __shfl_xor_sync(all, value, 9);
    out[2 * 64] = __shfl_up_sync(all, value, 3);
    out[3 * 64] = __shfl_down_sync(all, value, 3, 8);
    out[4 * 64] = static_cast<int>(__ballot_sync(all, thread % 3 == 0));
    uint32_t transposed;
    cute::SM75_U32x1_MOVM_T::copy(static_cast<uint32_t>(2 * thread | (2 * thread + 1) << 16),
                                  transposed);
    out[5 * 64] = static_cast<int>(transposed);
    out[6 * 64] = -1;
    if (thread % 32 < 4) {
      out[6 * 64] = __shfl_xor_sync(0xfu, value, 1);
    }
  }
};

void test_shuffles() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    GlobalArray<int> out("out", 7 * 64);
    run<ShuffleKernel>({{1}, {64}, 0, static_cast<std::uint64_t>(seed)}, {out.data()});
    for (int thread = 0; thread < 64; ++thread) {
      int const lane = thread % 32, warp = thread - lane;
      auto at = [&](int row) { return out[static_cast<std::size_t>(row * 64 + thread)]; };
      RETENTION_CHECK_EQUAL(at(0), 100 + warp + (thread * 5 + 3) % 32);
      RETENTION_CHECK_EQUAL(at(1), 100 + warp + (lane ^ 9));
      RETENTION_CHECK_EQUAL(at(2), 100 + warp + (lane < 3 ? lane : lane - 3));
      RETENTION_CHECK_EQUAL(at(3), 100 + warp + (lane % 8 + 3 < 8 ? lane + 3 : lane));
      unsigned votes = 0;
      for (int i = 0; i < 32; ++i) {
        votes |= unsigned{(warp + i) % 3 == 0} << i;
      }
      RETENTION_CHECK_EQUAL(static_cast<unsigned>(at(4)), votes);
      int const g = lane / 4, t = lane % 4;
      auto element = [&](int row, int column) { return 2 * warp + 8 * row + column; };
      RETENTION_CHECK_EQUAL(at(5), element(2 * t, g) | element(2 * t + 1, g) << 16);
      RETENTION_CHECK_EQUAL(at(6), lane < 4 ? 100 + warp + (lane ^ 1) : -1);
    }
  }
}

// Three groups in flight; after each wait the groups that must be there are read back.
struct AsyncKernel {
  struct Params {
    float const* in;  // [3, 32, 4]
    float* out;       // [3, 32, 4]
  };
  void operator()(Params const& p, char* smem) const {
    int const lane = threadIdx.x;
    auto* buffer = reinterpret_cast<float*>(smem);
    using Copy = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;
    for (int group = 0; group < 3; ++group) {
      int const at = (group * 32 + lane) * 4;
      Copy::copy(*reinterpret_cast<cute::uint128_t const*>(p.in + at),
                 *reinterpret_cast<cute::uint128_t*>(buffer + at), lane % 5 != 4);
      cute::cp_async_fence();
    }
    auto read_back = [&](int group) {
      int const at = (group * 32 + (lane ^ 1)) * 4;
      for (int i = 0; i < 4; ++i) {
        p.out[at + i] = buffer[at + i];
      }
    };
    cute::cp_async_wait<2>();
    __syncthreads();
    read_back(0);
    cute::cp_async_wait<1>();
    __syncthreads();
    read_back(1);
    cute::cp_async_wait<0>();
    __syncthreads();
    read_back(2);
  }
};

void test_async() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    GlobalArray<float> in("in", 3 * 32 * 4, true), out("out", 3 * 32 * 4);
    for (std::size_t i = 0; i < in.size(); ++i) {
      in[i] = static_cast<float>(i) + 1;
    }
    run<AsyncKernel>({{1}, {32}, 3 * 32 * 16, static_cast<std::uint64_t>(seed)},
                     {in.data(), out.data()});
    for (std::size_t i = 0; i < out.size(); ++i) {
      RETENTION_CHECK_EQUAL(out[i], i / 4 % 32 % 5 != 4 ? in[i] : 0.0f);
    }
  }
}

// Half the block produces, the other half consumes, over a pair of named barriers.
struct NamedBarrierKernel {
  struct Params {
    int* out;  // [64]
  };
  void operator()(Params const& p, char* smem) const {
    int const thread = threadIdx.x;
    auto* buffer = reinterpret_cast<int*>(smem);
    if (thread < 64) {
      buffer[thread] = 7 * thread;
      ::emulator::barrier_arrive(1, 128);
    } else {
      ::emulator::barrier_sync(1, 128);
      p.out[thread - 64] = buffer[127 - thread];
    }
  }
};

void test_named_barrier() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    GlobalArray<int> out("out", 64);
    run<NamedBarrierKernel>({{1}, {128}, 256, static_cast<std::uint64_t>(seed)}, {out.data()});
    for (int i = 0; i < 64; ++i) {
      RETENTION_CHECK_EQUAL(out[static_cast<std::size_t>(i)], 7 * (63 - i));
    }
  }
}

struct GridKernel {
  struct Params {
    unsigned* out;  // [grid, block]
    int* sum;
  };
  void operator()(Params const& p, char*) const {
    unsigned const block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned const thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    p.out[block * 40 + thread] = block * 1000 + thread;
    atomicAdd(p.sum, 1);
  }
};

void test_grid() {
  GlobalArray<unsigned> out("out", 24 * 40);
  GlobalArray<int> sum("sum", 1);
  sum[0] = 0;
  run<GridKernel>({{2, 3, 4}, {5, 4, 2}, 0, 3}, {out.data(), sum.data()});
  for (unsigned i = 0; i < out.size(); ++i) {
    RETENTION_CHECK_EQUAL(out[i], i / 40 * 1000 + i % 40);
  }
  RETENTION_CHECK_EQUAL(sum[0], 24 * 40);
}

struct AtomicKernel {
  struct Params {
    int* sum;
    unsigned* unsigned_sum;
    float* float_sum;
    unsigned* wrapped;
    int* last;
    unsigned* last_unsigned;
    float* last_float;
    int* most;
    unsigned* unsigned_most;
    int* claims;
    unsigned* unsigned_claims;
    int* old;  // [11, grid * block]
  };
  void operator()(Params const& p, char*) const {
    int const threads = static_cast<int>(gridDim.x * blockDim.x);
    int const i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    int* old = p.old + i;
    old[0 * threads] = atomicAdd(p.sum, -2);
    old[1 * threads] = static_cast<int>(atomicAdd(p.unsigned_sum, 0x80000000u + 3));
    old[2 * threads] = static_cast<int>(2 * atomicAdd(p.float_sum, 0.5f));
    old[3 * threads] = static_cast<int>(atomicInc(p.wrapped, 4));
    old[4 * threads] = atomicExch(p.last, i);
    old[5 * threads] = static_cast<int>(atomicExch(p.last_unsigned, static_cast<unsigned>(i)));
    old[6 * threads] = static_cast<int>(atomicExch(p.last_float, static_cast<float>(i)));
    old[7 * threads] = atomicMax(p.most, i - 50);
    old[8 * threads] = static_cast<int>(atomicMax(p.unsigned_most, static_cast<unsigned>(i - 50)));
    old[9 * threads] = atomicCAS(p.claims + i / 3, -1, i);
    old[10 * threads] =
        static_cast<int>(atomicCAS(p.unsigned_claims + i / 3, ~0u, static_cast<unsigned>(i)));
  }
};

void test_atomics() {
  constexpr int kThreads = 3 * 40;
  for (int seed = 0; seed < kSeeds; ++seed) {
    GlobalArray<int> sum("sum", 1), last("last", 1), most("most", 1),
        claims("claims", kThreads / 3);
    GlobalArray<unsigned> unsigned_sum("unsigned_sum", 1), wrapped("wrapped", 1);
    GlobalArray<unsigned> last_unsigned("last_unsigned", 1), unsigned_most("unsigned_most", 1);
    GlobalArray<unsigned> unsigned_claims("unsigned_claims", kThreads / 3);
    GlobalArray<float> float_sum("float_sum", 1), last_float("last_float", 1);
    GlobalArray<int> old("old", 11 * kThreads);
    sum[0] = 7;
    last[0] = -1;
    last_float[0] = -1;
    most[0] = -20;
    unsigned_sum[0] = wrapped[0] = unsigned_most[0] = 0;
    float_sum[0] = 0;
    last_unsigned[0] = ~0u;
    std::fill(claims.begin(), claims.end(), -1);
    std::fill(unsigned_claims.begin(), unsigned_claims.end(), ~0u);
    run<AtomicKernel>({{3}, {40}, 0, static_cast<std::uint64_t>(seed)},
                      {sum.data(), unsigned_sum.data(), float_sum.data(), wrapped.data(),
                       last.data(), last_unsigned.data(), last_float.data(), most.data(),
                       unsigned_most.data(), claims.data(), unsigned_claims.data(), old.data()});
    RETENTION_CHECK_EQUAL(sum[0], 7 - 2 * kThreads);
    RETENTION_CHECK_EQUAL(unsigned_sum[0], 3u * kThreads);
    RETENTION_CHECK_EQUAL(float_sum[0], 0.5f * kThreads);
    RETENTION_CHECK_EQUAL(wrapped[0], 0u);
    RETENTION_CHECK_EQUAL(most[0], kThreads - 51);
    RETENTION_CHECK_EQUAL(unsigned_most[0], ~0u);
    auto sorted = [&](int row) {
      std::vector<int> values(old.begin() + row * kThreads, old.begin() + (row + 1) * kThreads);
      std::sort(values.begin(), values.end());
      return values;
    };
    // Each saw what another one had left.
    std::vector<int> const sums = sorted(0), floats = sorted(2), wraps = sorted(3);
    std::vector<int> unsigned_sums(old.begin() + kThreads, old.begin() + 2 * kThreads);
    for (int& x : unsigned_sums) {
      x &= 0x7fffffff;
    }
    std::sort(unsigned_sums.begin(), unsigned_sums.end());
    for (int i = 0; i < kThreads; ++i) {
      auto const u = static_cast<std::size_t>(i);
      RETENTION_CHECK_EQUAL(sums[u], 7 - 2 * (kThreads - 1 - i));
      RETENTION_CHECK_EQUAL(unsigned_sums[u], 3 * i);
      RETENTION_CHECK_EQUAL(floats[u], i);
      RETENTION_CHECK_EQUAL(wraps[u], i / (kThreads / 5));
    }
    int const lasts[] = {last[0], static_cast<int>(last_unsigned[0]),
                         static_cast<int>(last_float[0])};
    for (int row = 4; row < 7; ++row) {
      std::vector<int> exchanged = sorted(row);
      exchanged.push_back(lasts[row - 4]);
      std::sort(exchanged.begin(), exchanged.end());
      for (int i = 0; i <= kThreads; ++i) {
        RETENTION_CHECK_EQUAL(exchanged[static_cast<std::size_t>(i)], i - 1);
      }
    }
    for (int i = 0; i < kThreads; ++i) {
      auto const place = static_cast<std::size_t>(i / 3);
      auto at = [&](int row) { return old[static_cast<std::size_t>(row * kThreads + i)]; };
      RETENTION_CHECK_EQUAL(at(7) >= -20 && at(7) <= kThreads - 51, true);
      // The first one gets the place, and the others are told who did.
      RETENTION_CHECK_EQUAL(claims[place] / 3, i / 3);
      RETENTION_CHECK_EQUAL(at(9), claims[place] == i ? -1 : claims[place]);
      int const claim = static_cast<int>(unsigned_claims[place]);
      RETENTION_CHECK_EQUAL(claim / 3, i / 3);
      RETENTION_CHECK_EQUAL(at(10), claim == i ? -1 : claim);
    }
  }
}

struct CacheHintKernel {
  struct Params {
    int const* in;
    int* out;
  };
  void operator()(Params const& p, char*) const {
    cudaGridDependencySynchronize();
    int const i = threadIdx.x;
    __stcg(p.out + i, __ldg(p.in + i) + 100);
    __stcs(p.out + i, p.out[i] + __ldcs(p.in + i));
    cudaTriggerProgrammaticLaunchCompletion();
  }
};

void test_cache_hints() {
  GlobalArray<int> in("in", 8, true), out("out", 8);
  for (int i = 0; i < 8; ++i) {
    in[static_cast<std::size_t>(i)] = i;
  }
  run<CacheHintKernel>({{1}, {8}, 0, 0}, {in.data(), out.data()});
  for (int i = 0; i < 8; ++i) {
    RETENTION_CHECK_EQUAL(out[static_cast<std::size_t>(i)], 100 + 2 * i);
  }
}

// What blocks add in the order in which they come.
struct ArrivalOrderKernel {
  struct Params {
    int* arrived;
    int* places;  // [grid]
    float* sum;
  };
  void operator()(Params const& p, char*) const {
    p.places[blockIdx.x] = atomicAdd(p.arrived, 1);
    atomicAdd(p.sum, blockIdx.x == 0 ? 1.0f : 0x1p-24f);
  }
};

void test_atomic_order() {
  std::set<std::vector<int>> orders;
  std::set<float> sums;
  for (int repeat = 0; repeat < 2; ++repeat) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      GlobalArray<int> arrived("arrived", 1), places("places", 6);
      GlobalArray<float> sum("sum", 1);
      arrived[0] = 0;
      sum[0] = 0;
      run<ArrivalOrderKernel>({{6}, {1}, 0, seed}, {arrived.data(), places.data(), sum.data()});
      bool const is_new = orders.emplace(places.begin(), places.end()).second;
      RETENTION_CHECK(!(repeat == 1 && is_new));
      sums.insert(sum[0]);
    }
  }
  RETENTION_CHECK(orders.size() >= 4);
  RETENTION_CHECK(sums.size() >= 2);
}

// Offsets past 2^32 bytes: only the pages that are touched exist.
struct SparseKernel {
  struct Params {
    char* data;
    std::int64_t stride;
  };
  void operator()(Params const& p, char*) const {
    p.data[p.stride * threadIdx.x] = static_cast<char>(threadIdx.x + 1);
  }
};

void test_sparse() {
  constexpr std::int64_t kStride = std::int64_t{1} << 30;
  GlobalArray<char> data("data", static_cast<std::size_t>(7 * kStride + 1));
  run<SparseKernel>({{1}, {8}, 0, 0}, {data.data(), kStride});
  for (int i = 0; i < 8; ++i) {
    RETENTION_CHECK_EQUAL(int{data[static_cast<std::size_t>(i * kStride)]}, i + 1);
  }
}

}  // namespace

int main() {
  test_mma<cute::bfloat16_t, cute::SM80_16x8x16_F32BF16BF16F32_TN>();
  test_mma<cute::half_t, cute::SM80_16x8x16_F32F16F16F32_TN>();
  test_warpgroup<cute::bfloat16_t>();
  test_warpgroup<cute::half_t>();
  test_load_matrix<cute::SM75_U32x1_LDSM_N, 1, false>();
  test_load_matrix<cute::SM75_U32x2_LDSM_N, 2, false>();
  test_load_matrix<cute::SM75_U32x4_LDSM_N, 4, false>();
  test_load_matrix<cute::SM75_U16x2_LDSM_T, 1, true>();
  test_load_matrix<cute::SM75_U16x4_LDSM_T, 2, true>();
  test_load_matrix<cute::SM75_U16x8_LDSM_T, 4, true>();
  test_shuffles();
  test_async();
  test_named_barrier();
  test_grid();
  test_atomics();
  test_atomic_order();
  test_cache_hints();
  test_sparse();
  return retention::test::finish();
}
