"""`RetentionCache` by the compiled kernels: on the emulator, and on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import pickle
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import retention
from retention import RetentionCache
from retention import cache as cache_module
from retention.ops.cuda import coverage, decoding
from test_cache import BF16, F16, F32, F64, Anything, Config, assert_same, snapshot

# The smallest kernels, those of the emulator.
SMALL = Config(d=32, dv=32, formats=(BF16, F32), ratio=2, by_kernels=True)


def changed(**fields: Any) -> Config:
    return dataclasses.replace(SMALL, **fields)


CONFIGS = [
    SMALL,
    changed(formats=(BF16, BF16), ratio=1, most=1, window=1, slots=3),
    changed(formats=(F16, F32), gating=False, h=1, ratio=5, window=16, most=16),
    changed(formats=(F16, BF16), h=3, window=4, most=4),
]
LARGE = [
    changed(d=64, dv=64, window=20),
    changed(d=128, dv=64, formats=(BF16, BF16), ratio=5),
    changed(d=64, dv=128, formats=(F16, F32), gating=False, h=1),
    changed(d=128, dv=128, h=8, ratio=5, window=7, most=7, slots=9),
]


def used(config: Config) -> RetentionCache:
    cache = config.cache()
    slots = config.indices(*range(config.slots))
    cache.prefill(**config.tokens(0, config.slots, 13), slots=slots, keep=1)
    for i in range(4):
        cache.step(**config.tokens(i, config.slots, 1), slots=slots)
    return cache


@pytest.mark.parametrize("config", [*CONFIGS, *LARGE], ids=str)
def test_anything(device, config):
    if device == "cpu" and config in LARGE:
        pytest.skip("too large for the emulator")

    class Machine(Anything):
        configs = (dataclasses.replace(config, device=device),)

    few = settings(
        phases=[Phase.generate],  # to make failures smaller takes the emulator minutes
        suppress_health_check=[HealthCheck.too_slow],
        max_examples=8 if device == "cpu" else 40,
        stateful_step_count=12,
        deadline=None,
    )
    run_state_machine_as_test(Machine, settings=few)


def test_which_path_runs_where(device, decoding_paths):
    config = dataclasses.replace(SMALL, device=device)
    cache = config.cache()
    slots, new = config.indices(0, -1, 2), config.tokens(0, 3, 2)
    cache.prefill(**new, slots=slots)
    cache.step(**new, slots=slots)
    cache.rollback(slots, 1)
    cache.copy(slots, slots.flip(0))
    cache.reset(slots)
    torch.ops.retention.decode_fold(*cache.pool, slots, config.window, 0, 2)
    assert decoding_paths() == [
        (f"decode_{name}", "kernels")
        for name in ("reset", "prefill", "step", "rollback", "copy", "reset", "fold")
    ]


@pytest.mark.parametrize(
    ("config", "tokens", "rows", "expected"),
    [
        (Config((F32, F32), d=32, dv=32), 1, 2, "no kernel for fp32 inputs: expected bf16 or fp16"),
        (Config((F64, F64), d=32, dv=32), 1, 2, "no kernel for fp64 inputs: expected bf16 or fp16"),
        (changed(d=8, deg=4), 1, 2, "no kernel for states of 560 rows: expected degree 2"),
        (changed(d=48), 1, 2, "no kernel for bf16_d48_dv32_p2: expected degree"),
        (changed(dv=24), 1, 2, "no kernel for bf16_d32_dv24_p2: expected degree"),
        (changed(ratio=65), 1, 2, "query_heads: got 130, expected a multiple of heads = 2"),
        (changed(window=17, most=17), 17, 2, "tokens: got 17, expected at most 16"),
        (changed(window=513), 1, 2, "window: got 513, expected 0, or tokens = 1 to 512"),
        (SMALL, 0, 2, "no tokens"),
        (SMALL, 1, 5, "5 rows: expected at most 4, one for each slot"),
    ],
    ids=str,
)
def test_reasons_against_a_step(device, decoding_paths, config, tokens, rows, expected):
    """The PyTorch path then steps as it does without kernels."""
    config = dataclasses.replace(config, device=device)
    cache, other = config.cache(), config.cache()
    slots, new = config.indices(*[0, 3, -1, -1, -1][:rows]), config.tokens(0, rows, tokens)
    decoding_paths()
    out = cache.step(**new, slots=slots)
    ((name, path),) = decoding_paths()
    assert name == "decode_step"
    assert path.startswith(f"PyTorch path ({expected}")
    with coverage.turned_off():
        wanted = other.step(**new, slots=slots)
    assert decoding_paths() == [("decode_step", "PyTorch path (kernels are turned off)")]
    assert torch.equal(out, wanted)
    assert_same(cache, snapshot(other), [*range(config.slots)])


def test_a_list_of_no_slots_and_one_of_too_many(device, decoding_paths):
    config = dataclasses.replace(SMALL, device=device)
    cache = config.cache()
    decoding_paths()
    for count in (0, 8193):
        slots = torch.full((count,), -1, dtype=torch.int32, device=device)
        cache.copy(slots, slots)
        cache.reset(slots)
    assert decoding_paths() == [
        ("decode_copy", "PyTorch path (count: got 0, expected at least 1)"),
        ("decode_reset", "PyTorch path (count: got 0, expected at least 1)"),
        ("decode_copy", "PyTorch path (count: got 8193, expected at most 8192)"),
        ("decode_reset", "kernels"),
    ]


def test_slices_decide_the_order_of_sums_and_not_the_number_of_rows(device):
    """By default there are as many as fill the device, which the rows of a batch share."""
    config = changed(device=device, formats=(F16, F32), gating=False, window=16)
    slots = config.indices(*range(config.slots))
    new = config.tokens(0, config.slots, 1)
    new["Q"].fill_(1)
    new["V"].zero_()
    # Of numbers of all sizes, each of which is there twice, but for its sign: all that queries of
    # ones read from it is what rounding leaves of sums in their order.
    D = retention.state_dim(config.d)
    half = torch.randn(D // 2, config.dv) * 2.0 ** torch.randint(-9, 10, (D // 2, config.dv))
    state = torch.cat((half, -half.flip(0))).expand(config.slots, config.h, D, config.dv)
    sum_of_keys = torch.full((config.slots, config.h, D), 1e-3)

    def read(rows: int, slices: int | None) -> Tensor:
        """By the first of so many rows."""
        cache = config.cache()
        cache.slices = slices
        cache.set_state(slots, state.to(device), sum_of_keys.to(device), 16)
        rows_of = {name: x if x is None else x[:rows] for name, x in new.items()}
        return cache.step(**rows_of, slots=slots[:rows])[0]

    for slices in (2, 3, 5):
        assert torch.equal(read(1, slices), read(4, slices))
    assert not torch.equal(read(1, 2), read(1, 5))
    if device == "cpu":  # of the emulator's few multiprocessors, rows take all
        assert not torch.equal(read(1, None), read(4, None))


@pytest.mark.parametrize("name", ["high", "key_sum", "log_gates", "cursors", "Q", "slots"])
def test_tensors_that_do_not_fit_are_refused(device, name):
    """The kernels would read and write what is not theirs."""
    config = dataclasses.replace(SMALL, device=device)
    cache, slots = config.cache(), config.indices(0, 1)
    new = {**cache.pool._asdict(), **config.tokens(0, 2, 1), "slots": slots}
    narrowed = {"Q": new["Q"][..., :-8], "slots": slots.long()}.get(name, new[name][:-1])
    arguments = {**new, name: narrowed}.values()
    with pytest.raises(ValueError, match=f"^{name}: expected .* as the pool, got "):
        torch.ops.retention.decode_step(*arguments, None, config.most, config.window, 2, 0)


def test_rows_as_they_lie_and_rows_that_are_copied(device, decoding_paths):
    """Of one projection for queries, keys and values, of heads before tokens, off by one."""
    config = dataclasses.replace(SMALL, device=device, gating=False, most=2)
    tokens = config.tokens(0, 3, 2)
    together = torch.cat((tokens["Q"], tokens["K"], tokens["V"]), 2)
    parts = dict(zip("QKV", together.split([4, 2, 2], 2), strict=True))

    def off_by_one(x: Tensor) -> Tensor:
        memory = x.new_empty(x.numel() + 1)[1:].view(x.shape)
        return memory.copy_(x)

    def every_second(x: Tensor) -> Tensor:
        return torch.stack((x, x), -1).flatten(-2)[..., ::2]

    outs = []
    for view in (
        tokens,
        {**parts, "log_G": None},
        *(
            {name: x if x is None else change(x) for name, x in tokens.items()}
            for change in (
                *(off_by_one, every_second, lambda x: x.mT.contiguous().mT),
                lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
            )
        ),
    ):
        cache = config.cache()
        slots = every_second(config.indices(3, -1, 0))
        outs.append(
            torch.stack(
                (cache.prefill(**view, slots=slots, keep=1), cache.step(**view, slots=slots))
            )
        )
        assert outs[-1].is_contiguous()
    assert {path for _, path in decoding_paths()} == {"kernels"}
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("bounds", [(0, 9, 9, 2), (3, -5, 2, 900), (7, 7, 6, 6), (-3, 40, 1, 1)])
def test_bounds_that_make_no_sense_reach_nobody_else(device, bounds):
    """On a device no one looks at them before; no kernel leaves the tensors."""
    config = dataclasses.replace(SMALL, device=device)
    cache, other = used(config), used(config)
    rows, before = config.indices(0, -1, 2), snapshot(other)
    new = config.tokens(0, 1, 6)
    for call in (cache.step, cache.prefill, cache.step):
        out = call(**new, slots=rows, cu_seqlens=config.indices(*bounds))
        assert out.shape == (1, 6, *out.shape[2:])
    assert_same(cache, before, [1, 3])


# ---- on a device --------------------------------------------------------------------------------

ON_GPU = changed(d=64, dv=64, window=6, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_captured_step(packed):
    """Replayed for other slots, tokens and lengths, with folds, as the same calls without it."""
    graphed, other = used(ON_GPU), used(ON_GPU)
    lead = (1, 8) if packed else (3, 2)
    new, slots = ON_GPU.tokens(0, *lead), ON_GPU.indices(-1, -1, -1)
    bounds = ON_GPU.indices(0, 2, 2, 5) if packed else None
    taken = ON_GPU.indices(0, 0, 0)

    def run(cache: RetentionCache) -> Tensor:
        out = cache.step(**new, slots=slots, cu_seqlens=bounds)
        cache.rollback(slots, taken)
        cache.copy(slots, slots.flip(0))
        return out

    run(graphed)  # kernels are loaded then; of padding alone
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(graphed)
    assert_same(graphed, snapshot(other), [0, 1, 2, 3])
    for i in range(20):
        for name, x in ON_GPU.tokens(i, *lead).items():
            new[name].copy_(x)
        slots.copy_(ON_GPU.indices(*[(2, -1, 0), (1, 2, 3), (0, 9, 1)][i % 3]))
        taken.fill_(i % 2)
        if packed:
            bounds.copy_(ON_GPU.indices(*[(0, 1, 2, 5), (0, 3, 6, 7)][i % 2]))
            taken.zero_()
        graph.replay()
        assert torch.equal(run(other), out)
        assert_same(graphed, snapshot(other), [0, 1, 2, 3])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # says that it is a prototype
def test_nothing_synchronises(decoding_paths):
    cache, slots = used(ON_GPU), ON_GPU.indices(2, -1, 0)
    new, packed = ON_GPU.tokens(0, 3, 2), ON_GPU.tokens(0, 1, 6)
    bounds = ON_GPU.indices(0, 2, 2, 5)
    torch.cuda.synchronize()
    decoding_paths()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            cache.step(**new, slots=slots)
            cache.step(**packed, slots=slots, cu_seqlens=bounds)
        for keep in (0, 2):
            cache.prefill(**new, slots=slots, keep=keep)
            cache.prefill(**packed, slots=slots, cu_seqlens=bounds, keep=keep)
        cache.copy(slots, slots.flip(0))
        cache.reset(slots)
        cache.reset()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {path for _, path in decoding_paths()} == {"kernels"}


@pytest.mark.gpu
def test_a_side_stream():
    """Behind work that takes its time, and with nothing on the default stream to wait for."""
    cache, other = used(ON_GPU), used(ON_GPU)
    slots = ON_GPU.indices(0, 1, 2, 3)
    tokens = [ON_GPU.tokens(i, 4, 2) for i in range(8)]
    wanted = [other.step(**new, slots=slots) for new in tokens]
    torch.cuda.synchronize()
    late = [{name: torch.zeros_like(x) for name, x in new.items()} for new in tokens]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        outs = []
        for new, given in zip(late, tokens, strict=True):
            for name, x in new.items():
                x.copy_(given[name])
            outs.append(cache.step(**new, slots=slots))
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(outs, wanted, strict=True))
    assert_same(cache, snapshot(other), [0, 1, 2, 3])


@pytest.mark.gpu
def test_inference_mode_and_autocast_on_a_device(decoding_paths):
    cache, other = used(ON_GPU), used(ON_GPU)
    slots = ON_GPU.indices(0, 1, 2, 3)
    decoding_paths()
    for i in range(8):
        new = ON_GPU.tokens(i, 4, 2)
        wide = {name: x.float().requires_grad_() for name, x in new.items()}
        with torch.inference_mode(i % 2 == 0), torch.autocast("cuda", dtype=BF16):
            out = cache.step(**wide, slots=slots)
        assert not out.requires_grad
        assert torch.equal(out, other.step(**new, slots=slots))
    assert set(decoding_paths()) == {("decode_step", "kernels")}
    assert_same(cache, snapshot(other), [0, 1, 2, 3])


@pytest.mark.gpu
def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    config = dataclasses.replace(ON_GPU, device="cuda:1")
    cache, other = used(config), used(ON_GPU)
    slots = (0, 1, 2, 3)
    for i in range(8):
        out = cache.step(**config.tokens(i, 4, 2), slots=config.indices(*slots))
        wanted = other.step(**ON_GPU.tokens(i, 4, 2), slots=ON_GPU.indices(*slots))
        assert torch.equal(out.cpu(), wanted.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_the_host_of_a_step_is_done_in_time(monkeypatch):
    """The whole of ``RetentionCache.step``, up to the call that launches."""
    cache, slots = used(ON_GPU), ON_GPU.indices(0, 1, 2, 3)
    new = ON_GPU.tokens(0, 4, 1)

    def microseconds(calls: int = 100, rounds: int = 100) -> float:
        best = math.inf
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                cache.step(**new, slots=slots)
            best = min(best, (time.perf_counter() - start) / calls * 1e6)
        return best

    whole = microseconds()
    binding = SimpleNamespace(decode_step=lambda sizes, pointers, workspace, stream: None)
    monkeypatch.setattr(decoding, "_C", binding)
    before = microseconds()
    print(f"\nhost: {whole:.1f} us a step, {before:.1f} us before the launch")
    assert before < 15


# ---- many steps ---------------------------------------------------------------------------------


def _captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run once, for kernels are loaded then, and captured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("gate", [None, -0.01], ids=["ungated", "gated"])
def test_a_hundred_thousand_steps(state_dtype: torch.dtype, gate: float | None):
    """Their error against float64, by tenths of the sequence.

    States of two planes are read to the eight bits of the high one, whatever came before: the error
    does not grow when there are as many tokens as a state sees. A state of bfloat16 adds a rounding
    with every fold: where gates forget them, they do not add up, and without gates as the root of
    their number, since none is biased.
    """
    steps, d = 100_000, 32
    config = Config((BF16, state_dtype), d=d, dv=d, h=1, ratio=2, slots=1, window=48, most=1)
    config = dataclasses.replace(config, gating=gate is not None, device="cuda")
    torch.manual_seed(0)
    tokens = {name: torch.randn(1, steps, 1, d, device="cuda").bfloat16() for name in "KV"}
    # Each aligned with a recent key, for who sees nothing reads the noise of the state.
    recent = tokens["K"].roll(5, 1)
    tokens["Q"] = torch.cat((recent, recent + torch.randn_like(recent)), 2)
    log_gate = None if gate is None else torch.full((1, steps, 1), gate, device="cuda")
    cache, slots = config.cache(), config.indices(0)
    out = torch.zeros(1, steps, 2, d, dtype=BF16, device="cuda")
    now = torch.zeros(1, dtype=torch.int64, device="cuda")

    def run() -> None:
        new = {name: x.index_select(1, now) for name, x in tokens.items()}
        gates = None if log_gate is None else log_gate.index_select(1, now)
        out.index_copy_(1, now, cache.step(**new, log_G=gates, slots=slots))
        now.add_(1)

    graph = _captured(run)
    cache.reset()
    now.zero_()
    for _ in range(steps):
        graph.replay()
    wide = {name: x.double() for name, x in tokens.items()}
    expected = retention.power_retention(
        **wide, log_G=None if log_gate is None else log_gate.double(), chunk_size=512
    )
    difference = (out.double() - expected).square().unflatten(1, (10, -1))
    parts = (
        difference.sum((0, 2, 3, 4)) / expected.square().unflatten(1, (10, -1)).sum((0, 2, 3, 4))
    ).sqrt() * 2**9
    print(f"\n{state_dtype} states, gate {gate}: errors in roundings {parts.tolist()}")
    first, last = parts[1].item(), parts[1:].max().item()
    if state_dtype == F32 or gate is not None:
        assert first < 1.25 * (1 if gate else 1.5)  # ungated: of the mean of all values, and small
        assert last < 1.1 * first
    else:
        # As the root it would be 2.5 times as large, in proportion to the folds 6 times.
        assert last < 3.5 * first


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40])
def test_a_thousand_runs_give_the_same_bits(rows: int):
    """With folds and in two orders of the batch that are split alike."""
    config = dataclasses.replace(ON_GPU, slots=2 * rows, h=8, ratio=1)
    cache = config.cache()
    saved, work = config.indices(*range(rows)), config.indices(*range(rows, 2 * rows))
    cache.prefill(**config.tokens(0, rows, 13), slots=saved, keep=config.window)
    new = config.tokens(1, rows, 2)
    flipped = {name: None if x is None else x.flip(0) for name, x in new.items()}
    first = torch.zeros_like(new["Q"])
    differ = torch.zeros((), dtype=torch.int64, device="cuda")

    def run() -> None:
        cache.copy(saved, work)
        differ.add_((cache.step(**new, slots=work) != first).sum())
        cache.copy(saved, work)
        differ.add_((cache.step(**flipped, slots=work.flip(0)).flip(0) != first).sum())

    cache.copy(saved, work)
    first.copy_(cache.step(**new, slots=work))
    graph = _captured(run)
    for _ in range(1000):
        graph.replay()
    assert differ.item() == 0
    assert first.isfinite().all()
    assert first.any()


# ---- steps that leave the dispatcher out --------------------------------------------------------


class Through(TorchDispatchMode):
    """Sees what goes by."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """``dispatched()``: how many steps went through the dispatcher since the last question."""
    counted, step = [], cache_module._step
    monkeypatch.setattr(cache_module, "_step", lambda *a: counted.append(1) or step(*a))

    def asked() -> int:
        count = len(counted)
        counted.clear()
        return count

    return asked


def test_a_step_like_one_before_leaves_the_dispatcher_out(device, dispatched):
    config = dataclasses.replace(SMALL, device=device)
    caches, slots = [used(config), used(config)], config.indices(0, 2)
    dispatched()
    for i in range(3):
        new = config.tokens(i, 2, 1)
        out = caches[0].step(**new, slots=slots)
        # The same numbers by another way there.
        with Through():
            assert torch.equal(out, caches[1].step(**new, slots=slots))
    assert dispatched() == 1 + 3
    assert_same(caches[0], snapshot(caches[1]), list(range(config.slots)))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, new: new.update(Q=new["Q"].clone().requires_grad_()),
        lambda cache, new: new.update(Q=torch.nn.Parameter(new["Q"], requires_grad=False)),
        lambda cache, new: new.update(K=new["K"].transpose(1, 2).contiguous().transpose(1, 2)),
        lambda cache, new: new.update({n: torch.cat((x, x)) for n, x in new.items()}),
        lambda cache, new: setattr(cache, "slices", 1),
        lambda cache, new: cache.to(cache.device),
    ],
    ids=["gradient", "parameter", "strides", "shape", "slices", "to"],
)
def test_a_step_unlike_those_before_does_not(device, dispatched, change):
    config = dataclasses.replace(SMALL, device=device)
    cache, new = used(config), config.tokens(1, 2, 2)
    cache.step(**new, slots=config.indices(0, 1))
    dispatched()
    cache.step(**new, slots=config.indices(0, 1))
    assert dispatched() == 0
    change(cache, new)
    cache.step(**new, slots=config.indices(*range(len(new["Q"]))))
    assert dispatched() == 1


def test_what_is_wrong_is_found_in_a_later_step(device):
    config = dataclasses.replace(SMALL, device=device)
    cache, new, slots = used(config), config.tokens(1, 2, 1), config.indices(0, 1)
    for _ in range(2):
        cache.step(**new, slots=slots)
    with pytest.raises(TypeError, match=r"slots: expected torch\.int32 as the cache"):
        cache.step(**new, slots=slots.long())
    with pytest.raises(ValueError, match=r"V: expected .* to match K"):
        cache.step(**new | {"K": new["K"][:, :, :1]}, slots=slots)
    with pytest.raises(ValueError, match="expected at most max_tokens_per_step"):
        cache.step(**config.tokens(1, 2, config.most + 1), slots=slots)


def test_a_context_is_heeded_by_a_known_step(device, dispatched, caplog):
    config = dataclasses.replace(SMALL, device=device)
    cache, new, slots = used(config), config.tokens(1, 2, 1), config.indices(0, 1)
    for _ in range(2):
        cache.step(**new, slots=slots)
    dispatched()
    with coverage.turned_off():
        cache.step(**new, slots=slots)
    with torch.autocast(device, torch.bfloat16):
        cache.step(**new, slots=slots)
    with Through():
        cache.step(**new, slots=slots)
    with caplog.at_level(logging.DEBUG, logger="retention"):
        cache.step(**new, slots=slots)
    assert dispatched() == 4
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        copied.step(**new, slots=slots)
        assert dispatched() == 1
