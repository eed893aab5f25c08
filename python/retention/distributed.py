"""One sequence over many devices: every rank of a process group holds a share of its tokens.

Ranks tell each other what their tokens leave in the state and nothing else: one all-gather of a
state a pass, whatever the sequence's length.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retention.ops import checks, shares  # noqa: F401  (registers torch.ops.retention.share_*)
from retention.ops.arguments import cast_for_autocast, check_arguments, state_shape
from retention.ops.call import Operands
from retention.ops.exchange import Place, States
from retention.ops.torch_private import group_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["power_retention"]


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_states: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
    share_start: int | None = None,
    all_final_states: bool = False,
    payload: torch.dtype | None = None,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`retention.power_retention` of sequences whose tokens the ranks of a group share.

    Rank r passes the r-th of the contiguous parts that a row is cut into, its share, and gets the
    outputs of these tokens: those that one process would have had for the whole row. Shares may
    differ in length and may be empty. Each pass has one all-gather, of a state and its sum of keys
    for each row of the batch; a backward pass through final states sends as much again.

    Every rank has to make the call, and the backward pass through it, as often as the others do and
    in the same order, or they wait for it until the group's timeout. The loss is the sum of the
    ranks' losses: gradients are those of that sum.

    The arguments are those of :func:`retention.power_retention`, the same on every rank but for
    tensors of tokens and ``share_start``. These differ or are new:

    Args:
        Q, K, V, log_G: of the rank's tokens, ``[b, t, ...]``, with a t of each rank's own.
        initial_state: as there, passed by every rank. That of a row, ``[b, h, D, dv]``, is read on
            rank 0; that of packed sequence i, ``[n, h, D, dv]``, on the rank where it begins. Its
            gradient arrives there, and is 0 elsewhere.
        return_final_state: also return the state after the whole sequence. Of rows, every rank gets
            all. Of packed sequences, the rank that holds the last token (or, of one without tokens,
            the place where it would be) gets it, and the others zeros.
        sum_of_keys: likewise.
        cu_seqlens: int32 ``[n + 1]`` of the whole row, equal on every rank.
        group: the ranks, a process group or a one-dimensional ``DeviceMesh``, for tensors of Q's
            device. Default: the default group.
        share_start: where in the whole row the rank's tokens begin. Read with ``cu_seqlens`` or
            ``check`` alone. Default: rank times t, as with shares of equal length.
        all_final_states: with ``cu_seqlens``, every rank gets the final states of all sequences, by
            one more collective in each pass. Default False.
        payload: dtype in which states are sent: theirs, or ``torch.bfloat16``, half of it, which
            rounds what crosses a rank's edge. Default: theirs.
        check: whether to compare arguments first, by one more small collective and a wait for it:
            where any are wrong or differ, all ranks raise. Default False.

    Returns:
        As :func:`retention.power_retention`: ``O`` ``[b, t, hq, dv]``, and with
        ``return_final_state`` also ``state`` and ``sum_of_keys``. The same bits in every run.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value. The
            message names it, what it got and what it accepts.
    """
    Q, K, V, log_G = cast_for_autocast(Q, K, V, log_G)
    operands = Operands(Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    process_group = _process_group(group)
    own = _Own(operands, deg, scale, chunk_size, switch_over_seq_len, share_start, payload)
    if check:
        settings = {
            "deg": deg,
            "return_final_state": return_final_state,
            "all_final_states": all_final_states,
            "payload": str(payload),
        }
        # Here, for the decorator alone takes a second to import.
        torch.compiler.disable(_compare)(own, settings, process_group)
    own.check(process_group)
    place = Place(group_name(process_group), process_group.rank(), process_group.size())
    if payload is None:
        payload = checks.state_dtype(Q.dtype)
    options = (deg, chunk_size, switch_over_seq_len)
    call = _Call(operands, place, payload, options, keep_states)
    if cu_seqlens is None:
        out, state, keys = call.share(operands, None, None, return_final_state)
    else:
        start = place.rank * Q.shape[1] if share_start is None else share_start
        out, state, keys = _packed(call, start, return_final_state)
        if return_final_state and all_final_states:
            state, keys = (
                torch.ops.retention.sum_over_ranks(x, place.group) for x in (state, keys)
            )
    return (out, state, keys) if return_final_state else out


class _Call(NamedTuple):
    """What the parts of a call have in common."""

    operands: Operands
    place: Place
    payload: torch.dtype
    options: tuple[int, int | None, int | None]
    keep_states: bool

    def share(
        self,
        operands: Operands,
        tail: States | None,
        passes: Tensor | None,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences that ranks share: see `ops.shares`."""
        given = [x for x in (*operands[:6], *(tail or ())) if x is not None]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        out, _, state, keys, *_ = torch.ops.retention.share_forward(
            *operands,
            *(tail or (None, None)),
            passes,
            *self.place,
            self.payload,
            *self.options,
            *(return_final_state, save, self.keep_states),
        )
        return out, state, keys

    def local(self, operands: Operands, return_final_state: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences of this rank alone."""
        out, _, state, keys, _, _ = torch.ops.retention.forward(
            *operands, *self.options, return_final_state, False, self.keep_states
        )
        return out, state, keys


def _packed(
    call: _Call, start: int, return_final_state: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Packed sequences: one that comes from an earlier rank, the head; one that begins here and
    goes on, the tail; and those between, of which no other rank needs to know.

    They are three calls on all tokens, with bounds that differ. Where sequences begin only the
    device knows, and nothing waits for it.
    """
    operands = call.operands
    cut = _Cut(operands.cu_seqlens, start, operands.Q.shape[1])
    tail = call.local(
        operands._replace(
            cu_seqlens=cut.tail,
            initial_state=cut.row(operands.initial_state, cut.last),
            sum_of_keys=cut.row(operands.sum_of_keys, cut.last),
        ),
        True,
    )
    out, *of_head = call.share(
        operands._replace(initial_state=None, sum_of_keys=None, cu_seqlens=cut.head),
        States(*tail[1:]).where(cut.has_tail),
        cut.passes,
        return_final_state,
    )
    between = call.local(operands._replace(cu_seqlens=cut.between), return_final_state)
    out = out + tail[0] + between[0]  # each is 0 where another one is not
    if not return_final_state:
        return out, None, None
    return out, *cut.final_states(States(*between[1:]), States(*of_head), call.place)


class _Cut:
    """Where a share of t tokens, from token ``start`` of the row on, cuts packed sequences.

    Every tensor is on the device: nothing is read.
    """

    def __init__(self, cu_seqlens: Tensor, start: int, t: int):
        stop = start + t
        self._bounds = cu_seqlens
        self._start, self._stop = start, stop
        self._sequences = cu_seqlens.shape[0] - 1
        # The sequences that have the token at either edge, [1]; n where none has it.
        ends = cu_seqlens[1:]
        self.first = (ends <= start).sum(0, keepdim=True)
        self.last = (ends <= stop).sum(0, keepdim=True)
        begins = cu_seqlens[:-1]
        self.comes_in = self._goes_over(begins, self.first, start)
        goes_out = self._goes_over(begins, self.last, stop)
        self.passes = self.comes_in & goes_out & (self.first == self.last)
        self.has_tail = goes_out & ~self.passes
        nothing = torch.zeros_like(cu_seqlens[:1])
        head_end = (self.row(ends, self.first).clamp(max=stop) - start).where(self.comes_in, 0)
        tail_start = (self.row(begins, self.last) - start).where(self.has_tail, t)
        self.head = torch.cat((nothing, head_end))
        self.tail = torch.cat((tail_start, nothing + t))
        self.between = (cu_seqlens - start).clamp(head_end, tail_start)

    def row(self, x: Tensor | None, sequence: Tensor) -> Tensor | None:
        """That of ``sequence`` [1], or of the last one where there is no such."""
        return x if x is None else x.index_select(0, sequence.clamp(max=self._sequences - 1))

    def _goes_over(self, begins: Tensor, sequence: Tensor, edge: int) -> Tensor:
        """Whether a sequence that has the token behind an edge has the one before it, [1]."""
        return (sequence < self._sequences) & (self.row(begins, sequence) < edge)

    def final_states(self, between: States, of_head: States, place: Place) -> States:
        """[n, h, ..]: of the sequences that end here, zeros of all others."""
        begins, ends = self._bounds[:-1], self._bounds[1:]
        has_last = (ends > self._start) & (ends <= self._stop)
        # One without tokens ends where it would be: behind all tokens, on the last rank.
        at = begins >= self._start
        if place.rank < place.ranks - 1:
            at = at & (begins < self._stop)
        ends_here = torch.where(begins == ends, at, has_last)
        index = torch.arange(self._sequences, device=begins.device)
        is_head = self.comes_in & (index == self.first)
        own = ends_here & ~is_head
        head = of_head.where((ends_here & is_head).any(0, keepdim=True))
        row = self.first.clamp(max=self._sequences - 1)
        state = between.state.where(own[:, None, None, None], 0)
        keys = between.keys.where(own[:, None, None], 0)
        return States(state.index_add(0, row, head.state), keys.index_add(0, row, head.keys))


def start_of(group: ProcessGroup | DeviceMesh, t: int, share_start: int | None) -> int:
    """Where the share of t tokens begins in the whole row: given, or by shares of equal length."""
    return _process_group(group).rank() * t if share_start is None else share_start


# ---- what is accepted ---------------------------------------------------------------------------


def _process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected torch.distributed to be initialised (init_process_group) before"
        )
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(group, DeviceMesh):
        raise TypeError(
            "group: expected a process group that this rank belongs to, a DeviceMesh or None, got "
            f"{checks.describe(group)}"
        )
    if group.ndim != 1:
        raise ValueError(
            f"group: expected a DeviceMesh of one dimension, got {group.ndim}; name one, as in "
            'mesh["context"]'
        )
    return group.get_group()


def _check_device(group: ProcessGroup, device: torch.device) -> None:
    """A group of another device type would fail later, or wait for ever."""
    backends = dist.get_backend_config(group)
    types = [part.split(":")[0] for part in backends.split(",")]
    if device.type not in types:
        raise ValueError(
            f"group: expected one for tensors on {device.type} as Q, got one for {backends}"
        )


class _Own(NamedTuple):
    """A rank's own arguments."""

    operands: Operands
    deg: Any
    scale: Any
    chunk_size: Any
    switch_over_seq_len: Any
    share_start: Any
    payload: Any

    def check(self, group: ProcessGroup) -> None:
        """Raises TypeError or ValueError unless they fit each other and the group."""
        check_arguments(self.operands, self.deg, self.scale)
        checks.check_chunks(self.chunk_size, self.switch_over_seq_len)
        if self.share_start is not None:
            checks.check_integer("share_start", self.share_start, 0)
        own = checks.state_dtype(self.operands.Q.dtype)
        if self.payload not in (None, own, torch.bfloat16):
            raise ValueError(
                f"payload: expected None, {own} or torch.bfloat16 with {self.operands.Q.dtype} "
                f"inputs, got {self.payload}"
            )
        _check_device(group, self.operands.Q.device)

    def described(self, settings: dict[str, Any], rank: int) -> dict[str, Any]:
        """What has to be the same on every rank; and the share, which has not."""
        Q, _, V, log_G, initial_state, _, cu_seqlens = self.operands
        given = [x for x in self.operands[:6] if x is not None]
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        start = rank * Q.shape[1] if self.share_start is None else self.share_start
        n, h, D, dv = state_shape(self.operands, self.deg)
        return settings | {
            "Q": f"[{Q.shape[0]}, t, {Q.shape[2]}, {Q.shape[3]}] {Q.dtype}",
            "K": f"[{Q.shape[0]}, t, {h}, {Q.shape[3]}] {Q.dtype}",
            "V": f"[{Q.shape[0]}, t, {h}, {dv}] {V.dtype}",
            "log_G": None if log_G is None else str(log_G.dtype),
            "initial_state": None if initial_state is None else [n, h, D, dv],
            "cu_seqlens": bounds and hashlib.sha256(str(bounds).encode()).hexdigest()[:16],
            "requires_grad": torch.is_grad_enabled() and any(x.requires_grad for x in given),
            "end": bounds and bounds[-1],
            "share": [start, start + Q.shape[1], self.share_start is not None],
        }


_MESSAGE_BYTES = 2048  # of a rank: what it is about to do, or why it is not


def _compare(own: _Own, settings: dict[str, Any], group: ProcessGroup) -> None:
    """Raises on all ranks where one has arguments that are wrong, or not those of the others."""
    error = None
    try:
        own.check(group)
        if own.operands.cu_seqlens is not None:
            checks.sequence_bounds(own.operands.cu_seqlens, 2**31 - 1)
        message = own.described(settings, group.rank())
    except (TypeError, ValueError) as wrong:
        error = wrong
        message = {"error": str(wrong)[:1000]}
    every = _gather_messages(message, group)
    if error is not None:
        raise error
    for rank, other in enumerate(every):
        if "error" in other:
            raise ValueError(f"on rank {rank}, {other['error']}")
    for rank, other in enumerate(every):
        for name, value in every[0].items():
            if name != "share" and other[name] != value:
                raise ValueError(
                    f"{name}: expected the same on every rank, got {value} on rank 0 and "
                    f"{other[name]} on rank {rank}"
                )
    edges = [0]
    # Without packed sequences nobody reads where a share begins, unless it was given.
    matters = every[0]["cu_seqlens"] is not None or any(other["share"][2] for other in every)
    for rank, other in enumerate(every):
        start, stop, _ = other["share"]
        if start != edges[-1] and matters:
            raise ValueError(
                f"share_start: expected {edges[-1]} on rank {rank}, where the shares before it "
                f"end, got {start}"
            )
        edges.append(edges[-1] + stop - start)
    if every[0]["end"] is not None and every[0]["end"] > edges[-1]:
        raise ValueError(
            f"cu_seqlens: expected to end at {edges[-1]}, the tokens of all shares, or before, got "
            f"{every[0]['end']}"
        )


def _gather_messages(message: dict[str, Any], group: ProcessGroup) -> list[dict[str, Any]]:
    text = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    types = {part.split(":")[0] for part in dist.get_backend_config(group).split(",")}
    device = "cpu" if "cpu" in types else "cuda"
    sent = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(received, sent, group=group)
    return [json.loads(bytes(x.tolist())) for x in received]
