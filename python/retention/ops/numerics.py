"""Small numerical steps that every path takes in the same way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements summed one by one in `sums_between`; longer rows are sums of sums.
_SEGMENT = 16


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


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
    return ~_is_weightless(z)


def unit_scale(q: Tensor) -> Tensor:
    """``2^-e`` of :func:`unit_exponent`, in fewer operations: [..., d] -> [..., 1].

    The bounds, -125 and 126, keep all that it is made of among the normal numbers.
    """
    most = q.detach().abs().amax(-1, keepdim=True).clamp(2.0**-126, 2.0**125)
    return torch.frexp(most).mantissa / most  # exact: most is its mantissa times 2^e


def _is_weightless(z: Tensor) -> Tensor:
    return z <= torch.finfo(z.dtype).tiny


def normalise(n: Tensor, z: Tensor) -> Tensor:
    """``n / z``, and 0 with zero gradient where there is no weight."""
    weightless = _is_weightless(z)
    return (n / z.masked_fill(weightless, 1)).masked_fill(weightless, 0)


def sums_after(x: Tensor) -> Tensor:
    """Sums over the elements after each: [..., c] -> [..., c]."""
    return F.pad(x, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)


def sums_between(x: Tensor) -> Tensor:
    """The sums that decays between tokens are exponentials of: [..., c] -> [..., c, c].

    Element ``[i, j]`` is the sum of x over ``j < m <= i``, and -inf where ``j > i``. Every sum is
    of its own terms alone: a difference of two cumulative sums has the rounding of both, and no
    value at all where a gate is -inf.
    """
    c = x.shape[-1]
    if c <= _SEGMENT:
        # Cumulative sums of a row for each j, with zeros up to j.
        until = torch.ones(c, c, dtype=torch.bool, device=x.device).tril()
        sums = x[..., None, :].masked_fill(until, 0).cumsum(-1).mT
        return sums.masked_fill_(~until, -torch.inf)
    # In segments: from j to the end of its own, whole ones in between, from the start of i's on.
    segments = F.pad(x, (0, -c % _SEGMENT)).unflatten(-1, (-1, _SEGMENT))
    since = segments.cumsum(-1)
    between = F.pad(sums_between(since[..., :-1, -1]), (0, 1, 1, 0))
    sums = (since[..., None] + between[..., :, None, :])[..., None]
    sums = sums + sums_after(segments)[..., None, None, :, :]
    sums.diagonal(dim1=-4, dim2=-2).copy_(sums_between(segments).movedim(-3, -1))
    n = segments.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    sums.masked_fill_(later[:, None, :, None], -torch.inf)
    return sums.flatten(-4, -3).flatten(-2, -1)[..., :c, :c]
