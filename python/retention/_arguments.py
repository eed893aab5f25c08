"""The arguments shared by every form of power retention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from retention import _checks
from retention._symmetric_power import state_dim


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device; the meta device does not know it."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The arithmetic's dtype is fixed: autocast must not lower it on the way."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def cast_for_autocast(Q: Any, K: Any, V: Any, log_G: Any) -> tuple[Any, Any, Any, Any]:
    """Under autocast: Q, K, V in its dtype and log_G in float32; float64 stays, as everywhere."""
    if not isinstance(Q, Tensor) or not autocasts(Q.device):
        return Q, K, V, log_G

    def cast(x: Any, dtype: torch.dtype) -> Any:
        lower = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if lower else x

    dtype = torch.get_autocast_dtype(Q.device.type)
    return cast(Q, dtype), cast(K, dtype), cast(V, dtype), cast(log_G, torch.float32)


def check_arguments(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    deg: Any,
    scale: Any,
) -> None:
    """Raises TypeError or ValueError unless :func:`power_retention` defines the call."""
    _checks.check_degree(deg)
    _checks.check_scale(scale)
    _checks.check_tensor("Q", Q, "[b, t, hq, d]")
    check_keys_values(Q, K, V, queries=Q.shape[1])
    b, t, h, dv = V.shape
    if log_G is not None:
        _checks.check_gate(log_G, Q, (b, t, h), "K")
    sequences = b
    if cu_seqlens is not None:
        _checks.check_cu_seqlens(cu_seqlens, Q)
        sequences = cu_seqlens.shape[0] - 1
    state_shape = (sequences, h, state_dim(Q.shape[3], deg), dv)
    _checks.check_state(initial_state, sum_of_keys, Q, state_shape)


def check_keys_values(Q: Tensor, K: Tensor, V: Tensor, queries: int | None) -> None:
    """K [b, t, h, d] and V [b, t, h, dv] against Q [b, ., hq, d]; ``queries`` None: any t."""
    _checks.check_tensor("K", K, "[b, t, h, d]")
    _checks.check_tensor("V", V, "[b, t, h, dv]")
    for name, x in (("K", K), ("V", V)):
        _checks.check_like(name, x, "Q", Q)
    b, _, hq, d = Q.shape
    _checks.check_head_dim(d, "Q: head dim")
    t = K.shape[1] if queries is None else queries
    h = K.shape[2]
    _checks.check_shape("K", K, (b, t, h, d), "[b, t, h, d]", "Q")
    _checks.check_shape("V", V, (b, t, h, V.shape[3]), "[b, t, h, dv]", "K")
    if V.shape[3] == 0:
        raise ValueError(f"V: expected [b, t, h, dv] with dv of at least 1, got {list(V.shape)}")
    _checks.check_query_heads(hq, h)
