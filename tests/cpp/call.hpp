// A call of the host API with random tensors, and the same numbers as the reference takes them.

#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "decays.hpp"
#include "device.hpp"
#include "element.hpp"
#include "reference.hpp"
#include "retention/device/forward.hpp"
#include "retention/symmetric_power.hpp"

namespace retention::test {

struct Case {
  char const* name;
  std::vector<int> lengths = {100};  // one a sequence; rows of a batch unless `packed`
  int chunk_size = 0;
  int segment_tokens = 0;
  bool packed = false;
  int heads = 1;
  int group = 1;      // query heads a key head
  double gate = 0.0;  // log gates are uniform between this and 0; 0 for none
  bool initial = false;
  bool final = false;
  bool strided = false;  // heads before tokens, and gaps between the rows
  double key_magnitude = 1.0;
  double query_magnitude = 1.0;
  double value_magnitude = 1.0;
  double gradient_magnitude = 1.0;
  bool aligned = false;  // queries resemble their tokens' keys: no row is left without weight
  int resets = 0;        // every so many tokens a gate leaves nothing; 0 for none
  int lead = 0;          // tokens before the first packed sequence: NaN
  int tail = 0;          // tokens behind the last one: infinite and NaN
  int whole_until = 0;
  bool parts = false;  // run in parts: half of the outer states is known when they begin
};

/// Two sequences among many empty ones.
inline std::vector<int> among_empty(int first, int second) {
  std::vector<int> lengths(300, 0);
  lengths[100] = first;
  lengths[101] = second;
  return lengths;
}

/// So many sequences of one token, but for two of more.
inline std::vector<int> one_token_each(std::size_t sequences = 250) {
  std::vector<int> lengths(sequences, 1);
  lengths[7] = 140;
  lengths[70] = 70;
  return lengths;
}

/// A [b, t, heads, width] tensor in memory.
struct Layout {
  device::Strides strides;
  std::size_t size;

  Layout(bool strided, std::size_t batch, std::size_t tokens, std::size_t heads,
         std::size_t width) {
    auto const row = static_cast<std::int64_t>(strided ? width + 8 : width);
    auto const t = static_cast<std::int64_t>(tokens), h = static_cast<std::int64_t>(heads);
    strides = strided ? device::Strides{h * t * row, row, t * row}
                      : device::Strides::contiguous(t, h, row);
    size = batch * tokens * heads * static_cast<std::size_t>(row);
  }
  std::size_t at(std::size_t row, std::size_t token, std::size_t head) const {
    return row * static_cast<std::size_t>(strides.batch) +
           token * static_cast<std::size_t>(strides.token) +
           head * static_cast<std::size_t>(strides.head);
  }
};

class Call {
  using size_t = std::size_t;

 public:
  Case const c;
  Configuration const configuration;
  ElementType const element = configuration.element;
  size_t const d = static_cast<size_t>(configuration.head_dim);
  size_t const dv = static_cast<size_t>(configuration.value_dim);
  size_t const D = static_cast<size_t>(state_dim(configuration.head_dim, 2));
  size_t const heads = static_cast<size_t>(c.heads);
  size_t const group = static_cast<size_t>(c.group);
  size_t const sequences = c.lengths.size();
  // Rows of a batch have one length.
  size_t const batch = c.packed ? 1 : sequences;
  size_t const owned = total(c.lengths) / batch;  // tokens of sequences, in a row of the batch
  size_t const lead = static_cast<size_t>(c.lead);
  size_t const tokens = lead + owned + static_cast<size_t>(c.tail);

  Layout const query_layout{c.strided, batch, tokens, heads * group, d};
  Layout const key_layout{c.strided, batch, tokens, heads, d};
  Layout const value_layout{c.strided, batch, tokens, heads, dv};
  Layout const gate_layout{c.strided, batch, tokens, heads, 1};
  Layout const output_layout{c.strided, batch, tokens, heads * group, dv};
  Array<std::uint16_t> query{"query", query_layout.size};
  Array<std::uint16_t> key{"key", key_layout.size};
  Array<std::uint16_t> value{"value", value_layout.size};
  Array<float> gate{"log_gate", gate_layout.size};
  Array<int> cu_seqlens{"cu_seqlens", sequences + 1};
  Array<float> initial_state{"initial_state", c.initial ? states() * D * dv : 1};
  Array<float> initial_key_sum{"initial_key_sum", c.initial ? states() * D : 1};
  Array<std::uint16_t> output{"output", output_layout.size};
  Array<std::uint16_t> residual{"output_residual", output_layout.size};
  Array<float> normalizer{"normalizer", batch * tokens * heads * group};
  Array<float> final_state{"final_state", c.final ? states() * D * dv : 1};
  Array<float> final_key_sum{"final_key_sum", c.final ? states() * D : 1};

  // Of each sequence and query head; those of a key head share its part.
  std::vector<Inputs> inputs{states() * group};
  std::vector<State> initial{states()};  // of each sequence and key head
  std::mt19937 rng;

  Call(Configuration const& configuration_, Case const& c_, std::uint64_t seed)
      : c(c_), configuration(configuration_), rng(static_cast<unsigned>(seed)) {
    for (size_t t = 0; t < tokens; ++t) {
      if (!is_owned(t)) {
        for (size_t n = 0; n < heads * group; ++n) {
          spoil(&query[query_layout.at(0, t, n)], d, t + n);
        }
        for (size_t h = 0; h < heads; ++h) {
          spoil(&key[key_layout.at(0, t, h)], d, t + h);
          spoil(&value[value_layout.at(0, t, h)], dv, t + h + 1);
          gate[gate_layout.at(0, t, h)] = t % 2 == 0 ? NAN : -INFINITY;
        }
      }
    }
    cu_seqlens[0] = c.lead;
    for (size_t s = 0; s < sequences; ++s) {
      cu_seqlens[s + 1] = cu_seqlens[s] + c.lengths[s];
      for (size_t h = 0; h < heads; ++h) {
        fill_head(s, h);
      }
    }
  }

  /// Of sequences and key heads.
  size_t states() const { return sequences * heads; }
  /// Where a sequence is: its row of the batch, and its first token there.
  size_t row(size_t s) const { return c.packed ? 0 : s; }
  size_t first_token(size_t s) { return c.packed ? static_cast<size_t>(cu_seqlens[s]) : 0; }

  /// Whether some sequence has token t of a row.
  bool is_owned(size_t t) const { return lead <= t && t < lead + owned; }
  /// Writes what no sum may see.
  void spoil(std::uint16_t* target, size_t width, size_t which) const {
    for (size_t i = 0; i < width; ++i) {
      target[i] = encode(element, which % 2 == 0 ? NAN : i % 2 == 0 ? INFINITY : -INFINITY);
    }
  }

  /// Writes `width` random numbers as the element type holds them, and appends these to `copy`.
  void fill(std::uint16_t* target, size_t width, double magnitude, std::vector<float>& copy) {
    for (size_t i = 0; i < width; ++i) {
      target[i] = encode(element, magnitude * normal_(rng));
      copy.push_back(static_cast<float>(decode(element, target[i])));
    }
  }

  /// Arguments on the device. Everything may be asked for; null it where it is not wanted.
  device::ForwardArguments upload() {
    device::ForwardArguments a;
    a.element = element;
    a.head_dim = configuration.head_dim;
    a.value_dim = configuration.value_dim;
    a.sequences = static_cast<int>(sequences);
    a.tokens = static_cast<int>(tokens);
    a.heads = c.heads;
    a.query_heads = c.heads * c.group;
    a.query = query.upload();
    a.query_strides = query_layout.strides;
    a.key = key.upload();
    a.key_strides = key_layout.strides;
    a.value = value.upload();
    a.value_strides = value_layout.strides;
    a.log_gate = c.gate != 0.0 ? gate.upload() : nullptr;
    a.log_gate_strides = gate_layout.strides;
    a.cu_seqlens = c.packed ? cu_seqlens.upload() : nullptr;
    a.initial_state = c.initial ? initial_state.upload() : nullptr;
    a.initial_key_sum = c.initial ? initial_key_sum.upload() : nullptr;
    a.output = output.upload();
    a.output_strides = output_layout.strides;
    a.output_residual = residual.upload();
    a.normalizer = normalizer.upload();
    a.final_state = c.final ? final_state.upload() : nullptr;
    a.final_key_sum = c.final ? final_key_sum.upload() : nullptr;
    a.chunk_size = c.chunk_size;
    a.whole_until = c.whole_until;
    a.segment_tokens = c.segment_tokens;
    return a;
  }

  void download() {
    output.download();
    residual.download();
    normalizer.download();
    if (c.final) {
      final_state.download();
      final_key_sum.download();
    }
  }

 private:
  static size_t total(std::vector<int> const& lengths) {
    size_t sum = 0;
    for (int const length : lengths) {
      sum += static_cast<size_t>(length);
    }
    return sum;
  }

  void fill_head(size_t s, size_t h) {
    auto const length = static_cast<size_t>(c.lengths[s]);
    size_t const first = first_token(s);
    Inputs in{c.lengths[s], configuration.head_dim, configuration.value_dim, {}, {}, {}, {}};
    for (size_t t = 0; t < length; ++t) {
      fill(&key[key_layout.at(row(s), first + t, h)], d, c.key_magnitude, in.key);
      fill(&value[value_layout.at(row(s), first + t, h)], dv, c.value_magnitude, in.value);
      if (c.gate != 0.0) {
        in.gate.push_back(with_resets(c.resets, t, static_cast<float>(c.gate * uniform_(rng))));
        gate[gate_layout.at(row(s), first + t, h)] = in.gate.back();
      }
    }
    if (c.initial) {
      fill_initial(s * heads + h);
    }
    for (size_t n = 0; n < group; ++n) {
      in.query.clear();
      for (size_t t = 0; t < length; ++t) {
        std::uint16_t* target = &query[query_layout.at(row(s), first + t, h * group + n)];
        fill(target, d, c.query_magnitude, in.query);
        for (size_t i = 0; c.aligned && i < d; ++i) {
          float& x = in.query[t * d + i];
          target[i] = encode(element, static_cast<double>(x + in.key[t * d + i]));
          x = static_cast<float>(decode(element, target[i]));
        }
      }
      inputs[(s * heads + h) * group + n] = in;
    }
  }

  // A state that is one: of a sequence before this one.
  void fill_initial(size_t index) {
    Inputs before{20, configuration.head_dim, configuration.value_dim, {}, {}, {}, {}};
    for (size_t i = 0; i < 20 * d; ++i) {
      before.key.push_back(static_cast<float>(c.key_magnitude * normal_(rng)));
    }
    for (size_t i = 0; i < 20 * dv; ++i) {
      before.value.push_back(static_cast<float>(c.value_magnitude * normal_(rng)));
    }
    initial[index] = chunk_states(before, {}, 64).back();
    auto take = [](Sum& sum, float* target) {
      for (size_t i = 0; i < sum.value.size(); ++i) {
        target[i] = static_cast<float>(sum.value[i]);
        sum.value[i] = static_cast<double>(target[i]);
        sum.magnitude[i] = std::abs(sum.value[i]);
      }
    };
    take(initial[index].state, &initial_state[index * D * dv]);
    take(initial[index].key_sum, &initial_key_sum[index * D]);
  }

  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_;
};

}  // namespace retention::test
