"""The operators ``torch.ops.retention.decode_*``: what is done to the slots of a pool, in place.

Each takes the pool's tensors first, in the order of :class:`retention.ops.pool.Pool`, and declares
that it writes to them. On CUDA devices the compiled kernels run the calls that they cover; PyTorch
operations run all others. The logger ``retention`` says at level DEBUG which one each call took,
and why. They are for arguments whose shapes and dtypes were checked, as
:class:`retention.RetentionCache` does; what only the values tell is checked here, before anything
is written, where that waits for no device. No operator has gradients: new tokens that require them
are refused.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retention.ops import checks, pool
from retention.ops.cuda import coverage
from retention.ops.cuda import decoding as cuda
from retention.ops.pool import Pool
from retention.ops.pytorch import decoding
from retention.ops.pytorch.decoding import NewTokens
from retention.ops.torch_private import below_autograd, nothing_intercepts

_logger = logging.getLogger("retention")
_library = torch.library.Library("retention", "FRAGMENT")

_POOL = (
    "Tensor(a!) high, Tensor(b!)? low, Tensor(c!) key_sum, Tensor(d!) keys, Tensor(e!) values, "
    "Tensor(f!)? log_gates, Tensor(g!) cursors, Tensor(h!) arrivals"
)
_FIELDS = len(Pool._fields)
_ORDINARY = {Tensor, type(None)}
_NEW = "Tensor Q, Tensor K, Tensor V, Tensor? log_G, Tensor slots, Tensor? cu_seqlens"


# ---- what values tell ---------------------------------------------------------------------------


def check_distinct(name: str, slots: Tensor, p: Pool) -> None:
    """On a CPU: no slot of the pool is there twice."""
    if slots.device.type != "cpu":
        return
    seen = set()
    for slot in slots.tolist():
        if slot in seen:
            raise ValueError(f"{name}: expected each slot at most once, got {slot} twice")
        if 0 <= slot < p.cursors.shape[0]:
            seen.add(slot)


def _check_lengths(cu_seqlens: Tensor | None, t: int, most: int) -> None:
    """On a CPU: sequences of at most ``most`` tokens, one after another."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    bounds = checks.sequence_bounds(cu_seqlens, t)
    if bounds[0] != 0:  # every row of a batch of new tokens is somebody's
        raise ValueError(f"cu_seqlens: expected to start at 0, got {bounds[0]}")
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    if longest > most:
        raise ValueError(
            f"cu_seqlens: expected sequences of at most max_tokens_per_step = {most} tokens, got "
            f"one of {longest}"
        )


def _check_rollback(slots: Tensor, tokens: Tensor, p: Pool) -> None:
    """As many tokens as rings hold. Waits for a device, unless a CUDA graph is being captured."""
    if slots.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    there = (slots >= 0) & (slots < p.cursors.shape[0])
    length = pool.unpack(p.cursors[torch.where(there, slots, 0)]).length
    wrong = (there & ((tokens < 0) | (tokens > length))).nonzero()[:, 0].tolist()
    if wrong:
        slot, least, got = (x[wrong[0]].item() for x in (slots, length, tokens))
        raise ValueError(
            f"tokens: expected 0 to {least}, the tokens in the ring of slot {slot}, got {got}"
        )


def are_ordinary(Q: Any, K: Any, V: Any, log_G: Any, slots: Any, cu_seqlens: Any) -> bool:
    """Whether these are tensors, and of no class of their own."""
    return type(Q) is type(K) is type(V) is type(slots) is Tensor and _ORDINARY.issuperset(
        (type(log_G), type(cu_seqlens))
    )


def want_gradients(Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None) -> bool:
    """Whether somebody would wait for the gradients of new tokens."""
    return torch.is_grad_enabled() and (
        Q.requires_grad
        or K.requires_grad
        or V.requires_grad
        or (log_G is not None and log_G.requires_grad)
    )


def _refuse_gradients(name: str, arguments: tuple[Any, ...]) -> None:
    """Raises RuntimeError for new tokens whose gradients somebody would wait for."""
    for i in range(_FIELDS, min(_FIELDS + 4, len(arguments))):
        x = arguments[i]
        if isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                f"{NewTokens._fields[i - _FIELDS]}: expected a tensor that requires no gradient, "
                f"since {name} has none, or a call under torch.no_grad(), got one that does"
            )


# ---- the PyTorch path ---------------------------------------------------------------------------


def _fold(*arguments: Any) -> None:
    p, (slots, window, keep, deg) = Pool(*arguments[:_FIELDS]), arguments[_FIELDS:]
    check_distinct("slots", slots, p)
    decoding.fold(p, slots, window, keep, deg)


def _step(*arguments: Any) -> Tensor:
    p, new = Pool(*arguments[:_FIELDS]), NewTokens(*arguments[_FIELDS : _FIELDS + 4])
    slots, cu_seqlens, max_tokens, window, deg, _ = arguments[_FIELDS + 4 :]
    check_distinct("slots", slots, p)
    _check_lengths(cu_seqlens, new.Q.shape[1], max_tokens)
    return decoding.step(p, new, slots, cu_seqlens, max_tokens, window, deg)


def _prefill(*arguments: Any) -> Tensor:
    p, new = Pool(*arguments[:_FIELDS]), NewTokens(*arguments[_FIELDS : _FIELDS + 4])
    slots, cu_seqlens, keep, deg = arguments[_FIELDS + 4 :]
    check_distinct("slots", slots, p)
    _check_lengths(cu_seqlens, new.Q.shape[1], new.Q.shape[1])
    return decoding.prefill(p, new, slots, cu_seqlens, keep, deg)


def _copy(*arguments: Any) -> None:
    p, (source, target) = Pool(*arguments[:_FIELDS]), arguments[_FIELDS:]
    check_distinct("target", target, p)
    decoding.copy(p, source, target)


def _reset(*arguments: Any) -> None:
    decoding.reset(Pool(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _rollback(*arguments: Any) -> None:
    p, (slots, tokens) = Pool(*arguments[:_FIELDS]), arguments[_FIELDS:]
    check_distinct("slots", slots, p)
    _check_rollback(slots, tokens, p)
    decoding.rollback(p, slots, tokens)


# ---- the kernels --------------------------------------------------------------------------------


def _rollback_by_kernel(plan: cuda.Plan, arguments: tuple[Any, ...]) -> None:
    p, (slots, tokens) = Pool(*arguments[:_FIELDS]), arguments[_FIELDS:]
    _check_rollback(slots, tokens, p)
    cuda.rollback(plan, arguments)


# A plan and a launch for each operator.
_KERNELS: dict[str, tuple[Callable[..., cuda.Plan], Callable[..., Any]]] = {
    "decode_fold": (cuda.plan_fold, cuda.fold),
    "decode_step": (cuda.plan_step, cuda.step),
    "decode_prefill": (cuda.plan_prefill, cuda.prefill),
    "decode_copy": (cuda.plan_copy, cuda.copy),
    "decode_reset": (cuda.plan_reset, cuda.reset),
    "decode_rollback": (cuda.plan_rollback, _rollback_by_kernel),
}


def _log(name: str, arguments: tuple[Any, ...], reason: str | None) -> None:
    high, keys, first = arguments[0], arguments[3], arguments[_FIELDS]
    path = "kernels" if reason is None else f"PyTorch path ({reason})"
    dtype, states = str(keys.dtype).removeprefix("torch."), [*high.shape]
    what = "Q" if first.dim() == 4 else "slots"
    _logger.debug(
        *("%s on %s: %s; %s, states %s, %s %s", name, keys.device, path),
        *(dtype, states, what, [*first.shape]),
    )


def _on_cuda(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The operator on CUDA devices: by the kernels, or ``otherwise``."""
    plan_of, launch = _KERNELS[name]

    def run(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradients(name, arguments)
        plan = plan_of(arguments)
        if _logger.isEnabledFor(logging.DEBUG):
            _log(name, arguments, plan.reason)
        return launch(plan, arguments) if plan.reason is None else otherwise(*arguments)

    return run


def _elsewhere(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The operator by PyTorch operations, where there are no kernels for it."""

    def logged(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradients(name, arguments)
        if _logger.isEnabledFor(logging.DEBUG):
            device = arguments[3].device
            _log(name, arguments, coverage.device_reason(device.type, device.index))
        return run(*arguments)

    return logged


class KnownSteps:
    """Steps on one pool that kernels were found to run: such a call may leave the dispatcher out,
    which takes as long as all that it is then spared."""

    _MOST = 256

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._plans: dict[tuple[Any, ...], cuda.Plan] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownSteps, ()  # a copy's pool is another one

    def key(
        self, p: Pool, new: tuple[Any, ...], options: tuple[int, ...]
    ) -> tuple[Any, ...] | None:
        """What decides how a step is carried out, with Q, K, V, log_G, slots and cu_seqlens; None
        where more than this does: other tensors than ordinary ones, gradients, transforms,
        autocast, somebody who reads the log."""
        if p is not self._pool:
            self._pool = p
            self._plans.clear()
        Q, K, V, log_G, slots, cu_seqlens = new
        if (
            not are_ordinary(*new)
            or not nothing_intercepts()
            or torch.is_autocast_enabled(Q.device.type)
            or _logger.isEnabledFor(logging.DEBUG)
            or want_gradients(Q, K, V, log_G)
        ):
            return None
        return (
            cuda.signature(Q),
            cuda.signature(K),
            cuda.signature(V),
            log_G is not None and cuda.signature(log_G),
            cuda.signature(slots),
            cu_seqlens is not None and cuda.signature(cu_seqlens),
            options,
            cuda.is_turned_off(),
        )

    def find(self, key: tuple[Any, ...] | None) -> cuda.Plan | None:
        """The plan of such a step, if there was one before."""
        return self._plans.get(key)

    def add(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """That a step with these arguments has been checked and run."""
        if arguments[0].device.type in coverage.DEVICE_TYPES:
            plan = cuda.plan_step(arguments)
            if plan.reason is None and len(self._plans) < self._MOST:
                self._plans[key] = plan


# ---- the operators ------------------------------------------------------------------------------


def _nothing(*arguments: Any) -> None:
    pass


def _output(*arguments: Any) -> Tensor:
    Q, _, V = arguments[_FIELDS : _FIELDS + 3]
    return Q.new_empty((*Q.shape[:3], V.shape[3]))


_OPERATORS = {
    "decode_fold(POOL, Tensor slots, int window, int keep, int deg) -> ()": (_fold, _nothing),
    "decode_step(POOL, NEW, int max_tokens, int window, int deg, int slices) -> Tensor": (
        _step,
        _output,
    ),
    "decode_prefill(POOL, NEW, int keep, int deg) -> Tensor": (_prefill, _output),
    "decode_copy(POOL, Tensor source, Tensor target) -> ()": (_copy, _nothing),
    "decode_reset(POOL, Tensor slots, Tensor phases) -> ()": (_reset, _nothing),
    "decode_rollback(POOL, Tensor slots, Tensor tokens) -> ()": (_rollback, _nothing),
}
# What runs on CUDA devices, by name.
on_cuda: dict[str, Callable[..., Any]] = {}
for _schema, (_function, _fake) in _OPERATORS.items():
    _schema = _schema.replace("POOL", _POOL).replace("NEW", _NEW)
    _name = _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _function = below_autograd(_function)
    # That there are no gradients needs no layer of autograd's, for which every step would wait.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(_name, _elsewhere(_name, _function), "CompositeExplicitAutograd")
    on_cuda[_name] = _on_cuda(_name, _function)
    _library.impl(_name, on_cuda[_name], "CUDA")
    torch.library.register_fake(f"retention::{_name}", _fake, lib=_library)
