// The order of the rows of a power retention state.
//
// The state of a head is S [D, dv] and z [D]: sums of phi_k(k_j) v_j^T and of phi_k(k_j), where phi
// is the symmetric power of degree p, so that for every query and key
//
//     phi_q(q) . phi_k(k) = (q . k)^p .
//
// Expanding (q . k)^p gives one term x[i1] ... x[ip] for each of the d^p index tuples; terms that
// differ only by a permutation are equal, and the symmetric power keeps one of them. It is kept at
// the granularity of blocks: the head dimension is cut into blocks of `block_width` elements, only
// tuples of blocks B1 <= B2 <= ... <= Bp are kept, and inside a tuple every combination of offsets.
//
//     row    = tuple * width^p + (a1 * width^(p-1) + a2 * width^(p-2) + ... + ap)
//     tuple  = sum_i C(B_i + i - 1, i),  i = 1 ... p           (colexicographic rank)
//     value  = prod_i x[width * B_i + a_i]
//     weight = p! / prod(count of each distinct block)!        (phi_k only; phi_q has weight 1)
//
// For p = 2 the tuple is the block pair I <= J with rank J (J + 1) / 2 + I, and D = d (d + 8) / 2.
// The order is public: it is what a caller stores when storing a state.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RETENTION_HOST_DEVICE __host__ __device__
#else
#define RETENTION_HOST_DEVICE
#endif

namespace retention {

namespace detail {

// value * numerator / denominator, where the quotient is known to be whole, without the product
// overflowing on the way; INT64_MAX if the result does not fit (or `value` already did not).
RETENTION_HOST_DEVICE constexpr std::int64_t scale_exactly(std::int64_t value,
                                                           std::int64_t numerator,
                                                           std::int64_t denominator) {
  if (value == INT64_MAX) {
    return INT64_MAX;
  }
  std::int64_t const quotient = value / denominator;
  std::int64_t const rest = (value % denominator) * numerator / denominator;
  return quotient > (INT64_MAX - rest) / numerator ? INT64_MAX : quotient * numerator + rest;
}

// C(n, k), or INT64_MAX if it does not fit.
RETENTION_HOST_DEVICE constexpr std::int64_t binomial(std::int64_t n, std::int64_t k) {
  if (k < 0 || k > n) {
    return 0;
  }
  // The shorter of the two equal products; each partial product is itself a binomial coefficient.
  std::int64_t const terms = k < n - k ? k : n - k;
  std::int64_t result = 1;
  for (std::int64_t i = 1; i <= terms && result != INT64_MAX; ++i) {
    result = scale_exactly(result, n - terms + i, i);
  }
  return result;
}

// The largest block B < `end` with C(B + i - 1, i) <= rank: step i of colexicographic unranking.
RETENTION_HOST_DEVICE constexpr int unrank_block(std::int64_t rank, int i, int end) {
  int low = 0;
  while (end - low > 1) {
    int const middle = low + (end - low) / 2;
    if (binomial(std::int64_t{middle} + i - 1, i) <= rank) {
      low = middle;
    } else {
      end = middle;
    }
  }
  return low;
}

}  // namespace detail

/// Elements of x in one block: 8 for degree 2, 2 for degree 4, 1 above.
///
/// Wide blocks let a kernel build rows by outer products of contiguous pieces of x, at the price of
/// keeping both orders of a pair inside a diagonal block. That price grows with width and degree.
RETENTION_HOST_DEVICE constexpr int block_width(int degree) {
  return degree == 2 ? 8 : degree == 4 ? 2 : 1;
}

/// Number of blocks that a head dimension is cut into.
RETENTION_HOST_DEVICE constexpr int num_blocks(int head_dim, int degree) {
  return head_dim / block_width(degree);
}

/// Rows that share one tuple of blocks: width^p, the combinations of offsets.
RETENTION_HOST_DEVICE constexpr std::int64_t rows_per_tuple(int degree) {
  return degree == 2 ? 64 : degree == 4 ? 16 : 1;
}

/// Number of tuples B1 <= ... <= Bp: C(blocks + p - 1, p), or INT64_MAX if it does not fit.
RETENTION_HOST_DEVICE constexpr std::int64_t num_tuples(int head_dim, int degree) {
  return detail::binomial(std::int64_t{num_blocks(head_dim, degree)} + degree - 1, degree);
}

/// Rows of the state, D; INT64_MAX if they do not fit 64 bits (see `is_supported`).
RETENTION_HOST_DEVICE constexpr std::int64_t state_dim(int head_dim, int degree) {
  return detail::scale_exactly(num_tuples(head_dim, degree), rows_per_tuple(degree), 1);
}

/// The largest multiplicity of any row: that of the tuple whose blocks repeat least.
RETENTION_HOST_DEVICE constexpr std::int64_t max_multiplicity(int head_dim, int degree) {
  std::int64_t result = 1;
  int const blocks = num_blocks(head_dim, degree);
  for (int placed = 1; placed <= degree && result != INT64_MAX; ++placed) {
    result = detail::scale_exactly(result, placed, (placed - 1) / blocks + 1);
  }
  return result;
}

/// Whether the functions below are defined: `head_dim` is a positive multiple of 8, `degree` is
/// positive and even, and both D and every multiplicity fit 64 bits.
RETENTION_HOST_DEVICE constexpr bool is_supported(int head_dim, int degree) {
  return head_dim > 0 && head_dim % 8 == 0 && degree > 0 && degree % 2 == 0 &&
         state_dim(head_dim, degree) != INT64_MAX &&
         max_multiplicity(head_dim, degree) != INT64_MAX;
}

/// The block B_(position + 1) of a row, 0 <= position < degree. Never decreases with `position`.
RETENTION_HOST_DEVICE constexpr int row_block(std::int64_t row, int position, int head_dim,
                                              int degree) {
  std::int64_t rank = row / rows_per_tuple(degree);
  int end = num_blocks(head_dim, degree);
  int block = 0;
  // Unranking runs from the last, largest block down; each bounds the next.
  for (int i = degree; i > position; --i) {
    block = detail::unrank_block(rank, i, end);
    rank -= detail::binomial(std::int64_t{block} + i - 1, i);
    end = block + 1;
  }
  return block;
}

/// The offset a_(position + 1) of a row inside its block; the last position varies fastest.
RETENTION_HOST_DEVICE constexpr int row_offset(std::int64_t row, int position, int degree) {
  int const width = block_width(degree);
  for (int i = degree - 1; i > position; --i) {
    row /= width;
  }
  return static_cast<int>(row % width);
}

/// The index into x of a row's factor at `position`: a row's value is the product of its p factors.
RETENTION_HOST_DEVICE constexpr int row_factor(std::int64_t row, int position, int head_dim,
                                               int degree) {
  return block_width(degree) * row_block(row, position, head_dim, degree) +
         row_offset(row, position, degree);
}

/// How many orderings of its blocks a row stands for, p! / prod(count of each distinct block)!.
/// It multiplies phi_k and not phi_q.
RETENTION_HOST_DEVICE constexpr std::int64_t row_multiplicity(std::int64_t row, int head_dim,
                                                              int degree) {
  std::int64_t rank = row / rows_per_tuple(degree);
  int end = num_blocks(head_dim, degree);
  int previous = -1;
  int run = 0;
  std::int64_t result = 1;
  for (int i = degree; i > 0; --i) {
    int const block = detail::unrank_block(rank, i, end);
    rank -= detail::binomial(std::int64_t{block} + i - 1, i);
    end = block + 1;
    run = block == previous ? run + 1 : 1;
    previous = block;
    // After n blocks the result is n! / prod(run lengths)!, a whole number at every step.
    result = detail::scale_exactly(result, degree - i + 1, run);
  }
  return result;
}

/// The same definition with head dimension and degree fixed at compile time.
template <int HeadDim, int Degree>
struct SymmetricPower {
  static_assert(HeadDim > 0 && HeadDim % 8 == 0, "HeadDim must be a positive multiple of 8");
  static_assert(Degree > 0 && Degree % 2 == 0, "Degree must be positive and even");
  static_assert(is_supported(HeadDim, Degree),
                "the rows or the multiplicities of this symmetric power do not fit 64 bits");

  static constexpr int kHeadDim = HeadDim;
  static constexpr int kDegree = Degree;
  static constexpr int kBlockWidth = block_width(Degree);
  static constexpr int kNumBlocks = num_blocks(HeadDim, Degree);
  static constexpr std::int64_t kRowsPerTuple = rows_per_tuple(Degree);
  static constexpr std::int64_t kNumTuples = num_tuples(HeadDim, Degree);
  static constexpr std::int64_t kStateDim = state_dim(HeadDim, Degree);

  RETENTION_HOST_DEVICE static constexpr int block(std::int64_t row, int position) {
    return row_block(row, position, HeadDim, Degree);
  }
  RETENTION_HOST_DEVICE static constexpr int offset(std::int64_t row, int position) {
    return row_offset(row, position, Degree);
  }
  RETENTION_HOST_DEVICE static constexpr int factor(std::int64_t row, int position) {
    return row_factor(row, position, HeadDim, Degree);
  }
  RETENTION_HOST_DEVICE static constexpr std::int64_t multiplicity(std::int64_t row) {
    return row_multiplicity(row, HeadDim, Degree);
  }
};

}  // namespace retention
