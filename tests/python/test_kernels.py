"""The compiled kernels: which calls reach them and in what form; on a GPU, what they return."""

import contextlib
import ctypes
import itertools
import logging
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import retention
from cases import Case, error, make, run, use_kernels
from retention import _C
from retention.ops import checks, operators, torch_private
from retention.ops.call import Operands, forward_call, short_arguments
from retention.ops.cuda import coverage, launch, plans

KERNELS = _C.build_info()["kernels"]
FORWARD_KERNELS = [name for name in KERNELS if name.startswith("forward_")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def configurations():
    """(dtype, d, dv) of every compiled kernel; one of them for the names of tests to be skipped."""
    names = FORWARD_KERNELS or ["forward_bf16_d64_dv64_p2"]
    parts = [re.fullmatch(r"forward_(bf16|fp16)_d(\d+)_dv(\d+)_p2", n).groups() for n in names]
    return [(DTYPES[element], int(d), int(dv)) for element, d, dv in parts]


# ---- without a GPU: sizes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "chunk_size", "switch_over", "expected"),
    [
        (1000, None, None, (0, 0)),  # the library's choice
        (1000, 64, None, (64, 0)),
        (1000, 65, None, (128, 0)),
        (1000, 1, None, (64, 0)),
        (64, 64, None, (64, 0)),
        (1000, 1000, None, (1024, 0)),
        (1000, 2**40, None, (1024, 0)),
        (1000, 2**40, 0, (1024, 1)),  # in chunks, of which there is one
        (1000, 128, 999, (128, 999)),
        (1000, 128, 2**40, (128, 1000)),
        (1000, None, 999, (0, 999)),
        (1, None, 0, (0, 1)),
    ],
)
def test_chunk_sizes_as_the_kernels_take_them(t, chunk_size, switch_over, expected):
    assert plans.chunk_sizes(t, chunk_size, switch_over) == expected


SIZES = {
    "element": 0,
    "degree": 2,
    "head_dim": 64,
    "value_dim": 64,
    "sequences": 2,
    "tokens": 100,
    "heads": 2,
    "query_heads": 4,
    "query_batch": 100 * 4 * 64,
    "query_token": 4 * 64,
    "query_head": 64,
    "key_batch": 100 * 2 * 64,
    "key_token": 2 * 64,
    "key_head": 64,
    "value_batch": 100 * 2 * 64,
    "value_token": 2 * 64,
    "value_head": 64,
    "log_gate_batch": 200,
    "log_gate_token": 2,
    "log_gate_head": 1,
    "chunk_size": 0,
    "whole_until": 0,
    "discards_workspace": 0,
}
POINTERS = {
    "query": 256,
    "key": 256,
    "value": 256,
    "log_gate": 4,
    "cu_seqlens": 0,
    "initial_state": 0,
    "initial_key_sum": 0,
    "output": 256,
    "output_residual": 0,
    "normalizer": 4,
    "final_state": 0,
    "final_key_sum": 0,
}
BACKWARD_SIZES = SIZES | {
    "d_output_batch": 100 * 4 * 64,
    "d_output_token": 4 * 64,
    "d_output_head": 64,
}
BACKWARD_POINTERS = POINTERS | {
    "output_residual": 256,
    "forward_workspace": 0,
    "d_output": 256,
    "d_final_state": 0,
    "d_final_key_sum": 0,
    "d_query": 256,
    "d_key": 256,
    "d_value": 256,
    "d_log_gate": 4,
    "d_initial_state": 0,
    "d_initial_key_sum": 0,
}


def changed(sizes, pointers, changes):
    assert changes.keys() <= sizes.keys() | pointers.keys()
    return tuple(
        tuple(changes.get(name, x) for name, x in values.items()) for values in (sizes, pointers)
    )


def packed(**changes):
    return changed(SIZES, POINTERS, changes)


def packed_backward(**changes):
    return changed(BACKWARD_SIZES, BACKWARD_POINTERS, changes)


def test_the_order_of_the_bindings_arguments():
    assert tuple(SIZES) == _C.FORWARD_SIZES
    assert tuple(POINTERS) == _C.FORWARD_POINTERS
    assert tuple(BACKWARD_SIZES) == _C.BACKWARD_SIZES
    assert tuple(BACKWARD_POINTERS) == _C.BACKWARD_POINTERS


@pytest.mark.parametrize(
    ("function", "packed"),
    [
        (_C.forward_can_implement, packed),
        (_C.forward_workspace_size, packed),
        (_C.forward_chunk_size, packed),
        (lambda sizes, pointers: _C.forward(sizes, pointers, 0, 0), packed),
        (_C.backward_can_implement, packed_backward),
        (_C.backward_workspace_size, packed_backward),
        (lambda sizes, pointers: _C.backward(sizes, pointers, 0, 0), packed_backward),
    ],
    ids=[
        *("forward_can_implement", "forward_workspace_size", "forward_chunk_size", "forward"),
        *("backward_can_implement", "backward_workspace_size", "backward"),
    ],
)
def test_the_binding_refuses_what_it_cannot_read(function, packed):
    sizes, pointers = packed()
    expected = f"sizes: expected {len(sizes)} integers, got "
    for wrong in (sizes[:-1], (*sizes, 0), ()):
        with pytest.raises(ValueError, match=f"{expected}{len(wrong)}"):
            function(wrong, pointers)
    n = len(pointers)
    with pytest.raises(ValueError, match=f"pointers: expected {n} integers, got {n - 1}"):
        function(sizes, pointers[:-1])
    with pytest.raises(ValueError, match=r"element: expected 0 \(bf16\) or 1 \(fp16\), got 2"):
        function(*packed(element=2))
    for name in ("degree", "tokens", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name}: expected a 32-bit integer, got 4294967296"):
            function(*packed(**{name: 2**32}))
    with pytest.raises(OverflowError):
        function(*packed(query=2**64))
    for wrong in ("64", 64.0, None):
        with pytest.raises(TypeError):
            function(*packed(head_dim=wrong))
    with pytest.raises(TypeError):
        function(list(sizes), pointers)


def test_refused_arguments_are_not_run():
    arguments = packed(head_dim=48)
    message = _C.forward_can_implement(*arguments)
    assert message == (
        "no kernel for bf16_d48_dv64_p2: expected degree 2, head_dim and value_dim of 32, 64 or "
        "128, and bf16 or fp16"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.forward(*arguments, 0, 0)
    if not KERNELS:
        without = "this library was compiled without CUDA kernels"
        assert _C.forward_can_implement(*packed()) == without
        with pytest.raises(ValueError, match=without):
            _C.forward(*packed(), 0, 0)


@pytest.mark.skipif(not KERNELS, reason="this build has no compiled kernels")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"element": 1}, None),
        ({"cu_seqlens": 4}, None),
        ({"query_token": 4}, "query: expected a 16-byte aligned pointer and strides"),
        ({"key": 8}, "key: expected a 16-byte aligned pointer"),
        ({"value_head": 63}, "value: expected a 16-byte aligned pointer"),
        ({"output": 0}, "output: got a null pointer"),
        ({"normalizer": 0}, "normalizer: got a null pointer"),
        ({"initial_state": 16}, "initial_state and initial_key_sum: expected both or neither"),
        ({"final_key_sum": 16}, "final_state and final_key_sum: expected both or neither"),
        ({"query_heads": 3}, "query_heads: got 3, expected a multiple of heads = 2"),
        ({"query_heads": 256}, "query_heads: got 256"),
        ({"tokens": 0}, "tokens: got 0, expected at least 1"),
        ({"sequences": 0}, "sequences: got 0, expected at least 1"),
        ({"chunk_size": 65}, "chunk_size: got 65, expected 0 or a positive multiple of 64"),
        ({"whole_until": -1}, "whole_until: got -1, expected 0 or more"),
    ],
)
def test_can_implement_names_the_argument(changes, message):
    arguments = packed(**changes)
    answer = _C.forward_can_implement(*arguments)
    if message is None:
        assert answer is None
        return
    assert message in answer
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.forward(*arguments, 0, 0)


def test_workspace_sizes():
    # The quadratic form needs the cumulative gate, [b, h, t] of two float32, in steps of 256 bytes.
    assert _C.forward_workspace_size(*packed(chunk_size=128)) == math.ceil(2 * 2 * 800 / 256) * 256
    assert _C.forward_workspace_size(*packed(chunk_size=128, log_gate=0)) == 0
    assert _C.forward_workspace_size(*packed(tokens=0)) == 0
    assert _C.forward_workspace_size(*packed(chunk_size=65)) == 0
    # Chunks need at least every chunk's state [D, dv] and keys [D], in two bytes.
    D = retention.state_dim(64)
    chunked = _C.forward_workspace_size(*packed(tokens=1000, chunk_size=128))
    assert chunked >= 2 * 8 * 2 * D * (64 + 1) * 2
    states = {"initial_state": 16, "initial_key_sum": 16}
    assert _C.forward_workspace_size(*packed(chunk_size=128, **states)) >= 2 * 2 * D * (64 + 1) * 2
    # Many packed sequences, empty as they may be: no state each, but a few numbers.
    for element in (0, 1):
        few, many = (
            _C.forward_workspace_size(
                *packed(element=element, tokens=100_000, sequences=n, cu_seqlens=16)
            )
            for n in (2, 10_002)
        )
        assert many - few < 10_000 * 256
    # Whether states are held is the library's choice at this length: less would be no choice.
    assert _C.forward_workspace_size(*packed(tokens=2**20)) > 2**20


@pytest.mark.parametrize("name", ["d_query", "d_key", "d_value", "d_log_gate"])
def test_the_workspace_of_one_gradient(name):
    names = ("d_query", "d_key", "d_value", "d_log_gate")
    shape = {"tokens": 1000, "chunk_size": 128}
    every = _C.backward_workspace_size(*packed_backward(**shape))
    unwanted = {n: 0 for n in names if n != name}
    alone = _C.backward_workspace_size(*packed_backward(**shape, **unwanted))
    # Those of gates are of states and their gradients, all others of one of them.
    states = 2 * 8 * 2 * retention.state_dim(64) * (64 + 1) * 2
    assert states <= alone <= (every if name == "d_log_gate" else every - states)
    # That of the initial state is of no chunk's state.
    state = {"initial_state": 16, "initial_key_sum": 16}
    state |= {"d_initial_state": 16, "d_initial_key_sum": 16}
    if name == names[0]:
        initial = _C.backward_workspace_size(
            *packed_backward(**shape, **state, **unwanted, d_query=0)
        )
        assert initial < every - states


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"d_query": 0, "d_value": 0, "d_log_gate": 0}, None),
        ({"d_query": 0, "d_key": 0, "d_value": 0}, None),
        ({"d_key": 8}, "d_key: expected a 16-byte aligned pointer, or null"),
        ({"d_output": 0}, "d_output: expected a 16-byte aligned pointer, not null"),
        (
            {"d_query": 0, "d_key": 0, "d_value": 0, "d_log_gate": 0},
            "gradients: got null pointers alone, expected one that is wanted",
        ),
        (
            {"initial_state": 16, "initial_key_sum": 16, "d_initial_state": 16},
            "d_initial_state and d_initial_key_sum: expected both or neither",
        ),
        (
            {"forward_workspace": 256, "discards_workspace": 1},
            "forward_workspace: expected null where forward.discards_workspace",
        ),
    ],
    ids=str,
)
def test_can_implement_of_backward_names_the_argument(emulator, changes, message):
    arguments = packed_backward(head_dim=32, value_dim=32, **changes)
    assert launch._C.backward_can_implement(*arguments) == message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"chunk_size": 128, "tokens": 1000}, 128),
        ({"chunk_size": 128, "tokens": 128}, 128),
        ({"chunk_size": 640}, 128),  # the quadratic form: a tile that has all 100 tokens
        ({}, 128),
        ({"tokens": 2**20}, 512),
        ({"tokens": 2**20, "sequences": 2**14, "cu_seqlens": 4}, 512),
        ({"tokens": 1000, "chunk_size": 128, "whole_until": 999}, 128),
        ({"tokens": 1000, "chunk_size": 128, "whole_until": 1000}, 1024),
        ({"tokens": 3000, "whole_until": 3000}, 3008),
        ({"tokens": 2000, "whole_until": 1000}, 512),
        ({"tokens": 400, "whole_until": 1}, 448),  # no longer than the chunk that is chosen
        ({"head_dim": 128, "value_dim": 128, "tokens": 6000, "query_heads": 2}, 6016),
        ({"head_dim": 128, "value_dim": 128, "tokens": 6000, "query_heads": 8}, 1024),
        # Longer where an output alone is wanted, which all goes through wgmma.
        ({"tokens": 3000, "discards_workspace": 1}, 3008),
        ({"tokens": 3500, "discards_workspace": 1}, 512),
        ({"tokens": 3000, "discards_workspace": 1, "final_state": 16}, 512),
        ({"tokens": 3000, "discards_workspace": 1, "initial_state": 16}, 512),
        ({"tokens": 2000, "discards_workspace": 1, "value_dim": 32}, 512),
        ({"tokens": 0}, 0),
        ({"chunk_size": 65}, 0),
    ],
    ids=str,
)
def test_chunk_sizes(changes, expected):
    assert _C.forward_chunk_size(*packed(**changes)) == expected


def test_backward_chooses_its_chunks_whatever_forward_did():
    sizes = [
        _C.backward_workspace_size(*packed_backward(tokens=3000, discards_workspace=discards))
        for discards in (0, 1)
    ]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("dv", [32, 64, 128])
@pytest.mark.parametrize("tokens", [100, 4096, 2**20])
def test_the_chunk_that_is_chosen_is_taken(d, dv, tokens):
    """Given instead, it takes the same workspace, and others do not."""
    shape = {"head_dim": d, "value_dim": dv, "tokens": tokens}
    chosen = _C.forward_chunk_size(*packed(**shape))
    assert chosen % 64 == 0
    needed = _C.forward_workspace_size(*packed(**shape))
    assert _C.forward_workspace_size(*packed(**shape, chunk_size=chosen)) == needed
    if chosen < tokens:
        for other in (chosen - 64, 2 * chosen):
            assert _C.forward_workspace_size(*packed(**shape, chunk_size=other)) != needed


# ---- without a GPU: which calls, and what is passed on ------------------------------------------


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90", "compute_90"], "sm_90"),
        ((8, 6), ["sm_80", "sm_90", "compute_90"], "sm_80"),
        ((8, 9), ["sm_80", "sm_86"], "sm_86"),
        ((8, 9), ["sm_80", "compute_86"], "sm_80"),
        ((8, 0), ["sm_86", "compute_90"], None),
        ((10, 0), ["sm_80", "sm_90", "compute_90"], "compute_90"),
        ((12, 0), ["sm_80", "sm_90"], None),
        ((9, 0), ["sm_90a", "compute_80"], "sm_90a"),
        ((10, 0), ["sm_90a", "compute_90a"], None),
        ((10, 3), ["sm_100f"], "sm_100f"),
        ((12, 0), ["compute_100f"], None),
        ((7, 5), ["sm_80", "compute_80"], None),
        ((9, 0), [], None),
    ],
)
def test_code_for_a_device(capability, architectures, expected):
    assert coverage.code_for(capability, architectures) == expected


BUILD = {"kernels": ["forward_bf16_d64_dv64_p2"] * 12, "cuda_architectures": ["sm_80", "sm_90"]}


@pytest.mark.parametrize(
    ("kind", "build", "capability", "hip", "expected"),
    [
        ("cuda", BUILD, (9, 0), None, None),
        ("cpu", BUILD, (9, 0), None, "no kernels for cpu devices"),
        ("mps", BUILD, (9, 0), None, "no kernels for mps devices"),
        ("cuda", BUILD, (9, 0), "6.2", "no kernels for ROCm"),
        ("cuda", BUILD | {"kernels": []}, (9, 0), None, "this build has no compiled kernels"),
        ("cuda", BUILD, (7, 5), None, "no kernels for compute capability 7.5: expected 8.0 or"),
        ("cuda", BUILD, (10, 0), None, "compute capability 10.0: this build has sm_80, sm_90"),
    ],
)
def test_reasons_against_a_device(monkeypatch, kind, build, capability, hip, expected):
    monkeypatch.setattr(coverage, "_C", SimpleNamespace(build_info=lambda: build))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = coverage._reason_of_device.__wrapped__(kind, 0)
    assert reason is None if expected is None else expected in reason


def test_info_of_a_device_with_kernels(monkeypatch):
    from retention import installation

    monkeypatch.setattr(coverage, "device_reason", lambda kind, index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    assert installation._path("cuda", 0, BUILD) == {
        "path": "kernels",
        "reason": "12 configurations for sm_80, narrower heads padded to the next; "
        "other calls take the PyTorch path",
    }
    monkeypatch.setattr(coverage, "device_reason", lambda kind, index: "because")
    assert installation._path("cuda", 0, BUILD) == {"path": "pytorch", "reason": "because"}


def test_info_of_the_cpu():
    cpu = retention.info()["devices"][0]
    assert cpu["path"] == "pytorch"
    assert cpu["reason"] == "no kernels for cpu devices"


@pytest.fixture
def device(monkeypatch):
    """The CPU in place of a CUDA device that has every kernel: calls are recorded, not run."""
    calls, backward_calls = [], []
    dims = itertools.product(("bf16", "fp16"), (32, 64, 128), (32, 64, 128))
    names = [f"forward_{element}_d{d}_dv{dv}_p2" for element, d, dv in dims]
    binding = SimpleNamespace(
        build_info=lambda: {"kernels": names},
        forward_can_implement=lambda sizes, pointers: None,
        forward_workspace_size=_C.forward_workspace_size,
        forward_chunk_size=_C.forward_chunk_size,
        forward=lambda *arguments: calls.append(arguments),
        FORWARD_POINTERS=_C.FORWARD_POINTERS,
        BACKWARD_SIZES=_C.BACKWARD_SIZES,
        BACKWARD_POINTERS=_C.BACKWARD_POINTERS,
        backward_can_implement=lambda sizes, pointers: None,
        backward_workspace_size=_C.backward_workspace_size,
        backward=lambda *arguments: backward_calls.append(arguments),
    )
    use_kernels(monkeypatch, binding)
    monkeypatch.setattr(coverage, "DEVICE_TYPES", {"cpu", "meta"})
    monkeypatch.setattr(launch, "current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(launch, "current_stream", lambda device: 77)
    allocated = []

    def allocate(shape, strides, dtype):
        allocated.append(torch.empty_strided(shape, strides, dtype=dtype))
        return allocated[-1]

    monkeypatch.setattr(launch, "allocate", allocate)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return SimpleNamespace(
        calls=calls, backward_calls=backward_calls, binding=binding, allocated=allocated
    )


def lowered(case, dtype=torch.bfloat16, device="cpu", sequences=None):
    """Arguments of a call, rounded to what the dtype holds."""
    return {
        name: x
        if x is None
        else x.to(device=device, dtype=dtype if name in ("Q", "K", "V") else torch.float32)
        for name, x in make(case, sequences=sequences).items()
    }


def operands(
    inputs,
    cu_seqlens=None,
    deg=2,
    chunk=None,
    switch_over=None,
    final=False,
    save=False,
    keep=False,
):
    return (*inputs.values(), cu_seqlens, deg, chunk, switch_over, final, save, keep)


FULL = Case(t=100, d=64, dv=32, state=True)


@pytest.mark.parametrize(
    ("state", "options", "forward"),
    [
        (False, {}, 3008),
        (False, {"save": True}, 3008),
        (False, {"save": True, "keep": True}, 512),  # as backward
        (False, {"final": True}, 512),
        (True, {}, 512),
        (False, {"chunk": 100}, 128),
    ],
    ids=str,
)
def test_the_chunk_that_is_taken(device, state, options, forward):
    arguments = operands(lowered(Case(t=3000, b=1, d=64, dv=64, state=state)), **options)
    assert plans.chunk_taken(*forward_call(arguments)) == forward


def test_what_is_passed_to_the_kernels(device):
    inputs = lowered(FULL)
    out, norm, state, keys, residual, kept = operators._forward_cuda(
        *operands(inputs, chunk=65, final=True, save=True)
    )
    assert kept.shape == (0,)
    ((sizes, pointers, workspace, stream),) = device.calls
    assert dict(zip(_C.FORWARD_SIZES, sizes, strict=True)) == {
        "element": 0,
        "degree": 2,
        "head_dim": 64,
        "value_dim": 32,
        "sequences": 2,
        "tokens": 100,
        "heads": 2,
        "query_heads": 4,
        "query_batch": 25600,
        "query_token": 256,
        "query_head": 64,
        "key_batch": 12800,
        "key_token": 128,
        "key_head": 64,
        "value_batch": 6400,
        "value_token": 64,
        "value_head": 32,
        "log_gate_batch": 200,
        "log_gate_token": 2,
        "log_gate_head": 1,
        "chunk_size": 128,
        "whole_until": 0,
        "discards_workspace": 1,
    }
    assert dict(zip(_C.FORWARD_POINTERS, pointers, strict=True)) == {
        "query": inputs["Q"].data_ptr(),
        "key": inputs["K"].data_ptr(),
        "value": inputs["V"].data_ptr(),
        "log_gate": inputs["log_G"].data_ptr(),
        "cu_seqlens": 0,
        "initial_state": inputs["initial_state"].data_ptr(),
        "initial_key_sum": inputs["sum_of_keys"].data_ptr(),
        "output": out.data_ptr(),
        "output_residual": residual.data_ptr(),
        "normalizer": norm.data_ptr(),
        "final_state": state.data_ptr(),
        "final_key_sum": keys.data_ptr(),
    }
    assert workspace > 0
    assert stream == 77


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, 0), (torch.float16, 1)], ids=str)
def test_without_gate_states_and_workspace(device, dtype, element):
    case = Case(t=5, d=64, dv=64, gate=None)
    _, _, state, keys, _, _ = operators._forward_cuda(*operands(lowered(case, dtype)))
    ((sizes, pointers, workspace, _),) = device.calls
    assert sizes[0] == element
    null = ("log_gate", "cu_seqlens", "initial_state", "initial_key_sum", "final_state")
    named = dict(zip(_C.FORWARD_POINTERS, pointers, strict=True))
    assert [named[name] for name in (*null, "final_key_sum")] == [0] * 6
    assert (workspace == 0) is (dtype == torch.bfloat16)  # fp16 has its exponents there
    assert (state.numel(), keys.numel()) == (0, 0)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("gate", [None, -1.0])
@pytest.mark.parametrize("bounds", [None, [0, 30, 100]], ids=str)
def test_the_workspace_is_as_large_as_the_call_needs(device, final, state, gate, bounds):
    case = Case(t=100, b=1, d=64, dv=32, gate=gate, state=state)
    inputs = lowered(case, sequences=bounds and 2)
    cu_seqlens = bounds and torch.tensor(bounds, dtype=torch.int32)
    arguments = operands(inputs, cu_seqlens, chunk=64, switch_over=0, final=final)
    *_, kept = operators._forward_cuda(*arguments)
    ((sizes, pointers, workspace, _),) = device.calls
    assert kept.shape == (0,)
    (allocated,) = [x for x in device.allocated if x.data_ptr() == workspace]
    assert allocated.dtype == torch.uint8
    assert allocated.shape == (_C.forward_workspace_size(sizes, pointers),)


@pytest.mark.parametrize("options", [{}, {"save": True}, {"final": True}], ids=str)
def test_every_call_has_results_of_its_own(device, options):
    """Those that nobody wants as well: a caller may resize or write them."""
    inputs = lowered(FULL)
    first, second = (operators._forward_cuda(*operands(inputs, **options)) for _ in range(2))
    assert not any(x is y for x in first for y in second)
    memory = [{x.untyped_storage()._cdata for x in results} for results in (first, second)]
    assert len(memory[0]) == len(memory[1]) == 6
    assert not memory[0] & memory[1]


@pytest.mark.parametrize("save", [False, True])
def test_a_plan_knows_whether_there_are_kernels_for_backward(device, save):
    """It asks for what forward will have saved."""
    asked = []
    device.binding.backward_can_implement = lambda *x: asked.append(x) or "too small"
    arguments = operands(lowered(FULL), save=save)
    plan = plans.plan_forward(arguments)
    assert (plan.reason, plan.backward_reason) == (None, "too small" if save else None)
    for sizes, pointers in asked:
        assert _C.backward_can_implement(sizes, pointers) in (
            None,
            "this library was compiled without CUDA kernels",
        )
    assert len(asked) == save


def test_packed_sequences_are_counted_not_read(device):
    # Values that the PyTorch path would refuse: nobody looks at them here.
    cu_seqlens = torch.tensor([3, 900, -7, 2, 1, 0, 5, 6], dtype=torch.int32)[::2]
    inputs = lowered(Case(t=100, b=1, d=64, dv=32))
    _, _, state, keys, _, _ = operators._forward_cuda(*operands(inputs, cu_seqlens, final=True))
    ((sizes, pointers, *_),) = device.calls
    assert sizes[4] == 3
    assert state.shape == (3, 2, retention.state_dim(64), 32)
    assert keys.shape == state.shape[:3]
    assert pointers[4] not in (0, cu_seqlens.data_ptr())  # every other value: copied


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 100]])
@pytest.mark.parametrize("hq", [2, 4])
@pytest.mark.parametrize("gate", [None, -1.0])
@pytest.mark.parametrize(("d", "dv"), [(64, 32), (40, 12)])
def test_fakes_agree_with_what_is_allocated(device, save, final, bounds, hq, gate, d, dv):
    inputs = lowered(Case(t=100, b=1, hq=hq, d=d, dv=dv, gate=gate))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    real = operators._forward_cuda(*operands(inputs, cu_seqlens, final=final, save=save))
    meta = {name: x if x is None else x.to("meta") for name, x in inputs.items()}
    cu_seqlens = None if bounds is None else cu_seqlens.to("meta")
    fake = torch.ops.retention.forward(*operands(meta, cu_seqlens, final=final, save=save))
    for x, wanted in zip(fake, real, strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype, x.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def misaligned(x):
    """The values of x, two bytes from where a row may begin."""
    moved = x.new_empty(x.numel() + 8)[1 : x.numel() + 1].view(x.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(x)


# From [b, t, heads, width] to the same values, and whether they can be read as they lie.
LAYOUTS = {
    "contiguous": (lambda x: x, True),
    "heads first": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
    "rows apart": (lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]], True),
    "every other token": (lambda x: x.repeat_interleave(2, dim=1)[:, ::2], True),
    "odd rows": (lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[3]], False),
    "channels first": (lambda x: x.mT.contiguous().mT, False),
    "every other channel": (lambda x: x.repeat_interleave(2, dim=3)[..., ::2], False),
    "two bytes off": (misaligned, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Q", "K", "V"])
def test_operands_are_copied_only_where_they_must_be(device, name, layout):
    inputs = lowered(Case(t=100, d=64, dv=32))
    change, fits = LAYOUTS[layout]
    expected = inputs[name]
    inputs[name] = changed = change(expected)
    assert torch.equal(changed, expected)
    seen = []

    def forward(sizes, pointers, *rest):
        # While the call is made, the memory named holds the values.
        number = "QKV".index(name)
        strides = sizes[8 + 3 * number : 11 + 3 * number]
        seen.append((pointers[number] == changed.data_ptr(), strides, pointers[number] % 16))

    device.binding.forward = forward
    operators._forward_cuda(*operands(inputs))
    ((in_place, strides, remainder),) = seen
    assert in_place is fits
    assert remainder == 0
    assert strides == (changed if fits else expected).stride()[:3]


def test_strides_of_single_rows_do_not_matter(device):
    inputs = lowered(Case(t=100, b=1, hq=1, h=1, d=64, dv=64))
    for name in "QKV":
        inputs[name] = inputs[name].as_strided(inputs[name].shape, (7, 64, 3, 1))
    operators._forward_cuda(*operands(inputs))
    ((sizes, pointers, *_),) = device.calls
    assert sizes[8:17] == (0, 64, 0) * 3
    assert pointers[:3] == tuple(inputs[name].data_ptr() for name in "QKV")


def test_expanded_heads_are_read_in_place(device):
    inputs = lowered(Case(t=100, d=64, dv=64, h=1))
    inputs["K"] = inputs["K"].expand(2, 100, 4, 64)
    inputs["V"] = inputs["V"].expand(2, 100, 4, 64)
    inputs["log_G"] = inputs["log_G"].expand(2, 100, 4)
    operators._forward_cuda(*operands(inputs))
    ((sizes, pointers, *_),) = device.calls
    assert sizes[11:20] == (6400, 64, 0, 6400, 64, 0, 100, 1, 0)
    assert pointers[1] == inputs["K"].data_ptr()


def test_states_are_copied_only_where_they_must_be(device):
    inputs = lowered(FULL)
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    inputs["sum_of_keys"] = misaligned(inputs["sum_of_keys"])
    operators._forward_cuda(*operands(inputs))
    ((_, pointers, *_),) = device.calls
    assert pointers[5] not in (0, inputs["initial_state"].data_ptr())
    assert pointers[6] not in (0, inputs["sum_of_keys"].data_ptr())
    assert pointers[5] % 16 == pointers[6] % 16 == 0


@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        (Case(t=9, d=64, dv=64), torch.float32, "no kernel for fp32 inputs: expected bf16 or fp16"),
        (Case(t=9, d=64, dv=64), torch.float64, "no kernel for fp64 inputs: expected bf16 or fp16"),
        (Case(t=9, d=16, dv=16, deg=4), torch.bfloat16, "no kernel for degree 4: expected 2"),
        (Case(t=0, d=64, dv=64), torch.float16, "no tokens"),
        (Case(t=9, b=0, d=64, dv=64), torch.float16, "no tokens"),
        (
            Case(t=9, d=136, dv=64),
            torch.float16,
            "no kernel for fp16_d136_dv64_p2: expected degree",
        ),
        (Case(t=9, d=64, dv=129), torch.bfloat16, "no kernel for bf16_d64_dv129_p2: expected deg"),
    ],
    ids=str,
)
def test_reasons_against_a_call(device, caplog, case, dtype, expected):
    device.binding.forward_can_implement = _C.forward_can_implement
    inputs = {
        name: x if x is None or name in "QKV" else x.to(checks.state_dtype(dtype))
        for name, x in lowered(case, dtype).items()
    }
    arguments = operands(inputs, deg=case.deg, final=True)
    with caplog.at_level(logging.DEBUG, logger="retention"):
        results = operators._forward_cuda(*arguments)
    (line,) = caplog.messages
    assert f"PyTorch path ({expected}" in line
    assert not device.calls
    for x, wanted in zip(results, torch.ops.retention.forward(*arguments), strict=True):
        assert torch.equal(x, wanted)


WRONG = {
    "K": lambda i: i | {"K": i["K"][:, :50]},
    "V": lambda i: i | {"V": i["V"].float()},
    "Q": lambda i: i | {"Q": i["Q"][:, :, :3]},
    "log_G": lambda i: i | {"log_G": i["log_G"].bfloat16()},
    "initial_state": lambda i: i | {"initial_state": i["initial_state"][:1]},
    "sum_of_keys": lambda i: i | {"sum_of_keys": None},
    "cu_seqlens": lambda i: i | {"cu_seqlens": torch.tensor([0, 100])},
    "deg": lambda i: i | {"deg": 3},
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_never_reach_the_kernels(device, name):
    inputs = WRONG[name](lowered(FULL))
    cu_seqlens, deg = inputs.pop("cu_seqlens", None), inputs.pop("deg", 2)
    for _ in range(2):  # not the second time either
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            operators._forward_cuda(*operands(inputs, cu_seqlens, deg))
    assert not device.calls


def test_kernels_that_are_turned_off_are_not_called(device):
    arguments = operands(lowered(FULL))
    operators._forward_cuda(*arguments)
    with coverage.turned_off():
        assert plans.plan_forward(arguments).reason == "kernels are turned off"
        operators._forward_cuda(*arguments)
    assert len(device.calls) == 1
    operators._forward_cuda(*arguments)
    assert len(device.calls) == 2


def test_plans_are_kept_and_not_without_bound(device, monkeypatch):
    monkeypatch.setattr(plans, "_MOST_PLANS", 3)
    made = []
    make_plan = plans._make_plan
    monkeypatch.setattr(plans, "_make_plan", lambda *a: made.append(a) or make_plan(*a))
    for t in (1, 2, 3, 3, 2, 1, 4, 5):
        operators._forward_cuda(*operands(lowered(Case(t=t, d=64, dv=64))))
        assert len(plans._plans) <= 3
    assert len(made) == 5
    assert [sizes[5] for sizes, *_ in device.calls] == [1, 2, 3, 3, 2, 1, 4, 5]


EVERY = (True,) * 6  # gradient is wanted


def saved(inputs, *rest, wanted=EVERY, **options):
    """Operands of the operator backward, its gradients of the right shapes and of no meaning."""
    arguments = operands(inputs, *rest, save=True, **options)
    out, norm, state, keys, residual, kept = operators._forward_cuda(*arguments)
    final = (state, keys) if options.get("final") else (None, None)
    d_out = torch.zeros_like(out)
    results = (out, residual, kept, norm)
    return (d_out, *final, *arguments[:7], *results, *arguments[7:10], wanted)


def test_what_backward_passes_to_the_kernels(device):
    inputs = lowered(FULL)
    arguments = saved(inputs, chunk=65, final=True)
    d_out, d_state, d_keys = arguments[:3]
    out, residual, _, norm = arguments[10:14]
    gradients = operators._backward_cuda(*arguments)
    ((sizes, pointers, workspace, stream),) = device.backward_calls
    ((forward_sizes, *_),) = device.calls
    assert forward_sizes[-1] == 1  # whose workspace backward does not get
    assert sizes == (*forward_sizes[:-1], 0, *d_out.stride()[:3])
    addresses = [inputs[name].data_ptr() for name in ("Q", "K", "V", "log_G")]
    states = [inputs[name].data_ptr() for name in ("initial_state", "sum_of_keys")]
    results = [x.data_ptr() for x in (out, residual, norm)]
    own = [d_out, d_state, d_keys, *gradients]
    assert dict(zip(_C.BACKWARD_POINTERS, pointers, strict=True)) == dict(
        zip(
            BACKWARD_POINTERS,
            (*addresses, 0, *states, *results, 0, 0, 0, *(x.data_ptr() for x in own)),
            strict=True,
        )
    )
    for gradient, x in zip(gradients, inputs.values(), strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        assert gradient.is_contiguous()
    allocated = device.allocated[-1]
    assert (allocated.data_ptr(), allocated.dtype) == (workspace, torch.uint8)
    assert allocated.shape == (_C.backward_workspace_size(sizes, pointers),)
    assert stream == 77


def test_backward_without_gate_and_states(device):
    arguments = saved(lowered(Case(t=5, d=64, dv=64, gate=None)))
    *_, d_gate, d_state, d_keys = operators._backward_cuda(*arguments)
    assert [x.numel() for x in (d_gate, d_state, d_keys)] == [0, 0, 0]
    ((_, pointers, *_),) = device.backward_calls
    named = dict(zip(_C.BACKWARD_POINTERS, pointers, strict=True))
    given = {"query", "key", "value", "output", "output_residual", "normalizer", "d_output"}
    assert {name for name, x in named.items() if x} == given | {"d_query", "d_key", "d_value"}


@pytest.mark.parametrize("wanted", [*itertools.product((False, True), repeat=5)], ids=str)
def test_only_gradients_that_are_wanted_reach_the_kernels(device, wanted):
    inputs = lowered(FULL)
    wanted = (*wanted, wanted[-1])
    gradients = operators._backward_cuda(*saved(inputs, wanted=wanted))
    for gradient, x, want in zip(gradients, inputs.values(), wanted, strict=True):
        assert gradient.shape == (x.shape if want else (0,))
    assert len(device.backward_calls) == any(wanted)
    for sizes, pointers, workspace, _ in device.backward_calls:
        assert pointers[-6:] == tuple(x.data_ptr() for x in gradients)
        (allocated,) = [x for x in device.allocated if x.data_ptr() == workspace]
        assert allocated.shape == (_C.backward_workspace_size(sizes, pointers),)


@pytest.mark.parametrize("wanted", [(True,) * 5, (True,) * 7, (False,) * 5 + (True,)], ids=str)
def test_gradients_that_cannot_be_wanted(device, wanted):
    arguments = saved(lowered(FULL), wanted=wanted)
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    for call in (
        lambda: operators._backward_cuda(*arguments),
        lambda: torch.ops.retention.backward(*arguments),  # on a CPU, the PyTorch path
        lambda: torch.ops.retention.backward(*meta),
    ):
        with pytest.raises(ValueError, match=r"^wanted: expected a bool for each of Q, K, V"):
            call()
    assert not device.backward_calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["d_out", "Q"])
def test_backward_copies_only_what_it_must(device, name, layout):
    change, fits = LAYOUTS[layout]
    arguments = list(saved(lowered(Case(t=100, d=64, dv=32))))
    position = {"d_out": 0, "Q": 3}[name]
    arguments[position] = change(arguments[position])
    operators._backward_cuda(*arguments)
    ((sizes, pointers, *_),) = device.backward_calls
    number = {"d_out": _C.BACKWARD_POINTERS.index("d_output"), "Q": 0}[name]
    first = {"d_out": len(sizes) - 3, "Q": 8}[name]
    expected = arguments[position]
    assert (pointers[number] == expected.data_ptr()) is fits
    assert pointers[number] % 16 == 0
    wanted = expected if fits else expected.contiguous()
    assert sizes[first : first + 3] == wanted.stride()[:3]


@pytest.mark.parametrize("number", [0, 1, 2, 10, 11, 12, 13])
def test_results_of_other_calls_never_reach_the_kernels(device, number):
    arguments = list(saved(lowered(FULL), final=True))
    right = arguments[number]
    for wrong in (right[None], right[..., None, :], right.to(torch.float64), right.to("meta")):
        arguments[number] = wrong
        with pytest.raises((TypeError, ValueError), match=r"^\w+: expected .* got "):
            operators._backward_cuda(*arguments)
    assert not device.backward_calls


def test_kept_states_that_do_not_lie_as_they_did_are_copied(device):
    arguments = list(saved(lowered(FULL), chunk=64, keep=True))
    whole = arguments[12]
    arguments[12] = whole.repeat_interleave(2)[::2]
    operators._backward_cuda(*arguments)
    ((_, pointers, *_),) = device.backward_calls
    address = pointers[_C.BACKWARD_POINTERS.index("forward_workspace")]
    assert address not in (0, arguments[12].data_ptr(), whole.data_ptr())


def test_expanded_gradients_are_copied(device):
    arguments = list(saved(lowered(Case(t=100, d=64, dv=32))))
    arguments[0] = arguments[0].new_ones(()).expand(arguments[0].shape)  # that of a sum
    operators._backward_cuda(*arguments)
    ((sizes, *_),) = device.backward_calls
    assert sizes[-3:] == arguments[10].stride()[:3]


def test_packed_sequences_of_backward_are_copied_where_they_must_be(device):
    arguments = list(saved(lowered(Case(t=100, b=1, d=64, dv=32)), torch.tensor([0, 9, 100]).int()))
    arguments[9] = torch.tensor([0, -1, 9, -1, 100], dtype=torch.int32)[::2]
    seen = []
    device.binding.backward = lambda _, pointers, *rest: seen.append(at(pointers[4], arguments[9]))
    operators._backward_cuda(*arguments)
    assert [x.tolist() for x in seen] == [[0, 9, 100]]


def at(address, like, shape=None):
    """A copy of what lies there, contiguous, of the shape and the dtype of a tensor."""
    shape = like.shape if shape is None else shape
    memory = ctypes.string_at(address, math.prod(shape) * like.element_size())
    return torch.frombuffer(bytearray(memory), dtype=like.dtype).view(shape)


def padded(x, *widths):
    result = x.new_zeros((*x.shape[: -len(widths)], *widths))
    result[tuple(map(slice, x.shape))] = x
    return result


NARROW = {"d 40, dv 12": (40, 12, 64, 32), "d 64, dv 48": (64, 48, 64, 64), "d 8": (8, 32, 32, 32)}


@pytest.mark.parametrize(
    ("dtype", "d", "dv", "expected"),
    [
        (torch.bfloat16, 64, 64, (64, 64)),
        (torch.bfloat16, 8, 1, (32, 32)),
        (torch.float16, 40, 32, (64, 32)),
        (torch.float16, 32, 33, (32, 64)),
        (torch.bfloat16, 80, 48, (128, 64)),
        (torch.bfloat16, 128, 128, (128, 128)),
        (torch.bfloat16, 136, 64, None),
        (torch.bfloat16, 64, 129, None),
        (torch.float32, 64, 64, None),
    ],
    ids=str,
)
def test_the_next_kernels(device, dtype, d, dv, expected):
    assert coverage.kernel_dims(dtype, d, dv, 2) == expected
    assert coverage.kernel_dims(dtype, d, dv, 4) is None
    tensors = [torch.empty(1, 1, 1, n, dtype=dtype) for n in (d, dv)]
    assert coverage.cover(*tensors, 2) is (expected is not None)


def test_the_next_kernels_of_those_that_are_built(device):
    names = ["forward_bf16_d64_dv64_p2", "backward_bf16_d32_dv32_p2", "forward_bf16_d32_dv128_p2"]
    device.binding.build_info = lambda: {"kernels": names}
    assert coverage.kernel_dims(torch.bfloat16, 32, 32, 2) == (32, 128)
    assert coverage.kernel_dims(torch.bfloat16, 40, 32, 2) == (64, 64)
    assert coverage.kernel_dims(torch.bfloat16, 40, 65, 2) is None
    assert coverage.kernel_dims(torch.float16, 32, 32, 2) is None


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_heads_are_padded(device, caplog, name, layout):
    """With zeros, to those of the next kernels; results are as wide as the call."""
    d, dv, wide_d, wide_dv = NARROW[name]
    D, wide_D = retention.state_dim(d), retention.state_dim(wide_d)
    inputs = lowered(Case(t=20, d=d, dv=dv, state=True))
    change, _ = LAYOUTS[layout]
    inputs |= {n: change(inputs[n]) for n in "QKV"}
    state_shape = (2, 2, wide_D, wide_dv)
    shapes = {  # of what forward writes
        "output": ((2, 20, 4, wide_dv), torch.bfloat16),
        "output_residual": ((2, 20, 4, wide_dv), torch.bfloat16),
        "normalizer": ((2, 20, 4), torch.float32),
        "final_state": (state_shape, torch.float32),
        "final_key_sum": (state_shape[:3], torch.float32),
    }
    written = {n: torch.randn(shape).to(dtype) for n, (shape, dtype) in shapes.items()}
    widths = {"Q": (wide_d,), "K": (wide_d,), "V": (wide_dv,)}
    widths |= {"initial_state": state_shape[2:], "sum_of_keys": (wide_D,)}
    operand = {"Q": "query", "K": "key", "V": "value"}
    operand |= {"initial_state": "initial_state", "sum_of_keys": "initial_key_sum"}
    seen = []

    def forward(sizes, pointers, *rest):
        assert sizes[2:4] == (wide_d, wide_dv)
        named = dict(zip(_C.FORWARD_POINTERS, pointers, strict=True))
        for n, width in widths.items():
            x = padded(inputs[n], *width)
            if not (n in "QKV" and x.shape == inputs[n].shape):  # which is read as it lies
                assert torch.equal(at(named[operand[n]], x), x)
        for n, x in written.items():
            ctypes.memmove(named[n], x.data_ptr(), x.nbytes)
        seen.append(named)

    device.binding.forward = forward
    with caplog.at_level(logging.DEBUG, logger="retention"):
        out, norm, state, keys, residual, kept = operators._forward_cuda(
            *operands(inputs, final=True, save=True, keep=True, chunk=64, switch_over=0)
        )
    assert caplog.messages == [
        f"forward on cpu: kernels, padded to d {wide_d}, dv {wide_dv}; bfloat16, "
        f"Q [2, 20, 4, {d}], V [2, 20, 2, {dv}]"
    ]
    assert len(seen) == 1
    assert kept.numel() > state.numel()
    assert torch.equal(out, written["output"][..., :dv])
    assert torch.equal(residual, written["output_residual"][..., :dv])
    assert torch.equal(norm, written["normalizer"])
    assert torch.equal(state, written["final_state"][:, :, :D, :dv])
    assert torch.equal(keys, written["final_key_sum"][:, :, :D])
    assert all(x.is_contiguous() and x._base is None for x in (out, residual, state, keys))

    d_out, d_state, d_keys = (torch.randn_like(x) for x in (out, state, keys))
    given = {
        "d_output": (d_out, wide_dv),
        "output": (out, wide_dv),
        "output_residual": (residual, wide_dv),
        "d_final_state": (d_state, wide_D, wide_dv),
        "d_final_key_sum": (d_keys, wide_D),
    }
    results = [torch.randn(padded(inputs[n], *width).shape) for n, width in widths.items()]
    results = [x.to(inputs[n].dtype) for x, n in zip(results, widths, strict=True)]

    def backward(sizes, pointers, *rest):
        assert sizes[2:4] == (wide_d, wide_dv)
        named = dict(zip(_C.BACKWARD_POINTERS, pointers, strict=True))
        assert named["forward_workspace"] == kept.data_ptr()
        for n, (x, *width) in given.items():
            x = padded(x, *width)
            assert torch.equal(at(named[n], x), x)
        targets = ("d_query", "d_key", "d_value", "d_initial_state", "d_initial_key_sum")
        for n, x in zip(targets, results, strict=True):
            ctypes.memmove(named[n], x.data_ptr(), x.nbytes)
        seen.append(named)

    device.binding.backward = backward
    saved = (out, residual, kept, norm, 2, 64, 0)
    dQ, dK, dV, d_log_G, *d_initial = operators._backward_cuda(
        d_out, d_state, d_keys, *inputs.values(), None, *saved, EVERY
    )
    assert len(seen) == 2
    assert seen[1]["d_log_gate"] == d_log_G.data_ptr()
    for x, n, wide in zip((dQ, dK, dV, *d_initial), widths, results, strict=True):
        assert torch.equal(x, wide[tuple(map(slice, inputs[n].shape))])
        assert x.is_contiguous()


def test_nothing_is_narrowed_of_what_nobody_wants(device):
    inputs = lowered(Case(t=20, d=40, dv=12))
    results = operators._forward_cuda(*operands(inputs))
    assert [x.numel() for x in results[2:]] == [0] * 4
    assert results[0].shape == (2, 20, 4, 12)


def test_states_are_kept_where_asked_for(device):
    inputs = lowered(Case(t=500, d=64, dv=64, state=True))
    for keep in (False, True):
        operators._backward_cuda(*saved(inputs, chunk=64, switch_over=0, keep=keep))
    (first, second) = device.backward_calls
    number = _C.BACKWARD_POINTERS.index("forward_workspace")
    assert first[1][number] == 0
    assert second[1][number] == device.calls[1][2]  # the workspace of forward
    sizes = [_C.backward_workspace_size(*call[:2]) for call in (first, second)]
    states = 2 * 8 * 2 * retention.state_dim(64) * 64 * 2
    assert sizes[0] >= sizes[1] >= states  # without states, but with their gradients
    # What is no workspace of that call is not taken for one.
    arguments = list(saved(inputs, chunk=64, switch_over=0, keep=True))
    arguments[12] = arguments[12][:100]
    operators._backward_cuda(*arguments)
    assert device.backward_calls[-1][1][number] == 0


def test_the_memory_of_a_training_step(device):
    """Beside the inputs, in bytes: what is saved, and the larger of the two passes."""
    t, h, d = 65536, 8, 64
    shape = (1, t, h, d)
    width = t * h * d * 2
    inputs = {
        **{name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name in "QKV"},
        "log_G": torch.empty(shape[:3], device="meta"),
    }
    strides = [(x.stride()[:3]) for x in inputs.values()]
    sizes = (0, 2, d, d, 1, t, h, h, *(n for stride in strides for n in stride), 1024, 0, 0)
    forward = packed(**dict(zip(SIZES, sizes, strict=True)), output_residual=256)
    backward = packed_backward(
        **dict(zip(SIZES, sizes, strict=True)),
        **dict(zip(list(BACKWARD_SIZES)[-3:], strides[0], strict=True)),
    )
    saved_bytes = 2 * width + 4 * t * h  # output, residual, normaliser
    passes = (
        _C.forward_workspace_size(*forward),
        # the output's gradient, those of Q, K, V and the gates
        _C.backward_workspace_size(*backward) + 4 * width + 4 * t * h,
    )
    states = t // 1024 * h * retention.state_dim(d) * (d + 1) * 2
    assert passes[0] > states
    assert saved_bytes + max(passes) < 1.2e9


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 100]])
@pytest.mark.parametrize("wanted", [EVERY, (True, False) * 2 + (False,) * 2], ids=str)
@pytest.mark.parametrize(("d", "dv"), [(64, 32), (40, 12)])
def test_fakes_of_backward_agree(device, final, bounds, wanted, d, dv):
    inputs = lowered(Case(t=100, b=1, d=d, dv=dv, state=True), sequences=bounds and 3)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    arguments = saved(inputs, cu_seqlens, wanted=wanted, final=final)
    real = operators._backward_cuda(*arguments)
    meta = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments)
    for x, wanted in zip(torch.ops.retention.backward(*meta), real, strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype, x.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_backward_where_there_is_no_kernel(device, caplog):
    inputs = lowered(Case(t=40, d=136, dv=64))
    arguments = saved(inputs)
    device.binding.forward_can_implement = _C.forward_can_implement
    plans._plans.clear()
    with caplog.at_level(logging.DEBUG, logger="retention"):
        gradients = operators._backward_cuda(*arguments)
    assert caplog.messages == [
        "backward on cpu: PyTorch path (no kernel for bf16_d136_dv64_p2: expected degree 2, "
        "head_dim and value_dim of 32, 64 or 128, and bf16 or fp16); bfloat16, "
        "Q [2, 40, 4, 136], V [2, 40, 2, 64]"
    ]
    assert not device.backward_calls
    assert gradients[0].shape == (2, 40, 4, 136)


@pytest.mark.parametrize("name", ["Q", "K", "V", "log_G"])
def test_every_layout_has_a_plan_of_its_own(device, name):
    inputs = lowered(FULL)
    x = inputs[name]
    layouts = [
        x,
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat_interleave(2, dim=1)[:, ::2],
    ]
    for y in layouts * 2:
        operators._forward_cuda(*operands(inputs | {name: y}))
    first = 8 + 3 * list(inputs).index(name)
    strides = [sizes[first : first + 3] for sizes, *_ in device.calls]
    assert len(set(strides)) == 4
    assert strides == [y.stride()[:3] for y in layouts * 2]


def test_every_option_has_a_plan_of_its_own(device):
    inputs = lowered(Case(t=1000, d=64, dv=64))
    for chunk in (64, 128):
        for switch_over in (0, 1000):
            for final in (False, True):
                operators._forward_cuda(*operands(inputs, None, 2, chunk, switch_over, final))
    taken = [sizes[-3:-1] for sizes, *_ in device.calls]
    assert taken[::2] == taken[1::2] == [(64, 1), (64, 1000), (128, 1), (128, 1000)]
    assert [pointers[10] != 0 for _, pointers, *_ in device.calls] == [False, True] * 4


@pytest.fixture
def at_once(device, monkeypatch):
    """As on a CUDA device, the kernels come right after autograd."""
    keys = [
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, k)) for k in ("AutogradCPU", "CPU")
    ]
    monkeypatch.setattr(torch_private, "_CUDA_IS_NEXT", (keys[0] | keys[1]).raw_repr())
    return device


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", [None, "Q", "K", "V", "log_G", "initial_state", "sum_of_keys"])
def test_the_kernels_come_right_after_autograd(at_once, monkeypatch, name, grad_mode):
    monkeypatch.setattr(operators, "_forward_overload", None)  # what any other way would ask
    inputs = lowered(FULL)
    if name is not None:
        inputs[name].requires_grad_()
    with grad_mode():
        results = torch.ops.retention.forward(*operands(inputs, final=True))
    ((_, pointers, *_),) = at_once.calls
    assert pointers[:3] == tuple(inputs[n].data_ptr() for n in "QKV")
    out, norm, state, keys, residual, kept = results
    assert pointers[7:] == tuple(x.data_ptr() for x in (out, residual, norm, state, keys))
    recorded = name is not None and grad_mode is torch.enable_grad
    assert residual.shape == (out.shape if recorded else (0, 0, 0, 0))
    assert kept.shape == (0,)
    assert [x.requires_grad for x in (out, state, keys)] == [recorded] * 3
    assert not norm.requires_grad


def test_modes_and_subclasses_come_before_the_kernels(at_once):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs = lowered(FULL)
    arguments = operands(inputs)
    with Mode():
        torch.ops.retention.forward(*arguments)
    assert torch.ops.retention.forward.default in seen
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        out, *_ = torch.ops.retention.forward(*fakes)
    assert isinstance(out, FakeTensor)
    negated = inputs | {"Q": torch._neg_view(inputs["Q"])}  # what lies in memory is not the values
    torch.ops.retention.forward(*operands(negated))
    assert not at_once.calls  # on a CPU, the next kernel is the other one


def test_the_log_says_which_path_was_taken(device, caplog):
    arguments = operands(lowered(Case(t=9, d=64, dv=32)))
    operators._forward_cuda(*arguments)
    assert not caplog.messages  # the level is not DEBUG
    with caplog.at_level(logging.DEBUG, logger="retention"):
        operators._forward_cuda(*arguments)
    assert caplog.messages == [
        "forward on cpu: kernels; bfloat16, Q [2, 9, 4, 64], V [2, 9, 2, 32]"
    ]


def test_the_log_on_a_cpu(caplog):
    inputs = lowered(Case(t=9))
    retention.power_retention(**inputs)
    assert not caplog.messages
    with caplog.at_level(logging.DEBUG, logger="retention"):
        retention.power_retention(**inputs)
    assert caplog.messages == [
        "forward on cpu: PyTorch path (no kernels for cpu devices); "
        "bfloat16, Q [2, 9, 4, 16], V [2, 9, 2, 12]"
    ]


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def paths(caplog):
    """The path that each call since the last question took, as the log tells it."""
    caplog.set_level(logging.DEBUG, logger="retention")

    def asked():
        lines = [m for m in caplog.messages if m.startswith("forward on")]
        caplog.clear()
        return [line.split(": ", 1)[1].split(";")[0] for line in lines]

    return asked


def doubled(inputs):
    return {name: x if x is None else x.double() for name, x in inputs.items()}


def distance(actual, expected):
    """Relative, of the whole: a single row may owe more to the cancellation of a state's terms."""
    difference = actual.double() - expected
    assert difference.isfinite().all(), "not finite"
    return (difference.norm() / expected.norm().clamp(min=1e-300)).item()


def plain_formula(Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens=None):
    """The definition, every result in the inputs' dtype; what is read of a state as well."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            tokens = [None if x is None else x[:, start:stop] for x in (Q, K, V, log_G)]
            states = [None if x is None else x[n : n + 1] for x in (initial_state, sum_of_keys)]
            parts.append(plain_formula(*tokens, *states))
        return torch.cat(parts, 1)
    t, h, dtype = Q.shape[1], K.shape[2], Q.dtype
    q = Q.unflatten(2, (h, -1)).permute(0, 2, 3, 1, 4)  # [b, h, r, t, d]
    k, v = (x.permute(0, 2, 1, 3)[:, :, None] for x in (K, V))
    scale = Q.shape[3] ** -0.5
    L = torch.zeros(K.shape[:3], device=Q.device) if log_G is None else log_G
    L = L.cumsum(1).permute(0, 2, 1)[:, :, None]  # [b, h, 1, t]
    future = torch.ones(t, t, dtype=torch.bool, device=Q.device).triu(1)
    decay = (L[..., :, None] - L[..., None, :]).masked_fill(future, -torch.inf).exp()
    w = (q @ k.mT * scale) ** 2 * decay.to(dtype)
    out, z = w @ v, w.sum(-1, keepdim=True)
    if initial_state is not None:
        phi = retention.expand(q, 2, "query") * (scale**2 * L.exp()).to(dtype)[..., None]
        out = out + phi @ initial_state[:, :, None].to(dtype)
        z = z + phi @ sum_of_keys[:, :, None, :, None].to(dtype)
    out = torch.where(z > 0, out / z, 0)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def check(inputs, paths, cu_seqlens=None, plain_inputs=None, path="kernels", **options):
    """Output and final state against float64: at most twice the error of the plain formula in the
    same dtype, and one rounding."""
    out, state, keys = retention.power_retention(
        **inputs, return_final_state=True, cu_seqlens=cu_seqlens, **options
    )
    assert paths() == [path]
    assert (out.dtype, state.dtype, keys.dtype) == (inputs["Q"].dtype, *[torch.float32] * 2)
    exact = retention.reference(**doubled(inputs), return_final_state=True, cu_seqlens=cu_seqlens)
    plain = plain_formula(**(plain_inputs or inputs), cu_seqlens=cu_seqlens)
    rounding = torch.finfo(out.dtype).eps / 2
    assert distance(out, exact[0]) <= 2 * distance(plain, exact[0]) + rounding
    # Roundings do not point anywhere; a factor of 1.005 on everything would be within the above.
    bias = ((out.double() - exact[0]) * exact[0]).sum() / exact[0].square().sum().clamp(min=1e-300)
    assert abs(bias) <= rounding / 2
    # phi enters the tensor cores in the inputs' dtype, a product of two rounded factors; the sums
    # are float32.
    assert distance(state, exact[1]) <= 2 * rounding
    assert distance(keys, exact[2]) <= 2 * rounding
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 63, 64, 65, 500, 3000])
@pytest.mark.parametrize(("dtype", "d", "dv"), configurations(), ids=str)
def test_every_configuration(paths, dtype, d, dv, t):
    inputs = lowered(Case(t=t, d=d, dv=dv, gate=-0.05, zero_rows=True), dtype, "cuda")
    check(inputs, paths)
    check(inputs, paths, chunk_size=128, switch_over_seq_len=0)


def check_narrow(dtype, device, d, dv, bounds, form, layout, paths, path):
    case = Case(t=130, b=1, d=d, dv=dv, gate=-0.05, state=form is not None)
    inputs = lowered(case, dtype, device, sequences=bounds and len(bounds) - 1)
    inputs |= {n: LAYOUTS[layout][0](inputs[n]) for n in "QKV"}
    cu_seqlens = bounds and torch.tensor(bounds, dtype=torch.int32, device=device)
    chunk, switch_over = form or (None, None)
    options = {"chunk_size": chunk, "switch_over_seq_len": switch_over, "path": path}
    out = check(inputs, paths, cu_seqlens, **options)
    assert out.is_contiguous()


NARROW_CALLS = [
    (None, None, "contiguous"),
    (None, (64, 0), "heads first"),
    ([0, 0, 65, 65, 130], (64, 0), "odd rows"),
    ([0, 70, 130], (None, None), "channels first"),
]


@pytest.mark.parametrize(("bounds", "form", "layout"), NARROW_CALLS, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(8, 1), (16, 12), (24, 32), (32, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_narrow_heads_on_the_emulator(emulator, paths, dtype, d, dv, bounds, form, layout):
    path = "kernels, padded to d 32, dv 32"
    check_narrow(dtype, "cpu", d, dv, bounds, form, layout, paths, path)


@pytest.mark.gpu
@pytest.mark.parametrize(("bounds", "form", "layout"), NARROW_CALLS, ids=str)
@pytest.mark.parametrize(
    ("d", "dv"),
    [(8, 1), (40, 40), (64, 48), (80, 64), (80, 48), (96, 96), (96, 20), (120, 128), (128, 100)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_narrow_heads(paths, dtype, d, dv, bounds, form, layout):
    wide = coverage.kernel_dims(dtype, d, dv, 2)
    path = "kernels, padded to d {}, dv {}".format(*wide)
    check_narrow(dtype, "cuda", d, dv, bounds, form, layout, paths, path)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [(None, None), (64, 0), (100, 0), (256, None), (None, 10**6)])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("gate", [None, 0.0, -0.05, -60.0])
@pytest.mark.parametrize("t", [1, 2, 64, 129, 1000, 2049])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_gates_states_and_forms(paths, dtype, t, gate, state, form):
    inputs = lowered(Case(t=t, d=64, dv=64, gate=gate, state=state), dtype, "cuda")
    check(inputs, paths, chunk_size=form[0], switch_over_seq_len=form[1])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (5, 5), (12, 4), (64, 1)], ids=str)
@pytest.mark.parametrize("form", [(None, None), (64, 0)])
def test_grouped_heads(paths, heads, form):
    hq, h = heads
    case = Case(t=300, hq=hq, h=h, d=64, dv=64, state=True, zero_rows=True)
    inputs = lowered(case, torch.bfloat16, "cuda")
    check(inputs, paths, chunk_size=form[0], switch_over_seq_len=form[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 300],
        [0, 0, 1, 65, 65, 300],
        [0, 64, 128, 192, 1000, 1000],
        [0, 1, 2, 3, 4, 2000],
        [0, 0, 7],
    ],
    ids=str,
)
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("gate", [None, -0.05])
@pytest.mark.parametrize("form", [(None, None), (64, 0), (128, 10**6)])
def test_packed_sequences(paths, bounds, state, gate, form):
    case = Case(t=bounds[-1], b=1, d=64, dv=64, gate=gate, state=state)
    inputs = lowered(case, torch.bfloat16, "cuda", sequences=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = {"chunk_size": form[0], "switch_over_seq_len": form[1]}
    check(inputs, paths, cu_seqlens, **options)
    # A sequence of length 0 hands its state through, bit for bit.
    _, states, keys = retention.power_retention(
        **inputs, return_final_state=True, cu_seqlens=cu_seqlens, **options
    )
    for n in range(len(bounds) - 1):
        if bounds[n] == bounds[n + 1]:
            for x, name in ((states[n], "initial_state"), (keys[n], "sum_of_keys")):
                assert torch.equal(x, inputs[name][n] if state else torch.zeros_like(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("form", [(None, None), (64, 0), (128, 10**6)])
def test_tokens_of_no_sequence_are_nobodys(paths, dtype, form):
    """Their results and gradients are 0, and what lies in them changes no bit of others."""
    case = Case(t=6000, b=1, hq=4, h=2, d=64, dv=64)
    bounds = [0, 1, 1, 4000, 5000, 5000]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")

    def step(fill):
        inputs = {
            name: x if x is None else x.index_fill(1, tail, fill).requires_grad_()
            for name, x in lowered(case, dtype, "cuda").items()
        }
        leaves = [x for x in inputs.values() if x is not None]
        out = retention.power_retention(
            **inputs, chunk_size=form[0], switch_over_seq_len=form[1], cu_seqlens=cu_seqlens
        )
        d_out = lowered(case, dtype, "cuda")["Q"].index_fill(1, tail, fill)
        return out, *torch.autograd.grad(out, leaves, d_out)

    tail = torch.arange(bounds[-1], case.t, device="cuda")
    for x, wanted in zip(step(math.nan), step(0.0), strict=True):
        assert torch.equal(x, wanted)
        assert x[:, : bounds[-1]].any()
        assert not x[:, bounds[-1] :].any()
    step(math.inf)
    assert paths() == ["kernels"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_packed_sequences_choose_their_form_one_by_one(paths, state):
    lengths = [0, 2304, 0, 3000, 1, 2305, 0, *[1] * 700, *[0] * 300, 64, 65]
    bounds = list(itertools.accumulate(lengths, initial=0))
    case = Case(t=bounds[-1], b=1, d=64, dv=64, state=state)
    inputs = lowered(case, torch.bfloat16, "cuda", sequences=len(lengths))
    check(inputs, paths, torch.tensor(bounds, dtype=torch.int32, device="cuda"))


@pytest.mark.gpu
def test_empty_sequences_are_nearly_free():
    case = Case(t=65536, b=1, hq=8, h=8, d=64, dv=64)
    inputs = lowered(case, torch.bfloat16, "cuda")
    tensors = [inputs[name] for name in ("Q", "K", "V", "log_G")]

    def graphs(bounds):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        options = (None, None, cu_seqlens, 2, None, None)

        def forward():
            return torch.ops.retention.forward(*tensors, *options, False, True, False)

        def both():
            out, norm, _, _, residual, kept = forward()
            torch.ops.retention.backward(
                *(out, None, None, *tensors, *options[:3]),
                *(out, residual, kept, norm, *options[3:], [True] * 6),
            )

        for step in (forward, both):
            step()  # loads the kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            yield graph

    def milliseconds(graph, replays=10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays

    bounds = [0, 40000, case.t]
    alone = list(graphs(bounds))
    among = list(graphs(bounds + [case.t] * 4096))
    best = [[math.inf, math.inf] for _ in alone]
    for _ in range(10):  # in turns: the clock of a device changes
        for pair, times in zip(zip(alone, among, strict=True), best, strict=True):
            for i, graph in enumerate(pair):
                times[i] = min(times[i], milliseconds(graph))
    for name, (without, with_empty) in zip(("forward", "forward and backward"), best, strict=True):
        print(f"\n{name}: {without:.3f} ms, {with_empty:.3f} ms beside 4,096 empty sequences")
    for without, with_empty in best:
        assert with_empty <= 1.1 * without


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [(None, None), (64, 0)])
def test_layouts_change_no_bit(paths, layout, form):
    inputs = lowered(Case(t=300, d=64, dv=64, state=True), torch.bfloat16, "cuda")
    options = {"chunk_size": form[0], "switch_over_seq_len": form[1], "return_final_state": True}
    expected = retention.power_retention(**inputs, **options)
    change, _ = LAYOUTS[layout]
    changed = inputs | {name: change(inputs[name]) for name in "QKV"}
    changed["log_G"] = inputs["log_G"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    changed["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    for x, wanted in zip(retention.power_retention(**changed, **options), expected, strict=True):
        assert torch.equal(x, wanted)
    assert paths() == ["kernels"] * 2


@pytest.mark.gpu
def test_expanded_keys_and_values(paths):
    case = Case(t=300, b=2, hq=4, h=1, d=64, dv=64)
    inputs = lowered(case, torch.bfloat16, "cuda")
    for name in ("K", "V"):
        inputs[name] = inputs[name][:1].expand(2, 300, 4, 64)
    inputs["log_G"] = inputs["log_G"][:1].expand(2, 300, 4)
    check(inputs, paths, chunk_size=64)


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [100.0, 30000.0])
@pytest.mark.parametrize("gate", [None, -0.01])
@pytest.mark.parametrize("form", [(None, None), (128, 0)])
def test_large_keys_in_fp16(paths, largest, gate, form):
    inputs = lowered(Case(t=3000, b=1, d=64, dv=64, gate=gate), torch.float16, "cuda")
    inputs["K"] = (inputs["K"] / inputs["K"].abs().max() * largest).half()
    # The plain formula overflows. Keys smaller by a power of two have the same output.
    small = inputs | {"K": inputs["K"] * 2.0 ** -math.ceil(math.log2(largest))}
    check(
        inputs,
        paths,
        plain_inputs=small,
        chunk_size=form[0],
        switch_over_seq_len=form[1],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", [(None, None), (64, 0)])
def test_every_run_gives_the_same_bits(paths, form):
    inputs = lowered(Case(t=2000, d=64, dv=64, state=True), torch.bfloat16, "cuda")
    options = {"chunk_size": form[0], "switch_over_seq_len": form[1], "return_final_state": True}
    expected = retention.power_retention(**inputs, **options)
    for _ in range(20):
        # Memory that the next call is given holds something else.
        torch.empty(2**24, device="cuda").fill_(float("nan"))
        for x, wanted in zip(retention.power_retention(**inputs, **options), expected, strict=True):
            assert torch.equal(x, wanted)
    assert set(paths()) == {"kernels"}


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 700]], ids=str)
def test_a_cuda_graph_is_replayed(paths, bounds):
    case = Case(t=700, b=1, d=64, dv=64, state=True)
    sequences = None if bounds is None else len(bounds) - 1
    inputs = lowered(case, torch.bfloat16, "cuda", sequences)
    others = {name: x.flip(0).roll(1, 1) * 2 for name, x in inputs.items()}
    options = {"chunk_size": 128, "switch_over_seq_len": 0, "return_final_state": True}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    expected = retention.power_retention(**others, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        retention.power_retention(**inputs, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = retention.power_retention(**inputs, **options)
    for name, x in inputs.items():
        x.copy_(others[name])
    for _ in range(2):
        graph.replay()
        for x, wanted in zip(results, expected, strict=True):
            assert torch.equal(x, wanted)
    assert paths() == ["kernels"] * 3


@pytest.mark.gpu
def test_the_current_stream_is_used(paths):
    inputs = lowered(Case(t=500, d=64, dv=64), torch.bfloat16, "cuda")
    expected = retention.power_retention(**inputs)
    late = {name: x if x is None else torch.zeros_like(x) for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream, the kernels would read the zeros
        for name, x in late.items():
            if x is not None:
                x.copy_(inputs[name])
        out = retention.power_retention(**late)
    stream.synchronize()
    assert torch.equal(out, expected)
    assert paths() == ["kernels"] * 2


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one(paths):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    inputs = lowered(Case(t=500, d=64, dv=64), torch.bfloat16, "cuda:0")
    expected = retention.power_retention(**inputs)
    elsewhere = {name: x if x is None else x.to("cuda:1") for name, x in inputs.items()}
    out = retention.power_retention(**elsewhere)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(out.to("cuda:0"), expected)
    assert paths() == ["kernels"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(paths, final, gradients):
    inputs = {
        name: x.requires_grad_(gradients)
        for name, x in lowered(Case(t=70, d=32, dv=32, state=True), device="cuda").items()
    }
    torch.library.opcheck(torch.ops.retention.forward, operands(inputs, None, 2, 64, 0, final))
    assert set(paths()) == {"kernels"}


def training_step(inputs, **options):
    """The gradients of Q, K, V and the gates, for random gradients of the output."""
    leaves = [inputs[name].detach().requires_grad_() for name in ("Q", "K", "V", "log_G")]
    out = retention.power_retention(*leaves, **options)
    d_out = torch.randn(
        out.shape, generator=torch.Generator(out.device).manual_seed(0), device=out.device
    )
    return torch.autograd.grad(out, leaves, d_out.to(out.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_kept_states_change_no_bit(paths, dtype):
    inputs = lowered(Case(t=1000, b=2, d=64, dv=64), dtype, "cuda")
    expected = training_step(inputs, chunk_size=128)
    kept = training_step(inputs, chunk_size=128, keep_states=True)
    for x, wanted in zip(kept, expected, strict=True):
        assert torch.equal(x, wanted)
    assert paths() == ["kernels"] * 2


@pytest.mark.gpu
def test_the_memory_of_a_training_step_on_a_device(paths):
    case = Case(t=65536, b=1, hq=8, h=8, d=64, dv=64)
    inputs = lowered(case, torch.bfloat16, "cuda")
    training_step(inputs, chunk_size=1024)  # the first one compiles and loads what it needs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training_step(inputs, chunk_size=1024)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"\nmemory of forward and backward: {peak / 1e9:.3f} GB beside the inputs")
    assert peak < 1.2e9
    assert paths() == ["kernels"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 700]], ids=str)
def test_a_graph_of_a_training_step(bounds):
    inputs = lowered(Case(t=700, b=1, d=64, dv=64), torch.bfloat16, "cuda")
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = (None, None, cu_seqlens, 2, 64, 0)
    tensors = [inputs[name] for name in ("Q", "K", "V", "log_G")]

    def step():
        results = torch.ops.retention.forward(*tensors, *options, False, True, False)
        out, norm, _, _, residual, kept = results
        return out, torch.ops.retention.backward(
            *(out, None, None, *tensors, *options[:3]),
            *(out, residual, kept, norm, *options[3:], EVERY),
        )

    _, expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, gradients = step()
    for x in gradients:
        x.fill_(torch.nan)
    graph.replay()
    for x, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.gpu
def test_compile_fullgraph(paths):
    inputs = lowered(Case(t=300, d=64, dv=64, state=True), torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in inputs.values()]

    def step(inputs):
        out, state, keys = retention.power_retention(
            **inputs, chunk_size=64, return_final_state=True
        )
        return out.float().square().sum() + state.sum() + keys.sum()

    expected = torch.autograd.grad(step(inputs), leaves)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for x, wanted in zip(torch.autograd.grad(compiled(inputs), leaves), expected, strict=True):
        assert torch.equal(x, wanted)
    assert paths() == ["kernels"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [None, -0.05])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_gradients_with_the_kernels_normaliser(paths, dtype, gate):
    case = Case(t=300, b=1, d=64, dv=64, gate=gate, chunk=64, zero_rows=True)
    inputs = lowered(case, dtype, "cuda")
    exact = run(retention.reference, inputs, case, torch.float64, states_in_sum=False)
    plain = run(retention.reference, inputs, case, dtype, states_in_sum=False)
    actual = run(retention.power_retention, inputs, case, dtype, states_in_sum=False)
    assert paths() == ["kernels"]
    for name in [name for name in exact if name.startswith("d_")]:
        rounding = torch.finfo(dtype).eps
        if name == "d_log_G":
            # A sum of k . dk over the sequence, each with its own rounding: a random walk.
            rounding *= math.sqrt(case.t)
        bound = 2 * distance(plain[name], exact[name]) + rounding
        assert distance(actual[name], exact[name]) <= bound, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        (Case(t=70, d=64, dv=64), torch.float32, "no kernel for fp32 inputs"),
        (Case(t=70, d=136, dv=64), torch.bfloat16, "no kernel for bf16_d136_dv64_p2"),
        (Case(t=70, d=64, dv=129), torch.float16, "no kernel for fp16_d64_dv129_p2"),
        (Case(t=70, d=32, dv=32, deg=4), torch.bfloat16, "no kernel for degree 4"),
        (Case(t=0, d=64, dv=64), torch.bfloat16, "no tokens"),
    ],
    ids=str,
)
def test_other_calls_take_the_pytorch_path(paths, case, dtype, expected):
    inputs = lowered(case, dtype, "cuda")
    out = retention.power_retention(**inputs, deg=case.deg)
    (path,) = paths()
    assert path.startswith(f"PyTorch path ({expected}")
    wanted = retention.reference(**doubled(inputs), deg=case.deg)
    assert error(out.double(), wanted) <= 2 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # says that it is a prototype
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 700]], ids=str)
def test_nothing_waits_for_the_device(paths, bounds):
    case = Case(t=700, b=1, d=64, dv=64, state=True)
    sequences = None if bounds is None else len(bounds) - 1
    inputs = lowered(case, torch.bfloat16, "cuda", sequences)
    inputs["K"] = inputs["K"].mT.contiguous().mT  # copies do not wait either
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")

    def calls():
        for chunk in (None, 64):
            retention.power_retention(
                **inputs, chunk_size=chunk, cu_seqlens=cu_seqlens, return_final_state=True
            )

    calls()  # the first ones take memory from the driver
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # of what PyTorch does
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        calls()
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert paths() == ["kernels"] * 4


@pytest.mark.gpu
def test_the_host_is_done_in_time(monkeypatch):
    """The operator's own cost, up to the call that launches."""
    inputs = lowered(Case(t=64, b=1, hq=8, h=2, d=64, dv=64), torch.bfloat16, "cuda")
    constants = short_arguments(Operands(**inputs), operands(inputs)[7:])  # as callers have them
    leaves = tuple(x.clone().requires_grad_() for x in constants)
    forward = torch.ops.retention.forward

    def microseconds(arguments, calls=100, rounds=100):
        best = math.inf
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                forward(*arguments)
            best = min(best, (time.perf_counter() - start) / calls * 1e6)
        return best

    whole, whole_recorded = microseconds(constants), microseconds(leaves)
    binding = SimpleNamespace(forward=lambda sizes, pointers, workspace, stream: None)
    monkeypatch.setattr(launch, "_C", binding)
    before, recorded = microseconds(constants), microseconds(leaves)
    print(
        f"\nhost: {whole:.1f} us a call, {before:.1f} us before the launch; "
        f"{whole_recorded:.1f} us and {recorded:.1f} us where gradients are wanted"
    )
    assert before < 15


@pytest.mark.gpu
def test_nothing_is_between_autograd_and_the_kernels(paths, monkeypatch):
    monkeypatch.setattr(operators, "_forward_overload", None)  # what any other way would ask
    inputs = lowered(Case(t=64, d=64, dv=64), torch.bfloat16, "cuda")
    retention.power_retention(**inputs)
    with torch.no_grad():
        retention.power_retention(**inputs)
    with torch.autocast("cuda", torch.bfloat16):
        retention.power_retention(**inputs)
    inputs["Q"].requires_grad_()
    assert retention.power_retention(**inputs).requires_grad
    assert paths() == ["kernels"] * 4
