"""The operators' work, for ``torch.utils.flop_counter.FlopCounterMode``.

Counted are the products of the definition in the form that is chosen, each once and two operations
for a multiplication and its addition; D rows of state, of ``state_dim``:

    2 D dv        a token and query head, to read the state; not in the first chunk of a sequence
                  without an initial state
    2 D dv        a token and key head, to update it; not in the last chunk without a final state
    2 (d + dv)    a query, query head and key of its chunk, the query's own or an earlier one

The quadratic form is one chunk. Backward has twice the first (for dq and dS), twice the second (for
dk and dv) and once again for the states, unless they were kept; and 2 (3 d + 2 dv) for every pair
(scores, dq and dk; do . v and dv): as much of it as the gradients that are wanted need, those of
gates as much as dq and dk together. Elementwise work, the sums of weights and what kernels compute
more than once are left out. Packed sequences count as one sequence of all tokens: their lengths are
not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retention.ops.call import Operands, Options, backward_call, forward_call
from retention.ops.cuda import coverage, plans
from retention.ops.pytorch.run import choose_chunk
from retention.ops.symmetric_power import state_dim


def register() -> None:
    """For counters made from now on."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.retention.forward, get_raw=True)(_forward)
    register_flop_formula(torch.ops.retention.backward, get_raw=True)(_backward)


def flops(
    *,
    b: int,
    t: int,
    hq: int,
    h: int,
    d: int,
    dv: int,
    deg: int,
    chunk: int,
    before: bool,
    after: bool,
    backward: bool = False,
    kept: bool = False,
    wanted: Sequence[bool] = (True,) * 6,
) -> int:
    """Of one pass, by the formula above: with a state ``before`` the tokens, and one (in backward
    its gradient) ``after`` them. ``wanted`` gradients are as the operator has them."""
    chunk = min(chunk, t)
    if chunk == 0:
        return 0
    whole, rest = divmod(t, chunk)
    pairs = whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    all_but_last = t - (rest or chunk)
    reading = hq * (t if before else t - chunk)
    updating = h * (t if after else all_but_last)
    inside = d + dv
    if backward:
        dq, dk, values, gates, initial, _ = wanted
        queries, keys = dq or gates, dk or gates
        states_after = keys or values or initial
        updating = updating * (keys + values) + (h * all_but_last if queries and not kept else 0)
        reading = reading * (queries + states_after)
        inside = 0
        if queries or keys or values:  # for which all need the scores, and all but dv do . v
            inside = d * (1 + queries + keys) + dv * ((queries or keys) + values)
    return 2 * b * (state_dim(d, deg) * dv * (reading + updating) + inside * pairs * hq)


def _call(operands: Operands, options: Options) -> dict[str, Any]:
    Q, V = operands.Q, operands.V
    b, t, hq, d = Q.shape
    h, dv = V.shape[2:]
    deg, chunk_size, switch_over, *_ = options
    chunk = None
    if type(Q) in (Tensor, torch.nn.Parameter) and Q.device.type in coverage.DEVICE_TYPES:
        chunk = plans.chunk_taken(operands, options)  # not of a fake: its device may not be there
    if chunk is None:
        chunk = choose_chunk(t, d, dv, deg, chunk_size, switch_over)
    sizes = {"b": b, "t": t, "hq": hq, "h": h, "d": d, "dv": dv, "deg": deg, "chunk": chunk}
    return sizes | {"before": operands.initial_state is not None}


def _forward(*arguments: Any, out_val: tuple[Tensor, ...]) -> int:
    operands, options = forward_call(arguments)
    return flops(**_call(operands, options), after=options.return_final_state)


def _backward(*arguments: Any, out_val: tuple[Tensor, ...]) -> int:
    call = backward_call(arguments)
    return flops(
        **_call(call.operands, call.options),
        after=call.gradients.d_state is not None,
        backward=True,
        kept=call.saved.kept.numel() > 0,
        wanted=call.wanted,
    )
