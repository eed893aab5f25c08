"""The symmetric power of a vector: the row order of the state, and how its rows are built.

The Python mirror of ``include/retention/symmetric_power.hpp``. A head of ``d`` features is cut into
blocks of ``w = block_width(deg)``. The rows of the state are the block tuples ``B1 <= ... <= Bp``
in colexicographic order and, inside each, the offsets ``a1 ... ap`` with the last one fastest. A
row's value is the product of its p features; its multiplicity ``p! / prod(count of each distinct
block)!`` sits on the key side only, so that ``phi_q(q) . phi_k(k) == (q . k)^p`` exactly.

Everything is built by broadcast multiplies from degree to degree, never by an index gather: the
rows whose last block is J are ``phi_{p-1}[: rows over blocks 0..J]`` times ``x[w J : w J + w]``.
Internally features come before tokens (``[..., d, c]``), so that each multiply runs along
contiguous tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.torch_private import functorch_is_active

Side = Literal["key", "query"]


def block_width(deg: int) -> int:
    """Features in a block: 8 for degree 2, 2 for degree 4, 1 above."""
    return {2: 8, 4: 2}.get(deg, 1)


def _multisets(blocks: int, size: int) -> int:
    """C(blocks + size - 1, size), in steps that a symbolic size takes too."""
    count = 1
    for i in range(size):
        count = count * (blocks + i) // (i + 1)
    return count


def state_dim(head_dim: int, deg: int = 2) -> int:
    """Rows of the state, ``D``: the kept dimension of the symmetric power of degree ``deg``.

    Args:
        head_dim: features of a head, ``d``, a positive multiple of 8.
        deg: the degree ``p``, positive and even.

    Returns:
        ``C(d/w + p - 1, p) * w^p`` with block width ``w`` (8 for p = 2, 2 for p = 4, 1 above); for
        p = 2 that is ``d (d + 8) / 2``.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: ``head_dim`` is not a positive multiple of 8, or ``deg`` not positive and even.
    """
    checks.check_degree(deg)
    checks.check_head_dim(head_dim)
    width = block_width(deg)
    return _multisets(head_dim // width, deg) * width**deg


def _multiplicities(blocks: int, deg: int, x: Tensor) -> Tensor:
    """The multiplicity of every block tuple, in colexicographic order: int64 on x's device.

    Made of ones by products and slices alone: nothing is copied from the host, which a CUDA graph
    could not capture. The tuples of size n that hold their last block J c times are those of size
    n - c over the blocks before J, each with C(n, c) places for the others.
    """
    sizes = [x.new_ones(1, dtype=torch.int64)]
    for n in range(1, deg + 1):
        choices = [math.comb(n, c) * sizes[n - c] for c in range(1, n + 1)]
        counts = [[_multisets(last, n - c) for c in range(1, n + 1)] for last in range(blocks)]
        sizes.append(
            torch.cat(
                [part[:m] for row in counts for part, m in zip(choices, row, strict=True) if m]
            )
        )
    return sizes[deg]


def _make_weights(blocks: int, deg: int, x: Tensor) -> tuple[Tensor, ...]:
    repeat = block_width(deg) ** (deg - 1)
    if deg == 2:  # pairs count twice but for that of the last block with itself: ends of one column
        rows = [x.new_full(((blocks - 1) * repeat, 1), 2), x.new_ones(repeat, 1)]
        column = torch.cat(rows)
        return tuple(column[(blocks - 1 - last) * repeat :] for last in range(blocks))
    every = _multiplicities(blocks, deg, x).to(x.dtype)
    every = every[:, None].expand(-1, repeat).reshape(-1, 1)
    return every.split([_multisets(last + 1, deg - 1) * repeat for last in range(blocks)])


# On the CPU alone: on a device, another stream might read them before they are filled, and those
# made while a CUDA graph is captured are filled at its replays only.
_weights_on_cpu: dict[tuple[int, int, torch.dtype], tuple[Tensor, ...]] = {}


def _weights(blocks: int, deg: int, x: Tensor) -> tuple[Tensor, ...]:
    """Per last block J: the multiplicity of each row prefix, ``[n_J, 1]``, in the dtype of x."""
    ordinary = type(x) is Tensor and x.device.type == "cpu"
    if not ordinary or torch.compiler.is_compiling() or functorch_is_active(unknown=True):
        return _make_weights(blocks, deg, x)
    key = (blocks, deg, x.dtype)
    weights = _weights_on_cpu.get(key)
    if weights is None:
        with torch.inference_mode(False):  # whose tensors could not be used outside it
            weights = _make_weights(blocks, deg, x)
        if type(weights[0]) is Tensor:  # no mode has made something else of them
            _weights_on_cpu[key] = weights
    return weights


def _raise_degree(lower: Tensor, x: Tensor, last: int, rows: int, width: int) -> Tensor:
    """``lower[:rows] (x) block last of x``: [..., rows * width, c]."""
    block = x[..., None, width * last : width * (last + 1), :]
    return (lower[..., :rows, None, :] * block).flatten(-3, -2)


def _power(x: Tensor, order: int, width: int) -> Tensor:
    """The unweighted power of any order >= 1: [..., d, c] -> [..., rows, c]."""
    if order == 1:
        return x
    lower = _power(x, order - 1, width)
    parts = []
    for last in range(x.shape[-2] // width):
        rows = _multisets(last + 1, order - 1) * width ** (order - 1)
        parts.append(_raise_degree(lower, x, last, rows, width))
    return torch.cat(parts, dim=-2)


def expand_few(q: Tensor, deg: int) -> Tensor:
    """phi of a few queries: [..., d] -> [..., D].

    One product makes all pairs of a block's features and of lower rows, of which each block has the
    first ones: more products than rows of phi, and fewer calls.
    """
    width, blocks = block_width(deg), q.shape[-1] // block_width(deg)
    lower = _power(q.mT, deg - 1, width).mT
    pairs = q.unflatten(-1, (blocks, 1, width)) * lower[..., None, :, None]
    pairs = pairs.flatten(-3)  # [..., blocks * lower rows * width]
    of_block = pairs.shape[-1] // blocks
    rows = [_multisets(last + 1, deg - 1) * width**deg for last in range(blocks)]
    parts = [pairs.narrow(-1, last * of_block, n) for last, n in enumerate(rows)]
    return torch.cat(parts, dim=-1)


class Expansion:
    """phi of ``x`` [..., d, c], a group of rows at a time: those that share their last block.

    The whole of phi is ``D`` rows for every token. It is not held but for few of them: ``rows()``
    names the slices of the state, ``block(last)`` builds one of them, and
    ``accumulate_gradient(last, dphi)`` takes it back through phi's Jacobian into the gradient of
    ``x``.
    """

    def __init__(self, x: Tensor, deg: int, side: Side):
        self.x = x
        self.deg = deg
        self.width = block_width(deg)
        self.blocks = x.shape[-2] // self.width
        self.lower = _power(x, deg - 1, self.width)
        self.weights = _weights(self.blocks, deg, x) if side == "key" else (None,) * self.blocks
        self._grad: Tensor | None = None
        self._grad_lower: Tensor | None = None

    def _prefix(self, last: int) -> int:
        return _multisets(last + 1, self.deg - 1) * self.width ** (self.deg - 1)

    def rows(self) -> Iterator[tuple[int, slice]]:
        """(last block, its slice of the state's rows), in order."""
        start = 0
        for last in range(self.blocks):
            stop = start + self._prefix(last) * self.width
            yield last, slice(start, stop)
            start = stop

    def _lower(self, last: int) -> Tensor:
        lower = self.lower[..., : self._prefix(last), :]
        weight = self.weights[last]
        return lower if weight is None else lower * weight

    def block(self, last: int) -> Tensor:
        """phi's rows with this last block: [..., rows, c]."""
        return _raise_degree(self._lower(last), self.x, last, self._prefix(last), self.width)

    def whole(self) -> Tensor:
        """All rows at once, for few tokens: [..., D, c]."""
        return torch.cat([self.block(last) for last, _ in self.rows()], dim=-2)

    def accumulate_gradient(self, last: int, dphi: Tensor) -> None:
        """Adds ``dphi`` [..., rows, c] of one block, through the Jacobian of ``block(last)``."""
        if self._grad is None:
            self._grad = torch.zeros_like(self.x)
            self._grad_lower = torch.zeros_like(self.lower)
        prefix = self._prefix(last)
        of_block = slice(self.width * last, self.width * (last + 1))
        dphi = dphi.unflatten(-2, (prefix, self.width))
        self._grad[..., of_block, :] += (dphi * self._lower(last)[..., None, :]).sum(-3)
        grad_lower = (dphi * self.x[..., None, of_block, :]).sum(-2)
        weight = self.weights[last]
        self._grad_lower[..., :prefix, :] += grad_lower if weight is None else grad_lower * weight

    def gradient(self) -> Tensor:
        """The gradient of ``x``, [..., d, c], from all blocks given so far."""
        grad, grad_power = self._grad, self._grad_lower
        for order in range(self.deg - 1, 1, -1):
            grad_power = self._lower_degree(grad, grad_power, order)
        return grad + grad_power

    def _lower_degree(self, grad: Tensor, grad_power: Tensor, order: int) -> Tensor:
        """The gradient of the power of ``order`` to that of ``order - 1``; adds to ``grad``."""
        lower = _power(self.x, order - 1, self.width)
        grad_lower = torch.zeros_like(lower)
        start = 0
        for last in range(self.blocks):
            prefix = _multisets(last + 1, order - 1) * self.width ** (order - 1)
            of_block = slice(self.width * last, self.width * (last + 1))
            part = grad_power[..., start : start + prefix * self.width, :]
            part = part.unflatten(-2, (prefix, self.width))
            grad[..., of_block, :] += (part * lower[..., :prefix, None, :]).sum(-3)
            grad_lower[..., :prefix, :] += (part * self.x[..., None, of_block, :]).sum(-2)
            start += prefix * self.width
        return grad_lower


def expand(x: Tensor, deg: int = 2, side: Side = "key") -> Tensor:
    """The symmetric power ``phi(x)``, in the row order of the state.

    ``expand(q, deg, "query") . expand(k, deg, "key") == (q . k)^deg``. For degree 2, row
    ``m = 64 n + 8 a + b`` with block pair ``n = J (J + 1) / 2 + I``, ``I <= J``, holds
    ``x[8 I + a] * x[8 J + b]``, on the key side doubled where ``I < J``.

    Args:
        x: ``[..., d]``, floating point, d a positive multiple of 8.
        deg: the degree, positive and even. Default 2.
        side: "key" (default) carries the multiplicities, "query" does not.

    Returns:
        ``[..., D]`` with ``D = state_dim(d, deg)``, in the dtype of x. Differentiable.

    Raises:
        TypeError: ``x`` is not a floating point tensor or ``deg`` not an integer.
        ValueError: a wrong head dim, degree or side.
    """
    checks.check_degree(deg)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating point tensor, got {checks.describe(x)}")
    if x.dim() == 0:
        raise ValueError("x: expected [..., d], got a tensor without dimensions")
    checks.check_head_dim(x.shape[-1], "x: last dimension")
    if side not in ("key", "query"):
        raise ValueError(f"side: expected 'key' or 'query', got {side!r}")
    phi = Expansion(x.reshape(-1, x.shape[-1]).mT, deg, side)
    rows = phi.whole().mT
    return rows.reshape(*x.shape[:-1], rows.shape[-1])
