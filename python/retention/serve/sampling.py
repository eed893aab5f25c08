"""How the next tokens of many sequences are chosen, each in a way of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retention.lm import generation
from retention.ops.numerics import widest

NOT_FINITE = -1  # in a token's place, where logits are no finite numbers


class Draw(NamedTuple):
    """How one row chooses its token.

    Temperature 0 takes the likeliest. Otherwise it is one of the smallest set of tokens whose
    probabilities reach `top_p`: that at which the sum of probabilities, the largest first, passes
    `drawn` of the set's, as in `retention.lm.generation.sample`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    drawn: float = 0.0  # at least 0 and below 1


GREEDY = Draw()


def choose(logits: Tensor, draws: Tensor | None) -> Tensor:
    """The next token of each row, `[b]` int64; `NOT_FINITE` where its logits are not.

    Nothing waits for the device.

    Args:
        logits: `[b, vocabulary]`.
        draws: `[b, 3]`, the fields of `Draw`, in the device's widest dtype. None: all are greedy.
    """
    token = logits.argmax(-1)
    if draws is not None:
        temperature, top_p = draws[:, :1], draws[:, 1:2]
        limits = torch.finfo(draws.dtype)
        warm = generation.sample_warm(
            logits, temperature.clamp(limits.tiny, limits.max), top_p, draws[:, 2]
        )
        token = torch.where(temperature[:, 0] == 0, token, warm)
    broken = (logits * 0).sum(-1) != 0  # as NaN is, of infinities too
    return token.masked_fill(broken, NOT_FINITE)


def as_tensor(draws: list[Draw], device: torch.device) -> Tensor:
    """`[b, 3]` for `choose`, on the CPU in the dtype that the device takes."""
    wide = widest(device)
    rows = torch.tensor(draws, dtype=torch.float64)
    # Below 1 in fewer bits too.
    rows[:, 2].clamp_(max=1 - torch.finfo(wide).eps / 2)
    return rows.to(wide)


def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model itself, whatever the temperature.

    Args:
        logits: `[b, vocabulary]`.
        tokens: `[b]`, those chosen.
        count: how many of the likeliest tokens.

    Returns:
        `[b]`, of the tokens; and `[b, count]` twice, of the likeliest and which they are. Among
        equals the first comes first, as in `choose`: in 16 bits many are, and `topk` takes any.
    """
    each = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = each.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    likeliest = tokens[:, None][:, :0]
    if count:  # as a rule there are none, and sorting a vocabulary takes long
        likeliest = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return chosen, each.gather(-1, likeliest), likeliest
