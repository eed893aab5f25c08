"""The command `retention bench`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

import retention
from retention.lm.errors import UsageError

from . import compare, context, decoding, forms, report, served, serving, shapes
from .modes import MODES, Bench
from .problem import DTYPES, Problem
from .timing import QUICK, Effort, measure_ceilings

# Upstream's shape on a GPU, and what a CPU does in two minutes.
_DEFAULTS = {
    "cuda": {"lengths": (65536,), "chunk": 1024, "dtype": "bfloat16", "h": 8},
    "cpu": {"lengths": (1024, 4096, 8192), "chunk": None, "dtype": "float32", "h": 4},
}
_QUICK_LENGTHS = (256, 512)


class Terminated(BaseException):
    """SIGTERM came."""


# What else ends a run early goes on as the exception that it is.
_STOPPED = {KeyboardInterrupt: ("interrupted", 130), Terminated: ("terminated", 143)}


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for, or compare two runs. 1 where a comparison fails, 130 and 143 where
    SIGINT and SIGTERM ended the run early. What was measured until then is kept."""
    start = time.monotonic()
    console = Console(width=None if os.isatty(1) else 140)
    if options.modes[0] == "compare":
        if len(options.modes) != 3:
            raise UsageError("compare: expected two results, OLD and NEW")
        old, new = (compare.read(Path(name)) for name in options.modes[1:])
        return 0 if compare.compare(old, new, console) else 1
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown:
        names = ", ".join([*MODES, "compare"])
        raise UsageError(f"mode: expected some of {names}, got {unknown[0]!r}")
    with contextlib.ExitStack() as stack:
        if "context" in options.modes:
            if options.modes != ["context"] and os.environ.get("WORLD_SIZE", "1") != "1":
                raise UsageError("mode: expected context alone where torchrun starts processes")
            options.device = stack.enter_context(context.processes(_device(options)))
            if not context.is_first():
                console, options.out = Console(file=io.StringIO()), None
        return _measure(_bench(options, console, start), options, console)


def _measure(bench: Bench, options: argparse.Namespace, console: Console) -> int:
    _, missing = bench.peers()
    rows: list[dict[str, Any]] = []
    results = {
        "environment": environment(bench.problem.device, options.commit),
        "ceilings": dataclasses.asdict(bench.ceilings),
        "options": dataclasses.asdict(bench.problem) | {"lengths": bench.lengths},
        "missing": missing,
        "rows": rows,
    }
    try:
        with _sigterm_raises():
            for mode in options.modes:
                for row in MODES[mode](bench):
                    rows.append(row)
                    if options.out is not None:
                        # Nobody can answer SIGKILL, nor any signal while a compiler is busy.
                        report.save(results | {"incomplete": "did not end"}, options.out)
    except BaseException as error:
        reason, code = _STOPPED.get(type(error), (f"{type(error).__name__}: {error}", None))
        _report(results | {"incomplete": reason}, options.out, console)
        if code is None:
            raise
        return code
    _report(results, options.out, console)
    return 0


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM is an exception, as SIGINT is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(results: dict[str, Any], out: Path | None, console: Console) -> None:
    """Files first: a terminal may be gone."""
    written = []
    try:
        if out is not None:
            written = report.write(results, out)
    finally:
        report.print_tables(results, console)
    if written:
        console.print(f"written: {', '.join(str(path) for path in written)}")


def _device(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _bench(options: argparse.Namespace, console: Console, start: float) -> Bench:
    device = _device(options)
    kind = device.split(":")[0]
    if kind not in _DEFAULTS:
        raise UsageError(f"--device: expected cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: there is no CUDA device here")
    defaults = _DEFAULTS[kind]
    h = options.h or defaults["h"]
    hq = options.hq or h
    if hq % h != 0:
        raise UsageError(f"--hq: expected a multiple of --h {h}, got {hq}")
    batches = options.b or (1,)
    others = [mode for mode in options.modes if mode not in ("decode", "serving")]
    if len(batches) > 1 and others:
        raise UsageError(f"--b: expected one number for {others[0]}, got {len(batches)}")
    lengths = options.t or (_QUICK_LENGTHS if options.quick else defaults["lengths"])
    dtype = options.dtype or defaults["dtype"]
    problem = Problem(
        b=batches[0],
        t=max(lengths),
        hq=hq,
        h=h,
        d=options.d or 64,
        deg=options.deg,
        chunk=defaults["chunk"] if options.chunk is None else options.chunk or None,
        dtype=dtype,
        gated=not options.no_gates,
        device=device,
    )
    _check_shapes(options)
    plan = _serving_plan(options, kind)
    if "serving" in options.modes:
        served.check_installed()
        serving.check(plan, problem)
    effort = QUICK if options.quick else Effort(seconds=options.seconds)
    if kind == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)
    ceilings = measure_ceilings(device, DTYPES[dtype], effort)

    def say(text: str) -> None:
        if not options.quiet:
            console.print(f"{time.monotonic() - start:4.0f} s  {text}", style="dim")

    return Bench(
        problem,
        tuple(lengths),
        effort,
        ceilings,
        options.upstream,
        options.upstream_seconds,
        tuple(options.peers),
        shapes.QUICK if options.quick else shapes.PRESETS[kind],
        forms.QUICK if options.quick else forms.PRESETS[kind],
        _shapes(options, problem, kind),
        tuple(lengths) if options.t or options.quick or kind == "cpu" else decoding.CONTEXTS,
        plan,
        say,
    )


def _shapes(options: argparse.Namespace, p: Problem, kind: str) -> tuple[decoding.Shape, ...]:
    """Those of decoding: the usual ones, or where some flag tells of a shape, what all tell."""
    flags = (options.b, options.h, options.hq, options.d, options.tokens, options.state_dtype)
    if not any(flags) and not options.quick:
        return decoding.PRESETS[kind]
    choices = (options.b or (1,), options.tokens or (1,), options.state_dtype or ("float32",))
    return tuple(
        decoding.Shape(b, p.hq, p.h, p.d, tokens, state)
        for b, tokens, state in itertools.product(*choices)
    )


def _check_shapes(options: argparse.Namespace) -> None:
    """Raises UsageError for flags that nobody listens to."""
    if set(options.modes) <= {"shapes", "forms"}:
        for name in ("b", "t", "h", "hq", "d", "chunk"):
            if getattr(options, name) is not None:
                mode = options.modes[0]
                raise UsageError(f"--{name}: {mode} has shapes of its own, and takes no other")


def _serving_plan(options: argparse.Namespace, kind: str) -> serving.Plan:
    """The usual one, but for what flags say. Raises UsageError for flags that nobody listens to."""
    if "serving" not in options.modes:
        for name in ("model", "layers", "memory_gib"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag}: expected the mode serving, got {options.modes[0]}")
    elif set(options.modes) == {"serving"}:
        given = {name: getattr(options, name) for name in ("h", "hq", "d", "chunk", "tokens")}
        given |= {"no-gates": options.no_gates or None, "deg": None if options.deg == 2 else True}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"--{name}: serving takes the shape of --model, and no other")
    quick = {"batches": serving.QUICK_BATCHES, "contexts": _QUICK_LENGTHS} if options.quick else {}
    memory = options.memory_gib
    flags = {
        "model": options.model,
        "layers": options.layers,
        "batches": options.b and tuple(options.b),
        "contexts": options.t and tuple(options.t),
        "states": options.state_dtype and tuple(options.state_dtype),
        "memory": None if memory is None else int(memory * 2**30),
    }
    given = {name: x for name, x in flags.items() if x is not None}
    return dataclasses.replace(serving.PLANS[kind], **{**quick, **given})


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """All that a figure may depend on."""
    about = retention.info()
    index = torch.device(device)
    name = "cpu" if index.type == "cpu" else f"cuda:{index.index or 0}"
    versions = {
        "commit": commit
        or _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
        or "unknown",
        "device": next(x["name"] for x in about["devices"] if x["device"] == name),
        "path": next(x["path"] for x in about["devices"] if x["device"] == name),
        "retention": about["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "compiler": about["build"]["compiler"],
    }
    if index.type == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["toolkit"] = about["build"]["cuda_toolkit"]
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        answer = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        lines = answer.splitlines() or [""]
        values = lines[min(index.index or 0, len(lines) - 1)].split(", ")
        versions |= dict(zip(query.split(","), values, strict=False))
    return versions


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
