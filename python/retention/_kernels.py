"""The compiled CUDA kernels: which calls they take, and the way from tensors to them.

A call of small tensors costs more on the host than on the device, so what can be decided once for
calls of the same shapes is: checks, sizes and layouts, in a :class:`Plan`. What remains is to
allocate the results and to pass addresses on. Nothing synchronises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retention import _C
from retention._arguments import check_arguments
from retention._checks import check_chunks
from retention._symmetric_power import state_dim

_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
_DEVICE_TYPES = {"cuda"}
_MOST_FEATURES = 128  # of keys and of values
_TOKEN_MULTIPLE = 64  # of chunks
_LEAST_CAPABILITY = (8, 0)


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the current device."""
    return torch.empty(shape, dtype=dtype, device="cuda")


# The public functions of these take microseconds each. A PyTorch without CUDA has no use for them.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda device: torch.cuda.current_stream(device).cuda_stream,
)
_allocate = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)


# ---- which calls the kernels take ---------------------------------------------------------------


# Of this thread or task, unlike a global, which others would see change under their feet.
_turned_off: contextvars.ContextVar[bool] = contextvars.ContextVar("turned off", default=False)
_TURNED_OFF = "kernels are turned off"


def is_turned_off() -> bool:
    """Whether :func:`turned_off` is in force here."""
    return _turned_off.get()


@contextlib.contextmanager
def turned_off(off: bool = True) -> Iterator[None]:
    """Within, every call of this thread or task takes the PyTorch path: to compare with it.

    The backward pass of a call follows its forward pass, wherever it runs. In a graph of
    ``torch.compile`` it does not, but follows the thread that runs it.
    """
    token = _turned_off.set(off)
    try:
        yield
    finally:
        _turned_off.reset(token)


def device_reason(kind: str, index: int | None) -> str | None:
    """Why no call on this device takes the kernels; None where calls may."""
    return _TURNED_OFF if is_turned_off() else _reason_of_device(kind, index)


@functools.cache
def _reason_of_device(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"no kernels for {kind} devices"
    if torch.version.hip:
        return "no kernels for ROCm"
    build = _C.build_info()
    if not build["kernels"]:
        return "this build has no compiled kernels"
    capability = torch.cuda.get_device_capability(index)
    shown = f"compute capability {capability[0]}.{capability[1]}"
    if capability < _LEAST_CAPABILITY:
        return f"no kernels for {shown}: expected 8.0 or more"
    if code_for(capability, build["cuda_architectures"]) is None:
        compiled = ", ".join(build["cuda_architectures"])
        return f"no kernels for {shown}: this build has {compiled}"
    return None


def code_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """What of ``sm_NN`` and ``compute_NN`` a device runs: its own machine code, else PTX."""
    wanted = capability[0] * 10 + capability[1]
    usable = {}
    for architecture in architectures:
        kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", architecture).groups()
        number = int(number)
        if suffix == "a":  # of this device alone
            runs = number == wanted
        elif kind == "sm" or suffix == "f":  # of the same major version, from the minor one up
            runs = number // 10 == capability[0] and number <= wanted
        else:
            runs = number <= wanted
        if runs:
            usable[kind == "sm", number] = architecture
    return usable[max(usable)] if usable else None


@functools.cache
def kernel_dims(dtype: torch.dtype, d: int, dv: int, deg: int) -> tuple[int, int] | None:
    """Head dims (d, dv) of the cheapest compiled kernels that take tensors of these, with zeros
    behind their features where those are fewer; None where there are no such kernels.

    Zeros add nothing to a score, and the rows of a state that they have come after all others: the
    order of rows has pairs of blocks by their larger block.
    """
    element = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    name = re.compile(rf"forward_{element}_d(\d+)_dv(\d+)_p{deg}")
    compiled = [
        tuple(map(int, match.groups()))
        for match in map(name.fullmatch, _C.build_info()["kernels"])
        if match
    ]
    wide_enough = [dims for dims in compiled if dims[0] >= d and dims[1] >= dv]
    return min(wide_enough, key=lambda dims: state_dim(dims[0], deg) * dims[1], default=None)


def cover(Q: Tensor, V: Tensor, deg: int) -> bool:
    """Whether there are kernels for such tensors. A call may still be too large for them."""
    if device_reason(Q.device.type, Q.device.index) is not None:
        return False
    return kernel_dims(Q.dtype, int(Q.shape[3]), int(V.shape[3]), deg) is not None


def saves_output(Q: Tensor, V: Tensor, deg: int) -> bool:
    """Whether forward saves the output and its residual for backward: on every path, where there
    are kernels for such tensors on some device and in some build.

    The arguments alone decide, so that a graph compiled or exported elsewhere knows the shapes.
    """
    return (
        Q.device.type in _DEVICE_TYPES
        and Q.dtype in _ELEMENTS
        and deg == 2
        and Q.shape[3] <= _MOST_FEATURES
        and V.shape[3] <= _MOST_FEATURES
    )


# ---- from tensors to the kernels ----------------------------------------------------------------


def chunk_sizes(t: int, chunk_size: int | None, switch_over: int | None) -> tuple[int, int]:
    """``chunk_size`` and ``whole_until``, as the kernels take them: 0 leaves them the choice.

    A chunk is a multiple of 64 tokens. Packed sequences, of ``t`` tokens together, are compared
    with ``switch_over`` one by one: their lengths are on the device.
    """
    chunk = 0 if chunk_size is None else -(-min(t, chunk_size) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    return chunk, 0 if switch_over is None else min(t, max(1, switch_over))


class Layout(NamedTuple):
    """Of a contiguous tensor, to be allocated. Strides are never 0, as in those PyTorch makes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * max(1, size))
        return cls(shape, tuple(reversed(strides)), dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the shapes, strides, dtypes, devices and options of a call decide."""

    reason: str | None  # why the PyTorch path is taken; where None, all that follows is set
    backward_reason: str | None = None  # why backward takes it nevertheless
    options: tuple[int | None, ...] = ()  # of the operator, from deg on
    device: int = -1
    sizes: tuple[int, ...] = ()  # in the order of _C.FORWARD_SIZES
    copies: bool = False  # whether there are tensors that the kernels cannot read as they lie
    has_state: bool = False  # whether the final state is wanted
    out: Layout | None = None
    norm: Layout | None = None
    state: Layout | None = None
    keys: Layout | None = None
    residual: Layout | None = None
    workspace: Layout | None = None  # None: not needed
    kept: Layout | None = None  # None: the workspace is
    # Shapes, dtypes and devices that backward was found to fit: see of_results.
    checked: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def head_dims(self) -> tuple[int, int] | None:
        """(d, dv) of the kernels, at least those of the call."""
        return self.sizes[2:4] or None

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Last dimensions, for the kernels, of Q, K, V, log_G, a state and a sum of keys."""
        _, deg, d, dv, *_ = self.sizes
        D = state_dim(d, deg)
        return (d,), (d,), (dv,), (), (D, dv), (D,)


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096


def plan_forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    deg: int,
    chunk_size: int | None,
    switch_over: int | None,
    return_final_state: bool,
    save_for_backward: bool,
    keep_states: bool,
) -> Plan:
    """How a call of ``retention::forward`` is carried out on a CUDA device.

    Raises:
        TypeError, ValueError: the arguments do not fit each other. The kernels read memory by these
            shapes, so that this is seen to for every call, at a microsecond for a known one.
    """
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
        initial_state is not None and _signature(initial_state),
        sum_of_keys is not None and _signature(sum_of_keys),
        cu_seqlens is not None and _signature(cu_seqlens),
        deg,
        chunk_size,
        switch_over,
        return_final_state,
        save_for_backward,
        keep_states,
        _turned_off.get(),
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        tensors = (Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
        check_arguments(*tensors, deg, None)
        check_chunks(chunk_size, switch_over)
        options = (deg, chunk_size, switch_over, return_final_state)
        plan = _make_plan(*tensors, *options, save_for_backward, keep_states)
        _plans[key] = plan
    return plan


def chunk_taken(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    deg: int,
    chunk_size: int | None,
    switch_over: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> int | None:
    """Tokens of a chunk, as the kernels round or choose it, in a call of such tensors: from t up,
    the quadratic form. None where the PyTorch path is taken."""
    tensors = (Q, K, V, log_G, None, None, cu_seqlens)
    plan = plan_forward(*tensors, deg, chunk_size, switch_over, False, False, False)
    if plan.reason is not None:
        return None
    packed = cu_seqlens is not None
    pointers = tuple(256 * (packed and name == "cu_seqlens") for name in _C.FORWARD_POINTERS)
    return _C.forward_chunk_size(plan.sizes, pointers)


def _signature(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.is_contiguous() or x.stride(), x.dtype, x.get_device()


def of_results(
    d_out: Tensor,
    d_state: Tensor | None,
    d_keys: Tensor | None,
    out: Tensor,
    residual: Tensor,
    kept: Tensor,
    norm: Tensor,
) -> tuple[Any, ...]:
    """What of gradients and results has to fit the inputs, but for the number of kept bytes."""
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


def _make_plan(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    deg: int,
    chunk_size: int | None,
    switch_over: int | None,
    return_final_state: bool,
    save_for_backward: bool,
    keep_states: bool,
) -> Plan:
    b, t, hq, d = Q.shape
    h, dv = V.shape[2:]
    reason = device_reason(Q.device.type, Q.get_device())
    if reason is None and Q.dtype not in _ELEMENTS:
        names = {torch.float32: "fp32", torch.float64: "fp64"}
        reason = f"no kernel for {names[Q.dtype]} inputs: expected bf16 or fp16"
    if reason is None and deg != 2:
        reason = f"no kernel for degree {deg}: expected 2"
    if reason is None and (b == 0 or t == 0):
        reason = "no tokens"
    if reason is not None:
        return Plan(reason)

    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Where there are none, the library says which there are.
    head_dims = kernel_dims(Q.dtype, d, dv, deg) or (d, dv)
    strides = [_row_strides(x) for x in (Q, K, V)]
    whole = all(x is None or x.is_contiguous() for x in (initial_state, sum_of_keys, cu_seqlens))
    sizes = (
        *(_ELEMENTS[Q.dtype], deg, *head_dims, sequences, t, h, hq),
        *(stride for row in strides for stride in row or (0, 0, 0)),
        *((0, 0, 0) if log_G is None else log_G.stride()),
        *chunk_sizes(t, chunk_size, switch_over),
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
    state = (sequences, h, state_dim(d, deg), dv) if return_final_state else (0, 0, 0, 0)
    keeps = save_for_backward and keep_states
    state_layout = Layout.of(state, torch.float32)
    keys_layout = Layout.of(state[:3], torch.float32)
    residual = Layout.of((b, t, hq, dv) if save_for_backward else (0, 0, 0, 0), Q.dtype)
    kept = None if keeps and workspace else Layout.of((0,), torch.uint8)
    return Plan(
        None,
        backward_reason,
        (deg, chunk_size, switch_over, return_final_state, save_for_backward, keep_states),
        Q.get_device(),
        sizes,
        None in strides or not whole or head_dims != (d, dv),
        return_final_state,
        Layout.of((b, t, hq, dv), Q.dtype),
        Layout.of((b, t, hq), torch.float32),
        state_layout,
        keys_layout,
        residual,
        Layout.of((workspace,), torch.uint8) if workspace else None,
        kept,
    )


def _row_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of b, t and h where the kernels can read rows 16 bytes at a time, else None."""
    *strides, last = x.stride()
    # The stride of a dimension of size 1 means nothing, whatever it is.
    strides = [0 if n == 1 else stride for n, stride in zip(x.shape, strides, strict=False)]
    return None if last != 1 or any(stride % 8 for stride in strides) else tuple(strides)


def forward(
    plan: Plan,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The operator ``retention::forward`` by the kernels, for a plan without a reason against."""
    if plan.device != _current_device():
        with torch.cuda.device(plan.device):
            return forward(plan, Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    q, k, v = Q.data_ptr(), K.data_ptr(), V.data_ptr()
    state_in = keys_in = state_out = keys_out = 0
    if initial_state is not None:
        state_in, keys_in = initial_state.data_ptr(), sum_of_keys.data_ptr()
    if plan.copies or (q | k | v | state_in | keys_in) & 15:
        return _forward_copies(plan, Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)

    out, norm = _allocate(*plan.out), _allocate(*plan.norm)
    state, keys = _allocate(*plan.state), _allocate(*plan.keys)
    if plan.has_state:
        state_out, keys_out = state.data_ptr(), keys.data_ptr()
    residual = _allocate(*plan.residual)
    residual_out = residual.data_ptr()  # 0 for one that is empty
    kept = None if plan.kept is None else _allocate(*plan.kept)
    # Freed when this returns, before the work is done: reused by later work on this stream only.
    workspace = None if plan.workspace is None else _allocate(*plan.workspace)
    pointers = (
        q,
        k,
        v,
        0 if log_G is None else log_G.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        state_in,
        keys_in,
        out.data_ptr(),
        residual_out,
        norm.data_ptr(),
        state_out,
        keys_out,
    )
    _C.forward(
        plan.sizes,
        pointers,
        0 if workspace is None else workspace.data_ptr(),
        _current_stream(plan.device),
    )
    return out, norm, state, keys, residual, workspace if kept is None else kept


def _forward_copies(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    tensors = _readable(plan, *tensors)
    *results, kept = forward(plan_forward(*tensors, *plan.options), *tensors)
    layouts = (plan.out, plan.norm, plan.state, plan.keys, plan.residual)
    results = (_narrow(x, layout.shape) for x, layout in zip(results, layouts, strict=True))
    return (*results, kept)


def _readable(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copies of those operands of forward that do not lie, or are not as wide, as the kernels read
    them."""
    Q, K, V, log_G, state, keys, cu_seqlens = tensors
    d, _, dv, _, of_state, of_keys = plan.widths
    Q, K, V = _rows(Q, *d), _rows(K, *d), _rows(V, *dv)
    if state is not None:
        state, keys = _whole(state, *of_state), _whole(keys, *of_keys)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return Q, K, V, log_G, state, keys, cu_seqlens


def plan_backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    deg: int,
    chunk_size: int | None,
    switch_over: int | None,
) -> Plan:
    """How forward was carried out when it saved what backward reads; errors as there."""
    tensors = (Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    return plan_forward(*tensors, deg, chunk_size, switch_over, False, True, False)


def backward(
    plan: Plan,
    d_out: Tensor,
    d_state: Tensor | None,
    d_keys: Tensor | None,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    residual: Tensor,
    kept: Tensor,
    norm: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """The operator ``retention::backward`` by the kernels, for a plan without a reason against.

    Writes ``gradients``, contiguous tensors like the inputs; those that are not wanted are empty.
    """
    if not any(x.numel() for x in gradients):
        return
    tensors = (Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    aligned = not any(x.data_ptr() & 15 for x in tensors[:3])
    aligned &= initial_state is None or not (initial_state.data_ptr() | sum_of_keys.data_ptr()) & 15
    if plan.copies or not aligned:
        tensors = _readable(plan, *tensors)
        plan = plan_forward(*tensors, *plan.options)
    _, _, dv, _, of_state, of_keys = plan.widths
    d_out = _rows(d_out, *dv)
    out, residual, norm = _whole(out, *dv), _whole(residual, *dv), _whole(norm)
    kept = _whole(kept)
    if d_state is not None:
        d_state, d_keys = _whole(d_state, *of_state), _whole(d_keys, *of_keys)
    targets = [_widen(x, *widths) for x, widths in zip(gradients, plan.widths, strict=True)]
    states = kept if plan.workspace and kept.numel() >= plan.workspace.shape[0] else None

    sizes = (*plan.sizes, *_row_strides(d_out))
    arguments = (*tensors[:4], tensors[6], *tensors[4:6], out, residual, norm, None, None)
    arguments += (states, d_out, d_state, d_keys, *targets)
    pointers = tuple(0 if x is None or not x.numel() else x.data_ptr() for x in arguments)
    with torch.cuda.device(plan.device):
        workspace = _C.backward_workspace_size(sizes, pointers)
        memory = _allocate(*Layout.of((workspace,), torch.uint8))
        _C.backward(sizes, pointers, memory.data_ptr(), _current_stream(plan.device))
    for x, target in zip(gradients, targets, strict=True):
        if target is not x:
            x.copy_(_start(target, x.shape))


def _rows(x: Tensor, width: int) -> Tensor:
    """Rows that the kernels can read, of this width: with zeros behind what they have."""
    if x.shape[3] == width and _row_strides(x) and not x.data_ptr() & 15:
        return x
    return _copy(x, width)


def _whole(x: Tensor, *widths: int) -> Tensor:
    """Contiguous and aligned to 16 bytes, the last dimensions of these widths, likewise."""
    if x.shape[x.dim() - len(widths) :] == widths and x.is_contiguous() and not x.data_ptr() & 15:
        return x
    return _copy(x, *widths)


def _copy(x: Tensor, *widths: int) -> Tensor:
    """Contiguous, with zeros behind what the last dimensions have, up to these widths."""
    widened = _widen(x, *widths)
    if widened is x:
        return x.clone(memory_format=torch.contiguous_format)
    _start(widened.zero_(), x.shape).copy_(x)
    return widened


def _widen(x: Tensor, *widths: int) -> Tensor:
    """Memory for what is wider than x in its last dimensions; x itself where it is as wide, or
    empty."""
    kept = x.dim() - len(widths)
    if not x.numel() or x.shape[kept:] == widths:
        return x
    return x.new_empty((*x.shape[:kept], *widths))


def _narrow(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x if x.shape == shape else _copy(_start(x, shape))


def _start(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first elements in every dimension."""
    return x[tuple(map(slice, shape))]
