// Zeros in the rows of tokens that no packed sequence has: those before the first sequence and
// behind the last, as in batches that are padded to a fixed size. No other kernel reads or writes
// there.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

namespace retention::kernel {

struct UnownedRows {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxTensors = 4;
  static constexpr int kMaxBlocks = 256;  // of a tensor: nothing to do is soon done

  struct SharedStorage {};

  /// [tokens, heads, words] of 4 bytes each, words contiguous. A null pointer stands for none.
  struct Tensor {
    std::uint32_t* data;
    std::int64_t token_stride;  // in words, as head_stride
    std::int64_t head_stride;
    int heads;
    int words;
  };

  struct Params {
    int const* cu_seqlens;  // [count + 1] on the device
    int count;
    int tokens;
    Tensor tensors[kMaxTensors];
  };

  /// (rows, tensor)
  CUTE_HOST static dim3 grid(Params const& params) {
    std::int64_t rows = 1;
    for (Tensor const& tensor : params.tensors) {
      rows = cute::max(rows, std::int64_t{params.tokens} * tensor.heads);
    }
    std::int64_t const blocks = (rows + kWarps - 1) / kWarps;
    return dim3(static_cast<unsigned>(cute::min(blocks, std::int64_t{kMaxBlocks})), kMaxTensors);
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    Tensor const& tensor = params.tensors[blockIdx.y];
    auto const bound = [&](int index) {
      return cute::min(cute::max(params.cu_seqlens[index], 0), params.tokens);
    };
    int const first = bound(0);
    int const end = cute::max(bound(params.count), first);
    std::int64_t const rows =
        tensor.data == nullptr ? 0 : std::int64_t{first + params.tokens - end} * tensor.heads;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    // A warp a row.
    for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + warp; row < rows;
         row += std::int64_t{gridDim.x} * kWarps) {
      int const unowned = static_cast<int>(row / tensor.heads);
      int const head = static_cast<int>(row % tensor.heads);
      std::int64_t const token = unowned < first ? unowned : unowned - first + end;
      std::uint32_t* target = tensor.data + token * tensor.token_stride + head * tensor.head_stride;
      for (int word = static_cast<int>(threadIdx.x) % 32; word < tensor.words; word += 32) {
        target[word] = 0;
      }
    }
  }
};

}  // namespace retention::kernel
