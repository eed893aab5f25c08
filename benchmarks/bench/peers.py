"""Power retention and what one would use instead, on the same inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import retention
from retention.ops.call import Operands, Options
from retention.ops.cuda import coverage, plans
from retention.ops.pytorch import run
from retention.ops.symmetric_power import state_dim

from .problem import DTYPES, Inputs, Problem, Work, attention_work, linear_work, retention_work
from .timing import Effort, Timing, time_call

NAMES = ("dQ", "dK", "dV", "d_log_G")


class Peer:
    """One implementation. Tensors are [b, t, heads, d], or [b, heads, t, d] in its own layout."""

    name: str
    note = ""  # how its work differs
    heads_first = False

    def missing(self, problem: Problem) -> str | None:
        """Why it cannot run here; None if it can."""
        return None

    def call(self, problem: Problem, *tensors: Tensor | None) -> Tensor:
        """The output, in the peer's layout."""
        raise NotImplementedError

    def weights(self, scores: Tensor, decay: Tensor, deg: int) -> Tensor:
        """The formula's weights of values, [b, heads, rows, t], by scaled scores and decays, which
        are 0 for later tokens."""
        raise NotImplementedError

    def exact_work(self, problem: Problem, backward: bool) -> Work:
        """The least that this takes."""
        raise NotImplementedError

    def done_work(self, problem: Problem, backward: bool) -> Work:
        """What it does take, as far as it is known."""
        return self.exact_work(problem, backward)

    # ---- the same for all

    def step(
        self,
        problem: Problem,
        backward: bool,
        inputs: Inputs | None = None,
        d_out: Tensor | None = None,
    ) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        """A call that returns the output and, with ``backward``, the gradients of the inputs."""
        inputs = inputs or problem.inputs()
        tensors = [self._own(x) for x in inputs]
        if not backward:

            def forward():
                with torch.no_grad():
                    return self.call(problem, *tensors), ()

            return forward
        leaves = [None if x is None else x.requires_grad_() for x in tensors]
        given = [x for x in leaves if x is not None]
        d_out = self._own(_eighths(inputs.q) if d_out is None else d_out)

        def both():
            out = self.call(problem, *leaves)
            # Attention has no use for gates.
            return out, torch.autograd.grad(out, given, d_out, allow_unused=True)

        return both

    def time(self, problem: Problem, backward: bool, effort: Effort) -> Timing:
        return time_call(self.step(problem, backward), problem.device, effort)

    def errors(self, problem: Problem, backward: bool) -> dict[str, float]:
        """Of the call that is timed, relative to float64 in the Euclidean norm: some rows of the
        output, for the first sequence and last key head, and the gradients that these give."""
        inputs = problem.inputs()
        rows = sample_rows(problem)
        sample = sampled_outputs(problem, rows)
        d_out = torch.zeros_like(inputs.q)
        d_out[sample] = _eighths(inputs.q[sample])
        out, gradients = self.step(problem, backward, inputs, d_out)()
        wide = [None if x is None else x.requires_grad_() for x in in_float64(inputs, sample)]
        with torch.enable_grad():
            exact = self.expected(problem, rows, *wide)
        errors = {"error": _relative(self._common(out)[sample], exact)}
        if backward:
            leaves = [x for x in wide if x is not None]
            wanted = torch.autograd.grad(exact, leaves, d_out[sample].double(), allow_unused=True)
            for name, x, y in zip(NAMES, gradients, wanted, strict=False):
                if x is not None:
                    x = self._common(x) if x.ndim == 4 else x
                    x = x[sample] if name == "dQ" else x[:1, :, -1:]
                    errors[f"error {name}"] = _relative(x, y)
            errors["worst gradient"] = max(errors[f"error {name}"] for name in NAMES[:3])
        return errors

    def expected(
        self, problem: Problem, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None
    ) -> Tensor:
        """The formula for some rows: q [b, rows, hq, d], k and v [b, t, h, d], gates [b, t, h]."""
        group = q.shape[2] // k.shape[2]
        L = k.new_zeros(k.shape[:3]) if gates is None else gates.cumsum(1)
        k, v, L = (x.repeat_interleave(group, 2) for x in (k, v, L))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * problem.d**-0.5
        later = torch.arange(k.shape[1], device=rows.device) > rows[:, None]
        L = L.transpose(1, 2)
        decay = (L[:, :, rows, None] - L[:, :, None]).masked_fill(later, -torch.inf).exp()
        return torch.einsum("bhij,bjhd->bihd", self.weights(scores, decay, problem.deg), v)

    def _own(self, x: Tensor | None) -> Tensor | None:
        if x is None or x.ndim == 3 or not self.heads_first:
            return x
        return x.detach().transpose(1, 2).contiguous()

    def _common(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.heads_first else x


class Retention(Peer):
    """This library, by the path that it takes here."""

    name = "retention"

    def call(self, problem: Problem, *tensors: Tensor | None) -> Tensor:
        return retention.power_retention(*tensors, deg=problem.deg, chunk_size=problem.chunk)

    def weights(self, scores: Tensor, decay: Tensor, deg: int) -> Tensor:
        w = scores**deg * decay
        return w / w.sum(-1, keepdim=True)

    def exact_work(self, problem: Problem, backward: bool) -> Work:
        return self._work(problem, backward)

    def done_work(self, problem: Problem, backward: bool) -> Work:
        d = problem.d
        kernels = self.has_kernels(problem)
        if kernels:  # narrower heads are padded to theirs
            d, _ = coverage.kernel_dims(DTYPES[problem.dtype], d, d, problem.deg)
        return self._work(problem, backward, d, state_dim(d, problem.deg), kernels)

    def _work(
        self, problem: Problem, backward: bool, d: int | None = None, *options: int | bool
    ) -> Work:
        """Of passes that each choose their chunks, as done with heads of ``d`` and the options."""

        def work(of_backward: bool, backward: bool) -> Work:
            p = self.with_chunk(problem, of_backward)
            return retention_work(dataclasses.replace(p, d=d or p.d), backward, *options)

        forward = work(False, False)
        if not backward:
            return forward
        both, less = work(True, True), work(True, False)
        return Work(*(x + y - z for x, y, z in zip(forward, both, less, strict=True)))

    def has_kernels(self, problem: Problem) -> bool:
        """Whether the compiled kernels take such a call."""
        inputs = dataclasses.replace(problem, t=1).inputs()
        return coverage.cover(inputs.q, inputs.v, problem.deg)

    def with_chunk(self, p: Problem, backward: bool = False) -> Problem:
        """With the chunk that a pass takes, chosen or rounded; t for the quadratic form."""
        chunk = None
        if self.has_kernels(p):
            # One token again and again: shapes are all that counts.
            one = dataclasses.replace(p, t=1).inputs()
            tensors = (x if x is None else x.expand(p.b, p.t, *x.shape[2:]) for x in one)
            operands = Operands(*tensors, initial_state=None, sum_of_keys=None, cu_seqlens=None)
            options = Options(p.deg, p.chunk, None, False, backward, keep_states=backward)
            chunk = plans.chunk_taken(operands, options)
        if chunk is None:
            chunk = run.choose_chunk(p.t, p.d, p.d, p.deg, p.chunk, None)
        return dataclasses.replace(p, chunk=min(chunk, p.t))


class RetentionPyTorch(Retention):
    """The same without kernels."""

    name = "retention, PyTorch path"

    def missing(self, problem: Problem) -> str | None:
        return None if super().has_kernels(problem) else "what `retention` is here"

    def has_kernels(self, problem: Problem) -> bool:
        return False

    def step(self, *arguments, **options):
        call = super().step(*arguments, **options)

        def without_kernels():
            with coverage.turned_off():
                return call()

        return without_kernels


class Attention(Peer):
    """`scaled_dot_product_attention`, causal, by one of PyTorch's backends."""

    heads_first = True

    def __init__(self, backend: SDPBackend, name: str):
        self.backend = backend
        self.name = f"attention, {name}"

    def missing(self, problem: Problem) -> str | None:
        tensors = dataclasses.replace(problem, t=16).inputs()
        try:
            self.call(problem, *(self._own(x) for x in tensors))
        except RuntimeError:
            return f"not for {problem.dtype} on {problem.device}"
        return None

    def call(self, problem: Problem, *tensors: Tensor | None) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(
                *tensors[:3], is_causal=True, enable_gqa=problem.hq != problem.h
            )

    def weights(self, scores: Tensor, decay: Tensor, deg: int) -> Tensor:
        return scores.masked_fill(decay == 0, -torch.inf).softmax(-1)

    def expected(self, problem: Problem, rows: Tensor, *tensors: Tensor | None) -> Tensor:
        q, k, v, _ = tensors
        return super().expected(problem, rows, q, k, v, None)  # a long decay is 0 as well

    def exact_work(self, problem: Problem, backward: bool) -> Work:
        return attention_work(problem, backward)


class SimpleGLA(Peer):
    """flash-linear-attention's gated linear attention."""

    name = "flash-linear-attention"
    note = "a state of d x d instead of D x d: different work"

    def missing(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("fla") is None:
            return "not installed: pip install flash-linear-attention"
        if not problem.device.startswith("cuda"):
            return "needs a GPU"
        return "needs as many key heads as query heads" if problem.hq != problem.h else None

    def call(self, problem: Problem, *tensors: Tensor | None) -> Tensor:
        from fla.ops.simple_gla import chunk_simple_gla

        Q, K, V, log_G = tensors
        return chunk_simple_gla(Q, K, V, g=log_G)[0]

    def weights(self, scores: Tensor, decay: Tensor, deg: int) -> Tensor:
        return scores * decay

    def exact_work(self, problem: Problem, backward: bool) -> Work:
        return linear_work(problem, backward)


class Upstream(Retention):
    """The authors' package, in a process of its own."""

    name = "retention 1.0.7"

    def __init__(self, folder: Path | None, seconds: float = 300.0):
        self.folder = folder
        self.seconds = seconds  # that a process may take: its first call tunes itself
        self._outputs: dict[Problem, Tensor] = {}  # of the sampled rows, as timed last

    def missing(self, problem: Problem) -> str | None:
        if self.folder is None:
            return "--upstream not given: a folder of `pip install --target DIR retention==1.0.7`"
        if not problem.device.startswith("cuda"):
            return "needs a GPU"
        return None

    def with_chunk(self, p: Problem, backward: bool = False) -> Problem:
        """It chooses none itself: without a chunk it is quadratic at every length."""
        return dataclasses.replace(p, chunk=p.chunk or 1024)

    def time(self, problem: Problem, backward: bool, effort: Effort) -> Timing:
        timing, self._outputs[problem] = self._run(problem, backward, effort)
        return timing

    def errors(self, problem: Problem, backward: bool) -> dict[str, float]:
        """Of the call that was timed; its gradients stay in its process."""
        if problem not in self._outputs:
            self.time(problem, backward, Effort(0.0, 2, 2))
        out = self._outputs[problem]
        rows = sample_rows(problem)
        wide = in_float64(problem.inputs(), sampled_outputs(problem, rows))
        exact = self.expected(problem, rows, *wide)
        return {"error": _relative(out.to(exact.device), exact)}

    def _run(self, problem: Problem, backward: bool, effort: Effort) -> tuple[Timing, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.pt"
            request = {
                "folder": str(self.folder),
                "problem": dataclasses.asdict(self.with_chunk(problem)),
                "backward": backward,
                "effort": dataclasses.asdict(effort),
                "rows": sample_rows(problem).tolist(),
                "out": str(out),
            }
            command = [sys.executable, str(Path(__file__).with_name("upstream.py"))]
            try:
                done = _run_within(self.seconds, command, json.dumps(request))
            except subprocess.TimeoutExpired:
                limit = f"{self.seconds:g} s (--upstream-seconds)"
                raise RuntimeError(f"{self.name}: not done after {limit}") from None
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise RuntimeError(f"{self.name}: {lines[-1]}")
            return Timing(**json.loads(done.stdout.splitlines()[-1])), torch.load(out)


def _run_within(seconds: float, command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, but whatever ends it early ends the process's children as well."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(text, timeout=seconds)
        except BaseException:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()  # which Popen leaves out after a KeyboardInterrupt
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def attention_backends(device: str) -> list[tuple[SDPBackend, str]]:
    """PyTorch's that never hold all scores."""
    backends = [(SDPBackend.FLASH_ATTENTION, "flash")]
    if device.startswith("cuda"):
        backends += [
            (SDPBackend.CUDNN_ATTENTION, "cuDNN"),
            (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        ]
    return backends


def all_peers(device: str, upstream: Path | None, upstream_seconds: float = 300.0) -> list[Peer]:
    """In the order of the tables: ours first."""
    attention = [Attention(*backend) for backend in attention_backends(device)]
    others = [SimpleGLA(), Upstream(upstream, upstream_seconds)]
    return [Retention(), RetentionPyTorch(), *attention, *others]


def sample_rows(p: Problem) -> Tensor:
    """Tokens whose outputs are compared: some of all, the last among them. Their weights of all
    tokens take 128 MiB in float64."""
    count = max(16, min(256, 2**24 // p.t // (p.hq // p.h)))
    rows = torch.linspace(0, p.t - 1, min(count, p.t), dtype=torch.float64, device=p.device)
    return rows.round().long()


def sampled_outputs(p: Problem, rows: Tensor) -> tuple[slice, Tensor, slice]:
    """Where these rows are in [b, t, hq, d]: of the first sequence and the last key head."""
    return slice(1), rows, slice(-(p.hq // p.h), None)


def in_float64(inputs: Inputs, sample: tuple[slice, Tensor, slice]) -> list[Tensor | None]:
    """What the sampled outputs are made of: their queries, and all tokens of their key head."""
    parts = [inputs.q[sample], *(None if x is None else x[:1, :, -1:] for x in inputs[1:])]
    return [None if x is None else x.detach().double() for x in parts]


def _eighths(x: Tensor) -> Tensor:
    """A gradient of the output: eighths, which every dtype holds."""
    index = torch.arange(x.shape[-1], device=x.device) % 7 - 3
    return (index / 8).to(x.dtype).expand(x.shape).contiguous()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
