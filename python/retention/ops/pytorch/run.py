"""Calls of the operators: in batches of sequences, each in chunks that suit its length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.arguments import state_shape, without_autocast
from retention.ops.call import BackwardCall, Operands, Options
from retention.ops.pytorch import chunked, packed
from retention.ops.symmetric_power import state_dim

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


def allocate_forward(
    operands: Operands, options: Options, saves_output: bool, kept_bytes: Any = 0
) -> tuple[Tensor, ...]:
    """The results of forward. Those that are not wanted are empty, of as many dimensions."""
    Q, V = operands.Q, operands.V
    dtype = checks.state_dtype(Q.dtype)
    state = state_shape(operands, options.deg) if options.return_final_state else (0, 0, 0, 0)
    out_shape = (*Q.shape[:3], V.shape[3])
    has_residual = options.save_for_backward and saves_output
    return (
        Q.new_empty(out_shape),
        Q.new_empty(Q.shape[:3], dtype=dtype),
        Q.new_empty(state, dtype=dtype),
        Q.new_empty(state[:3], dtype=dtype),
        Q.new_empty(out_shape if has_residual else (0, 0, 0, 0)),
        Q.new_empty(kept_bytes, dtype=torch.uint8),
    )


def allocate_backward(operands: Operands, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """A gradient for every input that wants one; an empty tensor for one that does not, or is
    None."""
    if len(wanted) != 6 or wanted[4] != wanted[5]:
        raise ValueError(
            "wanted: expected a bool for each of Q, K, V, log_G, initial_state and sum_of_keys, "
            f"the last two alike, got {[*wanted]}"
        )
    return tuple(
        x.new_empty(x.shape) if want and x is not None else operands.Q.new_empty(0)
        for x, want in zip(operands[:6], wanted, strict=True)
    )


def forward(operands: Operands, options: Options, saves_output: bool) -> tuple[Tensor, ...]:
    """The operator ``retention::forward``, for arguments that were checked."""
    Q, _, V, _, initial_state, sum_of_keys, cu_seqlens = operands
    results = allocate_forward(operands, options, saves_output)
    out, norm, state, keys, *_ = results
    residual = results[4] if results[4].numel() else None
    with torch.no_grad(), without_autocast(Q.device):
        for batch in packed.batches(cu_seqlens, Q.shape[1], _state_size(Q, V, options.deg)):
            sequence = as_sequence(batch, operands, options)
            S = sequence.join_state(_rows(initial_state, batch), _rows(sum_of_keys, batch))
            o, z, r = (batch.room(x) for x in (out, norm, residual))
            S = chunked.forward(sequence, S, o, z, r, options.return_final_state)
            for x, written in ((out, o), (norm, z), (residual, r)):
                batch.put(x, written)
            if options.return_final_state:
                state[batch.states], keys[batch.states] = sequence.split_state(S)
        packed.clear_unowned(cu_seqlens, out, norm, residual)
        if cu_seqlens is not None and options.return_final_state:
            empty = packed.without_tokens(cu_seqlens)
            _hand_through(empty, (state, keys), (initial_state, sum_of_keys))
    return results


def backward(call: BackwardCall) -> tuple[Tensor, ...]:
    """The operator ``retention::backward``, for arguments that were checked."""
    operands, options, wanted = call.operands, call.options, call.wanted
    d_out, d_state, d_keys = call.gradients
    Q, _, V, _, initial_state, sum_of_keys, cu_seqlens = operands
    gradients = allocate_backward(operands, wanted)
    dQ, dK, dV, d_log_G, d_initial_state, d_sum_of_keys = (
        None if x is None or not want else g
        for x, g, want in zip(operands[:6], gradients, wanted, strict=True)
    )
    of_tokens = (dQ, dK, dV, d_log_G)
    initial_wanted = d_initial_state is not None
    with torch.no_grad(), without_autocast(Q.device):
        for batch in packed.batches(cu_seqlens, Q.shape[1], _state_size(Q, V, options.deg)):
            sequence = as_sequence(batch, operands, options)
            targets = [batch.room(x) for x in of_tokens]
            dS = chunked.backward(
                sequence,
                sequence.join_state(_rows(initial_state, batch), _rows(sum_of_keys, batch)),
                sequence.join_state(_rows(d_state, batch), _rows(d_keys, batch)),
                batch.take(call.saved.norm),
                batch.take(d_out),
                targets[0],
                chunked.KeyTargets(*targets[1:]),
                initial_wanted,
            )
            for x, written in zip(of_tokens, targets, strict=True):
                batch.put(x, written)
            if initial_wanted:
                S = sequence.split_state(dS)
                d_initial_state[batch.states], d_sum_of_keys[batch.states] = S
        packed.clear_unowned(cu_seqlens, *of_tokens)
        if cu_seqlens is not None and initial_wanted:
            empty = packed.without_tokens(cu_seqlens)
            _hand_through(empty, (d_initial_state, d_sum_of_keys), (d_state, d_keys))
    return gradients


def as_sequence(batch: packed.Batch, operands: Operands, options: Options) -> chunked.Sequence:
    """The batch's sequences, in chunks that suit their length."""
    Q, _, V, *_ = operands
    deg, chunk_size, switch_over, *_ = options
    chunk = choose_chunk(batch.length, Q.shape[3], V.shape[3], deg, chunk_size, switch_over)
    q, k, v, g = map(batch.take, operands[:4])
    return chunked.Sequence(q, k, v, g, deg, max(1, chunk))


def _state_size(Q: Tensor, V: Tensor, deg: int) -> int:
    """Elements of what a sequence leaves behind."""
    return V.shape[2] * state_dim(Q.shape[3], deg) * (V.shape[3] + 1)


def _rows(x: Tensor | None, batch: packed.Batch) -> Tensor | None:
    return None if x is None else x[batch.states]


def _hand_through(
    empty: Tensor, results: tuple[Tensor, Tensor], given: tuple[Tensor | None, Tensor | None]
) -> None:
    """Sequences without tokens leave the state as it was, and its gradient."""
    for result, x in zip(results, given, strict=True):
        result[empty] = 0 if x is None else x[empty]
