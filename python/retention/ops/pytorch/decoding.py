"""Decoding with a pool's slots in PyTorch operations: on every device, of every degree.

No loop goes over slots, and neither a step nor a fold waits for a device. Slots out of range stand
for nothing: what they read are zeros, and nothing is written for them. Arguments were checked.

Shapes: n rows, each a slot; m tokens of a ring; T the most new tokens of a row. A row's new tokens
are the last of its T columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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

    def __init__(self, mask: Tensor | None):
        """None: all rows are."""
        self.rows: Tensor | None = None  # all of them
        self.some: Tensor | None = None  # there are some for sure
        if mask is None:
            return
        if _answers_at_once(mask.device):
            self.rows = mask.nonzero()[:, 0]
        else:
            every = torch.arange(mask.shape[0], device=mask.device)
            # The first one has the largest number, for argmax promises no order among equals.
            first = (mask * (every.shape[0] - every)).argmax() if len(every) else every
            self.rows = torch.where(mask, every, first)
            self.some = mask.any()

    def of(self, x: Tensor) -> Tensor:
        """What the rows have of x, [n, ...]."""
        return x if self.rows is None else x[self.rows]

    def store(self, target: Tensor, index: tuple[Tensor | slice, ...], values: Tensor) -> None:
        """``target[index] = values``, whose first dimension is that of ``rows``."""
        if self.some is not None:
            values = torch.where(self.some, values, target[index])
        target[index] = values


def _answers_at_once(device: torch.device) -> bool:
    return device.type == "cpu"


class _Rows(NamedTuple):
    """The slots that rows of a call name."""

    there: Tensor | None  # [n], whether a row has one; None: all have, each the next of the pool's
    slots: Tensor  # int64 [n]; 0 where there is none

    @staticmethod
    def of(p: Pool, slots: Slots) -> _Rows:
        count, slots = p.cursors.shape[0], slots.long()
        if _answers_at_once(slots.device) and slots.tolist() == [*range(count)]:
            return _Rows(None, slots)
        there = (slots >= 0) & (slots < count)
        return _Rows(there, torch.where(there, slots, 0))

    def cursors(self, p: Pool) -> Tensor:
        """A copy of those of slots: int64 [n, 4]."""
        return p.cursors.index_select(0, self.slots)

    def read(self, x: Tensor) -> Tensor:
        """What slots hold in a tensor of the pool, [n, ...]; itself where nothing has to move."""
        return x if self.there is None else x.index_select(0, self.slots)

    def cleared(self, x: Tensor) -> Tensor:
        """x [n, ...], and 0 for rows without a slot."""
        if self.there is None:
            return x
        return x.masked_fill(~self.there.view(-1, *[1] * (x.dim() - 1)), 0)


def _owners(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The row that each of ``total`` packed tokens is of, and whether it is of one at all."""
    place = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    row = torch.searchsorted(cu_seqlens[1:], place, right=True)
    return row.clamp(max=cu_seqlens.shape[0] - 2), row < cu_seqlens.shape[0] - 1


class _Columns(NamedTuple):
    """Where packed tokens are as the last ones in n rows of T columns."""

    tokens: Tensor  # [n], how many
    real: Tensor  # [n, T], whether there is a token
    place: Tensor  # [n, T], where it is in packed tensors; 0 where there is none

    @staticmethod
    def of(cu_seqlens: Tensor, total: int, most: int) -> _Columns:
        """Tokens after the first ``most`` of a row are ignored."""
        starts = cu_seqlens[:-1].clamp(0, total)
        tokens = (cu_seqlens[1:].clamp(0, total) - starts).clamp(0, most)
        column = torch.arange(most, device=starts.device) - (most - tokens[:, None])
        real = column >= 0
        return _Columns(tokens, real, torch.where(real, starts[:, None] + column, 0).long())

    def put_back(self, out: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
        """``out`` [n, T, ...] in the shape of packed tensors; 0 for tokens that no row has."""
        most = out.shape[1]
        row, owned = _owners(cu_seqlens, total)
        place = torch.arange(total, device=out.device)
        column = place - cu_seqlens[row] + most - self.tokens[row]
        owned = owned & (column < most)
        taken = out[row, column.clamp(0, most - 1)]
        return taken.masked_fill(~owned[:, None, None], 0)[None]


def _oldest(p: Pool, slots: Tensor, start: Tensor, token: Tensor, real: Tensor) -> decoding.Tokens:
    """Tokens in the order of a ring: ``token`` [n, m] from the oldest, zeros where not ``real``."""
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


def _with_oldest(
    p: Pool, slots: Tensor, cursor: Cursor, count: Tensor, most: int, deg: int
) -> tuple[Tensor, Tensor]:
    """The states of slots after the oldest ``count`` [n] tokens of their rings, up to ``most``."""
    token = torch.arange(most, device=slots.device).expand(len(slots), -1)
    tokens = _oldest(p, slots, cursor.start, token, token < count[:, None])
    return decoding.fold(tokens, *_read_state(p, slots, cursor.folded), deg)


def whole_state(p: Pool, slots: Slots, deg: int) -> tuple[Tensor, Tensor]:
    """The state after all tokens seen, those of the ring too, and its sum of keys: [n, h, D, dv]
    and [n, h, D], zeros where there is no slot."""
    with without_autocast(slots.device):
        rows = _Rows.of(p, slots)
        cursor = pool.unpack(rows.cursors(p))
        state, keys = _with_oldest(p, rows.slots, cursor, cursor.length, p.keys.shape[2], deg)
        return rows.cleared(state), rows.cleared(keys)


def set_state(
    p: Pool, slots: Slots, state: Tensor, keys: Tensor, positions: Tensor, window: int
) -> None:
    """States after ``positions`` [n] tokens into slots, whose rings are then empty."""
    there, slots = _Rows.of(p, slots)
    selection = _Selection(there)
    slots, positions = selection.of(slots), selection.of(positions).long()
    cursor = pool.unpack(p.cursors[slots])
    zero = torch.zeros_like(cursor.start)
    # A state counts as one of some tokens, so that it is read; a window of them ends none sooner.
    folded = torch.where(positions > 0, positions, window)
    after = Cursor(zero, zero, cursor.phase, folded, positions)
    state, keys = selection.of(state), selection.of(keys)
    _write_state(p, selection, slots, state, keys, cursor, after)


# ---- the operators ------------------------------------------------------------------------------


def fold(p: Pool, slots: Slots, window: int, keep: int, deg: int) -> None:
    """The operator ``retention::decode_fold``: the oldest tokens of a ring go into the state, up to
    the end of the slot's window, where there are as many beyond ``keep``."""
    with without_autocast(slots.device):
        rows = _Rows.of(p, slots)
        _fold(p, rows, rows.cursors(p), window, keep, deg)


def _until_window_ends(folded: Any, phase: Any, window: int) -> Any:
    """Tokens, at least one: of tensors, or of integers."""
    return window - (folded - phase) % window


def _fold(p: Pool, rows: _Rows, cursors: Tensor, window: int, keep: int, deg: int) -> Tensor:
    """:func:`fold` of rows that are at ``cursors`` [n, 4], and where they are then."""
    # In integers, of which dozens of rows take no longer than one operation on tensors.
    if _answers_at_once(cursors.device) and not any(
        length >= _until_window_ends(folded, phase, window) + keep
        for _, length, phase, folded, _ in pool.in_integers(cursors)
    ):
        return cursors
    cursor = pool.unpack(cursors)
    count = _until_window_ends(cursor.folded, cursor.phase, window)
    due = cursor.length >= count + keep
    if rows.there is not None:
        due = due & rows.there
    selection = _Selection(due)
    slots, count = selection.of(rows.slots), selection.of(count)
    before = Cursor(*map(selection.of, cursor))
    state, keys = _with_oldest(p, slots, before, count, window, deg)
    _write_state(p, selection, slots, state, keys, before, _folded(p, before, count))
    return rows.cursors(p)


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
    with without_autocast(slots.device):
        rows = _Rows.of(p, slots)
        cursors = _fold(p, rows, rows.cursors(p), window, 0, deg)
        return _append_and_attend(p, new, rows, cursors, cu_seqlens, most, deg)


def _append_and_attend(
    p: Pool,
    new: NewTokens,
    rows: _Rows,
    cursors: Tensor,
    cu_seqlens: Tensor | None,
    most: int,
    deg: int,
) -> Tensor:
    """New tokens join the rings of rows that are at ``cursors`` [n, 4], which move."""
    total, ring = new.Q.shape[1], p.keys.shape[2]
    if new.Q.numel() == 0:
        return new.Q.new_zeros(*new.Q.shape[:3], new.V.shape[3])
    columns = None if cu_seqlens is None else _Columns.of(cu_seqlens, total, most)
    if columns is not None:
        new = NewTokens(*(None if x is None else x[0, columns.place] for x in new))  # [n, T, ...]
    cursor, tokens = pool.unpack(cursors), total if columns is None else columns.tokens
    cursor.length.add_(tokens)
    cursor.seen.add_(tokens)
    # The age of every place's token, the newest of which has 0; and the place of every age.
    end = (cursor.start + cursor.length)[:, None]
    age = torch.remainder(end - torch.arange(1, ring + 1, device=end.device), ring)  # [n, ring]

    # Behind the ring's tokens, where nobody reads before the cursor has moved.
    place = age[:, : new.Q.shape[1]].flip(1)
    written = None if columns is None else columns.real
    if rows.there is not None:
        there = rows.there[:, None].expand_as(place)
        written = there if written is None else written & there
    selection = _Selection(None if written is None else written.flatten())
    slot = rows.slots[:, None].expand_as(place).flatten()
    index = selection.of(slot), slice(None), selection.of(place.flatten())
    for target, x in ((p.keys, new.K), (p.values, new.V), (p.log_gates, new.log_G)):
        if target is not None:
            selection.store(target, index, selection.of(x.flatten(0, 1)).to(target.dtype))

    out = rows.cleared(_attend(p, new.Q, rows, cursor, age, deg))
    selection = _Selection(rows.there)
    selection.store(p.cursors, (selection.of(rows.slots),), selection.of(cursors))
    return out if columns is None else columns.put_back(out, cu_seqlens, total)


def _attend(p: Pool, Q: Tensor, rows: _Rows, cursor: Cursor, age: Tensor, deg: int) -> Tensor:
    """What queries Q [n, T, hq, d] of the last T tokens of rings read: [n, T, hq, dv].

    The tokens are read where they lie, as their ``age`` [n, ring] has it. Places that a query does
    not see weigh nothing.
    """
    n, width = Q.shape[:2]
    h, ring = p.keys.shape[1:3]
    unused = age >= cursor.length[:, None]  # [n, ring]
    hidden = unused[:, None]
    if width > 1:
        hidden = hidden | decoding.is_later(age, width)
    sums = log_decay = None
    if p.log_gates is not None:
        gates = rows.read(p.log_gates).gather(2, age[:, None].expand(n, h, ring))
        sums = decoding.log_decays(gates, width)
        log_decay = sums.gather(3, age[:, None, None].expand(n, h, width, ring))
    recent = decoding.Recent(rows.read(p.keys), rows.read(p.values), log_decay, hidden[:, None])

    at_once = _answers_at_once(Q.device)
    folded = cursor.folded.tolist() if at_once else [0, 1]  # there may be both
    past = None
    if any(folded):
        there, log_decay = None if all(folded) else cursor.folded > 0, None
        if sums is not None:
            # Than the oldest token. A row without a slot reads a ring that has not folded.
            older = cursor.length.long().clamp(max=ring)[:, None, None, None]
            log_decay = sums.gather(3, older.expand(n, h, width, 1))[..., 0]
        past = decoding.Past(rows.read(p.high), rows.read(p.key_sum), log_decay, there)
    if at_once:
        out = decoding.attend(Q, recent, past, deg)
        # What unused places hold may be no number, and then 0 times it is none: it shows here.
        if math.isfinite(out.sum()):
            return out
    values = recent.v.masked_fill(unused[:, None, :, None], 0)
    return decoding.attend(Q, recent._replace(v=values), past, deg)


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
        rows = _Rows.of(p, slots)
        last = _append_and_attend(p, tail, rows, rows.cursors(p), tail_bounds, keep, deg)
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
    rows = _Rows.of(p, slots)
    slots, cursor = rows.slots, pool.unpack(rows.cursors(p))
    state = keys = None
    if not _answers_at_once(slots.device) or cursor.seen.any() or cursor.folded.any():
        state, keys = _with_oldest(p, slots, cursor, cursor.length, p.keys.shape[2], deg)
    out, _, state, keys, _, _ = torch.ops.retention.forward(
        *(*new, state, keys, cu_seqlens, deg, None, None),
        *(True, False, False),  # return_final_state, save_for_backward, keep_states
    )
    if cu_seqlens is None:
        out = rows.cleared(out)
        tokens = torch.full_like(cursor.seen, new.Q.shape[1])
    else:
        if rows.there is not None:
            row, _ = _owners(cu_seqlens, new.Q.shape[1])
            out.masked_fill_(~rows.there[row][:, None, None], 0)
        tokens = cu_seqlens.diff()
    selection = _Selection(rows.there)
    after = _folded(p, cursor, cursor.length)
    after = after._replace(folded=after.folded + tokens, seen=after.seen + tokens)
    slots, state, keys = map(selection.of, (slots, state, keys))
    cursor, after = (Cursor(*map(selection.of, c)) for c in (cursor, after))
    _write_state(p, selection, slots, state, keys, cursor, after)
    return out


def copy(p: Pool, source: Slots, target: Slots) -> None:
    """The operator ``retention::decode_copy``: what ``source`` [n] hold into ``target`` [n], as if
    all were read first."""
    sources, targets = _Rows.of(p, source), _Rows.of(p, target)
    masks = [rows.there for rows in (sources, targets) if rows.there is not None]
    selection = _Selection(masks[0] & masks[-1] if masks else None)
    source, target = selection.of(sources.slots), selection.of(targets.slots)
    cursors = p.cursors[source]
    selection.store(p.cursors, (target,), pool.pack(_emptied(pool.unpack(p.cursors[target]))))
    for x in p.contents():
        selection.store(x, (target,), x[source])
    selection.store(p.cursors, (target,), cursors)


def reset(p: Pool, slots: Slots, phases: Tensor) -> None:
    """The operator ``retention::decode_reset``: nothing was seen, and windows end at ``phases``,
    int32 [n]."""
    there, slots = _Rows.of(p, slots)
    selection = _Selection(there)
    slots, phases = selection.of(slots), selection.of(phases)
    cursor = pool.unpack(p.cursors[slots])._replace(phase=phases)
    selection.store(p.cursors, (slots,), pool.pack(_emptied(cursor)))


def rollback(p: Pool, slots: Slots, tokens: Tensor) -> None:
    """The operator ``retention::decode_rollback``: the last ``tokens`` [n] were never seen."""
    there, slots = _Rows.of(p, slots)
    selection = _Selection(there)
    slots, tokens = selection.of(slots), selection.of(tokens)
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
