"""Times of the decoding kernels alone, on a GPU: `python benchmarks/decode_kernel.py`.

For every shape a CUDA graph has a step of each of several pools, together larger than the L2 cache,
so that each finds its state in memory, as a layer of a model does. A replay over their number is
the time of a step. Without folds it is a median, with rings half full; with folds a mean over all
replays of a window, in which every slot folds once, and beside it the longest. `MB` are those that
a step has to read and write once; `of copy` compares their rate with that of a large copy, read and
written, in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from retention import _C

_LEAST_BYTES = 250e6  # of the states in a graph: five times the L2 cache of an H200
_CURSOR_WORDS = 8  # of 32 bits: start, length, phase, nothing, and two of 64 bits


@dataclass(frozen=True)
class Shape:
    name: str
    b: int
    hq: int
    h: int
    d: int
    tokens: int = 1
    layers: int = 2  # pools, at least

    @property
    def state_dim(self) -> int:
        return _C.state_dim(self.d)

    @property
    def state_bytes(self) -> int:
        """Of the high planes, all that a step reads of states."""
        return 2 * self.b * self.h * self.state_dim * self.d

    @property
    def pools(self) -> int:
        return max(self.layers, -int(-_LEAST_BYTES // self.state_bytes))

    def bytes(self, recent: float) -> float:
        """That a step reads and writes, with so many tokens in each ring."""
        token = 2 * 2 * self.d + 4  # key, value, log gate
        new = self.tokens * (2 * self.h * token + 2 * 2 * self.d * self.hq)
        ring = self.h * recent * token
        return self.state_bytes + self.b * (4 * self.h * self.state_dim + ring + new)


SHAPES = [
    Shape("b256 h8 d64", 256, 8, 8, 64),
    Shape("b32 hq40 h8 d128", 32, 40, 8, 128),
    Shape("b1 h8 d64", 1, 8, 8, 64, layers=32),
    Shape("b1 hq40 h8 d128", 1, 40, 8, 128, layers=32),
    Shape("b8 h8 d64", 8, 8, 8, 64),
    Shape("b64 h8 d64", 64, 8, 8, 64),
    Shape("b64 h8 d64, 8 tokens", 64, 8, 8, 64, tokens=8),
]


class Pool:
    """One layer's memory, and a step of it."""

    def __init__(self, s: Shape, window: int, folds: bool, slice_pairs: int) -> None:
        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, dtype=dtype, device="cuda")

        D = s.state_dim
        ring = window - 1 + s.tokens
        self.folded = 1000 * window  # at first
        self.high = random(s.b, s.h, D, s.d)
        self.low = torch.zeros(s.b, s.h, D, s.d, dtype=torch.int16, device="cuda")
        self.key_sum = random(s.b, s.h, D, dtype=torch.float32).abs_()
        self.keys, self.values = random(s.b, s.h, ring, s.d), random(s.b, s.h, ring, s.d)
        self.log_gates = torch.full((s.b, s.h, ring), -0.01, device="cuda")
        self.cursors = torch.zeros(s.b, _CURSOR_WORDS, dtype=torch.int32, device="cuda")
        self.query = random(s.b, s.tokens, s.hq, s.d)
        self.key, self.value = (random(s.b, s.tokens, s.h, s.d) for _ in range(2))
        self.log_gate = torch.full((s.b, s.tokens, s.h), -0.01, device="cuda")
        self.output = torch.zeros_like(self.query)
        self.slots = torch.randperm(s.b, device="cuda").to(torch.int32)
        self.arrivals = torch.zeros(s.b, s.h + 1, dtype=torch.int32, device="cuda")

        sizes = {
            "element": 0,
            "degree": 2,
            "head_dim": s.d,
            "value_dim": s.d,
            "heads": s.h,
            "slots": s.b,
            "ring": ring,
            "null_slot": -1,
            "cursors_stride": 1,
            "rows": s.b,
            "tokens": s.tokens,
            "query_heads": s.hq,
            "window": window if folds else 0,
            "keep": 0,
            "slice_pairs": slice_pairs,
        }
        for name in ("high", "low", "key_sum", "keys", "values", "log_gates"):
            tensor = getattr(self, name)
            sizes[f"{name}_slot"], sizes[f"{name}_head"] = tensor.stride()[:2]
        for name in ("query", "key", "value", "log_gate"):
            strides = getattr(self, name).stride()[:3]
            for dimension, stride in zip(("batch", "token", "head"), strides, strict=True):
                sizes[f"{name}_{dimension}"] = stride
        self._sizes = tuple(sizes[name] for name in _C.DECODE_STEP_SIZES)
        self._pointers = tuple(
            0 if name == "cu_seqlens" else getattr(self, name).data_ptr()
            for name in _C.DECODE_STEP_POINTERS
        )
        size = _C.decode_step_workspace_size(self._sizes, self._pointers)
        self.workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")

    def set_lengths(self, lengths: Tensor) -> None:
        """Of the rings, [b]; all slots have a state."""
        self.cursors.zero_()
        self.cursors[:, 1] = lengths
        self.cursors.view(torch.int64)[:, 2:] = self.folded

    def step(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _C.decode_step(self._sizes, self._pointers, self.workspace.data_ptr(), stream)


def captured(pools: list[Pool]) -> Callable[[], object]:
    """A graph of a step of each. They run once before, for kernels are loaded then."""
    for pool in pools:
        pool.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pool in pools:
            pool.step()
    return graph.replay


def replay_times(replay: Callable[[], object], count: int) -> list[float]:
    """Microseconds of each of several replays, one after another."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def time_steps(s: Shape, window: int, slice_pairs: int) -> float:
    """Microseconds of a step without folds, rings half full."""
    pools = [Pool(s, window, False, slice_pairs) for _ in range(s.pools)]
    replays = max(1, min(16, window // 2 // s.tokens))
    first = torch.full((s.b,), window // 2 - replays * s.tokens // 2, device="cuda")

    def start() -> None:
        for pool in pools:
            pool.set_lengths(first)

    start()
    replay = captured(pools)
    times = []
    for _ in range(10):
        start()
        times += replay_times(replay, replays)
    for pool in pools:
        if not pool.output.isfinite().all() or not pool.output.any(-1).all():
            raise RuntimeError(f"{s.name}: an output is not a number, or was not written")
        if not (pool.cursors[:, 1] == first + replays * s.tokens).all():
            raise RuntimeError(f"{s.name}: not every token joined its ring")
    return statistics.median(times) / len(pools)


def time_with_folds(s: Shape, window: int, slice_pairs: int) -> tuple[float, float]:
    """Microseconds of a step where slots fold in turns: the mean over a window, and the longest."""
    pools = [Pool(s, window, True, slice_pairs) for _ in range(s.pools)]
    slots = s.b * len(pools)
    replays = window // s.tokens
    # One that has t tokens at first folds in the last of the replays.
    lengths = s.tokens * (1 + torch.arange(slots, device="cuda") * replays // slots)
    order = torch.randperm(slots, device="cuda").reshape(len(pools), s.b)

    def start() -> None:
        for pool, mine in zip(pools, order, strict=True):
            pool.set_lengths(lengths[mine])

    start()
    replay = captured(pools)
    rounds = []
    for _ in range(4):
        start()
        rounds.append(replay_times(replay, replays))
    for pool in pools:
        folded = pool.cursors.view(torch.int64)[:, 2]
        if not (folded == pool.folded + window).all():
            raise RuntimeError(f"{s.name}: not every slot has folded once")
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return statistics.mean(medians) / len(pools), max(medians) / len(pools)


def copy_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = replay_times(lambda: target.copy_(source), 20)
    return 2 * source.numel() / (1e-6 * statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a part of the names of shapes")
    parser.add_argument("--window", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument(
        "--slice-pairs", type=int, nargs="+", default=[0], help="block pairs of a block; 0: chosen"
    )
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device")
    if options.window % max(s.tokens for s in SHAPES) != 0:
        parser.error(f"--window: got {options.window}, expected a multiple of the tokens of a step")
    copy = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s")
    print(
        f"{'shape':<22}{'slice':>6}{'us':>9}{'MB':>9}{'GB/s':>8}{'of copy':>9}"
        f"{'with folds':>12}{'more':>7}{'longest':>9}"
    )
    rows = []
    for s in SHAPES:
        if options.only not in s.name:
            continue
        for slice_pairs in options.slice_pairs:
            step = time_steps(s, options.window, slice_pairs)
            mean, longest = time_with_folds(s, options.window, slice_pairs)
            size = s.bytes(options.window / 2)
            rate = size / (1e-6 * step)
            print(
                f"{s.name:<22}{slice_pairs:>6}{step:>9.2f}{size / 1e6:>9.2f}{rate / 1e9:>8.0f}"
                f"{rate / copy:>9.1%}{mean:>12.2f}{mean / step - 1:>7.1%}{longest:>9.2f}",
                flush=True,
            )
            rows.append(
                {
                    **asdict(s),
                    "window": options.window,
                    "slice_pairs": slice_pairs,
                    "us": step,
                    "bytes": size,
                    "copy_bytes_per_s": copy,
                    "us_with_folds": mean,
                    "us_longest": longest,
                }
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
