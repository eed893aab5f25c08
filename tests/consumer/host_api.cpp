// retention::retention as a program sees it that knows nothing of CUDA: what was compiled in, what
// would be accepted, how much memory it would take.

#include <cstdint>
#include <cstdio>
#include <retention/device/backward.hpp>
#include <retention/device/build_info.hpp>
#include <retention/device/decode.hpp>
#include <retention/device/forward.hpp>
#include <retention/symmetric_power.hpp>
#include <string>
#include <vector>

namespace device = retention::device;

namespace {

int failures = 0;

void expect(bool condition, char const* what) {
  if (!condition) {
    std::printf("not as expected: %s\n", what);
    ++failures;
  }
}

// Nothing here is read or written: any aligned address that is not null will do.
template <class T>
T* some_address() {
  return reinterpret_cast<T*>(std::uintptr_t{1} << 20);
}

device::ForwardArguments arguments_for(retention::Configuration const& configuration) {
  device::ForwardArguments a;
  a.element = configuration.element;
  a.degree = configuration.degree;
  a.head_dim = configuration.head_dim;
  a.value_dim = configuration.value_dim;
  a.sequences = 2;
  a.tokens = 4096;
  a.heads = 2;
  a.query_heads = 8;
  a.query = a.key = a.value = some_address<void>();
  a.output = some_address<void>();
  a.normalizer = some_address<float>();
  a.query_strides = device::Strides::contiguous(a.tokens, a.query_heads, a.head_dim);
  a.key_strides = device::Strides::contiguous(a.tokens, a.heads, a.head_dim);
  a.value_strides = device::Strides::contiguous(a.tokens, a.heads, a.value_dim);
  a.output_strides = device::Strides::contiguous(a.tokens, a.query_heads, a.value_dim);
  a.chunk_size = 512;
  return a;
}

device::DecodeStepArguments step_arguments_for(retention::Configuration const& configuration) {
  device::DecodeStepArguments a;
  device::DecodePool& p = a.pool;
  p.element = configuration.element;
  p.degree = configuration.degree;
  p.head_dim = configuration.head_dim;
  p.value_dim = configuration.value_dim;
  p.heads = 2;
  p.slots = 4;
  p.ring = 144;
  p.high = p.keys = p.values = some_address<void>();
  p.key_sum = some_address<float>();
  p.cursors = some_address<retention::Cursor>();
  a.rows = 3;
  a.tokens = 4;
  a.query_heads = 8;
  a.query = a.key = a.value = some_address<void>();
  a.output = some_address<void>();
  a.slots = some_address<int>();
  a.arrivals = some_address<unsigned>();
  a.window = 128;
  return a;
}

bool says(device::Status const& status, char const* text) {
  std::printf("  refused: %s\n", status.message().c_str());
  return !status && status.message().find(text) != std::string::npos;
}

}  // namespace

int main() {
  std::vector<retention::Configuration> const compiled = device::compiled_configurations();
  std::string names;
  for (auto const& configuration : compiled) {
    names += (names.empty() ? "" : " ") + retention::to_string(configuration);
  }
  std::printf("configurations: [%s]\nCUDA toolkit: '%s'\n", names.c_str(),
              device::toolkit_version().c_str());
  expect(device::toolkit_version().empty() == compiled.empty(), "kernels exactly where CUDA is");
  expect(device::architectures().empty() == compiled.empty(), "architectures where CUDA is");

  for (auto const& configuration : retention::kConfigurations) {
    device::ForwardArguments a = arguments_for(configuration);
    bool in_library = false;
    for (auto const& other : compiled) {
      in_library = in_library || other == configuration;
    }
    device::Status const status = device::can_implement(a);
    expect(status.ok() == in_library, "what is compiled, and that alone, is accepted");
    expect(status.message().empty() == status.ok(), "an error has a message");

    // A state of each chunk, in the element type, is the least that is kept.
    std::size_t const rows =
        static_cast<std::size_t>(retention::state_dim(a.head_dim, a.degree)) * 2 * 2 * (4096 / 512);
    std::size_t const bytes = device::workspace_size(a);
    expect(bytes >= rows * static_cast<std::size_t>(a.value_dim) * 2, "workspace_size");
    expect(device::chunk_size(a) == 512, "chunk_size as given");
    a.chunk_size = 0;
    std::size_t const chosen_bytes = device::workspace_size(a);
    a.chunk_size = device::chunk_size(a);
    expect(a.chunk_size > 0 && a.chunk_size % 64 == 0, "chunk_size as chosen");
    expect(device::workspace_size(a) == chosen_bytes, "the chosen chunk_size is what is taken");
    a.chunk_size = 512;
    a.final_state = a.final_key_sum = some_address<float>();
    a.log_gate = some_address<float>();
    expect(device::workspace_size(a) > bytes, "workspace_size with gates");
    std::printf("%s: %s, workspace %zu bytes\n", retention::to_string(configuration).c_str(),
                status ? "accepted" : status.message().c_str(), bytes);
  }

  device::ForwardArguments a = arguments_for(retention::kConfigurations[0]);
  a.head_dim = 48;
  expect(says(device::can_implement(a), "no kernel for bf16_d48"), "another head_dim");
  a = arguments_for(compiled.empty() ? retention::kConfigurations[0] : compiled[0]);
  a.query_heads = 3;
  char const* const why = compiled.empty() ? "without CUDA kernels" : "query_heads: got 3";
  expect(says(device::can_implement(a), why), "query_heads");
  expect(says(device::run(a, nullptr, nullptr), why), "run refuses what can_implement refuses");
  expect(device::workspace_size(a) == 0, "workspace_size of sizes that make no sense");
  expect(device::chunk_size(a) == 0, "chunk_size of sizes that make no sense");
  a = arguments_for(compiled.empty() ? retention::kConfigurations[0] : compiled[0]);
  a.output_residual = static_cast<char*>(a.output) + 2;
  char const* const residual = compiled.empty() ? why : "output_residual: expected";
  expect(says(device::can_implement(a), residual), "output_residual");

  a = arguments_for(compiled.empty() ? retention::kConfigurations[0] : compiled[0]);
  device::BackwardArguments b;
  b.forward = a;
  expect(says(device::can_implement(b), residual), "backward needs output_residual");
  expect(says(device::run(b, nullptr, nullptr), residual), "as can_implement, so run");
  expect(device::workspace_size(b) > device::workspace_size(a), "workspace_size of backward");
  b.forward.tokens = 0;
  expect(device::workspace_size(b) == 0, "workspace_size of sizes that make no sense");

  // In parts: of bf16 alone, and with states on both sides.
  bool const has_parts =
      !compiled.empty() && compiled[0].element == retention::ElementType::kBFloat16;
  auto const refused = [&](char const* text) {
    return compiled.empty() ? why : has_parts ? text : "element: expected bf16";
  };
  b = {};
  b.forward = a;
  expect(says(device::can_implement_parts(a), refused("initial_state, final_state: expected")),
         "parts need states");
  expect(says(device::run_states(a, nullptr, nullptr), refused("initial_state, final_state")),
         "run_states refuses what can_implement_parts refuses");
  expect(says(device::run_output(a, nullptr, nullptr), refused("initial_state, final_state")),
         "so does run_output");
  a.initial_state = a.initial_key_sum = a.final_state = a.final_key_sum = some_address<float>();
  expect(says(device::run_carry(a, {}, nullptr, nullptr), refused("earlier: expected two")),
         "run_carry needs what came before");
  b.forward = a;
  b.forward.output_residual = a.output;
  b.d_output = a.output;
  b.d_output_strides = a.output_strides;
  b.d_query = a.output;
  expect(says(device::can_implement_parts(b), refused("d_final_state, d_initial_state: expected")),
         "parts of backward need gradients of states");
  b.d_final_state = b.d_final_key_sum = a.final_state;
  b.d_initial_state = b.d_initial_key_sum = some_address<float>();
  expect(says(device::run_key_gradients(b, {}, nullptr, nullptr), refused("later: expected two")),
         "run_key_gradients needs what came after");
  expect(says(device::run_state_gradients(b, nullptr, nullptr), refused("workspace")) &&
             says(device::run_query_gradient(b, nullptr, nullptr), refused("workspace")),
         "parts need a workspace");
  expect(device::parts_workspace_size(b) >= device::workspace_size(b), "parts_workspace_size");
  for (auto const& configuration : compiled) {
    if (configuration.element == retention::ElementType::kFloat16) {
      expect(says(device::can_implement_parts(arguments_for(configuration)), "element: expected"),
             "fp16 has no parts");
    }
  }

  for (auto const& configuration : retention::kConfigurations) {
    device::DecodeStepArguments const step = step_arguments_for(configuration);
    device::DecodeRollbackArguments rollback;
    rollback.pool = step.pool;
    rollback.count = 1;
    rollback.slots = rollback.tokens = some_address<int>();
    bool const in_library = device::can_implement(arguments_for(configuration)).ok();
    expect(device::can_implement(step).ok() == in_library, "a step where there are kernels");
    expect(device::can_implement(rollback).ok() == in_library, "and what goes with it");
    // A slice at least, and the ring: sums of each query, and their weights.
    std::size_t const sums = std::size_t{3} * 2 * 2 * 4 * 4;
    expect(device::workspace_size(step) >=
               sums * (static_cast<std::size_t>(configuration.value_dim) + 1) * 4,
           "workspace_size of a step");
  }
  struct Refused {
    char const* says;
    void (*spoil)(device::DecodeStepArguments&);
  };
  for (Refused const& refused : {
           Refused{"tokens: got 17", [](device::DecodeStepArguments& s) { s.tokens = 17; }},
           {"query_heads: got 7", [](device::DecodeStepArguments& s) { s.query_heads = 7; }},
           {"window: got 3", [](device::DecodeStepArguments& s) { s.window = 3; }},
           {"window: got 513", [](device::DecodeStepArguments& s) { s.window = 513; }},
           {"ring: got 144, expected at least 148",
            [](device::DecodeStepArguments& s) { s.keep = 17; }},
           {"rows: got 2147483647", [](device::DecodeStepArguments& s) { s.rows = 2147483647; }},
           {"slots: got 0", [](device::DecodeStepArguments& s) { s.pool.slots = 0; }},
           {"slice_pairs: got -1", [](device::DecodeStepArguments& s) { s.slice_pairs = -1; }},
       }) {
    device::DecodeStepArguments s =
        step_arguments_for(compiled.empty() ? retention::kConfigurations[0] : compiled[0]);
    refused.spoil(s);
    expect(says(device::can_implement(s), compiled.empty() ? why : refused.says), refused.says);
    expect(says(device::run(s, nullptr, nullptr), compiled.empty() ? why : refused.says),
           "run refuses what can_implement refuses");
    expect(device::workspace_size(s) == 0, "workspace_size of sizes that make no sense");
  }

  if (failures == 0) {
    std::printf("all as expected\n");
  }
  return failures == 0 ? 0 : 1;
}
