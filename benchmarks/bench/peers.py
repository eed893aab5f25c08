"""Power retention and what one would use instead, on the same inputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
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
from retention import _kernels, _ops
from retention._symmetric_power import state_dim

from .problem import Inputs, Problem, Work, attention_work, linear_work, retention_work
from .timing import Effort, Timing, time_call

SAMPLE = 1024  # tokens that are compared with float64
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

    def expected(self, *tensors: Tensor | None) -> Tensor:
        """What the output should be, [b, t, hq, d], by a formula in the dtype of the tensors."""
        raise NotImplementedError

    def exact_work(self, problem: Problem, backward: bool) -> Work | None:
        """The least that this takes; None where the library alone knows."""
        raise NotImplementedError

    def done_work(self, problem: Problem, backward: bool) -> Work | None:
        """What it does take, as far as it is known."""
        return self.exact_work(problem, backward)

    # ---- the same for all

    def step(
        self, problem: Problem, backward: bool, inputs: Inputs | None = None
    ) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        """A call that returns the output and, with ``backward``, the gradients of the inputs."""
        tensors = [self._own(x) for x in (inputs or problem.inputs())]
        if not backward:

            def forward():
                with torch.no_grad():
                    return self.call(problem, *tensors), ()

            return forward
        leaves = [None if x is None else x.requires_grad_() for x in tensors]
        given = [x for x in leaves if x is not None]
        d_out = _ones_and_more(leaves[0])

        def both():
            out = self.call(problem, *leaves)
            # Attention has no use for gates.
            return out, torch.autograd.grad(out, given, d_out, allow_unused=True)

        return both

    def time(self, problem: Problem, backward: bool, effort: Effort) -> Timing:
        return time_call(self.step(problem, backward), problem.device, effort)

    def errors(self, problem: Problem, backward: bool) -> dict[str, float]:
        """Relative to float64, in the Euclidean norm, on the first tokens and last key head."""
        small = dataclasses.replace(
            problem, b=1, t=min(SAMPLE, problem.t), hq=problem.hq // problem.h, h=1
        )
        inputs = small.inputs()
        out, gradients = self.step(small, backward, inputs)()
        wide = [None if x is None else x.detach().double() for x in inputs]
        leaves = [x.requires_grad_() for x in wide if x is not None]
        with torch.enable_grad():
            exact = self.expected(*wide)
        errors = {"error": _relative(self._common(out), exact)}
        if backward:
            d_out = self._common(_ones_and_more(self._own(inputs.q))).double()
            expected = torch.autograd.grad(exact, leaves, d_out, allow_unused=True)
            for name, x, y in zip(NAMES, gradients, expected, strict=False):
                if x is not None:
                    errors[f"error {name}"] = _relative(self._common(x) if x.ndim == 4 else x, y)
        return errors

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

    def expected(self, *tensors: Tensor | None) -> Tensor:
        return retention.reference(*tensors)

    def exact_work(self, problem: Problem, backward: bool) -> Work | None:
        problem = self._with_chunk(problem)
        return None if problem.chunk is None else retention_work(problem, backward)

    def done_work(self, problem: Problem, backward: bool) -> Work | None:
        problem = self._with_chunk(problem)
        if problem.chunk is None:
            return None
        rows = state_dim(problem.d, problem.deg)
        return retention_work(problem, backward, rows, self.has_kernels(problem))

    def has_kernels(self, problem: Problem) -> bool:
        """Whether the compiled kernels take such a call."""
        inputs = dataclasses.replace(problem, t=1).inputs()
        return _kernels.cover(inputs.q, inputs.v, problem.deg)

    def _with_chunk(self, p: Problem) -> Problem:
        """The kernels keep the chunk that they choose to themselves."""
        if p.chunk is not None or self.has_kernels(p):
            return p
        return dataclasses.replace(p, chunk=_ops.choose_chunk(p.t, p.d, p.d, p.deg, None, None))


class RetentionPyTorch(Retention):
    """The same without kernels."""

    name = "retention, PyTorch path"

    def missing(self, problem: Problem) -> str | None:
        return None if super().has_kernels(problem) else "what `retention` is here"

    def has_kernels(self, problem: Problem) -> bool:
        return False

    def errors(self, problem: Problem, backward: bool) -> dict[str, float]:
        with _kernels.turned_off():
            return super().errors(problem, backward)

    def time(self, problem: Problem, backward: bool, effort: Effort) -> Timing:
        with _kernels.turned_off():
            return super().time(problem, backward, effort)


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

    def expected(self, *tensors: Tensor | None) -> Tensor:
        Q, K, V = (x.transpose(1, 2) for x in tensors[:3])
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

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

    def expected(self, *tensors: Tensor | None) -> Tensor:
        Q, K, V, log_G = tensors
        L = K.new_zeros(K.shape[:3]) if log_G is None else log_G
        L = L.cumsum(1).transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
        future = torch.ones(L.shape[-1], L.shape[-1], dtype=torch.bool, device=L.device).triu(1)
        decay = (L[..., :, None] - L[..., None, :]).masked_fill(future, -torch.inf).exp()
        return ((q @ k.mT * q.shape[-1] ** -0.5 * decay) @ v).transpose(1, 2)

    def exact_work(self, problem: Problem, backward: bool) -> Work:
        return linear_work(problem, backward)


class Upstream(Retention):
    """The authors' package, in a process of its own."""

    name = "retention 1.0.7"

    def __init__(self, folder: Path | None):
        self.folder = folder

    def missing(self, problem: Problem) -> str | None:
        if self.folder is None:
            return "--upstream not given: a folder of `pip install --target DIR retention==1.0.7`"
        if not problem.device.startswith("cuda"):
            return "needs a GPU"
        return None

    def time(self, problem: Problem, backward: bool, effort: Effort) -> Timing:
        return self._run(problem, backward, effort)[0]

    def errors(self, problem: Problem, backward: bool) -> dict[str, float]:
        small = dataclasses.replace(
            problem, b=1, t=min(SAMPLE, problem.t), hq=problem.hq // problem.h, h=1
        )
        _, out = self._run(small, False, Effort(0.0, 2, 2))
        wide = [None if x is None else x.double() for x in small.inputs()]
        exact = self.expected(*wide)
        return {"error": _relative(out.to(exact.device), exact[:1, :, -1])}

    def _run(self, problem: Problem, backward: bool, effort: Effort) -> tuple[Timing, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.pt"
            request = {
                "folder": str(self.folder),
                "problem": dataclasses.asdict(problem),
                "backward": backward,
                "effort": dataclasses.asdict(effort),
                "sample": SAMPLE,
                "out": str(out),
            }
            command = [sys.executable, str(Path(__file__).with_name("upstream.py"))]
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise RuntimeError(f"{self.name}: {lines[-1]}")
            return Timing(**json.loads(done.stdout.splitlines()[-1])), torch.load(out)


def all_peers(device: str, upstream: Path | None) -> list[Peer]:
    """In the order of the tables: ours first."""
    backends = [(SDPBackend.FLASH_ATTENTION, "flash")]
    if device.startswith("cuda"):
        backends += [
            (SDPBackend.CUDNN_ATTENTION, "cuDNN"),
            (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        ]
    attention = [Attention(*backend) for backend in backends]
    return [Retention(), RetentionPyTorch(), *attention, SimpleGLA(), Upstream(upstream)]


def _ones_and_more(x: Tensor) -> Tensor:
    """The gradient of the output: eighths, the same in every layout of heads and tokens."""
    index = torch.arange(x.shape[-1], device=x.device) % 7 - 3
    return (index / 8).to(x.dtype).expand(x.shape).contiguous()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
