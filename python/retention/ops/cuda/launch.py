"""From tensors to the kernels: allocates results and passes addresses on. Nothing synchronises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import retention._C as _C
from retention.ops.call import BackwardCall, Operands, Options, forward_call
from retention.ops.cuda.plans import Plan, layout, plan_forward, row_strides
from retention.ops.exchange import States
from retention.ops.torch_private import allocate, current_device, current_stream


def forward(plan: Plan, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The operator ``retention::forward`` by the kernels, for a plan without a reason against."""
    if plan.device != current_device():
        with torch.cuda.device(plan.device):
            return forward(plan, arguments)
    Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, _, _, _, final, save, _ = arguments
    q, k, v = Q.data_ptr(), K.data_ptr(), V.data_ptr()
    state_in = keys_in = state_out = keys_out = residual_out = 0
    if initial_state is not None:
        state_in, keys_in = initial_state.data_ptr(), sum_of_keys.data_ptr()
    if plan.copies or (q | k | v | state_in | keys_in) & 15:
        return _forward_copies(plan, arguments)

    out, norm = allocate(*plan.out), allocate(*plan.norm)
    state, keys = allocate(*plan.state), allocate(*plan.keys)
    if final:
        state_out, keys_out = state.data_ptr(), keys.data_ptr()
    residual = allocate(*plan.residual)
    if save:
        residual_out = residual.data_ptr()
    kept = None if plan.kept is None else allocate(*plan.kept)
    # Freed when this returns, before the work is done: reused by later work on this stream only.
    workspace = None if plan.workspace is None else allocate(*plan.workspace)
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
        current_stream(plan.device),
    )
    return out, norm, state, keys, residual, workspace if kept is None else kept


class ForwardLaunch:
    """A forward pass of which parts are run one by one, with initial and final states."""

    def __init__(self, operands: Operands, options: Options):
        plan = plan_forward((*operands, *options))
        layouts = (plan.out, plan.norm, plan.state, plan.keys, plan.residual)
        self._shapes = [shape for shape, *_ in layouts]
        if plan.copies or not _are_aligned(operands):
            operands = _readable(plan, operands)
            plan = plan_forward((*operands, *options))
        self._plan, self._operands = plan, operands
        Q, K, V, log_G, state, keys, cu_seqlens = operands
        with torch.cuda.device(plan.device):
            out, norm = allocate(*plan.out), allocate(*plan.norm)
            final_state, final_keys = allocate(*plan.state), allocate(*plan.keys)
            residual = allocate(*plan.residual)
            self.workspace = allocate(*plan.workspace)  # has the states
        self._results = (out, norm, final_state, final_keys, residual)
        rounded = residual if options.save_for_backward else None
        pointers = (Q, K, V, log_G, cu_seqlens, state, keys, out, rounded, norm)
        self._pointers = tuple(
            0 if x is None else x.data_ptr() for x in (*pointers, final_state, final_keys)
        )

    def run(self, part: Callable[..., None], outer: States | None = None) -> None:
        """Enqueue a part by a function of the library; one that adds states from somewhere else."""
        _run_part(self._plan, part, self._plan.sizes, self._pointers, outer, self.workspace)

    def results(self, *numbers: int) -> list[Tensor]:
        """Some of ``out, norm, state, sum_of_keys, residual``, by their places."""
        return [_narrow(self._results[i], self._shapes[i]) for i in numbers]


def _run_part(
    plan: Plan,
    part: Callable[..., None],
    sizes: tuple[int, ...],
    pointers: tuple[int, ...],
    outer: States | None,
    workspace: Tensor,
) -> None:
    *_, of_state, of_keys = plan.widths
    added: list[Tensor] = []
    if outer is not None:
        added = [_whole(outer.state, *of_state), _whole(outer.keys, *of_keys)]
    with torch.cuda.device(plan.device):
        addresses = (x.data_ptr() for x in added)
        part(sizes, pointers, *addresses, workspace.data_ptr(), current_stream(plan.device))


def _forward_copies(plan: Plan, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    operands, options = forward_call(arguments)
    arguments = (*_readable(plan, operands), *options)
    *results, kept = forward(plan_forward(arguments), arguments)
    layouts = (plan.out, plan.norm, plan.state, plan.keys, plan.residual)
    narrowed = (_narrow(x, shape) for x, (shape, *_) in zip(results, layouts, strict=True))
    return (*narrowed, kept)


def _readable(plan: Plan, operands: Operands) -> Operands:
    """Copies of those operands of forward that do not lie, or are not as wide, as the kernels read
    them."""
    Q, K, V, log_G, state, keys, cu_seqlens = operands
    d, _, dv, _, of_state, of_keys = plan.widths
    Q, K, V = _rows(Q, *d), _rows(K, *d), _rows(V, *dv)
    if state is not None:
        state, keys = _whole(state, *of_state), _whole(keys, *of_keys)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return Operands(Q, K, V, log_G, state, keys, cu_seqlens)


def backward(plan: Plan, call: BackwardCall, gradients: tuple[Tensor, ...]) -> None:
    """The operator ``retention::backward`` by the kernels, for a plan without a reason against.

    Writes ``gradients``, contiguous tensors like the inputs; those that are not wanted are empty.
    """
    if not any(x.numel() for x in gradients):
        return
    backward = BackwardLaunch(plan, call, gradients)
    backward.allocate(_C.backward_workspace_size)
    backward.run(_C.backward)
    backward.finish()


class BackwardLaunch:
    """A backward pass as the kernels take it, of which parts may be run one by one."""

    def __init__(self, plan: Plan, call: BackwardCall, gradients: tuple[Tensor, ...]):
        operands = call.operands
        if plan.copies or not _are_aligned(operands):
            operands = _readable(plan, operands)
            plan = plan_forward((*operands, *call.options))
        d_out, d_state, d_keys = call.gradients
        out, residual, kept, norm = call.saved
        _, _, dv, _, of_state, of_keys = plan.widths
        d_out = _rows(d_out, *dv)
        out, residual, norm = _whole(out, *dv), _whole(residual, *dv), _whole(norm)
        kept = _whole(kept)
        if d_state is not None:
            d_state, d_keys = _whole(d_state, *of_state), _whole(d_keys, *of_keys)
        self._plan, self.gradients = plan, gradients
        self.targets = [
            _widen(x, *widths) for x, widths in zip(gradients, plan.widths, strict=True)
        ]
        states = kept if plan.workspace and kept.numel() >= plan.workspace_bytes else None

        Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens = operands
        self._arguments = (
            *(Q, K, V, log_G, cu_seqlens, initial_state, sum_of_keys, out, residual, norm),
            *(None, None, states, d_out, d_state, d_keys, *self.targets),
        )
        self._sizes = (*plan.sizes, *row_strides(d_out))
        self._pointers = tuple(
            0 if x is None or not x.numel() else x.data_ptr() for x in self._arguments
        )

    def allocate(self, workspace_size: Callable[[tuple[int, ...], tuple[int, ...]], int]) -> None:
        """The workspace, by the function that says how large it is."""
        with torch.cuda.device(self._plan.device):
            size = workspace_size(self._sizes, self._pointers)
            self._workspace = allocate(*layout((size,), torch.uint8))

    def run(self, part: Callable[..., None], outer: States | None = None) -> None:
        """Enqueue a part, or all of it, by a function of the library; one that adds gradients from
        somewhere else."""
        _run_part(self._plan, part, self._sizes, self._pointers, outer, self._workspace)

    @property
    def of_start(self) -> States:
        """The gradient of the initial states."""
        targets = zip(self.gradients[4:], self.targets[4:], strict=True)
        return States(*(_narrow(target, x.shape) for x, target in targets))

    def finish(self) -> None:
        """Bring gradients to where they are wanted."""
        for x, target in zip(self.gradients, self.targets, strict=True):
            if target is not x:
                x.copy_(_start(target, x.shape))


def _are_aligned(operands: Operands) -> bool:
    """To 16 bytes, as far as they are read so: not gates, and not the bounds of sequences."""
    Q, K, V, _, state, keys, _ = operands
    read = (Q, K, V, state, keys)
    return not any(x is not None and x.data_ptr() & 15 for x in read)


def _rows(x: Tensor, width: int) -> Tensor:
    """Rows that the kernels can read, of this width: with zeros behind what they have."""
    if x.shape[3] == width and row_strides(x) and not x.data_ptr() & 15:
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
