"""Small numerical steps that every path takes in the same way."""

from __future__ import annotations

import torch
from torch import Tensor


def integer_power(x: Tensor, n: int) -> Tensor:
    """``x ** n`` for n >= 1, by squaring: far faster than ``pow``."""
    if n == 1:
        return x
    half = integer_power(x, n // 2)
    square = half * half
    return square * x if n % 2 else square


def unit_exponent(q: Tensor) -> Tensor:
    """The integer e such that ``q 2^-e`` has magnitude in [1/2, 1): [..., d] -> [..., 1].

    The output does not depend on a query's scale, so its powers may be kept in range this way. The
    bounds keep ``2^-e`` itself finite.
    """
    return torch.frexp(q.detach().abs().amax(-1, keepdim=True)).exponent.clamp(-126, 126)


def has_weight(z: Tensor) -> Tensor:
    """Whether there is any weight in a sum of weights.

    Weights are never negative: a negative sum is rounding. One below the normal numbers is made of
    terms that have lost their digits. NaN counts as weight: it must be seen in what is made of it.
    """
    return ~(z <= torch.finfo(z.dtype).tiny)


def normalise(n: Tensor, z: Tensor) -> Tensor:
    """``n / z``, and 0 with zero gradient where there is no weight."""
    weighed = has_weight(z)
    return torch.where(weighed, n / torch.where(weighed, z, 1), 0)
