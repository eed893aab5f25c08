"""A share of sequences by the kernels, cut where it waits for other ranks: see
`retention.ops.pytorch.shares`, which has the same steps.

bfloat16 calls of the library come in parts: no product is made twice. float16 chooses powers of two
from all that comes in, and is computed by calls of the operators on both sides of the exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import retention._C as _C
from retention.ops.arguments import state_shape
from retention.ops.call import BackwardCall, Operands, Options
from retention.ops.cuda import launch
from retention.ops.cuda.plans import plan_forward
from retention.ops.exchange import States
from retention.ops.pytorch.run import allocate_backward


def forward_share(operands: Operands, options: Options) -> Any:
    """The steps of a forward pass that kernels take."""
    in_parts = operands.Q.dtype == torch.bfloat16
    return (_ForwardParts if in_parts else _ForwardTwice)(operands, options)


def backward_share(call: BackwardCall) -> Any:
    """Those of a backward pass."""
    operands = call.operands
    plan = plan_forward((*operands, *call.options))
    in_parts = operands.Q.dtype == torch.bfloat16 and plan.backward_reason is None
    return (_BackwardParts if in_parts else _BackwardTwice)(call)


class _ForwardParts:
    def __init__(self, operands: Operands, options: Options):
        self._keeps = options.save_for_backward and options.keep_states
        nothing = _nothing(operands, options)
        self._launch = launch.ForwardLaunch(
            operands._replace(initial_state=nothing.state, sum_of_keys=nothing.keys),
            options._replace(return_final_state=True),
        )

    def added(self) -> States:
        self._launch.run(_C.forward_states)
        return States(*self._launch.results(2, 3))

    def meanwhile(self) -> None:
        """Nothing: the products within chunks share their sums with those of states."""

    def results(self, before: States) -> tuple[Tensor, ...]:
        self._launch.run(_C.forward_carry, before)
        self._launch.run(_C.forward_output)
        out, norm, residual = self._launch.results(0, 1, 4)
        kept = self._launch.workspace if self._keeps else out.new_empty(0, dtype=torch.uint8)
        return out, norm, residual, kept


class _BackwardParts:
    def __init__(self, call: BackwardCall):
        self._wants_initial = call.wanted[4]
        gradients, operands = call.gradients, call.operands
        if gradients.d_state is None:
            nothing = _nothing(operands, call.options)
            gradients = gradients._replace(d_state=nothing.state, d_keys=nothing.keys)
        wanted = [*call.wanted[:4], True, True]
        self._gradients = allocate_backward(operands, wanted)
        self._launch = launch.BackwardLaunch(
            plan_forward((*operands, *call.options)),
            call._replace(gradients=gradients, wanted=wanted),
            self._gradients,
        )
        self._launch.allocate(_C.backward_parts_workspace_size)

    def alone(self) -> States:
        self._launch.run(_C.backward_state_gradients)
        return self._launch.of_start

    def meanwhile(self) -> None:
        """The states once more, and the gradient of the queries."""
        self._launch.run(_C.backward_query_gradient)

    def results(self, after: States) -> tuple[Tensor, ...]:
        self._launch.run(_C.backward_key_gradients, after)
        self._launch.finish()
        if self._wants_initial:
            return self._gradients
        return *self._gradients[:4], *(x.new_empty(0) for x in after)


def _nothing(operands: Operands, options: Options) -> States:
    shape = state_shape(operands, options.deg)
    Q = operands.Q
    return States(
        Q.new_zeros(shape, dtype=torch.float32), Q.new_zeros(shape[:3], dtype=torch.float32)
    )


class _ForwardTwice:
    """The states of the share are made in both calls."""

    def __init__(self, operands: Operands, options: Options):
        self._operands, self._options = operands, options

    def added(self) -> States:
        options = Options(*self._options[:3], return_final_state=True)
        return States(*torch.ops.retention.forward(*self._operands, *options)[2:4])

    def meanwhile(self) -> None:
        pass

    def results(self, before: States) -> tuple[Tensor, ...]:
        operands = self._operands._replace(initial_state=before.state, sum_of_keys=before.keys)
        out, norm, _, _, residual, kept = torch.ops.retention.forward(*operands, *self._options)
        return out, norm, residual, kept


class _BackwardTwice:
    """The gradients of states are made in both calls."""

    def __init__(self, call: BackwardCall):
        self._call = call

    def alone(self) -> States:
        return States(*self._run(self._call, (False,) * 4 + (True,) * 2)[4:])

    def meanwhile(self) -> None:
        pass

    def results(self, after: States) -> tuple[Tensor, ...]:
        _, d_state, d_keys = self._call.gradients
        if d_state is not None:
            after = after.plus(d_state, d_keys)
        gradients = self._call.gradients._replace(d_state=after.state, d_keys=after.keys)
        return self._run(self._call._replace(gradients=gradients), self._call.wanted)

    def _run(self, call: BackwardCall, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        return torch.ops.retention.backward(
            *(*call.gradients, *call.operands, *call.saved, *call.options[:3]), wanted
        )
