"""Decoding: a few queries against a state and the tokens not yet folded into it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retention.ops import checks
from retention.ops.arguments import without_autocast
from retention.ops.numerics import integer_power, normalise, sums_after, unit_scale
from retention.ops.symmetric_power import Expansion, expand_few

# Elements of phi at one time. Few queries, as a step has, take one product with the state.
_PHI_ELEMENTS = 2**24


class Tokens(NamedTuple):
    """Tokens that are not in a state yet, the newest last, in the dtype of the arithmetic."""

    k: Tensor  # [b, h, t, d]
    v: Tensor  # [b, h, t, dv]
    g: Tensor | None  # [b, h, t], log gates


def by_head(K: Tensor, V: Tensor, log_G: Tensor | None, dtype: torch.dtype) -> Tokens:
    """Tokens from K [b, t, h, d], V [b, t, h, dv] and log_G [b, t, h]."""
    g = None if log_G is None else log_G.to(dtype).transpose(1, 2)
    return Tokens(K.transpose(1, 2).to(dtype), V.transpose(1, 2).to(dtype), g)


class Recent(NamedTuple):
    """Tokens that tq queries read one by one, in any order and any dtype."""

    k: Tensor  # [b, h, t, d]
    v: Tensor  # [b, h, t, dv]
    log_decay: Tensor | None  # [b, h, tq, t], until each query
    hidden: Tensor | None  # [b or 1, 1, tq, t], true where a query does not see a token


class Past(NamedTuple):
    """What was before the tokens, for tq queries."""

    state: Tensor  # [b, h, D, dv], of any dtype
    keys: Tensor  # [b, h, D]
    log_decay: Tensor | None  # [b, h, tq], until each query
    there: Tensor | None = None  # [b]: where false it counts as zeros, whatever it holds


def decode(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
    switch_over_seq_len: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`retention.power_retention_inference`, for arguments that were checked."""
    with without_autocast(Q.device):
        tokens = None if K is None else by_head(K, V, log_G, checks.state_dtype(Q.dtype))
        recent, to_state = (None, None) if tokens is None else _in_order(tokens, Q.shape[1])
        past = None if initial_state is None else Past(initial_state, sum_of_keys, to_state)
        out = attend(Q, recent, past, deg)
        if K is None or switch_over_seq_len is None or K.shape[1] < switch_over_seq_len:
            return out, initial_state, sum_of_keys
        return out, *fold(tokens, initial_state, sum_of_keys, deg)


def _in_order(tokens: Tokens, tq: int) -> tuple[Recent, Tensor | None]:
    """The tokens for queries of the last tq, and the log decay of what was before: [b, h, tq]."""
    k, v, g = tokens
    tk = k.shape[2]
    hidden = log_decay = to_state = None
    if tq > 1:
        hidden = is_later(torch.arange(tk - 1, -1, -1, device=k.device), tq)[None, None]
    if g is not None:
        sums = log_decays(g.flip(-1), tq)
        log_decay, to_state = sums[..., :-1].flip(-1), sums[..., -1]
    return Recent(k, v, log_decay, hidden), to_state


def log_decays(g: Tensor, tq: int) -> Tensor:
    """Log decays by age, until each of the last tq tokens: [b, h, t] -> [b, h, tq, t + 1].

    ``g`` are log gates, the newest first, which has age 0. What was before them all has age t. Of
    what is younger than the query the decay is 1. Every sum is of its own terms alone, as in
    `sums_between`.
    """
    g = g[:, :, None]
    if tq > 1:
        g = g.masked_fill(is_later(torch.arange(g.shape[-1], device=g.device), tq), 0)
    return F.pad(g.cumsum(-1), (1, 0))


def is_later(age: Tensor, tq: int) -> Tensor:
    """Whether tokens are younger than each of the last tq: [..., t] -> [..., tq, t]."""
    return age[..., None, :] < torch.arange(tq - 1, -1, -1, device=age.device)[:, None]


def attend(Q: Tensor, recent: Recent | None, past: Past | None, deg: int) -> Tensor:
    """What queries Q [b, tq, hq, d] read: [b, tq, hq, dv] in Q's dtype."""
    b, tq, hq, _ = Q.shape
    h, dv = past.state.shape[1::2] if recent is None else recent.v.shape[1::2]
    q = Q.to(checks.state_dtype(Q.dtype))
    q = q * unit_scale(q)
    # The queries of a key head one after another, [b, h, r tq, d].
    q = q.unflatten(2, (h, hq // h)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    parts = []
    if recent is not None:
        parts.append(_read_recent(q, tq, recent, deg))
    if past is not None:
        parts.append(_read_past(q, tq, past, deg))
    n, z = (sum(x[1:], start=x[0]) for x in zip(*parts, strict=True))
    out = normalise(n, z).unflatten(2, (hq // h, tq))  # [b, h, r, tq, dv]
    return out.permute(0, 3, 1, 2, 4).reshape(b, tq, hq, dv).to(Q.dtype)


def _read_recent(q: Tensor, tq: int, recent: Recent, deg: int) -> tuple[Tensor, Tensor]:
    """Numerator [b, h, r tq, dv] and normaliser [b, h, r tq, 1] from the tokens."""
    k, v = recent.k.to(q.dtype), recent.v.to(q.dtype)
    w = integer_power(q @ k.mT, deg).unflatten(2, (-1, tq))  # [b, h, r, tq, t]
    if recent.log_decay is not None:
        w = w * recent.log_decay.exp()[:, :, None]
    if recent.hidden is not None:
        w = w.masked_fill(recent.hidden[:, :, None], 0)
    w = w.flatten(2, 3)
    return w @ v, w.sum(-1, keepdim=True)


def _read_past(q: Tensor, tq: int, past: Past, deg: int) -> tuple[Tensor, Tensor]:
    """Numerator [b, h, r tq, dv] and normaliser [b, h, r tq, 1] from the state."""
    if past.log_decay is not None:
        decay = (past.log_decay / deg).exp()[:, :, None, :, None]
        q = (q.unflatten(2, (-1, tq)) * decay).flatten(2, 3)
    state, keys = past.state.to(q.dtype), past.keys
    most = max(1, _PHI_ELEMENTS // max(1, keys.numel()))
    parts = []
    for rows in q.split(most, dim=2):
        phi = expand_few(rows, deg)  # [b, h, rows, D]
        parts.append((phi @ state, phi @ keys[..., None]))
    n, z = parts[0] if len(parts) == 1 else (torch.cat(x, 2) for x in zip(*parts, strict=True))
    if past.there is not None:
        missing = ~past.there[:, None, None, None]
        n, z = n.masked_fill(missing, 0), z.masked_fill(missing, 0)
    return n, z


def fold(
    tokens: Tokens, state: Tensor | None, keys: Tensor | None, deg: int
) -> tuple[Tensor, Tensor]:
    """The state after the tokens, [b, h, D, dv] and [b, h, D]."""
    k, v, g = tokens
    if g is not None:
        k = k * (sums_after(g) / deg).exp()[..., None]
        if state is not None:
            decay = g.sum(-1, keepdim=True).exp()
            state, keys = state * decay[..., None], keys * decay
    phi = Expansion(k.mT, deg, "key")  # [b, h, d, tk]
    products = []
    for last, _ in phi.rows():
        block = phi.block(last)
        products.append((block @ v, block.sum(-1)))
    new_state, new_keys = (torch.cat(parts, dim=2) for parts in zip(*products, strict=True))
    if state is None:
        return new_state, new_keys
    return state + new_state, keys + new_keys
