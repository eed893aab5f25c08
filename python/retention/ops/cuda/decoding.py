"""Decoding by the kernels: plans of the calls on a pool's slots, and their launches.

As for forward, what shapes, strides, dtypes, devices and options decide is found once; a call then
allocates its results and passes addresses on. Nothing synchronises, and what there is to do is read
on the device: a call that was captured into a CUDA graph can be replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import retention._C as _C
from retention.ops.cuda import coverage
from retention.ops.cuda.coverage import ELEMENTS, is_turned_off
from retention.ops.cuda.plans import Layout, keep, layout, row_strides, signature
from retention.ops.pool import CURSOR_INTEGERS, Pool
from retention.ops.pool import Layout as PoolLayout
from retention.ops.symmetric_power import state_dim
from retention.ops.torch_private import allocate, current_device, current_stream

_DEG = 2
_NULL_SLOT = -1
_PAIR_ROWS = 64  # of a state, in one of the block pairs that slices are made of
_FIELDS = len(Pool._fields)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the shapes, strides, dtypes, devices and options of a call decide."""

    reason: str | None  # why the PyTorch path is taken; where None, all that follows is set
    device: int = -1
    sizes: tuple[int, ...] = ()  # in the order of the call's, as _C.DECODE_STEP_SIZES
    # Of new tokens:
    copies: bool = False  # whether there are tensors that the kernels cannot read as they lie
    out: Layout | None = None
    workspace: Layout | None = None  # None: not needed


_plans: dict[tuple[Any, ...], Plan] = {}


# ---- pools --------------------------------------------------------------------------------------


# A number for all pools of the same signature.
_numbers: dict[tuple[Any, ...], int] = {}
# That of a pool, by the identities of its tensors, while all of them are alive; and what tells.
_known: dict[tuple[int, ...], tuple[int, list[Any]]] = {}


def _of_pool(arguments: tuple[Any, ...]) -> tuple[int, bool]:
    """What a plan's key has of a pool, and of the switch for kernels.

    A pool has the same tensors for as long as it lives, and is asked once what they are like: their
    shapes and strides must not be changed in place.
    """
    tensors = arguments[:_FIELDS]
    identities = tuple(map(id, tensors))
    known = _known.get(identities)
    if known is None:
        like = tuple(x is not None and signature(x) for x in tensors)
        number = _numbers.setdefault(like, len(_numbers))

        def forget(_: Any, known: Any = _known) -> None:
            known.pop(identities, None)  # before another tensor may have the identity

        references = [weakref.ref(x, forget) for x in tensors if x is not None]
        known = keep(_known, identities, (number, references))
    return known[0], is_turned_off()


def _check(name: str, x: Tensor | None, shape: tuple[int, ...], dtype: Any, p: Pool) -> None:
    """The kernels read and write memory by these."""
    expected = (shape, dtype, p.keys.device)
    got = None if x is None else (tuple(x.shape), x.dtype, x.device)
    if got != expected:
        raise ValueError(f"{name}: expected {expected} as the pool, got {got}")


def _read_pool(p: Pool) -> tuple[str | None, tuple[int, ...]]:
    """Why no kernel takes the pool, or None and the sizes of _C.DECODE_POOL_SIZES."""
    dtype, device = p.keys.dtype, p.keys.device
    slots, h, ring, d = p.keys.shape
    D, dv = p.high.shape[2:]
    reason = coverage.device_reason(device.type, device.index) or coverage.dtype_reason(dtype)
    if reason is None and state_dim(d, _DEG) != D:
        reason = f"no kernel for states of {D} rows: expected degree {_DEG}"
    if reason is not None:
        return reason, ()
    for name, (shape, its_dtype) in PoolLayout.of(p, _DEG).tensors().items():
        _check(name, getattr(p, name), shape, its_dtype, p)
    strides: list[int] = []
    for name in ("high", "low", "key_sum", "keys", "values", "log_gates"):
        x = getattr(p, name)
        if x is not None and not x[0, 0].is_contiguous():
            return f"{name}: expected what follows the heads to be contiguous", ()
        strides += (0, 0) if x is None else x.stride()[:2]
    slot, integer = p.cursors.stride()
    if integer != 1 or slot % CURSOR_INTEGERS or not p.arrivals.is_contiguous():
        return "cursors, arrivals: expected whole cursors, and to be contiguous", ()
    sizes = (ELEMENTS[dtype], _DEG, d, dv, h, slots, ring, _NULL_SLOT)
    return None, (*sizes, *strides, slot // CURSOR_INTEGERS)


def _stand_ins(names: tuple[str, ...], p: Pool, packed: bool = False) -> tuple[int, ...]:
    """Addresses: only which are null matters here, and that the others are aligned."""
    null = {"low"} if p.low is None else set()
    null |= {"log_gates", "log_gate"} if p.log_gates is None else set()
    null |= set() if packed else {"cu_seqlens"}
    return tuple(256 * (name not in null) for name in names)


def _pool_pointers(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """In the order of _C.DECODE_POOL_POINTERS."""
    high, low, key_sum, keys, values, log_gates, cursors = arguments[: _FIELDS - 1]
    return (
        high.data_ptr(),
        0 if low is None else low.data_ptr(),
        key_sum.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        0 if log_gates is None else log_gates.data_ptr(),
        cursors.data_ptr(),
    )


# ---- new tokens ---------------------------------------------------------------------------------


def plan_step(arguments: tuple[Any, ...]) -> Plan:
    """How a call of ``retention::decode_step`` with these is carried out on a CUDA device.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    return _plan_tokens(arguments, _make_step)


def plan_prefill(arguments: tuple[Any, ...]) -> Plan:
    """Likewise of ``retention::decode_prefill``.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    return _plan_tokens(arguments, _make_prefill)


def _plan_tokens(arguments: tuple[Any, ...], make: Callable[[tuple[Any, ...]], Plan]) -> Plan:
    Q, K, V, log_G, slots, cu_seqlens = arguments[_FIELDS : _FIELDS + 6]
    key = (
        _of_pool(arguments),
        signature(Q),
        signature(K),
        signature(V),
        log_G is not None and signature(log_G),
        signature(slots),
        cu_seqlens is not None and signature(cu_seqlens),
        arguments[_FIELDS + 6 :],  # four of a step, two of a prefill
    )
    return _plans.get(key) or keep(_plans, key, make(arguments))


def _make_step(arguments: tuple[Any, ...]) -> Plan:
    max_tokens, window, _, slices = arguments[-4:]
    total, keep_ = arguments[_FIELDS].shape[1], 0
    pairs = arguments[0].shape[2] // _PAIR_ROWS
    slice_pairs = -(-pairs // slices) if slices else 0
    plan = _make_tokens(
        *(arguments, max_tokens, (total, window, keep_, slice_pairs)),
        *(_C.decode_step_can_implement, _C.decode_step_workspace_size),
    )
    rows, limit = arguments[_FIELDS + 4].shape[0], arguments[_FIELDS - 1].shape[0]
    if plan.reason is None and rows > limit:
        return Plan(f"{rows} rows: expected at most {limit}, one for each slot")
    return plan


def _make_prefill(arguments: tuple[Any, ...]) -> Plan:
    return _make_tokens(
        *(arguments, arguments[_FIELDS].shape[1], arguments[-2:-1]),  # keep
        *(_C.decode_prefill_can_implement, _C.decode_prefill_workspace_size),
        end_to_end=True,
    )


def _make_tokens(
    arguments: tuple[Any, ...],
    packed_tokens: int,
    rest: tuple[int, ...],
    can_implement: Callable[..., str | None],
    workspace_size: Callable[..., int],
    end_to_end: bool = False,
) -> Plan:
    """Of a call of so many ``tokens`` where they are packed, and with the sizes ``rest``; with rows
    that lie end to end, or in any way."""
    p = Pool(*arguments[:_FIELDS])
    Q, K, V, log_G, slots, cu_seqlens = arguments[_FIELDS : _FIELDS + 6]
    reason, of_pool = _read_pool(p)
    if reason is None and 0 in Q.shape:
        reason = "no tokens"
    if reason is not None:
        return Plan(reason)
    h, hq, rows, packed = K.shape[2], Q.shape[2], slots.shape[0], cu_seqlens is not None
    tokens = packed_tokens if packed else Q.shape[1]
    lead = Q.shape[:2] if packed else (rows, tokens)
    d, dv = p.keys.shape[3], p.values.shape[3]
    _check("Q", Q, (*lead, hq, d), p.keys.dtype, p)
    _check("K", K, (*lead, p.keys.shape[1], d), p.keys.dtype, p)
    _check("V", V, (*lead, h, dv), p.keys.dtype, p)
    if log_G is not None:
        _check("log_G", log_G, (*lead, h), torch.float32, p)
    _check("slots", slots, (rows,), torch.int32, p)
    if packed:
        _check("cu_seqlens", cu_seqlens, (rows + 1,), torch.int32, p)

    strides: list[tuple[int, ...] | None] = [row_strides(x) for x in (Q, K, V)]
    strides.append((0, 0, 0) if log_G is None else log_G.stride())
    if end_to_end and not packed and rows > 1:
        strides = [_follow(s, tokens) for s in strides]
    sizes = (
        *(*of_pool, rows, tokens, hq),
        *(stride for row in strides for stride in row or (0, 0, 0)),
        *rest,
    )
    pointers = _stand_ins(_C.DECODE_STEP_POINTERS, p, packed)
    with torch.cuda.device(Q.get_device()):
        reason = can_implement(sizes, pointers)
        if reason is not None:
            return Plan(reason)
        workspace = workspace_size(sizes, pointers)
    return Plan(
        None,
        Q.get_device(),
        sizes,
        None in strides
        or not (slots.is_contiguous() and (not packed or cu_seqlens.is_contiguous())),
        layout((*Q.shape[:3], dv), Q.dtype),
        layout((workspace,), torch.uint8) if workspace else None,
    )


def _follow(strides: tuple[int, ...] | None, tokens: int) -> tuple[int, ...] | None:
    """Those of rows of so many tokens that follow one another without a gap; None of others."""
    if strides is None or (tokens > 1 and strides[0] != tokens * strides[1]):
        return None
    return (strides[0], strides[0] // tokens, strides[2])


def step(plan: Plan, arguments: tuple[Any, ...]) -> Tensor:
    """The operator ``retention::decode_step`` by the kernels, for a plan without a reason against:
    full windows are folded, then the new tokens join."""
    return _run_tokens(_C.decode_step, plan_step, plan, arguments)


def prefill(plan: Plan, arguments: tuple[Any, ...]) -> Tensor:
    """The operator ``retention::decode_prefill``, likewise: rings are folded, and what is not to be
    kept of the new tokens goes straight into the states."""
    return _run_tokens(_C.decode_prefill, plan_prefill, plan, arguments)


def _run_tokens(
    run: Callable[..., None],
    plan_of: Callable[[tuple[Any, ...]], Plan],
    plan: Plan,
    arguments: tuple[Any, ...],
) -> Tensor:
    if plan.device != current_device():
        with torch.cuda.device(plan.device):
            return _run_tokens(run, plan_of, plan, arguments)
    Q, K, V, log_G, slots, cu_seqlens = arguments[_FIELDS : _FIELDS + 6]
    q, k, v = Q.data_ptr(), K.data_ptr(), V.data_ptr()
    if plan.copies or (q | k | v) & 15:
        Q, K, V = (x.clone(memory_format=torch.contiguous_format) for x in (Q, K, V))
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        log_G = None if log_G is None else log_G.clone(memory_format=torch.contiguous_format)
        new = (Q, K, V, log_G, slots.contiguous(), cu_seqlens)
        arguments = (*arguments[:_FIELDS], *new, *arguments[_FIELDS + 6 :])
        return _run_tokens(run, plan_of, plan_of(arguments), arguments)
    out = allocate(*plan.out)
    if cu_seqlens is not None:
        out.zero_()  # there may be tokens that no row has
    # Freed when this returns, before the work is done: reused by later work on this stream only.
    workspace = None if plan.workspace is None else allocate(*plan.workspace)
    pointers = (
        *_pool_pointers(arguments),
        q,
        k,
        v,
        0 if log_G is None else log_G.data_ptr(),
        out.data_ptr(),
        slots.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        arguments[_FIELDS - 1].data_ptr(),
    )
    run(
        plan.sizes,
        pointers,
        0 if workspace is None else workspace.data_ptr(),
        current_stream(plan.device),
    )
    return out


# ---- what takes no new tokens -------------------------------------------------------------------


def plan_fold(arguments: tuple[Any, ...]) -> Plan:
    """How a call of ``retention::decode_fold`` with these is carried out on a CUDA device.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    slots, window, kept, _ = arguments[_FIELDS:]
    return _plan_at_once("fold", arguments, (slots,), (window, kept))


def fold(plan: Plan, arguments: tuple[Any, ...]) -> None:
    """The operator ``retention::decode_fold``."""
    _run_at_once(_C.decode_fold, plan, arguments, (arguments[_FIELDS], arguments[_FIELDS - 1]))


def plan_copy(arguments: tuple[Any, ...]) -> Plan:
    """As :func:`plan_fold`, of ``retention::decode_copy``."""
    return _plan_at_once("copy", arguments, arguments[_FIELDS:])


def copy(plan: Plan, arguments: tuple[Any, ...]) -> None:
    """The operator ``retention::decode_copy``; cursors are copied whole, with their phases."""
    _run_at_once(_C.decode_copy, plan, arguments, arguments[_FIELDS:])


def plan_reset(arguments: tuple[Any, ...]) -> Plan:
    """As :func:`plan_fold`, of ``retention::decode_reset``."""
    return _plan_at_once("reset", arguments, arguments[_FIELDS:])


def reset(plan: Plan, arguments: tuple[Any, ...]) -> None:
    """The operator ``retention::decode_reset``."""
    _run_at_once(_C.decode_reset, plan, arguments, arguments[_FIELDS:])


def plan_rollback(arguments: tuple[Any, ...]) -> Plan:
    """As :func:`plan_fold`, of ``retention::decode_rollback``."""
    return _plan_at_once("rollback", arguments, arguments[_FIELDS:])


def rollback(plan: Plan, arguments: tuple[Any, ...]) -> None:
    """The operator ``retention::decode_rollback``."""
    _run_at_once(_C.decode_rollback, plan, arguments, arguments[_FIELDS:])


def _plan_at_once(
    name: str,
    arguments: tuple[Any, ...],
    lists: tuple[Tensor, ...],
    options: tuple[int, ...] = (),
) -> Plan:
    """Of a call that takes no workspace: of lists with something for each of some slots."""
    key = (name, _of_pool(arguments), *map(signature, lists), options)
    return _plans.get(key) or keep(_plans, key, _make_at_once(name, arguments, lists, options))


def _make_at_once(
    name: str, arguments: tuple[Any, ...], lists: tuple[Tensor, ...], options: tuple[int, ...]
) -> Plan:
    p = Pool(*arguments[:_FIELDS])
    reason, of_pool = _read_pool(p)
    if reason is not None:
        return Plan(reason)
    count = lists[0].shape[0]
    for number, x in enumerate(lists):
        _check(f"list {number}", x, (count,), torch.int32, p)
    sizes = (*of_pool, count, *options)
    stand_ins = _stand_ins(getattr(_C, f"DECODE_{name.upper()}_POINTERS"), p)
    with torch.cuda.device(p.keys.get_device()):
        reason = getattr(_C, f"decode_{name}_can_implement")(sizes, stand_ins)
    return Plan(reason, p.keys.get_device(), sizes)


def _run_at_once(
    run: Callable[..., None], plan: Plan, arguments: tuple[Any, ...], tensors: tuple[Tensor, ...]
) -> None:
    tensors = tuple(x.contiguous() for x in tensors)
    pointers = (*_pool_pointers(arguments), *(x.data_ptr() for x in tensors))
    with torch.cuda.device(plan.device):
        run(plan.sizes, pointers, current_stream(plan.device))
