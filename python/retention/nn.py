"""Layers built on power retention.

`PowerRetention` stands where a transformer has causal self-attention. It trains with `forward` and
decodes with `step`, whose `RetentionCache` takes the same memory at the first token and at the
millionth.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retention import functional
from retention.ops import checks
from retention.ops.arguments import autocasts, without_autocast
from retention.ops.symmetric_power import state_dim

__all__ = [
    "GateProjection",
    "PowerRetention",
    "RetentionCache",
    "all_or_nothing",
    "apply_rotary",
    "rotary_angles",
]

_DEFAULT_RING = 512

# Each head starts with a memory of this many tokens, spread evenly on a log scale over the heads.
_LONGEST_MEMORY = 4096
_SHORTEST_MEMORY = 16


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Rotation angles of rotary position embedding.

    Args:
        positions: integers `[t]`.
        head_dim: even; one angle for each pair of channels.
        theta: base of the geometric series of frequencies.

    Returns:
        `[t, head_dim / 2]` float64, each `position * theta^(-2 i / head_dim)` reduced to one turn.
    """
    # At long positions a float32 product is off by a good part of a turn.
    exact = _widest(positions.device)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim
    angles = positions.to(exact)[:, None] * torch.pow(theta, -exponents)
    return torch.remainder(angles, 2 * math.pi)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs `(i, i + d/2)` of `x` `[b, t, h, d]` by `angles` `[t, d/2]`.

    A dot product of two vectors rotated by their own positions depends on the distance alone, so a
    rotated key may be folded into a state and never be touched again. Computed in float32 or wider;
    the result has the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = angles.to(wide)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(wide).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def _widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


class GateProjection(nn.Linear):
    """Logits of the gates, computed and returned in float32 (float64 for float64 parameters).

    A linear layer `[..., in_features]` to `[..., num_heads]` with a bias, whose parameters may be
    of any dtype: a log gate near -1/4096 added thousands of times needs more than bfloat16's eight
    bits. Autocast does not lower it either.

    The biases start such that head 0 remembers 4096 tokens and the last one 16, and those between
    are spread evenly on a log scale: `sigmoid(bias) = 1 - 1/memory`.

    Args:
        in_features: width of the input.
        num_heads: gates a token.
        device, dtype: of the parameters, as in `torch.nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, num_heads, bias=True, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Weights as in `torch.nn.Linear`, biases by the heads' memories."""
        super().reset_parameters()
        # Made of the bias itself, not of a plain tensor, which could not be copied to a sharded
        # one: head [num_heads] is 0, 1, 2, ... wherever the bias is.
        with torch.no_grad():
            head = torch.ones_like(self.bias, dtype=torch.int64).cumsum(0) - 1
            longest, shortest = math.log2(_LONGEST_MEMORY), math.log2(_SHORTEST_MEMORY)
            step = (shortest - longest) / max(1, self.out_features - 1)
            memory = torch.exp2(longest + step * head.to(_widest(head.device)))
            # What a token leaves behind falls to 1/e after `memory` more.
            self.bias.copy_(torch.log(memory - 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x.device):
            return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class RetentionCache:
    """What one `PowerRetention` layer remembers between two calls of `step`.

    Everything is allocated here, once: a ring of the most recent tokens, and the state into which
    the ring is folded whenever it is full. Made by `PowerRetention.init_cache`.

    Attributes:
        keys, values: `[b, n, h, head_dim]`, the ring; the first `length` entries are in use.
        log_gates: `[b, n, h]`, float32 (float64 where the keys are); None without gates.
        state: `[b, h, D, head_dim]`, float32 (float64 where the keys are).
        sum_of_keys: `[b, h, D]`, of the state's dtype.
        length: tokens in the ring.
        position: tokens seen so far, those in the state and those in the ring.
    """

    def __init__(
        self,
        batch_size: int,
        switch_over_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        deg: int,
        gating: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        checks.check_integer("batch_size", batch_size, 1)
        checks.check_integer("switch_over_seq_len", switch_over_seq_len, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = state_dim(head_dim, deg)
        ring = (batch_size, switch_over_seq_len, num_kv_heads)
        # Tensors made in inference mode could never be written to outside of it.
        with torch.inference_mode(False):
            self.keys = torch.zeros(*ring, head_dim, device=device, dtype=dtype)
            self.values = torch.zeros(*ring, head_dim, device=device, dtype=dtype)
            self.log_gates = torch.zeros(ring, device=device, dtype=wide) if gating else None
            self.state = torch.zeros(
                batch_size, num_kv_heads, rows, head_dim, device=device, dtype=wide
            )
            self.sum_of_keys = torch.zeros(
                batch_size, num_kv_heads, rows, device=device, dtype=wide
            )
        self.length = 0
        self.position = 0

    @property
    def capacity(self) -> int:
        """Tokens the ring holds when full."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held: ring, state, sum of keys and the two counters. Never changes."""
        counters = 16
        tensors = (self.keys, self.values, self.log_gates, self.state, self.sum_of_keys)
        return counters + sum(x.nbytes for x in tensors if x is not None)

    def reset(self) -> None:
        """Forget everything, in place."""
        self.length = 0
        self.position = 0
        self.state.zero_()
        self.sum_of_keys.zero_()

    def append(self, key: Tensor, value: Tensor, log_gate: Tensor | None) -> None:
        """Write `m <= capacity - length` tokens (`[b, m, h, d]`, gates `[b, m, h]`) to the ring."""
        new = slice(self.length, self.length + key.shape[1])
        self.keys[:, new] = key
        self.values[:, new] = value
        if self.log_gates is not None:
            self.log_gates[:, new] = log_gate
        self.length += key.shape[1]
        self.position += key.shape[1]

    def recent(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of the tokens in the ring: keys, values and log gates."""
        used = slice(0, self.length)
        gates = None if self.log_gates is None else self.log_gates[:, used]
        return self.keys[:, used], self.values[:, used], gates

    def folded(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """State and sum of keys, or None for both while nothing was folded into them."""
        if self.position == self.length:
            return None, None
        return self.state, self.sum_of_keys

    def fold(self, state: Tensor, sum_of_keys: Tensor, beyond: int = 0) -> None:
        """Take a new state that covers every token seen and `beyond` more, and empty the ring."""
        position = self.position + beyond
        self.length = self.position = 0  # until all of it is there: half a state is none
        self.state.copy_(state)
        self.sum_of_keys.copy_(sum_of_keys)
        self.position = position

    def _rewind(self, length: int, position: int) -> bool:
        """Back to earlier counters, or False where the state has changed since."""
        if position == 0:
            self.reset()
        elif self.position < position or self.position - self.length != position - length:
            return False
        self.length, self.position = length, position
        return True


@contextlib.contextmanager
def all_or_nothing(caches: Sequence[RetentionCache]) -> Iterator[None]:
    """What raises inside leaves caches as they were, so that it may be tried again.

    For layers that step together: where the third one runs out of memory, the first two have
    taken the tokens already, and would count them twice. Tokens in a ring are taken back. A state
    that has changed since cannot be: then all the caches are reset, and a note on the exception
    says so. Those that were empty before are empty again, without a note.

    Args:
        caches: all that is stepped inside.

    Raises:
        BaseException: what is raised inside, an interruption too.
    """
    before = [(cache.length, cache.position) for cache in caches]
    try:
        yield
    except BaseException as error:
        rewound = [c._rewind(*counters) for c, counters in zip(caches, before, strict=True)]
        if not all(rewound):
            for cache in caches:
                cache.reset()
            error.add_note(
                "cache: reset, since a state had changed before this was raised; expected its "
                "sequences to begin again, at their first token"
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
            chosen by `power_retention`), and the ring of `step` holds this many tokens (default:
            512).
        gating: whether each head forgets, at a rate computed from the token. Default: True.
        rope_theta: base of the rotary frequencies; None for no rotary embedding. Default: 10000.
        bias: whether the query, key, value and output projections have biases. The gate's always
            has: it sets how long a head remembers. Default: False.
        device, dtype: of the parameters, as in `torch.nn.Linear`.

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

    def _project(
        self, x: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # [b, t, hidden] -> q [b, t, num_heads, d]; k, v [b, t, num_kv_heads, d]; gate [b, t, kv]
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if positions is not None:
            angles = rotary_angles(positions, self.head_dim, self.rope_theta)
            query = apply_rotary(query, angles)
            key = apply_rotary(key, angles)
        return query, key, value, self._log_gate(x)

    def _log_gate(self, x: Tensor) -> Tensor | None:
        if self.g_proj is None:
            return None
        # What a wrapper adds is computed as the logits are, unless its parameters have fewer bits:
        # then autocast may have to bring x to their dtype.
        dtypes = {parameter.dtype for parameter in self.g_proj.parameters()}
        if dtypes and dtypes <= {torch.float32, torch.float64}:
            with without_autocast(x.device):
                logits = self.g_proj(x.to(torch.promote_types(x.dtype, torch.float32)))
        else:
            logits = self.g_proj(x)
        return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Retention over whole sequences.

        Args:
            x: `[b, t, hidden_size]`.
            cu_seqlens: int32 `[n + 1]` where `x` holds n sequences end to end (then b = 1):
                sequence i is tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`. Each has positions
                from 0 and sees only itself.

        Returns:
            `[b, t, hidden_size]`, of the projections' dtype (the autocast dtype under autocast).

        Raises:
            ValueError: for an `x` of another shape, and for `cu_seqlens` that `power_retention`
                rejects.
        """
        self._check_input(x)
        positions = None
        if self.rope_theta is not None:
            positions = torch.arange(x.shape[1], device=x.device)
            if cu_seqlens is not None:
                if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
                    raise ValueError(
                        f"cu_seqlens: expected int32 [n + 1] with n >= 1, "
                        f"got shape {list(cu_seqlens.shape)}"
                    )
                starts = cu_seqlens.to(x.device)
                sequence = torch.searchsorted(starts[1:], positions.to(starts.dtype), right=True)
                positions = positions - starts[sequence]
        query, key, value, log_gate = self._project(x, positions)
        out = functional.power_retention(
            query,
            key,
            value,
            log_gate,
            deg=self.deg,
            chunk_size=self.chunk_size,
            switch_over_seq_len=self.switch_over_seq_len,
            cu_seqlens=cu_seqlens,
        )
        return self.o_proj(cast(Tensor, out).flatten(2))

    def init_cache(
        self,
        batch_size: int,
        switch_over_seq_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RetentionCache:
        """An empty cache for `step`.

        Args:
            batch_size: sequences decoded together.
            switch_over_seq_len: tokens the ring holds before they are folded into the state.
                Default: the layer's, or 512.
            device: default: the parameters'.
            dtype: of the ring. Default: autocast's where it is on, else that of `k_proj`'s first
                parameter of a dtype that keys can have, else (quantised) of the layer's first, else
                torch's default.

        Raises:
            TypeError, ValueError: for sizes that are not positive integers.
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
        if switch_over_seq_len is None:
            switch_over_seq_len = self.switch_over_seq_len or _DEFAULT_RING
        return RetentionCache(
            batch_size,
            switch_over_seq_len,
            self.num_kv_heads,
            self.head_dim,
            self.deg,
            self.gating,
            device,
            dtype,
        )

    @torch.no_grad()
    def step(self, x: Tensor, cache: RetentionCache | None = None) -> tuple[Tensor, RetentionCache]:
        """Retention over the next tokens of sequences begun in earlier calls, without gradients.

        Any split of a sequence into calls gives what `forward` gives on the whole, up to rounding.
        Tokens that fit the ring are answered from the ring and the state; tokens that would fill an
        empty ring (a long prompt) go straight into the state, chunk by chunk.

        A call that raises, whatever it is, leaves the cache as it was. Only where a new state was
        being written into it at that moment it is reset, and a note on the exception says so. For
        several layers at once see `all_or_nothing`.

        Args:
            x: `[b, t, hidden_size]`, t >= 1.
            cache: of the call before. Changed in place. Default: a new one, as of `init_cache(b)`.

        Returns:
            `[b, t, hidden_size]` and the cache.

        Raises:
            ValueError: for an `x` of another shape, and for a cache of another layer's shape or of
                another batch size.
        """
        self._check_input(x)
        b, t, _ = x.shape
        if t < 1:
            raise ValueError(f"x: expected at least one token, got {list(x.shape)}")
        seen = 0
        if cache is not None:
            self._check_cache(b, cache)
            seen = cache.position

        positions = None
        if self.rope_theta is not None:
            positions = torch.arange(seen, seen + t, device=x.device)
        query, key, value, log_gate = self._project(x, positions)
        projected = query.dtype
        if cache is None:
            cache = self.init_cache(b, device=key.device, dtype=key.dtype)
        kept = cache.keys.dtype
        query, key, value = query.to(kept), key.to(kept), value.to(kept)
        if log_gate is not None:
            log_gate = log_gate.to(cache.log_gates.dtype)

        def tokens(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            return key[:, part], value[:, part], None if log_gate is None else log_gate[:, part]

        with all_or_nothing([cache]):
            # The ring is filled up, unless it is empty and there is enough to fill it anyway.
            filling = min(t, cache.capacity - cache.length)
            if cache.length == 0 and filling == cache.capacity:
                filling = 0
            rest = slice(filling, t)  # what finds an empty ring
            straight = t - filling >= cache.capacity
            state, sum_of_keys = cache.folded()
            outs = []
            if filling:
                cache.append(*tokens(slice(0, filling)))
                out, state, sum_of_keys = functional.power_retention_inference(
                    query[:, :filling],
                    *cache.recent(),
                    initial_state=state,
                    sum_of_keys=sum_of_keys,
                    deg=self.deg,
                    switch_over_seq_len=cache.capacity,
                )
                outs.append(out)
            if straight:
                out, state, sum_of_keys = functional.power_retention(
                    query[:, rest],
                    *tokens(rest),
                    initial_state=state,
                    sum_of_keys=sum_of_keys,
                    return_final_state=True,
                    deg=self.deg,
                    chunk_size=self.chunk_size,
                    switch_over_seq_len=self.switch_over_seq_len,
                )
                outs.append(out)
            elif filling < t:
                out, _, _ = functional.power_retention_inference(
                    query[:, rest],
                    *tokens(rest),
                    initial_state=state,
                    sum_of_keys=sum_of_keys,
                    deg=self.deg,
                    switch_over_seq_len=None,
                )
                outs.append(out)
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
            out = self.o_proj(out.flatten(2).to(projected))

            # Last of all: until here the counters alone have changed.
            if straight:
                cache.fold(state, sum_of_keys, beyond=t - filling)
            elif cache.length == cache.capacity:
                cache.fold(state, sum_of_keys)
                cache.append(*tokens(rest))
        return out, cache

    def _check_cache(self, b: int, cache: RetentionCache) -> None:
        expected = [b, cache.capacity, self.num_kv_heads, self.head_dim]
        rows = state_dim(self.head_dim, self.deg)
        if list(cache.keys.shape) != expected or cache.sum_of_keys.shape[2] != rows:
            raise ValueError(
                f"cache: expected keys [{b}, n, {self.num_kv_heads}, {self.head_dim}] and a state "
                f"of {rows} rows, got keys {list(cache.keys.shape)} and a state of "
                f"{cache.sum_of_keys.shape[2]} rows"
            )
        if (cache.log_gates is not None) != self.gating:
            raise ValueError(
                f"cache: expected one made with gating={self.gating}, got gating={not self.gating}"
            )
