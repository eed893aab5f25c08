"""Gradients of power retention: one grid for every device, path and dtype.

What is expected is float64 autograd through the definition, written out here.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import retention
from cases import INPUTS, RESETS, Case, make

gpu = pytest.mark.gpu

WIDE, NARROW = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)

# (device, path, dtype). The emulator runs the kernels on the CPU.
ROWS = [
    *(pytest.param("cpu", "PyTorch path", dtype) for dtype in WIDE + NARROW),
    *(pytest.param("cpu", "emulator", dtype) for dtype in NARROW),
    *(pytest.param("cuda", "PyTorch path", dtype, marks=gpu) for dtype in WIDE),
    *(pytest.param("cuda", "kernels", dtype, marks=gpu) for dtype in NARROW),
]
KERNEL_ROWS = [row for row in ROWS if "kernels" in row.values]
PYTORCH_ROWS = [row for row in ROWS if "PyTorch path" in row.values]


# ---- the definition -----------------------------------------------------------------------------


def pairs(x: Tensor, key: bool) -> Tensor:
    """phi of the last dimension by its rows' indices: block pairs I <= J of 8, J slowest."""
    rows = [
        (8 * I + a, 8 * J + b, 2 if key and I < J else 1)
        for J in range(x.shape[-1] // 8)
        for I in range(J + 1)
        for a, b in itertools.product(range(8), range(8))
    ]
    first, second, multiplicity = torch.tensor(rows, device=x.device).T
    return x[..., first] * x[..., second] * multiplicity.to(x.dtype)


def formula(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final state, every product in the inputs' dtype, for autograd to differentiate."""
    if bounds is not None:
        parts = []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            tokens = [None if x is None else x[:, start:stop] for x in (Q, K, V, log_G)]
            states = [None if x is None else x[n : n + 1] for x in (initial_state, sum_of_keys)]
            parts.append(formula(*tokens, *states))
        outs, states, sums = zip(*parts, strict=True)
        nobodys = V.new_zeros(1, Q.shape[1] - bounds[-1], Q.shape[2], V.shape[3])
        return torch.cat((*outs, nobodys), 1), torch.cat(states), torch.cat(sums)

    t, h, dtype = Q.shape[1], K.shape[2], Q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = Q.unflatten(2, (h, -1)).permute(0, 2, 3, 1, 4)  # [b, h, r, t, d]
    k, v = K.transpose(1, 2), V.transpose(1, 2)  # [b, h, t, d], [b, h, t, dv]
    scale = Q.shape[3] ** -0.5
    g = K.new_zeros(K.shape[:3], dtype=wide) if log_G is None else log_G
    g = g.transpose(1, 2)  # [b, h, t]
    L = g.cumsum(-1)
    # The sum of the gates of j + 1 to i, term by term: a difference of sums is another number where
    # gates are huge.
    until = torch.ones(t, t, dtype=torch.bool, device=Q.device).tril()
    between = g[..., None, :].masked_fill(until, 0).cumsum(-1).mT  # [b, h, i, j]
    decay = between.masked_fill(~until, -torch.inf).exp()
    w = (q @ k[:, :, None].mT * scale) ** 2 * decay[:, :, None].to(dtype)
    n, z = w @ v[:, :, None], w.sum(-1, keepdim=True)
    if initial_state is not None:
        phi = pairs(q, key=False) * (scale**2 * L.exp()).to(dtype)[:, :, None, :, None]
        n = n + phi @ initial_state[:, :, None].to(dtype)
        z = z + phi @ sum_of_keys[:, :, None, :, None].to(dtype)
    out = torch.where(z > 0, n / torch.where(z > 0, z, 1), 0)

    last = L[..., -1:] if t else L.new_zeros(*L.shape[:2], 1)
    until_end = between[..., -1, :] if t else L
    phi = pairs(k, key=True) * until_end.exp().to(dtype)[..., None]
    state, keys = (phi.mT @ v).to(wide), phi.sum(2).to(wide)
    if initial_state is not None:
        state = state + last.exp()[..., None] * initial_state
        keys = keys + last.exp() * sum_of_keys
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), state, keys


# ---- the grid -----------------------------------------------------------------------------------


# From [b, t, heads, width] to the same values elsewhere in memory.
LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows apart": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "channels first": lambda x: x.mT.contiguous().mT,
}


@dataclass(frozen=True)
class Call:
    """One call, and what is differentiated."""

    case: Case
    bounds: tuple[int, ...] | None = None
    used: tuple[bool, bool] = (True, False)  # output, final state
    layout: str | None = None
    wanted: tuple[str, ...] = INPUTS
    aligned: bool = False  # whether queries resemble the keys of their tokens

    @property
    def end(self) -> int:
        """Of the last sequence: what lies behind it is nobody's."""
        return self.case.t if self.bounds is None else self.bounds[-1]

    @property
    def sequences(self) -> int | None:
        return None if self.bounds is None else len(self.bounds) - 1


def case(t: int, **more) -> Case:
    """What all configurations of kernels can be compared in: d and dv are some of theirs."""
    return Case(t=t, **{"b": 1, "d": 32, "dv": 32, "gate": -0.05, "chunk": 64, **more})


def packed(bounds: tuple[int, ...], tail: int = 0, **more) -> Call:
    options = {name: more.pop(name) for name in ("used", "aligned") if name in more}
    return Call(case(bounds[-1] + tail, **more), bounds, **options)


BOTH, ALONE = (True, True), (False, True)
GRID = {
    **{f"t {t}": Call(case(t, b=2)) for t in (1, 2, 63, 64, 65, 200)},
    # One token alone has whatever error its weight gives it: next to none may be left of a query
    # that is orthogonal to what it reads.
    **{
        f"t {t}, states": Call(case(t, state=True), used=BOTH, aligned=t == 1) for t in (1, 64, 130)
    },
    **{
        f"chunk {chunk}, switch over {switch}": Call(
            case(150, hq=2, h=1, chunk=chunk, switch_over=switch, state=True)
        )
        for chunk, switch in ((None, None), (100, 0), (128, 0), (64, 1000))
    },
    **{f"heads {hq}, {h}": Call(case(100, hq=hq, h=h)) for hq, h in ((1, 1), (3, 1), (6, 2))},
    **{
        f"heads {hq}, {h}, states": Call(case(100, hq=hq, h=h, state=True), used=BOTH)
        for hq, h in ((2, 2), (8, 1))
    },
    **{
        f"d {d}, dv {dv}": Call(case(100, hq=2, h=1, d=d, dv=dv, state=d < 128))
        for d, dv in ((32, 64), (64, 32), (64, 64), (32, 128), (128, 32))
    },
    # Between the kernels' own, which are padded.
    **{
        f"d {d}, dv {dv}": Call(
            case(100, hq=2, h=1, d=d, dv=dv, state=True), used=BOTH, aligned=True
        )
        for d, dv in ((8, 1), (16, 12), (24, 20), (24, 32), (32, 12), (40, 64), (64, 48), (80, 40))
    },
    "d 96, dv 96": Call(case(100, d=96, dv=96), used=BOTH),
    "d 24, dv 12, packed": packed(
        (0, 0, 70, 70, 71, 150), d=24, dv=12, state=True, used=BOTH, aligned=True
    ),
    "d 24, dv 12, one chunk": Call(case(60, d=24, dv=12, gate=None)),
    **{
        f"d 16, dv 20, {name}": Call(
            case(100, b=2, d=16, dv=20, state=True), layout=name, aligned=True
        )
        for name in LAYOUTS
    },
    **{f"gate {gate}": Call(case(200, gate=gate)) for gate in (None, 0.0, -1.0, -10.0, -60.0)},
    **{
        f"gate {gate}, states": Call(case(150, hq=2, h=1, gate=gate, state=True), used=BOTH)
        for gate in (None, 0.0, -1.0, -60.0)
    },
    "no tokens": Call(case(0, state=True), used=BOTH),
    "packed": packed((0, 65, 130)),
    "packed, empty ones": packed((0, 0, 1, 64, 64, 150, 150)),
    "packed, states": packed((0, 0, 70, 70, 71, 150), state=True, used=BOTH),
    "packed, final state alone": packed((0, 70, 70, 150), used=ALONE),
    # More in a row than a warp has lanes.
    "packed, many empty ones": packed((0,) * 40 + (65,) * 40 + (130,) * 3 + (131,) * 9),
    "packed, a tail": packed((0, 65, 130), tail=70),
    "packed, a tail of one, states": packed((0, 0, 64, 64), tail=1, state=True, used=BOTH),
    "packed, a tail alone": packed((0, 0), tail=70, state=True, used=BOTH),
    "packed, a tail, no gates": packed((0, 64, 150), tail=64, gate=None),
    "packed, a tail, resets": packed(
        (0, 30, 150), tail=50, reset=-math.inf, every=31, state=True, used=BOTH
    ),
    **{f"resets of {reset}": Call(case(200, reset=reset, every=71)) for reset in RESETS},
    **{
        f"resets of {reset}, states": Call(
            case(150, hq=2, h=1, reset=reset, every=50, state=True), used=BOTH
        )
        for reset in RESETS
    },
    # Next to none may be left of a query that is orthogonal to the few keys that it sees.
    **{
        f"resets of {reset} at every token of {every}": Call(
            case(150, b=2, reset=reset, every=every, state=True), used=BOTH, aligned=every > 1
        )
        for reset in (-1e4, -math.inf)
        for every in (1, 2, 3, 16)
    },
    "resets in a long chunk": Call(case(400, hq=1, h=1, chunk=448, reset=-1e6, every=5)),
    "packed, no gates": packed((0, 64, 150), gate=None, state=True, used=BOTH),
    "final state": Call(case(100), used=BOTH),
    "final state alone": Call(case(100, state=True), used=ALONE),
    "final state alone, one chunk": Call(case(50), used=ALONE),
    "rows of zeros": Call(case(150, hq=2, h=1, zero_rows=True)),
    "rows of zeros, states": Call(case(150, hq=2, h=1, zero_rows=True, state=True), used=BOTH),
    **{name: Call(case(100, b=2), layout=name) for name in LAYOUTS},
    **{f"{name} alone": Call(case(100, state=True), used=BOTH, wanted=(name,)) for name in INPUTS},
    "Q, V and states alone": Call(
        case(100, state=True), wanted=("Q", "V", "initial_state", "sum_of_keys")
    ),
}

# A gradient of the whole state outweighs one of the output by far: both are to be seen.
STATE_SHARE = 2.0**-8


def make_inputs(call: Call, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """Values that the dtype holds; gates and states in float32, or float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        name: None if x is None else x.to(device, dtype if name in "QKV" else wide)
        for name, x in make(call.case, sequences=call.sequences).items()
    }
    if call.end < call.case.t:
        for name, nobodys in zip(("Q", "K", "V", "log_G"), (*[math.nan] * 3, 3e38), strict=True):
            if inputs[name] is not None:
                inputs[name][:, call.end :] = nobodys
                inputs[name][:, call.end + 1 :: 2] = math.inf
    if call.aligned:
        inputs["Q"] += inputs["K"].repeat_interleave(call.case.hq // call.case.h, 2)
    if call.layout is not None:
        for name in "QKV":
            inputs[name] = LAYOUTS[call.layout](inputs[name])
        inputs["log_G"] = inputs["log_G"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert not inputs["Q"].is_contiguous()
    return inputs


def gradients(call: Call, function, inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a fixed sum of the results that are used, its weights eighths, which every dtype holds."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # As they lie: .to() of the dtype that they have gives the very tensor.
    leaves = {
        name: None if x is None else x.to(dtype if name in "QKV" else wide).detach()
        for name, x in inputs.items()
    }
    wanted = [name for name in call.wanted if leaves[name] is not None]
    for name in wanted:
        leaves[name].requires_grad_()
    out, *states = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randint(-8, 9, x.shape, generator=generator).to(x.device, x.dtype) / 8
        for x in (out, *states)
    ]
    used, used_weights = [], []
    if call.used[0]:
        used, used_weights = [out], weights[:1]
    if call.used[1]:
        used += states
        used_weights += [w * STATE_SHARE if call.used[0] else w for w in weights[1:]]
    # The formula's results do not all depend on every input.
    used, used_weights = zip(
        *[(x, w) for x, w in zip(used, used_weights, strict=True) if x.requires_grad], strict=True
    )
    given = torch.autograd.grad(
        used, [leaves[n] for n in wanted], used_weights, allow_unused=True, materialize_grads=True
    )
    for name, x in zip(wanted, given, strict=True):
        assert (x.shape, x.dtype) == (leaves[name].shape, leaves[name].dtype), name
    return {name: x.double() for name, x in zip(wanted, given, strict=True)}


# Where terms of order 1 cancel (one token alone, a strong gate), their rounding is left: a gradient
# whose elements are smaller than this counts as one of such elements.
SMALLEST = 0.02

# Of one element in 16 bits; in the wide types of a sum of some hundred.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-20,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def parts(name: str, x: Tensor) -> float:
    """How many parts of about the same size a gradient has, each of which has its own roundings:
    rows, or of a state's gradient the tokens that it comes from."""
    squares = torch.linalg.svdvals(x) if name == "initial_state" else x.norm(dim=-1)
    squares = squares.square()
    return (squares.sum().square() / squares.square().sum()).item()


def compare(
    call: Call,
    inputs: dict[str, Tensor | None],
    actual: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Every gradient as a whole: at most twice the error of the formula's own backward in the same
    dtype, and one rounding. In 16 bits, besides, no bias of half a rounding."""

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        return gradients(call, lambda **x: formula(**x, bounds=call.bounds), inputs, dtype)

    def error_of(given: dict[str, Tensor], name: str) -> float:
        return (given[name] - exact[name]).norm().item()

    exact = expected(torch.float64)
    plain = exact if dtype == torch.float64 else expected(dtype)
    rounding = ROUNDING[dtype]
    assert actual.keys() == exact.keys()
    wrong = []
    for name, wanted in exact.items():
        allowed = error_of(plain, name)
        if not math.isfinite(allowed):  # z^2 leaves the range of fp16: bf16 has 3 bits less
            allowed = error_of(expected(torch.bfloat16), name) / 8
        size = max(wanted.norm().item(), SMALLEST * math.sqrt(wanted.numel()))
        error, bound = error_of(actual, name), 2 * allowed + rounding * size
        if not error <= bound:  # nor NaN
            wrong.append(f"{name}: error {error:.2e}, at most {bound:.2e} of {size:.2e}")
        # Roundings of many parts have no common direction; a wrong factor has. (Gates' are sums
        # over each other's tokens, too few to average.)
        if dtype.itemsize == 2 and name != "log_G" and wanted.any() and parts(name, wanted) >= 16:
            bias = (((actual[name] - wanted) * wanted).sum() / wanted.square().sum()).item()
            if not abs(bias) <= rounding / 2:
                wrong.append(f"{name}: bias {bias:.2e}, at most {rounding / 2:.2e}")
    assert not wrong, "; ".join(wrong)


@pytest.fixture
def paths(caplog):
    """``paths()``: the paths that the forwards and the backwards since the last question took."""
    caplog.set_level(logging.DEBUG, logger="retention")

    def asked() -> tuple[list[str], list[str]]:
        taken = [
            [m.split(": ", 1)[1].split(";")[0] for m in caplog.messages if m.startswith(direction)]
            for direction in ("forward on", "backward on")
        ]
        caplog.clear()
        return tuple(taken)

    return asked


def check(call: Call, device: str, path: str, dtype: torch.dtype, paths) -> None:
    path = "kernels" if path == "emulator" else path

    def function(**leaves):
        return retention.power_retention(
            **leaves,
            return_final_state=True,
            chunk_size=call.case.chunk,
            switch_over_seq_len=call.case.switch_over,
            cu_seqlens=cu_seqlens,
        )

    cu_seqlens = None
    if call.bounds is not None:
        cu_seqlens = torch.tensor(call.bounds, dtype=torch.int32, device=device)
    inputs = make_inputs(call, dtype, device)
    actual = gradients(call, function, inputs, dtype)
    forward, backward = paths()
    if call.case.t == 0:
        path = "PyTorch path"  # nothing to be done
    assert [x.startswith(path) for x in forward] == [True]
    assert [x.startswith(path) for x in backward] == [True]
    compare(call, inputs, actual, dtype)
    for name in ("Q", "K", "V", "log_G"):
        assert name not in actual or not actual[name][:, call.end :].any(), name


@pytest.fixture
def on_path(path, request):
    """Calls take this path, if they can take it. On one thread: where others have work as well,
    threads with so little wait for each other most of the time."""
    if path == "emulator":
        request.getfixturevalue("emulator")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Of the kernels, the smallest are built for the emulator. There calls have one dtype after another,
# and no gates for the sake of their size: the kernels' own tests have all that, and these are of
# what is between them and a tensor.
OF_SIZE = re.compile(r"gate |resets of ")
ROWS_AND_CALLS = [
    pytest.param(*row.values, name, marks=row.marks)
    for row, (i, (name, call)) in itertools.product(ROWS, enumerate(GRID.items()))
    if "emulator" not in row.values
    or (
        max(call.case.d, call.case.dv) <= 32
        and row.values[2] == NARROW[i % 2]
        and not OF_SIZE.match(name)
    )
]


@pytest.mark.parametrize(("device", "path", "dtype", "name"), ROWS_AND_CALLS, ids=str)
@pytest.mark.usefixtures("on_path")
def test_gradients(device, path, dtype, name, paths):
    check(GRID[name], device, path, dtype, paths)


# What is wanted alone. As small as can be: two chunks, and two sequences.
PARTS = {
    "final state": Call(case(66, hq=2, h=1), used=ALONE),
    "packed, states": packed((0, 0, 66, 66, 67), hq=2, h=1, state=True, used=BOTH),
    "one chunk": Call(case(63, hq=2, h=1)),
    "d 24, dv 12, packed": packed(
        (0, 0, 66, 66, 67), hq=2, h=1, d=24, dv=12, state=True, used=BOTH, aligned=True
    ),
}
WANTED = [
    ("final state", ("K",)),
    ("packed, states", ("Q", "initial_state", "sum_of_keys")),
    *[("packed, states", (name,)) for name in INPUTS],
    *[("packed, states", INPUTS[:n]) for n in (2, 3, 4)],
    *[("one chunk", (name,)) for name in INPUTS[:4]],
    *[("d 24, dv 12, packed", (name,)) for name in INPUTS],
]


def gradients_in_chunks(name: str, dtype: torch.dtype, device: str, wanted: tuple[str, ...]):
    call = replace(PARTS[name], wanted=wanted)
    cu_seqlens = call.bounds and torch.tensor(call.bounds, dtype=torch.int32, device=device)

    def function(**leaves):
        return retention.power_retention(
            **leaves, return_final_state=True, chunk_size=64, cu_seqlens=cu_seqlens
        )

    return gradients(call, function, make_inputs(call, dtype, device), dtype)


@functools.lru_cache(maxsize=4)
def all_gradients_in_chunks(name: str, dtype: torch.dtype, device: str, path: str):
    """That of a call on this path, which is taken, is known."""
    return gradients_in_chunks(name, dtype, device, INPUTS)


# On the emulator one dtype after the other: what is computed does not depend on it.
ROWS_AND_WANTED = [
    pytest.param(*row.values, *wanted, marks=row.marks)
    for row, (i, wanted) in itertools.product(ROWS, enumerate(WANTED))
    if "emulator" not in row.values or row.values[2] == NARROW[i % 2]
]


@pytest.mark.parametrize(("device", "path", "dtype", "name", "wanted"), ROWS_AND_WANTED, ids=str)
@pytest.mark.usefixtures("on_path")
def test_gradients_that_are_wanted_alone_are_the_same_bits(device, path, dtype, name, wanted):
    actual = gradients_in_chunks(name, dtype, device, wanted)
    expected = all_gradients_in_chunks(name, dtype, device, path)
    assert sorted(actual) == sorted(wanted)
    for key, x in actual.items():
        assert torch.equal(x, expected[key]), key


# What a CPU would take too long for. Among thousands of random rows are some that have next to no
# weight, because they see few keys and are orthogonal to those. The formula squares such a score; a
# state of 16 bits holds products far larger than what is left of them (docs/design.md). Here every
# query resembles its own key.
LONG = {
    **{
        f"t {t}, chunk {chunk}, gate {gate}": Call(
            case(t, d=64, dv=64, gate=gate, chunk=chunk, switch_over=0), used=BOTH, aligned=True
        )
        for t in (1000, 2049)
        for chunk in (64, 256, 4096)
        for gate in (None, -0.05, -1.0, -10.0, -60.0)
    },
    **{
        f"d {d}, dv {dv}": Call(
            case(1000, d=d, dv=dv, b=2, state=True, chunk=128), used=BOTH, aligned=True
        )
        for d, dv in [
            *itertools.product((32, 64, 128), repeat=2),
            *((40, 40), (80, 48), (96, 96), (96, 48), (64, 80), (120, 100)),
        ]
    },
    **{
        f"resets at every token of {every}, chunk {chunk}": Call(
            case(2049, d=64, dv=64, chunk=chunk, switch_over=0, reset=reset, every=every),
            used=BOTH,
            aligned=True,
        )
        for reset, every in ((-1e4, 3), (-math.inf, 100), (RESETS[3], 7))
        for chunk in (64, 1024, 4096)
    },
    "the library's choice": Call(
        case(3000, d=64, dv=64, chunk=None, switch_over=None), aligned=True
    ),
    "64 heads to one": Call(
        case(300, hq=64, h=1, d=64, dv=64, state=True), used=BOTH, aligned=True
    ),
    "many sequences": packed(
        tuple(range(0, 1300, 13)), d=64, dv=64, state=True, used=BOTH, aligned=True
    ),
    "long and short sequences": packed(
        (0, 1, 1, 900, 1000, 2000), d=64, dv=64, used=BOTH, aligned=True
    ),
}


@gpu
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(("device", "path", "dtype"), KERNEL_ROWS, ids=str)
def test_gradients_of_long_sequences(device, path, dtype, name, paths):
    check(LONG[name], device, path, dtype, paths)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ["chunk 64, switch over 1000", "packed, states"])
def test_backward_of_a_device_with_little_shared_memory(dtype, name, emulator, paths, monkeypatch):
    """Forward kernels need less than those of backward, which the PyTorch path replaces."""
    monkeypatch.setenv("RETENTION_EMULATED_SHARED_BYTES", str(48 * 1024))
    call = GRID[name]
    inputs = make_inputs(call, dtype, "cpu")
    cu_seqlens = None
    if call.bounds is not None:
        cu_seqlens = torch.tensor(call.bounds, dtype=torch.int32)

    def function(**leaves):
        return retention.power_retention(
            **leaves, return_final_state=True, chunk_size=64, cu_seqlens=cu_seqlens
        )

    actual = gradients(call, function, inputs, dtype)
    forward, backward = paths()
    assert forward == ["kernels"]
    assert re.match(r"PyTorch path \(too little shared memory for .*_d32_dv32_p2", backward[0])
    compare(call, inputs, actual, dtype)


def test_a_device_with_less_shared_memory(emulator, paths, monkeypatch):
    monkeypatch.setenv("RETENTION_EMULATED_SHARED_BYTES", str(32 * 1024))
    inputs = make_inputs(GRID["final state"], torch.bfloat16, "cpu")
    retention.power_retention(**inputs)
    assert re.search(r"expected \d{5} bytes a block, this device has 32768\b", paths()[0][0])


@pytest.mark.parametrize(("device", "path", "dtype"), PYTORCH_ROWS, ids=str)
@pytest.mark.usefixtures("on_path")
def test_gates_that_weigh_nothing(device, path, dtype):
    """The PyTorch path sums the pairs that a gate weighs and no others: a gate with no key before
    it, and gates whose keys a later one shuts out, get no rounding of what others do."""
    inputs = make_inputs(Call(case(192, b=2)), dtype, device)
    inputs["log_G"][:, 128] = -1000
    first = {name: None if x is None else x[:, :128] for name, x in inputs.items()}

    def gradient(inputs: dict[str, Tensor | None], weight: float) -> Tensor:
        gates = inputs["log_G"].clone().requires_grad_()
        out, state, _ = retention.power_retention(
            **inputs | {"log_G": gates},
            chunk_size=64,
            switch_over_seq_len=0,
            return_final_state=True,
        )
        loss = out[:, :128].double().square().sum() + weight * state.double().square().sum()
        return torch.autograd.grad(loss, gates)[0][:, :128]

    shut, alone = gradient(inputs, 1e4), gradient(first, 0.0)
    assert (shut[:, 0] == 0).all()
    torch.testing.assert_close(shut, alone, rtol=4 * ROUNDING[dtype], atol=0)


# ---- the same bits, wherever and whenever -------------------------------------------------------

REPEATED = {
    "states": Call(case(500, b=2, d=64, dv=64, state=True), used=BOTH),
    "packed": packed((0, 64, 64, 300, 500), d=64, dv=64, used=BOTH),
}


def step(call: Call, inputs: dict[str, Tensor | None], **options: bool) -> dict[str, Tensor]:
    """Results and gradients, as they are given."""
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    cu_seqlens = None
    if call.bounds is not None:
        cu_seqlens = torch.tensor(call.bounds, dtype=torch.int32, device=inputs["Q"].device)
    return differentiate(leaves, cu_seqlens, **options)


def differentiate(
    leaves: dict[str, Tensor | None], cu_seqlens: Tensor | None, keep_states: bool = False
) -> dict[str, Tensor]:
    out, state, keys = retention.power_retention(
        **leaves,
        chunk_size=64,
        switch_over_seq_len=0,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
        keep_states=keep_states,
    )
    names = [name for name, x in leaves.items() if x is not None]
    given = torch.autograd.grad(
        (out, state, keys),
        [leaves[name] for name in names],
        (out.detach(), state.detach() / 64, keys.detach() / 64),
    )
    return dict(zip(names, given, strict=True)) | {"out": out, "state": state, "keys": keys}


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(dtype, name):
    inputs = make_inputs(REPEATED[name], dtype, "cpu")
    expected = step(REPEATED[name], inputs)
    for _ in range(3):
        junk = [torch.full_like(x, math.nan) for x in expected.values()]
        del junk  # memory that the next run is given holds something else
        for key, x in step(REPEATED[name], inputs).items():
            assert torch.equal(bits(x), bits(expected[key])), key


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_schedule_gives_the_same_bits(dtype, emulator, paths):
    """Of the threads of the kernels, over 10 runs. States that are kept are those that are
    computed again."""
    call = packed((0, 1, 67), hq=2, h=1, state=True)
    inputs = make_inputs(call, dtype, "cpu")
    expected = step(call, inputs)
    assert paths() == (["kernels"], ["kernels"])
    for run in range(1, 10):
        for key, x in step(call, inputs, keep_states=run % 2 == 1).items():
            assert torch.equal(bits(x), bits(expected[key])), key


@gpu
@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_runs_beside_a_busy_neighbour_give_the_same_bits(dtype, name, paths):
    inputs = make_inputs(REPEATED[name], dtype, "cuda")
    expected = step(REPEATED[name], inputs)
    assert paths() == (["kernels"], ["kernels"])
    logging.getLogger("retention").setLevel(logging.WARNING)
    neighbour = torch.cuda.Stream()
    source = torch.randint(2**31, (2**26,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    neighbour.wait_stream(torch.cuda.current_stream())
    wrong = {key: torch.zeros((), dtype=torch.int64, device="cuda") for key in expected}
    for run in range(1000):
        with torch.cuda.stream(neighbour):
            target.copy_(source)  # memory is busy all the time
        if run % 100 == 0:
            torch.empty(2**26, device="cuda").fill_(math.nan)
        for key, x in step(REPEATED[name], inputs).items():
            wrong[key] += (bits(x) != bits(expected[key])).any()
    torch.cuda.synchronize()
    assert not any(wrong.values()), {key: int(x) for key, x in wrong.items()}


@gpu
def test_the_current_stream_is_used(paths):
    """By backward too: autograd takes the stream of the forward."""
    call = REPEATED["states"]
    inputs = make_inputs(call, torch.bfloat16, "cuda")
    expected = step(call, inputs)
    late = {name: torch.zeros_like(x) for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream, the kernels would read the zeros
        for name, x in late.items():
            x.copy_(inputs[name])
        actual = step(call, late)
    stream.synchronize()
    for key, x in actual.items():
        assert torch.equal(bits(x), bits(expected[key])), key
    assert paths() == (["kernels"] * 2, ["kernels"] * 2)


@gpu
def test_backward_on_the_stream_of_the_forward():
    call = REPEATED["states"]
    inputs = make_inputs(call, torch.bfloat16, "cuda")
    expected = step(call, inputs)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = retention.power_retention(
            **leaves, chunk_size=64, switch_over_seq_len=0, return_final_state=True
        )
        weights = results[0].detach(), results[1].detach() / 64, results[2].detach() / 64
        torch.cuda._sleep(50_000_000)
    torch.cuda.current_stream().wait_stream(stream)
    # From another stream, which autograd makes wait for the gradients.
    given = torch.autograd.grad(results, list(leaves.values()), weights)
    for name, x in zip(leaves, given, strict=True):
        assert torch.equal(bits(x), bits(expected[name])), name


@gpu
def test_a_device_that_is_not_the_current_one(paths):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    call = REPEATED["states"]
    inputs = make_inputs(call, torch.bfloat16, "cuda:0")
    expected = step(call, inputs)
    actual = step(call, {name: x.to("cuda:1") for name, x in inputs.items()})
    assert torch.cuda.current_device() == 0
    for key, x in actual.items():
        assert x.device == torch.device("cuda:1")
        assert torch.equal(bits(x.to("cuda:0")), bits(expected[key])), key
    assert paths() == (["kernels"] * 2, ["kernels"] * 2)


@gpu
@pytest.mark.parametrize("name", REPEATED)
def test_a_cuda_graph_of_forward_and_backward_is_replayed(name, paths):
    call = REPEATED[name]
    inputs = make_inputs(call, torch.bfloat16, "cuda")
    others = {n: None if x is None else x.roll(1, 1) * 2 for n, x in inputs.items()}
    expected = step(call, others)
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
    cu_seqlens = None
    if call.bounds is not None:
        cu_seqlens = torch.tensor(call.bounds, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        differentiate(leaves, cu_seqlens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = differentiate(leaves, cu_seqlens)
    with torch.no_grad():
        for n, x in leaves.items():
            if x is not None:
                x.copy_(others[n])
    for _ in range(2):
        graph.replay()
        for key, x in actual.items():
            assert torch.equal(bits(x), bits(expected[key])), key
    assert paths() == (["kernels"] * 3, ["kernels"] * 3)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # says that it is a prototype
@pytest.mark.parametrize("name", REPEATED)
def test_nothing_waits_for_the_device(name, paths):
    call = REPEATED[name]
    inputs = make_inputs(call, torch.bfloat16, "cuda")
    leaves = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
    cu_seqlens = None
    if call.bounds is not None:
        cu_seqlens = torch.tensor(call.bounds, dtype=torch.int32, device="cuda")
    differentiate(leaves, cu_seqlens)  # the first one takes memory from the driver
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # of what PyTorch does
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        differentiate(leaves, cu_seqlens)
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert paths() == (["kernels"] * 2, ["kernels"] * 2)


# ---- what must not be hidden --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["Q", "K", "V", "log_G"])
@pytest.mark.parametrize(("device", "path", "dtype"), ROWS, ids=str)
@pytest.mark.usefixtures("on_path")
def test_what_is_not_finite_is_seen(device, path, dtype, name, value, chunk):
    """In the output of its token, and in some gradient: a step must not be taken as if it were
    right. An infinite value is a value: it makes the sum infinite."""
    call = Call(case(10, hq=2, h=2))
    inputs = make_inputs(call, dtype, device)
    inputs[name].view(10, 2, -1)[5, 0] = value
    leaves = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
    out = retention.power_retention(**leaves, chunk_size=chunk)
    assert not out[0, 5, 0].isfinite().any()
    assert out[0, :, 1].isfinite().all()
    out.float().sum().backward()
    assert not all(leaves[n].grad.isfinite().all() for n in ("Q", "K", "V", "log_G"))
    out, _, _ = retention.power_retention_inference(
        **{n: None if x is None else x.detach() for n, x in leaves.items()}
    )
    assert not out[0, 5, 0].isfinite().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["K", "V", "log_G", "initial_state", "sum_of_keys"])
@pytest.mark.parametrize(("device", "path", "dtype"), ROWS, ids=str)
@pytest.mark.usefixtures("on_path")
def test_what_is_not_finite_is_handed_on(device, path, dtype, name, value):
    """By the state, to all that comes later, and of its head alone. What a sum of keys does to
    normalisers shows where it is not in the state as well."""
    call = Call(case(70, hq=2, h=2, state=True))
    inputs = make_inputs(call, dtype, device)
    first = 0
    if name in ("initial_state", "sum_of_keys"):
        inputs[name][0, 0] = value
    else:
        first = 5
        inputs[name][0, first, 0] = value
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    out, state, keys = retention.power_retention(
        **leaves, chunk_size=64, switch_over_seq_len=0, return_final_state=True
    )
    late = out[0, first:, 0].isfinite()
    if name == "sum_of_keys" and value == math.inf:
        assert not late.any() or not out[0, first:, 0].any()  # a quotient by infinity
    else:
        assert not late.any()
    if name != "V":  # which is multiplied by the weights of earlier queries, zeros
        assert out[0, :first, 0].isfinite().all()
    changed = [x for x, n in ((state, "sum_of_keys"), (keys, "initial_state")) if n != name]
    if name in ("V", "initial_state"):
        changed = [state]
    elif name == "sum_of_keys":
        changed = [keys]
    for x in changed:
        assert not x[0, 0].isfinite().any()
    for x in (out[0, :, 1], state[0, 1], keys[0, 1]):
        assert x.isfinite().all()
    out.float().sum().backward()
    assert not leaves["K"].grad[0, :, 0].isfinite().all()
    for n in ("Q", "K", "V", "log_G"):
        assert leaves[n].grad[0, :, 1].isfinite().all(), n
    for n in ("initial_state", "sum_of_keys"):
        assert leaves[n].grad[0, 1].isfinite().all(), n


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["output", "state"])
@pytest.mark.parametrize(("device", "path", "dtype"), ROWS, ids=str)
@pytest.mark.usefixtures("on_path")
def test_a_gradient_that_is_not_finite_is_handed_on(device, path, dtype, of, value):
    """To all that came before, and of its head alone."""
    call = Call(case(70, hq=2, h=2, state=True))
    leaves = {n: x.requires_grad_() for n, x in make_inputs(call, dtype, device).items()}
    results = retention.power_retention(
        **leaves, chunk_size=64, switch_over_seq_len=0, return_final_state=True
    )
    given = [torch.ones_like(x) for x in results]
    if of == "output":
        given[0][0, 69, 0] = value
    else:
        given[1][0, 0] = value
    torch.autograd.backward(results, given)
    seen = ["K", "V", "log_G"] + ["Q"] * (of == "output")
    for n in seen:
        x = leaves[n].grad[0, :, 0]
        assert not (x[69] if n == "Q" else x).isfinite().any(), n
    assert not leaves["initial_state"].grad[0, 0].isfinite().any()
    for n in ("Q", "K", "V", "log_G"):
        assert leaves[n].grad[0, :, 1].isfinite().all(), n
