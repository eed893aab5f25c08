// The mainloop that reduces over tokens: S += sum_j phi(k_j) v_j^T and z += sum_j phi(k_j).
//
// phi(k) is never stored. A warp owns a tile of state rows and builds its rows of phi(k)^T as the
// A operand of mma.m16n8k16 (M = state rows, K = tokens), from two kinds of blocks of the key:
//
//   *native* blocks Y0, Y1: ldmatrix.trans leaves k[8 Y + g] for a pair of tokens in lane group g,
//   *outer* block X: the same for X, then a shuffle gives every lane group k[8 X + x].
//
// Rows g and g + 8 of the tile for x are x times element g of Y0 and of Y1. One outer block and two
// native ones make a *unit* of 8 x 2 x 8 = 128 rows: two block pairs that share a block. Sharing it
// halves the shuffles, which with the loads of V decide how fast a loop over shared memory can go:
// for 16 tokens 8 + 6 + 16 + 4 wavefronts (shuffles, keys, values, weights) serve 33 mma. With
// wgmma (warpgroup.hpp) as many: it reads the values where they lie, but again for every value of
// x.
//
// Gradients of a state need the same sums over queries, with other weights in z than in S. There
// two packed fma weigh a pair of tokens for S, by w = w0 + w1 in two 16-bit numbers, and one
// multiply for z: a third of the instructions that one set of fp32 weights takes. Of a loop that
// issues three instructions an mma, two sets of fp32 weights would be a sixth.

#pragma once

#include <cstddef>

#include <cute/tensor.hpp>

#include "retention/collective/tile.hpp"
#include "retention/collective/warpgroup.hpp"
#include "retention/detail/packed.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::collective {

/// Two block pairs of the degree-2 symmetric power that share a block.
struct StateUnit {
  int outer;      // X
  int native[2];  // Y0, Y1

  /// Every block pair I <= J belongs to exactly one of D / 128 units. Blocks J are taken four at a
  /// time: each I below the four shares itself with two pairs of them, and the ten pairs among the
  /// four make five units.
  CUTE_HOST_DEVICE static constexpr StateUnit make(int unit) {
    int group = 0;
    while (4 * (group + 1) * (group + 1) + group + 1 <= unit) {
      ++group;
    }
    int const first = 4 * group;
    int const rest = unit - 4 * group * group - group;
    if (rest < 2 * first) {
      int const native = first + rest % 2 * 2;
      return {rest / 2, {native, native + 1}};
    }
    // (0 0)(0 1), (0 2)(0 3), (1 1)(1 2), (2 2)(2 3), (3 3)(1 3)
    int const last = rest - 2 * first;
    int const outer = last == 0 ? 0 : last - 1;
    int const native = last == 1 ? 2 : outer;
    return {first + outer, {first + native, first + (last == 4 ? 1 : native + 1)}};
  }

  /// Row of element (x, y) of block pair `i`: row(i) + x * stride_outer(i) + y * stride_native(i).
  CUTE_HOST_DEVICE constexpr int row(int i) const {
    int const high = outer < native[i] ? native[i] : outer;
    int const low = outer < native[i] ? outer : native[i];
    return 64 * (high * (high + 1) / 2 + low);
  }
  CUTE_HOST_DEVICE constexpr int stride_outer(int i) const { return outer <= native[i] ? 8 : 1; }
  CUTE_HOST_DEVICE constexpr int stride_native(int i) const { return outer <= native[i] ? 1 : 8; }
};

/// The part of a block of `Warps` warps. Warp w of a block has the *task* first_task + w, where
/// first_task is a multiple of Warps. With `KeySumWeights`, tokens have weights of their own in z.
template <class Element_, int HeadDim, int ValueDim, int Warps, bool KeySumWeights = false>
struct ExpandReduce {
  using Element = Element_;

  static constexpr bool kWarpgroups = kTakesWarpgroups<ValueDim>;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kTileTokens = 64;
  static constexpr int kStages = 4;
  // A warp holds 128 accumulators a lane whatever the width of V: 64 rows x 64 or 128 x 32 columns.
  static constexpr int kValueTile = ValueDim < 64 ? ValueDim : 64;
  static constexpr int kOuterTile = 256 / kValueTile < 8 ? 256 / kValueTile : 8;  // values of x
  static constexpr int kUnits = static_cast<int>(SymmetricPower<HeadDim, 2>::kStateDim) / 128;
  static constexpr int kUnitTasks = 8 / kOuterTile;
  static constexpr int kTasks = kUnits * kUnitTasks;  // warps that cover the rows

  // A block of threads needs three blocks of the key for each of its units. Where they fit, a tile
  // holds those alone, in this order: X, Y0, Y1 of the first unit, X of the second. Reading all of
  // the key would keep the L2 cache almost as busy as the tensor cores.
  static constexpr int kBlockUnits = Warps / kUnitTasks;
  static constexpr int kGatheredColumns = 8 * cute::bit_ceil(3u * kBlockUnits);
  static constexpr bool kGathered = kGatheredColumns <= HeadDim;
  static constexpr int kKeyColumns = kGathered ? kGatheredColumns : HeadDim;

  static_assert(Warps % kUnitTasks == 0, "a unit belongs to one block of threads");
  static_assert(!kWarpgroups || Warps % 4 == 0, "warpgroups");
  static_assert(HeadDim % 32 == 0, "units take four blocks at a time");
  static_assert(ValueDim % kValueTile == 0 && kValueTile % 32 == 0, "32, or a multiple of 64");

  using KeyLayout = StagedTileLayout<kTileTokens, kKeyColumns, kStages>;   // [token, d, stage]
  using ValueLayout = StagedTileLayout<kTileTokens, kValueTile, kStages>;  // [token, dv, stage]

  /// Both weights of the four tokens of 16 that a lane needs, 2 t + {0, 1, 8, 9}, each as a number
  /// and what is left of it.
  struct alignas(32) TwoWeights {
    Element high[4];  // in S
    Element low[4];
    Element sum_high[4];  // in z
    Element sum_low[4];
  };

  struct OneWeightStorage {
    alignas(128) Element key[cute::cosize_v<KeyLayout>];
    alignas(128) Element value[cute::cosize_v<ValueLayout>];
    alignas(16) float weight[kStages][kTileTokens];  // of token t at weight_index(t)
  };
  struct TwoWeightsStorage {
    alignas(128) Element key[cute::cosize_v<KeyLayout>];
    alignas(128) Element value[cute::cosize_v<ValueLayout>];
    TwoWeights weight[kStages][kTileTokens / 4];
  };
  using SharedStorage = cute::conditional_t<KeySumWeights, TwoWeightsStorage, OneWeightStorage>;
  static_assert(offsetof(SharedStorage, value) % kWarpgroupTileAlignment == 0, "tiles of wgmma");

  /// Where the weight of a token is: the four that a lane needs for 16 tokens lie side by side.
  CUTE_HOST_DEVICE static constexpr int weight_index(int token) {
    return token / 16 * 16 + token % 8 / 2 * 4 + token % 16 / 8 * 2 + token % 2;
  }

  /// Sets both weights of a token.
  CUTE_DEVICE static void set_weights(SharedStorage& shared, int stage, int token, float weight,
                                      float sum_weight) {
    static_assert(KeySumWeights, "fp32 weights are set in place");
    int const index = weight_index(token);
    TwoWeights& target = shared.weight[stage][index / 4];
    Element const high(weight);
    target.high[index % 4] = high;
    target.low[index % 4] = Element(weight - float(high));
    Element const sum_high(sum_weight);
    target.sum_high[index % 4] = sum_high;
    target.sum_low[index % 4] = Element(sum_weight - float(sum_high));
  }

  /// What a warp owns and keeps in registers. Lane (g, t) holds of the tile for x, native block i:
  /// state[2 i + c, x, n] = S[(x, y = g), 8 n + 2 t + c] and
  /// key_sum[2 i + c] = z[(2 t + c, y = g)].
  struct Accumulators {
    cute::array_aligned<float, 4 * kOuterTile * kValueTile / 8> state;
    float key_sum[4];
  };

  CUTE_HOST_DEVICE static auto state_tensor(Accumulators& accumulators) {
    // (MMA, MMA_M, MMA_N), those of an x one after another
    return cute::make_tensor(
        cute::make_rmem_ptr(accumulators.state.data()),
        cute::Layout<
            cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<kOuterTile>,
                        cute::Int<kValueTile / 8>>,
            cute::Stride<cute::Stride<cute::_1, cute::_2>, cute::Int<kValueTile / 2>, cute::_4>>{});
  }

  int const lane;
  StateUnit const unit;
  StateUnit const tile_unit;  // where the unit's blocks are in a tile of keys
  int const first_outer;      // the first of kOuterTile values of x

  CUTE_DEVICE ExpandReduce(int lane_, int task)
      : lane(lane_),
        unit(StateUnit::make(task / kUnitTasks)),
        tile_unit(kGathered ? gathered_unit(task / kUnitTasks % kBlockUnits) : unit),
        first_outer(task % kUnitTasks * kOuterTile) {}

  /// The block of the key at block `index` of a tile; below 0 for none.
  CUTE_DEVICE static int key_block(int first_task, int index) {
    if constexpr (kGathered) {
      int const task_unit = first_task / kUnitTasks + index / 3;
      if (index >= 3 * kBlockUnits || task_unit >= kUnits) {
        return -1;
      }
      StateUnit const unit = StateUnit::make(task_unit);
      return index % 3 == 0 ? unit.outer : index % 3 == 1 ? unit.native[0] : unit.native[1];
    } else {
      return index;
    }
  }

  static constexpr int kSteps = kTileTokens / 16;  // of 16 tokens, in a tile

  /// The operands of a step in registers, but for the products of keys.
  struct WarpOperands {
    std::uint32_t native[4];     // Y0, Y1 of the keys
    std::uint32_t sum_outer[2];  // X, by the tokens' weights in z
    std::uint32_t outer[2];      // X, by the tokens' weights
    std::uint32_t broadcast[2];  // X of the first value of x, the same for all lane groups
    cute::array_aligned<Element, kValueTile / 2> value;
  };
  /// For wgmma: the products, and where the values are. While those of a step are made, the tensor
  /// cores read those of the step before.
  struct WarpgroupOperands {
    std::uint32_t native[4];
    std::uint32_t sum_outer[2];
    std::uint32_t product[kOuterTile][4];
    std::uint32_t busy[kOuterTile][4];
    std::uint64_t value;
  };
  using Operands = cute::conditional_t<kWarpgroups, WarpgroupOperands, WarpOperands>;

  CUTE_DEVICE static auto value_tensor(WarpOperands& operands) {
    return cute::make_tensor(
        cute::make_rmem_ptr(operands.value.data()),
        cute::Layout<cute::Shape<cute::_4, cute::Int<kValueTile / 8>>>{});  // (MMA, N)
  }

  /// Loads the operands of a step of the tile in `stage`.
  CUTE_DEVICE void load(SharedStorage const& shared, int stage, int step,
                        WarpOperands& operands) const {
    weigh(load_keys(shared, stage, step, operands.native), operands);
    cute::Tensor value = value_tensor(operands);
    load_rows_transposed(shared.value, ValueLayout{}, 16 * step, 0, stage, lane, value);
  }
  CUTE_DEVICE void load(SharedStorage const& shared, int stage, int step,
                        WarpgroupOperands& operands) const {
    using Tile = WarpgroupTile<kTileTokens, kValueTile>;
    Keys const keys = load_keys(shared, stage, step, operands.native);
    std::uint32_t outer[2];
    weigh(keys, outer, operands.sum_outer);
#pragma unroll
    for (int x = 0; x < kOuterTile; ++x) {
      multiply(operands.native, broadcast(outer[0], x), broadcast(outer[1], x),
               operands.product[x]);
    }
    typename Tile::Start const value(shared.value + stage * (kTileTokens * kValueTile));
    operands.value = value.at(16 * step, 0);
  }

  /// Adds a step's 16 tokens, each by its weight, and replaces its operands by those of `step` of
  /// the tile in `stage`; before any of those is read, calls `prepare`. Loading, weighing and
  /// shuffling keys takes long: it is spread over the step, so that the tensor cores need not wait.
  template <class Prepare>
  CUTE_DEVICE void add_and_load(SharedStorage const& shared, int stage, int step,
                                WarpOperands& operands, Accumulators& accumulators,
                                Prepare prepare) const {
    using cute::Tensor;
    Tensor b = value_tensor(operands);
    Tensor state = state_tensor(accumulators);  // (MMA, x, N)
    WarpOperands next;
    Keys keys;

    add_key_sum(operands, accumulators);
    std::uint32_t lo = operands.broadcast[0];
    std::uint32_t hi = operands.broadcast[1];
#pragma unroll
    for (int x = 0; x < kOuterTile; ++x) {
      std::uint32_t a[4];
      multiply(operands.native, lo, hi, a);
      if (x + 1 < kOuterTile) {
        lo = broadcast(operands.outer[0], x + 1);
        hi = broadcast(operands.outer[1], x + 1);
      }
      if (x == kOuterTile / 4) {
        prepare();
        keys = load_keys(shared, stage, step, next.native);
      } else if (x == kOuterTile / 2) {
        weigh(keys, next);
      }
#pragma unroll
      for (int n = 0; n < kValueTile / 8; ++n) {
        Tensor pairs = cute::recast<std::uint32_t>(b(cute::_, n));
        float* c = &state(0, x, n);
        MmaOperation<Element>::type::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], pairs(0),
                                         pairs(1), c[0], c[1], c[2], c[3]);
        if (x == kOuterTile - 1 && n % 2 == 1) {
          // Nobody needs this pair of columns any more.
          Tensor pair = cute::make_tensor(&b(0, n - 1), cute::Shape<cute::_4, cute::_2>{});
          load_rows_transposed(shared.value, ValueLayout{}, 16 * step, 8 * (n - 1), stage, lane,
                               pair);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      operands.native[i] = next.native[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      operands.outer[i] = next.outer[i];
      operands.sum_outer[i] = next.sum_outer[i];
      operands.broadcast[i] = next.broadcast[i];
    }
  }
  template <class Prepare>
  CUTE_DEVICE void add_and_load(SharedStorage const& shared, int stage, int step,
                                WarpgroupOperands& operands, Accumulators& accumulators,
                                Prepare prepare) const {
    float* const state = accumulators.state.data();
    cute::warpgroup_arrive();
#pragma unroll
    for (int x = 0; x < kOuterTile; ++x) {
      warpgroup_multiply<Element, kValueTile, Major::MN>(operands.product[x], operands.value,
                                                         state + x * (kValueTile / 2), true);
    }
    cute::warpgroup_commit_batch();
    add_key_sum(operands, accumulators);
    if (step > 1) {
      cute::warpgroup_wait<1>();
      hold(operands.busy);
    }
    prepare();
    WarpgroupOperands next;
    load(shared, stage, step, next);
#pragma unroll
    for (int i = 0; i < 4 * kOuterTile; ++i) {
      next.busy[i / 4][i % 4] = operands.product[i / 4][i % 4];
    }
    if (step == 0) {
      // Nothing is on its way from one tile to the next: ptxas would make all products wait.
      cute::warpgroup_wait<0>();
      hold<kOuterTile * kValueTile / 2>(state);
      hold(next.busy);
    }
    operands = next;
  }

 private:
  /// The outer block of the keys of 16 tokens, and the tokens' weights.
  struct Keys {
    std::uint32_t outer[2];
    float4 weight;
    uint4 split_weight;  // high and low, instead of weight
    uint4 split_sum_weight;
  };

  CUTE_DEVICE Keys load_keys(SharedStorage const& shared, int stage, int step,
                             std::uint32_t (&native)[4]) const {
    // Matrices of ldmatrix in the order of the A operand: (Y0, tokens 0-7), (Y1, 0-7), (Y0, 8-15),
    // (Y1, 8-15).
    KeyLayout const key_layout;
    Element const* key = shared.key + key_layout(0, 0, stage);
    int const native_block = lane / 8 % 2 == 0 ? tile_unit.native[0] : tile_unit.native[1];
    Element const* native_source = key + key_layout(lane % 8 + lane / 16 * 8, 8 * native_block, 0);
    Element const* outer_source = key + key_layout(lane % 16, 8 * tile_unit.outer, 0);
    int const first = key_layout(16 * step, 0, 0);
    Keys keys;
    cute::SM75_U16x4_LDSM_T::copy(*reinterpret_cast<cute::uint128_t const*>(outer_source + first),
                                  keys.outer[0], keys.outer[1]);
    if constexpr (KeySumWeights) {
      TwoWeights const& weight = shared.weight[stage][4 * step + lane % 4];
      keys.split_weight = *reinterpret_cast<uint4 const*>(weight.high);
      keys.split_sum_weight = *reinterpret_cast<uint4 const*>(weight.sum_high);
    } else {
      float const* weight = &shared.weight[stage][16 * step + lane % 4 * 4];
      keys.weight = *reinterpret_cast<float4 const*>(weight);
    }
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<cute::uint128_t const*>(native_source + first),
                                  native[0], native[1], native[2], native[3]);
    return keys;
  }

  /// Rows of phi(k)^T as the A operand: of a value of x, in both halves of `lo` and `hi`.
  CUTE_DEVICE static void multiply(std::uint32_t const (&native)[4], std::uint32_t lo,
                                   std::uint32_t hi, std::uint32_t (&product)[4]) {
    product[0] = detail::multiply<Element>(native[0], lo);
    product[1] = detail::multiply<Element>(native[1], lo);
    product[2] = detail::multiply<Element>(native[2], hi);
    product[3] = detail::multiply<Element>(native[3], hi);
  }

  // z of a unit is the small Gram matrix of Y and X, whose operands are all in registers already.
  template <class StepOperands>
  CUTE_DEVICE static void add_key_sum(StepOperands const& operands, Accumulators& accumulators) {
    float (&sum)[4] = accumulators.key_sum;
    std::uint32_t const(&native)[4] = operands.native;
    MmaOperation<Element>::type::fma(sum[0], sum[1], sum[2], sum[3], native[0], native[1],
                                     native[2], native[3], operands.sum_outer[0],
                                     operands.sum_outer[1], sum[0], sum[1], sum[2], sum[3]);
  }

  CUTE_DEVICE void weigh(Keys const& keys, WarpOperands& operands) const {
    weigh(keys, operands.outer, operands.sum_outer);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      operands.broadcast[i] = broadcast(operands.outer[i], 0);
    }
  }

  CUTE_DEVICE static void weigh(Keys const& keys, std::uint32_t (&by_weight)[2],
                                std::uint32_t (&by_sum_weight)[2]) {
    std::uint32_t const(&outer)[2] = keys.outer;
    if constexpr (KeySumWeights) {
      auto weighed = [](std::uint32_t x, std::uint32_t high, std::uint32_t low) {
        return detail::multiply_add<Element>(x, high, detail::multiply<Element>(x, low));
      };
      by_weight[0] = weighed(outer[0], keys.split_weight.x, keys.split_weight.z);
      by_weight[1] = weighed(outer[1], keys.split_weight.y, keys.split_weight.w);
      uint4 const& sum = keys.split_sum_weight;
      by_sum_weight[0] = weighed(outer[0], sum.x, sum.z);
      by_sum_weight[1] = weighed(outer[1], sum.y, sum.w);
    } else {
      float4 const& weight = keys.weight;
      by_weight[0] = detail::pack<Element>(detail::unpack_lo<Element>(outer[0]) * weight.x,
                                           detail::unpack_hi<Element>(outer[0]) * weight.y);
      by_weight[1] = detail::pack<Element>(detail::unpack_lo<Element>(outer[1]) * weight.z,
                                           detail::unpack_hi<Element>(outer[1]) * weight.w);
      by_sum_weight[0] = by_weight[0];
      by_sum_weight[1] = by_weight[1];
    }
  }

  /// What the lane group of the x-th value has, for every lane group.
  CUTE_DEVICE std::uint32_t broadcast(std::uint32_t outer, int x) const {
    return __shfl_sync(0xffffffffu, outer, 4 * (first_outer + x) + lane % 4);
  }

  CUTE_HOST_DEVICE static constexpr StateUnit gathered_unit(int index) {
    return {3 * index, {3 * index + 1, 3 * index + 2}};
  }
};

}  // namespace retention::collective
