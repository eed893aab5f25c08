"""The operators ``torch.ops.retention.forward`` and ``.backward``.

Defined once with fakes and an autograd formula. On CUDA devices the compiled kernels run the calls
that they cover; the chunked PyTorch path runs all others. The logger ``retention`` says at level
DEBUG which one each call took, and why.

``wanted`` of backward has a bool for each of its six results, in their order; those of the initial
state and its sum of keys are wanted both or neither. A result that is not wanted is empty, [0].
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

from retention import _checks, _chunked, _kernels, _packed
from retention._arguments import check_arguments, check_backward_arguments, without_autocast
from retention._on_import import when_imported
from retention._symmetric_power import state_dim

_logger = logging.getLogger("retention")
_library = torch.library.Library("retention", "DEF")

_library.define(
    "forward(Tensor Q, Tensor K, Tensor V, Tensor? log_G, Tensor? initial_state, "
    "Tensor? sum_of_keys, Tensor? cu_seqlens, int deg, int? chunk_size, int? switch_over_seq_len, "
    "bool return_final_state, bool save_for_backward, bool keep_states) "
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

# The least and the most tokens worth a chunk: below, calls cost more than products; above, the
# weights of a chunk leave a CPU's cache.
_SHORTEST_CHUNK = 128
_LONGEST_CHUNK = 4096


def choose_chunk(
    t: int, head_dim: int, dv: int, deg: int, chunk_size: int | None, switch_over: int | None
) -> int:
    """Tokens in a chunk; t itself where the quadratic form is asked for, or cheaper."""
    if chunk_size is None:
        D = state_dim(head_dim, deg)
        # A token's products: D dv twice with the state, or (d + dv) / 2 with every earlier token.
        # The factor is measured: on a CPU, d = dv = 32, 64, 128 cross over near 1k, 3k and 12k.
        quadratic_until = max(512, int(0.7 * 2 * D * dv / ((head_dim + dv) / 2)))
        chunk_size = 2 ** round(math.log2(8 * math.sqrt(quadratic_until)))
        chunk_size = min(max(chunk_size, _SHORTEST_CHUNK), _LONGEST_CHUNK)
        if switch_over is None:
            switch_over = quadratic_until
    elif switch_over is None:
        switch_over = chunk_size
    return t if t <= switch_over else chunk_size


def _state_shape(Q: Tensor, V: Tensor, cu_seqlens: Tensor | None, deg: int) -> tuple[int, ...]:
    sequences = Q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, V.shape[2], state_dim(Q.shape[3], deg), V.shape[3]


def _allocate_forward(
    Q: Tensor,
    V: Tensor,
    cu_seqlens: Tensor | None,
    deg: int,
    return_final_state: bool,
    save_for_backward: bool,
    kept_bytes: int,
) -> tuple[Tensor, ...]:
    dtype = _checks.state_dtype(Q.dtype)
    state_shape = _state_shape(Q, V, cu_seqlens, deg) if return_final_state else (0, 0, 0, 0)
    out_shape = (*Q.shape[:3], V.shape[3])
    has_residual = save_for_backward and _kernels.saves_output(Q, V, deg)
    return (
        Q.new_empty(out_shape),
        Q.new_empty(Q.shape[:3], dtype=dtype),
        Q.new_empty(state_shape, dtype=dtype),
        Q.new_empty(state_shape[:3], dtype=dtype),
        Q.new_empty(out_shape if has_residual else (0, 0, 0, 0)),
        Q.new_empty(kept_bytes, dtype=torch.uint8),
    )


def _allocate_backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """A gradient for every input that wants one; an empty tensor for one that does not, or is
    None."""
    if len(wanted) != 6 or wanted[4] != wanted[5]:
        raise ValueError(
            "wanted: expected a bool for each of Q, K, V, log_G, initial_state and sum_of_keys, "
            f"the last two alike, got {[*wanted]}"
        )
    inputs = (Q, K, V, log_G, initial_state, sum_of_keys)
    return tuple(
        x.new_empty(x.shape) if want and x is not None else Q.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    )


def _forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    deg: int,
    chunk_size: int | None,
    switch_over_seq_len: int | None,
    return_final_state: bool,
    save_for_backward: bool,
    keep_states: bool,
) -> tuple[Tensor, ...]:
    results = _allocate_forward(Q, V, cu_seqlens, deg, return_final_state, save_for_backward, 0)
    out, norm, state, keys, residual, _ = results
    residual = residual if residual.numel() else None
    with torch.no_grad(), without_autocast(Q.device):
        for batch in _packed.batches(cu_seqlens, Q.shape[1], _state_size(Q, V, deg)):
            sequence = _sequence(batch, Q, K, V, log_G, deg, chunk_size, switch_over_seq_len)
            S = sequence.join_state(_rows(initial_state, batch), _rows(sum_of_keys, batch))
            targets = [batch.room(x) for x in (out, norm, residual)]
            S = _chunked.forward(sequence, S, *targets, return_final_state)
            for x, written in zip((out, norm, residual), targets, strict=True):
                batch.put(x, written)
            if return_final_state:
                state[batch.states], keys[batch.states] = sequence.split_state(S)
        _packed.clear_behind(cu_seqlens, out, norm, residual)
        if cu_seqlens is not None and return_final_state:
            empty = _packed.without_tokens(cu_seqlens)
            _hand_through(empty, (state, keys), (initial_state, sum_of_keys))
    return results


def _sequence(
    batch: _packed.Batch,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    deg: int,
    chunk_size: int | None,
    switch_over: int | None,
) -> _chunked.Sequence:
    """The batch's sequences, in chunks that suit their length."""
    chunk = choose_chunk(batch.length, Q.shape[3], V.shape[3], deg, chunk_size, switch_over)
    return _chunked.Sequence(*map(batch.take, (Q, K, V, log_G)), deg, max(1, chunk))


def _state_size(Q: Tensor, V: Tensor, deg: int) -> int:
    """Elements of what a sequence leaves behind."""
    return V.shape[2] * state_dim(Q.shape[3], deg) * (V.shape[3] + 1)


def _rows(x: Tensor | None, batch: _packed.Batch) -> Tensor | None:
    return None if x is None else x[batch.states]


def _hand_through(
    empty: Tensor, results: tuple[Tensor, Tensor], given: tuple[Tensor | None, Tensor | None]
) -> None:
    """Sequences without tokens leave the state as it was, and its gradient."""
    for result, x in zip(results, given, strict=True):
        result[empty] = 0 if x is None else x[empty]


def _backward(
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
    deg: int,
    chunk_size: int | None,
    switch_over_seq_len: int | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (Q, K, V, log_G, initial_state, sum_of_keys)
    gradients = _allocate_backward(*inputs, wanted)
    dQ, dK, dV, d_log_G, d_initial_state, d_sum_of_keys = (
        None if x is None or not want else g
        for x, g, want in zip(inputs, gradients, wanted, strict=True)
    )
    of_tokens = (dQ, dK, dV, d_log_G)
    initial_wanted = d_initial_state is not None
    with torch.no_grad(), without_autocast(Q.device):
        for batch in _packed.batches(cu_seqlens, Q.shape[1], _state_size(Q, V, deg)):
            sequence = _sequence(batch, Q, K, V, log_G, deg, chunk_size, switch_over_seq_len)
            targets = [batch.room(x) for x in of_tokens]
            dS = _chunked.backward(
                sequence,
                sequence.join_state(_rows(initial_state, batch), _rows(sum_of_keys, batch)),
                sequence.join_state(_rows(d_state, batch), _rows(d_keys, batch)),
                batch.take(norm),
                batch.take(d_out),
                *targets,
                initial_wanted,
            )
            for x, written in zip(of_tokens, targets, strict=True):
                batch.put(x, written)
            if initial_wanted:
                S = sequence.split_state(dS)
                d_initial_state[batch.states], d_sum_of_keys[batch.states] = S
        _packed.clear_behind(cu_seqlens, *of_tokens)
        if cu_seqlens is not None and initial_wanted:
            empty = _packed.without_tokens(cu_seqlens)
            _hand_through(empty, (d_initial_state, d_sum_of_keys), (d_state, d_keys))
    return gradients


def _log(
    what: str,
    Q: Tensor,
    V: Tensor,
    reason: str | None,
    head_dims: tuple[int, int] | None = None,  # of the kernels
) -> None:
    path = "kernels" if reason is None else f"PyTorch path ({reason})"
    if reason is None and head_dims not in (None, (Q.shape[3], V.shape[3])):
        path += ", padded to d {}, dv {}".format(*head_dims)
    dtype = str(Q.dtype).removeprefix("torch.")
    _logger.debug(
        "%s on %s: %s; %s, Q %s, V %s", what, Q.device, path, dtype, [*Q.shape], [*V.shape]
    )


def _check(Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, deg, chunk, switch_over):
    check_arguments(Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, deg, None)
    _checks.check_chunks(chunk, switch_over)


def _forward_cuda(
    Q,
    K,
    V,
    log_G,
    initial_state,
    sum_of_keys,
    cu_seqlens,
    deg,
    chunk_size,
    switch_over_seq_len,
    return_final_state,
    save_for_backward,
    keep_states,
):
    plan = _kernels.plan_forward(
        Q,
        K,
        V,
        log_G,
        initial_state,
        sum_of_keys,
        cu_seqlens,
        deg,
        chunk_size,
        switch_over_seq_len,
        return_final_state,
        save_for_backward,
        keep_states,
    )
    if _logger.isEnabledFor(logging.DEBUG):
        _log("forward", Q, V, plan.reason, plan.head_dims)
    if plan.reason is None:
        return _kernels.forward(plan, Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    tensors = (Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    options = (deg, chunk_size, switch_over_seq_len)
    return _forward(*tensors, *options, return_final_state, save_for_backward, keep_states)


def _check_backward(d_out, d_state, d_keys, Q, K, V, *rest):
    cu_seqlens, *results = rest[3:8]
    deg = rest[8]
    saves_output = _kernels.saves_output(Q, V, deg)
    gradients = (d_out, d_state, d_keys)
    check_backward_arguments(*gradients, Q, V, cu_seqlens, *results, deg, saves_output)


def _forward_elsewhere(Q, K, V, *rest):
    _check(Q, K, V, *rest[:7])
    if _logger.isEnabledFor(logging.DEBUG):
        _log("forward", Q, V, _kernels.device_reason(Q.device.type, Q.device.index))
    return _forward(Q, K, V, *rest)


def _backward_cuda(d_out, d_state, d_keys, *arguments):
    tensors, results, (*options, wanted) = arguments[:7], arguments[7:11], arguments[11:]
    Q, V = tensors[0], tensors[2]
    plan = _kernels.plan_backward(*tensors, *options)
    signature = _kernels.of_results(d_out, d_state, d_keys, *results)
    if signature not in plan.checked:
        _check_backward(d_out, d_state, d_keys, *arguments)
        plan.checked.add(signature)
    reason = plan.reason or plan.backward_reason
    if _logger.isEnabledFor(logging.DEBUG):
        _log("backward", Q, V, reason, plan.head_dims)
    if reason is not None:
        return _backward(d_out, d_state, d_keys, *arguments)
    gradients = _allocate_backward(*tensors[:6], wanted)
    _kernels.backward(plan, d_out, d_state, d_keys, *tensors, *results, gradients)
    return gradients


def _backward_elsewhere(d_out, d_state, d_keys, Q, K, V, *rest):
    _check(Q, K, V, *rest[:4], *rest[8:11])
    _check_backward(d_out, d_state, d_keys, Q, K, V, *rest)
    if _logger.isEnabledFor(logging.DEBUG):
        _log("backward", Q, V, _kernels.device_reason(Q.device.type, Q.device.index))
    return _backward(d_out, d_state, d_keys, Q, K, V, *rest)


_library.impl("forward", _forward_cuda, "CUDA")
_library.impl("forward", _forward_elsewhere, "CompositeExplicitAutograd")
_library.impl("backward", _backward_cuda, "CUDA")
_library.impl("backward", _backward_elsewhere, "CompositeExplicitAutograd")


@torch.library.register_fake("retention::forward", lib=_library)
def _forward_fake(
    Q,
    K,
    V,
    log_G,
    initial_state,
    sum_of_keys,
    cu_seqlens,
    deg,
    chunk_size,
    switch_over_seq_len,
    return_final_state,
    save_for_backward,
    keep_states,
):
    tensors = (Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    _check(*tensors, deg, chunk_size, switch_over_seq_len)
    kept_bytes = 0
    if save_for_backward and keep_states and _kernels.saves_output(Q, V, deg):
        kept_bytes = torch.library.get_ctx().new_dynamic_size()  # the device decides
    options = (return_final_state, save_for_backward, kept_bytes)
    return _allocate_forward(Q, V, cu_seqlens, deg, *options)


@torch.library.register_fake("retention::backward", lib=_library)
def _backward_fake(d_out, d_state, d_keys, Q, K, V, log_G, initial_state, sum_of_keys, *rest):
    tensors = (Q, K, V, log_G, initial_state, sum_of_keys)
    _check(*tensors, rest[0], *rest[5:8])
    _check_backward(d_out, d_state, d_keys, *tensors, *rest)
    return _allocate_backward(*tensors, rest[-1])


# The keys of a call at the Autograd key where the CUDA kernel is the next one: tensors of a CUDA
# device without subclasses, modes or tracing.
_CUDA_IS_NEXT = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCUDA)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
).raw_repr()
_forward_overload = torch.ops.retention.forward.default


def _forward_autograd(
    keys,
    Q,
    K,
    V,
    log_G,
    initial_state,
    sum_of_keys,
    cu_seqlens,
    deg,
    chunk_size,
    switch_over_seq_len,
    return_final_state,
    save_for_backward,
    keep_states,
):
    """The operator at the Autograd key, which knows whether anything is to be saved for backward.

    It is ``torch.library.register_autograd`` by hand: that one's layer takes two thirds as long as
    all else that the host does for a call. Where the CUDA kernel is next, it is called from here,
    which saves the way through the dispatcher.
    """
    differentiable = is_grad_enabled() and (
        Q.requires_grad
        or K.requires_grad
        or V.requires_grad
        or (log_G is not None and log_G.requires_grad)
        or (initial_state is not None and initial_state.requires_grad)
        or (sum_of_keys is not None and sum_of_keys.requires_grad)
    )
    # Tangents of forward mode are not seen in requires_grad; apply looks for them.
    apply = differentiable or forward_ad._current_level >= 0
    if not apply and keys.raw_repr() == _CUDA_IS_NEXT:
        return _forward_cuda(
            Q,
            K,
            V,
            log_G,
            initial_state,
            sum_of_keys,
            cu_seqlens,
            deg,
            chunk_size,
            switch_over_seq_len,
            return_final_state,
            save_for_backward,
            keep_states,
        )
    arguments = (Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, deg)
    arguments += (chunk_size, switch_over_seq_len, return_final_state)
    if not apply:
        return _forward_below_autograd(keys, *arguments, save_for_backward, keep_states)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "retention: torch.func does not differentiate power retention; use torch.autograd"
        )
    if keep_states and _is_sharded(Q):
        keep_states = False  # bytes of each rank's own, for which a DTensor has no shape
    return _Forward.apply(keys, *arguments, differentiable, keep_states)


def _is_sharded(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _forward_below_autograd(keys, *arguments):
    if keys.raw_repr() == _CUDA_IS_NEXT:
        return _forward_cuda(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, *arguments):
        results = _forward_below_autograd(keys, *arguments)
        *tensors, ctx.deg, ctx.chunk_size, ctx.switch_over_seq_len = arguments[:10]
        ctx.has_state = arguments[10]
        out, norm, _, _, residual, kept = results
        # The PyTorch path has its own way to what the output is for, and keeps only the normaliser.
        ctx.has_out = _kernels.saves_output(tensors[0], tensors[2], ctx.deg)
        ctx.turned_off = _kernels.is_turned_off()
        ctx.save_for_backward(*tensors, out if ctx.has_out else None, residual, kept, norm)
        ctx.mark_non_differentiable(norm, residual, kept)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, d_out, _, d_state, d_keys, *__):
        *inputs, out, residual, kept, norm = ctx.saved_tensors
        Q, V, cu_seqlens = inputs[0], inputs[2], inputs[6]
        if not ctx.has_out:
            out = residual
        if d_out is None:
            d_out = Q.new_zeros(*norm.shape, V.shape[3])
        if not ctx.has_state:
            d_state = d_keys = None
        elif d_state is not None or d_keys is not None:
            shape = _state_shape(Q, V, cu_seqlens, ctx.deg)
            if d_state is None:
                d_state = norm.new_zeros(shape)
            if d_keys is None:
                d_keys = norm.new_zeros(shape[:3])
        results = (out, residual, kept, norm)
        options = (ctx.deg, ctx.chunk_size, ctx.switch_over_seq_len)
        needed = ctx.needs_input_grad[1:7]
        wanted = [*needed[:4], *[any(needed[4:])] * 2]  # of a state and its keys: both or neither
        with _kernels.turned_off(ctx.turned_off):  # autograd has threads of its own
            gradients = torch.ops.retention.backward(
                d_out, d_state, d_keys, *inputs, *results, *options, wanted
            )
        gradients = [g if n else None for g, n in zip(gradients, needed, strict=True)]
        return (None, *gradients, *(None,) * 7)  # of the keys; of cu_seqlens and the options

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError("retention: forward-mode differentiation is not supported")


def _refuse_double_backward(ctx, *gradients):
    raise RuntimeError(
        "retention: double backward is not supported; call backward without create_graph=True"
    )


_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd("retention::backward", _refuse_double_backward, lib=_library)


def _register_flops() -> None:
    from retention import _flops

    _flops.register()


def _register_sharding() -> None:
    from retention import _sharding

    _sharding.register()


when_imported("torch.utils.flop_counter", _register_flops)
when_imported("torch.distributed.tensor", _register_sharding)
