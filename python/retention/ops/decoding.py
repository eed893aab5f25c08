"""Decoding: a few queries against a state and the tokens not yet folded into it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.arguments import without_autocast
from retention.ops.numerics import (
    integer_power,
    normalise,
    sums_after,
    sums_between,
    unit_exponent,
)
from retention.ops.symmetric_power import Expansion

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
    dtype = checks.state_dtype(Q.dtype)
    with without_autocast(Q.device):
        tokens = None if K is None else by_head(K, V, log_G, dtype)
        out = attend(Q, tokens, initial_state, sum_of_keys, deg)
        if K is None or switch_over_seq_len is None or K.shape[1] < switch_over_seq_len:
            return out, initial_state, sum_of_keys
        return out, *fold(tokens, initial_state, sum_of_keys, deg)


def attend(
    Q: Tensor,
    tokens: Tokens | None,
    state: Tensor | None,
    keys: Tensor | None,
    deg: int,
    has_state: Tensor | None = None,
) -> Tensor:
    """What queries Q [b, tq, hq, d], of the last tq tokens, read: [b, tq, hq, dv] in Q's dtype.

    ``state`` [b, h, D, dv] and ``keys`` [b, h, D] are those before the tokens. Where ``has_state``
    [b] is false they count as zeros, whatever they hold.
    """
    b, tq, hq, _ = Q.shape
    h, dv = state.shape[1::2] if tokens is None else tokens.v.shape[1::2]
    q = Q.to(checks.state_dtype(Q.dtype))
    # A product: the gradient of ldexp itself is not right in every torch release.
    exponent = unit_exponent(q)
    q = q * torch.ldexp(q.new_ones(exponent.shape), -exponent)
    q = q.unflatten(2, (h, hq // h)).permute(0, 2, 3, 1, 4)  # [b, h, r, tq, d]
    parts = []
    if tokens is not None:
        parts.append(_read_tokens(q, tokens, deg))
    if state is not None:
        g = None if tokens is None else tokens.g
        n, z = _read_state(q, g, state, keys, deg)
        if has_state is not None:
            there = has_state[:, None, None, None, None]
            n, z = torch.where(there, n, 0), torch.where(there, z, 0)
        parts.append((n, z))
    n, z = (sum(x[1:], start=x[0]) for x in zip(*parts, strict=True))
    out = normalise(n, z)  # [b, h, r, tq, dv]
    return out.permute(0, 3, 1, 2, 4).reshape(b, tq, hq, dv).to(Q.dtype)


def _read_tokens(q: Tensor, tokens: Tokens, deg: int) -> tuple[Tensor, Tensor]:
    """Numerator [b, h, r, tq, dv] and normaliser [b, h, r, tq, 1] from the tokens."""
    k, v, g = tokens
    (r, tq), tk = q.shape[2:4], k.shape[2]
    w = integer_power((q.flatten(2, 3) @ k.mT).unflatten(2, (r, tq)), deg)  # [b, h, r, tq, tk]
    if tq > 1:
        future = torch.ones(tq, tk, dtype=torch.bool, device=q.device).triu(tk - tq + 1)
        w = w.masked_fill(future, 0)
    if g is not None:
        w = w * _decays(g, tq)[:, :, None]
    n = (w.flatten(2, 3) @ v).unflatten(2, (r, tq))
    return n, w.sum(-1, keepdim=True)


def _decays(g: Tensor, tq: int) -> Tensor:
    """Decay of each token at the last tq: [b, h, tk] -> [b, h, tq, tk]; 0 after a query.

    Sums of gates, never their differences: see `sums_between`. A token before the first query's
    decays until that one's, and from there on with the queries.
    """
    first = g.shape[-1] - tq
    before = sums_after(g[..., :first])
    since = g[..., first:].cumsum(-1)
    earlier = since[..., None] + before[..., None, :]
    return torch.cat((earlier, sums_between(g[..., first:])), dim=-1).exp()


def _read_state(
    q: Tensor, g: Tensor | None, state: Tensor, keys: Tensor, deg: int
) -> tuple[Tensor, Tensor]:
    """Numerator [b, h, r, tq, dv] and normaliser [b, h, r, tq, 1] from the state."""
    r, tq = q.shape[2:4]
    if g is not None:
        q = q * (g.cumsum(-1)[:, :, None, -tq:, None] / deg).exp()
    most = max(1, _PHI_ELEMENTS // max(1, keys.numel()))
    parts = []
    for rows in q.flatten(2, 3).split(most, dim=2):
        phi = Expansion(rows.mT, deg, "query").whole().mT  # [b, h, rows, D]
        parts.append((phi @ state, phi @ keys[..., None]))
    n, z = (torch.cat(x, dim=2).unflatten(2, (r, tq)) for x in zip(*parts, strict=True))
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
