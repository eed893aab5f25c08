"""Layers built on power retention.

`PowerRetention` stands where a transformer has causal self-attention. It trains with `forward` and
decodes with `step`, whose `retention.RetentionCache` takes the same memory at the first token and
at the millionth.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retention import distributed, functional
from retention.cache import RetentionCache
from retention.ops import checks
from retention.ops.arguments import autocasts, without_autocast
from retention.ops.numerics import widest
from retention.ops.pytorch.decoding import rewind
from retention.ops.symmetric_power import state_dim

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "GateProjection",
    "PowerRetention",
    "Rotation",
    "all_or_nothing",
    "apply_rotary",
    "log_gates",
    "rotary_angles",
    "rotate",
    "rotation",
]

# Cosines and sines of rotary embedding.
Rotation = tuple[Tensor, Tensor]

# Tokens that a step may have before it counts as a prompt.
_MAX_TOKENS_PER_STEP = 16

# Each head starts with a memory of this many tokens, spread evenly on a log scale over the heads.
_LONGEST_MEMORY = 4096
_SHORTEST_MEMORY = 16


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Rotation angles of rotary position embedding.

    Args:
        positions: integers `[t]`, or `[b, t]` where sequences are at different ones.
        head_dim: even; one angle for each pair of channels.
        theta: base of the geometric series of frequencies.

    Returns:
        `[t, head_dim / 2]` or `[b, t, head_dim / 2]` float64, each `position * theta^(-2 i /
        head_dim)` reduced to one turn.
    """
    # At long positions a float32 product is off by a good part of a turn.
    exact = widest(positions.device)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim
    angles = positions.to(exact)[..., None] * torch.pow(theta, -exponents)
    return torch.remainder(angles, 2 * math.pi)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs `(i, i + d/2)` of `x` `[b, t, h, d]` by `angles` `[t, d/2]` or
    `[b, t, d/2]`.

    A dot product of two vectors rotated by their own positions depends on the distance alone, so a
    rotated key may be folded into a state and never be touched again. Computed in float32 or wider;
    the result has the dtype of `x`.
    """
    return rotate(x, rotation(angles, torch.promote_types(x.dtype, torch.float32)))


def rotation(angles: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for `rotate`, of angles `[..., d/2]`: `[..., 1, d]` each, in `dtype`."""
    angles = angles.to(dtype)
    # In the first half the other channel is subtracted.
    signed = torch.cat((-angles, angles), dim=-1)[..., None, :]
    return signed.cos(), signed.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """`apply_rotary` of `x` `[b, t, h, d]` by what `rotation` makes of its angles: heads and layers
    may share that. The result has the dtype of `x`."""
    cos, sin = by
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin).to(x.dtype)


class GateProjection(nn.Linear):
    """Logits of the gates, computed and returned in float32 (float64 for float64 parameters).

    A linear layer `[..., in_features]` to `[..., num_heads]`, whose parameters may be of any dtype:
    a log gate near -1/4096 added thousands of times needs more than bfloat16's eight
    bits. Autocast does not lower it either.

    The biases start such that head 0 remembers 4096 tokens and the last one 16, and those between
    are spread evenly on a log scale: `sigmoid(bias) = 1 - 1/memory`.

    Args:
        in_features: width of the input.
        num_heads: gates a token.
        device, dtype: of the parameters, as in `torch.nn.Linear`.
        bias: False where gates are to be as a checkpoint has them, without. Default: True.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
    ):
        super().__init__(in_features, num_heads, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Weights as in `torch.nn.Linear`, biases by the heads' memories."""
        super().reset_parameters()
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(self.initial_bias())

    def initial_bias(self) -> Tensor:
        """What biases start as, `[num_heads]` float64 where the device has it."""
        # Made of the bias itself, not of a plain tensor, which could not be copied to a sharded
        # one: head [num_heads] is 0, 1, 2, ... wherever the bias is.
        head = torch.ones_like(self.bias, dtype=torch.int64).cumsum(0) - 1
        longest, shortest = math.log2(_LONGEST_MEMORY), math.log2(_SHORTEST_MEMORY)
        step = (shortest - longest) / max(1, self.out_features - 1)
        memory = torch.exp2(longest + step * head.to(widest(head.device)))
        # What a token leaves behind falls to 1/e after `memory` more.
        return torch.log(memory - 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x.device):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(x.to(wide), self.weight.to(wide), bias)


def log_gates(projection: nn.Module, x: Tensor) -> Tensor:
    """`logsigmoid(projection(x))` in float32 or wider, under autocast too.

    Args:
        projection: a `GateProjection`, or what stands in its place, wrapped or quantised. It is
            called; its weights are not read.
        x: `[..., in_features]`.

    Returns:
        `[..., num_heads]`, float64 where the logits are.
    """
    # What a wrapper adds is computed as the logits are, unless its parameters have fewer bits:
    # then autocast may have to bring x to their dtype.
    dtypes = {parameter.dtype for parameter in projection.parameters()}
    if dtypes and dtypes <= {torch.float32, torch.float64}:
        with without_autocast(x.device):
            logits = projection(x.to(torch.promote_types(x.dtype, torch.float32)))
    else:
        logits = projection(x)
    return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


@contextlib.contextmanager
def all_or_nothing(caches: Sequence[RetentionCache]) -> Iterator[None]:
    """What raises inside leaves caches as they were, so that it may be tried again.

    For layers that step together: where the third one runs out of memory, the first two have
    taken the tokens already, and would count them twice. Tokens in a ring are taken back. What went
    into the state of a sequence, as long prompts do, cannot be: then that sequence is reset in all
    the caches, and a note on the exception says so. Sequences that were empty before are empty
    again, without a note.

    Args:
        caches: all that is stepped inside, of as many slots, in which a sequence has the same one.

    Raises:
        ValueError: for caches of different numbers of slots.
        BaseException: what is raised inside, an interruption too.
    """
    if len({cache.slots for cache in caches}) > 1:
        raise ValueError(
            f"caches: expected as many slots in each, got {[cache.slots for cache in caches]}"
        )
    on_cuda = any(cache.device.type == "cuda" for cache in caches)
    if on_cuda and torch.cuda.is_current_stream_capturing():
        yield  # nothing is done yet, so nothing is to be taken back
        return
    before = [cache.pool.cursors.clone() for cache in caches]
    try:
        yield
    except BaseException as error:
        lost = {
            slot
            for cache, cursors in zip(caches, before, strict=True)
            for slot in rewind(cache.pool, cursors).nonzero()[:, 0].tolist()
        }
        if lost:
            for cache in caches:
                cache.reset(torch.tensor([*lost], dtype=torch.int32, device=cache.device))
            error.add_note(
                f"cache: reset slots {sorted(lost)}, since their states had changed before this "
                "was raised; expected these sequences to begin again, at their first token"
            )
        raise


class PowerRetention(nn.Module):
    """Causal multi-head power retention with its projections.

    Projects the input to queries, keys, values and gates, rotates queries and keys by their
    positions, and returns the projected result of

        o_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij
        w_ij = (q_i . k_j / sqrt(head_dim))^deg exp(L_i - L_j),   L = cumsum(log_G)

    with `log_G = logsigmoid(g_proj(x))`, always in float32 (float64 for a float64 layer).

    Projections are called as modules, and each initialises itself in its `reset_parameters`: they
    may be wrapped, replaced and sharded one by one.

    Args:
        hidden_size: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by `num_heads / num_kv_heads` query heads.
            Default: `num_heads`.
        head_dim: channels a head, one `retention.state_dim` accepts. Default:
            `hidden_size / num_heads`.
        deg: degree of the power; even. Default: 2.
        chunk_size: tokens a chunk in `forward`. Default: chosen by `power_retention`.
        switch_over_seq_len: at or below this length `forward` uses the quadratic form (default:
            chosen by `power_retention`), and `step` folds this many tokens at a time (default:
            chosen by `retention.RetentionCache`).
        gating: whether each head forgets, at a rate computed from the token. Default: True.
        rope_theta: base of the rotary frequencies; None for no rotary embedding. Default: 10000.
        bias: whether the query, key, value and output projections have biases. The gate's always
            has: it sets how long a head remembers. Default: False.
        device, dtype: of the parameters, as in `torch.nn.Linear`.
        context_parallel: a `DeviceMesh` of one dimension, or a process group (with which no layer
            can be copied), whose ranks share every sequence: in `forward`, `x` is this rank's part
            of the tokens (see `retention.distributed.power_retention`). An attribute that may be
            set later. Default: sequences are whole.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for sizes below 1 or that do not divide, and for a `head_dim` or `deg` that
            `retention.state_dim` rejects.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        deg: int = 2,
        chunk_size: int | None = None,
        switch_over_seq_len: int | None = None,
        gating: bool = True,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        context_parallel: ProcessGroup | DeviceMesh | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.check_integer("hidden_size", hidden_size, 1)
        checks.check_integer("num_heads", num_heads, 1)
        checks.check_integer("num_kv_heads", num_kv_heads, 1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"num_heads: expected a divisor of hidden_size = {hidden_size} where head_dim "
                    f"is not given, got {num_heads}"
                )
            head_dim = hidden_size // num_heads
        state_dim(head_dim, deg)  # raises for what no state can be built of
        if chunk_size is not None:
            checks.check_integer("chunk_size", chunk_size, 1)
        if switch_over_seq_len is not None:
            checks.check_integer("switch_over_seq_len", switch_over_seq_len, 1)
        if rope_theta is not None and not (rope_theta > 0 and math.isfinite(rope_theta)):
            raise ValueError(f"rope_theta: expected a positive number, got {rope_theta}")

        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.deg = deg
        self.chunk_size = chunk_size
        self.switch_over_seq_len = switch_over_seq_len
        self.gating = gating
        self.rope_theta = rope_theta
        self.context_parallel = context_parallel

        where: Any = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, **where)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **where)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **where)
        self.g_proj = GateProjection(hidden_size, num_kv_heads, **where) if gating else None
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias, **where)

    def extra_repr(self) -> str:
        parts = [f"num_heads={self.num_heads}", f"num_kv_heads={self.num_kv_heads}"]
        parts += [f"head_dim={self.head_dim}", f"deg={self.deg}", f"rope_theta={self.rope_theta}"]
        return ", ".join(parts)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x: expected [b, t, {self.hidden_size}], got {list(x.shape)}")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # [b, t, hidden] -> q [b, t, num_heads, d]; k, v [b, t, num_kv_heads, d]; gate [b, t, kv]
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return query, key, value, self._log_gate(x)

    def _log_gate(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else log_gates(self.g_proj, x)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, share_start: int | None = None
    ) -> Tensor:
        """Retention over whole sequences, or over this rank's share of them.

        Args:
            x: `[b, t, hidden_size]`. With `context_parallel`, t tokens of more that ranks share.
            cu_seqlens: int32 `[n + 1]` where `x` holds n sequences end to end (then b = 1):
                sequence i is tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`. Each has positions
                from 0 and sees only itself. With `context_parallel`, of all ranks' tokens.
            share_start: with `context_parallel`, how many tokens the ranks before have. Default:
                rank times t, as with shares of equal length.

        Returns:
            `[b, t, hidden_size]`, of the projections' dtype (the autocast dtype under autocast).

        Raises:
            ValueError: for an `x` of another shape, for `cu_seqlens` that `power_retention`
                rejects, for a `context_parallel` that `retention.distributed.power_retention`
                rejects, and for `share_start` without it.
        """
        self._check_input(x)
        start = 0
        if self.context_parallel is not None:
            start = distributed.start_of(self.context_parallel, x.shape[1], share_start)
        elif share_start is not None:
            raise ValueError("share_start: expected None without context_parallel, got a number")
        query, key, value, log_gate = self._project(x)
        if self.rope_theta is not None:
            positions = start + torch.arange(x.shape[1], device=x.device)
            if cu_seqlens is not None:
                if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
                    raise ValueError(
                        f"cu_seqlens: expected int32 [n + 1] with n >= 1, "
                        f"got shape {list(cu_seqlens.shape)}"
                    )
                starts = cu_seqlens.to(x.device)
                sequence = torch.searchsorted(starts[1:], positions.to(starts.dtype), right=True)
                positions = positions - starts[sequence]
            angles = rotary_angles(positions, self.head_dim, self.rope_theta)
            query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        options: dict[str, Any] = {
            "deg": self.deg,
            "chunk_size": self.chunk_size,
            "switch_over_seq_len": self.switch_over_seq_len,
            "cu_seqlens": cu_seqlens,
        }
        if self.context_parallel is None:
            out = functional.power_retention(query, key, value, log_gate, **options)
        else:
            options |= {"group": self.context_parallel, "share_start": start}
            out = distributed.power_retention(query, key, value, log_gate, **options)
        return self.o_proj(cast(Tensor, out).flatten(2))

    def init_cache(
        self,
        batch_size: int,
        switch_over_seq_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_tokens_per_step: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> RetentionCache:
        """An empty cache for `step`.

        Args:
            batch_size: slots, one for each sequence.
            switch_over_seq_len: the cache's window, tokens that are folded into the state at a
                time. Default: the layer's, or the cache's own choice.
            device: default: the parameters'.
            dtype: of the ring. Default: autocast's where it is on, else that of `k_proj`'s first
                parameter of a dtype that keys can have, else (quantised) of the layer's first, else
                torch's default.
            max_tokens_per_step: most tokens of a sequence in a `step` that goes through the ring;
                more are a prompt. Default: 16, or the window where that is shorter.
            state_dtype: as `retention.RetentionCache` has it. Default: float32.

        Raises:
            TypeError, ValueError: for sizes and dtypes that `retention.RetentionCache` rejects.
        """
        # Wrapped or quantised, a projection has no weight, or one of a dtype that no key has.
        tensors = [
            *itertools.chain(self.k_proj.parameters(), self.k_proj.buffers()),
            *itertools.chain(self.parameters(), self.buffers()),
        ]
        if device is None:
            device = tensors[0].device if tensors else torch.get_default_device()
        device = torch.device(device)
        if dtype is None and autocasts(device):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype is None:
            dtype = next((x.dtype for x in tensors if x.dtype in checks.DTYPES), None)
        if dtype is None:
            dtype = torch.get_default_dtype()
        checks.check_integer("batch_size", batch_size, 1)
        window = self.switch_over_seq_len if switch_over_seq_len is None else switch_over_seq_len
        if window is not None:
            checks.check_integer("switch_over_seq_len", window, 1)
        if max_tokens_per_step is None:
            max_tokens_per_step = min(_MAX_TOKENS_PER_STEP, window or _MAX_TOKENS_PER_STEP)
        return RetentionCache(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            window=window,
            max_tokens_per_step=max_tokens_per_step,
            dtype=dtype,
            state_dtype=state_dtype,
            gating=self.gating,
            deg=self.deg,
            device=device,
        )

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        cache: RetentionCache | None = None,
        slots: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, RetentionCache]:
        """Retention over the next tokens of sequences begun in earlier calls, without gradients.

        Any split of a sequence into calls gives what `forward` gives on the whole, up to rounding.
        Up to the cache's `max_tokens_per_step` tokens join the ring; more go straight into the
        state, chunk by chunk. Every sequence has positions of its own.

        A call that raises, whatever it is, leaves the cache as it was. Only sequences whose state
        had taken the call's tokens by then, or was being written, are reset, and a note on the
        exception says so. For several layers at once see `all_or_nothing`.

        Args:
            x: `[b, t, hidden_size]`, t >= 1.
            cache: of the call before. Changed in place. Default: a new one, as of `init_cache(b)`.
            slots: int32 `[b]`, where the cache has each row's sequence, at most once; -1 for a row
                that is none, whose result is that of zeros. Default: row i is slot i, of a cache
                with b slots.
            attention_mask: `[b, t]`, bool or integers, 0 where a row is padded, on either side:
                such a token leaves no trace, and its result is that of zeros. Default: no padding.
            rotation: of a `rotation` with the same arguments: layers that step together from the
                same positions, by the same angles, may share one. Default: computed.

        Returns:
            `[b, t, hidden_size]` and the cache.

        Raises:
            TypeError, ValueError: for an argument of another shape or dtype, and for a cache that
                does not fit the layer.
        """
        self._check_input(x)
        b, t, _ = x.shape
        if t < 1:
            raise ValueError(f"x: expected at least one token, got {list(x.shape)}")
        self._check_step(x, cache, slots, attention_mask)

        if rotation is None:
            rotation = self.rotation(x, cache, slots, attention_mask)
        query, key, value, log_gate = self._project(x)
        projected = query.dtype
        if rotation is not None:
            # At once: a step of few tokens takes as long as its operations are many.
            both = rotate(torch.cat((query, key), dim=2), rotation)
            query, key = both.split((query.shape[2], key.shape[2]), dim=2)
        if cache is None:
            cache = self.init_cache(b, device=key.device, dtype=key.dtype)
        if slots is None:
            slots = torch.arange(b, dtype=torch.int32, device=cache.device)
        tokens = [query.to(cache.dtype), key.to(cache.dtype), value.to(cache.dtype)]
        if log_gate is not None:
            log_gate = log_gate.to(checks.state_dtype(cache.dtype))
        take: Any = cache.step if t <= cache.max_tokens_per_step else cache.prefill
        with all_or_nothing([cache]):
            if attention_mask is None:
                out = take(*tokens, log_gate, slots)
            else:
                order, cu_seqlens = _pack(attention_mask)
                packed = (x.flatten(0, 1)[order][None] for x in tokens)
                gates = None if log_gate is None else log_gate.flatten(0, 1)[order][None]
                taken = take(*packed, gates, slots, cu_seqlens)[0]
                out = torch.empty_like(taken).index_copy_(0, order, taken).unflatten(0, (b, t))
            out = self.o_proj(out.flatten(2).to(projected))
        return out, cache

    def rotation(
        self,
        x: Tensor,
        cache: RetentionCache | None = None,
        slots: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Rotation | None:
        """How a `step` with these arguments rotates its queries and keys; None where it does not.

        Args:
            x: as in `step`; of its values nothing is read.
            cache, slots, attention_mask: as in `step`, which has not been called yet.

        Returns:
            Cosines and sines, `[t, 1, head_dim]` or `[b, t, 1, head_dim]` each.
        """
        if self.rope_theta is None:
            return None
        positions = self._positions(x, cache, slots, attention_mask)
        angles = rotary_angles(positions, self.head_dim, self.rope_theta)
        dtype = x.dtype if cache is None else cache.dtype
        return rotation(angles, torch.promote_types(dtype, torch.float32))

    def _positions(
        self,
        x: Tensor,
        cache: RetentionCache | None,
        slots: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Where a step's tokens are in their sequences: [t], or [b, t]."""
        if attention_mask is None:
            positions = torch.arange(x.shape[1], device=x.device)
        else:
            positions = (attention_mask != 0).cumsum(1) - 1
        if cache is None:
            return positions
        seen = cache.positions
        if slots is not None:
            seen = seen[slots.clamp(0, cache.slots - 1)]
        return seen[:, None] + positions

    def _check_step(
        self,
        x: Tensor,
        cache: RetentionCache | None,
        slots: Tensor | None,
        attention_mask: Tensor | None,
    ) -> None:
        b, t, _ = x.shape
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
                raise TypeError(
                    "attention_mask: expected a tensor [b, t] of bools or integers, got "
                    f"{checks.describe(attention_mask)}"
                )
            checks.check_shape("attention_mask", attention_mask, (b, t), "[b, t]", "x")
            if attention_mask.device != x.device:
                raise ValueError(
                    f"attention_mask: expected device {x.device} as x, got {attention_mask.device}"
                )
        if cache is None:
            if slots is not None:
                raise ValueError("slots: expected None where there is no cache, got slots")
            return
        if not isinstance(cache, RetentionCache):
            raise TypeError(f"cache: expected a RetentionCache, got {checks.describe(cache)}")
        for name, expected, got in (
            ("kv_heads", self.num_kv_heads, cache.kv_heads),
            ("head_dim", self.head_dim, cache.head_dim),
            ("value_dim", self.head_dim, cache.value_dim),
            ("deg", self.deg, cache.deg),
            ("gating", self.gating, cache.gating),
        ):
            if expected != got:
                raise ValueError(f"cache: expected one with {name}={expected}, got {name}={got}")
        if slots is None:
            if cache.slots != b:
                raise ValueError(
                    f"cache: expected one with slots={b}, as x has rows, where slots are not "
                    f"given, got slots={cache.slots}"
                )
        else:
            cache.check_slots("slots", slots, b)


def _pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For a mask [b, t]: the flat places of its tokens, row after row, and then all others, [b t];
    and where each row begins among them, int32 [b + 1]."""
    real = mask != 0
    order = (~real).flatten().to(torch.int8).argsort(stable=True)
    return order, F.pad(real.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
