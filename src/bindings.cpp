// The Python module retention._C.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <retention/device/backward.hpp>
#include <retention/device/build_info.hpp>
#include <retention/device/decode.hpp>
#include <retention/device/forward.hpp>
#include <retention/symmetric_power.hpp>
#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

[[noreturn]] void raise_value_error(std::string const& message) {
  throw nb::value_error(message.c_str());
}

int check_degree(std::int64_t degree) {
  if (degree <= 0 || degree % 2 != 0 || degree > INT_MAX) {
    raise_value_error("degree: expected a positive even integer, got " + std::to_string(degree));
  }
  return static_cast<int>(degree);
}

int check_head_dim(std::int64_t head_dim, int degree) {
  if (head_dim <= 0 || head_dim % 8 != 0 || head_dim > INT_MAX) {
    raise_value_error("head_dim: expected a positive multiple of 8, got " +
                      std::to_string(head_dim));
  }
  if (!retention::is_supported(static_cast<int>(head_dim), degree)) {
    raise_value_error("head_dim, degree: expected a state whose rows fit 64-bit integers, got " +
                      std::to_string(head_dim) + " and " + std::to_string(degree));
  }
  return static_cast<int>(head_dim);
}

int block_width(std::int64_t degree) { return retention::block_width(check_degree(degree)); }

std::int64_t state_dim(std::int64_t head_dim, std::int64_t degree) {
  int const p = check_degree(degree);
  return retention::state_dim(check_head_dim(head_dim, p), p);
}

nb::tuple symmetric_power_row(std::int64_t row, std::int64_t head_dim, std::int64_t degree) {
  int const p = check_degree(degree);
  int const d = check_head_dim(head_dim, p);
  std::int64_t const rows = retention::state_dim(d, p);
  if (row < 0 || row >= rows) {
    raise_value_error("row: expected 0 <= row < " + std::to_string(rows) + ", got " +
                      std::to_string(row));
  }
  nb::list factors;
  for (int position = 0; position < p; ++position) {
    factors.append(retention::row_factor(row, position, d, p));
  }
  return nb::make_tuple(nb::tuple(factors), retention::row_multiplicity(row, d, p));
}

// ForwardArguments as two tuples of integers in these orders: the sizes, which a caller keeps from
// call to call, and the addresses, 0 for null. The output is contiguous.
constexpr std::array kForwardSizes = {
    "element",     "degree",      "head_dim",           "value_dim",      "sequences",
    "tokens",      "heads",       "query_heads",        "query_batch",    "query_token",
    "query_head",  "key_batch",   "key_token",          "key_head",       "value_batch",
    "value_token", "value_head",  "log_gate_batch",     "log_gate_token", "log_gate_head",
    "chunk_size",  "whole_until", "discards_workspace",
};
constexpr std::array kForwardPointers = {
    "query",           "key",    "value",           "log_gate",   "cu_seqlens",  "initial_state",
    "initial_key_sum", "output", "output_residual", "normalizer", "final_state", "final_key_sum",
};

template <std::size_t M, std::size_t N>
constexpr auto joined(std::array<char const*, M> const& first,
                      std::array<char const*, N> const& second) {
  std::array<char const*, M + N> all{};
  for (std::size_t i = 0; i < M + N; ++i) {
    all[i] = i < M ? first[i] : second[i - M];
  }
  return all;
}

// BackwardArguments: those of forward, then its own.
constexpr auto kBackwardSizes =
    joined(kForwardSizes, std::array{"d_output_batch", "d_output_token", "d_output_head"});
constexpr auto kBackwardPointers =
    joined(kForwardPointers, std::array{"forward_workspace", "d_output", "d_final_state",
                                        "d_final_key_sum", "d_query", "d_key", "d_value",
                                        "d_log_gate", "d_initial_state", "d_initial_key_sum"});

// DecodePool, and the arguments of the calls that take one: those of the pool, then their own.
// Outputs are contiguous.
constexpr std::array kDecodePoolSizes = {
    "element",        "degree",         "head_dim",       "value_dim", "heads",       "slots",
    "ring",           "null_slot",      "high_slot",      "high_head", "low_slot",    "low_head",
    "key_sum_slot",   "key_sum_head",   "keys_slot",      "keys_head", "values_slot", "values_head",
    "log_gates_slot", "log_gates_head", "cursors_stride",
};
constexpr std::array kDecodePoolPointers = {
    "high", "low", "key_sum", "keys", "values", "log_gates", "cursors",
};
constexpr auto kDecodeStepSizes = joined(
    kDecodePoolSizes, std::array{"rows", "tokens", "query_heads", "query_batch", "query_token",
                                 "query_head", "key_batch", "key_token", "key_head", "value_batch",
                                 "value_token", "value_head", "log_gate_batch", "log_gate_token",
                                 "log_gate_head", "total", "window", "keep", "slice_pairs"});
constexpr auto kDecodeStepPointers = joined(
    kDecodePoolPointers,
    std::array{"query", "key", "value", "log_gate", "output", "slots", "cu_seqlens", "arrivals"});
constexpr auto kDecodePrefillSizes =
    joined(kDecodePoolSizes,
           std::array{"rows", "tokens", "query_heads", "query_batch", "query_token", "query_head",
                      "key_batch", "key_token", "key_head", "value_batch", "value_token",
                      "value_head", "log_gate_batch", "log_gate_token", "log_gate_head", "keep"});
constexpr auto kDecodeFoldSizes = joined(kDecodePoolSizes, std::array{"rows", "window", "keep"});
constexpr auto kDecodeFoldPointers = joined(kDecodePoolPointers, std::array{"slots", "arrivals"});
constexpr auto kDecodeListSizes = joined(kDecodePoolSizes, std::array{"count"});
constexpr auto kDecodeCopyPointers = joined(kDecodePoolPointers, std::array{"source", "target"});
constexpr auto kDecodeResetPointers = joined(kDecodePoolPointers, std::array{"slots", "phases"});
constexpr auto kDecodeRollbackPointers = joined(kDecodePoolPointers, std::array{"slots", "tokens"});

/// Takes the integers of a tuple one after the other.
class Reader {
 public:
  template <std::size_t N>
  Reader(nb::tuple const& values, std::array<char const*, N> const& names, char const* argument)
      : values_(values), names_(names.data()) {
    if (values.size() != N) {
      raise_value_error(std::string(argument) + ": expected " + std::to_string(N) +
                        " integers, got " + std::to_string(values.size()));
    }
  }

  std::int64_t integer() {
    PyObject* const value = PyTuple_GetItem(values_.ptr(), position_++);  // borrowed
    long long const number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred() != nullptr) {
      throw nb::python_error();
    }
    return number;
  }

  int size() {
    std::int64_t const number = integer();
    if (number < INT_MIN || number > INT_MAX) {
      raise_value_error(std::string(names_[position_ - 1]) + ": expected a 32-bit integer, got " +
                        std::to_string(number));
    }
    return static_cast<int>(number);
  }

  retention::device::Strides strides() {
    std::int64_t const batch = integer();
    std::int64_t const token = integer();
    return {batch, token, integer()};
  }

  retention::device::SlotStrides slot_strides() {
    std::int64_t const slot = integer();
    return {slot, integer()};
  }

  retention::ElementType element() {
    int const element = size();
    if (element != 0 && element != 1) {
      raise_value_error("element: expected 0 (bf16) or 1 (fp16), got " + std::to_string(element));
    }
    return element == 0 ? retention::ElementType::kBFloat16 : retention::ElementType::kFloat16;
  }

  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(integer()));
  }

 private:
  nb::tuple const& values_;
  char const* const* names_;
  Py_ssize_t position_ = 0;
};

retention::device::ForwardArguments read_forward(Reader& size, Reader& at) {
  retention::device::ForwardArguments a;
  a.element = size.element();
  a.degree = size.size();
  a.head_dim = size.size();
  a.value_dim = size.size();
  a.sequences = size.size();
  a.tokens = size.size();
  a.heads = size.size();
  a.query_heads = size.size();
  a.query_strides = size.strides();
  a.key_strides = size.strides();
  a.value_strides = size.strides();
  a.log_gate_strides = size.strides();
  a.output_strides = retention::device::Strides::contiguous(a.tokens, a.query_heads, a.value_dim);
  a.chunk_size = size.size();
  a.whole_until = size.size();
  a.discards_workspace = size.size() != 0;
  a.query = at.pointer<void>();
  a.key = at.pointer<void>();
  a.value = at.pointer<void>();
  a.log_gate = at.pointer<float>();
  a.cu_seqlens = at.pointer<int>();
  a.initial_state = at.pointer<float>();
  a.initial_key_sum = at.pointer<float>();
  a.output = at.pointer<void>();
  a.output_residual = at.pointer<void>();
  a.normalizer = at.pointer<float>();
  a.final_state = at.pointer<float>();
  a.final_key_sum = at.pointer<float>();
  return a;
}

struct Forward {
  static retention::device::ForwardArguments read(nb::tuple const& sizes,
                                                  nb::tuple const& pointers) {
    Reader size(sizes, kForwardSizes, "sizes");
    Reader at(pointers, kForwardPointers, "pointers");
    return read_forward(size, at);
  }
};

struct Backward {
  static retention::device::BackwardArguments read(nb::tuple const& sizes,
                                                   nb::tuple const& pointers) {
    Reader size(sizes, kBackwardSizes, "sizes");
    Reader at(pointers, kBackwardPointers, "pointers");
    retention::device::BackwardArguments a;
    a.forward = read_forward(size, at);
    a.d_output_strides = size.strides();
    a.forward_workspace = at.pointer<void>();
    a.d_output = at.pointer<void>();
    a.d_final_state = at.pointer<float>();
    a.d_final_key_sum = at.pointer<float>();
    a.d_query = at.pointer<void>();
    a.d_key = at.pointer<void>();
    a.d_value = at.pointer<void>();
    a.d_log_gate = at.pointer<float>();
    a.d_initial_state = at.pointer<float>();
    a.d_initial_key_sum = at.pointer<float>();
    return a;
  }
};

retention::device::DecodePool read_pool(Reader& size, Reader& at) {
  retention::device::DecodePool p;
  p.element = size.element();
  p.degree = size.size();
  p.head_dim = size.size();
  p.value_dim = size.size();
  p.heads = size.size();
  p.slots = size.size();
  p.ring = size.size();
  p.null_slot = size.size();
  p.high_strides = size.slot_strides();
  p.low_strides = size.slot_strides();
  p.key_sum_strides = size.slot_strides();
  p.keys_strides = size.slot_strides();
  p.values_strides = size.slot_strides();
  p.log_gates_strides = size.slot_strides();
  p.cursors_stride = size.integer();
  p.high = at.pointer<void>();
  p.low = at.pointer<void>();
  p.key_sum = at.pointer<float>();
  p.keys = at.pointer<void>();
  p.values = at.pointer<void>();
  p.log_gates = at.pointer<float>();
  p.cursors = at.pointer<retention::Cursor>();
  return p;
}

/// What a step and a prefill have in common.
template <class Arguments>
void read_new_tokens(Arguments& a, Reader& size, Reader& at) {
  a.pool = read_pool(size, at);
  a.rows = size.size();
  a.tokens = size.size();
  a.query_heads = size.size();
  a.query_strides = size.strides();
  a.key_strides = size.strides();
  a.value_strides = size.strides();
  a.log_gate_strides = size.strides();
  a.output_strides =
      retention::device::Strides::contiguous(a.tokens, a.query_heads, a.pool.value_dim);
  a.query = at.pointer<void>();
  a.key = at.pointer<void>();
  a.value = at.pointer<void>();
  a.log_gate = at.pointer<float>();
  a.output = at.pointer<void>();
  a.slots = at.pointer<int>();
  a.cu_seqlens = at.pointer<int>();
  a.arrivals = at.pointer<unsigned>();
}

struct DecodeStep {
  static retention::device::DecodeStepArguments read(nb::tuple const& sizes,
                                                     nb::tuple const& pointers) {
    Reader size(sizes, kDecodeStepSizes, "sizes");
    Reader at(pointers, kDecodeStepPointers, "pointers");
    retention::device::DecodeStepArguments a;
    read_new_tokens(a, size, at);
    a.total = size.size();
    a.window = size.size();
    a.keep = size.size();
    a.slice_pairs = size.size();
    return a;
  }
};

struct DecodePrefill {
  static retention::device::DecodePrefillArguments read(nb::tuple const& sizes,
                                                        nb::tuple const& pointers) {
    Reader size(sizes, kDecodePrefillSizes, "sizes");
    Reader at(pointers, kDecodeStepPointers, "pointers");
    retention::device::DecodePrefillArguments a;
    read_new_tokens(a, size, at);
    a.keep = size.size();
    return a;
  }
};

struct DecodeFold {
  static retention::device::DecodeFoldArguments read(nb::tuple const& sizes,
                                                     nb::tuple const& pointers) {
    Reader size(sizes, kDecodeFoldSizes, "sizes");
    Reader at(pointers, kDecodeFoldPointers, "pointers");
    retention::device::DecodeFoldArguments a;
    a.pool = read_pool(size, at);
    a.rows = size.size();
    a.window = size.size();
    a.keep = size.size();
    a.slots = at.pointer<int>();
    a.arrivals = at.pointer<unsigned>();
    return a;
  }
};

/// A call on slots in a list: of arguments with two lists, which are these.
template <class Arguments, auto const& kPointers, auto kFirst, auto kSecond>
struct DecodeList {
  static Arguments read(nb::tuple const& sizes, nb::tuple const& pointers) {
    Reader size(sizes, kDecodeListSizes, "sizes");
    Reader at(pointers, kPointers, "pointers");
    Arguments a;
    a.pool = read_pool(size, at);
    a.count = size.size();
    a.*kFirst = at.pointer<int>();
    a.*kSecond = at.pointer<int>();
    return a;
  }
};

using retention::device::DecodeCopyArguments;
using DecodeCopy = DecodeList<DecodeCopyArguments, kDecodeCopyPointers,
                              &DecodeCopyArguments::source, &DecodeCopyArguments::target>;
using retention::device::DecodeResetArguments;
using DecodeReset = DecodeList<DecodeResetArguments, kDecodeResetPointers,
                               &DecodeResetArguments::slots, &DecodeResetArguments::phases>;
using retention::device::DecodeRollbackArguments;
using DecodeRollback =
    DecodeList<DecodeRollbackArguments, kDecodeRollbackPointers, &DecodeRollbackArguments::slots,
               &DecodeRollbackArguments::tokens>;

template <class Pass>
nb::object can_implement(nb::tuple const& sizes, nb::tuple const& pointers) {
  auto const status = retention::device::can_implement(Pass::read(sizes, pointers));
  return status ? nb::object(nb::none()) : nb::cast(status.message());
}

template <class Pass>
std::size_t workspace_size(nb::tuple const& sizes, nb::tuple const& pointers) {
  return retention::device::workspace_size(Pass::read(sizes, pointers));
}

std::size_t backward_parts_workspace_size(nb::tuple const& sizes, nb::tuple const& pointers) {
  return retention::device::parts_workspace_size(Backward::read(sizes, pointers));
}

int forward_chunk_size(nb::tuple const& sizes, nb::tuple const& pointers) {
  return retention::device::chunk_size(Forward::read(sizes, pointers));
}

void check_part(retention::device::Status const& status) {
  if (!status) {
    throw std::runtime_error(status.message());
  }
}

/// Calls without the lock of the interpreter, and raises what went wrong.
template <class Arguments, class... Rest>
void call(Arguments const& arguments, Rest... rest) {
  retention::device::Status status;
  {
    nb::gil_scoped_release const released;
    status = retention::device::run(arguments, rest...);
  }
  if (status) {
    return;
  }
  if (!retention::device::can_implement(arguments)) {
    raise_value_error(status.message());
  }
  throw std::runtime_error(status.message());
}

template <class Pass>
void run(nb::tuple const& sizes, nb::tuple const& pointers, std::uintptr_t workspace,
         std::uintptr_t stream) {
  call(Pass::read(sizes, pointers), reinterpret_cast<void*>(workspace),
       reinterpret_cast<CUstream_st*>(stream));
}

/// A part of a call.
template <class Pass, auto kPart>
void run_part(nb::tuple const& sizes, nb::tuple const& pointers, std::uintptr_t workspace,
              std::uintptr_t stream) {
  check_part(kPart(Pass::read(sizes, pointers), reinterpret_cast<void*>(workspace),
                   reinterpret_cast<CUstream_st*>(stream)));
}

/// Likewise, of one that adds what comes from somewhere else.
template <class Pass, auto kPart>
void run_outer_part(nb::tuple const& sizes, nb::tuple const& pointers, std::uintptr_t outer_state,
                    std::uintptr_t outer_key_sum, std::uintptr_t workspace, std::uintptr_t stream) {
  retention::device::OuterState const outer{reinterpret_cast<float const*>(outer_state),
                                            reinterpret_cast<float const*>(outer_key_sum)};
  check_part(kPart(Pass::read(sizes, pointers), outer, reinterpret_cast<void*>(workspace),
                   reinterpret_cast<CUstream_st*>(stream)));
}

/// Of a call that takes no workspace.
template <class Pass>
void run_at_once(nb::tuple const& sizes, nb::tuple const& pointers, std::uintptr_t stream) {
  call(Pass::read(sizes, pointers), reinterpret_cast<CUstream_st*>(stream));
}

template <std::size_t N>
nb::tuple to_tuple(std::array<char const*, N> const& names) {
  nb::list list;
  for (char const* name : names) {
    list.append(name);
  }
  return nb::tuple(list);
}

nb::dict build_info() {
  std::string const cutlass = RETENTION_CUTLASS_VERSION;
  std::string const toolkit = retention::device::toolkit_version();
  nb::list architectures;
  for (std::string const& architecture : retention::device::architectures()) {
    architectures.append(architecture);
  }
  nb::list kernels;
  for (auto const& configuration : retention::device::compiled_configurations()) {
    for (char const* pass : {"forward_", "backward_", "decode_"}) {
      kernels.append(pass + retention::to_string(configuration));
    }
  }
  auto const string_or_none = [](std::string const& text) {
    return text.empty() ? nb::object(nb::none()) : nb::cast(text);
  };
  nb::dict info;
  info["version"] = RETENTION_VERSION;
  info["compiler"] = RETENTION_COMPILER;
  info["cuda"] = !toolkit.empty();
  info["cuda_toolkit"] = string_or_none(toolkit);
  info["cuda_architectures"] = architectures;
  info["cutlass"] = string_or_none(cutlass);
  info["kernels"] = kernels;
  return info;
}

}  // namespace

NB_MODULE(_C, module) {
  module.doc() =
      "Compiled part of retention: the order of the state's rows, the kernels, and the build.";

  module.def(
      "block_width", &block_width, "degree"_a,
      R"(Elements in one block of the symmetric power: 8 for degree 2, 2 for degree 4, else 1.

Raises ValueError unless `degree` is positive and even.)");

  module.def("state_dim", &state_dim, "head_dim"_a, "degree"_a = 2,
             R"(Rows of the state, D: C(blocks + degree - 1, degree) * width ** degree, with
width = block_width(degree) and blocks = head_dim / width. For degree 2 that is
head_dim * (head_dim + 8) / 2.

Raises ValueError unless `head_dim` is a positive multiple of 8, `degree` is
positive and even, and the rows fit 64-bit integers.)");

  module.def("symmetric_power_row", &symmetric_power_row, "row"_a, "head_dim"_a, "degree"_a = 2,
             nb::sig("def symmetric_power_row(row: int, head_dim: int, degree: int = 2) -> "
                     "tuple[tuple[int, ...], int]"),
             R"(What row `row` of a state holds: (factors, multiplicity).

The row of an expanded query is the product of x[i] for i in `factors`, of which
there are `degree`; that of an expanded key is the same times `multiplicity`.

Raises ValueError for a `row` outside [0, state_dim(head_dim, degree)), and for
what state_dim refuses.)");

  module.attr("FORWARD_SIZES") = to_tuple(kForwardSizes);
  module.attr("FORWARD_POINTERS") = to_tuple(kForwardPointers);
  module.attr("BACKWARD_SIZES") = to_tuple(kBackwardSizes);
  module.attr("BACKWARD_POINTERS") = to_tuple(kBackwardPointers);

  module.def("forward_can_implement", &can_implement<Forward>, "sizes"_a, "pointers"_a,
             nb::sig("def forward_can_implement(sizes: tuple[int, ...], pointers: tuple[int, ...]) "
                     "-> str | None"),
             R"(Why forward refuses these arguments, or None if it takes them.

They are the fields of the C++ ForwardArguments in the order of FORWARD_SIZES and
FORWARD_POINTERS. `element` is 0 for bf16 and 1 for fp16; each `_batch`, `_token`
and `_head` is a stride in elements; pointers are addresses, 0 for null, and
nothing is read from them.

Raises ValueError for a wrong count, OverflowError or ValueError for a number out
of range, and TypeError for what is not an integer.)");

  module.def("forward_workspace_size", &workspace_size<Forward>, "sizes"_a, "pointers"_a,
             nb::sig("def forward_workspace_size(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> int"),
             R"(Bytes of device memory that forward needs as its workspace on the current device;
0 for sizes that make no sense. Of the pointers it matters which are 0.

Arguments and errors as in forward_can_implement.)");

  module.def(
      "forward_chunk_size", &forward_chunk_size, "sizes"_a, "pointers"_a,
      nb::sig("def forward_chunk_size(sizes: tuple[int, ...], pointers: tuple[int, ...]) "
              "-> int"),
      R"(Tokens of a chunk as forward takes it, given or chosen: from the number of tokens up,
no chunks; 0 for sizes that make no sense. Packed sequences of up to whole_until tokens
are one chunk all the same.

Arguments and errors as in forward_can_implement.)");

  module.def("forward", &run<Forward>, "sizes"_a, "pointers"_a, "workspace"_a, "stream"_a,
             nb::sig("def forward(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "workspace: int, stream: int) -> None"),
             R"(Enqueue the forward kernels on a CUDA stream of the current device.

`sizes` and `pointers` as in forward_can_implement; the output and its residual are
contiguous. `workspace` is the address of forward_workspace_size(sizes, pointers)
bytes, 256-byte aligned, and `stream` that of a cudaStream_t. It neither allocates
nor synchronises.

Raises ValueError for what forward_can_implement refuses, and RuntimeError for the
workspace or where CUDA fails.)");

  constexpr char const* kPart =
      R"(Enqueue a part of forward, of sequences of which others have earlier tokens.

forward_states makes the states of these tokens, and what they end with; forward_carry
adds to both what came before, `outer_state` and `outer_key_sum`, addresses of fp32
tensors as the initial ones; forward_output does the rest. All have the same arguments,
those of forward, and follow one another on a stream.

Raises RuntimeError for what the library refuses (fp16 among it: see forward.hpp), and
where CUDA fails.)";
  module.def("forward_states", &run_part<Forward, &retention::device::run_states>, "sizes"_a,
             "pointers"_a, "workspace"_a, "stream"_a,
             nb::sig("def forward_states(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "workspace: int, stream: int) -> None"),
             kPart);
  module.def("forward_carry", &run_outer_part<Forward, &retention::device::run_carry>, "sizes"_a,
             "pointers"_a, "outer_state"_a, "outer_key_sum"_a, "workspace"_a, "stream"_a,
             nb::sig("def forward_carry(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "outer_state: int, outer_key_sum: int, workspace: int, stream: int) -> None"),
             kPart);
  module.def("forward_output", &run_part<Forward, &retention::device::run_output>, "sizes"_a,
             "pointers"_a, "workspace"_a, "stream"_a,
             nb::sig("def forward_output(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "workspace: int, stream: int) -> None"),
             kPart);

  module.def("backward_can_implement", &can_implement<Backward>, "sizes"_a, "pointers"_a,
             nb::sig("def backward_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             R"(Why backward refuses these arguments, or None if it takes them.

They are the fields of the C++ BackwardArguments in the order of BACKWARD_SIZES and
BACKWARD_POINTERS, which begin with those of forward. Errors as in
forward_can_implement.)");

  module.def("backward_workspace_size", &workspace_size<Backward>, "sizes"_a, "pointers"_a,
             nb::sig("def backward_workspace_size(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> int"),
             R"(Bytes of device memory that backward needs as its workspace on the current device;
0 for sizes that make no sense. Of the pointers it matters which are 0.

Arguments and errors as in backward_can_implement.)");

  module.def("backward", &run<Backward>, "sizes"_a, "pointers"_a, "workspace"_a, "stream"_a,
             nb::sig("def backward(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "workspace: int, stream: int) -> None"),
             R"(Enqueue the backward kernels on a CUDA stream of the current device.

`sizes` and `pointers` as in backward_can_implement; all but the inputs of forward
and d_output are contiguous. `workspace` is the address of
backward_workspace_size(sizes, pointers) bytes, 256-byte aligned, and `stream` that
of a cudaStream_t. It neither allocates nor synchronises.

Raises ValueError for what backward_can_implement refuses, and RuntimeError for the
workspace or where CUDA fails.)");

  module.def("backward_parts_workspace_size", &backward_parts_workspace_size, "sizes"_a,
             "pointers"_a,
             nb::sig("def backward_parts_workspace_size(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> int"),
             R"(Bytes of device memory that the parts of backward need as their workspace on the
current device.

Arguments and errors as in backward_can_implement.)");

  constexpr char const* kBackwardPart =
      R"(Enqueue a part of backward, of sequences of which others have later tokens.

backward_state_gradients makes the gradients of states that these tokens alone have, and
of those that they begin with; backward_query_gradient that of the queries;
backward_key_gradients adds to the first what comes from later ones, `outer_state` and
`outer_key_sum`, addresses of fp32 tensors as the final ones, and does the rest. All have
the same arguments, those of backward, and follow one another on a stream.

Raises RuntimeError for what the library refuses (fp16 among it: see backward.hpp), and
where CUDA fails.)";
  module.def("backward_state_gradients",
             &run_part<Backward, &retention::device::run_state_gradients>, "sizes"_a, "pointers"_a,
             "workspace"_a, "stream"_a,
             nb::sig("def backward_state_gradients(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...], workspace: int, stream: int) -> None"),
             kBackwardPart);
  module.def("backward_query_gradient", &run_part<Backward, &retention::device::run_query_gradient>,
             "sizes"_a, "pointers"_a, "workspace"_a, "stream"_a,
             nb::sig("def backward_query_gradient(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...], workspace: int, stream: int) -> None"),
             kBackwardPart);
  module.def("backward_key_gradients",
             &run_outer_part<Backward, &retention::device::run_key_gradients>, "sizes"_a,
             "pointers"_a, "outer_state"_a, "outer_key_sum"_a, "workspace"_a, "stream"_a,
             nb::sig("def backward_key_gradients(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...], outer_state: int, outer_key_sum: int, "
                     "workspace: int, stream: int) -> None"),
             kBackwardPart);

  module.attr("DECODE_POOL_SIZES") = to_tuple(kDecodePoolSizes);
  module.attr("DECODE_POOL_POINTERS") = to_tuple(kDecodePoolPointers);
  module.attr("DECODE_STEP_SIZES") = to_tuple(kDecodeStepSizes);
  module.attr("DECODE_STEP_POINTERS") = to_tuple(kDecodeStepPointers);
  module.attr("DECODE_PREFILL_SIZES") = to_tuple(kDecodePrefillSizes);
  module.attr("DECODE_FOLD_SIZES") = to_tuple(kDecodeFoldSizes);
  module.attr("DECODE_FOLD_POINTERS") = to_tuple(kDecodeFoldPointers);
  module.attr("DECODE_LIST_SIZES") = to_tuple(kDecodeListSizes);
  module.attr("DECODE_COPY_POINTERS") = to_tuple(kDecodeCopyPointers);
  module.attr("DECODE_RESET_POINTERS") = to_tuple(kDecodeResetPointers);
  module.attr("DECODE_ROLLBACK_POINTERS") = to_tuple(kDecodeRollbackPointers);

  module.def("decode_step_can_implement", &can_implement<DecodeStep>, "sizes"_a, "pointers"_a,
             nb::sig("def decode_step_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             R"(Why decode_step refuses these arguments, or None if it takes them.

They are the fields of the C++ DecodePool in the order of DECODE_POOL_SIZES and
DECODE_POOL_POINTERS, then those of DecodeStepArguments, together DECODE_STEP_SIZES
and DECODE_STEP_POINTERS. `element` is 0 for bf16 and 1 for fp16; each `_slot`,
`_batch`, `_token` and `_head` is a stride in elements, and `cursors_stride` one in
cursors of 32 bytes; pointers are addresses, 0 for null, and nothing is read from
them.

Raises ValueError for a wrong count, OverflowError or ValueError for a number out
of range, and TypeError for what is not an integer.)");

  module.def(
      "decode_step_workspace_size", &workspace_size<DecodeStep>, "sizes"_a, "pointers"_a,
      nb::sig("def decode_step_workspace_size(sizes: tuple[int, ...], "
              "pointers: tuple[int, ...]) -> int"),
      R"(Bytes of device memory that decode_step needs as its workspace on the current device,
0 for none and for sizes that make no sense. The pointers do not matter.

Arguments and errors as in decode_step_can_implement.)");

  module.def("decode_step", &run<DecodeStep>, "sizes"_a, "pointers"_a, "workspace"_a, "stream"_a,
             nb::sig("def decode_step(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "workspace: int, stream: int) -> None"),
             R"(Enqueue the next tokens of sequences on a CUDA stream of the current device.

With a `window`, full rings are folded first. `sizes` and `pointers` as in
decode_step_can_implement; the output is contiguous. `arrivals` are rows * (heads + 1)
32-bit integers that were zero before the first call and are zero after every one;
neither they nor the workspace are shared by calls that can overlap. `workspace` is the
address of decode_step_workspace_size(sizes, pointers) bytes, 256-byte aligned, or 0
where that is 0, and `stream` that of a cudaStream_t. It neither allocates nor
synchronises.

Raises ValueError for what decode_step_can_implement refuses, and RuntimeError for the
workspace or where CUDA fails.)");

  module.def("decode_prefill_can_implement", &can_implement<DecodePrefill>, "sizes"_a, "pointers"_a,
             nb::sig("def decode_prefill_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             R"(Why decode_prefill refuses these arguments, or None if it takes them.

They are the fields of the C++ DecodePool and DecodePrefillArguments in the order of
DECODE_PREFILL_SIZES and DECODE_STEP_POINTERS. The rest as in
decode_step_can_implement.)");

  module.def("decode_prefill_workspace_size", &workspace_size<DecodePrefill>, "sizes"_a,
             "pointers"_a,
             nb::sig("def decode_prefill_workspace_size(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> int"),
             R"(Bytes of device memory that decode_prefill needs as its workspace on the current
device, 0 for sizes that make no sense. Of the pointers it matters which are 0.

Arguments and errors as in decode_step_can_implement.)");

  module.def("decode_prefill", &run<DecodePrefill>, "sizes"_a, "pointers"_a, "workspace"_a,
             "stream"_a,
             nb::sig("def decode_prefill(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "workspace: int, stream: int) -> None"),
             R"(Enqueue prompts of sequences on a CUDA stream of the current device.

All that is in the rings of the slots is folded first; of the new tokens all but the last
`keep` of every row go into the states, and these into the rings. `sizes` and `pointers`
as in decode_prefill_can_implement; the output is contiguous. Of `arrivals` one integer
is used, as in decode_step, and `workspace` and `stream` are as there.

Raises ValueError for what decode_prefill_can_implement refuses, and RuntimeError for
the workspace or where CUDA fails.)");

  module.def("decode_fold_can_implement", &can_implement<DecodeFold>, "sizes"_a, "pointers"_a,
             nb::sig("def decode_fold_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             R"(Why decode_fold refuses these arguments, or None if it takes them.

They are the fields of the C++ DecodePool and DecodeFoldArguments in the order of
DECODE_FOLD_SIZES and DECODE_FOLD_POINTERS. The rest as in decode_step_can_implement.)");

  module.def("decode_fold", &run_at_once<DecodeFold>, "sizes"_a, "pointers"_a, "stream"_a,
             nb::sig("def decode_fold(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "stream: int) -> None"),
             R"(Enqueue that the oldest tokens of rings go into the states.

Where there are as many beyond the `keep` newest, those up to the end of a slot's window;
with a `window` of 0 all of them. `sizes` and `pointers` as in decode_fold_can_implement;
of `arrivals` one integer is used, as in decode_step.

Raises ValueError for what decode_fold_can_implement refuses, and RuntimeError where CUDA
fails.)");

  constexpr char const* kWhyNot = R"(Why the call refuses these arguments, or None if it takes them.

They are those of the call. Errors as in decode_step_can_implement.)";
  module.def("decode_copy_can_implement", &can_implement<DecodeCopy>, "sizes"_a, "pointers"_a,
             nb::sig("def decode_copy_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             kWhyNot);
  module.def("decode_reset_can_implement", &can_implement<DecodeReset>, "sizes"_a, "pointers"_a,
             nb::sig("def decode_reset_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             kWhyNot);
  module.def("decode_rollback_can_implement", &can_implement<DecodeRollback>, "sizes"_a,
             "pointers"_a,
             nb::sig("def decode_rollback_can_implement(sizes: tuple[int, ...], "
                     "pointers: tuple[int, ...]) -> str | None"),
             kWhyNot);

  module.def("decode_copy", &run_at_once<DecodeCopy>, "sizes"_a, "pointers"_a, "stream"_a,
             nb::sig("def decode_copy(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "stream: int) -> None"),
             R"(Enqueue copies of slots, as if all were read before any is written.

`sizes` are those of DECODE_LIST_SIZES, and `pointers` those of DECODE_COPY_POINTERS:
the pool's, and the `count` slots of `source` and `target`, int32 on the device, no
target twice. A pair with a slot that is not there stands for nothing.

Raises ValueError for arguments that are refused, and RuntimeError where CUDA fails.)");

  module.def("decode_reset", &run_at_once<DecodeReset>, "sizes"_a, "pointers"_a, "stream"_a,
             nb::sig("def decode_reset(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "stream: int) -> None"),
             R"(Enqueue that slots become empty.

`sizes` as in decode_copy, and `pointers` those of DECODE_RESET_POINTERS: `slots`,
`count` different ones, and their `phases`, int32 on the device; 0 for phases of 0.

Raises as decode_copy does.)");

  module.def("decode_rollback", &run_at_once<DecodeRollback>, "sizes"_a, "pointers"_a, "stream"_a,
             nb::sig("def decode_rollback(sizes: tuple[int, ...], pointers: tuple[int, ...], "
                     "stream: int) -> None"),
             R"(Enqueue that the newest tokens of slots were never seen.

`sizes` as in decode_copy, and `pointers` those of DECODE_ROLLBACK_POINTERS:
`slots`, `count` different ones, and how many `tokens` of each are taken back, int32
on the device. Of more than its ring holds, all that it holds.

Raises as decode_copy does.)");

  module.def("build_info", &build_info, nb::sig("def build_info() -> dict[str, object]"),
             R"(How this module was compiled, as a dict:

version             of the package
compiler            the C++ compiler's name and version
cuda                whether the CUDA part was built
cuda_toolkit        its version, or None without CUDA
cuda_architectures  what device code was compiled for: sm_NN is machine code,
                    compute_NN is PTX; empty without CUDA
cutlass             the version of CUTLASS found, or None
kernels             names of the compiled kernels; empty where there are none)");
}
