// What the emulator remembers about memory: the arrays of the device, and who touched what.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator::detail {

/// Accesses are tracked in cells of two bytes: two threads may write the halves of one word.
constexpr std::size_t kCellBytes = 2;

/// A thread and its logical time; 0 is "nobody".
struct Epoch {
  std::uint32_t bits = 0;

  static Epoch of(int thread, std::uint32_t clock) {
    return {static_cast<std::uint32_t>(thread) << 20 | clock};
  }
  int thread() const { return static_cast<int>(bits >> 20); }
  std::uint32_t clock() const { return bits & 0xfffff; }
  explicit operator bool() const { return bits != 0; }
};

/// History of one cell of shared memory.
struct SharedCell {
  static constexpr int kReads = 6;  // concurrent readers remembered; more replace at random

  Epoch write;
  Epoch reads[kReads];
  std::uint32_t async_thread = 0;  // 1 + the thread whose cp.async is on its way here
};

/// How far each thread of a block had come when this knowledge was last exchanged.
using Knowledge = std::vector<std::uint32_t>;
/// The same of several blocks, by their marks.
using Blocks = std::map<std::uint32_t, std::shared_ptr<Knowledge const>>;

/// History of one cell of a global array. Blocks: 1 + linear index, or one of the marks below.
struct GlobalCell {
  static constexpr std::uint32_t kAtomic = 0xffffffffu;  // see Array::places
  static constexpr std::uint32_t kMany = 0xfffffffeu;    // nobody knows which
  static constexpr std::uint32_t kListed = 0xfffffffdu;  // see Array::readers
  static constexpr int kReads = 2;  // the first and the last of concurrent readers

  std::uint32_t writer = 0;
  std::uint32_t reader = 0;
  // Threads of the block that is named above, and no others.
  Epoch write;
  Epoch reads[kReads];
};

/// A block's reads of a cell.
struct Reader {
  std::uint32_t mark;
  Epoch reads[GlobalCell::kReads];
};

constexpr std::size_t kPlaceBytes = 4;
constexpr std::size_t kPlaceCells = kPlaceBytes / kCellBytes;

/// Four bytes that atomics have touched since the last ordinary store.
struct AtomicPlace {
  std::uint32_t mark = 0;  // of the last atomic's block
  Epoch last;
  std::uint32_t store_mark = 0;  // of the ordinary store before the first atomic
  Epoch store;
  Blocks released;  // what happened before a fence before an atomic here
  Blocks unfenced;  // what happened before an atomic here; for reports
};

struct Array {
  std::string name;
  char* data = nullptr;
  std::size_t bytes = 0;
  bool read_only = false;
  GlobalCell* cells = nullptr;  // lazily backed: a sparse array costs what is touched
  std::unordered_map<std::size_t, std::vector<Reader>> readers;  // by cell, where kListed
  std::unordered_map<std::size_t, AtomicPlace> places;           // by word
  bool touched = false;
  char* mapping = nullptr;
  std::size_t mapping_bytes = 0;

  std::size_t num_cells() const { return bytes / kCellBytes + 1; }
};

class Arrays {
 public:
  void* allocate(std::size_t bytes, char const* name, bool read_only);
  void release(void* data);
  /// The array that holds `address`, or null.
  Array* find(std::uintptr_t address);
  /// For a message: where `address` lies relative to the closest array.
  std::string locate(std::uintptr_t address);
  void forget_accesses();

 private:
  std::map<std::uintptr_t, Array> arrays_;  // by first address
  // What pages were found to be in: kernels go to and fro between a few arrays.
  std::array<Array*, 256> found_{};
};

}  // namespace emulator::detail
