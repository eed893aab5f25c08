#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

namespace emulator::detail {

namespace {

std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

void* map_pages(std::size_t bytes, int protection) {
  void* pages =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return pages;
}

}  // namespace

void* Arrays::allocate(std::size_t bytes, char const* name, bool read_only) {
  std::size_t const page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t const body = round_up(bytes + 1, page);
  Array array;
  array.name = name;
  array.bytes = bytes;
  array.read_only = read_only;
  array.mapping_bytes = body + 2 * page;
  array.mapping = static_cast<char*>(map_pages(array.mapping_bytes, PROT_NONE));
  mprotect(array.mapping + page, body, PROT_READ | PROT_WRITE);
  // The end is what kernels overrun: put it against the guard page, 16-byte alignment permitting.
  array.data = array.mapping + page + (body - round_up(bytes, 16));
  // NaN in every floating type; a large array is meant to stay sparse.
  constexpr std::size_t kSparse = std::size_t{1} << 30;
  if (bytes < kSparse) {
    std::memset(array.data, 0xff, bytes);
  }
  array.cells = static_cast<GlobalCell*>(
      map_pages(array.num_cells() * sizeof(GlobalCell), PROT_READ | PROT_WRITE));
  found_.fill(nullptr);
  return arrays_.emplace(reinterpret_cast<std::uintptr_t>(array.data), array).first->second.data;
}

void Arrays::release(void* data) {
  auto it = arrays_.find(reinterpret_cast<std::uintptr_t>(data));
  Array& array = it->second;
  munmap(array.cells, array.num_cells() * sizeof(GlobalCell));
  munmap(array.mapping, array.mapping_bytes);
  arrays_.erase(it);
  found_.fill(nullptr);
}

Array* Arrays::find(std::uintptr_t address) {
  auto holds = [&](Array const& array) {
    return address - reinterpret_cast<std::uintptr_t>(array.data) < array.bytes;
  };
  constexpr std::uintptr_t kPageBytes = 4096;
  Array*& found = found_[address / kPageBytes % found_.size()];
  if (found != nullptr && holds(*found)) {
    return found;
  }
  auto it = arrays_.upper_bound(address);
  if (it == arrays_.begin() || !holds((--it)->second)) {
    return nullptr;
  }
  return found = &it->second;
}

std::string Arrays::locate(std::uintptr_t address) {
  Array const* closest = nullptr;
  std::uintptr_t best = UINTPTR_MAX;
  bool before = false;
  for (auto const& [start, array] : arrays_) {
    std::uintptr_t const distance = address < start ? start - address : address - start;
    std::uintptr_t const gap = address < start          ? distance
                               : distance < array.bytes ? 0
                                                        : distance - array.bytes;
    if (gap < best) {
      best = gap;
      closest = &array;
      before = address < start;
    }
  }
  constexpr std::uintptr_t kUnrelated = std::uintptr_t{1} << 32;
  if (closest == nullptr || best > kUnrelated) {
    return "an address in no array";
  }
  return std::to_string(best) +
         (before ? " bytes before the start of `" : " bytes past the end of `") + closest->name +
         "` (" + std::to_string(closest->bytes) + " bytes)";
}

void Arrays::forget_accesses() {
  for (auto& [start, array] : arrays_) {
    if (array.touched) {
      madvise(array.cells, array.num_cells() * sizeof(GlobalCell), MADV_DONTNEED);
      array.readers.clear();
      array.places.clear();
      array.touched = false;
    }
  }
}

}  // namespace emulator::detail
