"""A share of sequences by the kernels, cut where it waits for other ranks: see
`retention.ops.pytorch.shares`, which has the same steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retention.ops.call import BackwardCall, Operands, Options
from retention.ops.exchange import States


class ForwardShare:
    """By two calls of the operator: the states of the share are made in both."""

    def __init__(self, operands: Operands, options: Options):
        self.operands, self.options = operands, options

    def added(self) -> States:
        options = Options(*self.options[:3], return_final_state=True)
        return States(*torch.ops.retention.forward(*self.operands, *options)[2:4])

    def meanwhile(self) -> None:
        pass

    def results(self, before: States) -> tuple[Tensor, ...]:
        operands = self.operands._replace(initial_state=before.state, sum_of_keys=before.keys)
        out, norm, _, _, residual, kept = torch.ops.retention.forward(*operands, *self.options)
        return out, norm, residual, kept


class BackwardShare:
    """By two calls of the operator: the gradients of states are made in both."""

    def __init__(self, call: BackwardCall):
        self.call = call

    def alone(self) -> States:
        return States(*self._gradients((False,) * 4 + (True,) * 2)[4:])

    def meanwhile(self) -> None:
        pass

    def results(self, after: States) -> tuple[Tensor, ...]:
        _, d_state, d_keys = self.call.gradients
        if d_state is not None:
            after = after.plus(d_state, d_keys)
        gradients = self.call.gradients._replace(d_state=after.state, d_keys=after.keys)
        self.call = self.call._replace(gradients=gradients)
        return self._gradients(self.call.wanted)

    def _gradients(self, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        gradients, operands, saved, options, _ = self.call
        return torch.ops.retention.backward(*gradients, *operands, *saved, *options[:3], wanted)
