"""The operators ``torch.ops.retention.forward`` and ``.backward``.

Defined once with fakes and an autograd formula. On CUDA devices the compiled kernels run the calls
that they cover; the chunked PyTorch path runs all others. The logger ``retention`` says at level
DEBUG which one each call took, and why.

PyTorch does not hand on the last arguments of a call that have their defaults.

``wanted`` of backward has a bool for each of its six results, in their order; those of the initial
state and its sum of keys are wanted both or neither. A result that is not wanted is empty, [0].
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from retention.ops.arguments import check_arguments, check_backward_arguments, state_shape
from retention.ops.call import (
    BackwardCall,
    Operands,
    Options,
    all_arguments,
    backward_call,
    forward_call,
)
from retention.ops.checks import check_chunks
from retention.ops.cuda import coverage, launch
from retention.ops.cuda.plans import of_results, plan_forward
from retention.ops.on_import import when_imported
from retention.ops.pytorch import run
from retention.ops.torch_private import (
    call_below_autograd,
    cuda_is_next,
    forward_mode_is_active,
    functorch_is_active,
)

_logger = logging.getLogger("retention")
_library = torch.library.Library("retention", "DEF")

_library.define(
    "forward(Tensor Q, Tensor K, Tensor V, Tensor? log_G=None, Tensor? initial_state=None, "
    "Tensor? sum_of_keys=None, Tensor? cu_seqlens=None, int deg=2, int? chunk_size=None, "
    "int? switch_over_seq_len=None, bool return_final_state=False, "
    "bool save_for_backward=False, bool keep_states=False) "
    "-> (Tensor out, Tensor norm, Tensor state, Tensor sum_of_keys, Tensor residual, Tensor kept)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "backward(Tensor d_out, Tensor? d_state, Tensor? d_keys, Tensor Q, Tensor K, Tensor V, "
    "Tensor? log_G, Tensor? initial_state, Tensor? sum_of_keys, Tensor? cu_seqlens, "
    "Tensor out, Tensor residual, Tensor kept, Tensor norm, "
    "int deg, int? chunk_size, int? switch_over_seq_len, bool[] wanted) "
    "-> (Tensor dQ, Tensor dK, Tensor dV, Tensor d_log_G, Tensor d_initial_state, Tensor d_keys)",
    tags=torch.Tag.pt2_compliant_tag,
)


# ---- what a call runs ---------------------------------------------------------------------------


def log(
    what: str,
    operands: Operands,
    reason: str | None,
    head_dims: tuple[int, int] | None = None,  # of the kernels
) -> None:
    Q, V = operands.Q, operands.V
    path = "kernels" if reason is None else f"PyTorch path ({reason})"
    if reason is None and head_dims not in (None, (Q.shape[3], V.shape[3])):
        path += ", padded to d {}, dv {}".format(*head_dims)
    dtype = str(Q.dtype).removeprefix("torch.")
    _logger.debug(
        "%s on %s: %s; %s, Q %s, V %s", what, Q.device, path, dtype, [*Q.shape], [*V.shape]
    )


def _device_reason(operands: Operands) -> str | None:
    return coverage.device_reason(operands.Q.device.type, operands.Q.device.index)


def _saves_output(operands: Operands, deg: int) -> bool:
    return coverage.saves_output(operands.Q, operands.V, deg)


def _check_forward(operands: Operands, options: Options) -> None:
    check_arguments(operands, options.deg, None)
    check_chunks(options.chunk_size, options.switch_over_seq_len)


def _check_backward(call: BackwardCall) -> None:
    check_backward_arguments(call, _saves_output(call.operands, call.options.deg))


def _forward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    return _run_on_cuda(all_arguments(arguments))


def _run_on_cuda(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    plan = plan_forward(arguments)
    if _logger.isEnabledFor(logging.DEBUG):
        log("forward", Operands(*arguments[:7]), plan.reason, plan.head_dims)
    if plan.reason is None:
        return launch.forward(plan, arguments)
    operands, options = forward_call(arguments)
    return run.forward(operands, options, _saves_output(operands, options.deg))


def _forward_elsewhere(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options = forward_call(arguments)
    _check_forward(operands, options)
    if _logger.isEnabledFor(logging.DEBUG):
        log("forward", operands, _device_reason(operands))
    return run.forward(operands, options, _saves_output(operands, options.deg))


def _backward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    call = backward_call(arguments)
    plan = plan_forward((*call.operands, *call.options))
    signature = of_results(call.gradients, call.saved)
    if signature not in plan.checked:
        _check_backward(call)
        plan.checked.add(signature)
    reason = plan.reason or plan.backward_reason
    if _logger.isEnabledFor(logging.DEBUG):
        log("backward", call.operands, reason, plan.head_dims)
    if reason is not None:
        return run.backward(call)
    gradients = run.allocate_backward(call.operands, call.wanted)
    launch.backward(plan, call, gradients)
    return gradients


def _backward_elsewhere(*arguments: Any) -> tuple[Tensor, ...]:
    call = backward_call(arguments)
    _check_forward(call.operands, call.options)
    _check_backward(call)
    if _logger.isEnabledFor(logging.DEBUG):
        log("backward", call.operands, _device_reason(call.operands))
    return run.backward(call)


_library.impl("forward", _forward_cuda, "CUDA")
_library.impl("forward", _forward_elsewhere, "CompositeExplicitAutograd")
_library.impl("backward", _backward_cuda, "CUDA")
_library.impl("backward", _backward_elsewhere, "CompositeExplicitAutograd")


@torch.library.register_fake("retention::forward", lib=_library)
def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options = forward_call(arguments)
    _check_forward(operands, options)
    saves_output = _saves_output(operands, options.deg)
    kept_bytes: Any = 0
    if options.save_for_backward and options.keep_states and saves_output:
        kept_bytes = torch.library.get_ctx().new_dynamic_size()  # the device decides
    return run.allocate_forward(operands, options, saves_output, kept_bytes)


@torch.library.register_fake("retention::backward", lib=_library)
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = backward_call(arguments)
    _check_forward(call.operands, call.options)
    _check_backward(call)
    return run.allocate_backward(call.operands, call.wanted)


# ---- autograd -----------------------------------------------------------------------------------


_forward_overload = torch.ops.retention.forward.default


def _forward_autograd(keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator at the Autograd key, which knows whether anything is to be saved for backward.

    It is ``torch.library.register_autograd`` by hand: that one's layer takes two thirds as long as
    all else that the host does for a call. Where the CUDA kernel is next, it is called from here,
    which saves the way through the dispatcher.
    """
    arguments = all_arguments(arguments)
    Q, K, V, log_G, initial_state, sum_of_keys, _, _, _, _, _, _, keep_states = arguments
    differentiable = is_grad_enabled() and (
        Q.requires_grad
        or K.requires_grad
        or V.requires_grad
        or (log_G is not None and log_G.requires_grad)
        or (initial_state is not None and initial_state.requires_grad)
        or (sum_of_keys is not None and sum_of_keys.requires_grad)
    )
    if not differentiable:
        if cuda_is_next(keys):
            return _run_on_cuda(arguments)
        if not forward_mode_is_active():  # whose tangents apply looks for
            return call_below_autograd(_forward_overload, keys, arguments)
    if functorch_is_active(unknown=False):  # else apply refuses, in other words
        raise RuntimeError(
            "retention: torch.func does not differentiate power retention; use torch.autograd"
        )
    if keep_states and _is_sharded(Q):
        keep_states = False  # bytes of each rank's own, for which a DTensor has no shape
    return _Forward.apply(keys, *arguments[:-2], differentiable, keep_states)


def _is_sharded(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _forward_below_autograd(keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
    if cuda_is_next(keys):
        return _run_on_cuda(all_arguments(arguments))
    return call_below_autograd(_forward_overload, keys, arguments)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results = _forward_below_autograd(keys, *arguments)
        operands, ctx.options = forward_call(arguments)
        out, norm, _, _, residual, kept = results
        # The PyTorch path has its own way to what the output is for, and keeps only the normaliser.
        ctx.has_out = _saves_output(operands, ctx.options.deg)
        ctx.turned_off = coverage.is_turned_off()
        ctx.save_for_backward(*operands, out if ctx.has_out else None, residual, kept, norm)
        ctx.mark_non_differentiable(norm, residual, kept)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, d_out: Any, _: Any, d_state: Any, d_keys: Any, *__: Any) -> Any:
        *inputs, out, residual, kept, norm = ctx.saved_tensors
        operands, options = Operands(*inputs), ctx.options
        if not ctx.has_out:
            out = residual
        if d_out is None:
            d_out = operands.Q.new_zeros(*norm.shape, operands.V.shape[3])
        if not options.return_final_state:
            d_state = d_keys = None
        elif d_state is not None or d_keys is not None:
            shape = state_shape(operands, options.deg)
            if d_state is None:
                d_state = norm.new_zeros(shape)
            if d_keys is None:
                d_keys = norm.new_zeros(shape[:3])
        results = (out, residual, kept, norm)
        needed = ctx.needs_input_grad[1:7]
        wanted = [*needed[:4], *[any(needed[4:])] * 2]  # of a state and its keys: both or neither
        with coverage.turned_off(ctx.turned_off):  # autograd has threads of its own
            gradients = torch.ops.retention.backward(
                d_out, d_state, d_keys, *operands, *results, *options[:3], wanted
            )
        gradients = [g if n else None for g, n in zip(gradients, needed, strict=True)]
        return (None, *gradients, *(None,) * 7)  # of the keys; of cu_seqlens and the options

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("retention: forward-mode differentiation is not supported")


def _refuse_double_backward(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "retention: double backward is not supported; call backward without create_graph=True"
    )


_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd("retention::backward", _refuse_double_backward, lib=_library)


# ---- what waits for other parts of PyTorch ------------------------------------------------------


def _register_flops() -> None:
    from retention.ops import flops

    flops.register()


def _register_sharding() -> None:
    from retention.ops import sharding

    sharding.register()


when_imported("torch.utils.flop_counter", _register_flops)
when_imported("torch.distributed.tensor", _register_sharding)
