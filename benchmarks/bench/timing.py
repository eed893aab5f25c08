"""Times and their ceilings. Imports no retention: see the package's docstring.

On a GPU a call is a CUDA graph, replayed after the L2 cache was overwritten; on a CPU it is called
again and again. A time is the median, with the quartiles as its spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of ``calls``, and the quartiles around it."""

    ms: float
    low: float
    high: float
    calls: int
    graph: bool  # whether a CUDA graph was replayed

    @classmethod
    def of(cls, seconds: list[float], graph: bool) -> Timing:
        low, median, high = statistics.quantiles([1e3 * s for s in seconds], n=4)
        return cls(median, low, high, len(seconds), graph)

    def row(self) -> dict[str, float | int | bool]:
        return asdict(self)


@dataclass(frozen=True)
class Effort:
    """How often a call is repeated: for so many seconds, within bounds."""

    seconds: float = 2.0
    least: int = 5
    most: int = 100

    def calls(self, seconds_each: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(seconds_each, 1e-7))))


QUICK = Effort(seconds=0.1, least=3, most=10)


def time_call(call: Call, device: str, effort: Effort, graph: bool = True) -> Timing:
    """How long a call takes, after one that is not counted."""
    if not device.startswith("cuda"):
        return _time_on_cpu(call, effort)
    call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    return _time_on_cuda(call, effort, graph)


def _time_on_cpu(call: Call, effort: Effort) -> Timing:
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(effort.calls(first)):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds, graph=False)


def _time_on_cuda(call: Call, effort: Effort, graph: bool) -> Timing:
    # Twice the cache, and a while for which the host can run ahead.
    cache = torch.cuda.get_device_properties().L2_cache_size
    flush = torch.empty(max(2 * cache, 2**28), dtype=torch.uint8, device="cuda")

    def seconds(calls: int) -> list[float]:
        events = []
        for _ in range(calls):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    first = min(seconds(3))
    return Timing.of(seconds(effort.calls(first)), graph)


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured."""

    tflops: float  # of a large product
    tbytes: float  # of a large copy, read and written

    def seconds(self, flops: float, memory: float) -> float:
        return max(flops / self.tflops, memory / self.tbytes) / 1e12


def measure_ceilings(device: str, dtype: torch.dtype, effort: Effort) -> Ceilings:
    """With a product in the dtype of the inputs, of 8192 rows on a GPU and 1024 on a CPU."""
    cuda = device.startswith("cuda")
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device, effort)
    x = torch.empty(2**30 if cuda else 2**26, dtype=torch.uint8, device=device).fill_(1)
    y = torch.empty_like(x)
    copy = time_call(lambda: y.copy_(x), device, effort, graph=False)  # a graph uses a copy engine
    return Ceilings(2 * n**3 / product.ms / 1e9, 2 * x.nbytes / copy.ms / 1e9)
