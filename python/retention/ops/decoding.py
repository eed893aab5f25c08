"""Decoding: a few queries against a state and the tokens not yet folded into it."""

from __future__ import annotations

from typing import cast

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
    b, tq, hq, _ = Q.shape
    h, dv = initial_state.shape[1::2] if V is None else V.shape[2:]
    dtype = checks.state_dtype(Q.dtype)
    with without_autocast(Q.device):
        q = Q.to(dtype)
        # A product: the gradient of ldexp itself is not right in every torch release.
        exponent = unit_exponent(q)
        q = q * torch.ldexp(q.new_ones(exponent.shape), -exponent)
        q = q.unflatten(2, (h, hq // h)).permute(0, 2, 3, 1, 4)  # [b, h, r, tq, d]
        n: Tensor | int = 0
        z: Tensor | int = 0
        g = None
        if K is not None:
            g, k, v = _cache(K, V, log_G, dtype)
            n, z = _read_cache(q, k, v, g, deg)
        if initial_state is not None:
            n_state, z_state = _read_state(q, g, initial_state, sum_of_keys, deg)
            n, z = n + n_state, z + z_state
        out = normalise(cast(Tensor, n), cast(Tensor, z))  # [b, h, r, tq, dv]
        out = out.permute(0, 3, 1, 2, 4).reshape(b, tq, hq, dv).to(Q.dtype)
        if K is None or switch_over_seq_len is None or K.shape[1] < switch_over_seq_len:
            return out, initial_state, sum_of_keys
        return out, *_fold(k, v, g, initial_state, sum_of_keys, deg)


def _cache(
    K: Tensor, V: Tensor, log_G: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Log gates [b, h, tk] or None, keys [b, h, tk, d], values [b, h, tk, dv]."""
    g = None if log_G is None else log_G.to(dtype).transpose(1, 2)
    return g, K.transpose(1, 2).to(dtype), V.transpose(1, 2).to(dtype)


def _read_cache(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, deg: int
) -> tuple[Tensor, Tensor]:
    """Numerator [b, h, r, tq, dv] and normaliser [b, h, r, tq, 1] from the cached tokens."""
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
    """Decay of each cached token at the last tq: [b, h, tk] -> [b, h, tq, tk]; 0 after a query.

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


def _fold(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    keys: Tensor | None,
    deg: int,
) -> tuple[Tensor, Tensor]:
    """The state after the cached tokens, [b, h, D, dv] and [b, h, D]."""
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
