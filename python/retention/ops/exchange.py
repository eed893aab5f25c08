"""What ranks tell each other of a sequence that they share: one all-gather of states a pass.

With ``S_r`` what the share of rank r adds to a state and ``A_r`` its whole decay, the state before
the share of rank r, and in backward the gradient of the state after it, are

    S_in  = sum over s < r of A_{s+1} .. A_{r-1} S_s
    dS_end = sum over s > r of A_{r+1} .. A_{s-1} dS_s

where ``dS_s`` is the gradient that the share of rank s alone has for the state before it. Both are
summed in order of rank: the same bits, whatever arrives when. Every decay is the exponential of a
sum of log gates, so that gates of -inf are as good as any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retention.ops.torch_private import process_group


class Place(NamedTuple):
    """Where a share is: its rank among the ranks of a process group, which has this name."""

    group: str
    rank: int
    ranks: int


class States(NamedTuple):
    """Of one or several sequences, or gradients of them."""

    state: Tensor  # [n, h, D, dv]
    keys: Tensor  # [n, h, D]

    def plus(self, state: Tensor, keys: Tensor) -> States:
        return States(self.state + state, self.keys + keys)

    def passed_on(self, decay: Tensor, state: Tensor, keys: Tensor) -> States:
        """What a share with a whole ``decay`` [n, h] leaves of these, and adds to them."""
        decay = decay[..., None]
        return States(
            torch.addcmul(state, self.state, decay[..., None]),
            torch.addcmul(keys, self.keys, decay),
        )

    def of(self, rank: int) -> tuple[Tensor, Tensor]:
        """One rank's, of those of all ranks."""
        return self.state[rank], self.keys[rank]

    def where(self, there: Tensor | None) -> States:
        """Zeros unless ``there`` [1]; None: as they are."""
        if there is None:
            return self
        return States(self.state.where(there, 0), self.keys.where(there, 0))

    def zeros(self) -> States:
        return States(*(x.new_zeros(x.shape) for x in self))


class Gathering:
    """An all-gather under way: work that is done before ``wait`` hides it.

    On CUDA devices it is on the stream that the process group keeps for such, from where the
    current stream is now. ``payload`` is the dtype in which ``tensors`` are sent; ``exact`` ones
    are sent as they are.
    """

    def __init__(
        self,
        place: Place,
        tensors: Sequence[Tensor],
        exact: Sequence[Tensor],
        payload: torch.dtype,
    ):
        self._like = [*tensors, *exact]
        parts = [x.reshape(-1).to(payload) for x in tensors]
        parts += [x.contiguous().view(-1).view(payload) for x in exact]
        self._sizes = [x.numel() for x in parts]
        self._exact = len(exact)
        self._ranks = place.ranks
        sent = torch.cat(parts)
        self._received = sent.new_empty(place.ranks * sent.numel())
        group = process_group(place.group)
        self._work = _all_gather(self._received, sent, group=group, async_op=True)
        self._sent = sent  # until all have it

    def wait(self) -> list[Tensor]:
        """Those of all ranks, ``[ranks, ...]`` each, in the dtypes that they had."""
        self._work.wait()
        rows = self._received.view(self._ranks, -1).split(self._sizes, dim=1)
        first_exact = len(rows) - self._exact
        return [
            (x.contiguous().view(like.dtype) if i >= first_exact else x.to(like.dtype)).view(
                self._ranks, *like.shape
            )
            for i, (x, like) in enumerate(zip(rows, self._like, strict=True))
        ]


# PyTorch 2.13 has another name for it, and a warning for the old one.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def passed_on(states: States, log_decays: Tensor, start: States, ranks: Iterable[int]) -> States:
    """What is left of ``start`` behind the shares of ``ranks``, one after another, with what each
    adds: ``states`` [ranks, n, ..] of all ranks, ``log_decays`` [ranks, n, h]."""
    decays = log_decays.exp()
    for rank in ranks:
        start = start.passed_on(decays[rank], *states.of(rank))
    return start


def sum_of_gates(log_G: Tensor | None, like: States, cu_seqlens: Tensor | None) -> Tensor:
    """The log of the whole decay of a share, [n, h]: of all tokens of a row, or of those of the one
    sequence that ``cu_seqlens`` [2] has."""
    if log_G is None:
        return like.keys.new_zeros(like.keys.shape[:2])
    log_G = log_G.to(like.keys.dtype)
    if cu_seqlens is not None:
        token = torch.arange(log_G.shape[1], device=log_G.device)
        there = (token >= cu_seqlens[0]) & (token < cu_seqlens[1])
        log_G = log_G.where(there[:, None], 0)
    return log_G.sum(1)
