"""What is computed: the inputs of a call, and the work that it takes by formula.

Imports no retention: see the package's docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Inputs(NamedTuple):
    """Queries [b, t, hq, d], keys and values [b, t, h, d], log gates [b, t, h] float32 or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor | None


class Work(NamedTuple):
    """Additions and multiplications, and bytes to and from memory."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time it can take."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Problem:
    """One call. Values are as wide as keys."""

    b: int = 1
    t: int = 65536
    hq: int = 8
    h: int = 8
    d: int = 64
    deg: int = 2
    chunk: int | None = 1024  # None: the library's choice
    dtype: str = "bfloat16"
    gated: bool = True
    device: str = "cuda"

    def inputs(self, seed: int = 0) -> Inputs:
        """Normal Q, K and V; gates that keep a token for some hundred steps."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        heads = (self.hq, self.h, self.h)
        tensors = [normal(self.b, self.t, n, self.d).to(DTYPES[self.dtype]) for n in heads]
        gates = F.logsigmoid(normal(self.b, self.t, self.h) + 6) if self.gated else None
        return Inputs(*tensors, gates)

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    def pairs(self, window: int) -> float:
        """Of a query and a key of its chunk, not later than it, in one head of one sequence."""
        chunks, rest = divmod(self.t, window)
        return chunks * window * (window + 1) / 2 + rest * (rest + 1) / 2

    def tensor_bytes(self, backward: bool) -> float:
        """Of inputs and results, each once; in backward also of their gradients."""
        queries = self.b * self.t * self.hq * self.d * self.element_bytes
        keys = self.b * self.t * self.h * self.d * self.element_bytes
        gates = 4 * self.b * self.t * self.h * self.gated
        forward = 2 * queries + 2 * keys + gates  # Q and O, K and V
        return forward + (forward + 2 * queries + 2 * keys + gates) * backward


def exact_state_dim(d: int, deg: int) -> int:
    """Distinct products of ``deg`` of ``d`` factors."""
    return math.comb(d + deg - 1, deg)


def retention_work(
    p: Problem, backward: bool, state_rows: int | None = None, kernels: bool = False
) -> Work:
    """Of the form with chunks of ``p.chunk``: the quadratic one where that is t or more.

    Without ``state_rows`` the exact work: distinct products alone, every product of the gradients
    once, and inputs and results as the only memory. With the rows that a state really has, the
    work as done: backward makes the states again, and states go through memory. The kernels take
    the scores of a chunk three times and the products with the gradients of outputs twice.
    """
    chunk = min(p.chunk, p.t)
    done = state_rows is not None
    rows = state_rows if done else exact_state_dim(p.d, p.deg)
    product = 2 * rows * p.d * p.t  # of all tokens of a head with a state
    inside = 2 * p.d * p.pairs(chunk) * p.hq  # of a chunk's queries with its keys
    state = product * (p.h + p.hq)
    chunks = 2 * inside
    if backward:
        # dQ and dS; dK and dV, and the states again.
        state += product * (2 * p.hq + (3 if done else 2) * p.h)
        chunks += (8 if kernels else 5) * inside
    memory = p.tensor_bytes(backward)
    if done and chunk < p.t:
        states = math.ceil(p.t / chunk) * p.h * rows * (p.d + 1) * p.element_bytes
        # Written once and read by every kernel: the states twice over, and their gradients.
        memory += p.b * states * (9 if backward else 2)
    flops = chunks if chunk == p.t else state + chunks
    return Work(p.b * flops, memory)


def attention_work(p: Problem, backward: bool) -> Work:
    """Of causal softmax attention: two products, and five more in backward."""
    product = 2 * p.d * p.pairs(p.t) * p.hq * p.b
    return Work((7 if backward else 2) * product, p.tensor_bytes(backward))


def linear_work(p: Problem, backward: bool, chunk: int = 64) -> Work:
    """Of linear attention with a d x d state, in chunks."""
    state = 2 * p.d * p.d * p.t * (p.h + p.hq) * p.b
    inside = 4 * p.d * p.pairs(min(chunk, p.t)) * p.hq * p.b
    return Work((3.5 if backward else 1) * (state + inside), p.tensor_bytes(backward))
