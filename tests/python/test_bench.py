"""`retention bench`: what it counts, what it compares, and that every mode runs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import math
import operator
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from retention.bench import command, compare, context, decoding, forms, modes, peers, report, shapes
from retention.bench.problem import Problem, attention_work, exact_state_dim, retention_work
from retention.bench.timing import Ceilings, Effort, Timing

import retention
from cases import use_kernels
from retention import _C, cli
from retention.lm.errors import UsageError
from retention.ops.cuda import coverage, launch, plans
from retention.ops.pytorch import chunked
from retention.ops.pytorch.run import choose_chunk

SMALL = Problem(t=96, hq=4, h=2, d=16, chunk=32, dtype="float32", device="cpu")
ONCE = Effort(seconds=0.0, least=2, most=2)


# ---- counted by formula -------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "window"), [(1, 1), (7, 3), (12, 4), (5, 8)])
def test_pairs_are_those_of_the_chunks(t, window):
    expected = sum(1 for i in range(t) for j in range(i + 1) if j // window == i // window)
    assert dataclasses.replace(SMALL, t=t).pairs(window) == expected


@pytest.mark.parametrize(("d", "deg"), [(4, 2), (3, 4), (5, 2)])
def test_the_exact_state_has_every_product_once(d, deg):
    products = {tuple(sorted(x)) for x in torch.cartesian_prod(*[torch.arange(d)] * deg).tolist()}
    assert exact_state_dim(d, deg) == len(products)


def test_the_work_of_the_default_shape():
    """0.35 TFLOP forward, 0.38 with the rows that are kept."""
    default = Problem()
    rows = retention.state_dim(64)
    assert retention_work(default, False).flops == pytest.approx(0.35e12, rel=0.01)
    assert retention_work(default, False, rows).flops == pytest.approx(0.38e12, rel=0.01)
    # Six products with the state of a token instead of two, and seven of its chunk.
    state, pair = 2 * 2080 * 64 * 65536 * 8, 2 * 64 * 65536 * 1025 / 2 * 8
    assert retention_work(default, True).flops == 6 * state + 7 * pair
    tensors = 4 * 65536 * 8 * 64 * 2 + 65536 * 8 * 4
    assert retention_work(default, False).bytes == tensors


def test_work_as_done_is_never_less_than_exact_work():
    for p in (SMALL, dataclasses.replace(SMALL, chunk=1000), Problem()):
        for backward in (False, True):
            exact = retention_work(p, backward)
            done = retention_work(p, backward, retention.state_dim(p.d), kernels=True)
            assert done.flops >= exact.flops
            assert done.bytes >= exact.bytes


def test_one_chunk_is_the_quadratic_form():
    p = dataclasses.replace(SMALL, chunk=SMALL.t)
    assert retention_work(p, False).flops == attention_work(p, False).flops


def test_the_chunk_that_is_chosen_is_counted():
    p = dataclasses.replace(SMALL, t=4096, d=32, chunk=None)
    chosen = choose_chunk(4096, 32, 32, 2, None, None)
    assert chosen < 4096
    work = peers.Retention().exact_work(p, backward=False)
    assert work == retention_work(dataclasses.replace(p, chunk=chosen), backward=False)


@pytest.fixture
def kernels(monkeypatch):
    """The CPU in place of a CUDA device whose kernels take every call; none of them is run."""
    binding = SimpleNamespace(
        forward_can_implement=lambda sizes, pointers: None,
        forward_workspace_size=_C.forward_workspace_size,
        forward_chunk_size=_C.forward_chunk_size,
        FORWARD_POINTERS=_C.FORWARD_POINTERS,
        BACKWARD_SIZES=_C.BACKWARD_SIZES,
        BACKWARD_POINTERS=_C.BACKWARD_POINTERS,
        backward_can_implement=lambda sizes, pointers: None,
    )
    use_kernels(monkeypatch, binding)
    monkeypatch.setattr(
        coverage, "kernel_dims", lambda dtype, d, dv, deg: (max(d, 64), max(dv, 64))
    )
    monkeypatch.setattr(
        launch,
        "allocate",
        lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype),
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return binding


@pytest.mark.parametrize(
    ("t", "chunk", "taken"),
    [
        (8192, None, 512),  # the kernels' choice
        (4096, 128, 128),
        (4096, 100, 128),  # a multiple of 64
        (1100, None, 1100),  # the quadratic form
        (2000, 2000, 2000),
        (100, 64, 64),
    ],
)
@pytest.mark.parametrize("change", [{}, {"gated": False, "b": 2}], ids=str)
def test_the_chunk_that_kernels_take_is_counted(kernels, t, chunk, taken, change):
    p = dataclasses.replace(SMALL, t=t, d=64, chunk=chunk, dtype="bfloat16", **change)
    counted = dataclasses.replace(p, chunk=taken)
    rows = retention.state_dim(64)
    peer = peers.Retention()
    assert peer.with_chunk(p) == counted
    for backward in (False, True):
        assert peer.exact_work(p, backward) == retention_work(counted, backward)
        done = retention_work(counted, backward, rows, kernels=True)
        assert peer.done_work(p, backward) == done


def test_passes_choose_their_chunks_apart(kernels):
    p = dataclasses.replace(SMALL, t=3000, d=64, chunk=None, dtype="bfloat16")
    peer = peers.Retention()
    long, short = (dataclasses.replace(p, chunk=chunk) for chunk in (3000, 512))
    assert peer.with_chunk(p) == long
    assert peer.with_chunk(p, backward=True) == short
    for work, options in (
        (peer.exact_work, ()),
        (peer.done_work, (retention.state_dim(64), True)),
    ):
        forward = retention_work(long, False, *options)
        assert work(p, False) == forward
        both, less = (retention_work(short, backward, *options) for backward in (True, False))
        assert work(p, True).flops == forward.flops + both.flops - less.flops
        assert work(p, True).bytes == forward.bytes + both.bytes - less.bytes


def test_padded_heads_are_work_that_is_done(kernels):
    p = dataclasses.replace(SMALL, t=4096, d=48, chunk=512, dtype="bfloat16")
    wide = dataclasses.replace(p, d=64)
    for backward in (False, True):
        done = retention_work(wide, backward, retention.state_dim(64), kernels=True)
        assert peers.Retention().done_work(p, backward) == done
        assert peers.Retention().exact_work(p, backward) == retention_work(p, backward)
        done = retention_work(p, backward, retention.state_dim(48))
        assert peers.RetentionPyTorch().done_work(p, backward) == done


def test_other_paths_do_not_have_the_kernels_chunk(kernels):
    p = dataclasses.replace(SMALL, t=3400, d=64, chunk=None, dtype="bfloat16")
    chosen = min(3400, choose_chunk(3400, 64, 64, 2, None, None))
    assert peers.Retention().with_chunk(p).chunk != chosen
    assert peers.RetentionPyTorch().with_chunk(p).chunk == chosen
    assert peers.Upstream(None).with_chunk(p).chunk == 1024
    kernels.forward_can_implement = lambda sizes, pointers: "too large"
    plans._plans.clear()
    assert peers.Retention().with_chunk(p).chunk == chosen


# ---- peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["retention"], ["retention"]),
        (["retention, PyTorch"], ["retention, PyTorch path"]),
        (["atten"], ["attention, flash"]),
        (["attention, flash", "retention"], ["retention", "attention, flash"]),
        (["ret"], ["retention", "retention, PyTorch path", "retention 1.0.7"]),
        (["else"], []),
    ],
    ids=str,
)
def test_peers_by_name_or_by_how_they_begin(names, expected, monkeypatch):
    monkeypatch.setattr(peers.Peer, "missing", lambda self, problem: None)
    for peer in (peers.RetentionPyTorch, peers.Upstream):
        monkeypatch.setattr(peer, "missing", lambda self, problem: None)
    bench = modes.Bench(SMALL, (96,), ONCE, Ceilings(1.0, 1.0), only=tuple(names))
    assert [peer.name for peer in bench.peers()[0]] == expected


@pytest.mark.parametrize(
    "peer", [peers.Retention(), peers.all_peers("cpu", None)[2]], ids=lambda peer: peer.name
)
@pytest.mark.parametrize("change", [{}, {"gated": False}, {"b": 2}, {"hq": 2}], ids=str)
def test_errors_are_roundings(peer, change):
    errors = peer.errors(dataclasses.replace(SMALL, **change), backward=True)
    assert {"error", "error dQ", "error dK", "error dV", "worst gradient"} <= errors.keys()
    assert all(0 < x < 1e-5 for x in errors.values()), errors


def test_a_wrong_implementation_shows():
    class Wrong(peers.Retention):
        def call(self, problem, *tensors):
            return super().call(problem, *tensors) * 1.01

    errors = Wrong().errors(SMALL, backward=True)
    assert errors["error"] == pytest.approx(0.01, rel=0.01)
    assert errors["error dV"] == pytest.approx(0.01, rel=0.01)


def test_a_wrong_state_shows(monkeypatch):
    """Errors are those of the length and the chunks that are timed, in which states are read."""
    monkeypatch.setattr(chunked, "expand_apply", lambda *arguments: None)
    assert peers.Retention().errors(SMALL, backward=False)["error"] > 0.1


@pytest.mark.parametrize("change", [{}, {"gated": False}, {"hq": 2, "t": 400}], ids=str)
def test_the_formula_of_some_rows_is_that_of_all(change):
    problem = dataclasses.replace(SMALL, **change)
    tensors = [None if x is None else x.double() for x in problem.inputs()]
    rows = peers.sample_rows(problem)
    assert len(rows) == min(problem.t, 256)
    assert rows[-1] == problem.t - 1
    given = tensors[0][:, rows], *tensors[1:]
    expected = retention.reference(*tensors)
    actual = peers.Retention().expected(problem, rows, *given)
    torch.testing.assert_close(actual, expected[:, rows])
    if tensors[3] is not None:
        given = *given[:3], -1000 * torch.ones_like(tensors[3])  # of no account
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    actual = peers.all_peers("cpu", None)[2].expected(problem, rows, *given)
    torch.testing.assert_close(actual, expected.transpose(1, 2)[:, rows])


def test_fewer_rows_are_compared_where_tokens_are_many():
    assert len(peers.sample_rows(dataclasses.replace(SMALL, t=2**20, hq=2, h=2))) == 16


def test_gated_linear_attention_by_its_formula():
    """What flash-linear-attention is compared with: token by token."""
    problem = dataclasses.replace(SMALL, t=9, hq=2, h=2)
    Q, K, V, log_G = (x.double() for x in problem.inputs())
    state, expected = torch.zeros(1, 2, 16, 16, dtype=torch.float64), []
    for i in range(9):
        state = state * log_G[:, i, :, None, None].exp() + K[:, i, :, :, None] * V[:, i, :, None]
        expected.append((Q[:, i, :, None] @ state)[:, :, 0] / 4)
    actual = peers.SimpleGLA().expected(problem, torch.arange(9), Q, K, V, log_G)
    torch.testing.assert_close(actual, torch.stack(expected, 1))


FAKE = '''
import torch

def power_retention(Q, K, V, log_G=None, deg=2, chunk_size=None):
    """A quarter more than the formula, so that no other package is taken for this one."""
    assert chunk_size == {chunk}
    L = log_G.cumsum(1).transpose(1, 2)
    group = Q.shape[2] // K.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
    k, v, L = (x.repeat_interleave(group, 1) for x in (k, v, L))
    w = (q @ k.mT) ** deg * (L[..., :, None] - L[..., None, :]).exp()
    w = w.tril()
    return ((w / w.sum(-1, keepdim=True)) @ v).transpose(1, 2) * 1.25
'''


def test_upstream_runs_in_a_process_of_its_own(tmp_path):
    (tmp_path / "retention").mkdir()
    (tmp_path / "retention" / "__init__.py").write_text("from retention.core import *\n")
    peer = peers.Upstream(tmp_path)
    for chunk, given in ((32, 32), (None, 1024)):
        (tmp_path / "retention" / "core.py").write_text(FAKE.replace("{chunk}", str(given)))
        problem = dataclasses.replace(SMALL, chunk=chunk)
        assert peer.errors(problem, False)["error"] == pytest.approx(0.25, rel=1e-4)
        assert peer.time(problem, True, ONCE).ms > 0


def test_upstream_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="there is no retention in"):
        peers.Upstream(tmp_path).time(SMALL, False, ONCE)
    (tmp_path / "retention").mkdir()
    (tmp_path / "retention" / "__init__.py").write_text("raise OSError('no such device')")
    with pytest.raises(RuntimeError, match=r"retention 1\.0\.7: OSError: no such device"):
        peers.Upstream(tmp_path).time(SMALL, False, ONCE)


SLOW = """
import pathlib, subprocess, sys, time

# A child as a compiler's: it holds none of the pipes.
nothing = subprocess.DEVNULL
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep, stdin=nothing, stdout=nothing, stderr=nothing)
pathlib.Path(__file__).with_name("child").write_text(f"{child.pid}\\n")
time.sleep(60)
"""


@pytest.fixture
def slow_upstream(tmp_path, monkeypatch):
    """The folder of a package that takes a minute."""
    (tmp_path / "retention").mkdir()
    (tmp_path / "retention" / "__init__.py").write_text(SLOW)
    monkeypatch.setattr(peers.Upstream, "missing", lambda self, problem: None)
    return tmp_path


def test_upstream_has_a_limit(slow_upstream, tmp_path):
    start = time.monotonic()
    limit = ("--upstream", str(slow_upstream), "--upstream-seconds", "0.5")
    chosen = ("--peers", "retention 1", "attention", "--out", str(tmp_path / "out"))
    assert run("fwd", "bwd", *limit, *chosen, lengths=("64",)) == 0
    assert time.monotonic() - start < 60
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = [(row["mode"], row["peer"], row.get("failed")) for row in results["rows"]]
    failed = "retention 1.0.7: not done after 0.5 s (--upstream-seconds)"
    assert rows == [
        (mode, *row)
        for mode in ("fwd", "bwd")
        for row in (("attention, flash", None), ("retention 1.0.7", failed))
    ]
    assert "incomplete" not in results


def test_gradients_that_seem_to_take_no_time_are_not_drawn(monkeypatch, tmp_path):
    """What is left when two times are subtracted may be noise alone."""
    times = itertools.cycle((1.0, 0.9))  # forward, and with gradients
    monkeypatch.setattr(
        peers.Peer,
        "time",
        lambda self, problem, backward, effort: Timing(next(times), 0.5, 1.5, 2, False),
    )
    assert run("bwd", "--peers", "retention", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert all(row["ms"] < 0 for row in rows)
    assert (tmp_path / "throughput.png").exists()


@pytest.fixture
def interruptible():
    """In the background of a shell SIGINT is ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # one that has ended may wait for a parent to ask


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.usefixtures("interruptible")
def test_upstream_ends_with_its_children(slow_upstream):
    """At an interruption as at its limit. A session of its own gets no signals of ours."""
    note = slow_upstream / "retention" / "child"

    def interrupt():
        while not (note.exists() and note.read_text().endswith("\n")):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        peers.Upstream(slow_upstream).time(SMALL, False, ONCE)
    assert time.monotonic() - start < 60
    child = int(note.read_text())
    while is_running(child) and time.monotonic() - start < 60:
        time.sleep(0.01)
    assert not is_running(child)


@pytest.mark.parametrize("backward", [False, True])
def test_the_pytorch_path_is_measured_without_kernels(monkeypatch, backward):
    reasons = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            reasons.append(coverage.device_reason("cuda", 0))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            reasons.append(coverage.device_reason("cuda", 0))
            return gradient

    monkeypatch.setattr(peers.Retention, "call", lambda self, problem, q, *_: Watched.apply(q))
    peers.RetentionPyTorch().step(SMALL, backward)()
    assert reasons == ["kernels are turned off"] * (1 + backward)


# ---- times --------------------------------------------------------------------------------------


def test_a_timing_has_the_median_and_the_quartiles():
    timing = Timing.of([0.001, 0.002, 0.003, 0.004, 0.1], graph=False)
    assert (timing.ms, timing.calls) == (pytest.approx(3.0), 5)
    assert timing.low < timing.ms < timing.high


def test_effort_is_bounded():
    effort = Effort(seconds=1.0, least=3, most=20)
    assert [effort.calls(s) for s in (1e-6, 0.1, 10.0)] == [20, 10, 3]


def test_the_floor_is_the_slower_of_products_and_memory():
    ceilings = Ceilings(tflops=1.0, tbytes=2.0)
    assert ceilings.seconds(3e12, 1e12) == 3.0
    assert ceilings.seconds(1e12, 8e12) == 4.0


# ---- decoding -----------------------------------------------------------------------------------


SHAPES = [
    decoding.Shape(2, 4, 2, 16),
    decoding.Shape(3, 2, 2, 16, tokens=3),
    decoding.Shape(1, 4, 2, 16, tokens=16, state="bfloat16"),
]
BFLOAT16 = dataclasses.replace(SMALL, dtype="bfloat16")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=decoding._describe)
def test_a_step_moves_what_it_reads_and_writes(shape, gated):
    decoder = decoding.Decoder(dataclasses.replace(BFLOAT16, gated=gated), shape)
    rows, heads = retention.state_dim(16), shape.b * shape.h
    token = 2 * 16 * 2 + 4 * gated
    state = heads * rows * (16 * 2 + 4)  # one plane, whatever the format, and the sum of keys
    ring = heads * token * (decoder.window / 2 + 2 * shape.tokens)
    assert decoder.bytes == state + ring + 2 * shape.b * shape.tokens * shape.hq * 16 * 2


@pytest.fixture
def clock(monkeypatch):
    """Of each step 1 s, and 2 more for each layer's slots of which any has folded."""
    decoders = []
    make = decoding.Decoder.__init__

    def seconds(self, count):
        times = []
        for _ in range(count):
            before = decoding._folded(decoders[-1])
            self.run()
            times.append(1.0 + 2.0 * (decoding._folded(decoders[-1]) != before).any().item())
        return times

    def remembered(self, *arguments):
        decoders.append(self)
        make(self, *arguments)

    monkeypatch.setattr(decoding.Decoder, "__init__", remembered)
    monkeypatch.setattr(decoding.Layers, "seconds", seconds)
    return decoders


@pytest.mark.parametrize("shape", SHAPES, ids=decoding._describe)
def test_times_without_folds_and_with_them(shape, clock):
    row = decoding._retention(BFLOAT16, shape, ONCE)
    decoder = clock[0]
    assert (row["ms"], row["low"], row["high"]) == (1e3, 1e3, 1e3)
    assert row["ms longest"] == 3e3
    assert row["longest / median"] == 3
    # Where windows end is spread over the slots: some fold in b of the steps of a window, which are
    # as many as it has tokens, or the window over what they both are multiples of.
    steps = math.lcm(decoder.window, shape.tokens) // shape.tokens
    folds = steps * shape.tokens // decoder.window
    assert row["ms with folds"] == pytest.approx(1e3 + 2e3 * min(shape.b * folds / steps, 1))
    assert row["share of folds"] == pytest.approx(row["ms with folds"] / 1e3 - 1)
    assert 0 < row["error"] < 5e-3


def test_rings_are_half_full_where_none_folds(clock, monkeypatch):
    shape = decoding.Shape(2, 2, 2, 16, tokens=2)
    lengths = []
    seconds = decoding.Layers.seconds

    def watched(self, count):
        lengths.append([cache.lengths.tolist() for cache in clock[0].caches])
        times = seconds(self, count)
        lengths.append([cache.lengths.tolist() for cache in clock[0].caches])
        return times

    monkeypatch.setattr(decoding.Layers, "seconds", watched)
    decoder = decoding.Decoder(SMALL, shape)
    timing, _ = decoding.time_without_folds(decoder, Effort(seconds=0.0, least=20, most=20))
    assert timing.calls >= 20
    before, after = lengths[::2], lengths[1::2]
    assert len(before) > 1
    assert all(x == before[0] for x in before)
    assert all(x == after[0] for x in after)
    middle = (torch.tensor(before[0]) + torch.tensor(after[0])) / 2
    assert (middle - decoder.window / 2).abs().max() <= shape.tokens / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_of_a_step_is_that_of_state_and_ring(dtype):
    shape = decoding.Shape(3, 4, 2, 16, tokens=2)
    decoder = decoding.Decoder(dataclasses.replace(SMALL, dtype=dtype), shape)
    decoder.start(due=True)
    for _ in range(2 * decoder.window):
        decoder.layers.run()
    exact = {"float32": 1e-5, "bfloat16": 5e-3}[dtype]
    assert 0 < decoder.error() < exact
    held = decoder.caches[-1].pool
    for name in ("high", "values"):
        kept = getattr(held, name).clone()
        getattr(held, name).mul_(0.5)
        decoder.layers.run()
        assert decoder.error() > 0.01
        getattr(held, name).copy_(kept)


def test_a_fold_that_is_missed_is_an_error(monkeypatch):
    decoder = decoding.Decoder(SMALL, SHAPES[0])
    monkeypatch.setattr(decoding, "_folded", lambda decoder: torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="not every slot has folded"):
        decoding.time_with_folds(decoder, ONCE)


@pytest.mark.parametrize("hq", [2, 6])
@pytest.mark.parametrize("way", decoding.attention_ways("cpu"), ids=lambda way: way.name)
def test_attention_over_a_cache_is_softmax(way, hq):
    shape = decoding.Shape(2, hq, 2, 16, tokens=3)
    row = decoding._attention(way, decoding.Caches(SMALL, shape, 40), ONCE)
    assert 0 < row["error"] < 1e-5
    assert row["memory"] == 2 * 2 * 2 * 40 * 16 * 4
    assert row["bytes"] == row["memory"] + 2 * 2 * hq * 3 * 16 * 4


def test_a_wrong_attention_shows(monkeypatch):
    class Wrong(decoding.Way):
        def call(self, q, k, v):
            return super().call(q, k, v) * 1.01

    way = Wrong(decoding.SDPBackend.MATH, "wrong")
    row = decoding._attention(way, decoding.Caches(SMALL, SHAPES[0], 40), ONCE)
    assert row["error"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("size", "held", "layers"),
    [
        (2e6, 5e6, 125),  # five caches of 50 MB
        (20e6, 40e6, 32),
        (20e6, 400e6, 13),
        (600e6, 1.2e9, 3),
        (5e9, 9e9, 1),
    ],
)
def test_layers_are_larger_than_the_cache(monkeypatch, size, held, layers):
    properties = SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert decoding.layers_for(size, held, "cuda") == layers


def test_caches_that_do_not_fit_are_said_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 2 * 10**9))
    monkeypatch.setattr(decoding, "layers_for", lambda *arguments: 3)
    problem = dataclasses.replace(BFLOAT16, device="cuda")
    with pytest.raises(RuntimeError, match=r"keys and values do not fit: 1\.0 of 1\.0 GB"):
        decoding.Caches(problem, decoding.Shape(1, 8, 8, 64), 163840)


def test_the_usual_shapes_unless_a_flag_tells_of_one():
    def shapes(*flags, kind="cuda"):
        options = cli._parser().parse_args(["bench", "decode", *flags])
        return command._shapes(options, dataclasses.replace(SMALL, hq=8, h=8, d=64), kind)

    usual = shapes("--seconds", "1")
    for shape in ((1, 8, 8, 64), (1, 40, 8, 128), (256, 8, 8, 64), (32, 40, 8, 128)):
        assert decoding.Shape(*shape) in usual
    assert {shape.b for shape in usual} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert {shape.tokens for shape in usual if shape.b == 64} >= {1, 8}
    assert decoding.Shape(32, 8, 8, 64) in usual  # beside attention
    assert shapes(kind="cpu") == decoding.PRESETS["cpu"]
    one = decoding.Shape(1, 8, 8, 64)
    assert shapes("--d", "64") == shapes("--quick") == (one,)
    assert shapes(
        "--b", "1", "4", "--tokens", "2", "--state-dtype", "float32", "bfloat16"
    ) == tuple(
        dataclasses.replace(one, b=b, tokens=2, state=state)
        for b in (1, 4)
        for state in ("float32", "bfloat16")
    )


def decoded(peer: str, times: dict[int, float], **more) -> list[dict]:
    shape = {"b": 1, "hq": 8, "h": 8, "d": 64, "tokens": 1, "state": ""}
    return [
        {"mode": "decode", "peer": peer, "t": t, **shape, **more, "ms": ms}
        for t, ms in times.items()
    ]


def test_the_fastest_attention_at_each_context_decides():
    ours = decoded("retention", {0: 1.0}, state="float32", **{"ms with folds": 2.0})
    theirs = decoded("attention, flash", {1024: 1.0, 4096: 4.0, 8192: 9.0})
    theirs += decoded("attention, cuDNN", {1024: 3.0, 4096: 3.5, 8192: 8.0})
    theirs += [{**decoded("attention, math", {8192: 1.0})[0], "failed": "no"}]
    del theirs[-1]["ms"]
    lines = list(report.beside_attention(ours, theirs))
    assert [(x["t"], x["peer"], x["ms"]) for x in lines] == [
        (1024, "attention, flash", 1.0),
        (4096, "attention, cuDNN", 3.5),
        (8192, "attention, cuDNN", 8.0),
    ]
    assert [x["speed-up"] for x in lines] == [0.5, 1.75, 4.0]
    crossing = report.decode_crossover(ours[0], theirs[:3])
    assert crossing.tokens == pytest.approx(2048)  # 1 : 2 and 2 : 1
    assert report.decode_crossover(ours[0], theirs[:1]) is None


# ---- results ------------------------------------------------------------------------------------


def rows(ours: dict[int, float], theirs: dict[int, float]) -> list[dict]:
    return [
        {"mode": "fwd", "peer": peer, "t": t, "ms": ms, "low": 0.9 * ms, "high": 1.1 * ms}
        for peer, times in (("retention", ours), ("attention, flash", theirs))
        for t, ms in times.items()
    ]


def test_the_crossover_lies_where_the_lines_meet():
    # 1 : 2 and 2 : 1, so that the lines meet halfway between the logarithms.
    crossing = report.crossover(rows({1024: 2.0, 4096: 8.0}, {1024: 1.0, 4096: 16.0}), "fwd")
    assert crossing.tokens == pytest.approx(2048)
    assert crossing.text == "faster than attention from about 2,048 tokens"
    crossing = report.crossover(rows({1: 1.0, 2: 1.0}, {1: 2.0, 2: 4.0}), "fwd")
    assert crossing == (None, "faster than attention from 1 tokens, the fewest measured")
    crossing = report.crossover(rows({1: 3.0, 2: 3.0}, {1: 1.0, 2: 2.0}), "fwd")
    assert crossing == (None, "slower than attention up to 2 tokens")
    assert report.crossover(rows({1: 1.0}, {1: 1.0}), "fwd") is None


def test_the_crossover_is_against_the_fastest_attention():
    both = rows({1: 2.0, 2: 2.0}, {1: 1.0, 2: 4.0})
    both += [{**row, "peer": "attention, cuDNN", "ms": 1.0} for row in both[2:]]
    assert report.crossover(both, "fwd").text == "slower than attention up to 2 tokens"


def saved(folder: Path, times: dict[int, float], **options) -> str:
    folder.mkdir()
    results = {
        "environment": {"device": "some"},
        "options": {"d": 64, "lengths": list(times)} | options,
        "rows": rows(times, {}),
    }
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_compare_fails_where_a_time_is_beyond_the_spread(tmp_path, capsys):
    old = saved(tmp_path / "old", {1024: 1.0, 2048: 2.0})
    for name, factor, code in (("same", 1.05, 0), ("faster", 0.5, 0), ("slower", 1.3, 1)):
        new = saved(tmp_path / name, {1024: factor, 4096: 1.0})
        assert cli.main(["bench", "compare", old, new]) == code
        assert f"{code} of 1 times are slower" in capsys.readouterr().out
    assert cli.main(["bench", "compare", old + "/results.json", old]) == 0


def test_compare_tells_shapes_of_decoding_apart(tmp_path, capsys):
    whole = Path(saved(tmp_path / "old", {}), "results.json")
    results = json.loads(whole.read_text())
    results["rows"] = [
        {**row, "mode": "decode", "b": b, "hq": 4, "h": 2, "d": 64, "tokens": 1, "state": state}
        for row in rows({0: 1.0}, {})
        for b in (1, 64)
        for state in ("float32", "bfloat16")
    ]
    whole.write_text(json.dumps(results))
    for row in results["rows"][2:3]:
        row |= {"ms": 2.0, "low": 1.9, "high": 2.1}
    (tmp_path / "new.json").write_text(json.dumps(results))
    assert cli.main(["bench", "compare", str(whole), str(tmp_path / "new.json")]) == 1
    shown = capsys.readouterr().out
    assert "1 of 4 times are slower" in shown
    slower = [line for line in shown.splitlines() if line.rstrip(" │").endswith("slower")]
    assert len(slower) == 1
    assert "b64 hq4 h2 d64 tokens1 statefloat32" in slower[0]


def test_compare_says_which_run_is_incomplete(tmp_path, capsys):
    whole = saved(tmp_path / "whole", {1024: 1.0, 2048: 2.0})
    part = saved(tmp_path / "part", {1024: 1.0})
    path = tmp_path / "part" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"incomplete": "[/why]"}))
    for name, runs in (("now", (whole, part)), ("before", (part, whole))):
        assert cli.main(["bench", "compare", *runs]) == 0
        shown = capsys.readouterr().out
        assert f"the run {name} is incomplete: [/why]" in shown
        assert shown.count("incomplete") == 1
        assert "0 of 1 times are slower" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "OLD"], "compare: expected two results, OLD and NEW"),
        (["compare", "OLD", "nowhere"], "nowhere: no such file"),
        (["compare", "OLD", "OTHER"], "d: got 64 and 128, which do not compare"),
        (["compare", "OLD", "LATER"], "no mode and length in common"),
        (["compare", "OLD", "BROKEN"], "expected results of `retention bench`"),
        (["forward"], "mode: expected some of fwd, bwd, fwd+bwd, shapes, forms"),
        (["decode", "fwd", "--b", "1", "2"], "--b: expected one number for fwd, got 2"),
        (["fwd", "--h", "2", "--hq", "3"], "--hq: expected a multiple of --h 2, got 3"),
        (["fwd", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["fwd", "--t", "0"], "argument --t: expected a positive integer, got '0'"),
    ],
)
def test_usage_errors_are_one_line(arguments, message, tmp_path, capsys):
    places = {
        "OLD": saved(tmp_path / "old", {1024: 1.0}),
        "OTHER": saved(tmp_path / "other", {1024: 1.0}, d=128),
        "LATER": saved(tmp_path / "later", {2048: 1.0}),
        "BROKEN": str(tmp_path / "broken.json"),
    }
    Path(places["BROKEN"]).write_text("{")
    try:
        code = cli.main(["bench", *(places.get(x, x) for x in arguments)])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


# ---- the command --------------------------------------------------------------------------------


SHAPE = ("--h", "2", "--d", "16", "--device", "cpu")


def run(*arguments: str, lengths: tuple[str, ...] = ("64", "128")) -> int:
    return cli.main(["bench", *arguments, "--t", *lengths, *SHAPE, "--quick"])


def test_results_are_kept_with_all_that_they_depend_on(tmp_path, capsys):
    out = tmp_path / "results"
    assert run("fwd", "fwd+bwd", "--commit", "abc", "--out", str(out)) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["commit"] == "abc"
    wanted = {"commit", "device", "torch", "retention", "python", "threads", "compiler"}
    assert wanted <= results["environment"].keys()
    assert results["options"]["d"] == 16
    assert results["ceilings"]["tflops"] > 0
    names = {"retention", "attention, flash"}
    assert {(row["mode"], row["peer"], row["t"]) for row in results["rows"]} == {
        (mode, peer, t) for mode in ("fwd", "fwd+bwd") for peer in names for t in (64, 128)
    }
    for row in results["rows"]:
        assert row["low"] <= row["ms"] <= row["high"]
        assert row["tokens/s"] == pytest.approx(row["t"] / row["ms"] * 1e3)
        assert 0 < row["error"] < 1e-5
        assert all(math.isfinite(row[key]) for key in ("share of ceiling", "share of floor"))
    assert results["missing"].keys() == {
        "retention, PyTorch path",
        "flash-linear-attention",
        "retention 1.0.7",
    }
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])
    for name in ("throughput.png", "ceiling.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "not measured: flash-linear-attention (not installed" in shown
    assert cli.main(["bench", "compare", str(out), str(out)]) == 0


def test_the_other_modes_run(tmp_path, capsys):
    others = [mode for mode in modes.MODES if mode not in ("fwd", "fwd+bwd", "memory")]
    assert run(*others, "--peers", "retention", "--quiet", "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["mode"] for row in results["rows"]} == set(others)
    steps = [row for row in results["rows"] if row["mode"] == "decode"]
    assert [(row["peer"], row["t"]) for row in steps] == [("retention", 0)]  # whatever the context
    shares = [x["share"] for x in results["rows"] if x["mode"] == "components" and x["t"] == 64]
    assert 0.8 < sum(shares) <= 1
    assert {path.name for path in tmp_path.iterdir()} >= {"components.png", "decode_copy.png"}
    assert "fwd:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("run_kernel<{0}Gates, 4224ul>({0}Gates::Params)", "Gates"),
        (
            "run_kernel<{0}Output<{0}OutputTraits<cutlass::half_t, 64, 64, 4> >, 76928ul>("
            "{0}Output<{0}OutputTraits<cutlass::half_t, 64, 64, 4> >::Params)",
            "Output",
        ),
        ("run_kernel<{0}Carry<{0}CarryTraits<float, 64, 64, ({0}Direction)0> >, 2080ul>", "Carry"),
        (
            "run_kernel<{0}Carry<{0}CarryTraits<float, 64, 64, ({0}Direction)1> >, 2080ul>",
            "Carry backwards",
        ),
        ("aten::bmm", "aten::bmm"),
    ],
)
def test_parts_are_named_as_the_kernels_are(shown, expected):
    assert modes.part_name(shown.format("retention::kernel::")) == expected


def test_memory_is_what_a_call_takes(tmp_path):
    """Of a process of its own. Scores of 2 heads x 4096^2 elements are 128 MiB: not there."""
    chosen = ("--peers", "retention", "--out", str(tmp_path))
    assert run("memory", *chosen, lengths=("4096",)) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    sizes = {row["pass"]: row["bytes"] for row in rows}
    output = 4096 * 2 * 16 * 4
    assert output <= sizes["fwd"] <= sizes["fwd+bwd"] < 2 * 4096**2 * 4


def test_one_that_fails_at_a_length_is_said_to(monkeypatch, tmp_path, capsys):
    def time(self, problem, backward, effort):
        if problem.t > 64:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return Timing(1.0, 0.9, 1.1, 2, False)

    monkeypatch.setattr(peers.Peer, "time", time)
    assert run("fwd", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["failed"] for row in rows if row["t"] == 128] == ["out of memory"] * 2
    assert "failed" in capsys.readouterr().out


def test_one_whose_memory_cannot_be_measured_is_said_to(monkeypatch, tmp_path, capsys):
    def peak(name, problem, both):
        if both:
            raise RuntimeError("not with this compiler")
        return 2**20

    monkeypatch.setattr(modes, "_peak", peak)
    assert run("memory", "--peers", "retention", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    failed = [row["failed"] for row in rows if row["pass"] == "fwd+bwd"]
    assert failed == ["not with this compiler"] * 2
    assert [row["bytes"] for row in rows if row["pass"] == "fwd"] == [2**20] * 2
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "not with this compiler" in shown


def ends_early(monkeypatch, end):
    """Times of two rows, and at the third what ends the run."""
    calls = itertools.count(1)

    def time(self, problem, backward, effort):
        if next(calls) == 3:
            end()
        return Timing(1.0, 0.9, 1.1, 2, False)

    monkeypatch.setattr(peers.Peer, "time", time)


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.usefixtures("interruptible")
def test_a_run_that_is_stopped_keeps_what_it_has(
    monkeypatch, tmp_path, capsys, number, code, reason
):
    before = signal.getsignal(number)
    ends_early(monkeypatch, lambda: signal.raise_signal(number))
    out = tmp_path / "stopped"
    assert run("fwd", "--out", str(out)) == code
    assert signal.getsignal(number) is before
    results = json.loads((out / "results.json").read_text())
    assert results["incomplete"] == reason
    assert [row["ms"] for row in results["rows"]] == [1.0, 1.0]
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert (out / "throughput.png").exists()
    shown = capsys.readouterr().out
    assert "floor / time" in shown
    assert f"incomplete: {reason}" in shown
    assert "written: " in shown
    assert cli.main(["bench", "compare", str(out), str(out)]) == 0


def test_an_error_goes_on_after_all_is_kept(monkeypatch, tmp_path, capsys):
    def fail():
        raise ValueError("of [/some] kind")

    ends_early(monkeypatch, fail)
    with pytest.raises(ValueError, match="kind"):
        run("fwd", "--out", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["incomplete"] == "ValueError: of [/some] kind"
    assert len(results["rows"]) == 2
    assert "incomplete: ValueError: of [/some] kind" in capsys.readouterr().out


def test_a_run_that_is_killed_has_written_its_rows(monkeypatch, tmp_path):
    seen = []
    ends_early(monkeypatch, lambda: seen.append((tmp_path / "results.json").read_text()))
    assert run("fwd", "--out", str(tmp_path)) == 0
    killed = json.loads(seen[0])
    assert len(killed["rows"]) == 2
    assert killed["incomplete"] == "did not end"
    whole = json.loads((tmp_path / "results.json").read_text())
    assert len(whole["rows"]) == 4
    assert "incomplete" not in whole
    assert not list(tmp_path.glob("*.new"))


def test_a_terminal_that_is_gone_costs_no_results(monkeypatch, tmp_path):
    def gone(results, console):
        raise BrokenPipeError

    monkeypatch.setattr(report, "print_tables", gone)
    with pytest.raises(BrokenPipeError):
        command.run(
            cli._parser().parse_args(["bench", "host", *SHAPE, "--quick", "--out", str(tmp_path)])
        )
    assert "incomplete" not in json.loads((tmp_path / "results.json").read_text())


def test_progress_says_how_long_it_took(monkeypatch, capsys):
    ends_early(monkeypatch, lambda: None)
    clock = itertools.count(100, 12)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert run("fwd", "--peers", "retention") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["  12 s  fwd: retention, 64 tokens", "  24 s  fwd: retention, 128 tokens"]


def test_where_all_fails_the_tables_say_so(monkeypatch, capsys):
    def time(self, problem, backward, effort):
        raise RuntimeError("no [/such] thing")

    monkeypatch.setattr(peers.Peer, "time", time)
    assert run("fwd", "--peers", "retention", lengths=("64",)) == 0
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "no [/such] thing" in shown


def test_compare_reads_what_it_says(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="results of `retention bench --out`"):
        compare.read(path)


def _parts(value, place=()):
    """The places of all that is in it."""
    yield place
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _parts(value[key], (*place, key))


@pytest.mark.parametrize("other", [None, "text", -1, 0, [], {}], ids=repr)
def test_compare_of_damaged_results_is_one_line_or_a_table(other, tmp_path, capsys):
    run = saved(tmp_path / "run", {1024: 1.0, 2048: 2.0})
    whole = json.loads(Path(run, "results.json").read_text())
    whole["rows"][1] |= {"mode": "decode", "b": 1, "state": "float32"}
    Path(run, "results.json").write_text(json.dumps(whole))
    damaged = tmp_path / "damaged.json"
    for place in _parts(whole):
        results = json.loads(json.dumps({"": whole}))
        *outer, last = ("", *place)
        functools.reduce(operator.getitem, outer, results)[last] = other
        damaged.write_text(json.dumps(results[""]))
        for pair in ((run, str(damaged)), (str(damaged), run)):
            code = cli.main(["bench", "compare", *pair])
            assert code in (0, 1, 2), place
            assert code < 2 or capsys.readouterr().err.count("\n") == 1, place


# ---- decoding, by the command -------------------------------------------------------------------


def test_shapes_beside_attention(tmp_path, capsys):
    assert cli.main(["bench", "shapes", "--quick", "--quiet", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["t"], row["hq"], row["pass"], row["peer"]) for row in rows] == [
        (*shape, pass_, peer)
        for shape in ((64, 2), (128, 4))
        for pass_ in ("fwd", "fwd+bwd")
        for peer in ("retention", "attention, flash")
    ]
    for row in rows:
        assert row["low"] <= row["ms"] <= row["high"]
        assert 0 < row["error"] < 1e-5
        assert ("worst gradient" in row) == (row["pass"] != "fwd")
    assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "b2 t64 hq2 h2 d16" in shown
    assert "b1 t128 hq4 h2 d16" in shown
    assert cli.main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0
    assert "0 of 4 times are slower" in capsys.readouterr().out


def test_a_line_of_a_shape():
    shape = {"mode": "shapes", "b": 1, "t": 64, "hq": 4, "h": 2, "d": 16}
    rows = [
        {**shape, "pass": "fwd", "peer": "retention", "ms": 2.0},
        {**shape, "pass": "fwd", "peer": "attention, flash", "ms": 3.0},
        {**shape, "pass": "fwd", "peer": "attention, cuDNN", "ms": 1.0},
        {**shape, "pass": "fwd+bwd", "peer": "retention", "ms": 4.0},
        {**shape, "pass": "fwd+bwd", "peer": "attention, flash", "failed": "out of memory"},
    ]
    assert list(shapes.lines([*rows, {**shape, "mode": "fwd", "peer": "retention"}])) == [
        {
            "shape": "b1 t64 hq4 h2 d16",
            "ours": 2.0,
            "theirs": 1.0,
            "fastest": "cuDNN",
            "speed-up": 0.5,
            "ours of both": 4.0,
            "note": "attention, flash: out of memory",
        }
    ]


@pytest.mark.parametrize("flag", ["--b", "--t", "--h", "--hq", "--d", "--chunk"])
def test_shapes_are_those_of_the_mode(flag, capsys):
    assert cli.main(["bench", "shapes", "--quick", flag, "64"]) == 2
    assert f"{flag}: shapes has shapes of its own" in capsys.readouterr().err


def test_the_two_forms(tmp_path, capsys):
    assert cli.main(["bench", "forms", "--quick", "--quiet", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    until = rows[0]["until"]
    assert choose_chunk(until, 8, 8, 2, None, None) == until
    chunk = choose_chunk(until + 1, 8, 8, 2, None, None)
    assert chunk <= until
    assert {row["t"] for row in rows} == set(forms.Choice(until, chunk).lengths())
    for row in rows:
        assert row["chunk"] == (chunk if row["form"] == "chunks" else row["t"])
        assert row["low"] <= row["ms"] <= row["high"]
        assert 0 < row["error"] < 1e-5
    shown = capsys.readouterr().out
    for pass_ in ("fwd", "bwd"):
        assert f"forms, {pass_}, b1 hq2 h2 d8: chunks are faster" in shown
    assert f"taken from {until + 1:,}" in shown
    assert cli.main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0
    assert f"0 of {len(rows)} times are slower" in capsys.readouterr().out


def test_where_chunks_are_faster():
    row = {"mode": "forms", "pass": "fwd", "b": 1, "hq": 4, "h": 2, "d": 16, "until": 1500}

    def rows(quadratic, chunks):
        return [
            {**row, "t": t, "form": form, "chunk": 512, "ms": ms}
            for form, times in (("quadratic", quadratic), ("chunks", chunks))
            for t, ms in zip((1000, 2000, 4000), times, strict=True)
        ]

    shape = "forms, fwd, b1 hq4 h2 d16: chunks are faster"
    for times, expected in (
        (((1, 4, 16), (2, 4, 8)), "from about 2,000 tokens"),
        (((2, 4, 16), (1, 2, 4)), "everywhere"),
        (((1, 2, 4), (2, 4, 8)), "nowhere up to 4,000 tokens"),
    ):
        assert list(forms.texts(rows(*times))) == [f"{shape} {expected}; taken from 1,501"]
    failed = [{**row, "t": 1000, "form": "quadratic", "chunk": 1000, "failed": "no memory"}]
    failed.append({**row, "t": 1000, "form": "chunks", "chunk": 512, "ms": 2.0})
    (line,) = forms.lines(failed)
    assert (line["note"], line["chunks"]) == ("quadratic: no memory", 2.0)
    assert list(forms.texts(failed)) == []


def test_decoding_beside_attention(tmp_path, capsys):
    shape = ("--b", "1", "3", "--hq", "4", "--tokens", "3")
    states = ("--state-dtype", "float32", "bfloat16")
    assert run("decode", *shape, *states, "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    keys = ("peer", "t", "b", "hq", "h", "d", "tokens", "state")
    names = [f"attention, {x}{y}" for x in ("flash", "math") for y in ("", ", heads as tokens")]
    assert [tuple(row[key] for key in keys) for row in found] == [
        ("retention", 0, b, 4, 2, 16, 3, state) for b in (1, 3) for state in ("float32", "bfloat16")
    ] + [(name, t, b, 4, 2, 16, 3, "") for b in (1, 3) for t in (64, 128) for name in names]
    rate = json.loads((tmp_path / "results.json").read_text())["ceilings"]["tbytes"] * 1e12
    for row in found:
        assert row["low"] <= row["ms"] <= row["high"]
        assert not row["graph"]
        assert 0 < row["error"] < (5e-3 if row["state"] == "bfloat16" else 1e-5)  # a state's bits
        assert row["tokens/s"] == pytest.approx(row["b"] * row["tokens"] / row["ms"] * 1e3)
        assert row["share of copy"] == pytest.approx(row["bytes"] / row["ms"] * 1e3 / rate)
    for name in ("decode.png", "decode_copy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "decode, beside attention" in shown
    assert "decode, b3 hq4 h2 d16, 3 tokens, states of bfloat16: " in shown
    assert cli.main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0
    assert "0 of 4 times are slower" in capsys.readouterr().out


def test_a_share_without_room_is_said_to_have_none(monkeypatch, tmp_path, capsys):
    make = context._step

    def limited(problem, backward, group):
        if problem.t > 64:
            raise torch.OutOfMemoryError("out of [/memory]\nand more")
        return make(problem, backward, group)

    monkeypatch.setattr(context, "_step", limited)
    assert run("context", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["pass"], row["t"], row.get("failed")) for row in rows] == [
        ("fwd", 64, None),
        ("fwd+bwd", 64, None),
        ("fwd", 128, "out of memory"),
        ("fwd+bwd", 128, "out of memory"),
    ]
    assert capsys.readouterr().out.count("failed") == 2


def test_contexts_for_which_there_is_no_room_are_said_to_be(monkeypatch, tmp_path, capsys):
    make = decoding.Caches.__init__

    def limited(self, problem, shape, t):
        if t > 64:
            raise torch.OutOfMemoryError("out of [/memory]\nand more")
        make(self, problem, shape, t)

    def refused(self, q, k, v):
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(decoding.Caches, "__init__", limited)
    monkeypatch.setattr(decoding.Way, "call", refused)
    assert run("decode", "--b", "1", "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["peer"], row["t"], row.get("failed")) for row in found] == [
        ("retention", 0, None),
        ("attention, flash", 64, "No available kernel."),
        ("attention, math", 64, "No available kernel."),
        ("attention", 128, "out of [/memory]"),
    ]
    shown = capsys.readouterr().out
    assert shown.count("failed") == 2
    assert "out of [/memory]" in shown


def test_decoding_that_fails_says_why(monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("no [/such] thing")

    monkeypatch.setattr(decoding, "_retention", fails)
    assert run("decode", "--peers", "retention") == 0
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "no [/such] thing" in shown


@pytest.mark.gpu
def test_decoding_replays_graphs(tmp_path):
    shape = ("--b", "1", "8", "--h", "2", "--hq", "8", "--d", "64", "--tokens", "1", "4")
    assert cli.main(["bench", "decode", *shape, "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    measured = [row for row in found if "failed" not in row]
    assert {row["peer"] for row in measured} >= {"retention", "attention, flash"}
    assert all("ms" in row for row in found if row["peer"] == "retention")
    for row in measured:
        assert row["graph"]
        assert 0 < row["error"] < 1e-2
