"""``retention.power_retention_inference`` by the kernels: its tensors are a pool for a call.

A batch row is a slot: the state becomes the high plane, and the cache but for the queries' tokens
the ring. Whoever keeps a :class:`retention.RetentionCache` is spared these copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retention.ops import decoding_operators, pool  # noqa: F401  (registers torch.ops.retention)
from retention.ops.call import Operands
from retention.ops.cuda import coverage
from retention.ops.pool import Pool
from retention.ops.symmetric_power import state_dim
from retention.ops.torch_private import nothing_intercepts

_MOST_QUERIES = 16  # tokens of a step
_MOST_GROUP = 64  # query heads of a key head
_operators = torch.ops.retention


def takes(operands: Operands, deg: int) -> bool:
    """Whether the kernels run a call that was checked: where they have its dtype and its head dims,
    for few queries, and nobody waits for gradients or traces the operations."""
    Q, _, V, _, initial_state, _, _ = operands
    tensors = [x for x in operands if x is not None]
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False
    if not nothing_intercepts():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    b, tq, hq, d = Q.shape
    h, dv = initial_state.shape[1::2] if V is None else V.shape[2:]
    if not (b and 0 < tq <= _MOST_QUERIES and hq <= h * _MOST_GROUP):
        return False
    if coverage.device_reason(Q.device.type, Q.device.index) is not None:
        return False
    return coverage.kernel_dims(Q.dtype, d, dv, deg) == (d, dv)


def decode(
    operands: Operands, deg: int, switch_over_seq_len: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same as :func:`retention.ops.decoding.decode`, which reads all of the state's digits.
    Queries here read it as bfloat16; a fold, which the kernels of forward make, loses none."""
    Q, K, V, log_G, initial_state, sum_of_keys, _ = operands
    b, tq, _, d = Q.shape
    if K is None:  # tokens of zeros weigh nothing
        h, dv = initial_state.shape[1::2]
        K, V, switch_over_seq_len = Q.new_zeros((b, tq, h, d)), Q.new_zeros((b, tq, h, dv)), None
    old = K.shape[1] - tq
    p = _pool_of(K, V, log_G, initial_state, sum_of_keys, old, deg)
    slots = torch.arange(b, dtype=torch.int32, device=Q.device)
    new = (x if x is None else x[:, old:] for x in (K, V, log_G))
    out = _operators.decode_step(*p, Q, *new, slots, None, tq, 0, deg, 0)
    if switch_over_seq_len is None or K.shape[1] < switch_over_seq_len:
        return out, initial_state, sum_of_keys
    tokens = operands._replace(Q=K)  # there are no queries: any will do
    _, _, state, keys, *_ = _operators.forward(*tokens, deg, return_final_state=True)
    return out, state, keys


def _pool_of(
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    old: int,
    deg: int,
) -> Pool:
    """A slot for each row, with the first ``old`` tokens in its ring, which has room for all."""
    b, _, h, d = K.shape
    if state is None:  # nobody reads it while nothing was folded
        rows = (b, h, state_dim(d, deg))
        high = K.new_empty((*rows, V.shape[3]), dtype=torch.bfloat16)
        keys = K.new_empty(rows, dtype=torch.float32)
    else:
        high, keys = state.to(torch.bfloat16).contiguous(), sum_of_keys.contiguous()
    cursors = K.new_zeros((b, pool.CURSOR_INTEGERS), dtype=torch.int64)
    cursors[:, pool.START_AND_LENGTH] = old << 32
    cursors[:, pool.FOLDED] = int(state is not None)
    return Pool(
        *(high, None, keys, _ring(K, old), _ring(V, old)),
        None if log_G is None else _ring(log_G, old),
        cursors,
        K.new_zeros((b, h + 1), dtype=torch.int32),
    )


def _ring(x: Tensor, old: int) -> Tensor:
    """[b, t, h, ...] with time after the heads; of tokens from ``old`` on nothing yet."""
    by_head = x.transpose(1, 2)
    ring = x.new_empty(by_head.shape)
    ring[:, :, :old] = by_head[:, :, :old]
    return ring
