"""A share of sequences in PyTorch operations, cut where it waits for other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.arguments import state_shape, without_autocast
from retention.ops.call import BackwardCall, Operands, Options
from retention.ops.exchange import States
from retention.ops.pytorch import chunked, packed, run


class _Share:
    """The rows of a batch, or the one packed sequence that is shared."""

    def __init__(self, operands: Operands, options: Options):
        self.operands, self.options = operands, options
        # None where there is no such sequence; rows of no tokens are a batch.
        self.batch = next(packed.batches(operands.cu_seqlens, operands.Q.shape[1], 1), None)
        self.sequence = (
            None if self.batch is None else run.as_sequence(self.batch, operands, options)
        )

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        with torch.no_grad(), without_autocast(self.operands.Q.device):
            yield

    def nothing(self) -> States:
        shape = state_shape(self.operands, self.options.deg)
        Q = self.operands.Q
        dtype = checks.state_dtype(Q.dtype)
        return States(Q.new_zeros(shape, dtype=dtype), Q.new_zeros(shape[:3], dtype=dtype))


class ForwardShare(_Share):
    """A forward pass: what `run.forward` gives, in three steps."""

    def __init__(self, operands: Operands, options: Options, saves_output: bool):
        super().__init__(operands, options)
        self.saves_output = saves_output

    def added(self) -> States:
        """What the tokens add to the state, and to the sum of keys."""
        if self.sequence is None:
            return self.nothing()
        with self.arithmetic():
            self.states, S = chunked.own_states(self.sequence)
            return States(*(x.contiguous() for x in self.sequence.split_state(S)))

    def meanwhile(self) -> None:
        """What there is to do while others are waited for: the products within chunks."""
        if self.sequence is not None:
            with self.arithmetic():
                self.within = chunked.own_numerators(self.sequence)

    def results(self, before: States) -> tuple[Tensor, ...]:
        """``out, norm, residual, kept``, given the states before the share."""
        sequence, batch = self.sequence, self.batch
        results = run.allocate_forward(self.operands, self.options, self.saves_output)
        out, norm, _, _, residual, kept = results
        rounded = residual if residual.numel() else None
        with self.arithmetic():
            if sequence is not None:
                o, z, r = (batch.room(x) for x in (out, norm, rounded))
                ahead = chunked.Ahead(self.states, self.within)
                chunked.forward(sequence, sequence.join_state(*before), o, z, r, False, ahead)
            packed.clear_unowned(self.operands.cu_seqlens, out, norm, rounded)
        return out, norm, residual, kept


class BackwardShare(_Share):
    """A backward pass, likewise: of a call whose ``d_state`` is that of the share's own end."""

    def __init__(self, call: BackwardCall):
        super().__init__(call.operands, call.options)
        self.call = call
        self.gradients = run.allocate_backward(call.operands, call.wanted)
        given = zip(call.operands[:6], self.gradients, call.wanted, strict=True)
        self.targets = [g if want and x is not None else None for x, g, want in given]
        if self.batch is not None:
            dq, *of_keys = (self.batch.room(x) for x in self.targets[:4])
            self.dq, self.of_keys = dq, chunked.KeyTargets(*of_keys)
            self.norm = self.batch.take(call.saved.norm)
            self.d_out = self.batch.take(call.gradients.d_out)

    def alone(self) -> States:
        """The gradient that the share alone has for the states before it."""
        _, d_state, d_keys = self.call.gradients
        if self.sequence is None:
            return self.nothing() if d_state is None else States(d_state, d_keys)
        operands, sequence = self.operands, self.sequence
        gates = self.of_keys.d_gate is not None
        with self.arithmetic():
            S = sequence.join_state(operands.initial_state, operands.sum_of_keys)
            self.of_queries = chunked.backward_queries(
                sequence, S, self.norm, self.d_out, self.dq, gates, last_state=gates
            )
            dS = sequence.join_state(d_state, d_keys)
            self.states, dS = chunked.own_gradients(
                sequence, dS, self.norm, self.d_out, self.of_queries
            )
            self.of_start = States(*sequence.split_state(dS))
        return self.of_start

    def meanwhile(self) -> None:
        """The products within chunks."""
        if self.sequence is not None:
            with self.arithmetic():
                self.within = chunked.own_key_gradients(
                    self.sequence, self.norm, self.d_out, self.of_queries, self.of_keys
                )

    def results(self, after: States) -> tuple[Tensor, ...]:
        """The gradients, as `run.backward` has them, given what later ranks add to that of the
        states after the share."""
        sequence = self.sequence
        *of_tokens, d_initial, d_sum_of_keys = self.targets
        with self.arithmetic():
            if sequence is not None:
                dS = chunked.backward_keys(
                    sequence,
                    sequence.join_state(*after),
                    *(self.norm, self.d_out, self.of_queries, self.of_keys),
                    initial_wanted=d_initial is not None,
                    ahead=chunked.Ahead(self.states, self.within),
                )
                if d_initial is not None:
                    state, keys = sequence.split_state(dS)
                    torch.add(self.of_start.state, state, out=d_initial)
                    torch.add(self.of_start.keys, keys, out=d_sum_of_keys)
            packed.clear_unowned(self.operands.cu_seqlens, *of_tokens)
        return self.gradients
