"""`attn_implementation="power_retention"`: power retention where a model has softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retention.functional import power_retention
from retention.ops import checks
from retention.ops.numerics import integer_power, normalise, unit_scale
from retention.transformers.configuration import RETENTION

_DEGREE = 2
# Arguments by which models ask for what is not power retention.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def power_retention_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Power retention of degree 2 without gates, as transformers calls its attention functions.

    Training and whole prompts take `retention.power_retention`. Where a model's own cache holds
    more keys than there are queries, its keys are read one by one, by the definition.

    Args:
        module: the model's attention layer.
        query: ``[b, hq, t, d]``, d a multiple of 8.
        key: ``[b, h, n, d]``, h a divisor of hq.
        value: ``[b, h, n, dv]``.
        attention_mask: what this implementation's mask function made. Where n is t, the number of
            each token's sequence, from 1, with a minus for padding, int64 ``[b, t]``; else which
            keys a query sees, bool ``[b, 1, t, n]``. None for one whole sequence a row.
            ``cu_seq_lens_q``, int32 ``[n + 1]``, goes before.
        scaling: cancels.
        dropout, sliding_window, is_causal: what must be 0, None and not False.

    Returns:
        ``[b, t, hq, dv]`` in the query's dtype, and None, since there are no weights.

    Raises:
        ValueError: for dropout, sliding windows, logit caps, attention sinks, biases by position
            and attention to later tokens.
    """
    if dropout:
        raise ValueError(f"dropout: expected 0 with power_retention, got {dropout}")
    if sliding_window is not None:
        raise ValueError(
            "sliding_window: expected None with power_retention, which sees all tokens, got "
            f"{sliding_window}; set the configuration's sliding_window to None, and with it its "
            "layer_types, if that is what you want"
        )
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with power_retention, got one")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise ValueError("is_causal: expected True with power_retention, got False")
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is not None and attention_mask.dim() == 4:
        return _by_definition(query, key, value, attention_mask[:, 0]), None
    if query.shape[1] != key.shape[1]:
        # A mask function that is not ours gave none: then the queries are the last tokens.
        t, n = query.shape[1], key.shape[1]
        seen = torch.ones(t, n, dtype=torch.bool, device=key.device).tril(n - t)[None]
        return _by_definition(query, key, value, seen), None
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        out = power_retention(query, key, value, deg=_DEGREE, cu_seqlens=bounds)
        return cast(Tensor, out), None
    gate = None
    if attention_mask is not None:
        # Padding has no key, and a gate of -inf ends what came before a sequence.
        key = key.masked_fill((attention_mask < 0)[..., None, None], 0)
        sequence = attention_mask.abs()
        begins = sequence.diff(dim=1, prepend=sequence[:, :1]) != 0
        gate = key.new_zeros(key.shape[:3], dtype=checks.state_dtype(key.dtype))
        gate = gate.masked_fill(begins[..., None], -torch.inf)
    return cast(Tensor, power_retention(query, key, value, gate, deg=_DEGREE)), None


def _by_definition(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """query [b, t, hq, d], key [b, n, h, d], value [b, n, h, dv], seen [b, t, n]."""
    wide = checks.state_dtype(query.dtype)
    q = query.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4).to(wide)  # [b, h, r, t, d]
    k, v = (x.transpose(1, 2)[:, :, None].to(wide) for x in (key, value))  # [b, h, 1, n, *]
    w = integer_power((q * unit_scale(q)) @ k.mT, _DEGREE)
    w = w.masked_fill(~seen[:, None, None], 0)
    out = normalise(w @ v, w.sum(-1, keepdim=True))  # [b, h, r, t, dv]
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype)


def power_retention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What `power_retention_attention` takes as a mask, from what transformers knows of it.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: rows, queries and keys, and the place
            of the first of each.
        mask_function: of (row, head, query's place, key's place) tensors, whether it is seen.
        attention_mask: bool ``[b, kv_length]``, false for padding.
        device: of the result.

    Returns:
        int64 ``[b, t]``, bool ``[b, 1, t, n]`` or None, as there.

    Raises:
        ValueError: for a mask that shows later tokens, or hides some of a sequence's earlier ones,
            as a window does.
    """
    if q_length != kv_length:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **{**kwargs, "allow_is_causal_skip": False},
        )
    row = torch.arange(batch_size, device=device)[:, None].expand(-1, kv_length)
    place = torch.arange(kv_length, device=device).expand(batch_size, -1)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        seen = mask_function(row, torch.zeros_like(row), query + q_offset, key + kv_offset)
        return torch.as_tensor(seen, device=device).expand(batch_size, kv_length)

    before = (place - 1).clamp(min=0)
    sequence = 1 + ((place > 0) & ~sees(place, before)).cumsum(1)
    if not torch.compiler.is_compiling():
        same = sequence == sequence.roll(1, 1)
        start = torch.where(same & (place > 0), 0, place).cummax(1).values
        later = (place + 1).clamp(max=kv_length - 1)
        for wrong, what in (
            (~sees(place, start), "hides earlier tokens of a sequence, as a window does"),
            (sees(place, later) & (later > place), "shows later tokens"),
        ):
            if wrong.any():
                raise ValueError(
                    f"attention_mask: expected one of padding and packed sequences with "
                    f"power_retention, got one that {what}"
                )
        if attention_mask is None and (sequence == 1).all():
            return None
    return sequence if attention_mask is None else torch.where(attention_mask, sequence, -sequence)


ALL_ATTENTION_FUNCTIONS.register(RETENTION, power_retention_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(RETENTION, power_retention_mask)
