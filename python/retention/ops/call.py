"""The arguments of the operators ``retention::forward`` and ``retention::backward``, in groups.

A group's fields are in the operator's order, under the operator's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of a call. In forward the first six may require gradients."""

    Q: Tensor  # [b, t, hq, d]
    K: Tensor  # [b, t, h, d]
    V: Tensor  # [b, t, h, dv]
    log_G: Tensor | None = None  # [b, t, h]  # noqa: N815
    initial_state: Tensor | None = None  # [n, h, D, dv]
    sum_of_keys: Tensor | None = None  # [n, h, D]
    cu_seqlens: Tensor | None = None  # [n + 1]


class Options(NamedTuple):
    """What a call of forward is asked for; one of backward has the first three."""

    deg: int = 2
    chunk_size: int | None = None
    switch_over_seq_len: int | None = None
    return_final_state: bool = False
    save_for_backward: bool = False
    keep_states: bool = False


class OutputGradients(NamedTuple):
    """Gradients of forward's results: those of the state both or neither."""

    d_out: Tensor  # [b, t, hq, dv]
    d_state: Tensor | None  # [n, h, D, dv]
    d_keys: Tensor | None  # [n, h, D]


class Saved(NamedTuple):
    """Results of forward that backward reads."""

    out: Tensor  # [b, t, hq, dv], or empty where only kernels would read it
    residual: Tensor  # likewise
    kept: Tensor  # [bytes]
    norm: Tensor  # [b, t, hq]


class BackwardCall(NamedTuple):
    """All arguments of backward."""

    gradients: OutputGradients
    operands: Operands
    saved: Saved
    options: Options  # of the forward call
    wanted: Sequence[bool]  # which gradients: of Q, K, V, log_G, initial_state and sum_of_keys


FORWARD_ARGUMENTS = Operands._fields + Options._fields
FORWARD_RESULTS = ("out", "norm", "state", "sum_of_keys", "residual", "kept")
BACKWARD_ARGUMENTS = (
    *(OutputGradients._fields + Operands._fields + Saved._fields),
    *("deg", "chunk_size", "switch_over_seq_len", "wanted"),
)
BACKWARD_RESULTS = ("dQ", "dK", "dV", "d_log_G", "d_initial_state", "d_keys")


FORWARD_DEFAULTS = Operands._field_defaults | Options._field_defaults
_LAST_ARGUMENTS = tuple(FORWARD_DEFAULTS.values())
_USUAL_OPTIONS = tuple(Options())


def short_arguments(operands: Operands, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of forward, in most calls without those that have their defaults: each takes its time."""
    if options != _USUAL_OPTIONS:
        return (*operands, *options)
    is_plain = operands.initial_state is None and operands.cu_seqlens is None
    return operands[:4] if is_plain else operands


def all_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward's, of which PyTorch leaves out the last ones that have their defaults."""
    missing = len(FORWARD_ARGUMENTS) - len(arguments)
    return arguments + _LAST_ARGUMENTS[-missing:] if missing else arguments


def forward_call(arguments: tuple[Any, ...]) -> tuple[Operands, Options]:
    """The groups of forward's arguments, the last of which may be missing."""
    return Operands(*arguments[:7]), Options(*arguments[7:])


def backward_call(arguments: tuple[Any, ...]) -> BackwardCall:
    """The groups of backward's arguments."""
    deg, chunk_size, switch_over, wanted = arguments[14:]
    return BackwardCall(
        OutputGradients(*arguments[:3]),
        Operands(*arguments[3:10]),
        Saved(*arguments[10:14]),
        Options(
            *(deg, chunk_size, switch_over),
            return_final_state=False,
            save_for_backward=True,
            keep_states=True,  # chunks are as they suit backward, as if it got a workspace
        ),
        wanted,
    )
