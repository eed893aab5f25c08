"""What each mode measures: rows of names and numbers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import multiprocessing
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import retention
from retention import _C
from retention.ops.cuda import coverage, launch

from . import context, decoding, forms, serving
from .peers import Attention, Peer, Retention, Upstream, all_peers
from .problem import Problem, Work
from .shapes import PASSES, Shape, name_of
from .timing import Ceilings, Effort, Timing

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is asked for: a problem of every length, measured with so much effort."""

    problem: Problem
    lengths: tuple[int, ...]
    effort: Effort
    ceilings: Ceilings
    upstream: Path | None = None
    upstream_seconds: float = 300.0
    only: tuple[str, ...] = ()  # names of peers, or how they begin; all of them where empty
    call_shapes: tuple[Shape, ...] = ()  # of the mode `shapes`
    heads: tuple[forms.Heads, ...] = ()  # of the mode `forms`
    shapes: tuple[decoding.Shape, ...] = ()  # of decoding, and its contexts
    contexts: tuple[int, ...] = ()
    serving: serving.Plan = dataclasses.field(default_factory=lambda: serving.Plan())
    say: Callable[[str], None] = print

    def problems(self) -> Iterator[Problem]:
        for t in self.lengths:
            yield dataclasses.replace(self.problem, t=t)

    def peers(self) -> tuple[list[Peer], dict[str, str]]:
        """Those that can run here, and why the others cannot."""
        known = all_peers(self.problem.device, self.upstream, self.upstream_seconds)
        names = {peer.name for peer in known}
        wanted = [peer for peer in known if self.is_wanted(peer.name, names)]
        reasons = {peer.name: peer.missing(self.problem) for peer in wanted}
        missing = {name: reason for name, reason in reasons.items() if reason is not None}
        return [peer for peer in wanted if peer.name not in missing], missing

    def is_wanted(self, name: str, names: set[str]) -> bool:
        """Whether it was asked for, or one that none of the names is and it begins with."""
        return not self.only or any(
            name == given or (given not in names and name.startswith(given)) for given in self.only
        )


# ---- passes -------------------------------------------------------------------------------------


def forward(bench: Bench) -> Iterator[Row]:
    yield from _passes(bench, "fwd")


def forward_and_backward(bench: Bench) -> Iterator[Row]:
    yield from _passes(bench, "fwd+bwd")


def backward(bench: Bench) -> Iterator[Row]:
    """What forward and backward together take beyond forward, both measured."""
    yield from _passes(bench, "bwd")


def _passes(bench: Bench, mode: str) -> Iterator[Row]:
    peers, _ = bench.peers()
    for peer in peers:
        for problem in bench.problems():
            bench.say(f"{mode}: {peer.name}, {problem.t:,} tokens")
            row = {"mode": mode, "peer": peer.name, "note": peer.note, "t": problem.t}
            yield {**row, **_measured(bench, peer, problem, mode)}


def shapes(bench: Bench) -> Iterator[Row]:
    """Forward and both passes of the usual shapes, of retention and of attention."""
    peers, _ = bench.peers()
    for shape in bench.call_shapes:
        problem = shape.of(bench.problem)
        for pass_ in PASSES:
            for peer in peers:
                if peer.name == "retention" or isinstance(peer, Attention):
                    row = {"mode": "shapes", "peer": peer.name, "pass": pass_, **shape._asdict()}
                    bench.say(f"shapes: {peer.name}, {name_of(row)}, {pass_}")
                    yield {**row, **_measured(bench, peer, problem, pass_)}


def of_forms(bench: Bench) -> Iterator[Row]:
    """The quadratic form and chunks, at lengths around the one where the library changes."""
    peer = Retention()
    for heads, pass_ in itertools.product(bench.heads, forms.PASSES):

        def chunk_of(t: int, heads: forms.Heads = heads, pass_: str = pass_) -> int:
            return peer.with_chunk(heads.of(bench.problem, t, None), pass_ == "bwd").chunk

        choice = forms.Choice.of(chunk_of)
        for t, form in itertools.product(choice.lengths(), forms.FORMS):
            chunk = choice.chunk if form == "chunks" else t
            row = {"mode": "forms", "peer": peer.name, "pass": pass_, **heads._asdict(), "t": t}
            row |= {"form": form, "chunk": chunk, "until": choice.until}
            bench.say(f"forms: {pass_}, {forms.shape_of(row)}, {t:,} tokens, {form}")
            problem = heads.of(bench.problem, t, chunk)
            yield {**row, **_measured(bench, peer, problem, pass_)}


def _measured(bench: Bench, peer: Peer, problem: Problem, mode: str) -> Row:
    """The time of a pass, the shares that it reaches, and errors; or why there are none."""
    try:
        timing = _time(peer, problem, mode, bench.effort)
        errors = peer.errors(problem, mode != "fwd")
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # One that has no room for this length has some for the others.
        return _failure(error)
    finally:
        _free(problem.device)
    return {**timing.row(), **_shares(bench, peer, problem, mode, timing), **errors}


def _failure(error: Exception) -> Row:
    return {"failed": str(error).splitlines()[0]}


def _time(peer: Peer, problem: Problem, mode: str, effort: Effort) -> Timing:
    if mode != "bwd":
        return peer.time(problem, mode != "fwd", effort)
    alone, both = (peer.time(problem, backward, effort) for backward in (False, True))
    return Timing(
        both.ms - alone.ms, both.low - alone.high, both.high - alone.low, both.calls, both.graph
    )


def _shares(bench: Bench, peer: Peer, problem: Problem, mode: str, timing: Timing) -> Row:
    """Rates, and of the time the share that the ceilings ask for exact work."""
    seconds = timing.ms / 1e3
    exact, done = (work(problem, mode != "fwd") for work in (peer.exact_work, peer.done_work))
    if mode == "bwd":
        exact, done = (
            Work(both.flops - alone.flops, both.bytes - alone.bytes)
            for both, alone in (
                (exact, peer.exact_work(problem, False)),
                (done, peer.done_work(problem, False)),
            )
        )
    row = {"tokens/s": problem.b * problem.t / seconds, "tflops": done.flops / seconds / 1e12}
    row["share of ceiling"] = row["tflops"] / bench.ceilings.tflops
    row["share of floor"] = bench.ceilings.seconds(*exact) / seconds
    return row


# ---- decoding -----------------------------------------------------------------------------------


def decode(bench: Bench) -> Iterator[Row]:
    """Steps of a cache of every shape, and of attention beside them after every context."""
    names = {"retention", *(way.name for way in decoding.attention_ways(bench.problem.device))}
    yield from decoding.measure(
        bench.problem,
        bench.shapes,
        bench.contexts,
        bench.effort,
        bench.ceilings,
        lambda name: bench.is_wanted(name, names),
        bench.say,
        _free,
    )


def served(bench: Bench) -> Iterator[Row]:
    """A whole model's steps and first tokens, and those of softmax attention beside them."""
    ways = serving.softmax_ways(bench.problem.device)
    names = {serving.RETENTION, *(way.name for way in ways)}
    yield from serving.measure(
        bench.serving,
        bench.problem,
        bench.ceilings,
        bench.effort,
        lambda name: bench.is_wanted(name, names),
        bench.say,
        _free,
    )


# ---- several processes --------------------------------------------------------------------------


def several(bench: Bench) -> Iterator[Row]:
    """One sequence over as many processes as there are."""
    names = {"retention", context.RING}
    yield from context.measure(
        bench.problem,
        bench.lengths,
        bench.effort,
        lambda name: bench.is_wanted(name, names),
        bench.say,
        _free,
    )


# ---- parts --------------------------------------------------------------------------------------


def components(bench: Bench) -> Iterator[Row]:
    """Every kernel of a forward and backward, or on a CPU every PyTorch operation, alone."""
    cuda = bench.problem.device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity
    calls = 1 if bench.effort.least < 5 else 5
    for problem in bench.problems():
        bench.say(f"components: {problem.t:,} tokens")
        step = Retention().step(problem, backward=True)
        step()
        with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as seen:
            for _ in range(calls):
                step()
            if cuda:
                torch.cuda.synchronize()
        times: dict[str, float] = {}
        for event in seen.key_averages():
            name = part_name(event.key)
            micro = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[name] = times.get(name, 0.0) + micro / calls / 1e3
        whole = sum(times.values())
        for name, ms in sorted(times.items(), key=lambda item: -item[1]):
            if ms >= 0.005 * whole:
                yield {
                    "mode": "components",
                    "peer": "retention",
                    "t": problem.t,
                    "part": name,
                    "ms": ms,
                    "share": ms / whole,
                }
        _free(problem.device)


def part_name(name: str) -> str:
    """Of a kernel of this library its own, of anything else what it is called."""
    kernel = re.search(r"retention::kernel::(\w+)", name)
    if kernel is None:
        return name
    return kernel[1] + (" backwards" if "retention::kernel::Direction)1" in name else "")


# ---- memory -------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Row]:
    """Bytes beyond the inputs, at the most, results included."""
    peers, _ = bench.peers()
    for peer in peers:
        if isinstance(peer, Upstream):
            continue  # its allocator is another process's
        for problem in bench.problems():
            for mode, both in (("fwd", False), ("fwd+bwd", True)):
                bench.say(f"memory: {peer.name}, {mode}, {problem.t:,} tokens")
                row = {"mode": "memory", "peer": peer.name, "t": problem.t, "pass": mode}
                try:
                    peak = {"bytes": _peak(peer.name, problem, both)}
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    peak = _failure(error)
                yield {**row, **peak}


def _peak(name: str, problem: Problem, both: bool) -> int:
    if not problem.device.startswith("cuda"):
        # The peak of a process's memory is for good: each has one of its own.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak_of_process, (name, problem, both))
    step = _peer(name, problem).step(problem, both)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    _free(problem.device)
    return peak


def _peak_of_process(name: str, problem: Problem, both: bool) -> int:
    peer = _peer(name, problem)
    # What is allocated once for all is none of the call's doing.
    peer.step(dataclasses.replace(problem, t=64), both)()
    step = peer.step(problem, both)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free there would be taken again, unseen
    before = _process_bytes("VmRSS")
    with contextlib.suppress(OSError):  # Linux: the peak from here on
        Path("/proc/self/clear_refs").write_text("5")
    step()
    return max(0, _process_bytes("VmHWM") - before)


def _process_bytes(name: str) -> int:
    """Of this process's memory; where Linux's own numbers are not to be had, its peak so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peer(name: str, problem: Problem) -> Peer:
    return next(peer for peer in all_peers(problem.device, None) if peer.name == name)


# ---- the host -----------------------------------------------------------------------------------


def host(bench: Bench) -> Iterator[Row]:
    """Microseconds of a call of few tokens on the host, and of those how many before the launch."""
    problem = dataclasses.replace(bench.problem, b=1, t=64)
    bench.say("host: calls of 64 tokens")
    cuda = problem.device.startswith("cuda")
    inputs = problem.inputs()
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    operands = (None, None, None, problem.deg, None, None, False, False, False)
    calls = {
        "power_retention": lambda: retention.power_retention(*inputs),
        "the operator": lambda: torch.ops.retention.forward(*inputs, *operands),
        "the operator, recorded": lambda: torch.ops.retention.forward(*leaves, *operands),
    }
    for name, call in calls.items():
        row = {"mode": "host", "peer": "retention", "t": problem.t, "part": name}
        row["us"] = _host_microseconds(call, cuda, bench.effort)
        if cuda and coverage.cover(inputs.q, inputs.v, problem.deg):
            saved = launch._C
            launch._C = SimpleNamespace(forward=lambda *arguments: None)
            try:
                row["us before the launch"] = _host_microseconds(call, cuda, bench.effort)
            finally:
                launch._C = saved
        yield row


def _host_microseconds(call: Callable[[], Any], cuda: bool, effort: Effort) -> float:
    """The best of many short series: what else the machine does is left out."""
    calls = 50 if cuda else 5
    best = float("inf")
    for _ in range(effort.most):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


# ---- the build ----------------------------------------------------------------------------------


def build(bench: Bench) -> Iterator[Row]:
    """Bytes of what is installed, and the table of what the kernels use where there are any."""
    package = Path(retention.__file__).parent
    for path in [Path(_C.__file__), *sorted((Path(_C.__file__).parent / "lib").glob("lib*"))]:
        if path.is_file():
            yield {"mode": "build", "peer": "retention", "part": path.name, "bytes": _size(path)}
    table = package / "bench" / "resource_table.py"
    libraries = [str(x) for x in (Path(_C.__file__).parent / "lib").glob("libretention.*")]
    if _C.build_info()["kernels"] and libraries and table.exists():
        bench.say("build: reading the kernels")
        done = subprocess.run(
            [sys.executable, str(table), *libraries], capture_output=True, text=True, check=False
        )
        print(done.stdout or done.stderr)


def _size(path: Path) -> int:
    return path.resolve().stat().st_size


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


MODES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "fwd": forward,
    "bwd": backward,
    "fwd+bwd": forward_and_backward,
    "shapes": shapes,
    "forms": of_forms,
    "decode": decode,
    "serving": served,
    "context": several,
    "components": components,
    "memory": memory,
    "host": host,
    "build": build,
}
