"""What the public functions accept, said once. Every message names the argument, what it got and
what it accepts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """How an argument is named in an error: shape and dtype of a tensor, else its type."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    return type(value).__name__


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and all accumulation: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raises unless ``value`` is an integer (a bool is not) of at least ``minimum``."""
    # A size is a tensor [] to torch.jit.trace.
    kinds = (int, torch.SymInt, Tensor) if torch.jit.is_tracing() else (int, torch.SymInt)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value}")


def check_degree(deg: Any) -> None:
    check_integer("deg", deg, -(2**31))
    if deg <= 0 or deg % 2:
        raise ValueError(f"deg: expected a positive even integer, got {deg}")


def check_head_dim(head_dim: Any, name: str = "head_dim") -> None:
    check_integer(name, head_dim, -(2**31))
    if head_dim <= 0 or head_dim % 8:
        raise ValueError(f"{name}: expected a positive multiple of 8, got {head_dim}")


def check_chunks(chunk_size: Any, switch_over_seq_len: Any) -> None:
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
    if switch_over_seq_len is not None:
        check_integer("switch_over_seq_len", switch_over_seq_len, 0)


def check_scale(scale: Any) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {describe(scale)}")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale: expected a finite number other than 0, got {scale}")


def check_tensor(name: str, x: Any, layout: str) -> None:
    """A floating point tensor with as many dimensions as ``layout`` names, on a known dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {describe(x)}")
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: expected one of {accepted}, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {x.layout}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got {list(x.shape)}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {x.device}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} as {other_name}, got {x.dtype}")


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], layout: str, other: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected {layout} = {list(expected)} to match {other}, got {list(x.shape)}"
        )


def check_query_heads(hq: int, h: int) -> None:
    if h == 0 or hq == 0 or hq % h:
        raise ValueError(f"Q: expected a number of heads that is a multiple of K's {h}, got {hq}")


def check_gate(log_G: Any, Q: Tensor, expected: tuple[int, ...], other: str) -> None:
    check_tensor("log_G", log_G, "[b, t, h]")
    check_shape("log_G", log_G, expected, "[b, t, h]", other)
    if log_G.device != Q.device:
        raise ValueError(f"log_G: expected device {Q.device} as Q, got {log_G.device}")
    accepted = {torch.float32, state_dtype(Q.dtype)}
    if log_G.dtype not in accepted:
        raise TypeError(
            f"log_G: expected torch.float32 (or torch.float64 with float64 inputs), got "
            f"{log_G.dtype}"
        )


def check_state(
    initial_state: Any, sum_of_keys: Any, Q: Tensor, expected: tuple[int, int, int, int]
) -> None:
    """``initial_state`` [n, h, D, dv] and ``sum_of_keys`` [n, h, D]: both, or neither."""
    if initial_state is None and sum_of_keys is None:
        return
    if initial_state is None:
        raise ValueError("initial_state: expected a state beside sum_of_keys, got None")
    if sum_of_keys is None:
        raise ValueError("sum_of_keys: expected [n, h, D] beside initial_state, got None")
    dtype = state_dtype(Q.dtype)
    for name, x, layout in (
        ("initial_state", initial_state, "[n, h, D, dv]"),
        ("sum_of_keys", sum_of_keys, "[n, h, D]"),
    ):
        check_tensor(name, x, layout)
        check_shape(name, x, expected[: x.dim()], layout, "Q, K, V and deg")
        if x.device != Q.device:
            raise ValueError(f"{name}: expected device {Q.device} as Q, got {x.device}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} with {Q.dtype} inputs, got {x.dtype}")


def check_cu_seqlens(cu_seqlens: Any, Q: Tensor) -> None:
    """Shape, dtype and device; the values are read where the sequences are cut."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected an int32 tensor [n + 1], got {describe(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: expected [n + 1] with n of at least 1, got {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != Q.device:
        raise ValueError(f"cu_seqlens: expected device {Q.device} as Q, got {cu_seqlens.device}")
    if Q.shape[0] != 1:
        raise ValueError(f"Q: expected a batch of 1 with cu_seqlens, got {Q.shape[0]}")


def sequence_bounds(cu_seqlens: Tensor, t: int) -> list[int]:
    """Where packed sequences begin, and where the last ends: [n + 1], from 0 or more to at most t.

    Reads the values, so a CUDA tensor synchronises.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0:
        raise ValueError(f"cu_seqlens: expected to start at 0 or later, got {bounds[0]}")
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens: expected values that never decrease, got {stop} after {start} at "
                f"index {n + 1}"
            )
    if bounds[-1] > t:
        raise ValueError(f"cu_seqlens: expected to end at t = {t} or before, got {bounds[-1]}")
    return bounds
