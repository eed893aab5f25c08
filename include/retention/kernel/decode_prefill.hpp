// What a prefill has beside the forward kernels. A row's tokens are a body, which goes into the
// state of its slot, and then up to `keep` tokens, the tail, which go into its ring. Body and tail
// are sequences of two calls of forward; rows of padding have neither, and get zeros.

#pragma once

#include <cstdint>
#include <cute/tensor.hpp>

#include "retention/kernel/decode_pool.hpp"
#include "retention/kernel/sequence.hpp"
#include "retention/kernel/unowned_rows.hpp"

namespace retention::kernel {

/// Where rows have their body and their tail, by place in tensors that hold all rows end to end.
struct PrefillParts {
  int* starts;   // [rows], of the body
  int* middles;  // [rows], its end, and the start of the tail
  int* ends;     // [rows]
  int* folded;   // [rows], tokens of the body
  int* kept;     // [rows], tokens of the tail
};

/// Finds them. Rows of padding have no tokens.
struct FindPrefillParts {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  struct SharedStorage {};

  struct Params {
    int const* cu_seqlens;  // [rows + 1]; null: every row has as many tokens as another
    int const* slots;       // [rows]
    SlotCursors cursors;
    int rows;
    int total;  // tokens of all rows
    int keep;
    PrefillParts parts;
  };

  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(cute::ceil_div(params.rows, int{kThreads})));
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    int const row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (row >= params.rows) {
      return;
    }
    int const start = bound(params, row);
    int const end =
        params.cursors.has(params.slots[row]) ? cute::max(bound(params, row + 1), start) : start;
    int const kept = cute::min(params.keep, end - start);
    params.parts.starts[row] = start;
    params.parts.middles[row] = end - kept;
    params.parts.ends[row] = end;
    params.parts.folded[row] = end - start - kept;
    params.parts.kept[row] = kept;
  }

  /// Where a row starts. Nobody on the host has read cu_seqlens: no access may leave the tensors.
  CUTE_DEVICE static int bound(Params const& params, int row) {
    return params.cu_seqlens == nullptr
               ? params.total / params.rows * row
               : cute::min(cute::max(params.cu_seqlens[row], 0), params.total);
  }
};

/// Zeros for the results of rows of padding.
struct PaddingRows {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  struct SharedStorage {};

  struct Params {
    FindPrefillParts::Params rows;
    UnownedRows::Tensor output;  // [total, query heads, words]
  };

  /// A block a row.
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.rows.rows));
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    int const row = static_cast<int>(blockIdx.x);
    if (params.rows.cursors.has(params.rows.slots[row])) {
      return;
    }
    int const start = FindPrefillParts::bound(params.rows, row);
    int const end = FindPrefillParts::bound(params.rows, row + 1);
    UnownedRows::Tensor const& output = params.output;
    int const in_token = output.heads * output.words;
    for (int token = start; token < end; ++token) {
      for (int i = static_cast<int>(threadIdx.x); i < in_token; i += kThreads) {
        output.data[token * output.token_stride + i / output.words * output.head_stride +
                    i % output.words] = 0;
      }
    }
  }
};

/// The tails of rows go into the rings of their slots, behind what is there.
template <class Element_>
struct AppendTails {
  using Element = Element_;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  struct SharedStorage {};

  struct Params {
    Element const* key;     // [total, h, d], rows 16-byte aligned
    Element const* value;   // [total, h, dv], likewise
    float const* log_gate;  // [total, h]; null without gates
    TokenStride key_stride;
    TokenStride value_stride;
    TokenStride gate_stride;
    PrefillParts parts;
    int const* slots;  // [rows]
    int rows;
    int heads;
    int head_dim;  // multiples of 8, both
    int value_dim;
    DecodePool<Element> pool;
  };

  /// (row, head)
  CUTE_HOST static dim3 grid(Params const& params) {
    return dim3(static_cast<unsigned>(params.rows), static_cast<unsigned>(params.heads));
  }

  CUTE_DEVICE void operator()(Params const& params, char*) const {
    int const thread = static_cast<int>(threadIdx.x);
    int const row = static_cast<int>(blockIdx.x);
    int const head = static_cast<int>(blockIdx.y);
    int const slot = params.slots[row];
    if (!params.pool.has(slot)) {
      return;
    }
    Cursor const cursor = *params.pool.cursor(slot);
    int const count = cute::min(params.parts.kept[row], params.pool.ring - cursor.length);
    std::int64_t const first = params.parts.middles[row];
    auto const copy = [&](Element const* source, TokenStride const& stride, Element* ring,
                          int width) {
      int const pieces = width / 8;  // of 16 bytes
      for (int i = thread; i < count * pieces; i += kThreads) {
        int const token = i / pieces, column = i % pieces * 8;
        std::int64_t const place = params.pool.place(cursor, cursor.length + token);
        *reinterpret_cast<uint4*>(ring + place * width + column) = *reinterpret_cast<uint4 const*>(
            source + (first + token) * stride.token + head * stride.head + column);
      }
    };
    copy(params.key, params.key_stride, params.pool.keys.at(slot, head), params.head_dim);
    copy(params.value, params.value_stride, params.pool.values.at(slot, head), params.value_dim);
    if (params.log_gate != nullptr) {
      float* const gates = params.pool.log_gates.at(slot, head);
      for (int token = thread; token < count; token += kThreads) {
        gates[params.pool.place(cursor, cursor.length + token)] =
            params.log_gate[(first + token) * params.gate_stride.token +
                            head * params.gate_stride.head];
      }
    }
  }
};

}  // namespace retention::kernel
