// A call on memory that the emulator does not know: tensors of PyTorch. Every operand is copied to
// an array of its own, which ends where the tensor does, and what a kernel may write copied back.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "compiled.hpp"
#include "emulator/emulator.hpp"
#include "retention/device/backward_plan.hpp"
#include "retention/device/decode_plan.hpp"
#include "retention/device/forward_plan.hpp"
#include "retention/symmetric_power.hpp"
#include "run_plan.hpp"

namespace retention::test {

class Copies {
 public:
  Copies() = default;
  /// In parts, a call finds results as the part before has left them.
  explicit Copies(device::ForwardArguments const& sizes, bool in_parts = false)
      : a_(sizes), in_parts_(in_parts) {}

  /// Replaces the pointers, by arrays that live as long as this. None of these results holds
  /// anything but NaN before a kernel writes it, unless the call is a part of one.
  void take_results(device::ForwardArguments& a) {
    result(a.output, "output", rows(a.query_heads, a.value_dim, a.output_strides), 2);
    result(a.output_residual, "output_residual", rows(a.query_heads, a.value_dim, a.output_strides),
           2);
    result(a.normalizer, "normalizer", batch() * a.tokens * a.query_heads, 4);
    result(a.final_state, "final_state", states() * a.value_dim, 4);
    result(a.final_key_sum, "final_key_sum", states(), 4);
  }

  void take_operands(device::ForwardArguments& a) {
    operand(a.query, "query", rows(a.query_heads, a.head_dim, a.query_strides), 2);
    operand(a.key, "key", rows(a.heads, a.head_dim, a.key_strides), 2);
    operand(a.value, "value", rows(a.heads, a.value_dim, a.value_strides), 2);
    operand(a.log_gate, "log_gate", rows(a.heads, 1, a.log_gate_strides), 4);
    operand(a.cu_seqlens, "cu_seqlens", a.sequences + std::int64_t{1}, 4);
    operand(a.initial_state, "initial_state", states() * a.value_dim, 4);
    operand(a.initial_key_sum, "initial_key_sum", states(), 4);
  }

  void take(device::BackwardArguments& b, std::size_t forward_workspace_bytes) {
    device::ForwardArguments& a = b.forward;
    take_operands(a);
    operand(a.output, "output", rows(a.query_heads, a.value_dim, a.output_strides), 2);
    operand(a.output_residual, "output_residual",
            rows(a.query_heads, a.value_dim, a.output_strides), 2);
    operand(a.normalizer, "normalizer", batch() * a.tokens * a.query_heads, 4);
    operand(b.forward_workspace, "forward workspace",
            static_cast<std::int64_t>(forward_workspace_bytes), 1);
    operand(b.d_output, "d_output", rows(a.query_heads, a.value_dim, b.d_output_strides), 2);
    operand(b.d_final_state, "d_final_state", states() * a.value_dim, 4);
    operand(b.d_final_key_sum, "d_final_key_sum", states(), 4);
    result(b.d_query, "d_query", batch() * a.tokens * a.query_heads * a.head_dim, 2);
    result(b.d_key, "d_key", batch() * a.tokens * a.heads * a.head_dim, 2);
    result(b.d_value, "d_value", batch() * a.tokens * a.heads * a.value_dim, 2);
    result(b.d_log_gate, "d_log_gate", batch() * a.tokens * a.heads, 4);
    result(b.d_initial_state, "d_initial_state", states() * a.value_dim, 4);
    result(b.d_initial_key_sum, "d_initial_key_sum", states(), 4);
  }

  void take(device::OuterState& outer) {
    operand(outer.state, "outer state", states() * a_.value_dim, 4);
    operand(outer.key_sum, "outer key sum", states(), 4);
  }

  void take(device::DecodePool& p) {
    std::int64_t const D = state_dim(p.head_dim, p.degree), ring = p.ring;
    in_place(p.high, "high", p.slots, p.heads, p.high_strides, D * p.value_dim, 2);
    in_place(p.low, "low", p.slots, p.heads, p.low_strides, D * p.value_dim, 2);
    in_place(p.key_sum, "key_sum", p.slots, p.heads, p.key_sum_strides, D, 4);
    in_place(p.keys, "keys", p.slots, p.heads, p.keys_strides, ring * p.head_dim, 2);
    in_place(p.values, "values", p.slots, p.heads, p.values_strides, ring * p.value_dim, 2);
    in_place(p.log_gates, "log_gates", p.slots, p.heads, p.log_gates_strides, ring, 4);
    in_place(p.cursors, "cursors", p.slots, 1, {p.cursors_stride, 0}, 1, sizeof(Cursor));
  }

  void take(device::DecodeStepArguments& a) {
    take_tokens(a, a.cu_seqlens != nullptr ? a.total : a.tokens);
    in_place(a.arrivals, "arrivals", 1, 1, {}, std::int64_t{a.rows} * (a.pool.heads + 1), 4);
    take(a.pool);
  }
  void take(device::DecodePrefillArguments& a) {
    take_tokens(a, a.tokens);
    in_place(a.arrivals, "arrivals", 1, 1, {}, 1, 4);
    take(a.pool);
  }
  void take(device::DecodeFoldArguments& a) {
    operand(a.slots, "slots", a.rows, 4);
    in_place(a.arrivals, "arrivals", 1, 1, {}, 1, 4);
    take(a.pool);
  }
  void take(device::DecodeCopyArguments& a) {
    operand(a.source, "source", a.count, 4);
    operand(a.target, "target", a.count, 4);
    take(a.pool);
  }
  void take(device::DecodeResetArguments& a) {
    operand(a.slots, "slots", a.count, 4);
    operand(a.phases, "phases", a.count, 4);
    take(a.pool);
  }
  void take(device::DecodeRollbackArguments& a) {
    operand(a.slots, "slots", a.count, 4);
    operand(a.tokens, "tokens", a.count, 4);
    take(a.pool);
  }

  /// Of a call with new tokens, so many of each row, or of all where they are packed.
  template <class Arguments>
  void take_tokens(Arguments& a, std::int64_t tokens) {
    std::int64_t const batch = a.cu_seqlens != nullptr ? 1 : a.rows;
    auto const elements = [&](int heads, int width, device::Strides const& s) {
      return (batch - 1) * s.batch + (tokens - 1) * s.token + (heads - 1) * s.head + width;
    };
    device::DecodePool const& p = a.pool;
    operand(a.query, "query", elements(a.query_heads, p.head_dim, a.query_strides), 2);
    operand(a.key, "key", elements(p.heads, p.head_dim, a.key_strides), 2);
    operand(a.value, "value", elements(p.heads, p.value_dim, a.value_strides), 2);
    operand(a.log_gate, "log_gate", elements(p.heads, 1, a.log_gate_strides), 4);
    in_place(a.output, "output", 1, 1, {}, elements(a.query_heads, p.value_dim, a.output_strides),
             2);
    operand(a.slots, "slots", a.rows, 4);
    operand(a.cu_seqlens, "cu_seqlens", a.rows + std::int64_t{1}, 4);
  }

  template <class T>
  void result(T*& data, char const* name, std::int64_t elements, std::size_t element_bytes) {
    if (data != nullptr) {
      Array& array = add(name, elements, element_bytes, /*read_only=*/false);
      if (in_parts_) {
        std::memcpy(array.data(), data, array.size());
      }
      results_.push_back({data, arrays_.size() - 1, 0, array.size()});
      data = reinterpret_cast<T*>(array.data());
    }
  }

  void give_back() {
    for (Result const& result : results_) {
      std::memcpy(result.target, arrays_[result.index].data() + result.offset, result.bytes);
    }
  }

 private:
  using Array = emulator::GlobalArray<char>;

  struct Result {
    void* target;
    std::size_t index;  // of its array
    std::size_t offset;
    std::size_t bytes;
  };

  template <class T>
  void operand(T*& data, char const* name, std::int64_t elements, std::size_t element_bytes) {
    if (data != nullptr) {
      Array& array = add(name, elements, element_bytes, /*read_only=*/true);
      std::memcpy(array.data(), data, array.size());
      data = reinterpret_cast<T*>(array.data());
    }
  }

  Array& add(char const* name, std::int64_t elements, std::size_t element_bytes, bool read_only) {
    std::size_t const bytes = static_cast<std::size_t>(elements) * element_bytes;
    return arrays_.emplace_back(name, bytes, read_only);
  }

  // What is between the parts of a tensor belongs to others.
  template <class T>
  void in_place(T*& data, char const* name, int slots, int heads,
                device::SlotStrides const& strides, std::int64_t elements,
                std::size_t element_bytes) {
    if (data == nullptr) {
      return;
    }
    std::int64_t const span = (slots - 1) * strides.slot + (heads - 1) * strides.head + elements;
    Array& array = add(name, span, element_bytes, /*read_only=*/false);
    char* const first = reinterpret_cast<char*>(data);
    std::size_t const bytes = static_cast<std::size_t>(elements) * element_bytes;
    for (int slot = 0; slot < slots; ++slot) {
      for (int head = 0; head < heads; ++head) {
        std::size_t const offset =
            static_cast<std::size_t>(slot * strides.slot + head * strides.head) * element_bytes;
        std::memcpy(array.data() + offset, first + offset, bytes);
        results_.push_back({first + offset, arrays_.size() - 1, offset, bytes});
      }
    }
    data = reinterpret_cast<T*>(array.data());
  }

  std::int64_t batch() const { return a_.cu_seqlens != nullptr ? 1 : a_.sequences; }
  /// Elements of all sums of keys.
  std::int64_t states() const {
    return std::int64_t{a_.sequences} * a_.heads * state_dim(a_.head_dim, a_.degree);
  }
  /// Elements from the first of [b, t, heads, width] to the last.
  std::int64_t rows(int heads, int width, device::Strides const& strides) const {
    return (batch() - 1) * strides.batch + (a_.tokens - 1) * strides.token +
           (heads - 1) * strides.head + width;
  }

  device::ForwardArguments a_;
  bool in_parts_ = false;
  std::vector<Array> arrays_;
  std::vector<Result> results_;
};

/// It stands where a device has its stream.
inline std::uint64_t seed_of(CUstream_st* stream) {
  return reinterpret_cast<std::uintptr_t>(stream);
}

template <class Kernels>
device::Status run_on_copies(device::ForwardPlan plan, void* workspace, CUstream_st* stream) {
  Copies copies(plan.arguments, plan.part != device::ForwardPart::kAll);
  copies.take_operands(plan.arguments);
  copies.take_results(plan.arguments);
  copies.take(plan.earlier);
  copies.result(workspace, "workspace", static_cast<std::int64_t>(plan.workspace_bytes), 1);
  device::Status const status = run_plan<Kernels>(plan, workspace, seed_of(stream));
  copies.give_back();
  return status;
}

template <class Kernels>
device::Status run_on_copies(device::BackwardPlan const& plan, void* workspace,
                             CUstream_st* stream) {
  device::BackwardArguments arguments = plan.arguments;
  device::OuterState later = plan.later;
  Copies copies(arguments.forward, plan.part != device::BackwardPart::kAll);
  copies.take(arguments, plan.forward.workspace_bytes);
  copies.take(later);
  copies.result(workspace, "workspace", static_cast<std::int64_t>(plan.workspace_bytes), 1);
  device::Status const status = run_plan<Kernels>(
      device::BackwardPlan::make(arguments, device::multiprocessors(), plan.part, later), workspace,
      seed_of(stream));
  copies.give_back();
  return status;
}

/// A call of decoding by a plan with a workspace.
template <class Kernels, class Plan>
device::Status run_on_copies(Plan const& plan, void* workspace, CUstream_st* stream) {
  auto arguments = plan.arguments;
  Copies copies;
  copies.take(arguments);
  copies.result(workspace, "workspace", static_cast<std::int64_t>(plan.workspace_bytes), 1);
  device::Status const status = run_plan<Kernels>(Plan::make(arguments, device::multiprocessors()),
                                                  workspace, seed_of(stream));
  copies.give_back();
  return status;
}

template <class Kernels>
device::Status run_on_copies(device::DecodeFoldPlan const& plan, CUstream_st* stream) {
  device::DecodeFoldArguments arguments = plan.arguments;
  Copies copies;
  copies.take(arguments);
  device::Status const status = run_plan<Kernels>(
      device::DecodeFoldPlan::make(arguments, device::multiprocessors()), seed_of(stream));
  copies.give_back();
  return status;
}

/// A call on slots in a list.
template <class Kernels, class Arguments>
device::Status run_on_copies(Arguments arguments, CUstream_st* stream) {
  Copies copies;
  copies.take(arguments);
  device::Status const status = run_plan<Kernels>(arguments, seed_of(stream));
  copies.give_back();
  return status;
}

}  // namespace retention::test
