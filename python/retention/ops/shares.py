"""The operators ``torch.ops.retention.share_forward`` and ``.share_backward``: one rank's part of
sequences that the ranks of a process group hold together, and ``.sum_over_ranks``.

Without ``cu_seqlens`` every row of the batch goes on from rank to rank. With it, [2], those tokens
of the share are the one sequence that began on an earlier rank; ``passes`` [1] says whether it goes
on to the next, and ``tail_state`` and ``tail_keys`` [1, h, ..] are of a sequence that begins in the
share and goes on, zeros where there is none.

Each pass has one all-gather (`exchange`), between two parts of the work:

    forward     what the share adds to the state | the state before it, with which queries go on
    backward    the gradient that it alone has   | the gradient of the state after it
                for the state before it

An operator of its own has the collective inside, so that ``torch.compile`` and activation
checkpointing see one call, and all ranks make theirs in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retention.ops import exchange, operators
from retention.ops.call import BackwardCall, Operands, Options, OutputGradients, Saved
from retention.ops.cuda import coverage
from retention.ops.cuda import shares as cuda
from retention.ops.cuda.plans import plan_forward
from retention.ops.exchange import Gathering, Place, States, passed_on
from retention.ops.pytorch import run
from retention.ops.pytorch import shares as pytorch
from retention.ops.torch_private import process_group

_logger = logging.getLogger("retention")
_library = torch.library.Library("retention", "FRAGMENT")

_library.define(
    "share_forward(Tensor Q, Tensor K, Tensor V, Tensor? log_G, Tensor? initial_state, "
    "Tensor? sum_of_keys, Tensor? cu_seqlens, Tensor? tail_state, Tensor? tail_keys, "
    "Tensor? passes, str group, int rank, int ranks, ScalarType payload, "
    "int deg, int? chunk_size, int? switch_over_seq_len, bool return_final_state, "
    "bool save_for_backward, bool keep_states) "
    "-> (Tensor out, Tensor norm, Tensor state, Tensor sum_of_keys, Tensor residual, Tensor kept, "
    "Tensor state_in, Tensor keys_in, Tensor log_decays)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "share_backward(Tensor d_out, Tensor? d_state, Tensor? d_keys, Tensor Q, Tensor K, Tensor V, "
    "Tensor? log_G, Tensor state_in, Tensor keys_in, Tensor? cu_seqlens, Tensor? passes, "
    "Tensor out, Tensor residual, Tensor kept, Tensor norm, Tensor log_decays, "
    "str group, int rank, int ranks, ScalarType payload, "
    "int deg, int? chunk_size, int? switch_over_seq_len, bool return_final_state, bool[] wanted) "
    "-> (Tensor dQ, Tensor dK, Tensor dV, Tensor d_log_G, Tensor d_initial_state, Tensor d_keys, "
    "Tensor d_tail_state, Tensor d_tail_keys)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define("sum_over_ranks(Tensor x, str group) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


class ForwardArguments(NamedTuple):
    """The arguments of ``share_forward``, in groups."""

    operands: Operands
    tail: States | None
    passes: Tensor | None
    place: Place
    payload: torch.dtype
    options: Options


def _forward_arguments(arguments: tuple[Any, ...]) -> ForwardArguments:
    tail_state, tail_keys, passes = arguments[7:10]
    return ForwardArguments(
        Operands(*arguments[:7]),
        None if tail_state is None else States(tail_state, tail_keys),
        passes,
        Place(*arguments[10:13]),
        arguments[13],
        Options(*arguments[14:]),
    )


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _forward_arguments(arguments)
    operands, tail, passes, place, payload, options = call
    initial = None
    if operands.initial_state is not None and place.rank == 0:
        initial = States(operands.initial_state, operands.sum_of_keys)
    operands = operands._replace(initial_state=None, sum_of_keys=None)

    steps = _forward_steps(operands, options._replace(return_final_state=False))
    own = steps.added()
    log_decay = exchange.sum_of_gates(operands.log_G, own, operands.cu_seqlens)
    added = own if initial is None else initial.passed_on(log_decay.exp(), *own)
    if passes is not None:
        added = added.where(passes).plus(*tail)
    passing = log_decay if passes is None else log_decay.where(passes, -torch.inf)
    gathering = Gathering(place, added, [passing], payload)
    steps.meanwhile()
    state, keys, log_decays = gathering.wait()

    all_added = States(state, keys)
    nothing = own.zeros()
    if initial is None:
        before = passed_on(all_added, log_decays, nothing, range(place.rank))
    else:
        before = States(*(x.clone() for x in initial))
    end = States(state.new_empty(0, 0, 0, 0), keys.new_empty(0, 0, 0))
    if options.return_final_state and passes is None:
        end = passed_on(all_added, log_decays, nothing, range(place.ranks))
    elif options.return_final_state:
        end = before.passed_on(log_decay.exp(), *own)
    out, norm, residual, kept = steps.results(before)  # which may write to `own`
    return out, norm, *end, residual, kept, *before, log_decays


class BackwardArguments(NamedTuple):
    """The arguments of ``share_backward``, in groups. The operands' states are those before the
    share."""

    d_out: Tensor
    d_end: States | None
    operands: Operands
    passes: Tensor | None
    saved: Saved
    log_decays: Tensor
    place: Place
    payload: torch.dtype
    options: Options
    wanted: Sequence[bool]  # of Q, K, V, log_G, initial_state and sum_of_keys


def _backward_arguments(arguments: tuple[Any, ...]) -> BackwardArguments:
    d_out, d_state, d_keys = arguments[:3]
    return BackwardArguments(
        d_out,
        None if d_state is None else States(d_state, d_keys),
        Operands(*arguments[3:10]),
        arguments[10],
        Saved(*arguments[11:15]),
        arguments[15],
        Place(*arguments[16:19]),
        arguments[19],
        Options(*arguments[20:24]),
        arguments[24],
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _backward_arguments(arguments)
    operands, place, passes = call.operands, call.place, call.passes
    nothing = States(operands.initial_state, operands.sum_of_keys).zeros()
    # Of a final state every rank may have a gradient, and all of them add up. That of a packed
    # sequence's is on the rank where it ends, which is this one.
    of_end = None if passes is None else call.d_end
    of_final = []
    if passes is None and call.options.return_final_state:
        of_final = [*(nothing if call.d_end is None else call.d_end)]
    wanted = [*call.wanted]
    if place.rank > 0:
        wanted[4:] = [False, False]  # nothing of an initial state comes in here

    steps = _backward_steps(call, of_end, wanted)
    gathering = Gathering(place, [*steps.alone(), *of_final], [], call.payload)
    steps.meanwhile()
    state, keys, *finals = gathering.wait()

    after = nothing
    if of_final:
        for rank in range(place.ranks):
            after = after.plus(*States(*finals).of(rank))
    later = range(place.ranks - 1, place.rank, -1)
    after = passed_on(States(state, keys), call.log_decays, after, later)
    gradients = [*steps.results(after.where(passes))]
    if call.wanted[4] and place.rank > 0:
        gradients[4:] = nothing
    return *gradients, *(after if passes is not None else (x.new_empty(0) for x in after))


def _forward_steps(operands: Operands, options: Options) -> Any:
    """How the share is computed, with a step before the exchange and one after it."""
    reason = _reason(operands, options)
    if _logger.isEnabledFor(logging.DEBUG):
        operators.log("share, forward", operands, reason)
    if reason is None:
        return cuda.forward_share(operands, options)
    saves_output = coverage.saves_output(operands.Q, operands.V, options.deg)
    return pytorch.ForwardShare(operands, options, saves_output)


def _backward_steps(call: BackwardArguments, of_end: States | None, wanted: Sequence[bool]) -> Any:
    backward = BackwardCall(
        OutputGradients(call.d_out, *(of_end or (None, None))),
        call.operands,
        call.saved,
        Options(*call.options[:3], save_for_backward=True, keep_states=True),
        wanted,
    )
    reason = _reason(call.operands, backward.options)
    if _logger.isEnabledFor(logging.DEBUG):
        operators.log("share, backward", call.operands, reason)
    return pytorch.BackwardShare(backward) if reason else cuda.backward_share(backward)


def _reason(operands: Operands, options: Options) -> str | None:
    """Why the PyTorch path is taken."""
    device = operands.Q.device
    reason = coverage.device_reason(device.type, device.index)
    return plan_forward((*operands, *options)).reason if reason is None else reason


def _sum(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=process_group(group))
    return total


_library.impl("share_forward", _forward, "CompositeExplicitAutograd")
_library.impl("share_backward", _backward, "CompositeExplicitAutograd")
_library.impl("sum_over_ranks", _sum, "CompositeExplicitAutograd")


@torch.library.register_fake("retention::share_forward", lib=_library)
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    operands, _, _, place, _, options = _forward_arguments(arguments)
    of_state = options._replace(return_final_state=True)
    out, norm, state, keys, residual, kept = operators.forward_fake(*operands, *of_state)
    end = (state, keys)
    if not options.return_final_state:
        end = (state.new_empty(0, 0, 0, 0), keys.new_empty(0, 0, 0))
    before = (torch.empty_like(state), torch.empty_like(keys))
    log_decays = keys.new_empty(place.ranks, *keys.shape[:2])
    return out, norm, *end, residual, kept, *before, log_decays


@torch.library.register_fake("retention::share_backward", lib=_library)
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = _backward_arguments(arguments)
    gradients = run.allocate_backward(call.operands, call.wanted)
    states = call.operands[4:6]
    tail = [x.new_empty(x.shape if call.passes is not None else 0) for x in states]
    return *gradients, *tail


@torch.library.register_fake("retention::sum_over_ranks", lib=_library)
def _sum_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


# ---- autograd -----------------------------------------------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    share = _forward_arguments(inputs)
    out, norm, _, _, residual, kept, *before, log_decays = output
    ctx.share = (*share.place, share.payload, *share.options[:4])
    has_out = coverage.saves_output(share.operands.Q, share.operands.V, share.options.deg)
    ctx.turned_off = coverage.is_turned_off()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(*share.operands[:4], *before, share.operands.cu_seqlens, share.passes),
        *(out if has_out else residual, residual, kept, norm, log_decays),
    )


def _differentiate(ctx: Any, d_out: Any, _: Any, d_state: Any, d_keys: Any, *__: Any) -> Any:
    tensors = ctx.saved_tensors
    Q, V, state_in, keys_in = tensors[0], tensors[2], tensors[4], tensors[5]
    if d_out is None:
        d_out = Q.new_zeros(*Q.shape[:3], V.shape[3])
    if d_state is not None or d_keys is not None:
        d_state = torch.zeros_like(state_in) if d_state is None else d_state
        d_keys = torch.zeros_like(keys_in) if d_keys is None else d_keys
    needed = ctx.needs_input_grad
    wanted = [*needed[:4], *[any(needed[4:6])] * 2]
    with coverage.turned_off(ctx.turned_off):
        gradients = torch.ops.retention.share_backward(
            d_out, d_state, d_keys, *tensors, *ctx.share, wanted
        )
    of_inputs = (*gradients[:6], None, *gradients[6:])
    differentiable = zip(of_inputs, needed[:9], strict=True)
    return (*(g if n else None for g, n in differentiable), *(None,) * 11)


def _refuse_double_backward(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "retention: double backward is not supported; call backward without create_graph=True"
    )


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _differentiate_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.retention.sum_over_ranks(gradient, ctx.group), None


torch.library.register_autograd(
    "retention::share_forward", _differentiate, setup_context=_set_up, lib=_library
)
torch.library.register_autograd("retention::share_backward", _refuse_double_backward, lib=_library)
torch.library.register_autograd(
    "retention::sum_over_ranks", _differentiate_sum, setup_context=_keep_group, lib=_library
)
