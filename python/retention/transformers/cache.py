"""Layers of transformers' caches that are a `retention.RetentionCache`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
)

from retention.cache import RetentionCache
from retention.functional import power_retention
from retention.ops import checks
from retention.ops.torch_private import stays_in_place
from retention.transformers.configuration import RETENTION, RetentionConfig

# Drafts that can be taken back. Longer windows fold more slowly than they save (docs/design.md).
_RECORDED_WINDOW = 128
# Tokens that the kernels take in a step.
_RECORDED_STEP = 16


class _Tokens(NamedTuple):
    """Keys and values `[b, t, h, d]` and log gates `[b, t, h]`."""

    keys: Tensor
    values: Tensor
    log_gates: Tensor | None

    def after(self, before: _Tokens | None) -> _Tokens:
        """These, behind others."""
        if before is None:
            return self
        pairs = zip(before, self, strict=True)
        return _Tokens(*(None if x is None else torch.cat((x, y), dim=1) for x, y in pairs))

    def detached(self) -> _Tokens:
        return _Tokens(*(None if x is None else x.detach() for x in self))

    def last(self, count: int) -> _Tokens:
        return _Tokens(*(None if x is None else x[:, x.shape[1] - count :] for x in self))

    def of_rows(self, rows: Tensor) -> _Tokens:
        return _Tokens(*(None if x is None else x.index_select(0, rows) for x in self))


class PowerRetentionLayer(CacheLayerMixin):
    """What a layer of power retention remembers while a model generates.

    Its memory is a `retention.RetentionCache` with a slot for each row, made at the first update,
    and as large at the millionth token. `DynamicCache(config=...)` makes one for every layer of
    type ``power_retention``, and so does generate(). Masked tokens are tokens like all others, with
    a key of 0 and a log gate of 0, which leave no trace: all rows have seen as many.

    Attributes:
        memory: the `retention.RetentionCache`; None before the first update.
        slots: int32 ``[b]``, where the memory has each row of the batch.
        softmax: keys and values of the softmax attention that a layer still blends with, or None.
    """

    _layer_type = RETENTION
    is_croppable = True
    # The memory's sizes come with the first tokens: a cache knows no degree and no gates.
    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.memory: RetentionCache | None = None
        self.slots: Tensor | None = None
        self.softmax: DynamicLayer | None = None
        self.record_past = False
        self.seen: Any = 0  # or a tensor, where a number would be compiled into a step
        # Tokens since the last `crop`, while the past is recorded. They are in the ring too, from
        # which every update takes and gives them again: a step on its own could fold them.
        self._pending: _Tokens | None = None

    def lazy_initialization(
        self, key_states: Tensor, value_states: Tensor, gating: bool = True, degree: int = 2
    ) -> None:
        """Allocates the memory.

        Args:
            key_states: ``[b, t, h, d]``, of which only sizes, dtype and device matter.
            value_states: ``[b, t, h, dv]``.
            gating, degree: as `retention.RetentionCache` has them.
        """
        rows, _, heads, head_dim = key_states.shape
        self.memory = RetentionCache(
            rows,
            heads,
            head_dim,
            value_states.shape[-1],
            dtype=key_states.dtype,
            gating=gating,
            deg=degree,
            device=key_states.device,
            window=_RECORDED_WINDOW if self.record_past else None,
            max_tokens_per_step=_RECORDED_STEP if self.record_past else 1,
        )
        self.slots = torch.arange(rows, dtype=torch.int32, device=key_states.device)
        self.home = key_states.device
        self.is_initialized = True

    # ---- tokens ---------------------------------------------------------------------------------

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        query_states: Tensor,
        log_gates: Tensor | None = None,
        degree: int = 2,
        cu_seqlens: Tensor | None = None,
        blend: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The next tokens of all rows, and what their queries read of them and of all before.

        With gradients of the new tokens, where there are any to be had; the past is a constant.

        Args:
            key_states: ``[b, t, h, d]``, or packed ``[1, total, h, d]``; rotated, 0 where masked.
            value_states: ``[b, t, h, dv]``.
            query_states: ``[b, t, hq, d]``.
            log_gates: ``[b, t, h]``, float32 or wider, 0 where masked; None without gating.
            degree: the power. Default: 2.
            cu_seqlens: int32 ``[n + 1]`` where tokens are packed, one sequence for each of
                `slots`. Default: tokens are not packed.
            blend: whether keys and values are kept for softmax attention as well. Default: False.

        Returns:
            ``[b, t, hq, dv]``; and with `blend` all keys and values so far, ``[b, h, n, d]`` and
            ``[b, h, n, dv]``, else None.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, log_gates is not None, degree)
        new = _Tokens(key_states, value_states, log_gates)
        out = None
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query_states, *new)
        ):
            out = self._read(query_states, new, cu_seqlens)
            query_states, new = query_states.detach(), new.detached()
        take = self._take_recorded if self.record_past else self._take
        taken = take(query_states, new, cu_seqlens)
        out = taken if out is None else out
        self.seen += key_states.shape[1]
        if not blend:
            return out, None
        return out, self._keys_and_values(key_states.transpose(1, 2), value_states.transpose(1, 2))

    def _read(self, queries: Tensor, new: _Tokens, cu_seqlens: Tensor | None) -> Tensor:
        """What the queries read, with gradients, which a memory has none of."""
        state, sum_of_keys = self.memory.state(self.slots)
        out = power_retention(
            queries,
            *new,
            state,
            deg=self.memory.deg,
            sum_of_keys=sum_of_keys,
            cu_seqlens=cu_seqlens,
        )
        return cast(Tensor, out)

    def _take(self, queries: Tensor, new: _Tokens, cu_seqlens: Tensor | None) -> Tensor:
        """By a step where they are few enough, else as a prompt."""
        self._pending = None
        few = cu_seqlens is None and queries.shape[1] <= self.memory.max_tokens_per_step
        take = self.memory.step if few else self.memory.prefill
        return take(queries, *new, self.slots, cu_seqlens)

    def _take_recorded(self, queries: Tensor, new: _Tokens, cu_seqlens: Tensor | None) -> Tensor:
        """Such that all tokens since the last `crop`, up to a window, can be taken back."""
        before = 0 if self._pending is None else self._pending.keys.shape[1]
        if before:
            self.memory.rollback(self.slots, before)
            shape = (queries.shape[0], before, *queries.shape[2:])
            queries = torch.cat((queries.new_zeros(shape), queries), dim=1)
        tokens = new.after(self._pending)
        kept = min(queries.shape[1], self.memory.window)
        if queries.shape[1] <= self.memory.max_tokens_per_step:
            out = self.memory.step(queries, *tokens, self.slots)
        else:
            out = self.memory.prefill(queries, *tokens, self.slots, keep=kept)
        self._pending = tokens.last(kept)
        return out[:, before:]

    def _keys_and_values(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.softmax is None:
            self.softmax = DynamicLayer()
        return self.softmax.update(keys, values)

    def activate_past_recording(self) -> None:
        """From now on `crop` can take back all tokens since the last one, up to a window."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """The last tokens of all rows were never seen, and those before will not be taken back.

        Args:
            tokens_to_remove: their number as a negative one, or 0.

        Raises:
            ValueError: for a positive number, and for more tokens than are not in a state yet:
                where the past is recorded, those since the last `crop` up to a window of 128 are
                not. Nothing has changed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove: expected a negative number of tokens to remove, or 0, got "
                f"{tokens_to_remove}"
            )
        count = -tokens_to_remove
        if self.is_initialized and count:
            room = int(self.memory.lengths[self.slots].min())
            if count > room:
                raise ValueError(
                    f"tokens_to_remove: expected at least -{room}, since all before are in a state "
                    f"by now (activate_past_recording() before the first of them keeps up to "
                    f"{_RECORDED_WINDOW}), got {tokens_to_remove}"
                )
            self.memory.rollback(self.slots, count)
            self.seen -= count
            if self.softmax is not None:
                self.softmax.crop(tokens_to_remove)
        self._pending = None

    # ---- what transformers asks -----------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that softmax attention would see, and the place of the first."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, those of padding too."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    # ---- rows -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Nothing was seen."""
        self.memory = self.slots = self.softmax = self._pending = None
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` has seen."""
        if not self.is_initialized:
            return
        self.memory.copy(beam_idx.to(self.slots), self.slots)
        if self._pending is not None:
            self._pending = self._pending.of_rows(beam_idx.to(self.slots))
        if self.softmax is not None:
            self.softmax.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes several, one after another."""
        if self.is_initialized:
            rows = torch.arange(len(self.slots), device=self.slots.device)
            self._select(rows.repeat_interleave(repeats))
            if self.softmax is not None:
                self.softmax.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows at ``indices`` alone are left."""
        if self.is_initialized:
            self._select(torch.arange(len(self.slots), device=self.slots.device)[indices])
            if self.softmax is not None:
                self.softmax.batch_select_indices(indices)

    def _select(self, rows: Tensor) -> None:
        if self._pending is not None:
            self._pending = self._pending.of_rows(rows)
        self.memory = self.memory.select(self.slots[rows])
        self.slots = torch.arange(len(rows), dtype=torch.int32, device=rows.device)

    def offload(self) -> None:
        """To the CPU's memory."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Back to the device."""
        if self.is_initialized:
            self._move(self.home)

    def _move(self, device: torch.device | str) -> None:
        if not self.is_initialized:
            return
        if self.memory.device != torch.device(device):
            self.memory.to(device)
        self.slots = self.slots.to(device)
        if self._pending is not None:
            self._pending = _Tokens(*(None if x is None else x.to(device) for x in self._pending))
        if self.softmax is not None:
            self.softmax.keys = self.softmax.keys.to(device)
            self.softmax.values = self.softmax.values.to(device)


class PowerRetentionStaticLayer(PowerRetentionLayer):
    """Likewise, for steps that are compiled: memory stays where it is, and is changed in place.

    `StaticCache(config, max_cache_len)` makes them. They hold any number of tokens all the same.
    """

    _layer_type = None  # what is registered under the type is the layer above
    is_compileable = True

    def __init__(self, max_cache_len: int | None = None, **kwargs: Any):
        super().__init__()
        self.seen = torch.zeros((), dtype=torch.int64)

    def lazy_initialization(
        self, key_states: Tensor, value_states: Tensor, gating: bool = True, degree: int = 2
    ) -> None:
        """Allocates the memory, and tells the compiler that it stays where it is."""
        super().lazy_initialization(key_states, value_states, gating, degree)
        self.seen = self.seen.to(key_states.device)
        if not torch.compiler.is_compiling():
            for x in (*self.memory.pool, self.slots, self.seen):
                if x is not None:
                    stays_in_place(x)

    def _keys_and_values(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "softmax_blend: expected 0 with a static cache, which has no room for softmax "
            "attention's keys and values, got a layer that blends; use the default cache"
        )

    def reset(self) -> None:
        """Nothing was seen, and memory stays where it is."""
        self._pending = None
        self.seen.zero_()
        if self.memory is not None:
            self.memory.reset()


STATIC_LAYER_TYPE_MAPPING[RETENTION] = PowerRetentionStaticLayer


class SlotCache(Cache):
    """Many sequences in slots of a fixed size, of which every call names its own.

    For servers of a model on one device: sequences come and go, each at a position of its own, and
    all memory is allocated here. A call decodes or prefills the rows that `rows` names:

        cache.rows = slots                             # int32 [b]
        model(input_ids, cache=cache)                  # [b, t], of every sequence the next t tokens
        model(packed, cache=cache, cu_seq_lens_q=...)  # [1, total]: of row i that sequence's tokens

    Positions are counted by the cache, unless ``position_ids`` are given. A row of slot -1 is
    padding: nothing is read or written for it, and what comes out means nothing.

    Args:
        config: of a model of which every layer is power retention, without a blend.
        slots: sequences remembered.
        window, max_tokens_per_step, state_dtype, device: as `retention.RetentionCache` has them.
        dtype: of the model. Default: the configuration's, or torch's default.

    Attributes:
        rows: int32 ``[b]``, the slots that the next calls are for. Default: all of them.
        memories: the `retention.RetentionCache` of every layer, for `reset`, `copy` and `rollback`
            of slots, and for `retention.nn.all_or_nothing`.

    Raises:
        TypeError, ValueError: for a model that remembers more than states, and for what
            `retention.RetentionCache` rejects.
    """

    def __init__(
        self,
        config: RetentionConfig,
        slots: int,
        *,
        window: int | None = None,
        max_tokens_per_step: int = 1,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not isinstance(config, RetentionConfig):
            raise TypeError(f"config: expected a RetentionConfig, got {checks.describe(config)}")
        others = sorted(set(config.layer_types) - {RETENTION})
        if others:
            raise ValueError(f"config: expected layers of {RETENTION!r} alone, got {others}")
        if config.softmax_blend:
            raise ValueError(f"config: expected softmax_blend = 0, got {config.softmax_blend}")
        dtype = dtype or config.dtype or torch.get_default_dtype()
        self.memories = [
            RetentionCache(
                slots,
                config.num_key_value_heads,
                config.head_dim,
                window=window,
                max_tokens_per_step=max_tokens_per_step,
                dtype=dtype,
                state_dtype=state_dtype,
                gating=config.gating,
                deg=config.degree,
                device=device,
            )
            for _ in config.layer_types
        ]
        super().__init__(layers=[PowerRetentionLayer() for _ in self.memories])
        everything = torch.arange(slots, dtype=torch.int32, device=self.memories[0].device)
        for layer, memory in zip(self.layers, self.memories, strict=True):
            layer.memory, layer.home, layer.is_initialized = memory, memory.device, True
        self.rows = everything

    @property
    def rows(self) -> Tensor:
        return self.layers[0].slots

    @rows.setter
    def rows(self, slots: Tensor) -> None:
        self.memories[0].check_slots("rows", slots)
        for layer in self.layers:
            layer.slots = slots

    @property
    def positions(self) -> Tensor:
        """Where the next token of each of `rows` is: int64 ``[b]``; 0 for padding."""
        memory = self.memories[0]
        there = (self.rows >= 0) & (self.rows < memory.slots)
        return torch.where(there, memory.positions[torch.where(there, self.rows, 0)], 0)
