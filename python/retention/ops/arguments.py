"""The arguments shared by every form of power retention: which fit each other, and autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.call import BackwardCall, Operands
from retention.ops.symmetric_power import state_dim


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device; the meta device does not know it."""
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The arithmetic's dtype is fixed: autocast must not lower it on the way."""
    if not autocasts(device):
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


def check_arguments(operands: Operands, deg: Any, scale: Any) -> None:
    """Raises TypeError or ValueError unless :func:`power_retention` defines the call."""
    Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens = operands
    checks.check_degree(deg)
    checks.check_scale(scale)
    checks.check_tensor("Q", Q, "[b, t, hq, d]")
    check_keys_values(Q, K, V, queries=Q.shape[1])
    if log_G is not None:
        checks.check_gate(log_G, Q, tuple(V.shape[:3]), "K")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, Q)
    if initial_state is not None or sum_of_keys is not None:
        checks.check_state(initial_state, sum_of_keys, Q, state_shape(operands, deg))


def state_shape(operands: Operands, deg: int) -> tuple[int, int, int, int]:
    """[n, h, D, dv] of the call's states."""
    Q, _, V, *_, cu_seqlens = operands
    sequences = Q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, V.shape[2], state_dim(Q.shape[3], deg), V.shape[3]


def check_backward_arguments(call: BackwardCall, saves_output: bool) -> None:
    """Raises TypeError or ValueError unless gradients and results are those of a checked call.

    Without ``saves_output``, ``out`` and ``residual`` are not read, and may be empty.
    """
    d_out, d_state, d_keys = call.gradients
    out, residual, kept, norm = call.saved
    Q = call.operands.Q
    b, t, hq, _ = Q.shape
    dv = call.operands.V.shape[3]
    outputs, empty = (b, t, hq, dv), (0, 0, 0, 0)
    dtype = checks.state_dtype(Q.dtype)
    unread = () if saves_output else (empty,)
    expected = [
        ("d_out", d_out, outputs, Q.dtype, "[b, t, hq, dv]", ()),
        ("out", out, outputs, Q.dtype, "[b, t, hq, dv]", unread),
        ("residual", residual, outputs, Q.dtype, "[b, t, hq, dv]", unread),
        ("kept", kept, (kept.numel(),), torch.uint8, "[bytes]", ()),
        ("norm", norm, (b, t, hq), dtype, "[b, t, hq]", ()),
    ]
    if d_state is not None and d_keys is not None:
        state = state_shape(call.operands, call.options.deg)
        expected.append(("d_state", d_state, state, dtype, "[n, h, D, dv]", ()))
        expected.append(("d_keys", d_keys, state[:3], dtype, "[n, h, D]", ()))
    elif d_state is not None or d_keys is not None:
        missing = "d_state" if d_state is None else "d_keys"
        raise ValueError(f"{missing}: expected a tensor beside the other of d_state and d_keys")
    for name, x, shape, x_dtype, layout, others in expected:
        if x.dtype != x_dtype:
            raise TypeError(f"{name}: expected {x_dtype} with {Q.dtype} inputs, got {x.dtype}")
        if x.shape != shape and x.shape not in others:
            checks.check_shape(name, x, shape, layout, "Q, K, V and deg")
        if x.device != Q.device:
            raise ValueError(f"{name}: expected device {Q.device} as Q, got {x.device}")


def check_keys_values(Q: Tensor, K: Tensor, V: Tensor, queries: int | None) -> None:
    """K [b, t, h, d] and V [b, t, h, dv] against Q [b, ., hq, d]; ``queries`` None: any t."""
    checks.check_tensor("K", K, "[b, t, h, d]")
    checks.check_tensor("V", V, "[b, t, h, dv]")
    for name, x in (("K", K), ("V", V)):
        checks.check_like(name, x, "Q", Q)
    b, _, hq, d = Q.shape
    checks.check_head_dim(d, "Q: head dim")
    t = K.shape[1] if queries is None else queries
    h = K.shape[2]
    checks.check_shape("K", K, (b, t, h, d), "[b, t, h, d]", "Q")
    checks.check_shape("V", V, (b, t, h, V.shape[3]), "[b, t, h, dv]", "K")
    if V.shape[3] == 0:
        raise ValueError(f"V: expected [b, t, h, dv] with dv of at least 1, got {list(V.shape)}")
    checks.check_query_heads(hq, h)


def check_decoding_arguments(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
    scale: float | None,
    switch_over_seq_len: int | None,
) -> None:
    """Raises TypeError or ValueError unless :func:`power_retention_inference` defines the call."""
    checks.check_degree(deg)
    checks.check_scale(scale)
    if switch_over_seq_len is not None:
        checks.check_integer("switch_over_seq_len", switch_over_seq_len, 0)
    checks.check_tensor("Q", Q, "[b, tq, hq, d]")
    b, tq, hq, d = Q.shape
    if tq == 0:
        raise ValueError(f"Q: expected at least 1 query, got {list(Q.shape)}")
    if (K is None) != (V is None):
        missing, given = ("K", "V") if K is None else ("V", "K")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if K is not None:
        check_keys_values(Q, K, V, queries=None)
        b, tk, h, dv = V.shape
        if tk < tq:
            raise ValueError(f"K: expected at least the {tq} tokens of Q, got {tk}")
        if log_G is not None:
            checks.check_gate(log_G, Q, (b, tk, h), "K")
    else:
        if initial_state is None:
            raise ValueError("K: expected a tensor where initial_state is None, got None")
        if log_G is not None:
            raise ValueError("log_G: expected None where K is None: without tokens no gates")
        checks.check_head_dim(d, "Q: head dim")
        checks.check_tensor("initial_state", initial_state, "[b, h, D, dv]")
        h, dv = initial_state.shape[1], initial_state.shape[3]
        checks.check_query_heads(hq, h)
    checks.check_state(initial_state, sum_of_keys, Q, (b, h, state_dim(d, deg), dv))
