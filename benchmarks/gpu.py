"""The forward pass, or with `--training` forward and backward, on a CUDA device: time by chunk size
and kernel, as a share of the device's own ceilings, which are measured in the same run.

    python benchmarks/gpu.py --out benchmarks/results/h200/d64.json
    python benchmarks/gpu.py --training --out benchmarks/results/h200/d64_training.json

Times are medians of CUDA graph replays with the L2 cache flushed before each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import retention
from retention import _C

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def time_graph(function: Callable[[], Any], repeats: int = 30) -> dict[str, float]:
    """Milliseconds of a call, replayed as a CUDA graph: the median, and the spread of the middle
    half."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return time_call(graph.replay, repeats)


def time_call(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "spread": high - low}


def time_kernels(function: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Milliseconds that each kernel of a call takes, by the kernel's name."""
    function()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times = {}
    for event in profile.key_averages():
        if "retention" in event.key:
            name = event.key.split("retention::kernel::")[-1].split("<")[0].split(">")[0]
            times[name] = event.self_device_time_total / repeats / 1e3
    return times


def ceilings() -> dict[str, float]:
    """What the device does at best: TFLOP/s of a large bf16 product, TB/s of a large copy."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = time_graph(lambda: a @ b)["ms"]
    x = torch.randn(2**30, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    copy = time_call(lambda: y.copy_(x), repeats=10)["ms"]  # a graph would use a copy engine
    return {"tflops": 2 * n**3 / product / 1e9, "tbytes": 2 * x.nbytes / copy / 1e9}


def flops(
    b: int, t: int, hq: int, h: int, d: int, dv: int, chunk: int, training: bool = False
) -> float:
    """Multiplications and additions: states updated and read with D rows, and causal chunks.

    Backward has one product with the state for dQ and dS each, and for the states once more, dK and
    dV; within a chunk two for the weights and their gradients, and three for dQ, dK and dV.
    """
    D = d * (d + 8) // 2
    chunk = min(chunk, t)
    pairs = (t // chunk) * chunk * (chunk + 1) / 2
    rest = t % chunk
    pairs += rest * (rest + 1) / 2
    state = 2 * D * dv * t * (h + hq)
    chunks = 2 * (d + dv) * pairs * hq
    if training:
        state += 2 * D * dv * t * (3 * h + 2 * hq)
        chunks += 2 * (3 * d + 2 * dv) * pairs * hq
    return b * (chunks if chunk == t else state + chunks)


def inputs(args: argparse.Namespace, t: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    b, d = args.batch, args.head_dim
    Q, K, V = (normal(b, t, n, d).to(dtype) for n in (args.query_heads, args.heads, args.heads))
    return [Q, K, V, F.logsigmoid(normal(b, t, args.heads) + 6)]


def error(args: argparse.Namespace, tensors: list[Tensor], out: Tensor) -> float:
    """Relative to float64 in the Euclidean norm, on the first tokens of one head."""
    t = min(2048, tensors[0].shape[1])
    Q, K, V, log_G = (x[:1, :t, -1:].double() for x in tensors)
    expected = retention.reference(Q, K, V, log_G)
    actual = out[:1, :t, -1:].double()
    return ((actual - expected).norm() / expected.norm()).item()


def training_step(tensors: list[Tensor], chunk: int | None) -> Callable[[], Any]:
    """Forward and backward as operators, which a CUDA graph can capture."""
    d_out = torch.randn_like(tensors[0])
    options = (2, chunk, None)

    def step() -> Any:
        out, norm, _, _, residual, kept = torch.ops.retention.forward(
            *tensors, None, None, None, *options, False, True, False
        )
        return torch.ops.retention.backward(
            d_out, None, None, *tensors, None, None, None, out, residual, kept, norm, *options
        )

    return step


def gradient_errors(args: argparse.Namespace, tensors: list[Tensor]) -> dict[str, float]:
    """Relative to float64 in the Euclidean norm, for the first tokens of one head."""
    t = min(2048, tensors[0].shape[1])
    part = [x[:1, :t, -1:].contiguous() for x in tensors]
    d_out = torch.randn_like(part[2])

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in part]
        out = function(*leaves)
        return list(torch.autograd.grad(out, leaves, d_out.to(out.dtype)))

    expected = gradients(retention.reference, torch.float64)
    actual = gradients(lambda *x: retention.power_retention(*x, chunk_size=128), None)
    names = ("dQ", "dK", "dV", "d_log_G")
    return {
        name: ((x.double() - y).norm() / y.norm()).item()
        for name, x, y in zip(names, actual, expected, strict=True)
    }


def peak_bytes(function: Callable[[], Any]) -> int:
    """What a call allocates at most, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    build = _C.build_info()
    return {
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "toolkit": str(build["cuda_toolkit"]),
        "retention": retention.info()["version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--query-heads", type=int, default=None)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--sdpa", action="store_true", help="measure attention too")
    parser.add_argument("--commit", help="of the build, where there is no repository")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    args.query_heads = args.query_heads or args.heads
    dtype = DTYPES[args.dtype]

    about = environment() | ({"commit": args.commit} if args.commit else {})
    best = ceilings()
    print(about)
    print(f"ceilings: {best['tflops']:.0f} TFLOP/s (bf16 8192^3), {best['tbytes']:.2f} TB/s (copy)")
    print(f"b{args.batch} hq{args.query_heads} h{args.heads} d{args.head_dim} {args.dtype}, gated")
    print(f"{'t':>8} {'chunk':>6} {'ms':>9} {'spread':>7} {'TFLOP/s':>8} {'share':>6} {'error':>8}")
    rows = []
    for t in args.lengths:
        tensors = inputs(args, t, dtype)
        for chunk in [None, *(c for c in args.chunks if c <= t)]:

            def call(tensors=tensors, chunk=chunk):
                return retention.power_retention(*tensors, chunk_size=chunk)

            with torch.no_grad():
                timed = training_step(tensors, chunk) if args.training else call
                row = {"t": t, "chunk": chunk, **time_graph(timed)}
                row["error"] = error(args, tensors, call())
                row["kernels"] = time_kernels(timed)
                row["bytes"] = peak_bytes(timed)
            shape = (args.batch, t, args.query_heads, args.heads, args.head_dim, args.head_dim)
            # What is chosen is known to the library alone.
            rate = flops(*shape, chunk, args.training) / row["ms"] / 1e9 if chunk else None
            row |= {"tflops": rate, "share": rate and rate / best["tflops"]}
            known = f"{rate:>8.0f} {row['share']:>6.1%}" if rate else f"{'':>15}"
            print(
                f"{t:>8} {chunk or 'auto':>6} {row['ms']:>9.4f} {row['spread']:>7.4f} {known} "
                f"{row['error']:>8.1e} {row['bytes'] / 2**20:>7.0f} MiB  "
                + ", ".join(f"{name} {ms:.4f}" for name, ms in row["kernels"].items()),
                flush=True,
            )
            rows.append(row)
        if args.training:
            row = {"t": t, "gradient_errors": gradient_errors(args, tensors)}
            print(row)
            rows.append(row)
        if args.sdpa:
            Q, K, V = (x.transpose(1, 2).contiguous() for x in tensors[:3])
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                leaves = [x.detach().requires_grad_(args.training) for x in (Q, K, V)]

                def attend(leaves=leaves):
                    Q, K, V = leaves
                    grouped = Q.shape[1] != K.shape[1]
                    out = F.scaled_dot_product_attention(
                        Q, K, V, is_causal=True, enable_gqa=grouped
                    )
                    return torch.autograd.grad(out, leaves, out) if args.training else out

                with sdpa_kernel(backend):
                    time = time_graph(attend, repeats=7)
                print(f"{t:>8} {backend.name.lower()}: {time['ms']:.4f} ms", flush=True)
                rows.append({"t": t, "sdpa": backend.name.lower(), **time})
    if args.out:
        results = {"environment": about, "ceilings": best, "arguments": vars(args) | {"out": None}}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
