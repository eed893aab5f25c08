// Zeros for the tokens of no packed sequence, on the emulator: those rows and no others are
// written, whatever cu_seqlens holds.

#include "retention/kernel/unowned_rows.hpp"

#include <algorithm>
#include <vector>

#include "check.hpp"
#include "kernel_test.hpp"

namespace {

using emulator::GlobalArray;
using retention::kernel::UnownedRows;
using std::size_t;

// [tokens, heads, words], with gaps between heads and tokens.
void run(std::vector<int> const& bounds, int tokens, int heads, int words) {
  GlobalArray<int> cu_seqlens("cu_seqlens", bounds.size(), true);
  std::copy(bounds.begin(), bounds.end(), cu_seqlens.begin());
  auto const t = static_cast<size_t>(tokens), h = static_cast<size_t>(heads);
  auto const w = static_cast<size_t>(words);
  size_t const head_stride = w + 3, token_stride = h * head_stride + 1;
  GlobalArray<float> strided("strided", (t - 1) * token_stride + (h - 1) * head_stride + w);
  GlobalArray<float> narrow("narrow", t);
  UnownedRows::Params params{};
  params.cu_seqlens = cu_seqlens.data();
  params.count = static_cast<int>(bounds.size()) - 1;
  params.tokens = tokens;
  params.tensors[0] = {reinterpret_cast<std::uint32_t*>(strided.data()),
                       static_cast<std::int64_t>(token_stride),
                       static_cast<std::int64_t>(head_stride), heads, words};
  params.tensors[2] = {reinterpret_cast<std::uint32_t*>(narrow.data()), 1, 1, 1, 1};
  if (!retention::test::launch<UnownedRows>(params, 0)) {
    return;
  }
  auto const first = static_cast<size_t>(std::clamp(bounds.front(), 0, tokens));
  auto const end = std::max(first, static_cast<size_t>(std::clamp(bounds.back(), 0, tokens)));
  size_t zeros = 0, narrow_zeros = 0;
  for (size_t i = 0; i < t; ++i) {
    bool const unowned = i < first || i >= end;
    for (size_t n = 0; n < h * w; ++n) {
      float const x = strided[i * token_stride + n / w * head_stride + n % w];
      RETENTION_CHECK(unowned ? x == 0.0f : std::isnan(x));
      zeros += unowned;
    }
    RETENTION_CHECK(unowned ? narrow[i] == 0.0f : std::isnan(narrow[i]));
    narrow_zeros += unowned;
  }
  // Nothing between the rows either.
  RETENTION_CHECK_EQUAL(retention::test::written(strided), zeros);
  RETENTION_CHECK_EQUAL(retention::test::written(narrow), narrow_zeros);
}

}  // namespace

RETENTION_TEST(unowned_rows) {
  run({0, 3, 3, 7}, 10, 2, 5);
  run({4, 9}, 9, 1, 33);       // before the first sequence
  run({2, 5, 6}, 40, 3, 64);   // on both sides
  run({0, 30}, 30, 2, 16);     // nothing
  run({0, 0, 0}, 20, 2, 16);   // everything
  run({-5, 3, 99}, 20, 1, 4);  // out of bounds
  run({-5, 3}, 20, 1, 4);
  run({25, 30}, 20, 1, 4);
  run({15, 3, 4}, 20, 1, 4);  // falling
  run({1, 2}, 5000, 1, 2);    // more rows than blocks have warps
}
