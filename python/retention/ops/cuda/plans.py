"""Plans: what the shapes, strides, dtypes, devices and options of a call decide, found once.

A call of small tensors costs more on the host than on the device, so a plan is kept for the calls
that are alike. A call then allocates its results and passes addresses on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import retention._C as _C
from retention.ops.arguments import check_arguments, state_shape
from retention.ops.call import Operands, Options, OutputGradients, Saved, forward_call
from retention.ops.checks import check_chunks
from retention.ops.cuda import coverage
from retention.ops.cuda.coverage import ELEMENTS, is_turned_off
from retention.ops.symmetric_power import state_dim

_TOKEN_MULTIPLE = 64  # of chunks
Kept = TypeVar("Kept")


def chunk_sizes(t: int, chunk_size: int | None, switch_over: int | None) -> tuple[int, int]:
    """``chunk_size`` and ``whole_until``, as the kernels take them: 0 leaves them the choice.

    A chunk is a multiple of 64 tokens. Packed sequences, of ``t`` tokens together, are compared
    with ``switch_over`` one by one: their lengths are on the device.
    """
    chunk = 0 if chunk_size is None else -(-min(t, chunk_size) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    return chunk, 0 if switch_over is None else min(t, max(1, switch_over))


# Shape, strides and dtype of a contiguous tensor to be allocated. Strides are never 0, as in those
# PyTorch makes. A plain tuple: the fields of a named one would be copied for every allocation.
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return shape, tuple(reversed(strides)), dtype


_NO_BYTES = layout((0,), torch.uint8)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the shapes, strides, dtypes, devices and options of a call decide."""

    reason: str | None  # why the PyTorch path is taken; where None, all that follows is set
    backward_reason: str | None = None  # why backward takes it nevertheless
    device: int = -1
    sizes: tuple[int, ...] = ()  # in the order of _C.FORWARD_SIZES
    copies: bool = False  # whether there are tensors that the kernels cannot read as they lie
    out: Layout = _NO_BYTES
    norm: Layout = _NO_BYTES
    state: Layout = _NO_BYTES
    keys: Layout = _NO_BYTES
    residual: Layout = _NO_BYTES
    workspace: Layout | None = None  # None: not needed
    kept: Layout | None = None  # None: the workspace is
    # Shapes, dtypes and devices that backward was found to fit: see of_results.
    checked: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def head_dims(self) -> tuple[int, int] | None:
        """(d, dv) of the kernels, at least those of the call."""
        return (self.sizes[2], self.sizes[3]) if self.sizes else None

    @property
    def workspace_bytes(self) -> int:
        return 0 if self.workspace is None else self.workspace[0][0]

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Last dimensions, for the kernels, of Q, K, V, log_G, a state and a sum of keys."""
        _, deg, d, dv, *_ = self.sizes
        D = state_dim(d, deg)
        return (d,), (d,), (dv,), (), (D, dv), (D,)


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096


def keep(plans: dict[tuple[Any, ...], Kept], key: tuple[Any, ...], plan: Kept) -> Kept:
    """The plan, which is found among these from now on."""
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def plan_forward(arguments: tuple[Any, ...]) -> Plan:
    """How a call of ``retention::forward`` with these is carried out on a CUDA device.

    Raises:
        TypeError, ValueError: the arguments do not fit each other. The kernels read memory by these
            shapes, so that this is seen to for every call, at a microsecond for a known one.
    """
    Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, _, _, _, _, _, _ = arguments
    # Written out: with a call for each tensor and unpacking, this takes twice as long. The strides
    # that being contiguous leaves open are those of single rows, which nobody reads.
    key = (
        Q.shape,
        Q.is_contiguous() or Q.stride(),
        Q.dtype,
        Q.get_device(),
        K.shape,
        K.is_contiguous() or K.stride(),
        K.dtype,
        K.get_device(),
        V.shape,
        V.is_contiguous() or V.stride(),
        V.dtype,
        V.get_device(),
        log_G is not None
        and (log_G.shape, log_G.is_contiguous() or log_G.stride(), log_G.dtype, log_G.get_device()),
        initial_state is not None and signature(initial_state),
        sum_of_keys is not None and signature(sum_of_keys),
        cu_seqlens is not None and signature(cu_seqlens),
        arguments[7:],
        is_turned_off(),
    )
    plan = _plans.get(key)
    if plan is None:
        operands, options = forward_call(arguments)
        check_arguments(operands, options.deg, None)
        check_chunks(options.chunk_size, options.switch_over_seq_len)
        plan = keep(_plans, key, _make_plan(operands, options))
    return plan


def chunk_taken(operands: Operands, options: Options) -> int | None:
    """Tokens of a chunk, as the kernels round or choose it, in such a call: from t up, the
    quadratic form. None where the PyTorch path is taken."""
    plan = plan_forward((*operands, *options))
    if plan.reason is not None:
        return None
    there = {"cu_seqlens": operands.cu_seqlens, "initial_state": operands.initial_state}
    given = {name for name, x in there.items() if x is not None}
    if options.return_final_state:
        given.add("final_state")
    pointers = tuple(256 * (name in given) for name in _C.FORWARD_POINTERS)
    return _C.forward_chunk_size(plan.sizes, pointers)


def signature(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.is_contiguous() or x.stride(), x.dtype, x.get_device()


def of_results(gradients: OutputGradients, saved: Saved) -> tuple[Any, ...]:
    """What of gradients and results has to fit the inputs, but for the number of kept bytes."""
    d_out, d_state, d_keys = gradients
    out, residual, kept, norm = saved
    return (
        d_out.shape,
        d_out.dtype,
        d_out.get_device(),
        d_state is not None and (d_state.shape, d_state.dtype, d_state.get_device()),
        d_keys is not None and (d_keys.shape, d_keys.dtype, d_keys.get_device()),
        out.shape,
        out.dtype,
        out.get_device(),
        residual.shape,
        residual.dtype,
        residual.get_device(),
        kept.dim(),
        kept.dtype,
        kept.get_device(),
        norm.shape,
        norm.dtype,
        norm.get_device(),
    )


def _make_plan(operands: Operands, options: Options) -> Plan:
    Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens = operands
    deg, chunk_size, switch_over, return_final_state, save_for_backward, keep_states = options
    b, t, hq, d = Q.shape
    h, dv = V.shape[2:]
    reason = coverage.device_reason(Q.device.type, Q.get_device()) or coverage.dtype_reason(Q.dtype)
    if reason is None and deg != 2:
        reason = f"no kernel for degree {deg}: expected 2"
    if reason is None and (b == 0 or t == 0):
        reason = "no tokens"
    if reason is not None:
        return Plan(reason)

    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keeps = save_for_backward and keep_states
    # Where there are none, the library says which there are.
    head_dims = coverage.kernel_dims(Q.dtype, d, dv, deg) or (d, dv)
    strides = [row_strides(x) for x in (Q, K, V)]
    whole = all(x is None or x.is_contiguous() for x in (initial_state, sum_of_keys, cu_seqlens))
    sizes = (
        *(ELEMENTS[Q.dtype], deg, *head_dims, sequences, t, h, hq),
        *(stride for row in strides for stride in row or (0, 0, 0)),
        *((0, 0, 0) if log_G is None else log_G.stride()),
        *chunk_sizes(t, chunk_size, switch_over),
        int(not keeps),
    )
    # Only which addresses are null matters here, and that the others are aligned.
    given = [log_G is not None, cu_seqlens is not None, *[initial_state is not None] * 2]
    there = (True, True, True, *given, True, save_for_backward, True, *[return_final_state] * 2)
    pointers = tuple(256 * x for x in there)
    backward_reason = None
    with torch.cuda.device(Q.get_device()):
        reason = _C.forward_can_implement(sizes, pointers)
        if reason is not None:
            return Plan(reason)
        workspace = _C.forward_workspace_size(sizes, pointers)
        if save_for_backward:
            # The gradient of the output is made to fit, and others are wanted or not.
            required = {"d_output", "d_query", "d_key", "d_value"}
            own = [256 * (name in required) for name in _C.BACKWARD_POINTERS[len(pointers) :]]
            backward_sizes = (*sizes, *[0] * (len(_C.BACKWARD_SIZES) - len(sizes)))
            backward_reason = _C.backward_can_implement(backward_sizes, (*pointers, *own))
    state = state_shape(operands, deg) if return_final_state else (0, 0, 0, 0)
    state_layout = layout(state, torch.float32)
    keys_layout = layout(state[:3], torch.float32)
    residual = layout((b, t, hq, dv) if save_for_backward else (0, 0, 0, 0), Q.dtype)
    kept = None if keeps and workspace else _NO_BYTES
    return Plan(
        None,
        backward_reason,
        Q.get_device(),
        sizes,
        None in strides or not whole or head_dims != (d, dv),
        layout((b, t, hq, dv), Q.dtype),
        layout((b, t, hq), torch.float32),
        state_layout,
        keys_layout,
        residual,
        layout((workspace,), torch.uint8) if workspace else None,
        kept,
    )


def row_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of b, t and h where the kernels can read rows 16 bytes at a time, else None."""
    # The stride of a dimension of size 1 means nothing, whatever it is.
    b, t, h, _ = (0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return None if x.stride(3) != 1 or (b | t | h) % 8 else (b, t, h)
