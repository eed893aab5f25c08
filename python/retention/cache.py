"""The memory of many sequences that are decoded, and what is done to it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retention.ops import checks, decoding_operators, pool
from retention.ops.arguments import cast_for_autocast, check_keys_values
from retention.ops.cuda import decoding as cuda_decoding
from retention.ops.pytorch import decoding
from retention.ops.symmetric_power import state_dim

# Looked up once, for every step would wait for it.
_operators = torch.ops.retention
_step = _operators.decode_step.default
_MOST_CHECKED = 1024


class RetentionCache:
    """What one layer of power retention remembers of many sequences, in slots of a fixed size.

    A slot has per key head a state, into which old tokens were folded, and a ring of the recent
    ones. ``step`` reads both, with the definition of :func:`retention.power_retention`, and folds
    a window of tokens when there are as many. All memory is allocated here, once; every call
    changes it in place, without gradients, and without a word to the host but where it says so.
    Calls on several CUDA streams have to wait for each other, also those for different slots.

    Rows of a call name their slots, int32 ``[n]``, each at most once. A slot of -1, or any other
    that is out of range, is padding: its output is 0, and nothing is read or written.

    The state under a dtype of 16 bits is held to float32's last bit, or with ``state_dtype`` of
    bfloat16 rounded at random when it is written, which on average loses nothing. ``step`` reads it
    to bfloat16's eight bits in both cases. A cache of float32 or float64 has states of its dtype,
    read whole: greedy tokens are then those of the formula.

    Args:
        slots: sequences remembered.
        kv_heads: key and value heads, h.
        head_dim: d, a positive multiple of 8.
        value_dim: dv. Default: ``head_dim``.
        window: tokens folded at a time, at least ``max_tokens_per_step``. Default: where a step
            reads and writes the fewest bytes, near ``sqrt(8 D dv / (d + dv))``, but at most 128.
            Windows of different slots end at different tokens.
        max_tokens_per_step: most tokens of a sequence in one ``step``. The ring holds ``window``
            tokens and as many more. Default 1.
        dtype: of queries, keys and values: float64, float32, bfloat16 (default) or float16.
        state_dtype: float32 (default; a cache of float64 takes it for float64) or bfloat16.
        gating: whether tokens have log gates. Default True.
        deg: the degree p, positive and even. Default 2.
        device: of all tensors. Default: PyTorch's.
        slices: how many blocks of threads share a state in ``step``, whose sums are added up in
            order; 1 or more. By kernels a row's output then has the same bits whatever the number
            of rows; so it has on no other path. Default: as many as fill the device, by the rows.

    Attributes:
        slices: as given; may be set.
        pool: the tensors, a :class:`retention.ops.pool.Pool`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. The message names it, what it
            got and what it accepts. A call that raises so has changed nothing.

    The ring and the fold at the start of a step, of tokens that nobody can take back any more, are
    those of "ReplaySSM" in vLLM, the state that of Gelada, Buckman, Zhang and Bach
    (arXiv:2507.04239).
    """

    def __init__(
        self,
        slots: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int | None = None,
        max_tokens_per_step: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.float32,
        gating: bool = True,
        deg: int = 2,
        device: torch.device | str | None = None,
        slices: int | None = None,
    ):
        self.window, self._layout = _lay_out(
            slots,
            kv_heads,
            head_dim,
            value_dim,
            window,
            max_tokens_per_step,
            dtype,
            state_dtype,
            gating,
            deg,
        )
        self.max_tokens_per_step = max_tokens_per_step
        self.pool = self._layout.allocate(device)
        self.slices = slices
        self._checked: set[tuple[Any, ...]] = set()  # what of new tokens was found to fit
        self._known = decoding_operators.KnownSteps()
        self.reset()

    @classmethod
    def bytes(cls, *sizes: Any, **options: Any) -> int:
        """Bytes of a cache with the constructor's arguments, of which nothing is allocated.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        return cls(*sizes, **{**options, "device": "meta"}).nbytes

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return self._layout.slots

    @property
    def kv_heads(self) -> int:
        return self._layout.kv_heads

    @property
    def head_dim(self) -> int:
        return self._layout.head_dim

    @property
    def value_dim(self) -> int:
        return self._layout.value_dim

    @property
    def gating(self) -> bool:
        return self._layout.gating

    @property
    def deg(self) -> int:
        return self._layout.deg

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        return self._layout.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """What states are held in: float64, float32 or bfloat16."""
        return self._layout.state_dtype

    @property
    def slices(self) -> int | None:
        return self._slices or None

    @slices.setter
    def slices(self, slices: int | None) -> None:
        if slices is not None:
            checks.check_integer("slices", slices, 1)
        self._slices = slices or 0  # as operators have it

    @property
    def device(self) -> torch.device:
        return self.pool.cursors.device

    @property
    def nbytes(self) -> int:
        """Bytes held. Never changes."""
        return self._layout.bytes()

    @property
    def lengths(self) -> Tensor:
        """Tokens in the ring of each slot, which ``rollback`` can take back: int32 ``[slots]``, a
        copy on the device."""
        return pool.unpack(self.pool.cursors).length.clone()

    @property
    def positions(self) -> Tensor:
        """Tokens that each slot has seen, the place of its next one: int64 ``[slots]``, a copy on
        the device."""
        return self.pool.cursors[:, pool.SEEN].clone()

    def __repr__(self) -> str:
        layout = self._layout
        return (
            f"RetentionCache({layout.slots}, {layout.kv_heads}, {layout.head_dim}, "
            f"{layout.value_dim}, window={self.window}, "
            f"max_tokens_per_step={self.max_tokens_per_step}, dtype={layout.dtype}, "
            f"state_dtype={layout.state_dtype}, gating={layout.gating}, deg={layout.deg}, "
            f"device={str(self.device)!r}, slices={self.slices})"
        )

    # ---- tokens ---------------------------------------------------------------------------------

    def prefill(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        log_G: Tensor | None,
        slots: Tensor,
        cu_seqlens: Tensor | None = None,
        keep: int = 0,
    ) -> Tensor:
        """Prompts, or pieces of them, on top of what the slots hold.

        The ring is folded first; then all tokens go into the state but for the last ``keep``, which
        stay in the ring. Where kernels do not cover the call, ragged prompts with ``keep`` wait for
        the device.

        Args:
            Q: queries ``[n, t, hq, d]`` in the cache's dtype, hq a multiple of h; or packed,
                ``[1, total, hq, d]``. Under autocast, Q, K and V are cast to its dtype.
            K: keys ``[n, t, h, d]``.
            V: values ``[n, t, h, dv]``.
            log_G: log gates ``[n, t, h]``, float32 (float64 in a cache of float64), down to -inf;
                None without gating.
            slots: int32 ``[n]``.
            cu_seqlens: int32 ``[n + 1]``: row i is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i +
                1]`` of packed tensors. Tokens behind the last one are nobody's. Default: tensors
                are not packed.
            keep: tokens of each row that ``rollback`` can take back, at most ``window``; fewer
                where there are not as many. Default 0.

        Returns:
            ``[n, t, hq, dv]``, or ``[1, total, hq, dv]``, in the cache's dtype; 0 for padding.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value. On
                a CPU also for a slot that is there twice; elsewhere what that does is undefined.
        """
        Q, K, V, log_G = self._tokens(Q, K, V, log_G, slots, cu_seqlens)
        checks.check_integer("keep", keep, 0)
        if keep > self.window:
            raise ValueError(f"keep: expected at most the window of {self.window}, got {keep}")
        return _operators.decode_prefill(
            *(*self.pool, Q, K, V, log_G, slots, cu_seqlens, keep, self.deg)
        )

    def step(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        log_G: Tensor | None,
        slots: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The next tokens of sequences: they join the ring, and read ring and state.

        Tokens that were in the ring before are folded first, where they fill a window: until the
        next step, ``rollback`` can take back all of this one.

        Args:
            Q: queries ``[n, tq, hq, d]``, tq at most ``max_tokens_per_step``; or packed, ``[1,
                total, hq, d]``. This and all others as in :meth:`prefill`.
            K: keys ``[n, tq, h, d]``.
            V: values ``[n, tq, h, dv]``.
            log_G: log gates ``[n, tq, h]``, or None without gating.
            slots: int32 ``[n]``.
            cu_seqlens: int32 ``[n + 1]`` where tensors are packed. Of a row with too many tokens
                those beyond are ignored, and their outputs 0; on a CPU that raises.

        Returns:
            ``[n, tq, hq, dv]``, or ``[1, total, hq, dv]``, in the cache's dtype; 0 for padding.

        Raises:
            TypeError, ValueError: as in :meth:`prefill`.
        """
        most = self.max_tokens_per_step
        sizes = (most, self.window, self._layout.deg, self._slices)
        key = None
        if not torch.compiler.is_compiling():  # a step of few tokens waits for the host
            new = (Q, K, V, log_G, slots, cu_seqlens)
            key = self._known.key(self.pool, new, sizes)
            if (plan := self._known.find(key)) is not None:
                return cuda_decoding.step(plan, (*self.pool, *new, *sizes))
        Q, K, V, log_G = self._tokens(Q, K, V, log_G, slots, cu_seqlens)
        if cu_seqlens is None and Q.shape[1] > most:
            raise ValueError(
                f"Q: expected at most max_tokens_per_step = {most} tokens, got {Q.shape[1]}"
            )
        arguments = (*self.pool, Q, K, V, log_G, slots, cu_seqlens, *sizes)
        out = _step(*arguments)
        if key is not None:
            self._known.add(key, arguments)
        return out

    def rollback(self, slots: Tensor, tokens: int | Tensor) -> None:
        """The last tokens of each slot were never seen.

        Args:
            slots: int32 ``[n]``.
            tokens: how many, one number or int32 ``[n]``; at most :attr:`lengths`. Checked, which
                waits for a device, but not while a CUDA graph is captured.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value;
                more tokens than the ring holds.
        """
        self.check_slots("slots", slots)
        if isinstance(tokens, Tensor):
            self._check_indices("tokens", tokens)
            checks.check_shape("tokens", tokens, tuple(slots.shape), "[n]", "slots")
        else:
            checks.check_integer("tokens", tokens, 0)
            tokens = torch.full_like(slots, tokens)
        _operators.decode_rollback(*self.pool, slots, tokens)

    # ---- slots ----------------------------------------------------------------------------------

    def reset(self, slots: Tensor | None = None, phases: int | Tensor | None = None) -> None:
        """Slots have seen nothing.

        Args:
            slots: int32 ``[n]``. Default: all of them.
            phases: where windows end, in tokens seen modulo the window, one number or int32
                ``[n]``; copies carry it from slot to slot. An engine may have it that a sequence
                folds at the same tokens in every slot. Default: spread over the slots, so that few
                fold in one step.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        """
        if slots is None:
            slots = torch.arange(self.slots, dtype=torch.int32, device=self.device)
        self.check_slots("slots", slots)
        if phases is None:
            phases = (slots.long() * self.window // self.slots).int()
        elif isinstance(phases, Tensor):
            self._check_indices("phases", phases)
            checks.check_shape("phases", phases, tuple(slots.shape), "[n]", "slots")
            phases = phases.remainder(self.window)
        else:
            checks.check_integer("phases", phases, 0)
            phases = torch.full_like(slots, phases % self.window)
        _operators.decode_reset(*self.pool, slots, phases)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """What slots ``source`` hold into slots ``target``, as if all were read first: beams may
        permute. Where one of the two is out of range nothing happens.

        Args:
            source: int32 ``[n]``; a slot may be there more than once.
            target: int32 ``[n]``, each at most once.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device. On a CPU
                also for a target that is there twice.
        """
        self.check_slots("source", source)
        self.check_slots("target", target, len(source))
        _operators.decode_copy(*self.pool, source, target)

    @torch.no_grad()
    def select(self, slots: Tensor) -> RetentionCache:
        """A new cache of as many slots as are named, of which slot i holds what ``slots[i]`` holds.

        Args:
            slots: int32 ``[n]``, n at least 1, each in range; a slot may be there more than once.

        Raises:
            TypeError, ValueError: ``slots`` of another type, dtype, shape or device; on a CPU also
                for one that is out of range.
        """
        self.check_slots("slots", slots)
        if slots.device.type == "cpu":
            for slot in slots.tolist():
                if not 0 <= slot < self.slots:
                    raise ValueError(f"slots: expected 0 to {self.slots - 1}, got {slot}")
        new = copy.copy(self)
        new._layout = dataclasses.replace(self._layout, slots=len(slots))
        checks.check_integer("slots", len(slots), 1)
        new.pool = new._layout.allocate(self.device)
        for name, x in new.pool.remembered().items():
            torch.index_select(self.pool.remembered()[name], 0, slots, out=x)
        new._checked, new._known = set(), decoding_operators.KnownSteps()
        return new

    def to(self, device: torch.device | str) -> RetentionCache:
        """Moves all tensors to a device, and returns the cache itself."""
        self.pool = pool.Pool(*(None if x is None else x.to(device) for x in self.pool))
        self._checked.clear()
        return self

    @torch.no_grad()
    def state(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The state after all tokens seen, those in the ring too, and its sum of keys.

        What ``power_retention(.., return_final_state=True)`` gives for them; zeros for padding.

        Args:
            slots: int32 ``[n]``.

        Returns:
            ``[n, h, D, dv]`` and ``[n, h, D]``, float32 (float64 in a cache of float64).

        Raises:
            TypeError, ValueError: ``slots`` of another type, dtype, shape or device.
        """
        self.check_slots("slots", slots)
        return decoding.whole_state(self.pool, slots, self.deg)

    @torch.no_grad()
    def set_state(
        self, slots: Tensor, state: Tensor, sum_of_keys: Tensor, positions: int | Tensor
    ) -> None:
        """The inverse of :meth:`state`: slots hold these states, and their rings are empty.

        Args:
            slots: int32 ``[n]``, each at most once.
            state: ``[n, h, D, dv]``, float32 (float64 in a cache of float64).
            sum_of_keys: ``[n, h, D]``, likewise.
            positions: tokens that the states have seen, one number or int64 ``[n]``.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        """
        self.check_slots("slots", slots)
        shape = (len(slots), self.kv_heads, state_dim(self.head_dim, self.deg), self.value_dim)
        for name, x, layout in (
            ("state", state, "[n, h, D, dv]"),
            ("sum_of_keys", sum_of_keys, "[n, h, D]"),
        ):
            checks.check_tensor(name, x, layout)
            checks.check_shape(name, x, shape[: x.dim()], layout, "slots and the cache")
            self._check_kind(name, x, self.pool.key_sum.dtype)
        if isinstance(positions, Tensor):
            self._check_indices("positions", positions, torch.int64)
            checks.check_shape("positions", positions, tuple(slots.shape), "[n]", "slots")
        else:
            checks.check_integer("positions", positions, 0)
            positions = torch.full_like(slots, positions, dtype=torch.int64)
        decoding_operators.check_distinct("slots", slots, self.pool)
        decoding.set_state(self.pool, slots, state, sum_of_keys, positions, self.window)

    # ---- to files and back ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The cache's own tensors by name, and what they were laid out for: all contiguous, as
        ``safetensors.torch.save_file`` wants them."""
        return {**self.pool.remembered(), "configuration": self._configuration()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes over the contents of a cache with the same arguments, on any device.

        Args:
            state_dict: of :meth:`state_dict`.

        Raises:
            TypeError, ValueError: tensors that are not those of such a cache. Nothing has changed
                then.
        """
        own = self.state_dict()
        if set(state_dict) != set(own):
            raise ValueError(f"state_dict: expected {sorted(own)}, got {sorted(state_dict)}")
        for name, x in own.items():
            given = state_dict[name]
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {checks.describe(given)}")
            if given.dtype != x.dtype:
                raise TypeError(f"{name}: expected {x.dtype}, got {given.dtype}")
            checks.check_shape(name, given, tuple(x.shape), "shape", "the cache")
        theirs, ours = (x["configuration"].tolist() for x in (state_dict, own))
        if theirs != ours:
            raise ValueError(
                "configuration: expected [window, max_tokens_per_step, head_dim, value_dim, deg] = "
                f"{ours}, got {theirs}"
            )
        for name, x in self.pool.remembered().items():
            x.copy_(state_dict[name])

    def _configuration(self) -> Tensor:
        """What shapes and dtypes do not tell: int64 [5]."""
        return torch.tensor(
            [self.window, self.max_tokens_per_step, self.head_dim, self.value_dim, self.deg]
        )

    # ---- arguments ------------------------------------------------------------------------------

    def _tokens(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        log_G: Tensor | None,
        slots: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors of new tokens, cast as autocast has it, or TypeError or ValueError."""
        Q, K, V, log_G = cast_for_autocast(Q, K, V, log_G)
        if torch.compiler.is_compiling():
            self._check_tokens(Q, K, V, log_G, slots, cu_seqlens)
            return _detached(Q, K, V, log_G)
        # A step of few tokens waits for the host: what was found to fit is not looked at again.
        key = None
        if decoding_operators.are_ordinary(Q, K, V, log_G, slots, cu_seqlens):
            key = (
                *(Q.shape, K.shape, V.shape, slots.shape),
                *(Q.dtype, K.dtype, V.dtype, slots.dtype),
                *(Q.device, K.device, V.device, slots.device),
                log_G is not None and (log_G.shape, log_G.dtype, log_G.device),
                cu_seqlens is not None and (cu_seqlens.shape, cu_seqlens.dtype, cu_seqlens.device),
            )
        if key is None or key not in self._checked:
            self._check_tokens(Q, K, V, log_G, slots, cu_seqlens)
            if key is not None and len(self._checked) < _MOST_CHECKED:
                self._checked.add(key)
        if decoding_operators.want_gradients(Q, K, V, log_G):
            return _detached(Q, K, V, log_G)
        return Q, K, V, log_G

    def _check_tokens(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        log_G: Tensor | None,
        slots: Tensor,
        cu_seqlens: Tensor | None,
    ) -> None:
        """Raises TypeError or ValueError unless these are new tokens for the cache."""
        checks.check_tensor("Q", Q, "[n, t, hq, d]")
        self._check_kind("Q", Q, self.dtype)
        check_keys_values(Q, K, V, queries=Q.shape[1])
        for name, x, expected, layout in (
            ("K", K, (self.kv_heads, self.head_dim), "[n, t, h, d]"),
            ("V", V, (self.kv_heads, self.value_dim), "[n, t, h, dv]"),
        ):
            checks.check_shape(name, x, (*Q.shape[:2], *expected), layout, "the cache")
        if self.gating:
            checks.check_gate(log_G, Q, tuple(K.shape[:3]), "K")
            self._check_kind("log_G", log_G, self.pool.key_sum.dtype)
        elif log_G is not None:
            raise ValueError("log_G: expected None in a cache without gating, got a tensor")
        if cu_seqlens is not None:
            checks.check_cu_seqlens(cu_seqlens, Q)
        self.check_slots("slots", slots, Q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)

    def _check_kind(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as the cache, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device} as the cache, got {x.device}")

    def check_slots(self, name: str, slots: Any, n: int | None = None) -> None:
        """Raises TypeError or ValueError unless ``slots`` is an argument called ``name`` that says
        where rows are: int32 ``[n]``, of any n by default, on the cache's device."""
        self._check_indices(name, slots)
        if n is not None and len(slots) != n:
            raise ValueError(f"{name}: expected [{n}], one for each row, got {list(slots.shape)}")

    def _check_indices(self, name: str, x: Any, dtype: torch.dtype = torch.int32) -> None:
        kind = str(dtype).removeprefix("torch.")
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected an {kind} tensor [n], got {checks.describe(x)}")
        if x.dim() != 1:
            raise ValueError(f"{name}: expected [n], got {list(x.shape)}")
        self._check_kind(name, x, dtype)


def _detached(
    Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Without gradients, which the operators do not have, and refuse."""
    return Q.detach(), K.detach(), V.detach(), None if log_G is None else log_G.detach()


def _lay_out(
    slots: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None,
    window: int | None,
    max_tokens_per_step: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    gating: bool,
    deg: int,
) -> tuple[int, pool.Layout]:
    """The window and the layout of a cache with these arguments, or TypeError or ValueError."""
    checks.check_integer("slots", slots, 1)
    checks.check_integer("kv_heads", kv_heads, 1)
    rows = state_dim(head_dim, deg)  # raises for what no state can be built of
    value_dim = head_dim if value_dim is None else value_dim
    checks.check_integer("value_dim", value_dim, 1)
    checks.check_integer("max_tokens_per_step", max_tokens_per_step, 1)
    if dtype not in checks.DTYPES:
        accepted = ", ".join(map(str, checks.DTYPES))
        raise TypeError(f"dtype: expected one of {accepted}, got {dtype}")
    whole = checks.state_dtype(dtype)
    accepted_states = {torch.float32, whole} | (
        {torch.bfloat16} if dtype != torch.float64 else set()
    )
    if state_dtype not in accepted_states:
        accepted = " or ".join(sorted(map(str, accepted_states)))
        raise TypeError(f"state_dtype: expected {accepted} with {dtype}, got {state_dtype}")
    if not isinstance(gating, bool):
        raise TypeError(f"gating: expected a bool, got {checks.describe(gating)}")
    state_dtype = torch.bfloat16 if state_dtype == torch.bfloat16 else whole
    if window is None:
        window = max(
            _best_window(rows, head_dim, value_dim, dtype, state_dtype), max_tokens_per_step
        )
    checks.check_integer("window", window, 1)
    if window < max_tokens_per_step:
        raise ValueError(
            f"window: expected at least max_tokens_per_step = {max_tokens_per_step}, got {window}"
        )
    ring = window + max_tokens_per_step
    return window, pool.Layout(
        slots, kv_heads, head_dim, value_dim, ring, deg, gating, dtype, state_dtype
    )


def _best_window(
    rows: int, head_dim: int, value_dim: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> int:
    """The window W, a multiple of 16, with which a step reads and writes the fewest bytes.

    On average it reads W / 2 tokens from the ring, and 1 / W of a fold's: the state and its sum,
    read and written. Of up to 128 tokens, the kernels load each once for many rows of the state.
    """
    token = (head_dim + value_dim) * dtype.itemsize
    state = rows * value_dim * state_dtype.itemsize
    return min(max(16, 16 * round(math.sqrt(4 * state / token) / 16)), 128)
