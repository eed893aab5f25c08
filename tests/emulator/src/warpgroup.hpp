// What a warp has given to wgmma and not waited for.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/emulator.hpp"
#include "memory.hpp"

namespace emulator::detail {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupMaxN = 128;
constexpr int kPieceBytes = 16;
constexpr int kWarpgroupAPieces = 32;  // of A, of a warp: 16 rows of 32 bytes
constexpr int kPieceCells = kPieceBytes / static_cast<int>(kCellBytes);

/// A lane's call.
struct WarpgroupCall {
  std::uint32_t a[4];
  std::uint64_t a_descriptor;  // instead of `a`, where `a_is_shared`
  std::uint64_t descriptor;
  float* registers;
  bool adds;
  Element type;
  int n;
  bool n_contiguous;
  bool a_is_shared;
  void* site;
};

/// B, or A in shared memory: [n, 16].
struct WarpgroupOperand {
  std::uint64_t descriptor;
  int n;
  bool n_contiguous;
};

/// Accumulators in flight: 16 rows of a warp. The registers hold a mark.
struct WarpgroupAccumulators {
  float* registers[32];
  int count;     // of a lane
  int products;  // in flight
  float values[16][kWarpgroupMaxN];
};

/// A wgmma in flight, as far as one warp goes.
struct WarpgroupProduct {
  Element type;
  int n;
  bool n_contiguous;
  bool adds;
  unsigned group;
  WarpgroupAccumulators* accumulators;
  bool a_is_shared;
  std::uint32_t a[32][4];  // unless it is
  // B in pieces of 16 bytes: [n, k / 8], or [k, n / 8] if columns are contiguous. After it the
  // warp's rows of A, [row, k / 8], where they are shared.
  static constexpr int kMaxPieces = 2 * kWarpgroupMaxN + kWarpgroupAPieces;
  std::uint32_t pieces[kMaxPieces];        // where they are in shared memory, and
  Epoch writes[kMaxPieces * kPieceCells];  // who had written their cells at the start

  int count() const { return 2 * n + (a_is_shared ? kWarpgroupAPieces : 0); }
};

struct WarpgroupQueue {
  bool arrived = false;  // since the last wait
  unsigned committed = 0;
  std::vector<std::unique_ptr<WarpgroupProduct>> products;
  std::vector<std::unique_ptr<WarpgroupAccumulators>> accumulators;
};

}  // namespace emulator::detail
