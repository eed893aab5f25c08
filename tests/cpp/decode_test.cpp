// Decoding through the host API against float64 loops over all tokens that a slot has seen: steps
// with folds, prompts, tokens taken back, slots copied and emptied, in random order. On the
// emulator, for the configuration that TEST_ELEMENT, TEST_HEAD_DIM and TEST_VALUE_DIM name; on a
// CUDA device, for all that were compiled.

#include "retention/device/decode.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "device.hpp"
#include "element.hpp"
#include "reference.hpp"
#include "retention/device/decode_plan.hpp"
#include "retention/symmetric_power.hpp"

namespace {

using retention::Configuration;
using retention::Cursor;
using retention::device::DecodeStepArguments;
using retention::device::SlotStrides;
using retention::device::Strides;
using retention::test::Array;
using retention::test::decode;
using retention::test::encode;
using retention::test::Inputs;
using std::size_t;

struct Case {
  char const* name;
  int steps = 8;
  int tokens = 1;  // of a row, at most
  int heads = 1;
  int group = 1;
  int slice_pairs = 0;
  int window = 16;
  int keep = 0;
  float log_gate = -0.05f;  // 0: no gates
  bool packed = false;      // rows of different lengths
  bool planes = true;       // else bf16 states
  bool strided = false;
  int null_slot = -1;
  int rows = 3;
  int prompt = 0;  // tokens of a row, at most; 0: no prompts
  int chunk_size = 64;
};

/// The tensors of a call with new tokens, row after row, as many of each as there may be.
struct NewTokens {
  NewTokens(Configuration const& configuration, Case const& c, int tokens)
      : most(static_cast<size_t>(tokens)),
        packed(c.packed),
        gated(c.log_gate != 0.0f),
        query_strides(strides(c.heads * c.group, configuration.head_dim)),
        key_strides(strides(c.heads, configuration.head_dim)),
        value_strides(strides(c.heads, configuration.value_dim)),
        log_gate_strides(strides(c.heads, 1)),
        output_strides(strides(c.heads * c.group, configuration.value_dim)),
        query("query", size(c, query_strides)),
        key("key", size(c, key_strides)),
        value("value", size(c, value_strides)),
        log_gate("log_gate", size(c, log_gate_strides)),
        output("output", size(c, output_strides)),
        slots("slots", static_cast<size_t>(c.rows)),
        cu_seqlens("cu_seqlens", static_cast<size_t>(c.rows) + 1) {}

  template <class Arguments>
  void pass_to(Arguments& a) {
    a.query = query.upload();
    a.query_strides = query_strides;
    a.key = key.upload();
    a.key_strides = key_strides;
    a.value = value.upload();
    a.value_strides = value_strides;
    a.log_gate = gated ? log_gate.upload() : nullptr;
    a.log_gate_strides = log_gate_strides;
    a.output = output.upload();
    a.output_strides = output_strides;
    a.slots = slots.upload();
    a.cu_seqlens = packed ? cu_seqlens.upload() : nullptr;
  }
  void upload() {
    for (auto* array : {&query, &key, &value}) {
      array->upload();
    }
    log_gate.upload();
    slots.upload();
    cu_seqlens.upload();
  }

  /// Where a token of a row is.
  size_t at(Strides const& s, size_t r, size_t t, size_t head) {
    size_t const first = packed ? static_cast<size_t>(cu_seqlens[r]) : r * most;
    return (first + t) * static_cast<size_t>(s.token) + head * static_cast<size_t>(s.head);
  }

  /// Of all that was compared.
  double error() const {
    return sum_of_sizes == 0.0 ? 0.0 : std::sqrt(sum_of_errors / sum_of_sizes);
  }

  double sum_of_errors = 0.0, sum_of_sizes = 0.0;  // squares
  size_t most;
  bool packed, gated;
  Strides query_strides, key_strides, value_strides, log_gate_strides, output_strides;
  Array<std::uint16_t> query, key, value;
  Array<float> log_gate;
  Array<std::uint16_t> output;
  Array<int> slots, cu_seqlens;

 private:
  Strides strides(int heads, int width) const {
    return Strides::contiguous(static_cast<std::int64_t>(most), heads, width);
  }
  static size_t size(Case const& c, Strides const& s) {
    return static_cast<size_t>(c.rows * s.batch);
  }
};

/// A slot as it should be.
struct Slot {
  Cursor cursor{};
  std::vector<Inputs> heads;  // what it has seen, without queries
};

class Decoder {
 public:
  static constexpr int kSlots = 4;

  Decoder(Configuration const& configuration_, Case const& c_, std::uint64_t seed, bool unchecked)
      : configuration(configuration_),
        c(c_),
        element(configuration.element),
        d(static_cast<size_t>(configuration.head_dim)),
        dv(static_cast<size_t>(configuration.value_dim)),
        D(static_cast<size_t>(retention::state_dim(configuration.head_dim, 2))),
        unchecked_(unchecked),
        rng_(static_cast<unsigned>(seed)) {
    retention::device::DecodePool& p = a_.pool;
    p.element = element;
    p.head_dim = configuration.head_dim;
    p.value_dim = configuration.value_dim;
    p.heads = c.heads;
    p.slots = kSlots;
    p.ring = static_cast<int>(ring);
    p.null_slot = c.null_slot;
    p.high = high_.upload();
    p.high_strides = strides(D * dv);
    p.low = c.planes ? low_.upload() : nullptr;
    p.low_strides = strides(D * dv);
    p.key_sum = key_sum_.upload();
    p.key_sum_strides = strides(D);
    p.keys = keys_.upload();
    p.keys_strides = strides(ring * d);
    p.values = values_.upload();
    p.values_strides = strides(ring * dv);
    p.log_gates = c.log_gate != 0.0f ? log_gates_.upload() : nullptr;
    p.log_gates_strides = strides(ring);
    for (size_t s = 0; s < kSlots; ++s) {
      cursors_[2 * s] = {};
      slots_[s].heads.resize(heads, Inputs{0, p.head_dim, p.value_dim, {}, {}, {}, {}});
    }
    p.cursors = cursors_.upload();
    p.cursors_stride = 2;
    a_.rows = c.rows;
    a_.tokens = c.tokens;
    a_.query_heads = c.heads * c.group;
    next_.pass_to(a_);
    a_.total = c.packed ? c.rows * c.tokens : 0;
    a_.window = c.window;
    a_.keep = c.keep;
    for (size_t i = 0; i < rows * (heads + 1); ++i) {
      arrivals_[i] = 0;
    }
    a_.arrivals = arrivals_.upload();
    a_.slice_pairs = c.slice_pairs;
    workspace_ = std::make_unique<retention::test::Memory>(
        "workspace", retention::test::workspace_bytes(a_) + 1);
    b_.pool = a_.pool;
    b_.rows = a_.rows;
    b_.tokens = c.packed ? c.rows * prompt : prompt;
    b_.query_heads = a_.query_heads;
    prompts_.pass_to(b_);
    b_.keep = p.ring;  // of which there is the most workspace
    b_.arrivals = a_.arrivals;
    b_.chunk_size = c.chunk_size;
    prompt_workspace_ = std::make_unique<retention::test::Memory>(
        "workspace", retention::test::workspace_bytes(b_) + 1);
  }

  /// Steps, and between them what else there is.
  void run() {
    reset({2, 0}, {static_cast<int>(rng_() % 7), 5});  // the others are empty by their zeros
    for (int i = 0; i < c.steps; ++i) {
      std::vector<int> const rows_of_slots = some_slots();
      step(rows_of_slots);
      if (i % 3 == 1) {
        std::vector<int> tokens;
        for (int const slot : rows_of_slots) {
          // Once more than there are.
          int const held = there(slot) ? slots_[static_cast<size_t>(slot)].cursor.length : 0;
          tokens.push_back(i == 4 ? held + 1 : std::min(held, c.tokens - 1));
        }
        roll_back(rows_of_slots, tokens);
      }
      if (i % 4 == 2) {
        copy({1, 3, 0}, {3, 1, 2});
      }
      if (i % 5 == 4) {
        reset({3, -1, kSlots}, {});
      }
      if (c.prompt > 0 && i % 3 == 0) {
        prefill(some_slots(), i % 2 == 0 ? 0 : static_cast<int>(rng_() % (ring + 1)));
      }
      if (i % 6 == 5) {
        fold_alone(some_slots(), rng_() % 2 == 0 ? c.window : 0);
      }
    }
    if (c.prompt > 0 && c.log_gate == 0.0f && c.planes) {
      check_that_states_are_kept();
    }
    if (c.planes) {
      low_.download();  // else the device has never heard of them
    }
    bool low_written = false;
    for (size_t i = 0; i < kSlots * (heads * D * dv + gap); ++i) {
      low_written = low_written || low_[i] != 0xffff;
    }
    RETENTION_CHECK_EQUAL(low_written, c.planes);
    if (!unchecked_) {
      double const of_steps = next_.error(), of_prompts = prompts_.error();
      std::cout << c.name << ": " << to_string(configuration) << ": error " << of_steps / 0x1p-9
                << " roundings of bf16, of prompts " << of_prompts / 0x1p-9 << "\n";
      // phi of the query and of the key, the value of a key that is folded, the high plane and the
      // output are rounded to bf16, by a third of the most that this can be on average; of a prompt
      // the key, too, with its decay.
      RETENTION_CHECK(of_steps <= (c.prompt > 0 ? 1.5 : 1.25) * 0x1p-9);
      // Forward rounds weights as well.
      RETENTION_CHECK(of_prompts <= 1.75 * 0x1p-9);
    }
  }

 private:
  bool there(int slot) const { return slot > c.null_slot && slot >= 0 && slot < kSlots; }

  SlotStrides strides(size_t elements) const {
    SlotStrides s = SlotStrides::contiguous(c.heads, static_cast<std::int64_t>(elements));
    s.slot += static_cast<std::int64_t>(gap);
    return s;
  }

  template <class T>
  void check_run(retention::device::Status const& status, T& what) {
    RETENTION_CHECK_EQUAL(status.message(), std::string());
    what.download();
  }

  /// As many as there are rows: all slots in some order, and what stands for none.
  std::vector<int> some_slots() {
    std::vector<int> all(kSlots);
    std::iota(all.begin(), all.end(), 0);
    all.push_back(rng_() % 2 == 0 ? c.null_slot : kSlots);
    std::shuffle(all.begin(), all.end(), rng_);
    all.resize(rows);
    return all;
  }

  void step(std::vector<int> const& rows_of_slots) {
    std::vector<size_t> const tokens = draw_lengths(next_, rows_of_slots, 1);
    auto const queries = draw(next_, rows_of_slots, tokens);
    check_run(repeated_.run(a_, *workspace_, rng_()), next_.output);
    for (size_t r = 0; r < rows; ++r) {
      if (there(rows_of_slots[r])) {
        Cursor& cursor = slot(rows_of_slots[r]).cursor;
        fold(cursor);
        cursor.length += static_cast<int>(tokens[r]);
        cursor.seen += static_cast<int>(tokens[r]);
      }
    }
    check_cursors();
    compare(next_, rows_of_slots, tokens, queries);
  }

  /// Prompts on top of what there is, of which `keep` tokens stay in the rings.
  void prefill(std::vector<int> const& rows_of_slots, int keep) {
    std::vector<size_t> const tokens = draw_lengths(prompts_, rows_of_slots, 0);
    auto const queries = draw(prompts_, rows_of_slots, tokens);
    b_.keep = keep;
    check_run(retention::test::run(b_, *prompt_workspace_, rng_()), prompts_.output);
    for (size_t r = 0; r < rows; ++r) {
      if (there(rows_of_slots[r])) {
        Cursor& cursor = slot(rows_of_slots[r]).cursor;
        int const kept = std::min(static_cast<int>(tokens[r]), keep);
        cursor.folded += cursor.length + static_cast<int>(tokens[r]) - kept;
        cursor.length = kept;
        cursor.seen += static_cast<int>(tokens[r]);
      }
    }
    check_cursors();
    compare(prompts_, rows_of_slots, tokens, queries);
  }

  /// Prompts of zeros and without gates leave states as they are, to the last bit.
  void check_that_states_are_kept() {
    std::vector<int> const rows_of_slots = some_slots();
    draw_lengths(prompts_, rows_of_slots, 1);
    for (auto* array : {&prompts_.query, &prompts_.key, &prompts_.value}) {
      for (size_t i = 0; i < array->size(); ++i) {
        (*array)[i] = 0;
      }
    }
    prompts_.upload();
    fold_alone(rows_of_slots, 0);
    std::vector<std::uint16_t> const before = planes();
    b_.keep = 0;
    check_run(retention::test::run(b_, *prompt_workspace_, rng_()), high_);
    RETENTION_CHECK(planes() == before);
  }

  /// Of slots that have a state.
  std::vector<std::uint16_t> planes() {
    high_.download();
    low_.download();
    std::vector<std::uint16_t> all;
    size_t const size = heads * D * dv + gap;
    for (size_t i = 0; i < kSlots * size; ++i) {
      if (slots_[i / size].cursor.folded > 0) {
        all.push_back(high_[i]);
        all.push_back(low_[i]);
      }
    }
    RETENTION_CHECK(!all.empty());
    return all;
  }

  /// How many tokens rows have, which the call is told.
  std::vector<size_t> draw_lengths(NewTokens& x, std::vector<int> const& rows_of_slots,
                                   unsigned least) {
    std::vector<size_t> tokens;
    x.cu_seqlens[0] = 0;
    for (size_t r = 0; r < rows; ++r) {
      unsigned const choices = static_cast<unsigned>(x.most) - least + 1;
      tokens.push_back(x.packed ? least + rng_() % choices : x.most);
      x.slots[r] = rows_of_slots[r];
      x.cu_seqlens[r + 1] = x.cu_seqlens[r] + static_cast<int>(tokens[r]);
    }
    return tokens;
  }

  /// Draws the tokens of rows, which their slots have seen then; returns the queries of each row,
  /// head and query head: [tokens, d].
  std::vector<std::vector<float>> draw(NewTokens& x, std::vector<int> const& rows_of_slots,
                                       std::vector<size_t> const& tokens) {
    std::vector<std::vector<float>> queries;
    for (size_t r = 0; r < rows; ++r) {
      for (size_t h = 0; h < heads; ++h) {
        Inputs seen = there(rows_of_slots[r]) ? slot(rows_of_slots[r]).heads[h] : empty();
        for (size_t t = 0; t < tokens[r]; ++t) {
          append(x, seen, r, t, h);
        }
        for (size_t g = 0; g < group; ++g) {
          queries.push_back(draw_queries(x, seen, r, tokens[r], h * group + g));
        }
        if (there(rows_of_slots[r])) {
          slot(rows_of_slots[r]).heads[h] = seen;
        }
      }
    }
    x.upload();
    return queries;
  }

  void compare(NewTokens& x, std::vector<int> const& rows_of_slots,
               std::vector<size_t> const& tokens, std::vector<std::vector<float>> const& queries) {
    arrivals_.download();
    for (size_t i = 0; i < rows * (heads + 1); ++i) {
      RETENTION_CHECK_EQUAL(arrivals_[i], 0u);
    }
    for (size_t i = 0; i < queries.size() && !unchecked_; ++i) {
      size_t const r = i / (heads * group), n = i % (heads * group);
      compare(x, rows_of_slots[r], r, tokens[r], n, queries[i]);
    }
  }

  /// A new token of a row and head, which also goes to the tensors of the call.
  void append(NewTokens& x, Inputs& seen, size_t r, size_t t, size_t h) {
    ++seen.tokens;
    fill(&x.key[x.at(x.key_strides, r, t, h)], d, seen.key);
    fill(&x.value[x.at(x.value_strides, r, t, h)], dv, seen.value);
    if (c.log_gate != 0.0f) {
      // Once in a while one that ends what came before.
      float const gate = rng_() % 40 == 0 ? -std::numeric_limits<float>::infinity()
                                          : c.log_gate * static_cast<float>(1 + rng_() % 3);
      x.log_gate[x.at(x.log_gate_strides, r, t, h)] = gate;
      seen.gate.push_back(gate);
    }
  }

  /// Each aligned with a recent key: one that hardly sees any reads from a state what is left of
  /// larger numbers.
  std::vector<float> draw_queries(NewTokens& x, Inputs const& seen, size_t r, size_t tokens,
                                  size_t n) {
    std::vector<float> queries;
    size_t const before = static_cast<size_t>(seen.tokens) - tokens;
    for (size_t t = 0; t < tokens; ++t) {
      std::uint16_t* target = &x.query[x.at(x.query_strides, r, t, n)];
      size_t const now = before + t;
      size_t const aligned = now - rng_() % std::min<size_t>(now + 1, 24);
      for (size_t i = 0; i < d; ++i) {
        target[i] = encode(element, normal_(rng_) + double{seen.key[aligned * d + i]});
        queries.push_back(static_cast<float>(decode(element, target[i])));
      }
    }
    return queries;
  }

  void fill(std::uint16_t* target, size_t width, std::vector<float>& copy) {
    for (size_t i = 0; i < width; ++i) {
      target[i] = encode(element, normal_(rng_));
      copy.push_back(static_cast<float>(decode(element, target[i])));
    }
  }

  void compare(NewTokens& x, int of_slot, size_t r, size_t tokens, size_t n,
               std::vector<float> const& queries) {
    Inputs in = there(of_slot) ? slot(of_slot).heads[n / group] : empty();
    size_t const before = there(of_slot) ? static_cast<size_t>(in.tokens) - tokens : 0;
    in.query.assign(before * d, 0.0f);
    in.query.insert(in.query.end(), queries.begin(), queries.end());
    auto const expected = retention::test::attend(in, {}, 1.0);
    for (size_t t = 0; t < tokens; ++t) {
      double const share = there(of_slot) ? share_of(expected, before + t) : 0.0;
      for (size_t e = 0; e < dv; ++e) {
        double const actual = decode(element, x.output[x.at(x.output_strides, r, t, n) + e]);
        if (!there(of_slot)) {
          RETENTION_CHECK(actual == 0.0);
          continue;
        }
        double const o = expected.output[(before + t) * dv + e];
        x.sum_of_errors += share * share * (actual - o) * (actual - o);
        x.sum_of_sizes += share * share * o * o;
      }
    }
  }

  /// How much a row's error counts. What it reads from a state has the error of a rounding of
  /// |q|^2 |k|^2, of which a weight is a d-th on average: a row that sees far less than that counts
  /// for less, see "Numerics" in docs/design.md.
  double share_of(retention::test::Output const& expected, size_t row) const {
    double const seen = static_cast<double>(d) * expected.normalizer[row];
    return seen < expected.magnitude[row] ? seen / expected.magnitude[row] : 1.0;
  }

  /// The oldest tokens of a ring, up to the end of their window.
  void fold(Cursor& cursor) const {
    for (int tokens = 1; tokens <= c.window; ++tokens) {
      if ((cursor.folded + tokens - cursor.phase) % c.window == 0) {
        if (cursor.length - tokens >= c.keep) {
          cursor.start = (cursor.start + tokens) % static_cast<int>(ring);
          cursor.length -= tokens;
          cursor.folded += tokens;
        }
        return;
      }
    }
  }

  void fold_alone(std::vector<int> const& which, int window) {
    retention::device::DecodeFoldArguments f;
    f.pool = a_.pool;
    f.rows = static_cast<int>(which.size());
    f.slots = list(first_list_, which);
    f.window = window;
    f.keep = c.keep;
    f.arrivals = a_.arrivals;
    check_run(retention::test::run(f, rng_()), cursors_);
    for (int const index : which) {
      if (!there(index)) {
        continue;
      }
      Cursor& cursor = slot(index).cursor;
      if (window > 0) {
        fold(cursor);
      } else if (int const tokens = cursor.length - c.keep; tokens > 0) {
        cursor.length -= tokens;
        cursor.folded += tokens;
      }
    }
    check_cursors();
  }

  void roll_back(std::vector<int> const& which, std::vector<int> const& tokens) {
    retention::device::DecodeRollbackArguments b;
    b.pool = a_.pool;
    b.count = static_cast<int>(which.size());
    b.slots = list(first_list_, which);
    b.tokens = list(second_list_, tokens);
    check_run(retention::test::run(b, rng_()), cursors_);
    for (size_t i = 0; i < which.size(); ++i) {
      if (there(which[i])) {
        Slot& s = slot(which[i]);
        int const taken = std::min(tokens[i], s.cursor.length);
        s.cursor.length -= taken;
        s.cursor.seen -= taken;
        for (Inputs& in : s.heads) {
          in.tokens -= taken;
          auto const left = static_cast<size_t>(in.tokens);
          in.key.resize(left * d);
          in.value.resize(left * dv);
          in.gate.resize(c.log_gate != 0.0f ? left : 0);
        }
      }
    }
    check_cursors();
  }

  void copy(std::vector<int> const& source, std::vector<int> const& target) {
    retention::device::DecodeCopyArguments b;
    b.pool = a_.pool;
    b.count = static_cast<int>(source.size());
    b.source = list(first_list_, source);
    b.target = list(second_list_, target);
    check_run(retention::test::run(b, rng_()), cursors_);
    std::vector<Slot> const before(slots_, slots_ + kSlots);
    for (size_t i = 0; i < source.size(); ++i) {
      if (there(source[i]) && there(target[i])) {
        slot(target[i]) = before[static_cast<size_t>(source[i])];
      }
    }
    check_cursors();
  }

  void reset(std::vector<int> const& which, std::vector<int> const& phases) {
    retention::device::DecodeResetArguments b;
    b.pool = a_.pool;
    b.count = static_cast<int>(which.size());
    b.slots = list(first_list_, which);
    b.phases = phases.empty() ? nullptr : list(second_list_, phases);
    check_run(retention::test::run(b, rng_()), cursors_);
    for (size_t i = 0; i < which.size(); ++i) {
      if (there(which[i])) {
        slot(which[i]).cursor = {};
        slot(which[i]).cursor.phase = phases.empty() ? 0 : phases[i];
        for (Inputs& in : slot(which[i]).heads) {
          in = empty();
        }
      }
    }
    check_cursors();
  }

  void check_cursors() {
    cursors_.download();
    for (size_t s = 0; s < kSlots; ++s) {
      Cursor const& actual = cursors_[2 * s];
      Cursor const& expected = slots_[s].cursor;
      RETENTION_CHECK_EQUAL(actual.length, expected.length);
      RETENTION_CHECK_EQUAL(actual.phase, expected.phase);
      RETENTION_CHECK_EQUAL(actual.folded, expected.folded);
      RETENTION_CHECK_EQUAL(actual.seen, expected.seen);
    }
  }

  static int const* list(Array<int>& array, std::vector<int> const& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      array[i] = values[i];
    }
    return array.upload();
  }

  Slot& slot(int index) { return slots_[static_cast<size_t>(index)]; }
  Inputs empty() const { return {0, static_cast<int>(d), static_cast<int>(dv), {}, {}, {}, {}}; }

  Configuration const configuration;
  Case const c;
  retention::ElementType const element;
  size_t const d, dv, D;
  size_t const heads = static_cast<size_t>(c.heads), group = static_cast<size_t>(c.group);
  size_t const rows = static_cast<size_t>(c.rows);
  int const prompt = std::max(c.prompt, 1);
  size_t const ring = static_cast<size_t>(c.window - 1 + c.keep + c.tokens);  // the least
  size_t const gap = c.strided ? 24 : 0;                                      // between slots
  bool const unchecked_;
  std::mt19937 rng_;
  std::normal_distribution<double> normal_;

  // Dirty: NaN, wherever nobody wrote.
  Array<std::uint16_t> high_{"high", kSlots * (heads * D * dv + gap)};
  Array<std::uint16_t> low_{"low", kSlots * (heads * D * dv + gap)};
  Array<float> key_sum_{"key_sum", kSlots * (heads * D + gap)};
  Array<std::uint16_t> keys_{"keys", kSlots * (heads * ring * d + gap)};
  Array<std::uint16_t> values_{"values", kSlots * (heads * ring * dv + gap)};
  Array<float> log_gates_{"log_gates", kSlots * (heads * ring + gap)};
  Array<Cursor> cursors_{"cursors", 2 * kSlots};
  NewTokens next_{configuration, c, c.tokens};
  NewTokens prompts_{configuration, c, prompt};
  Array<int> first_list_{"first list", kSlots + 1};
  Array<int> second_list_{"second list", kSlots + 1};
  Array<unsigned> arrivals_{"arrivals", rows * (heads + 1)};

  DecodeStepArguments a_;
  retention::device::DecodePrefillArguments b_;
  std::unique_ptr<retention::test::Memory> workspace_, prompt_workspace_;
  retention::test::Repeated repeated_;
  Slot slots_[kSlots];
};

/// How a step of one token is cut on a device with 132 multiprocessors.
void check_plan(int rows, int query_heads, int heads, int head_dim, int slice_pairs, int slices,
                int mma_rows, int tokens = 1) {
  DecodeStepArguments a;
  a.pool.head_dim = a.pool.value_dim = head_dim;
  a.pool.heads = heads;
  a.rows = rows;
  a.tokens = tokens;
  a.query_heads = query_heads;
  auto const plan = retention::device::DecodeStepPlan::make(a, 132);
  RETENTION_CHECK_EQUAL(plan.slices.pairs, slice_pairs);
  RETENTION_CHECK_EQUAL(plan.slices.count, slices);
  RETENTION_CHECK_EQUAL(plan.mma_rows, mma_rows);
  size_t const sums = static_cast<size_t>(rows * slices * tokens * query_heads) *
                      static_cast<size_t>(head_dim + 4) * sizeof(float);
  RETENTION_CHECK_EQUAL(plan.workspace_bytes, slices == 1 ? 0 : (sums + 255) / 256 * 256);
}

void check_plans() {
  check_plan(1, 8, 8, 64, 2, 18, 1);
  check_plan(1, 40, 8, 128, 7, 20, 1);
  check_plan(32, 40, 8, 128, 136, 1, 1);
  check_plan(8, 8, 8, 64, 5, 8, 1);
  check_plan(64, 8, 8, 64, 36, 1, 1);
  check_plan(256, 8, 8, 64, 36, 1, 1);
  check_plan(1, 2, 2, 32, 2, 5, 1);
  check_plan(1, 8, 8, 64, 2, 18, 1, 16);
  check_plan(1, 16, 8, 64, 2, 18, 2, 16);
  check_plan(1, 24, 8, 64, 2, 18, 4, 16);
}

void run_configuration(Configuration const& configuration, bool unchecked) {
  check_plans();
  std::uint64_t seed = 0;
  auto const run = [&](Case const& c) { Decoder(configuration, c, seed++, unchecked).run(); };
  // name, steps, tokens, heads, group, slice_pairs, window, keep, gate, packed, planes, strided,
  // null slot, rows, tokens of a prompt, chunk
  // A state of many elements takes its time on the emulator.
  bool const large =
      retention::state_dim(configuration.head_dim, 2) * configuration.value_dim > 70000;
  if (!retention::test::kOnDevice && large) {
    run({"two tokens", 3, 2, 1, 2, 0, 2, 0, -0.02f, false, true, true, -1, 4});
    run({"packed, bf16 states", 3, 3, 1, 1, 0, 3, 0, -0.02f, true, false, false, -1, 2});
    run({"prompts", 2, 1, 1, 1, 0, 2, 0, -0.02f, true, true, true, -1, 2, 140});
    return;
  }
  run({"one token", 12, 1, 2, 1, 0, 5});
  run({"one token, whole states", 6, 1, 1, 3, 1 << 20, 2});
  run({"packed, bf16 states", 12, 5, 1, 5, 3, 8, 3, -0.02f, true, false, true, 0});
  run({"a large group", 4, 2, 1, 64, 4, 2});
  run({"many tokens", 5, 16, 2, 1, 0, 16, 2, 0.0f});
  run({"packed, many tokens", 5, 16, 1, 2, 5, 20, 0, -0.05f, true});
  run({"prompts", 10, 1, 2, 1, 0, 8, 0, -0.02f, false, true, true, -1, 3, 150});
  run({"packed prompts", 8, 2, 1, 3, 0, 8, 3, -0.02f, true, true, false, 0, 3, 200});
  run({"prompts without gates", 4, 1, 1, 2, 0, 4, 0, 0.0f, true, true, false, -1, 2, 70});
  run({"packed prompts, bf16 states", 8, 1, 1, 1, 0, 6, 0, 0.0f, true, false, true, -1, 4, 90});
  run({"prompts in one chunk", 8, 2, 1, 2, 0, 4, 2, -0.02f, true, true, false, -1, 3, 40, 0});
  if (retention::test::kOnDevice && !unchecked) {
    run({"long", 300, 3, 2, 4, 0, 64, 2, -0.02f, true});
    run({"long prompts", 5, 2, 2, 2, 0, 64, 2, -0.02f, true, true, false, -1, 3, 1500, 256});
    run({"long, bf16 states", 200, 1, 2, 2, 0, 32, 0, -0.02f, true, false});
  }
}

}  // namespace

int main(int count, char** arguments) {
  return retention::test::run_configurations(count, arguments, run_configuration);
}
