// The state order against an enumeration that shares no code with it, and against (q . k)^p.

#include <retention/symmetric_power.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <map>
#include <random>
#include <vector>

#include "check.hpp"

namespace {

using retention::SymmetricPower;

static_assert(SymmetricPower<16, 2>::kStateDim == 192);
static_assert(SymmetricPower<32, 2>::kStateDim == 640);
static_assert(SymmetricPower<64, 2>::kStateDim == 2304);
static_assert(SymmetricPower<128, 2>::kStateDim == 8704);
static_assert(SymmetricPower<256, 2>::kStateDim == 33792);
static_assert(SymmetricPower<16, 4>::kStateDim == 5280);
static_assert(SymmetricPower<8, 6>::kStateDim == 1716);  // C(13, 6)

static_assert(SymmetricPower<64, 2>::kBlockWidth == 8);
static_assert(SymmetricPower<64, 4>::kBlockWidth == 2);
static_assert(SymmetricPower<64, 6>::kBlockWidth == 1);
static_assert(SymmetricPower<64, 2>::kNumTuples == 36);

// Row 64 n + 8 a + b of degree 2, block pair n = J (J + 1) / 2 + I: here (I, J) = (1, 2), a 3, b 5.
constexpr std::int64_t kRow = 64 * (2 * 3 / 2 + 1) + 8 * 3 + 5;
static_assert(SymmetricPower<64, 2>::block(kRow, 0) == 1);
static_assert(SymmetricPower<64, 2>::block(kRow, 1) == 2);
static_assert(SymmetricPower<64, 2>::factor(kRow, 0) == 8 * 1 + 3);
static_assert(SymmetricPower<64, 2>::factor(kRow, 1) == 8 * 2 + 5);
static_assert(SymmetricPower<64, 2>::multiplicity(kRow) == 2);
static_assert(SymmetricPower<64, 2>::multiplicity(0) == 1);

static_assert(retention::is_supported(256, 2));
static_assert(!retention::is_supported(12, 2));
static_assert(!retention::is_supported(0, 2));
static_assert(!retention::is_supported(-8, 2));
static_assert(!retention::is_supported(64, 3));
static_assert(!retention::is_supported(64, 0));
static_assert(!retention::is_supported(64, -2));
// The last degree whose multiplicities fit 64 bits at head dimension 8, and the first that does not
// (26! / (3!^6 4!^2) > 2^63); a degree whose D does not fit; one that must not run for ever.
static_assert(retention::is_supported(8, 24));
static_assert(!retention::is_supported(8, 26));
static_assert(!retention::is_supported(256, 14));
static_assert(!retention::is_supported(8, 2147483646));

using Tuple = std::vector<int>;

// All tuples B1 <= ... <= Bp by recursion, then sorted by their last element, then the one before:
// that is what colexicographic means, and uses neither ranks nor binomial coefficients.
void extend(Tuple& prefix, int blocks, int degree, std::vector<Tuple>& tuples) {
  if (static_cast<int>(prefix.size()) == degree) {
    tuples.push_back(prefix);
    return;
  }
  for (int block = prefix.empty() ? 0 : prefix.back(); block < blocks; ++block) {
    prefix.push_back(block);
    extend(prefix, blocks, degree, tuples);
    prefix.pop_back();
  }
}

std::vector<Tuple> enumerate_tuples(int blocks, int degree) {
  std::vector<Tuple> tuples;
  Tuple prefix;
  extend(prefix, blocks, degree, tuples);
  std::sort(tuples.begin(), tuples.end(), [](Tuple const& left, Tuple const& right) {
    return std::lexicographical_compare(left.rbegin(), left.rend(), right.rbegin(), right.rend());
  });
  return tuples;
}

// The number of distinct orderings of a sorted tuple, by listing them.
std::int64_t count_permutations(Tuple tuple) {
  std::int64_t count = 0;
  do {
    ++count;
  } while (std::next_permutation(tuple.begin(), tuple.end()));
  return count;
}

template <int HeadDim, int Degree>
void test_order(int width) {
  using Power = SymmetricPower<HeadDim, Degree>;
  std::int64_t row = 0;
  std::int64_t factor_mismatches = 0;
  std::int64_t multiplicity_mismatches = 0;
  std::map<Tuple, std::int64_t> permutations;  // by the run lengths of the tuple
  for (Tuple const& tuple : enumerate_tuples(HeadDim / width, Degree)) {
    Tuple runs;
    for (std::size_t i = 0; i < tuple.size(); ++i) {
      if (i > 0 && tuple[i] == tuple[i - 1]) {
        ++runs.back();
      } else {
        runs.push_back(1);
      }
    }
    auto const [known, added] = permutations.try_emplace(runs, 0);
    if (added) {
      known->second = count_permutations(tuple);
    }
    // An odometer over the offsets, the last wheel fastest.
    Tuple offsets(Degree, 0);
    bool wrapped = false;
    while (!wrapped) {
      for (int i = 0; i < Degree; ++i) {
        auto const at = static_cast<std::size_t>(i);
        factor_mismatches += Power::block(row, i) != tuple[at];
        factor_mismatches += Power::offset(row, i) != offsets[at];
        factor_mismatches += Power::factor(row, i) != width * tuple[at] + offsets[at];
      }
      multiplicity_mismatches += Power::multiplicity(row) != known->second;
      ++row;
      int wheel = Degree - 1;
      while (wheel >= 0 && ++offsets[static_cast<std::size_t>(wheel)] == width) {
        offsets[static_cast<std::size_t>(wheel--)] = 0;
      }
      wrapped = wheel < 0;
    }
  }
  RETENTION_CHECK_EQUAL(Power::kBlockWidth, width);
  RETENTION_CHECK_EQUAL(factor_mismatches, 0);
  RETENTION_CHECK_EQUAL(multiplicity_mismatches, 0);
  // Every tuple and every combination of offsets was met once, so D is their number.
  RETENTION_CHECK_EQUAL(Power::kStateDim, row);
}

template <int HeadDim, int Degree>
void test_inner_product() {
  using Power = SymmetricPower<HeadDim, Degree>;
  std::mt19937 random(HeadDim * 100 + Degree);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 3; ++trial) {
    std::vector<double> q(HeadDim);
    std::vector<double> k(HeadDim);
    double dot = 0;
    double norms = 0;
    for (std::size_t i = 0; i < HeadDim; ++i) {
      q[i] = normal(random);
      k[i] = normal(random);
      dot += q[i] * k[i];
      norms += std::abs(q[i] * k[i]);
    }
    double expanded = 0;
    for (std::int64_t row = 0; row < Power::kStateDim; ++row) {
      double phi_q = 1;
      double phi_k = static_cast<double>(Power::multiplicity(row));
      for (int position = 0; position < Degree; ++position) {
        auto const factor = static_cast<std::size_t>(Power::factor(row, position));
        phi_q *= q[factor];
        phi_k *= k[factor];
      }
      expanded += phi_q * phi_k;
    }
    // The terms cancel; what they add up to without signs is (sum |q_i k_i|)^p. A few roundings of
    // a double (1.1e-16 each) relative to that is all that an exact expansion may differ by.
    double const tolerance = 1e-13 * std::pow(norms, Degree);
    double const error = std::abs(expanded - std::pow(dot, Degree));
    if (error > tolerance) {
      std::cerr << "d " << HeadDim << ", p " << Degree << ": error " << error << '\n';
    }
    RETENTION_CHECK(error <= tolerance);
  }
}

template <int HeadDim, int Degree>
void test_power(int width) {
  test_order<HeadDim, Degree>(width);
  test_inner_product<HeadDim, Degree>();
}

}  // namespace

RETENTION_TEST(symmetric_power) {
  test_power<8, 2>(8);
  test_power<16, 2>(8);
  test_power<64, 2>(8);
  test_power<128, 2>(8);
  test_power<8, 4>(2);
  test_power<16, 4>(2);
  test_power<8, 6>(1);
  test_power<16, 6>(1);
  test_power<8, 8>(1);
}
