"""One sequence over several processes: what torchrun starts, or this one alone.

    torchrun --nproc-per-node 4 -m -- retention bench context --t 1048576 --out results

measures on 1, 2 and 4 of them, and PyTorch's ring attention on all. Calls come as layers of a model
do, several before any is waited for; a time is one call's part of what they take on the slowest
process. What communication costs is the time beyond that of the same call with a copy in
the collective's place; how much of it other work hides follows from the time of the collective
alone.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import retention
from retention.lm.errors import UsageError
from retention.ops import exchange

from .problem import DTYPES, Problem
from .timing import Effort, Timing

Row = dict[str, Any]
Call = Callable[[], Any]

RING = "ring attention"
LAYERS, SECONDS_QUEUED = 8, 0.2


@contextlib.contextmanager
def processes(device: str) -> Iterator[str]:
    """Within, those that torchrun started know each other; gives the device of this one."""
    cuda = device.startswith("cuda")
    if cuda and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            store = (Path(folder) / "store").as_uri()
            dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        try:
            yield device
        finally:
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that says and writes what was measured."""
    return os.environ.get("RANK", "0") == "0"


def measure(
    problem: Problem,
    lengths: tuple[int, ...],
    effort: Effort,
    wanted: Callable[[str], bool],
    say: Callable[[str], None],
    free: Callable[[str], None],
) -> Iterator[Row]:
    """Of every length, both passes on 1, 2, 4, .. processes: of the same whole row, and of rows
    that grow with the processes. Rows are complete on the first process alone."""
    world = dist.get_world_size()
    if problem.t < world:
        raise UsageError(f"--t: expected at least {world} tokens, one for each process")
    numbers = sorted({2**i for i in range(world.bit_length()) if 2**i <= world} | {world})
    groups = {n: dist.new_group(range(n)) for n in numbers}
    own = numbers if wanted("retention") else []
    for t in lengths:
        for pass_ in ("fwd", "fwd+bwd"):
            # Fewer processes first: others are compared with them.
            pairs = {(n, tokens) for n in own for tokens in (t, t * n // world)}
            calls: dict[tuple[int, int], Row | None] = dict.fromkeys(sorted(pairs))
            for n, tokens in calls:
                say(f"context, {pass_}: {n} of {world} processes, {tokens:,} tokens")
                row = None
                if dist.get_rank() < n:
                    row = _row(problem, tokens, n, pass_ != "fwd", effort, groups[n])
                free(problem.device)
                dist.barrier()
                calls[n, tokens] = row
                if is_first():
                    base = {"mode": "context", "peer": "retention", "pass": pass_}
                    yield base | row | _scaling(calls, n, tokens, t, world)
            if wanted(RING) and problem.device.startswith("cuda") and world > 1:
                say(f"context, {pass_}: {RING}, {world} processes, {t:,} tokens")
                row = _ring(problem, t, pass_ != "fwd", effort, groups[world])
                free(problem.device)
                if is_first():
                    yield {"mode": "context", "peer": RING, "pass": pass_, "ranks": world} | row


def _scaling(
    calls: dict[tuple[int, int], Row | None], n: int, tokens: int, t: int, world: int
) -> Row:
    """How many times as fast as one process with all of the row, and which part of a process's
    speed is left where each has as many tokens."""
    own, whole, alone = (calls.get(key) or {} for key in ((n, tokens), (1, t), (1, t // world)))
    found = {}
    if tokens == t and "ms" in own and "ms" in whole:
        found["speed-up"] = whole["ms"] / own["ms"]
    if tokens == t * n // world and "ms" in own and "ms" in alone:
        found["share of one alone"] = alone["ms"] / own["ms"]
    return found


def _row(p: Problem, tokens: int, n: int, backward: bool, effort: Effort, group: Any) -> Row:
    rank = dist.get_rank(group)
    row: Row = {"ranks": n, "t": tokens}
    start, stop = tokens * rank // n, tokens * (rank + 1) // n
    share = Problem(**{**vars(p), "t": stop - start})
    step = _step_that_fits(share, backward, group)
    if step is None:
        return row | {"failed": "out of memory"}
    timing = _slowest(step, p.device, effort, group)
    with _without_exchange():
        without = _slowest(step, p.device, effort, group)
    alone = _slowest(_exchanges(share, backward, group), p.device, effort, group)
    exposed = max(0.0, timing.ms - without.ms)
    row |= timing.row()
    row |= {"tokens/s": p.b * tokens / timing.ms * 1e3, "ms of exchange": alone.ms}
    row |= {"share exposed": exposed / timing.ms}
    if n > 1:
        row["share hidden"] = max(0.0, 1 - exposed / alone.ms)
    return row


def _ring(p: Problem, tokens: int, backward: bool, effort: Effort, group: Any) -> Row:
    """PyTorch's attention over shares that go round: flash attention of each with each. It needs
    shares of two equal halves, and as many key heads as query heads."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens -= tokens % (2 * dist.get_world_size(group))
    shape = (p.b, p.hq, tokens, p.d)
    tensors = [torch.randn(shape, device=p.device, dtype=DTYPES[p.dtype]) for _ in range(3)]
    options = {"buffers": tensors, "buffer_seq_dims": [2] * 3}
    mesh = DeviceMesh.from_group(group, p.device.split(":")[0])
    try:
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        with flash, context_parallel(mesh, **options, no_restore_buffers=set(tensors)):
            leaves = [x.requires_grad_(backward) for x in tensors]
            gradient = torch.randn_like(tensors[0]) if backward else None

            def step() -> None:
                out = F.scaled_dot_product_attention(*leaves, is_causal=True)
                if backward:
                    torch.autograd.grad(out, leaves, gradient)

            timing = _slowest(step, p.device, effort, group)
    except (RuntimeError, NotImplementedError) as error:
        return {"t": tokens, "failed": str(error).splitlines()[0]}
    return {"t": tokens, **timing.row(), "tokens/s": p.b * tokens / timing.ms * 1e3}


def _step(p: Problem, backward: bool, group: Any) -> Call:
    inputs = p.inputs(seed=dist.get_rank(group))
    leaves = [x.requires_grad_(backward) for x in inputs if x is not None]
    gradient = torch.randn_like(inputs.q) if backward else None

    def step() -> None:
        out = retention.distributed.power_retention(
            *inputs, deg=p.deg, chunk_size=p.chunk, group=group
        )
        if backward:
            torch.autograd.grad(out, leaves, gradient)

    return step


def _step_that_fits(p: Problem, backward: bool, group: Any) -> Call | None:
    """A step, tried once without its collectives, so that nobody waits for a process that has no
    memory for it; None on all where one has none."""
    step = None
    try:
        with _without_exchange():
            step = _step(p, backward, group)
            step()
    except torch.OutOfMemoryError:
        step = None
    fits = torch.tensor(float(step is not None), device=p.device)
    dist.all_reduce(fits, dist.ReduceOp.MIN, group=group)
    return step if fits else None


def _exchanges(p: Problem, backward: bool, group: Any) -> Call:
    """The collectives of a step, one after another, and nothing else."""
    place = exchange.Place(group.group_name, group.rank(), group.size())
    D = retention.state_dim(p.d, p.deg)
    state, keys = (torch.zeros(p.b, p.h, D, *x, device=p.device) for x in ((p.d,), ()))
    gates = torch.zeros(p.b, p.h, device=p.device)

    def step() -> None:
        exchange.Gathering(place, [state, keys], [gates], state.dtype).wait()
        if backward:
            exchange.Gathering(place, [state, keys], [], state.dtype).wait()

    return step


@contextlib.contextmanager
def _without_exchange() -> Iterator[None]:
    """Within, a process gets its own states in the others' places."""
    plain = exchange._all_gather

    def copies(received: torch.Tensor, sent: torch.Tensor, **_: Any) -> Any:
        received.view(-1, sent.numel()).copy_(sent)
        return SimpleNamespace(wait=lambda: None)

    exchange._all_gather = copies
    try:
        yield
    finally:
        exchange._all_gather = plain


def _slowest(call: Call, device: str, effort: Effort, group: Any) -> Timing:
    """As `timing.time_call`, of processes that make as many calls, from the same moment on: on
    GPUs `LAYERS` one after the other, or as many as `SECONDS_QUEUED` has."""
    cuda = device.startswith("cuda")

    def seconds(queued: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        dist.barrier(group)
        start = time.perf_counter()
        for _ in range(queued):
            call()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / queued

    def largest(values: list[float]) -> list[float]:
        every = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(every, dist.ReduceOp.MAX, group=group)
        return every.tolist()

    first = largest([min(seconds(1) for _ in range(2))])[0]
    queued = max(1, min(LAYERS, int(SECONDS_QUEUED / first))) if cuda else 1
    times = largest([seconds(queued) for _ in range(effort.calls(queued * first))])
    low, median, high = statistics.quantiles([1e3 * x for x in times], n=4)
    return Timing(median, low, high, len(times), graph=False)
