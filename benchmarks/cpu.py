"""Power retention against scaled_dot_product_attention on the CPU: time and memory by length.

    python benchmarks/cpu.py --lengths 1024 4096 16384 65536 --out benchmarks/results/cpu.json

Every measurement runs in a process of its own, so that the peak of its memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import retention

KINDS = ("retention", "sdpa")
MODES = ("fwd", "fwd+bwd")


def inputs(kind: str, t: int, h: int, d: int, grad: bool) -> list[torch.Tensor]:
    """Q, K, V and, for retention, log gates: [1, t, h, d], or [1, h, t, d] as SDPA takes them."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, t, h, d) if kind == "retention" else (1, h, t, d)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    if kind == "retention":
        tensors.append(F.logsigmoid(torch.randn(1, t, h, generator=generator) + 4))
    return [x.requires_grad_(grad) for x in tensors]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(kind: str, mode: str, t: int, h: int, d: int, repeats: int) -> dict[str, float]:
    """Seconds (the best of the repeats) and bytes beyond the inputs."""
    # What is allocated once for all, and is none of the function's doing.
    run(kind, inputs(kind, 64, h, d, mode != "fwd"), mode)
    tensors = inputs(kind, t, h, d, mode != "fwd")
    before = peak_bytes()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(kind, tensors, mode)
        seconds.append(time.perf_counter() - start)
        for x in tensors:
            x.grad = None
    return {"seconds": min(seconds), "worst": max(seconds), "bytes": peak_bytes() - before}


def run(kind: str, tensors: list[torch.Tensor], mode: str) -> None:
    if kind == "retention":
        out = retention.power_retention(*tensors)
    else:
        out = F.scaled_dot_product_attention(*tensors, is_causal=True)
    if mode != "fwd":
        out.backward(torch.ones_like(out))


def in_own_process(**options) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps(options)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def environment() -> dict[str, str | int]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "commit": commit or "unknown",
        "device": retention.info()["devices"][0]["name"],
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count() or 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "retention": retention.info()["version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return

    print(f"b1 h{args.heads} d{args.head_dim} float32, retention gated; {environment()}")
    print(f"{'t':>8} {'mode':>8} {'retention':>11} {'sdpa':>11} {'ratio':>7} {'extra memory':>14}")
    rows = []
    for t in args.lengths:
        for mode in MODES:
            row = {"t": t, "mode": mode}
            for kind in KINDS:
                options = {"h": args.heads, "d": args.head_dim, "repeats": args.repeats}
                row[kind] = in_own_process(kind=kind, mode=mode, t=t, **options)
            ours, theirs = row["retention"], row["sdpa"]
            print(
                f"{t:>8} {mode:>8} {ours['seconds']:>9.3f} s {theirs['seconds']:>9.3f} s "
                f"{theirs['seconds'] / ours['seconds']:>6.2f}x {ours['bytes'] / 1e6:>11.0f} MB",
                flush=True,
            )
            rows.append(row)
    if args.out:
        results = {"environment": environment(), "arguments": vars(args) | {"out": None}}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
