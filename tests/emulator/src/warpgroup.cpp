// wgmma: matrix products of a warpgroup, carried out when somebody waits for them.

#include "warpgroup.hpp"

#include <algorithm>
#include <cstring>

#include "block.hpp"
#include "elements.hpp"

namespace emulator::detail {

namespace {

// What accumulators in flight read as: a NaN that nothing else makes.
constexpr std::uint32_t kInFlight = 0x7fd00f1e;

// An object that is used again and again: they are large.
template <class T>
std::unique_ptr<T> take(std::vector<std::unique_ptr<T>>& spare) {
  if (spare.empty()) {
    return std::make_unique<T>();
  }
  std::unique_ptr<T> last = std::move(spare.back());
  spare.pop_back();
  return last;
}

// Of accumulator i of a lane, as in mma.m16n8k16.
int row_of(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

template <float (*Value)(std::uint32_t)>
[[gnu::always_inline]] inline void multiply(WarpgroupProduct const& product, char const* shared) {
  int const n = product.n;
  float a[16][16];
  auto read_piece = [&](int piece, std::uint16_t (&elements)[kPieceCells]) {
    std::memcpy(elements, shared + product.pieces[piece], sizeof(elements));
  };
  if (product.a_is_shared) {
    for (int piece = 0; piece < kWarpgroupAPieces; ++piece) {
      std::uint16_t elements[kPieceCells];
      read_piece(2 * n + piece, elements);
      for (int i = 0; i < kPieceCells; ++i) {
        a[piece / 2][piece % 2 * 8 + i] = Value(elements[i]);
      }
    }
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
          a[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2) + half] =
              Value(product.a[lane][i] >> 16 * half);
        }
      }
    }
  }
  float b[16][kWarpgroupMaxN];
  for (int piece = 0; piece < 2 * n; ++piece) {
    std::uint16_t elements[kPieceCells];
    read_piece(piece, elements);
    for (int i = 0; i < kPieceCells; ++i) {
      float const value = Value(elements[i]);
      if (product.n_contiguous) {
        b[piece / (n / 8)][piece % (n / 8) * 8 + i] = value;
      } else {
        b[piece % 2 * 8 + i][piece / 2] = value;
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[kWarpgroupMaxN] = {};
    for (int k = 0; k < 16; ++k) {
      float const factor = a[row][k];
      for (int column = 0; column < n; ++column) {
        sum[column] += factor * b[k][column];
      }
    }
    float* const values = product.accumulators->values[row];
    for (int column = 0; column < n; ++column) {
      values[column] = product.adds ? values[column] + sum[column] : sum[column];
    }
  }
}

EMULATOR_VECTORS void multiply_bfloat16(WarpgroupProduct const& product, char const* shared) {
  multiply<bfloat16_value>(product, shared);
}
EMULATOR_VECTORS void multiply_float16(WarpgroupProduct const& product, char const* shared) {
  multiply<float16_value>(product, shared);
}

}  // namespace

void Launch::fence_proxy_async() {
  Thread& thread = self();
  thread.proxy_fences.push_back(thread.clock++);
}

// Whether the writer had fenced what it wrote before `thread`, which comes after it, met it.
bool Launch::fenced(Epoch write, Thread const& thread) const {
  auto const writer = static_cast<std::size_t>(write.thread());
  std::vector<std::uint32_t> const& fences = threads_[writer].proxy_fences;
  auto const next = std::lower_bound(fences.begin(), fences.end(), write.clock());
  return next != fences.end() && happened_before(Epoch::of(write.thread(), *next), thread);
}

void Launch::warpgroup_arrive() {
  int const me = current_, group = me / kWarpgroupThreads;
  if (num_threads() < (group + 1) * kWarpgroupThreads) {
    fail(Fault::kDivergence, "warpgroup_arrive() in a warpgroup that has not all of its threads");
  }
  std::vector<int>& arrived = warpgroups_[static_cast<std::size_t>(group)];
  arrived.push_back(me);
  if (static_cast<int>(arrived.size()) < kWarpgroupThreads) {
    suspend("warpgroup_arrive()");
    return;
  }
  for (int const t : arrived) {
    warpgroup_queues_[static_cast<std::size_t>(t / 32)].arrived = true;
    if (t != me) {
      runnable_.push_back(t);
    }
  }
  arrived.clear();
}

void Launch::warpgroup_start(void* const* operands) {
  int const first = current_ / 32 * 32;
  WarpgroupQueue& queue = warpgroup_queues_[static_cast<std::size_t>(first / 32)];
  auto call = [&](int lane) -> WarpgroupCall const& {
    return *static_cast<WarpgroupCall const*>(operands[lane]);
  };
  WarpgroupCall const& mine = call(current_ - first);
  if (num_threads() - first / kWarpgroupThreads * kWarpgroupThreads < kWarpgroupThreads) {
    fail(Fault::kDivergence, "wgmma in a warpgroup that has not all of its threads", mine.site);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (call(lane).registers == nullptr) {
      fail(Fault::kMisaligned, "wgmma with accumulators that are no array: not emulated",
           mine.site);
    }
    if (call(lane).descriptor != mine.descriptor || call(lane).adds != mine.adds ||
        call(lane).a_descriptor != mine.a_descriptor) {
      fail(Fault::kDivergence,
           "lanes of a warp give wgmma different descriptors, or scales of the accumulators",
           mine.site);
    }
  }
  if (!queue.arrived) {
    fail(Fault::kRace,
         "wgmma with no warpgroup_arrive() since the last warpgroup_wait(): its registers may not "
         "have been written yet",
         mine.site);
  }

  auto product = take(spare_products_);
  product->type = mine.type;
  product->n = mine.n;
  product->n_contiguous = mine.n_contiguous;
  product->adds = mine.adds;
  product->group = queue.committed;
  product->a_is_shared = mine.a_is_shared;
  for (int lane = 0; lane < 32; ++lane) {
    std::copy_n(call(lane).a, 4, product->a[lane]);
  }
  find_pieces({mine.descriptor, mine.n, mine.n_contiguous}, product->pieces, mine.site);
  if (mine.a_is_shared) {
    constexpr int kRows = 64;
    std::uint32_t rows[2 * kRows];
    find_pieces({mine.a_descriptor, kRows, false}, rows, mine.site);
    std::copy_n(rows + kWarpgroupAPieces * (first / 32 % 4), kWarpgroupAPieces,
                product->pieces + 2 * mine.n);
  }
  check_pieces(*product, first, mine.site);

  // The accumulators are those of earlier products, or others.
  int const count = mine.n / 2;
  product->accumulators = nullptr;
  for (auto const& known : queue.accumulators) {
    bool same = known->count == count;
    bool apart = true;
    for (int lane = 0; lane < 32; ++lane) {
      float const* const registers = call(lane).registers;
      same = same && registers == known->registers[lane];
      apart = apart && (registers + count <= known->registers[lane] ||
                        known->registers[lane] + known->count <= registers);
    }
    if (same) {
      product->accumulators = known.get();
    } else if (!apart) {
      fail(Fault::kRace, "some accumulators of a wgmma are those of one in flight of another shape",
           mine.site);
    }
  }
  if (product->accumulators == nullptr) {
    auto accumulators = take(spare_accumulators_);
    accumulators->count = count;
    accumulators->products = 0;
    for (int lane = 0; lane < 32; ++lane) {
      float* const registers = accumulators->registers[lane] = call(lane).registers;
      for (int i = 0; i < count; ++i) {
        accumulators->values[row_of(lane, i)][column_of(lane, i)] = registers[i];
        std::memcpy(registers + i, &kInFlight, sizeof(float));
      }
    }
    product->accumulators = accumulators.get();
    queue.accumulators.push_back(std::move(accumulators));
    ++accumulators_in_flight_;
  }
  ++product->accumulators->products;
  queue.products.push_back(std::move(product));
}

// The descriptor's fields, and the addresses of the pieces: an operand consists of atoms, 8 rows of
// 128 or 64 bytes; bits of the row, in the address, are added to those of the piece in the row.
void Launch::find_pieces(WarpgroupOperand const& operand, std::uint32_t* pieces, void* site) {
  std::uint64_t const descriptor = operand.descriptor;
  auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  std::uint32_t const start = field(0), leading = field(16), stride = field(32);
  std::uint32_t const layout = static_cast<std::uint32_t>(descriptor >> 62);
  if ((layout != 1 && layout != 2) || (descriptor >> 49 & 7) != 0) {
    fail(Fault::kMisaligned,
         "wgmma with a descriptor of another layout than rows of 128 or 64 bytes (" +
             std::to_string(layout) + "), or with a base offset: not emulated",
         site);
  }
  auto const n = static_cast<std::uint32_t>(operand.n);
  std::uint32_t const row_bytes = layout == 1 ? 128 : 64, atom = 8 * row_bytes;
  std::uint32_t const swizzle = layout == 1 ? 7 : 3;
  // How much of a row is used, from `start` on.
  std::uint32_t const width = operand.n_contiguous ? std::min(2 * n, row_bytes) : 32;
  if (start % atom + width > row_bytes) {
    fail(Fault::kMisaligned,
         "wgmma on a tile at shared address " + std::to_string(start) +
             ", which is no multiple of " + std::to_string(atom) +
             " and a place in a row where its " + std::to_string(width) + " bytes fit",
         site);
  }
  bool const leads = operand.n_contiguous && 2 * n > row_bytes;
  if (stride % atom != 0 || stride == 0 || (leads && (leading % atom != 0 || leading == 0))) {
    fail(Fault::kMisaligned,
         "wgmma with a stride of " + std::to_string(stride) + " and a leading dimension of " +
             std::to_string(leading) + " bytes, where multiples of " + std::to_string(atom) +
             " are wanted",
         site);
  }
  for (std::uint32_t i = 0; i < 2 * n; ++i) {
    std::uint32_t address = start;
    if (operand.n_contiguous) {
      std::uint32_t const k = i / (n / 8), byte = i % (n / 8) * kPieceBytes;
      address += k / 8 * stride + k % 8 * row_bytes;
      address += byte / row_bytes * leading + byte % row_bytes;
    } else {
      address += i / 16 * stride + i / 2 % 8 * row_bytes + i % 2 * kPieceBytes;
    }
    address ^= (address >> 7 & swizzle) << 4;
    if (address + kPieceBytes > config_.shared_bytes) {
      fail(Fault::kOutOfBounds,
           "wgmma reads past the end of shared memory, at offset " + std::to_string(address), site);
    }
    pieces[i] = address;
  }
}

void Launch::check_pieces(WarpgroupProduct& product, int first, void* site) {
  Epoch* writes = product.writes;
  for (int i = 0; i < product.count(); ++i) {
    // Lanes share the pieces.
    Thread const& thread = threads_[static_cast<std::size_t>(first + i % 32)];
    std::size_t const cell = product.pieces[i] / kCellBytes;
    Epoch fine;
    for (std::size_t j = cell; j < cell + kPieceCells; ++j) {
      SharedCell const& history = cells_[j];
      auto where = [&] { return "shared memory at offset " + std::to_string(j * kCellBytes); };
      if (history.async_thread != 0) {
        fail(Fault::kAsyncPending,
             "wgmma on " + where() + ", the target of a cp.async of thread " +
                 std::to_string(history.async_thread - 1) + " that has not been waited for",
             site);
      }
      if (!history.write) {
        fail(Fault::kUninitialized, "wgmma on " + where() + ", which nobody has written", site);
      }
      if (history.write.bits != fine.bits) {
        if (!happened_before(history.write, thread)) {
          fail(Fault::kRace,
               where() + ": written by thread " + std::to_string(history.write.thread()) +
                   " and read by wgmma of thread " + std::to_string(thread.linear) +
                   " with no barrier between",
               site);
        }
        if (!fenced(history.write, thread)) {
          fail(Fault::kProxy,
               where() + ": written by thread " + std::to_string(history.write.thread()) +
                   " and read by wgmma of thread " + std::to_string(thread.linear) +
                   ", with no fence.proxy.async of the former between it and their barrier",
               site);
        }
        fine = history.write;
      }
      *writes++ = history.write;
    }
  }
}

void Launch::warpgroup_commit() {
  ++warpgroup_queues_[static_cast<std::size_t>(current_ / 32)].committed;
}

void Launch::warpgroup_wait(unsigned pending, void* site) {
  int const first = current_ / 32 * 32;
  WarpgroupQueue& queue = warpgroup_queues_[static_cast<std::size_t>(first / 32)];
  queue.arrived = false;
  auto const first_left = std::find_if(
      queue.products.begin(), queue.products.end(),
      [&](auto const& product) { return product->group + pending >= queue.committed; });
  for (auto product = queue.products.begin(); product != first_left; ++product) {
    finish_product(**product, first, site);
    spare_products_.push_back(std::move(*product));
  }
  queue.products.erase(queue.products.begin(), first_left);
  for (std::size_t i = 0; i < queue.accumulators.size();) {
    WarpgroupAccumulators& accumulators = *queue.accumulators[i];
    if (accumulators.products != 0) {
      ++i;
      continue;
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < accumulators.count; ++j) {
        float* const target = accumulators.registers[lane] + j;
        if (std::memcmp(target, &kInFlight, sizeof(float)) != 0) {
          fail(Fault::kWarpgroupPending,
               "an accumulator of lane " + std::to_string(lane) +
                   " was overwritten while wgmma was in flight",
               site);
        }
        *target = accumulators.values[row_of(lane, j)][column_of(lane, j)];
      }
    }
    spare_accumulators_.push_back(std::move(queue.accumulators[i]));
    queue.accumulators.erase(queue.accumulators.begin() + static_cast<std::ptrdiff_t>(i));
    --accumulators_in_flight_;
  }
}

// Of an access of the running thread to its stack, where its accumulators are.
void Launch::check_accumulators(std::uintptr_t address, std::size_t bytes, Access kind,
                                void* site) {
  for (auto const& known :
       warpgroup_queues_[static_cast<std::size_t>(current_ / 32)].accumulators) {
    auto const begin = reinterpret_cast<std::uintptr_t>(known->registers[current_ % 32]);
    if (address < begin + static_cast<std::size_t>(known->count) * sizeof(float) &&
        begin < address + bytes) {
      fail(Fault::kWarpgroupPending,
           std::string(kind == Access::kLoad ? "load of" : "store to") +
               " an accumulator of wgmma that has not been waited for",
           site);
    }
  }
}

void Launch::check_nothing_in_flight() {
  for (std::size_t warp = 0; warp < warpgroup_queues_.size(); ++warp) {
    if (!warpgroup_queues_[warp].products.empty()) {
      report_ = {Fault::kWarpgroupPending,
                 std::string(to_string(Fault::kWarpgroupPending)) + ": warp " +
                     std::to_string(warp) + " of block " + to_text(block_index_) +
                     " has returned with wgmma in flight, seed " + std::to_string(config_.seed)};
      return;
    }
  }
}

void Launch::finish_product(WarpgroupProduct& product, int first, void* site) {
  Epoch const* writes = product.writes;
  for (int i = 0; i < product.count(); ++i) {
    Thread const& thread = threads_[static_cast<std::size_t>(first + i % 32)];
    Epoch const now = Epoch::of(thread.linear, thread.clock);
    std::size_t const cell = product.pieces[i] / kCellBytes;
    for (std::size_t j = cell; j < cell + kPieceCells; ++j) {
      if (cells_[j].write.bits != writes++->bits) {
        fail(Fault::kRace,
             "shared memory at offset " + std::to_string(j * kCellBytes) + ": written by thread " +
                 std::to_string(cells_[j].write.thread()) + " while wgmma of thread " +
                 std::to_string(thread.linear) + ", which reads it, was in flight",
             site);
      }
      remember_read(cells_[j], *thread.known, thread.linear, now);
    }
  }
  if (product.type == Element::kBFloat16) {
    multiply_bfloat16(product, shared_);
  } else {
    multiply_float16(product, shared_);
  }
  --product.accumulators->products;
}

}  // namespace emulator::detail
