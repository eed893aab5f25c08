"""Power retention by chunks, in PyTorch: the path that every device has.

A sequence is cut into chunks of c tokens. Within a chunk the weights are formed outright; what came
before is in the state, one row per row of phi:

    n_i = exp(L_i - L_s) phi_q(q_i) S_c + sum_{s < j <= i} w_ij v_j       o_i = n_i / z_i

Three products carry the state, and a fourth works inside the chunk, forward and backward:

    expand_reduce   S    += y phi(x)^T           state update; dS from queries
    expand_apply    y    += S phi(x)             state query; dv from dS
    contract        dx   += J_phi(x)^T (S^T y)   dq from S; dk from dS
    intra-chunk     causal, in blocks of query rows

The normaliser rides along: values have a last column of ones, so that a state is [N, dv + 1, D] and
its last row is the sum of keys; an output gradient has the normaliser's as its last column. In the
products with the state features come before tokens, which is what a CPU's library is fastest at.

Shapes: N = b * h rows (batch and key head), r query heads to a key head, c tokens in a chunk,
e = dv + 1. Everything here is float32, or float64 for float64 inputs. Decays enter as the p-th root
on the vectors themselves, since the weights are homogeneous of degree p; every one is the
exponential of a sum of the gates that it is made of, never of a difference of sums, so that gates
may be of any size down to -inf. Queries are rescaled row by row to magnitude 1 by a power of two:
the output does not depend on a query's scale (nor on ``scale``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retention.ops import checks
from retention.ops.numerics import (
    has_weight,
    integer_power,
    normalise,
    sums_after,
    sums_between,
    unit_exponent,
)
from retention.ops.symmetric_power import Expansion, Side, state_dim

# Query rows of one intra-chunk block: wide enough for efficient products, and the causal waste is
# half a block a row.
_ROWS = 128
# Blocks whose decays are found together: each alone costs more calls than sums.
_BLOCKS_AT_ONCE = 8

# Elements of one block of phi: on a CPU it should stay in the cache, elsewhere fill the device.
_CPU_BLOCK = 2**21
_DEVICE_BLOCK = 2**25


# ---- the three products with the state ----------------------------------------------------------


def _groups(x: Tensor, deg: int) -> Iterator[slice]:
    """Slices of the N rows, such that one block of phi stays in a CPU's cache."""
    N, d, c = x.shape
    largest = state_dim(d, deg) * deg * 8 // d * c  # the last block's rows, about deg * w / d of D
    budget = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    size = max(1, budget // max(1, largest))
    for start in range(0, N, size):
        yield slice(start, start + size)


def expand_reduce(S: Tensor, x: Tensor, y: Tensor, deg: int, side: Side) -> None:
    """``S += y phi(x)^T`` in place: S [N, e, D], x [N, d, c], y [N, e, c]."""
    for n in _groups(x, deg):
        phi = Expansion(x[n], deg, side)
        for last, rows in phi.rows():
            S[n, :, rows].baddbmm_(y[n], phi.block(last).mT)


def expand_apply(y: Tensor, x: Tensor, S: Tensor, deg: int, side: Side) -> None:
    """``y += S phi(x)`` in place: y [N, e, c], x [N, d, c], S [N, e, D]."""
    for n in _groups(x, deg):
        phi = Expansion(x[n], deg, side)
        for last, rows in phi.rows():
            y[n].baddbmm_(S[n, :, rows], phi.block(last))


def contract(x: Tensor, S: Tensor, y: Tensor, deg: int, side: Side) -> Tensor:
    """The gradient of ``x`` [N, d, c] through phi, where dphi = S^T y: S [N, e, D], y [N, e, c]."""
    dx = torch.empty_like(x)
    for n in _groups(x, deg):
        phi = Expansion(x[n], deg, side)
        for last, rows in phi.rows():
            phi.accumulate_gradient(last, torch.bmm(S[n, :, rows].mT, y[n]))
        dx[n] = phi.gradient()
    return dx


@dataclass
class _Chunk:
    """One chunk of every row, in the compute dtype."""

    tokens: slice
    q: Tensor  # [N, r, c, d], each row at its own scale
    k: Tensor  # [N, c, d]
    v: Tensor  # [N, c, e], last column ones
    g: Tensor | None  # [N, c], log gates
    exponent: Tensor  # [N, r, c, 1] of the queries' power-of-two scale
    z: Tensor | None  # [N, r, c, 1], the normaliser at that scale, in backward
    deg: int

    def __post_init__(self) -> None:
        self._since = None if self.g is None else self.g.cumsum(-1)

    def _root(self, exponent: Tensor) -> Tensor:
        return (exponent / self.deg).exp()

    @property
    def since_start(self) -> Tensor | None:
        """p-th root of each token's decay since the chunk's start: [N, c]."""
        return None if self.g is None else self._root(self._since)

    @property
    def until_end(self) -> Tensor | None:
        """p-th root of the decay from each token to the chunk's end: [N, c]."""
        return None if self.g is None else self._root(sums_after(self.g))

    @property
    def whole_decay(self) -> Tensor | None:
        """The decay over the whole chunk: [N]."""
        return None if self.g is None else self._since[:, -1].exp()

    def queries_for_state(self) -> Tensor:
        """Decayed queries, features first: [N, d, r * c]."""
        q = self.q if self.g is None else self.q * self.since_start[:, None, :, None]
        return q.flatten(1, 2).mT.contiguous()

    def keys_for_state(self) -> Tensor:
        """Decayed keys, features first: [N, d, c]."""
        k = self.k if self.g is None else self.k * self.until_end[..., None]
        return k.mT.contiguous()

    def decay_(self, S: Tensor) -> None:
        """Decays a state over the whole chunk, in place."""
        if self.g is not None:
            S *= self.whole_decay[:, None, None]


# ---- inside a chunk -----------------------------------------------------------------------------


def _decays(g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The decay of keys at queries, from log gates g [N, c]: blocks of query rows i, and of each
    [N, 1, i, j] for the keys up to the last of them; 0 where j > i.

    A key before the block decays until its first row, and from there on with the rows.
    """
    N, c = g.shape
    size = max(1, min(c, _ROWS))
    for start in range(0, c, _BLOCKS_AT_ONCE * size):
        blocks = g[:, start : start + _BLOCKS_AT_ONCE * size]
        blocks = F.pad(blocks, (0, -blocks.shape[1] % size)).unflatten(1, (-1, size))
        within, since = sums_between(blocks), blocks.cumsum(-1)
        for index in range(blocks.shape[1]):
            first = start + index * size
            rows = min(size, c - first)
            decay = g.new_empty(N, rows, first + rows)
            if first > 0:
                until = sums_after(g[:, :first])[:, None]
                torch.add(since[:, index, :rows, None], until, out=decay[..., :first])
            decay[..., first:] = within[:, index, :rows, :rows]
            yield slice(first, first + rows), decay.exp_()[:, None]


def _row_blocks(x: _Chunk) -> Iterator[tuple[slice, Tensor | None]]:
    """Blocks of query rows, and their decays where there are gates."""
    if x.g is not None:
        yield from _decays(x.g)
        return
    c = x.k.shape[1]
    for start in range(0, c, _ROWS):
        yield slice(start, min(start + _ROWS, c)), None


def _scores(x: _Chunk, i: slice) -> Tensor:
    """Scores of query rows i and the keys up to the last of them, [N, r, i, j]; 0 where j > i."""
    rows = i.stop - i.start
    future = torch.ones(rows, rows, dtype=torch.bool, device=x.q.device).triu(1)
    a = torch.matmul(x.q[:, :, i].flatten(1, 2), x.k[:, : i.stop].mT)
    a = a.unflatten(1, (x.q.shape[1], rows))
    a[..., i].masked_fill_(future, 0)
    return a


def _intra_forward(y: Tensor, x: _Chunk) -> None:
    """``y += w v`` in place: y [N, r, c, e]."""
    for i, decay in _row_blocks(x):
        w = integer_power(_scores(x, i), x.deg)
        if decay is not None:
            w *= decay
        wv = torch.bmm(w.flatten(1, 2), x.v[:, : i.stop])
        y[:, :, i] += wv.unflatten(1, (w.shape[1], -1))


def _weight_gradients(
    x: _Chunk, do: Tensor, i: slice, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per pair of the query rows i, [N, r, i, j]: w / z, its derivative by the score, and do . v.

    do [N, r, c, dv]. Neither quotient overflows where z is small: z >= w. Weights are rounded as
    they are in forward: where one is all there is, its share is 1 and not almost.
    """
    a = _scores(x, i)
    slope, share = integer_power(a, x.deg - 1), integer_power(a, x.deg)
    if decay is not None:
        slope, share = slope * decay, share.mul_(decay)
    share.div_(x.z[:, :, i])
    slope = (slope / x.z[:, :, i]).mul_(x.deg)
    do_v = torch.bmm(do[:, :, i].flatten(1, 2), x.v[:, : i.stop, :-1].mT)
    return share, slope, do_v.view_as(a)


def _intra_backward_queries(x: _Chunk, do: Tensor, delta: Tensor, dq: Tensor | None) -> None:
    """Completes ``delta`` [N, r, c, 1] and writes the gradient of the queries ``dq`` [N, r, c, d],
    if wanted.

    delta = do . o comes in with the state's share. Taken from the weights rather than from the
    output, it cancels exactly where one weight is all there is.
    """
    for i, decay in _row_blocks(x):
        share, slope, do_v = _weight_gradients(x, do, i, decay)
        delta[:, :, i] += share.mul_(do_v).sum(-1, keepdim=True)
        if dq is not None:
            da = do_v.sub_(delta[:, :, i]).mul_(slope).flatten(1, 2)
            dq[:, :, i] = torch.bmm(da, x.k[:, : i.stop]).unflatten(1, (x.q.shape[1], -1))


def _intra_backward_keys(
    x: _Chunk,
    do: Tensor,
    delta: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    d_gate: Tensor | None,
) -> None:
    """Adds to the gradients dk [N, c, d], dv [N, c, dv] and d_gate [N, c], those that are wanted,
    in place."""
    for i, decay in _row_blocks(x):
        share, slope, do_v = _weight_gradients(x, do, i, decay)
        if dv is not None:
            dv[:, : i.stop] += torch.bmm(share.flatten(1, 2).mT, do[:, :, i].flatten(1, 2))
        dw = do_v.sub_(delta[:, :, i])
        if d_gate is not None:
            _add_crossing(d_gate, share.mul_(dw).sum(1), i)
        if dk is not None:
            da = dw.mul_(slope).flatten(1, 2)
            dk[:, : i.stop] += torch.bmm(da.mT, x.q[:, :, i].flatten(1, 2))


def _add_crossing(d_gate: Tensor, w_dw: Tensor, i: slice) -> None:
    """``d_gate_t += sum of w_ij dw_ij over j < t <= i``, the pairs that gate t weighs, in place.

    d_gate [N, c], w_dw [N, i, j] of the query rows i.
    """
    before, within = w_dw[..., : i.start], w_dw[..., i]
    if i.start > 0:
        d_gate[:, : i.start] += _sums_before(before.sum(1))
    d_gate[:, i] += _sums_from(before.sum(-1)) + _sums_from(within).tril(-1).sum(-1)


def _sums_from(x: Tensor) -> Tensor:
    """Sums along dimension 1 from each element on, itself included."""
    return x.flip(1).cumsum(1).flip(1)


def _sums_before(x: Tensor) -> Tensor:
    """Sums of x [N, c] over the elements before each."""
    return F.pad(x.cumsum(1)[:, :-1], (1, 0))


# ---- one sequence (a batch of equal length) -----------------------------------------------------


class Sequence:
    """Equal-length sequences [b, t, ...] as chunks of N = b * h rows."""

    def __init__(self, Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None, deg: int, chunk: int):
        self.Q, self.K, self.V, self.log_G = Q, K, V, log_G
        self.deg = deg
        self.b, self.t, self.h, self.dv = V.shape
        self.r = Q.shape[2] // self.h
        self.rows = self.b * self.h
        self.dtype = checks.state_dtype(Q.dtype)
        starts = range(0, self.t, chunk)
        self.chunks = [slice(start, min(start + chunk, self.t)) for start in starts]

    def by_key_head(self, x: Tensor, tokens: slice) -> Tensor:
        """[b, t, h, f] -> [N, c, f] in the compute dtype, a copy."""
        x = x[:, tokens].transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        return x.reshape(self.rows, *x.shape[2:])

    def by_query_head(self, x: Tensor, tokens: slice) -> Tensor:
        """[b, t, h * r, f] -> [N, r, c, f] in the compute dtype, a copy."""
        x = x[:, tokens].transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        return x.reshape(self.rows, self.r, *x.shape[2:])

    def store(self, target: Tensor, tokens: slice, x: Tensor) -> None:
        """[N, c, f] or [N, r, c, f] back into ``target`` [b, t, heads, f]."""
        target[:, tokens] = x.reshape(self.b, target.shape[2], *x.shape[-2:]).transpose(1, 2)

    def chunk(self, tokens: slice, norm: Tensor | None = None) -> _Chunk:
        """Queries of magnitude 1; or, given ``norm`` [b, t, hq], with a normaliser near 1.

        Backward divides by it: however small the weights are, no quotient overflows.
        """
        q = self.by_query_head(self.Q, tokens)
        exponent, z = unit_exponent(q), None
        if norm is not None:
            z = self.by_query_head(norm[..., None], tokens)
            # A row without weight becomes a query of 0, which has no gradient to anything.
            weighed = has_weight(z)
            q, z = torch.where(weighed, q, 0), torch.where(weighed, z, 1)
            shift = torch.frexp(z).exponent.div(self.deg, rounding_mode="trunc")
            shift = (exponent + shift).clamp(-126, 126) - exponent
            exponent, z = exponent + shift, torch.ldexp(z, -shift * self.deg)
        v = self.by_key_head(self.V, tokens)
        g = None
        if self.log_G is not None:
            g = self.by_key_head(self.log_G[..., None], tokens).squeeze(-1)
        return _Chunk(
            tokens,
            torch.ldexp(q, -exponent),
            self.by_key_head(self.K, tokens),
            torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1),
            g,
            exponent,
            z,
            self.deg,
        )

    def empty_state(self) -> Tensor:
        D = state_dim(self.Q.shape[-1], self.deg)
        return self.K.new_zeros(self.rows, self.dv + 1, D, dtype=self.dtype)

    def join_state(self, state: Tensor | None, keys: Tensor | None) -> Tensor | None:
        """[b, h, D, dv] and [b, h, D] -> [N, e, D], a copy."""
        if state is None or keys is None:
            return None
        return torch.cat([state.mT, keys[:, :, None]], dim=2).flatten(0, 1)

    def split_state(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """[N, e, D] -> [b, h, D, dv] and [b, h, D]."""
        S = S.unflatten(0, (self.b, self.h))
        return S[:, :, :-1].mT, S[:, :, -1]


def _state_numerator(x: _Chunk, S: Tensor | None) -> Tensor:
    """What the queries of a chunk read from the state: numerator and normaliser, [N, r, c, e]."""
    (N, r, c, _), e = x.q.shape, x.v.shape[-1]
    if S is None:
        return x.v.new_zeros(N, r, c, e)
    y = x.v.new_zeros(N, e, r * c)
    expand_apply(y, x.queries_for_state(), S, x.deg, "query")
    return y.mT.contiguous().unflatten(1, (r, c))  # tokens come first in all that follows


def _update_state(x: _Chunk, S: Tensor) -> None:
    """The state before a chunk into the state after it, in place."""
    x.decay_(S)
    expand_reduce(S, x.keys_for_state(), x.v.mT, x.deg, "key")


class Ahead(NamedTuple):
    """What was computed of a share of a sequence before it was known what lies around it."""

    # [N, e, D] before every chunk, of the share's own tokens; of gradients, after every chunk.
    states: list[Tensor]
    # What chunks have of their own, by chunk: in forward numerators, [N, r, c, e]; in backward
    # gradients of keys, values and gates, those that are wanted.
    within: list[Any]


def own_states(sequence: Sequence) -> tuple[list[Tensor], Tensor]:
    """The states before every chunk, with nothing before the first, and the one after the last."""
    S = sequence.empty_state()
    before = []
    for tokens in sequence.chunks:
        before.append(S.clone())
        _update_state(sequence.chunk(tokens), S)
    return before, S


def own_numerators(sequence: Sequence) -> list[Tensor]:
    """The products within every chunk."""
    within = []
    for tokens in sequence.chunks:
        x = sequence.chunk(tokens)
        within.append(_state_numerator(x, None))
        _intra_forward(within[-1], x)
    return within


def forward(
    sequence: Sequence,
    S: Tensor | None,
    out: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    keep_state: bool,
    ahead: Ahead | None = None,
) -> Tensor | None:
    """Writes ``out`` [b, t, hq, dv], ``norm`` [b, t, hq] and ``residual``; returns the final state.

    ``S`` [N, e, D] or None is the initial state and is overwritten. ``norm`` is the sum of the
    weights of the rescaled query (see the module's docstring). ``residual``, if wanted, is what
    rounding took from ``out``, in the same shape and dtype.

    ``ahead``, which is overwritten, has the sequence's own states and numerators: to them only what
    is left of S is added, and no final state is returned.
    """
    last = len(sequence.chunks) - 1
    for index, tokens in enumerate(sequence.chunks):
        x = sequence.chunk(tokens)
        if ahead is None:
            y = _state_numerator(x, S)
            _intra_forward(y, x)
        else:
            y = _state_numerator(x, ahead.states[index].add_(S)).add_(ahead.within[index])
        n, z = y[..., :-1], y[..., -1:]
        o = normalise(n, z)
        sequence.store(out, tokens, o)
        if residual is not None:
            sequence.store(residual, tokens, o - sequence.by_query_head(out, tokens))
        sequence.store(norm[..., None], tokens, z)
        if ahead is not None:
            x.decay_(S)
        elif keep_state or index < last:
            if S is None:
                S = sequence.empty_state()
            _update_state(x, S)
    if keep_state and S is None:
        S = sequence.empty_state()
    return S if ahead is None else None


def _numerator_gradient(do: Tensor, z: Tensor, delta: Tensor) -> Tensor:
    """The gradient of numerator and normaliser, dn = do / z and dz = -delta / z: [N, e, r * c]."""
    return torch.cat([do, -delta], dim=-1).div_(z).flatten(1, 2).mT


class KeyTargets(NamedTuple):
    """Where gradients go that come with those of keys, each unless it is None."""

    dk: Tensor | None  # [b, t, h, d]
    dv: Tensor | None  # [b, t, h, dv]
    d_gate: Tensor | None  # [b, t, h]

    @property
    def any(self) -> bool:
        return any(x is not None for x in self)


class OfQueries(NamedTuple):
    """What the first pass of backward leaves for the second."""

    delta: Tensor  # [b, t, hq]: do . o
    read: Tensor | None  # [N, t]: sum of w dw of each query with the state before its chunk
    S: Tensor | None  # [N, e, D] after the last chunk, where it is needed
    starts_with_state: bool


def backward(
    sequence: Sequence,
    S: Tensor | None,
    dS: Tensor | None,
    norm: Tensor,
    d_out: Tensor,
    dq: Tensor | None,
    targets: KeyTargets,
    initial_wanted: bool,
) -> Tensor | None:
    """Writes the gradients dq and those of ``targets``, each unless it is None; returns that of the
    initial state, [N, e, D], if wanted.

    ``S`` and ``dS`` [N, e, D] or None are the initial state and the gradient of the final one; both
    are overwritten. A first pass computes the states before every chunk again and gives dq; a
    second goes backwards with dS and gives the others.

    Gate t weighs the pairs j < t <= i, by their decay, so its gradient is the sum of their
    w_ij dw_ij. Within a chunk these are summed as they are; with a state between, the first pass
    gives those of a query and the state before its chunk, ``read``, and the second those of a key
    and the state after it, ``written``. No gate that has decayed a term away gets its rounding.
    """
    gates = targets.d_gate is not None
    of_queries = backward_queries(sequence, S, norm, d_out, dq, gates, dS is not None and gates)
    if not (targets.any or initial_wanted):
        return None
    return backward_keys(sequence, dS, norm, d_out, of_queries, targets, initial_wanted)


def backward_queries(
    sequence: Sequence,
    S: Tensor | None,
    norm: Tensor,
    d_out: Tensor,
    dq: Tensor | None,
    gates: bool,
    last_state: bool,
) -> OfQueries:
    """The first pass: writes dq unless it is None. ``S`` is overwritten."""
    deg, last = sequence.deg, len(sequence.chunks) - 1
    starts_with_state = S is not None
    every_delta = torch.empty_like(norm)
    read = norm.new_empty(sequence.rows, sequence.t) if gates else None
    for index, tokens in enumerate(sequence.chunks):
        x = sequence.chunk(tokens, norm)
        do = sequence.by_query_head(d_out, tokens)
        # The output in the inputs' dtype would be too coarse: dw is a difference from delta.
        y = _state_numerator(x, S)
        state_delta = (y[..., :-1] * do).sum(-1, keepdim=True) / x.z
        delta = state_delta.clone()
        dq_i = None if dq is None else torch.empty_like(x.q)
        _intra_backward_queries(x, do, delta, dq_i)
        if read is not None:
            read[:, tokens] = (state_delta - delta * y[..., -1:] / x.z).sum((1, 3))
        if dq is not None:
            if S is not None:
                dy = _numerator_gradient(do, x.z, delta)
                of_state = contract(x.queries_for_state(), S, dy, deg, "query").mT
                of_state = of_state.reshape(dq_i.shape)
                dq_i += of_state if x.g is None else of_state * x.since_start[:, None, :, None]
            sequence.store(dq, tokens, torch.ldexp(dq_i, -x.exponent))
        sequence.store(every_delta[..., None], tokens, delta)
        if index < last or last_state:
            if S is None:
                S = sequence.empty_state()
            _update_state(x, S)
    return OfQueries(every_delta, read, S, starts_with_state)


def own_gradients(
    sequence: Sequence, dS: Tensor | None, norm: Tensor, d_out: Tensor, of_queries: OfQueries
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the states after every chunk, and of the one before the first: those that
    the sequence's own queries have, and what is left of ``dS`` [N, e, D], which is overwritten."""
    dS = sequence.empty_state() if dS is None else dS
    after = []
    for tokens in reversed(sequence.chunks):
        x = sequence.chunk(tokens, norm)
        after.append(dS.clone())
        _add_state_gradient(sequence, x, d_out, of_queries, dS)
    return after[::-1], dS


def own_key_gradients(
    sequence: Sequence, norm: Tensor, d_out: Tensor, of_queries: OfQueries, targets: KeyTargets
) -> list[KeyTargets]:
    """What every chunk's keys have from queries of their chunk, for `backward_keys`."""
    within = []
    for tokens in sequence.chunks:
        x = sequence.chunk(tokens, norm)
        within.append(_key_gradients(sequence, x, d_out, of_queries, targets))
    return within


def _key_gradients(
    sequence: Sequence, x: _Chunk, d_out: Tensor, of_queries: OfQueries, targets: KeyTargets
) -> KeyTargets:
    """Of one chunk: dk [N, c, d], dv [N, c, dv] and d_gate [N, c], those that are wanted, without
    what comes through the state after it."""
    do = sequence.by_query_head(d_out, x.tokens)
    delta = sequence.by_query_head(of_queries.delta[..., None], x.tokens)
    dk = None if targets.dk is None else torch.zeros_like(x.k)
    dv = None if targets.dv is None else torch.zeros_like(x.v[..., :-1])
    d_gate = None if targets.d_gate is None else _sums_from(of_queries.read[:, x.tokens])
    if targets.any:
        _intra_backward_keys(x, do, delta, dk, dv, d_gate)
    return KeyTargets(dk, dv, d_gate)


def _add_state_gradient(
    sequence: Sequence, x: _Chunk, d_out: Tensor, of_queries: OfQueries, dS: Tensor
) -> None:
    """The gradient of the state after a chunk into that of the state before it, in place."""
    do = sequence.by_query_head(d_out, x.tokens)
    delta = sequence.by_query_head(of_queries.delta[..., None], x.tokens)
    x.decay_(dS)
    dy = _numerator_gradient(do, x.z, delta)
    expand_reduce(dS, x.queries_for_state(), dy, sequence.deg, "query")


def backward_keys(
    sequence: Sequence,
    dS: Tensor | None,
    norm: Tensor,
    d_out: Tensor,
    of_queries: OfQueries,
    targets: KeyTargets,
    initial_wanted: bool,
    ahead: Ahead | None = None,
) -> Tensor | None:
    """The second pass: writes ``targets`` and returns the initial state's gradient, if wanted.

    ``ahead``, which is overwritten, has `own_gradients` and `own_key_gradients`: to them only what
    is left of dS is added, and of an initial state's gradient only that is returned.
    """
    deg = sequence.deg
    crossing = None
    for index, tokens in reversed(list(enumerate(sequence.chunks))):
        x = sequence.chunk(tokens, norm)
        if ahead is None:
            after = dS
            dk, dv, d_gate = _key_gradients(sequence, x, d_out, of_queries, targets)
        else:
            after = ahead.states[index].add_(dS)
            dk, dv, d_gate = ahead.within[index]
        if index == len(sequence.chunks) - 1 and after is not None and of_queries.S is not None:
            # <dS, S> after a chunk: all pairs with a key up to there and a query, or final state,
            # beyond.
            crossing = (after * of_queries.S).sum((1, 2))
        if after is not None:
            k = x.keys_for_state()
            v = x.v.mT
            if dv is not None or d_gate is not None:
                dy = v.new_zeros(v.shape)
                expand_apply(dy, k, after, deg, "key")
                if dv is not None:
                    dv += dy[:, :-1].mT
            if d_gate is not None:
                written = (dy * v).sum(1)
                d_gate += _sums_before(written)
                if index > 0 or of_queries.starts_with_state:
                    # Through the whole chunk, from the state before it, if anything of it is left.
                    through = crossing - written.sum(-1)
                    d_gate += torch.where(x.whole_decay > 0, through, 0)[:, None]
            if dk is not None:
                of_state = contract(k, after, v, deg, "key").mT
                dk += of_state if x.g is None else of_state * x.until_end[..., None]
        if dk is not None:
            sequence.store(targets.dk, tokens, dk)
        if dv is not None:
            sequence.store(targets.dv, tokens, dv)
        if d_gate is not None:
            sequence.store(targets.d_gate[..., None], tokens, d_gate[..., None])
            crossing = d_gate[:, 0]
        if ahead is not None:
            x.decay_(dS)
        elif index > 0 or (of_queries.starts_with_state and initial_wanted):
            if dS is None:
                dS = sequence.empty_state()
            _add_state_gradient(sequence, x, d_out, of_queries, dS)
    if not initial_wanted:
        return None
    return sequence.empty_state() if dS is None else dS
