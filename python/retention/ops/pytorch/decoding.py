"""Decoding with a pool's slots in PyTorch operations: on every device, of every degree.

No loop goes over slots, and neither a step nor a fold waits for a device. Slots out of range stand
for nothing: what they read are zeros, and nothing is written for them. Arguments were checked.

Shapes: n rows, each a slot; m tokens of a ring; T the most new tokens of a row. A row's new tokens
are the last of its T columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retention.ops import decoding, pool
from retention.ops.arguments import without_autocast
from retention.ops.pool import Cursor, Pool

Slots = Tensor  # int32 [n]


class NewTokens(NamedTuple):
    """Tensors of tokens to come: [n, t, heads, *], or packed, [1, total, heads, *]."""

    Q: Tensor
    K: Tensor
    V: Tensor
    log_G: Tensor | None  # noqa: N815


# ---- rows and where they write ------------------------------------------------------------------


class _Selection:
    """Rows that are written, of all that a mask [n] is about.

    How many there are is not asked of a device, which would have to be waited for: there, rows that
    are not in the mask do again what the first one in it does.
    """

    def __init__(self, mask: Tensor):
        self.some: Tensor | None = None
        if _answers_at_once(mask.device):
            self.rows = mask.nonzero()[:, 0]
        else:
            every = torch.arange(mask.shape[0], device=mask.device)
            # The first one has the largest number, for argmax promises no order among equals.
            first = (mask * (every.shape[0] - every)).argmax() if len(every) else every
            self.rows = torch.where(mask, every, first)
            self.some = mask.any()

    def store(self, target: Tensor, index: tuple[Tensor | slice, ...], values: Tensor) -> None:
        """``target[index] = values``, whose first dimension is that of ``rows``."""
        if self.some is not None:
            values = torch.where(self.some, values, target[index])
        target[index] = values


def _answers_at_once(device: torch.device) -> bool:
    return device.type == "cpu"


def _locate(p: Pool, slots: Slots) -> tuple[Tensor, Tensor]:
    """Which rows have a slot, [n], and its index: of those without one it is 0."""
    there = (slots >= 0) & (slots < p.cursors.shape[0])
    return there, torch.where(there, slots, 0).long()


def _owners(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The row that each of ``total`` packed tokens is of, and whether it is of one at all."""
    place = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    row = torch.searchsorted(cu_seqlens[1:], place, right=True)
    return row.clamp(max=cu_seqlens.shape[0] - 2), row < cu_seqlens.shape[0] - 1


class _Columns(NamedTuple):
    """Where the new tokens of each row are, in n rows of T columns."""

    tokens: Tensor  # [n], how many
    real: Tensor  # [n, T], whether there is a token
    place: Tensor | None  # [n, T], where it is in packed tensors; 0 where there is none

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None, most: int) -> _Columns:
        """Of tensors like x. Of packed sequences, tokens after the first ``most`` are ignored."""
        if cu_seqlens is None:
            n, most = x.shape[:2]
            tokens = torch.full((n,), most, device=x.device)
            return _Columns(tokens, torch.ones(n, most, dtype=torch.bool, device=x.device), None)
        starts = cu_seqlens[:-1].clamp(0, x.shape[1])
        tokens = (cu_seqlens[1:].clamp(0, x.shape[1]) - starts).clamp(0, most)
        column = torch.arange(most, device=x.device) - (most - tokens[:, None])
        real = column >= 0
        return _Columns(tokens, real, torch.where(real, starts[:, None] + column, 0).long())

    def take(self, x: Tensor | None) -> Tensor | None:
        """[n, T, ...]"""
        return x if x is None or self.place is None else x[0, self.place]

    def put_back(self, out: Tensor, cu_seqlens: Tensor | None, total: int) -> Tensor:
        """``out`` [n, T, ...] in the shape of tensors like x; 0 for tokens that no row has."""
        if cu_seqlens is None:
            return out
        most = self.real.shape[1]
        row, owned = _owners(cu_seqlens, total)
        place = torch.arange(total, device=out.device)
        column = place - cu_seqlens[row] + most - self.tokens[row]
        owned = owned & (column < most)
        taken = out[row, column.clamp(0, most - 1)]
        return taken.masked_fill(~owned[:, None, None], 0)[None]


def _ring(p: Pool, slots: Tensor, start: Tensor, token: Tensor, real: Tensor) -> decoding.Tokens:
    """Tokens of rings, counted from the oldest: ``token`` [n, m], zeros where not ``real``."""
    place = torch.remainder(start[:, None] + token, p.keys.shape[2])
    heads = torch.arange(p.keys.shape[1], device=slots.device)
    index = (slots[:, None, None], heads[:, None], place[:, None])  # [n, h, m]
    missing = ~real[:, None]
    dtype = p.key_sum.dtype
    return decoding.Tokens(
        p.keys[index].to(dtype).masked_fill_(missing[..., None], 0),
        p.values[index].to(dtype).masked_fill_(missing[..., None], 0),
        None if p.log_gates is None else p.log_gates[index].masked_fill_(missing, 0),
    )


def _emptied(cursor: Cursor) -> Cursor:
    """Of slots that have seen nothing. Their windows end where they did."""
    zero = torch.zeros_like(cursor.seen)
    return Cursor(zero, zero, cursor.phase, zero, zero)


# ---- states -------------------------------------------------------------------------------------


def _read_state(p: Pool, slots: Tensor, folded: Tensor) -> tuple[Tensor, Tensor]:
    """States [n, h, D, dv] and sums of keys [n, h, D], to the last bit; zeros where empty."""
    state = p.high.index_select(0, slots)
    if p.low is not None:
        state = pool.join(state, p.low.index_select(0, slots))
    empty = (folded == 0)[:, None, None]
    keys = p.key_sum.index_select(0, slots).masked_fill_(empty, 0)
    return state.to(keys.dtype).masked_fill_(empty[..., None], 0), keys


def _write_state(
    p: Pool,
    selection: _Selection,
    slots: Tensor,
    state: Tensor,
    keys: Tensor,
    before: Cursor,
    after: Cursor,
) -> None:
    """States into slots, whose cursors were ``before``."""
    # Half a state is none: the slot is empty until all of it is there.
    selection.store(p.cursors, (slots,), pool.pack(_emptied(before)))
    if p.low is not None:
        high, low = pool.split(state)
        selection.store(p.low, (slots,), low)
    elif p.high.dtype == torch.bfloat16:
        random = pool.random_bits(slots, before.folded, state.shape)
        high = pool.round_at_random(state, random)
    else:
        high = state
    selection.store(p.high, (slots,), high)
    selection.store(p.key_sum, (slots,), keys)
    selection.store(p.cursors, (slots,), pool.pack(after))


def tokens_to_fold(cursor: Cursor, window: int, keep: int) -> Tensor:
    """Tokens up to the end of each slot's window where its ring has them beyond ``keep``, else 0:
    [n]."""
    beyond = torch.fmod(cursor.folded - cursor.phase, window)  # of the sign of the first
    missing = torch.where(beyond > 0, window - beyond, -beyond)
    missing = torch.where(beyond == 0, window, missing)
    return torch.where(cursor.length - keep >= missing, missing, 0)


def _with_oldest(
    p: Pool, slots: Tensor, cursor: Cursor, count: Tensor, most: int, deg: int
) -> tuple[Tensor, Tensor]:
    """The states of slots after the oldest ``count`` [n] tokens of their rings, up to ``most``."""
    token = torch.arange(most, device=slots.device).expand(len(slots), -1)
    tokens = _ring(p, slots, cursor.start, token, token < count[:, None])
    return decoding.fold(tokens, *_read_state(p, slots, cursor.folded), deg)


def whole_state(p: Pool, slots: Slots, deg: int) -> tuple[Tensor, Tensor]:
    """The state after all tokens seen, those of the ring too, and its sum of keys: [n, h, D, dv]
    and [n, h, D], zeros where there is no slot."""
    with without_autocast(slots.device):
        there, slots = _locate(p, slots)
        cursor = pool.unpack(p.cursors[slots])
        state, keys = _with_oldest(p, slots, cursor, cursor.length, p.keys.shape[2], deg)
        missing = ~there[:, None, None]
        return state.masked_fill_(missing[..., None], 0), keys.masked_fill_(missing, 0)


def set_state(
    p: Pool, slots: Slots, state: Tensor, keys: Tensor, positions: Tensor, window: int
) -> None:
    """States after ``positions`` [n] tokens into slots, whose rings are then empty."""
    there, slots = _locate(p, slots)
    selection = _Selection(there)
    rows = selection.rows
    slots, positions = slots[rows], positions[rows].long()
    cursor = pool.unpack(p.cursors[slots])
    zero = torch.zeros_like(cursor.start)
    # A state counts as one of some tokens, so that it is read; a window of them ends none sooner.
    folded = torch.where(positions > 0, positions, window)
    after = Cursor(zero, zero, cursor.phase, folded, positions)
    _write_state(p, selection, slots, state[rows], keys[rows], cursor, after)


# ---- the operators ------------------------------------------------------------------------------


def fold(p: Pool, slots: Slots, window: int, keep: int, deg: int) -> None:
    """The operator ``retention::decode_fold``: the oldest tokens of a ring go into the state, up to
    the end of the slot's window, where there are as many beyond ``keep``."""
    with without_autocast(slots.device):
        there, slots = _locate(p, slots)
        count = tokens_to_fold(pool.unpack(p.cursors[slots]), window, keep)
        selection = _Selection(there & (count > 0))
        rows = selection.rows
        if len(rows) == 0:
            return
        slots, count = slots[rows], count[rows]
        cursor = pool.unpack(p.cursors[slots])
        state, keys = _with_oldest(p, slots, cursor, count, window, deg)
        _write_state(p, selection, slots, state, keys, cursor, _folded(p, cursor, count))


def _folded(p: Pool, cursor: Cursor, count: Tensor) -> Cursor:
    """The cursor when ``count`` tokens of the ring have gone into the state."""
    return Cursor(
        torch.remainder(cursor.start + count, p.keys.shape[2]),
        cursor.length - count,
        cursor.phase,
        cursor.folded + count,
        cursor.seen,
    )


def step(
    p: Pool,
    new: NewTokens,
    slots: Slots,
    cu_seqlens: Tensor | None,
    most: int,
    window: int,
    deg: int,
) -> Tensor:
    """The operator ``retention::decode_step``: full windows are folded, the new tokens of each row,
    at most ``most``, join the ring, and their queries read state and ring."""
    fold(p, slots, window, 0, deg)
    with without_autocast(slots.device):
        return _append_and_attend(p, new, slots, cu_seqlens, most, deg)


def _append_and_attend(
    p: Pool, new: NewTokens, slots: Slots, cu_seqlens: Tensor | None, most: int, deg: int
) -> Tensor:
    if new.Q.numel() == 0:
        return new.Q.new_zeros(*new.Q.shape[:3], new.V.shape[3])
    there, slots = _locate(p, slots)
    cursor = pool.unpack(p.cursors[slots])
    columns = _Columns.of(new.Q, cu_seqlens, most)
    query, key, value, gate = map(columns.take, new)
    width = columns.real.shape[1]
    length = cursor.length + columns.tokens

    # Behind the ring's tokens, where nobody reads before the cursor has moved.
    token = length[:, None] - width + torch.arange(width, device=slots.device)
    selection = _Selection((columns.real & there[:, None]).flatten())
    place = torch.remainder(cursor.start[:, None] + token, p.keys.shape[2]).flatten()
    place, slot = place[selection.rows], slots[selection.rows // width]
    for target, x in ((p.keys, key), (p.values, value), (p.log_gates, gate)):
        if target is not None:
            index = (slot, slice(None), place)
            selection.store(target, index, x.flatten(0, 1)[selection.rows].to(target.dtype))

    ring = p.keys.shape[2]
    token = length[:, None] - ring + torch.arange(ring, device=slots.device)
    tokens = _ring(p, slots, cursor.start, token, token >= 0)
    state = p.high.index_select(0, slots).to(p.key_sum.dtype)
    keys = p.key_sum.index_select(0, slots)
    out = decoding.attend(query, tokens, state, keys, deg, cursor.folded > 0)
    out = out.contiguous().masked_fill_(~there[:, None, None, None], 0)
    out = columns.put_back(out, cu_seqlens, new.Q.shape[1])

    selection = _Selection(there)
    rows = selection.rows
    after = cursor._replace(length=length, seen=cursor.seen + columns.tokens)
    selection.store(p.cursors, (slots[rows],), pool.pack(after)[rows])
    return out


def prefill(
    p: Pool, new: NewTokens, slots: Slots, cu_seqlens: Tensor | None, keep: int, deg: int
) -> Tensor:
    """The operator ``retention::decode_prefill``: the ring and the new tokens go into the state,
    but for the last ``keep`` of these, which are in the ring then."""
    if len(slots) == 0:
        return new.Q.new_zeros(*new.Q.shape[:3], new.V.shape[3])
    with without_autocast(slots.device):
        if keep == 0:
            return _fold_new(p, new, slots, cu_seqlens, deg)
        (body, index, body_bounds), (tail, tail_index, tail_bounds) = _cut(new, cu_seqlens, keep)
        first = _fold_new(p, body, slots, body_bounds, deg)
        last = _append_and_attend(p, tail, slots, tail_bounds, keep, deg)
        if cu_seqlens is None:
            return torch.cat((first, last), dim=1)
        out = first.new_zeros(*new.Q.shape[:3], new.V.shape[3])
        out[:, index], out[:, tail_index] = first, last
        return out


def _cut(
    new: NewTokens, cu_seqlens: Tensor | None, keep: int
) -> tuple[tuple[NewTokens, Tensor | slice, Tensor | None], ...]:
    """The last ``keep`` tokens of every row, and before them all others; of each part its tokens,
    their places and its own ``cu_seqlens``."""
    total = new.Q.shape[1]
    places: tuple[Tensor | slice, ...] = (
        slice(0, max(0, total - keep)),
        slice(max(0, total - keep), total),
    )
    bounds: tuple[Tensor | None, ...] = (None, None)
    if cu_seqlens is not None:
        tokens = cu_seqlens.diff()
        kept = tokens.clamp(max=keep)
        row, owned = _owners(cu_seqlens, total)
        is_kept = torch.arange(total, device=row.device) >= (cu_seqlens[1:] - kept)[row]
        places = tuple((owned & x).nonzero()[:, 0] for x in (~is_kept, is_kept))
        bounds = tuple(F.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (tokens - kept, kept))
    parts = (NewTokens(*(None if x is None else x[:, at] for x in new)) for at in places)
    return tuple(zip(parts, places, bounds, strict=True))


def _fold_new(p: Pool, new: NewTokens, slots: Slots, cu_seqlens: Tensor | None, deg: int) -> Tensor:
    """Rings and new tokens go into the states."""
    there, slots = _locate(p, slots)
    cursor = pool.unpack(p.cursors[slots])
    state = keys = None
    if not _answers_at_once(slots.device) or cursor.seen.any() or cursor.folded.any():
        state, keys = _with_oldest(p, slots, cursor, cursor.length, p.keys.shape[2], deg)
    out, _, state, keys, _, _ = torch.ops.retention.forward(
        *(*new, state, keys, cu_seqlens, deg, None, None),
        *(True, False, False),  # return_final_state, save_for_backward, keep_states
    )
    if cu_seqlens is None:
        out.masked_fill_(~there[:, None, None, None], 0)
        tokens = torch.full_like(cursor.seen, new.Q.shape[1])
    else:
        row, _ = _owners(cu_seqlens, new.Q.shape[1])
        out.masked_fill_(~there[row][:, None, None], 0)
        tokens = cu_seqlens.diff()
    selection = _Selection(there)
    rows = selection.rows
    after = _folded(p, cursor, cursor.length)
    after = after._replace(folded=after.folded + tokens, seen=after.seen + tokens)
    cursor, after = (Cursor(*(x[rows] for x in c)) for c in (cursor, after))
    _write_state(p, selection, slots[rows], state[rows], keys[rows], cursor, after)
    return out


def copy(p: Pool, source: Slots, target: Slots) -> None:
    """The operator ``retention::decode_copy``: what ``source`` [n] hold into ``target`` [n], as if
    all were read first."""
    has_source, source = _locate(p, source)
    has_target, target = _locate(p, target)
    selection = _Selection(has_source & has_target)
    source, target = source[selection.rows], target[selection.rows]
    cursors = p.cursors[source]
    selection.store(p.cursors, (target,), pool.pack(_emptied(pool.unpack(p.cursors[target]))))
    for x in p.contents():
        selection.store(x, (target,), x[source])
    selection.store(p.cursors, (target,), cursors)


def reset(p: Pool, slots: Slots, phases: Tensor) -> None:
    """The operator ``retention::decode_reset``: nothing was seen, and windows end at ``phases``,
    int32 [n]."""
    there, slots = _locate(p, slots)
    selection = _Selection(there)
    slots, phases = slots[selection.rows], phases[selection.rows]
    cursor = pool.unpack(p.cursors[slots])._replace(phase=phases)
    selection.store(p.cursors, (slots,), pool.pack(_emptied(cursor)))


def rollback(p: Pool, slots: Slots, tokens: Tensor) -> None:
    """The operator ``retention::decode_rollback``: the last ``tokens`` [n] were never seen."""
    there, slots = _locate(p, slots)
    selection = _Selection(there)
    slots, tokens = slots[selection.rows], tokens[selection.rows]
    cursor = pool.unpack(p.cursors[slots])
    after = cursor._replace(length=cursor.length - tokens, seen=cursor.seen - tokens)
    selection.store(p.cursors, (slots,), pool.pack(after))


def rewind(p: Pool, before: Tensor) -> Tensor:
    """Slots are where cursors ``before`` [slots, 4] had them, but for tokens folded since. Which of
    them are reset, since new tokens have gone into the state: [slots]."""
    then, now = pool.unpack(before), pool.unpack(p.cursors)
    in_state = now.seen - now.length
    was_empty = (then.folded == 0) & (then.length == 0)
    lost = ~was_empty & ((now.seen < then.seen) | (in_state > then.seen))
    rewound = pool.pack(now._replace(length=then.seen - in_state, seen=then.seen))
    empty = pool.pack(_emptied(then))
    p.cursors.copy_(torch.where((was_empty | lost)[:, None], empty, rewound))
    return lost
