"""Sequences on the PyTorch path, as batches of equal length.

Packed sequences may be thousands, and calls for each of them would take far longer than its
products. Those of about the same length are therefore copied side by side, and padded with tokens
whose keys and gates are 0: they follow all others and leave a state as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from retention.ops import checks

# Elements of the states of a batch, and its tokens: what is copied stays small beside the call's
# own operands.
_STATE_ELEMENTS = 2**25
_BATCH_TOKENS = 2**13


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, taken from tensors ``[b, t, ...]`` and put back into them."""

    states: Tensor | slice  # their rows of a tensor of states [n, ...]
    length: int
    tokens: slice  # where they lie, unless `index` says so
    index: Tensor | None = None  # [m, length], the position of every token, 0 where padded
    real: Tensor | None = None  # [m, length], whether there is such a token

    def take(self, x: Tensor | None) -> Tensor | None:
        """[b, t, ...] -> [m, length, ...]: a view of one sequence, else a copy, padded with 0."""
        if x is None or self.index is None:
            return x if x is None else x[:, self.tokens]
        taken = x[0, self.index]
        return taken.masked_fill_(~self.real.view(*self.real.shape, *[1] * (x.dim() - 2)), 0)

    def room(self, x: Tensor | None) -> Tensor | None:
        """Where to write what is then to be ``put`` into ``x`` [b, t, ...]."""
        if x is None or self.index is None:
            return x if x is None else x[:, self.tokens]
        return x.new_empty(*self.index.shape, *x.shape[2:])

    def put(self, x: Tensor | None, written: Tensor | None) -> None:
        """Writes what was put into ``room(x)`` to ``x``, if it is not there."""
        if x is not None and self.index is not None:
            x[0, self.index[self.real]] = written[self.real]


def batches(cu_seqlens: Tensor | None, t: int, state_size: int) -> Iterator[Batch]:
    """Batches of all sequences with tokens, where a state has ``state_size`` elements.

    Reads the values of ``cu_seqlens``, and raises ValueError for wrong ones.
    """
    if cu_seqlens is None:
        yield Batch(slice(None), t, slice(0, t))
        return
    bounds = checks.sequence_bounds(cu_seqlens, t)
    of_length = defaultdict(list)
    for n, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            of_length[_padded(stop - start)].append(n)
    for length, sequences in of_length.items():
        most = max(1, min(_STATE_ELEMENTS // state_size, _BATCH_TOKENS // length))
        for first in range(0, len(sequences), most):
            some = sequences[first : first + most]
            if len(some) == 1:
                n = some[0]
                tokens = slice(bounds[n], bounds[n + 1])
                yield Batch(slice(n, n + 1), tokens.stop - tokens.start, tokens)
            else:
                yield _side_by_side(cu_seqlens, some, length, t)


def _side_by_side(cu_seqlens: Tensor, sequences: list[int], length: int, t: int) -> Batch:
    chosen = torch.tensor(sequences, device=cu_seqlens.device)
    starts, stops = cu_seqlens[chosen].long(), cu_seqlens[chosen + 1].long()
    index = starts[:, None] + torch.arange(length, device=cu_seqlens.device)
    real = index < stops[:, None]
    return Batch(chosen, length, slice(0, t), index.masked_fill(~real, 0), real)


def _padded(length: int) -> int:
    """The length that sequences of this one share: at most an eighth more, and a long one's own."""
    if length > _BATCH_TOKENS // 2:
        return length
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def without_tokens(cu_seqlens: Tensor) -> Tensor:
    """Whether each sequence is empty, [n]."""
    return cu_seqlens[1:] == cu_seqlens[:-1]


def clear_unowned(cu_seqlens: Tensor | None, *results: Tensor | None) -> None:
    """Zeros in ``[b, t, ...]`` before the first sequence and behind the last: nobody's tokens."""
    if cu_seqlens is not None:
        start, end = int(cu_seqlens[0]), int(cu_seqlens[-1])
        for x in results:
            if x is not None:
                x[:, :start] = 0
                x[:, end:] = 0
