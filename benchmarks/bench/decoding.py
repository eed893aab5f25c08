"""Decoding: steps of `retention.RetentionCache`, beside attention over a cache of every context.

A model has layers, and a step finds the memory of each where the last step left it: not in the L2
cache. So several caches, together larger than that, take a step in turn, in one CUDA graph; what a
replay takes, over their number, is the time of a step of one layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import retention
from retention.ops import pool

from .peers import Retention, attention_backends
from .problem import DTYPES, Problem
from .timing import Ceilings, Effort, Timing

Row = dict[str, Any]

_PROMPT = 128  # tokens that a state has seen before anything is timed
_PREFILLED = 32  # sequences whose prompts are taken at a time
_LAYERS = 32  # in a graph, unless they take more than these bytes:
_MOST_BYTES = 4 * 2**30
_CACHES = 5  # L2 caches that all layers' memory fills at least
_WINDOWS = 4  # over which folds are timed


@dataclass(frozen=True)
class Shape:
    """A batch of sequences that take a step of one layer."""

    b: int
    hq: int
    h: int
    d: int
    tokens: int = 1
    state: str = "float32"
    beside: bool = True  # whether attention is measured beside it

    def row(self) -> Row:
        row = dataclasses.asdict(self)
        del row["beside"]
        return row

    def without_state(self) -> Shape:
        return dataclasses.replace(self, state="")


_BESIDE = {(1, 64), (32, 64), (256, 64), (1, 128), (32, 128)}
PRESETS = {
    "cuda": (
        *(
            Shape(b, hq, 8, d, beside=(b, d) in _BESIDE)
            for hq, d in ((8, 64), (40, 128))
            for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        ),
        *(Shape(b, 8, 8, 64, state="bfloat16", beside=False) for b in (1, 32, 256)),
        *(Shape(b, 40, 8, 128, state="bfloat16", beside=False) for b in (1, 32)),
        *(Shape(64, 8, 8, 64, tokens=tokens, beside=False) for tokens in (2, 4, 8, 16)),
    ),
    "cpu": (Shape(1, 4, 4, 64), Shape(8, 4, 4, 64)),
}
CONTEXTS = (1024, 2048, 4096, 6144, 8192, 16384, 32768, 65536, 131072)


class Layers:
    """A step of each layer in turn: on a GPU a CUDA graph of them.

    Attributes:
        outputs: of the last step of each.
        count: of layers.
    """

    def __init__(self, steps: list[Callable[[], Tensor]], device: str):
        self._calls = steps
        self.count = len(steps)
        self.cuda = device.startswith("cuda")
        self._graph = None
        self.run()  # kernels are loaded now, and memory is found
        if self.cuda:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = self._step()
            self._graph = graph

    def run(self) -> None:
        if self._graph is None:
            self.outputs = self._step()
        else:
            self._graph.replay()

    def _step(self) -> list[Tensor]:
        with torch.no_grad():
            return [call() for call in self._calls]

    def seconds(self, count: int) -> list[float]:
        """Of each of several runs, one after another, for one layer."""
        if not self.cuda:
            marks = [time.perf_counter()]
            for _ in range(count):
                self.run()
                marks.append(time.perf_counter())
            return [(end - start) / self.count for start, end in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize()
        return [
            start.elapsed_time(end) / 1e3 / self.count for start, end in itertools.pairwise(events)
        ]


def layers_for(size: float, held: float, device: str) -> int:
    """How many layers there are in a graph, where a step of one reads and writes ``size`` bytes of
    the ``held`` ones."""
    if not device.startswith("cuda"):
        return 2
    cold = _CACHES * torch.cuda.get_device_properties().L2_cache_size
    return max(1, math.ceil(cold / size), min(_LAYERS, int(_MOST_BYTES / held)))


def measure(
    problem: Problem,
    shapes: tuple[Shape, ...],
    contexts: tuple[int, ...],
    effort: Effort,
    ceilings: Ceilings,
    wanted: Callable[[str], bool],
    say: Callable[[str], None],
    free: Callable[[str], None],
) -> Iterator[Row]:
    """Rows of retention, then those of attention. What fails has one that says why."""
    device = problem.device

    def rows(shape: Shape, peer: str, t: int, run: Callable[[], Row]) -> Iterator[Row]:
        row = {"mode": "decode", "peer": peer, "t": t, **shape.row()}
        try:
            row |= run()
            row["tokens/s"] = 1e3 * shape.b * shape.tokens / row["ms"]
            row["share of copy"] = row["bytes"] / (row["ms"] / 1e3) / (ceilings.tbytes * 1e12)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            row["failed"] = str(error).splitlines()[0]
        free(device)
        yield row

    for shape in shapes if wanted("retention") else ():
        say(f"decode: retention, {_describe(shape)}, states of {shape.state}")
        # A step takes as long after any context.
        yield from rows(shape, "retention", 0, lambda s=shape: _retention(problem, s, effort))
    ways = [way for way in attention_ways(device) if wanted(way.name)]
    beside = dict.fromkeys(shape.without_state() for shape in shapes if shape.beside)
    for shape, t in itertools.product(beside, contexts) if ways else ():
        say(f"decode: attention, {_describe(shape)}, {t:,} tokens")
        try:
            caches = Caches(problem, shape, t)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            free(device)
            failed = {"failed": str(error).splitlines()[0]}
            yield {"mode": "decode", "peer": "attention", "t": t, **shape.row(), **failed}
            continue
        for way in ways:
            if not way.folded or shape.hq != shape.h:
                yield from rows(
                    shape, way.name, t, lambda w=way, c=caches: _attention(w, c, effort)
                )
        del caches
        free(device)


def _describe(shape: Shape) -> str:
    tokens = f", {shape.tokens} tokens a step" if shape.tokens > 1 else ""
    return f"b{shape.b} hq{shape.hq} h{shape.h} d{shape.d}{tokens}"


def _sized(problem: Problem, shape: Shape, t: int) -> Problem:
    return dataclasses.replace(problem, b=shape.b, hq=shape.hq, h=shape.h, d=shape.d, t=t)


# ---- retention ----------------------------------------------------------------------------------


def step_bytes(cache: retention.RetentionCache, shape: Shape) -> float:
    """That a step without folds reads and writes, each once, where rings are half full."""
    p = cache.pool
    ring = [x for x in (p.keys, p.values, p.log_gates) if x is not None]
    token = sum(x.nbytes for x in ring) / p.keys.shape[2]  # of all slots
    # New tokens are read, and written to the ring.
    tokens = token * (cache.window / 2 + 2 * shape.tokens)
    outputs = shape.b * shape.tokens * shape.hq * shape.d * cache.dtype.itemsize
    return p.high.nbytes + p.key_sum.nbytes + tokens + 2 * outputs  # as many queries


class Decoder:
    """Caches of one shape, as many as there are layers, which take the same tokens again and
    again."""

    def __init__(self, problem: Problem, shape: Shape):
        self.shape, device = shape, problem.device
        self.problem = _sized(problem, shape, shape.tokens)
        self.prompt = dataclasses.replace(self.problem, t=_PROMPT).inputs()
        new = self.problem.inputs(seed=1)
        # Shorter keys: hundreds of times the same tokens would outweigh the prompt.
        self.new = new._replace(k=new.k / 4)

        def cache(device: str) -> retention.RetentionCache:
            return retention.RetentionCache(
                shape.b,
                shape.h,
                shape.d,
                max_tokens_per_step=shape.tokens,
                dtype=DTYPES[problem.dtype],
                state_dtype=getattr(torch, shape.state),
                gating=problem.gated,
                deg=problem.deg,
                device=device,
            )

        planned = cache("meta")
        self.window, self.nbytes = planned.window, planned.nbytes
        self.bytes = step_bytes(planned, shape)
        count = layers_for(self.bytes, self.nbytes, device)
        self.caches = [cache(device) for _ in range(count)]
        self.slots = torch.arange(shape.b, dtype=torch.int32, device=device)
        self.layers = Layers([self._step(cache) for cache in self.caches], device)

    def _step(self, cache: retention.RetentionCache) -> Callable[[], Tensor]:
        return lambda: cache.step(*self.new, self.slots)

    def start(self, due: bool) -> None:
        """After the prompt, with empty rings. Windows end where the cache has them end, or where
        not ``due``, after as many tokens as they have."""
        first, *others = self.caches
        first.reset()
        for rows in self.slots.split(_PREFILLED):
            some = slice(rows[0].item(), rows[-1].item() + 1)
            first.prefill(*(None if x is None else x[some] for x in self.prompt), rows)
        if not due:
            cursor = pool.unpack(first.pool.cursors)
            phase = (cursor.folded % self.window).int()
            first.pool.cursors.copy_(pool.pack(cursor._replace(phase=phase)))
        for cache in others:
            cache.load_state_dict(first.state_dict())

    def error(self) -> float:
        """Of the last step's output, relative to float64 in the Euclidean norm: of the last slot
        and key head, in the last layer, after all that it has seen."""
        tokens = self.shape.tokens
        seen = self.caches[-1].positions[-1].item()
        steps = (seen - _PROMPT) // tokens
        group = slice(-(self.shape.hq // self.shape.h), None)
        k, v, gates = (
            None
            if old is None
            else torch.cat([old[-1:, :, -1:]] + steps * [new[-1:, :, -1:]], 1).double()
            for old, new in zip(self.prompt[1:], self.new[1:], strict=True)
        )
        q = self.new.q[-1:, :, group].double()
        rows = torch.arange(seen - tokens, seen, device=q.device)
        exact = Retention().expected(self.problem, rows, q, k, v, gates)
        return _relative(self.layers.outputs[-1][-1:, :, group], exact)


def _retention(problem: Problem, shape: Shape, effort: Effort) -> Row:
    decoder = Decoder(problem, shape)
    mean, longest, error = time_with_folds(decoder, effort)
    timing, other = time_without_folds(decoder, effort)
    return {
        **timing.row(),
        "ms with folds": mean,
        "ms longest": longest,
        "share of folds": mean / timing.ms - 1,
        "longest / median": longest / timing.ms,
        "bytes": decoder.bytes,
        "memory": decoder.nbytes,
        "window": decoder.window,
        "layers": decoder.layers.count,
        "error": max(error, other),
    }


def time_with_folds(decoder: Decoder, effort: Effort) -> tuple[float, float, float]:
    """Milliseconds of a step where slots fold when the cache has them fold: the mean over windows,
    in which each folds as often as any other, and the longest; and the error afterwards."""
    layers, window, tokens = decoder.layers, decoder.window, decoder.shape.tokens
    decoder.start(due=True)
    steps = math.lcm(window, tokens) // tokens
    for _ in range(2 * steps):  # the first windows are not whole
        layers.run()
    before = _folded(decoder)
    windows = 1 if effort.least < 5 else _WINDOWS
    rounds = [layers.seconds(steps) for _ in range(windows)]
    if not (_folded(decoder) - before == windows * steps * tokens).all():
        raise RuntimeError("not every slot has folded as often as its windows ended")
    times = [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]
    return statistics.mean(times), max(times), decoder.error()


def _folded(decoder: Decoder) -> Tensor:
    """Tokens in the states of all layers' slots."""
    return torch.stack([cache.positions - cache.lengths for cache in decoder.caches])


def time_without_folds(decoder: Decoder, effort: Effort) -> tuple[Timing, float]:
    """Of a step whose rings are half full, with no window at its end; and the error afterwards."""
    layers, window, tokens = decoder.layers, decoder.window, decoder.shape.tokens
    decoder.start(due=False)
    steps = max(1, min(16, window // 2 // tokens))
    for _ in range((window // 2 - steps * tokens // 2) // tokens):
        layers.run()
    before = _folded(decoder)
    seconds = layers.seconds(steps)
    for _ in range(math.ceil(effort.calls(min(seconds) * layers.count) / steps) - 1):
        for cache in decoder.caches:
            cache.rollback(decoder.slots, steps * tokens)
        seconds += layers.seconds(steps)
    if not (_folded(decoder) == before).all():
        raise RuntimeError("a slot has folded where none was to")
    return Timing.of(seconds, layers.cuda), decoder.error()


# ---- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Attention by a backend, with key heads shared as it shares them or with the query heads of
    one as tokens, which without a mask is the same."""

    backend: SDPBackend
    name: str
    folded: bool = False

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, hq, tokens, d] of q, and of k and v [b, h, t, d]; where heads are tokens, as they
        are: [b, h, hq / h * tokens, d]."""
        h = k.shape[1]
        if self.folded:
            q = q.view(q.shape[0], h, -1, q.shape[3])
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != h)


def attention_ways(device: str) -> list[Way]:
    backends = [*attention_backends(device), (SDPBackend.MATH, "math")]
    return [
        Way(backend, f"attention, {name}{', heads as tokens' if folded else ''}", folded)
        for backend, name in backends
        for folded in (False, True)
    ]


class Caches:
    """Keys and values of a context, for each layer.

    Raises:
        RuntimeError: they do not fit into the device's memory.
    """

    def __init__(self, problem: Problem, shape: Shape, t: int):
        self.problem, self.shape = _sized(problem, shape, t), shape
        dtype, device = DTYPES[problem.dtype], problem.device
        self.nbytes = 2 * shape.b * shape.h * t * shape.d * dtype.itemsize
        count = layers_for(self.nbytes, self.nbytes, device)
        if device.startswith("cuda"):
            free, _ = torch.cuda.mem_get_info()
            if count * self.nbytes > 0.9 * free:
                sizes = f"{count * self.nbytes / 1e9:.1f} of {free / 1e9:.1f} GB that are free"
                raise RuntimeError(f"keys and values do not fit: {sizes}")
        self.q = dataclasses.replace(self.problem, t=shape.tokens).inputs(seed=1).q
        self.q = self.q.transpose(1, 2).contiguous()
        size = (2, shape.b, shape.h, t, shape.d)
        self.caches = [torch.randn(size, dtype=dtype, device=device) for _ in range(count)]
        self.bytes = self.nbytes + 2 * self.q.nbytes

    def error(self, output: Tensor) -> float:
        """As of retention: of the last sequence and key head, in the last layer."""
        h, d = self.shape.h, self.shape.d
        q, output = (x[-1].reshape(h, -1, d)[-1] for x in (self.q, output))
        k, v = self.caches[-1][:, -1, -1].double()
        weights = (q.double() @ k.T * d**-0.5).softmax(-1)
        return _relative(output, weights @ v)


def _attention(way: Way, caches: Caches, effort: Effort) -> Row:
    # There are hundreds of them.
    effort = dataclasses.replace(effort, seconds=effort.seconds / 10)

    def step(cache: Tensor) -> Callable[[], Tensor]:
        return lambda: way.call(caches.q, *cache)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a backend does not take it
        layers = Layers([step(cache) for cache in caches.caches], caches.problem.device)
    first = min(layers.seconds(3)) * layers.count
    timing = Timing.of(layers.seconds(effort.calls(first)), layers.cuda)
    return {
        **timing.row(),
        "bytes": caches.bytes,
        "memory": caches.nbytes,
        "layers": layers.count,
        "error": caches.error(layers.outputs[-1]),
    }


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
