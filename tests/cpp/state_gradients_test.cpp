// The gradients of states on the emulator against float64 loops.

#include "retention/kernel/state_gradients.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <random>
#include <vector>

#include "check.hpp"
#include "emulator/emulator.hpp"
#include "kernel_test.hpp"
#include "reference.hpp"
#include "retention/kernel/carry.hpp"

namespace {

using emulator::GlobalArray;
using retention::detail::CumulativeGate;
using retention::test::exponent_of;
using retention::test::first_slot_of;
using retention::test::GradientInputs;
using retention::test::launch;
using retention::test::Order;
using retention::test::State;
using retention::test::StatePart;
using retention::test::Sum;
using std::size_t;

struct Case {
  char const* name;
  int chunk_size = 64;
  std::vector<int> lengths = {128};  // one a sequence; rows of a batch unless `packed`
  bool packed = false;
  int group = 1;
  int heads = 1;
  float gate = 0.5f;  // minus the log gate of a chunk, at most; 0 for none
  bool final = false;
  int segment_chunks = 0;  // chunks in a segment; 0: one segment a sequence
  bool starts = true;      // whether the gradient of a sequence's initial state is wanted
  bool strided = false;    // gaps between rows, and another order of tokens and heads
  bool wild = false;       // weights and deltas of other magnitudes in every chunk; with exponents
  bool carries = false;    // joins the segments afterwards; needs all slices
  int first_token = 0;     // of the first packed sequence
};

/// Some of the slices of the state alone: all of them take too long for large ones.
template <class Kernel>
struct Sampled : Kernel {
  struct Params : Kernel::Params {
    int step;
    int offset;
  };

  CUTE_DEVICE void operator()(Params const& params, char* smem) const {
    if (static_cast<int>(blockIdx.x % Kernel::kSlices) % params.step == params.offset) {
      Kernel::operator()(params, smem);
    }
  }
};

/// What a slice of the state has of it.
template <class Kernel>
StatePart part_of(int slice) {
  using Mainloop = typename Kernel::Mainloop;
  constexpr int kWarps = Kernel::kThreads / 32;
  StatePart part{{}, slice / Kernel::kRowSlices * Kernel::kValueTile, Kernel::kValueTile};
  int const first_task = slice % Kernel::kRowSlices * kWarps;
  for (int task = first_task; task < std::min(first_task + kWarps, int{Mainloop::kTasks}); ++task) {
    auto const unit = retention::collective::StateUnit::make(task / Mainloop::kUnitTasks);
    int const first_outer = task % Mainloop::kUnitTasks * Mainloop::kOuterTile;
    for (int i = 0; i < 2; ++i) {
      for (int x = first_outer; x < first_outer + Mainloop::kOuterTile; ++x) {
        for (int y = 0; y < 8; ++y) {
          part.rows.push_back(unit.row(i) + x * unit.stride_outer(i) + y * unit.stride_native(i));
        }
      }
    }
  }
  return part;
}

template <class Element, int HeadDim, int ValueDim>
void run(Case const& c, std::uint64_t seed) {
  using Kernel = Sampled<retention::kernel::StateGradients<
      retention::kernel::StateGradientsTraits<Element, HeadDim, ValueDim>>>;
  using Carry = retention::kernel::Carry<retention::kernel::CarryTraits<
      Element, HeadDim, ValueDim, retention::kernel::Direction::kBackward>>;
  constexpr bool kHalf = std::is_same_v<Element, cute::half_t>;
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);

  auto const heads = static_cast<size_t>(c.heads), sequences = c.lengths.size();
  auto const group = static_cast<size_t>(c.group), query_heads = heads * group;
  auto const chunk_size = static_cast<size_t>(c.chunk_size);
  size_t const d = HeadDim, dv = ValueDim, D = Kernel::kStateDim;
  retention::test::SequenceLayout const layout(c.lengths, c.packed, c.first_token);
  // Prepared rows and gates are [b, h, t, *] and d_output is [b, t, h, *], or the other way round.
  auto const prepared = c.strided ? Order::kTokensHeads : Order::kHeadsTokens;
  auto const given = c.strided ? Order::kHeadsTokens : Order::kTokensHeads;
  size_t const gap = c.strided ? 8 : 0;
  auto const query_stride = layout.strides(prepared, query_heads, d + gap);
  auto const d_output_stride = layout.strides(given, query_heads, dv + gap);
  auto const row_stride = layout.strides(prepared, query_heads, 1 + gap);
  auto const gate_stride = layout.strides(prepared, heads, 1 + gap);
  GlobalArray<Element> query("query", layout.size_of(query_stride, query_heads, d), true);
  GlobalArray<Element> d_output("d_output", layout.size_of(d_output_stride, query_heads, dv), true);
  GlobalArray<float> weight("weight", layout.size_of(row_stride, query_heads, 1), true);
  GlobalArray<float> delta("delta", layout.size_of(row_stride, query_heads, 1), true);
  // Of which only the last of each chunk is there, the others are NaN.
  GlobalArray<CumulativeGate> gate("gate", layout.size_of(gate_stride, heads, 1), true);

  typename Kernel::Params params{};
  params.sequences = layout.in_chunks(c.chunk_size);
  // More than all tokens in a segment: then the item of a packed sequence is its index.
  int const one_segment = (params.sequences.length / c.chunk_size + 1) * c.chunk_size;
  params.segment_tokens = c.segment_chunks == 0 ? one_segment : c.segment_chunks * c.chunk_size;
  auto const segment_sequences = params.sequences.segments(params.segment_tokens);
  auto const items = static_cast<size_t>(segment_sequences.num_slots());
  auto present = params.sequences;  // the tokens that are there
  present.length = static_cast<int>(layout.tokens);
  auto const slots = static_cast<size_t>(present.num_slots());
  // The slots before that of the first sequence are not there.
  size_t const no_slots = first_slot_of(params.sequences, 0);
  GlobalArray<float> final_state("final_state", sequences * heads * D * dv, true);
  GlobalArray<float> final_sum("final_key_sum", sequences * heads * D, true);
  GlobalArray<float> initial_state("initial_state", items * heads * D * dv);
  GlobalArray<float> initial_sum("initial_key_sum", items * heads * D);
  GlobalArray<float> joined_state("joined_state", sequences * heads * D * dv);
  GlobalArray<float> joined_sum("joined_key_sum", sequences * heads * D);
  GlobalArray<Element> states("states", slots * heads * D * dv);
  GlobalArray<Element> key_sums("key_sums", slots * heads * D);
  GlobalArray<int> weight_exponent("exponents.weight", slots * heads, true);
  GlobalArray<int> delta_exponent("exponents.delta", slots * heads, true);
  GlobalArray<int> state_exponent("exponents.state", slots * heads, true);
  GlobalArray<int> sum_exponent("exponents.key_sum", slots * heads, true);

  // A sample of slices, another in every case.
  params.step = std::max(1, Kernel::kSlices / 3);
  params.offset = static_cast<int>(seed) % params.step;
  std::vector<StatePart> parts;
  for (int slice = params.offset; slice < Kernel::kSlices; slice += params.step) {
    parts.push_back(part_of<Kernel>(slice));
  }

  // Each sequence and key head: inputs for the reference, and the same in the kernel's tensors.
  float const query_magnitude = kHalf ? 0x1p7f : 1.0f;
  std::vector<GradientInputs> inputs(sequences * heads);
  for (size_t s = 0; s < sequences; ++s) {
    auto const length = static_cast<size_t>(c.lengths[s]);
    for (size_t h = 0; h < heads; ++h) {
      GradientInputs& in = inputs[s * heads + h];
      in = {c.lengths[s], c.group, HeadDim, ValueDim, {}, {}, {}, {}, {}};
      for (size_t start = 0; start < length; start += chunk_size) {
        size_t const end = std::min(start + chunk_size, length);
        size_t const slot = first_slot_of(params.sequences, s) - no_slots + start / chunk_size;
        int const weight_scale = c.wild ? static_cast<int>(rng() % 120) - 90 : 0;
        int const delta_scale = c.wild ? static_cast<int>(rng() % 61) - 30 : 0;
        weight_exponent[slot * heads + h] = -weight_scale;
        delta_exponent[slot * heads + h] = -weight_scale - delta_scale - 3;
        for (size_t i = start * group; i < end * group; ++i) {
          size_t const t = i / group, query_head = h * group + i % group;
          bool const weightless = rng() % 8 == 0;
          // Many that one 16-bit number holds as badly as any.
          float const w = rng() % 2 == 0
                              ? std::ldexp(1.0f + 6.97f * (kHalf ? 0x1p-11f : 0x1p-8f),
                                           weight_scale - 1 - static_cast<int>(rng() % 4))
                              : std::ldexp(0.05f + 0.95f * std::abs(uniform(rng)), weight_scale);
          for (size_t j = 0; j < d; ++j) {
            Element const x = weightless ? Element(0.0f) : Element(query_magnitude * uniform(rng));
            query[layout.at(query_stride, s, t, query_head) + j] = x;
            in.query.push_back(float(x));
          }
          for (size_t j = 0; j < dv; ++j) {
            Element const x = d_output[layout.at(d_output_stride, s, t, query_head) + j] =
                Element(uniform(rng));
            in.d_output.push_back(float(x));
          }
          in.weight.push_back(weightless ? 0.0f : w);
          in.delta.push_back(std::ldexp(8.0f * uniform(rng), delta_scale));
          weight[layout.at(row_stride, s, t, query_head)] = in.weight.back();
          delta[layout.at(row_stride, s, t, query_head)] = in.delta.back();
        }
        if (c.gate != 0.0f) {
          in.chunk_gate.push_back(-c.gate * (0.5f + 0.5f * std::abs(uniform(rng))));
          gate[layout.at(gate_stride, s, end - 1, h)] =
              CumulativeGate::from(retention::detail::kLog2E * double{in.chunk_gate.back()});
        }
      }
    }
  }
  float const final_magnitude = query_magnitude * query_magnitude;
  for (float& x : final_state) {
    x = final_magnitude * uniform(rng);
  }
  for (float& x : final_sum) {
    x = final_magnitude * uniform(rng);
  }

  // What is expected of each part, first of whole sequences.
  auto final_of = [&](size_t sequence_head, StatePart const& part) {
    size_t const columns = static_cast<size_t>(part.columns);
    State state{Sum(part.rows.size() * columns), Sum(part.rows.size())};
    auto set = [&](Sum& sum, size_t i, float x) {
      sum.value[i] = c.final ? x : 0.0f;
      sum.magnitude[i] = std::abs(sum.value[i]);
    };
    for (size_t m = 0; m < part.rows.size(); ++m) {
      size_t const row = sequence_head * D + static_cast<size_t>(part.rows[m]);
      set(state.key_sum, m, final_sum[row]);
      for (size_t e = 0; e < columns; ++e) {
        set(state.state, m * columns + e,
            final_state[row * dv + static_cast<size_t>(part.first_column) + e]);
      }
    }
    return state;
  };
  auto reference = [&](size_t sequence_head, size_t first, size_t end, State const& final,
                       StatePart const& part) {
    GradientInputs const& in = inputs[sequence_head];
    GradientInputs cut{
        static_cast<int>(end - first), c.group, HeadDim, ValueDim, {}, {}, {}, {}, {}};
    auto take = [&](std::vector<float> const& from, size_t width) {
      return std::vector<float>(from.begin() + static_cast<long>(first * width),
                                from.begin() + static_cast<long>(end * width));
    };
    cut.query = take(in.query, group * d);
    cut.d_output = take(in.d_output, group * dv);
    cut.weight = take(in.weight, group);
    cut.delta = take(in.delta, group);
    if (!in.chunk_gate.empty()) {
      cut.chunk_gate.assign(in.chunk_gate.begin() + static_cast<long>(first / chunk_size),
                            in.chunk_gate.end());
    }
    return retention::test::state_gradients(cut, final, c.chunk_size, part);
  };
  std::vector<std::vector<std::vector<State>>> whole(sequences * heads);
  for (size_t s = 0; s < sequences; ++s) {
    size_t const first_slot = first_slot_of(params.sequences, s) - no_slots;
    for (size_t h = 0; h < heads; ++h) {
      size_t const sequence_head = s * heads + h;
      for (StatePart const& part : parts) {
        whole[sequence_head].push_back(reference(sequence_head, 0,
                                                 static_cast<size_t>(c.lengths[s]),
                                                 final_of(sequence_head, part), part));
      }
      for (size_t chunk = 0; kHalf && chunk + 1 < whole[sequence_head][0].size(); ++chunk) {
        double largest = 0.0, largest_sum = 0.0;
        for (auto const& states_of_part : whole[sequence_head]) {
          State const& state = states_of_part[chunk + 1];
          for (double const x : state.state.magnitude) {
            largest = std::max(largest, x);
          }
          for (double const x : state.key_sum.magnitude) {
            largest_sum = std::max(largest_sum, x);
          }
        }
        size_t const slot_head = (first_slot + chunk) * heads + h;
        // A slack that differs from slot to slot.
        state_exponent[slot_head] =
            std::max(exponent_of(largest) - 15, -120) + static_cast<int>(chunk % 2);
        sum_exponent[slot_head] = std::max(exponent_of(largest_sum) - 15, -120);
      }
    }
  }

  params.query = query.data() - c.first_token * query_stride.token;
  params.d_output = d_output.data() - c.first_token * d_output_stride.token;
  params.weight = weight.data() - c.first_token * row_stride.token;
  params.delta = delta.data() - c.first_token * row_stride.token;
  params.gate = c.gate == 0.0f ? nullptr : gate.data() - c.first_token * gate_stride.token;
  params.query_stride = query_stride;
  params.d_output_stride = d_output_stride;
  params.row_stride = row_stride;
  params.gate_stride = gate_stride;
  params.final_state_gradient = c.final ? final_state.data() : nullptr;
  params.final_key_sum_gradient = c.final ? final_sum.data() : nullptr;
  params.d_states = states.data() - no_slots * heads * D * dv;
  params.d_key_sums = key_sums.data() - no_slots * heads * D;
  params.initial_state_gradient = initial_state.data();
  params.initial_key_sum_gradient = initial_sum.data();
  params.sequence_starts = c.starts;
  if (kHalf) {
    size_t const no_exponents = no_slots * heads;
    params.exponents.state = state_exponent.data() - no_exponents;
    params.exponents.key_sum = sum_exponent.data() - no_exponents;
    if (c.wild) {
      params.exponents.weight = weight_exponent.data() - no_exponents;
      params.exponents.delta = delta_exponent.data() - no_exponents;
    }
  }
  params.heads = c.heads;
  params.group = c.group;
  if (!launch<Kernel>(params, seed)) {
    return;
  }
  if (c.carries) {
    typename Carry::Params carry{};
    carry.states = params.d_states;
    carry.key_sums = params.d_key_sums;
    carry.segment_state = initial_state.data();
    carry.segment_key_sum = initial_sum.data();
    carry.gate = params.gate;
    carry.gate_stride = gate_stride;
    carry.state_exponents = params.exponents.state;
    carry.key_sum_exponents = params.exponents.key_sum;
    carry.ends = {joined_state.data(), joined_sum.data(), {}};
    carry.sequences = params.sequences;
    carry.heads = c.heads;
    carry.segment_tokens = params.segment_tokens;
    if (!launch<Carry>(carry, seed)) {
      return;
    }
  }

  double const u = retention::test::kRoundoff<Element>;
  // Half the spacing of the smallest numbers: only fp16 has them in range.
  double const spacing = kHalf ? 0x1p-25 : 0.0;
  double worst = 0.0;
  // S: the weighed query and phi are rounded, z: the weight and the weighed query; then what is
  // stored. The rest is fp32, and a weight for S in two parts is as good. A carry rounds again.
  auto compare = [&](auto const* actual, size_t row_size, StatePart const& part, size_t columns,
                     size_t first_column, Sum const& expected, double stored, double floor,
                     int exponent) {
    for (size_t i = 0; i < expected.value.size(); ++i) {
      size_t const index =
          static_cast<size_t>(part.rows[i / columns]) * row_size + first_column + i % columns;
      double const bound =
          (2 * u + 0x1p-16) * expected.magnitude[i] + floor +
          stored * (u * std::abs(expected.value[i]) + std::ldexp(spacing, exponent));
      double const value = std::ldexp(double{float(actual[index])}, exponent);
      double const error = std::abs(value - expected.value[i]);
      worst = std::max(worst, error == 0.0 ? 0.0 : error / bound);
      if (!(error <= bound)) {  // also for NaN
        std::cerr << c.name << ": [" << part.rows[i / columns] << ", " << first_column + i % columns
                  << "] is " << value << ", not " << expected.value[i] << ", with an error above "
                  << bound << '\n';
        return false;
      }
    }
    return true;
  };
  for (size_t s = 0; s < sequences; ++s) {
    auto const length = static_cast<size_t>(c.lengths[s]);
    size_t const first_slot = first_slot_of(params.sequences, s) - no_slots;
    size_t const chunks = (length + chunk_size - 1) / chunk_size;
    auto const per_segment = static_cast<size_t>(params.segment_tokens) / chunk_size;
    size_t const segments =
        c.carries ? 1 : std::max<size_t>(1, (chunks + per_segment - 1) / per_segment);
    for (size_t h = 0; h < heads; ++h) {
      size_t const sequence_head = s * heads + h;
      GradientInputs const& in = inputs[sequence_head];
      // What is lost below the smallest numbers before each chunk: a query has elements below q,
      // its weighed ones are off by (q + 2) times half the spacing, phi by another half.
      double const q = query_magnitude;
      std::vector<double> floor(chunks + 1, 0.0), sum_floor(chunks + 1, 0.0);
      for (size_t chunk = chunks; chunk-- > 0;) {
        size_t const slot_head = (first_slot + chunk) * heads + h;
        double const gate_of_chunk = in.chunk_gate.empty() ? 0.0 : double{in.chunk_gate[chunk]};
        auto lost = [&](double after, double per_query, int of_weight, int of_state) {
          // Weights that are scaled by less than they could, for what is there already is large.
          int const there =
              of_state + static_cast<int>(std::max(gate_of_chunk / std::log(2), -1e3));
          double const unit = std::ldexp(1.0, -std::min(of_weight, 96)) +
                              std::ldexp(1.0, std::max(there, -1000) - 90);
          return std::exp(gate_of_chunk) * after +
                 double(std::min(chunk_size, length - chunk * chunk_size) * group) * per_query *
                     unit * spacing;
        };
        floor[chunk] = lost(floor[chunk + 1], q * (q + 2) + 1,
                            c.wild ? weight_exponent[slot_head] : 0, state_exponent[slot_head]);
        sum_floor[chunk] = lost(sum_floor[chunk + 1], q * (q + 1),
                                c.wild ? delta_exponent[slot_head] : 0, sum_exponent[slot_head]);
      }
      for (size_t segment = 0; segment < segments; ++segment) {
        size_t const first_chunk = segment * per_segment;
        size_t const end_chunk = c.carries ? chunks : std::min(first_chunk + per_segment, chunks);
        bool const is_last = end_chunk == chunks;
        size_t const item =
            retention::test::slot_of(
                segment_sequences, s, segment,
                c.starts ? retention::kernel::Slots::kAll : retention::kernel::Slots::kButFirst) *
                heads +
            h;
        for (size_t p = 0; p < parts.size(); ++p) {
          StatePart const& part = parts[p];
          auto const columns = static_cast<size_t>(part.columns);
          auto const first_column = static_cast<size_t>(part.first_column);
          std::vector<State> expected = whole[sequence_head][p];
          if (segments > 1) {
            State const zero{Sum(part.rows.size() * columns), Sum(part.rows.size())};
            expected = reference(sequence_head, first_chunk * chunk_size,
                                 std::min(end_chunk * chunk_size, length),
                                 is_last ? final_of(sequence_head, part) : zero, part);
          }
          // The owner of the first columns stores the sum.
          auto compare_both = [&](auto const* state, auto const* sum, State const& right,
                                  double stored, size_t chunk, int exponent, int exponent_of_sum) {
            RETENTION_CHECK(compare(state, dv, part, columns, first_column, right.state, stored,
                                    floor[chunk], exponent));
            if (first_column == 0) {
              RETENTION_CHECK(compare(sum, 1, part, 1, 0, right.key_sum, stored, sum_floor[chunk],
                                      exponent_of_sum));
            }
          };
          for (size_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
            size_t const slot_head = (first_slot + chunk) * heads + h;
            if (chunk == chunks - 1 && !c.final) {
              continue;  // nothing but zeros, which nobody reads
            }
            size_t const place =
                (retention::test::slot_of(params.sequences, s, chunk,
                                          retention::kernel::gradient_slots(c.final)) -
                 no_slots) *
                    heads +
                h;
            compare_both(states.data() + place * D * dv, key_sums.data() + place * D,
                         expected[chunk - first_chunk + 1], c.carries ? 2 : 1, chunk + 1,
                         kHalf ? state_exponent[slot_head] : 0,
                         kHalf ? sum_exponent[slot_head] : 0);
          }
          float const* const initial = c.carries ? joined_state.data() + sequence_head * D * dv
                                                 : initial_state.data() + item * D * dv;
          if (segment == 0 && !c.starts) {
            continue;  // nobody asked for it
          }
          compare_both(
              initial,
              c.carries ? joined_sum.data() + sequence_head * D : initial_sum.data() + item * D,
              expected[0], 0, first_chunk, 0, 0);
        }
      }
    }
  }
  std::cout << c.name << ": d " << HeadDim << ", dv " << ValueDim << ", "
            << (kHalf ? "fp16" : "bf16") << ", seed " << seed << ": worst error " << worst
            << " of its bound\n";
}

template <class Element, int HeadDim, int ValueDim>
void run_all_cases(std::uint64_t seed) {
  auto test = [&](Case const& c) { run<Element, HeadDim, ValueDim>(c, seed++); };
  test({"whole chunks, final gradients", 64, {128}, false, 1, 1, 0.5f, true});
  test({"partial tile, groups of 2, strided", 128, {150}, false, 2, 2, 0.5f, true, 0, true, true});
  test({"packed, groups of 3", 64, {65, 0, 1, 130}, true, 3, 1, 0.5f, true});
  test({"segments, no gates, groups of 5", 64, {150}, false, 5, 1, 0.0f, false, 2});
  test({"one token each", 64, {1, 1, 1, 1}});
  test({"steep gates, no initial gradient", 64, {200}, false, 1, 1, 60.0f, false, 0, false});
  test({"all magnitudes", 64, {320}, false, 1, 1, 0.5f, true, 3, true, false, true});
}

/// What depends little on the configuration.
template <class Element, int HeadDim, int ValueDim>
void run_further_cases(std::uint64_t seed) {
  auto test = [&](Case const& c) { run<Element, HeadDim, ValueDim>(c, seed++); };
  test({"two rows", 128, {129, 129}, false, 2, 1, 0.5f});
  test({"gates that leave nothing", 64, {200}, false, 1, 1, 3840.0f, true, 2});
  test({"all magnitudes, steep gates", 64, {320}, false, 1, 1, 100.0f, true, 0, true, false, true});
  test({"packed segments, nothing asked for",
        64,
        {65, 0, 300, 1, 64},
        true,
        1,
        2,
        0.5f,
        false,
        2,
        false});
  Case far{"far", 64, {130, 5}, true, 2};
  far.first_token = 1 << 30;
  test(far);
  Case joined{"segments joined", 64, {100, 0, 330}, true, 2, 1, 0.5f, true, 2};
  joined.carries = true;
  test(joined);
}

}  // namespace

RETENTION_TEST(state_gradients) {
  run_all_cases<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(0);
  if constexpr (TEST_HEAD_DIM == 32 && TEST_VALUE_DIM <= 64) {
    run_further_cases<cute::TEST_ELEMENT, TEST_HEAD_DIM, TEST_VALUE_DIM>(100);
  }
}
