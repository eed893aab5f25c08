"""The definition, as plainly as PyTorch can say it. Quadratic in time and memory."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.arguments import check_arguments
from retention.ops.call import Operands
from retention.ops.numerics import sums_after, sums_between
from retention.ops.symmetric_power import expand


def reference(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Power retention by its definition: the yardstick for every faster path.

    With ``L = cumsum(log_G)`` and degree ``p``::

        w_ij = (scale * q_i . k_j)^p * exp(L_i - L_j)   for j <= i
        o_i  = sum_j w_ij v_j / sum_j w_ij              0 / 0 = 0

    An initial state adds ``exp(L_i) scale^p phi_q(q_i) S_0`` to the numerator and the same with
    ``sum_of_keys`` to the denominator. Both products run in the inputs' dtype, the weights between
    them in float32 (float64 for float64 inputs), as in ``softmax`` attention. Arguments, results
    and errors are those of :func:`retention.power_retention`; ``t x t`` weights are held for every
    head.
    """
    operands = Operands(Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    check_arguments(operands, deg, scale)
    if scale is None:
        scale = Q.shape[-1] ** -0.5
    if cu_seqlens is None:
        out, state, keys = _sequence(Q, K, V, log_G, initial_state, sum_of_keys, deg, scale)
    else:
        parts = []
        bounds = checks.sequence_bounds(cu_seqlens, Q.shape[1])
        for n, (start, stop) in enumerate(pairwise(bounds)):
            gate = None if log_G is None else log_G[:, start:stop]
            S = z = None
            if initial_state is not None:
                S, z = initial_state[n : n + 1], sum_of_keys[n : n + 1]
            q, k, v = (x[:, start:stop] for x in (Q, K, V))
            parts.append(_sequence(q, k, v, gate, S, z, deg, scale))
        outs, states, sums = zip(*parts, strict=True)
        before, behind = (
            Q.new_zeros(1, tokens, Q.shape[2], V.shape[3])
            for tokens in (bounds[0], Q.shape[1] - bounds[-1])
        )
        out = torch.cat((before, *outs, behind), dim=1)
        state, keys = torch.cat(states), torch.cat(sums)
    return (out, state, keys) if return_final_state else out


def _sequence(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    b, t, hq, _ = Q.shape
    h, dv = V.shape[2:]
    dtype = checks.state_dtype(Q.dtype)
    q = Q.unflatten(2, (h, hq // h)).permute(0, 2, 3, 1, 4)  # [b, h, r, t, d]
    k = K.permute(0, 2, 1, 3).unsqueeze(2)  # [b, h, 1, t, d]
    v = V.permute(0, 2, 1, 3).unsqueeze(2)  # [b, h, 1, t, dv]
    g = torch.zeros(b, t, h, dtype=dtype, device=Q.device) if log_G is None else log_G.to(dtype)
    g = g.permute(0, 2, 1)  # [b, h, t]
    L = g.cumsum(-1)
    # L_i - L_j, as a sum of the gates between: their difference would have the roundings of both.
    decay = sums_between(g).exp()  # [b, h, t, t]
    w = (scale * (q @ k.mT).to(dtype)) ** deg * decay[:, :, None]  # [b, h, r, t, t]
    z = w.sum(-1, keepdim=True)
    if initial_state is not None:
        phi_q = expand(q.to(dtype), deg, "query") * (scale**deg * L.exp()[:, :, None, :, None])
        z = z + phi_q @ sum_of_keys[:, :, None, :, None]
    # A row without any weight: divide by 1, so that neither the value nor a gradient is 0 / 0.
    z = torch.where(z > 0, z, 1)
    out = ((w / z).to(V.dtype) @ v).to(dtype)  # [b, h, r, t, dv]
    if initial_state is not None:
        out = out + (phi_q / z) @ initial_state[:, :, None]
    out = out.permute(0, 3, 1, 2, 4).reshape(b, t, hq, dv).to(Q.dtype)

    L_end = L[..., -1:] if t else L.new_zeros(b, h, 1)
    phi_k = expand(k.squeeze(2).to(dtype), deg, "key")  # [b, h, t, D]
    phi_k = phi_k * sums_after(g).exp()[..., None]
    state = phi_k.mT @ v.squeeze(2).to(dtype)
    keys = phi_k.sum(2)
    if initial_state is not None:
        state = state + L_end.exp()[..., None] * initial_state
        keys = keys + L_end.exp() * sum_of_keys
    return out, state, keys
