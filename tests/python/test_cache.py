"""`RetentionCache` against the quadratic formula in float64 over the tokens that were accepted."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import io
import math
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import retention
from retention import RetentionCache
from retention.ops import pool
from retention.ops.cuda import decoding as cuda_decoding
from retention.ops.pytorch import decoding

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Dtypes of models and of their states.
FORMATS = [(F64, F64), (F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (F16, F32), (F16, BF16)]


@dataclass(frozen=True)
class Config:
    formats: tuple[torch.dtype, torch.dtype] = (F64, F64)
    d: int = 8
    dv: int = 4
    h: int = 2
    ratio: int = 1
    deg: int = 2
    gating: bool = True
    slots: int = 4
    window: int = 5
    most: int = 3
    device: str = "cpu"
    by_kernels: bool = False  # the steps

    def cache(self) -> RetentionCache:
        return RetentionCache(
            self.slots,
            self.h,
            self.d,
            self.dv,
            window=self.window,
            max_tokens_per_step=self.most,
            dtype=self.formats[0],
            state_dtype=self.formats[1],
            gating=self.gating,
            deg=self.deg,
            device=self.device,
        )

    def indices(self, *slots: int) -> Tensor:
        return indices(*slots).to(self.device)

    def tokens(self, seed: int, *lead: int) -> dict[str, Tensor | None]:
        """Q, K, V and log_G [*lead, heads, *], as the cache takes them, some with a reset."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*lead, *shape, generator=generator, dtype=F64).to(self.formats[0])

        Q, K, V = (
            normal(self.h * self.ratio, self.d),
            normal(self.h, self.d),
            normal(self.h, self.dv),
        )
        gates = -torch.rand(*lead, self.h, generator=generator, dtype=F64).square()
        gates[torch.rand(*lead, self.h, generator=generator) < 0.05] = -math.inf
        wide = F64 if self.formats[0] == F64 else F32
        tokens = {"Q": Q, "K": K, "V": V, "log_G": gates.to(wide) if self.gating else None}
        return {name: x if x is None else x.to(self.device) for name, x in tokens.items()}


def indices(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32)


# What a path's own arithmetic costs, on top of what formats do: sums of some dozen terms.
ARITHMETIC = {F64: 1e-12, F32: 1e-5, BF16: 1e-5, F16: 1e-5}


class Sequence:
    """The tokens that a slot has seen, in float64, and what they mean."""

    def __init__(self, config: Config):
        self.config = config
        self.k = torch.zeros(0, config.h, config.d, dtype=F64)
        self.v = torch.zeros(0, config.h, config.dv, dtype=F64)
        self.g = torch.zeros(0, config.h, dtype=F64)
        self.folds = 0
        self.in_ring = 0
        self.folded = 0  # counted as the slot's cursor does

    def __len__(self) -> int:
        return len(self.k)

    def append(self, K: Tensor, V: Tensor, log_G: Tensor | None) -> None:
        K, V, log_G = (None if x is None else x.double().cpu() for x in (K, V, log_G))
        self.k, self.v = torch.cat((self.k, K)), torch.cat((self.v, V))
        log_G = torch.zeros(K.shape[:2], dtype=F64) if log_G is None else log_G
        self.g = torch.cat((self.g, log_G))

    def drop(self, tokens: int) -> None:
        keep = len(self) - tokens
        self.k, self.v, self.g = self.k[:keep], self.v[:keep], self.g[:keep]
        self.in_ring -= tokens

    def step_folds(self, phase: int) -> None:
        """What a step does first, token by token: the oldest window, where it is complete."""
        for tokens in range(1, self.in_ring + 1):
            if (self.folded + tokens - phase) % self.config.window == 0:
                self.folded += tokens
                self.in_ring -= tokens
                self.folds += 1
                return

    def prefilled(self, tokens: int, keep: int) -> None:
        kept = min(tokens, keep)
        self.folded += self.in_ring + tokens - kept
        self.in_ring = kept
        self.folds += 1

    def decays(self, i: int) -> Tensor:
        """Of tokens 0 to i at token i: [i + 1, h]."""
        after = torch.cat((self.g[1 : i + 1], torch.zeros(1, self.config.h, dtype=F64)))
        return after.flip(0).cumsum(0).flip(0).exp()

    def output(self, q: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """For queries [hq, d] of token i: [hq, dv], and how far off it may be."""
        config = self.config
        q = q.double().cpu().view(config.h, config.ratio, config.d)
        k, v, decay = self.k[: i + 1], self.v[: i + 1], self.decays(i).T[:, None]
        w = torch.einsum("hrd,jhd->hrj", q, k) ** config.deg * decay
        z = w.sum(-1, keepdim=True)
        out = torch.einsum("hrj,jhv->hrv", w, v) / torch.where(z > 0, z, 1)
        # Roundings of a state are of this magnitude: its terms do not know what will cancel.
        weights = torch.einsum("hrd,jhd->hrj", q.abs(), k.abs()) ** config.deg * decay
        weights = weights / torch.where(z > 0, z, 1)
        terms = torch.einsum("hrj,jhv->hrv", weights, v.abs())
        dtype, state_dtype = config.formats
        eps = ARITHMETIC[dtype]
        if dtype.itemsize == 2:
            eps += 2**-9  # what a step reads of a state
        if state_dtype == BF16:
            eps += 2**-8 * self.folds
        allowed = eps * terms + torch.finfo(dtype).eps * out.abs()
        if config.by_kernels:  # they round phi of a query and of a key, and what a gate leaves
            allowed = allowed + 3 * 2**-9 * (terms + weights.sum(-1, keepdim=True) * out.abs())
        return out.flatten(0, 1), allowed.flatten(0, 1)

    def state(self) -> tuple[Tensor, Tensor]:
        """[h, D, dv] and [h, D], by the sum over all tokens."""
        phi = retention.expand(self.k, self.config.deg)
        if len(self):
            phi = phi * self.decays(len(self) - 1)[..., None]
        return torch.einsum("jhm,jhv->hmv", phi, self.v), phi.sum(0)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def snapshot(cache: RetentionCache) -> list[Tensor]:
    return [bits(x).to("cpu", copy=True) for x in cache.pool.remembered().values()]


def assert_same(cache: RetentionCache, before: list[Tensor], slots: list[int]) -> None:
    for now, then in zip(snapshot(cache), before, strict=True):
        assert torch.equal(now[slots], then[slots])


def scribble(cache: RetentionCache, slots: Tensor | None = None) -> None:
    """NaN, or what an integer has for it, in all memory of empty slots but their cursors."""
    slots = torch.arange(cache.slots, device=cache.device) if slots is None else slots.long()
    for x in cache.pool.contents():
        x[slots] = math.nan if x.is_floating_point() else -7


@contextlib.contextmanager
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits for how many rows a mask has."""
    with monkeypatch.context() as patches:
        patches.setattr(decoding, "_answers_at_once", lambda device: False)
        yield


# ---- anything, in any order ---------------------------------------------------------------------

CONFIGS = [
    Config(),
    Config(formats=(F64, F64), d=16, dv=3, ratio=3, h=1, gating=False, window=3),
    Config(formats=(F64, F64), deg=4, ratio=2, window=4, most=4),
    Config(formats=(F32, F32), d=16, dv=16, ratio=2, slots=7),
    Config(formats=(F32, BF16), gating=False),
    Config(formats=(BF16, F32), d=8, dv=5, ratio=2, most=1, window=1),
    Config(formats=(BF16, BF16), d=16, ratio=4, h=1),
    Config(formats=(F16, F32), ratio=2, gating=False, slots=2),
    Config(formats=(F16, BF16), deg=4),
]


class Anything(RuleBasedStateMachine):
    configs: Sequence[Config] = CONFIGS

    @initialize(data=st.data(), waits=st.booleans())
    def start(self, data: st.DataObject, waits: bool) -> None:
        config = data.draw(st.sampled_from(self.configs), label="config")
        self.config = config
        self.cache = config.cache()
        self.sequences = [Sequence(config) for _ in range(config.slots)]
        self.phases = [slot * config.window // config.slots for slot in range(config.slots)]
        self.patches = pytest.MonkeyPatch()
        if not waits:
            self.patches.setattr(decoding, "_answers_at_once", lambda device: False)
        scribble(self.cache)

    def teardown(self) -> None:
        if hasattr(self, "patches"):
            self.patches.undo()

    def draw_rows(self, data: st.DataObject) -> list[int]:
        """Slots, none twice, and padding."""
        slots = range(self.config.slots)
        rows = data.draw(st.lists(st.sampled_from(slots), min_size=1, unique=True), label="slots")
        padding = st.sampled_from([-1, -(2**31), self.config.slots, 2**31 - 1])
        for _ in range(data.draw(st.integers(0, 2), label="padding")):
            rows.insert(data.draw(st.integers(0, len(rows))), data.draw(padding))
        return rows

    def there(self, rows: list[int]) -> list[int]:
        return [slot for slot in rows if 0 <= slot < self.config.slots]

    def untouched(self, rows: list[int]) -> list[int]:
        return [slot for slot in range(self.config.slots) if slot not in rows]

    def run(self, data: st.DataObject, longest: int, keep: int | None) -> None:
        """A prefill, or a step where ``keep`` is None, packed or not; and what it gives."""
        rows = self.draw_rows(data)
        seed = data.draw(st.integers(0, 2**20), label="seed")
        before = snapshot(self.cache)
        if data.draw(st.booleans(), label="packed"):
            lengths = [data.draw(st.integers(0, longest), label="length") for _ in rows]
            behind = data.draw(st.integers(0, 2), label="behind")
            new = self.config.tokens(seed, 1, sum(lengths) + behind)
            bounds = self.config.indices(0, *lengths).cumsum(0, dtype=torch.int32)
        else:
            lengths = [data.draw(st.integers(0, longest), label="length")] * len(rows)
            behind, bounds = 0, None
            new = self.config.tokens(seed, len(rows), lengths[0])
        slots = self.config.indices(*rows)
        if keep is None:
            out = self.cache.step(**new, slots=slots, cu_seqlens=bounds)
        else:
            out = self.cache.prefill(**new, slots=slots, cu_seqlens=bounds, keep=keep)
        assert out.shape == (*new["Q"].shape[:3], self.config.dv)
        flat = {name: x if x is None else x.flatten(0, 1) for name, x in new.items()}
        out, start = out.flatten(0, 1).cpu(), 0
        for slot, length in zip(rows, lengths, strict=True):
            part = slice(start, start + length)
            start += length
            if slot not in self.there(rows):
                assert not out[part].any()
                continue
            sequence = self.sequences[slot]
            seen = len(sequence)
            if keep is None:
                sequence.step_folds(self.phases[slot])
                sequence.in_ring += length
            else:
                sequence.prefilled(length, keep)
            gates = None if flat["log_G"] is None else flat["log_G"][part]
            sequence.append(flat["K"][part], flat["V"][part], gates)
            for i in range(length):
                wanted, allowed = sequence.output(flat["Q"][part][i], seen + i)
                difference = (out[part][i].double() - wanted).abs()
                assert (difference <= allowed).all(), (slot, i, (difference / allowed).max())
        assert not out[start:].any()
        assert_same(self.cache, before, self.untouched(rows))

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.run(data, self.config.most, None)

    @rule(data=st.data(), keep=st.integers(0, 3))
    def prefill(self, data: st.DataObject, keep: int) -> None:
        self.run(data, 9, min(keep, self.config.window))

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        before = snapshot(self.cache)
        taken = [
            data.draw(st.integers(0, self.sequences[s].in_ring)) if s in self.there(rows) else 99
            for s in rows
        ]
        self.cache.rollback(self.config.indices(*rows), self.config.indices(*taken))
        for slot, tokens in zip(rows, taken, strict=True):
            if slot in self.there(rows):
                self.sequences[slot].drop(tokens)
        assert_same(self.cache, before, self.untouched(rows))

    @rule(data=st.data())
    def roll_back_too_far(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        before = snapshot(self.cache)
        most = max(self.sequences[slot].in_ring for slot in self.there(rows))
        with pytest.raises(ValueError, match=r"tokens: expected 0 to \d+, the tokens in the ring"):
            self.cache.rollback(self.config.indices(*rows), most + 1)
        assert_same(self.cache, before, [*range(self.config.slots)])

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        target = self.draw_rows(data)
        source = [data.draw(st.integers(-1, self.config.slots), label="source") for _ in target]
        before = snapshot(self.cache)
        self.cache.copy(self.config.indices(*source), self.config.indices(*target))
        old, phases = [copy.copy(x) for x in self.sequences], [*self.phases]
        changed = []
        for s, t in zip(source, target, strict=True):
            if self.there([s]) and self.there([t]):
                self.sequences[t], self.phases[t] = copy.copy(old[s]), phases[s]
                changed.append(t)
                for now, then in zip(snapshot(self.cache), before, strict=True):
                    assert torch.equal(now[t], then[s])
        assert_same(self.cache, before, self.untouched(changed))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        before = snapshot(self.cache)
        spread = [slot * self.config.window // self.config.slots for slot in rows]
        phase = data.draw(st.none() | st.integers(0, 9))
        phases = spread if phase is None else [phase + i for i in range(len(rows))]
        given = None if phase is None else self.config.indices(*phases)
        self.cache.reset(self.config.indices(*rows), given)
        for slot, phase in zip(rows, phases, strict=True):
            if slot in self.there(rows):
                self.sequences[slot] = Sequence(self.config)
                self.phases[slot] = phase
        assert_same(self.cache, before, self.untouched(rows))
        scribble(self.cache, self.config.indices(*self.there(rows)))

    @precondition(lambda self: self.config.formats[1] != BF16)
    @rule(data=st.data())
    def states_out_and_in(self, data: st.DataObject) -> None:
        """In the order of another cache's slots, and back."""
        rows = self.draw_rows(data)
        slots = self.config.indices(*rows)
        state = self.cache.state(slots)
        before = snapshot(self.cache)
        positions = [len(self.sequences[s]) if s in self.there(rows) else 5 for s in rows]
        self.cache.set_state(slots, *state, slots.new_tensor(positions, dtype=torch.int64))
        assert all(torch.equal(*x) for x in zip(self.cache.state(slots), state, strict=True))
        for slot in self.there(rows):
            sequence = self.sequences[slot]
            sequence.in_ring, sequence.folded = 0, len(sequence) or self.config.window
            sequence.folds += 1
        assert_same(self.cache, before, self.untouched(rows))

    @invariant()
    def cursors_and_states(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == [x.in_ring for x in self.sequences]
        assert self.cache.positions.tolist() == [len(x) for x in self.sequences]
        state, keys = self.cache.state(self.config.indices(*range(self.config.slots)))
        assert not self.cache.pool.arrivals.any()
        exact = [x.state() for x in self.sequences]
        eps = ARITHMETIC[self.config.formats[0]]
        for got, wanted in ((state, 0), (keys, 1)):
            for slot, x in enumerate(got):
                expected = exact[slot][wanted]
                bound = eps * (1 + expected.abs().max())
                v = self.sequences[slot].v
                terms = exact[slot][1].abs().max()
                if wanted == 0:
                    terms = terms * (v.abs().max() if len(v) else 0)
                if self.config.by_kernels:  # they round phi of a key, and what a gate leaves of it
                    bound = bound + 2**-7 * terms
                if wanted == 0 and self.config.formats[1] == BF16:
                    # No element is larger than the largest, whenever it is rounded.
                    bound = bound + 2**-7 * self.sequences[slot].folds * (1 + 4 * terms)
                assert (x.double().cpu() - expected).abs().max() <= bound


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


# ---- sequences that go on -----------------------------------------------------------------------


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_a_long_sequence(formats: tuple[torch.dtype, torch.dtype]):
    """A hundred folds, of which nothing is forgotten: planes lose nothing, and what a bfloat16
    state loses has no direction."""
    config = Config(formats, d=16, dv=8, ratio=2, gating=False, slots=1, window=4, most=4)
    tokens = config.tokens(0, 1, 400)
    wanted, state, keys = retention.reference(
        **{name: x if x is None else x.double() for name, x in tokens.items()},
        return_final_state=True,
    )
    cache, slots, outs = config.cache(), indices(0), []
    for i in range(0, 400, 4):
        part = {name: x if x is None else x[:, i : i + 4] for name, x in tokens.items()}
        outs.append(cache.step(**part, slots=slots))
    got, got_keys = (x.double() for x in cache.state(slots))
    exact = ARITHMETIC[formats[0]]
    assert (got_keys - keys).abs().max() <= exact * keys.abs().max()
    relative = (got - state).norm() / state.norm()
    if formats[1] != BF16:
        assert relative <= exact
    else:
        # A rounding at random is off by 2^-9 of the number or a little more, and of 100 those of
        # the second half count most: as often up as down, they add up to the root of their number.
        # With a direction, as towards 0, they would show along the state itself.
        assert 2**-9 < relative < 2**-8 * 50**0.5
        assert ((got - state) * state).sum().abs() < 2**-9 * state.square().sum()
    error = (torch.cat(outs, 1).double() - wanted).norm() / wanted.norm()
    # Of sixteen bits a step reads eight: where weights are small others cancel, see design.md.
    whole = formats[1] == formats[0] != BF16
    assert error <= (10 * exact if whole else 0.05)


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_prefill_in_pieces_is_the_final_state(formats: tuple[torch.dtype, torch.dtype]):
    config = Config(formats, d=16, ratio=2, slots=3, window=8)
    tokens = config.tokens(1, 2, 50)
    exact = {name: x.double() for name, x in tokens.items()}
    _, state, keys = retention.reference(**exact, return_final_state=True)
    cache, slots = config.cache(), indices(2, 0)
    for start, stop, keep in ((0, 20, 0), (20, 29, 5), (29, 50, 8)):
        part = {name: x[:, start:stop] for name, x in tokens.items()}
        cache.prefill(**part, slots=slots, keep=keep)
        assert cache.lengths.tolist() == [keep, 0, keep]
    got, got_keys = cache.state(slots)
    tolerance = 2**-7 if formats[1] == BF16 else ARITHMETIC[formats[0]]
    assert (got.double() - state).abs().max() <= tolerance * state.abs().max()
    assert (got_keys.double() - keys).abs().max() <= ARITHMETIC[formats[0]] * keys.abs().max()


def test_a_state_that_has_seen_no_tokens_is_read():
    config = Config(d=16, slots=2)
    source, cache = used(config), config.cache()
    slots = indices(1)
    state, keys = source.state(slots)
    cache.set_state(slots, state, keys, 0)
    tokens = config.tokens(7, 1, 3)
    wanted = retention.reference(**tokens, initial_state=state, sum_of_keys=keys)
    torch.testing.assert_close(cache.step(**tokens, slots=slots), wanted, rtol=1e-9, atol=1e-9)
    assert cache.positions.tolist() == [0, 3]


def test_phases_are_spread_and_windows_end_there():
    config = Config(slots=4, window=8, most=1)
    cache, folded = config.cache(), [[] for _ in range(4)]
    slots = torch.arange(4, dtype=torch.int32)
    for seen in range(40):
        lengths = cache.lengths.tolist()
        cache.step(**config.tokens(seen, 4, 1), slots=slots)
        for slot, (then, now) in enumerate(zip(lengths, cache.lengths.tolist(), strict=True)):
            if now != then + 1:
                folded[slot].append((seen, then + 1 - now))
    assert folded == [
        [(8, 8), (16, 8), (24, 8), (32, 8)],
        [(2, 2), (10, 8), (18, 8), (26, 8), (34, 8)],
        [(4, 4), (12, 8), (20, 8), (28, 8), (36, 8)],
        [(6, 6), (14, 8), (22, 8), (30, 8), (38, 8)],
    ]


def test_phases_may_be_given():
    config = Config(slots=3, window=8, most=1)
    cache = config.cache()
    slots = indices(0, 2)
    for phases, wanted in ((3, [3, 2, 3]), (11, [3, 2, 3]), (indices(4, 17), [4, 2, 1])):
        cache.reset(slots, phases)
        assert pool.unpack(cache.pool.cursors).phase.tolist() == wanted
    before = snapshot(cache)
    for wrong, kind, message in (
        (-1, ValueError, "phases: expected an integer of at least 0, got -1"),
        (1.5, TypeError, "phases: expected an integer, got float"),
        (indices(1), ValueError, r"phases: expected \[n\] = \[2\] to match slots, got \[1\]"),
        (indices(1, 2).long(), TypeError, "phases: expected torch.int32 as the cache"),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            cache.reset(slots, wrong)
        assert_same(cache, before, [0, 1, 2])


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0, 1), (0, -1, 2)])
@pytest.mark.parametrize("most", [1, 3])
def test_tokens_that_were_taken_back_leave_nothing(
    rows: tuple[int, ...], most: int, waits: bool, monkeypatch: pytest.MonkeyPatch
):
    """Infinities and NaN of theirs are still in the ring, where it is read as it lies."""
    config = Config(slots=3, window=4, most=most, ratio=2)
    with contextlib.nullcontext() if waits else as_on_a_device(monkeypatch):
        cache, other, slots = config.cache(), config.cache(), indices(*rows)
        scribble(cache)
        for i in range(9):
            bad = {n: x.fill_(math.nan) for n, x in config.tokens(i, 3, most).items()}
            bad["V"].fill_(math.inf)
            cache.step(**bad, slots=slots)
            cache.rollback(slots, most)
            # Fewer than were taken back: some places stay as they were.
            new = config.tokens(i, 3, 1)
            out, wanted = cache.step(**new, slots=slots), other.step(**new, slots=slots)
            assert out.isfinite().all()
            torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_values_that_are_no_numbers_are_seen():
    config = Config(slots=2)
    cache, slots = config.cache(), indices(0, 1)
    new = config.tokens(0, 2, 3)
    new["V"][1, 1, 0, 2] = math.nan
    finite = cache.step(**new, slots=slots).isfinite()
    assert not finite[1, :, 0, 2].any()
    finite[1, :, 0, 2] = True
    assert finite.all()


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_neighbours_do_not_change_a_bit(formats: tuple[torch.dtype, torch.dtype]):
    """A sequence in a batch of three, among others each time, in every place."""
    config = Config(formats, d=16, dv=8, ratio=2, slots=5)
    outcomes = []
    for place in range(3):
        cache = config.cache()
        scribble(cache)
        outs = []
        for i in range(30):
            mine = config.tokens(i, 1, 2)
            batch = config.tokens(1000 * place + i, 3, 2)
            for name, x in batch.items():
                x[place] = mine[name][0]
            rows = [[0, 3, 4], [1, -1, 0], [9, 4, 1]][place]
            rows[place] = 2
            take = cache.prefill if i % 7 == 0 else cache.step
            outs.append(take(**batch, slots=indices(*rows))[place])
        outcomes.append([bits(torch.cat(outs)), *(x[2] for x in snapshot(cache))])
    for other in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_nobody_waits_for_a_device(
    formats: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
):
    """Without asking how many rows there are, the same comes of it."""
    config = Config(formats, ratio=2)

    def outcome() -> tuple[list[Tensor], list[Tensor]]:
        cache, outs = config.cache(), []
        scribble(cache)
        for i in range(24):
            rows = indices(*[(3, -1, 0), (1, 2, 3), (-1, 7, -1)][i % 3])
            outs.append(cache.step(**config.tokens(i, 3, 1 + i % 3), slots=rows))
            if i == 10:
                cache.rollback(indices(3, -1), 1)
                cache.copy(indices(0, 1, 9), indices(1, -1, 2))
                cache.reset(indices(-1, 0))
        outs.append(cache.prefill(**config.tokens(99, 2, 7), slots=indices(-1, 1), keep=2))
        cache.set_state(indices(-1, 0), *cache.state(indices(0, 1)), 3)
        return [*outs, *cache.state(indices(0, 1, 2, 3))], snapshot(cache)

    wanted, pool_wanted = outcome()
    with as_on_a_device(monkeypatch):
        got, pool_got = outcome()
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    if formats == (F64, F64):
        return
    assert torch.equal(pool_got[-1], pool_wanted[-1])


def test_padding_alone_touches_nothing(monkeypatch: pytest.MonkeyPatch):
    config = Config((BF16, F32), ratio=2)
    with as_on_a_device(monkeypatch):
        cache = config.cache()
        scribble(cache)
        before = snapshot(cache)
        rows = indices(-1, 4, -7)
        assert not cache.step(**config.tokens(0, 3, 2), slots=rows).any()
        assert not cache.prefill(**config.tokens(0, 3, 9), slots=rows, keep=1).any()
        cache.copy(rows, indices(0, 1, 2))
        cache.copy(indices(0, 1, 2), rows)
        cache.rollback(rows, 3)
        cache.reset(rows)
        cache.set_state(rows, *cache.state(rows), 1)
        assert_same(cache, before, [0, 1, 2, 3])


# ---- the pool's layout, which is the kernels' ---------------------------------------------------

SPECIAL = [
    *(0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000),
    *(0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F80FFFF, 0x7F7F7FFF, 0x7F7F8000),
    *(0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF),
]


def test_padding_beside_a_ring_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch):
    """Of slot 0, in whose place padding is read."""
    config = Config(window=4, most=4)
    results = []
    for padding in ((), (-1, 4)):
        cache = config.cache()
        for length in (1, 4):  # no fold before the next step
            cache.step(**config.tokens(0, 1, length), slots=indices(0))
        slots = indices(1, *padding)
        tokens = {
            name: x.expand(len(slots), *x.shape[1:]) for name, x in config.tokens(1, 1, 4).items()
        }
        with as_on_a_device(monkeypatch):
            out = cache.step(**tokens, slots=slots)
        assert not out[1:].any()
        results.append(out[:1])
    assert torch.equal(*results)


def test_planes_of_all_special_values():
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    special = torch.tensor([sign | x for sign in (0, 0x80000000) for x in SPECIAL])
    x = torch.cat((special, some)).to(torch.int32).view(F32)
    high, low = pool.split(x)
    assert (high.dtype, low.dtype) == (BF16, torch.int16)
    number = ~x.isnan()
    assert torch.equal(pool.join(high, low)[number].view(torch.int32), x[number].view(torch.int32))
    # Rounded to the nearest bfloat16, ties away from 0.
    finite = number & x.isfinite() & high.isfinite()
    exponent = torch.frexp(x[finite].double()).exponent.clamp(min=-125)
    spacing = torch.ldexp(torch.ones_like(exponent, dtype=F64), exponent)
    assert ((high[finite].double() - x[finite]).abs() <= spacing * 2**-9).all()
    assert torch.equal(
        pool.split(torch.tensor([1.00390625]))[0], torch.tensor([1.0078125]).bfloat16()
    )
    assert (high[~number].view(torch.int16) == 0x7FC0).all()
    assert (low[~number] == 0).all()


def test_planes_in_a_pool_hold_what_was_set():
    config = Config((BF16, F32), h=1, slots=1)
    cache, slots = config.cache(), indices(0)
    state, keys = (torch.empty_like(x) for x in cache.state(slots))
    values = torch.tensor([sign | x for sign in (0, 1 << 31) for x in SPECIAL[:-3]])
    state.view(-1)[: len(values)] = values.to(torch.int32).view(F32)
    state.view(-1)[len(values) :] = torch.randn(state.numel() - len(values))
    cache.set_state(slots, state, torch.ones_like(keys), 1)
    # A ring without tokens decays by 1 and adds zeros: of -0 that makes 0.
    assert torch.equal(cache.state(slots)[0], state)


def test_random_bits_are_those_of_the_kernels():
    """decode_fold.hpp's random_bits, in Python's integers."""
    slots, folded, shape = [0, 3, 70_000], [0, 96, 2**33 + 5], (3, 2, 64, 5)

    def of(slot: int, place: int, seen: int) -> int:
        x = place * 0x9E3779B97F4A7C15 % 2**64 ^ (seen << 20) % 2**64 ^ (slot << 44) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        return ((x ^ x >> 27) * 0x94D049BB133111EB % 2**64) >> 32

    got = pool.random_bits(indices(*slots), torch.tensor(folded), torch.Size(shape)).flatten(1)
    for row, slot, seen in zip(got.tolist(), slots, folded, strict=True):
        expected = [of(slot, p - p % 2, seen) >> 16 * (p % 2) & 0xFFFF for p in range(len(row))]
        assert row == expected


def test_rounding_at_random():
    x = torch.tensor([1.0, 1.0 + 2**-10, -1.0 - 3 * 2**-10, math.inf, -math.inf, math.nan])
    random = torch.arange(2**16)[:, None].expand(-1, len(x))
    rounded = pool.round_at_random(x.expand(2**16, -1).contiguous(), random).double()
    # Every 16 bits once: the average of bfloat16 neighbours is the number itself.
    assert rounded[:, :3].mean(0).tolist() == x[:3].double().tolist()
    assert rounded[:, 1].unique().tolist() == [1, 1 + 2**-7]
    assert (rounded[:, 3] == math.inf).all()
    assert (rounded[:, 4] == -math.inf).all()
    assert rounded[:, 5].isnan().all()


def test_a_cursor_is_the_bytes_of_the_struct():
    config = Config(slots=3, window=6)
    cache = config.cache()
    cache.prefill(**config.tokens(0, 1, 11), slots=indices(1), keep=4)
    cache.step(**config.tokens(1, 1, 3), slots=indices(1))
    memory = cache.pool.cursors.numpy().tobytes()
    # start, length, phase, unused; folded, seen. The prompt left 4 tokens behind; of a window that
    # ends at 8 = 2 + 6 one was folded.
    assert struct.unpack("<iiiiqq", memory[32:64]) == (1, 6, 2, 0, 8, 14)
    assert struct.unpack("<iiiiqq", memory[64:]) == (0, 0, 4, 0, 0, 0)
    assert cache.pool._fields == (
        "high",
        "low",
        "key_sum",
        "keys",
        "values",
        "log_gates",
        "cursors",
        "arrivals",
    )


@pytest.mark.parametrize(
    ("formats", "low"), [((BF16, F32), True), ((F16, BF16), False), ((F32, F32), False)]
)
def test_shapes_and_bytes(formats: tuple[torch.dtype, torch.dtype], low: bool):
    options = {
        "window": 20,
        "max_tokens_per_step": 4,
        "dtype": formats[0],
        "state_dtype": formats[1],
    }
    cache = RetentionCache(3, 2, 16, 24, **options)
    state = F32 if formats[0] == F32 else BF16
    shapes = {
        name: (tuple(x.shape), x.dtype) for name, x in cache.pool._asdict().items() if x is not None
    }
    wanted = {
        "high": ((3, 2, 192, 24), state),
        "low": ((3, 2, 192, 24), torch.int16),
        "key_sum": ((3, 2, 192), F32),
        "keys": ((3, 2, 24, 16), formats[0]),
        "values": ((3, 2, 24, 24), formats[0]),
        "log_gates": ((3, 2, 24), F32),
        "cursors": ((3, 4), torch.int64),
        "arrivals": ((3, 3), torch.int32),
    }
    if not low:
        del wanted["low"]
    assert shapes == wanted
    held = sum(x.nbytes for x in cache.pool if x is not None)
    assert RetentionCache.bytes(3, 2, 16, 24, **options) == cache.nbytes == held
    assert "log_gates" not in RetentionCache(1, 1, 8, gating=False).state_dict()


@pytest.mark.parametrize(
    ("d", "dv", "state_dtype", "window"),
    [
        (32, 32, F32, 48),
        (64, 64, F32, 96),
        (128, 128, F32, 128),
        (128, 64, F32, 128),
        (64, 64, BF16, 64),
    ],
)
def test_default_window(d: int, dv: int, state_dtype: torch.dtype, window: int):
    """Near sqrt(8 D dv / (d + dv)), or sqrt(4 ..) with bfloat16 states, in multiples of 16, and at
    most 128."""
    cache = RetentionCache(1, 1, d, dv, state_dtype=state_dtype, device="meta")
    assert (cache.window, cache.pool.keys.shape[2]) == (window, window + 1)
    assert RetentionCache(1, 1, d, dv, max_tokens_per_step=500, device="meta").window == 500


# ---- out and in again ---------------------------------------------------------------------------


def used(config: Config) -> RetentionCache:
    cache = config.cache()
    slots = indices(*range(config.slots))
    cache.prefill(**config.tokens(0, config.slots, 13), slots=slots, keep=1)
    cache.step(**config.tokens(1, config.slots, 1), slots=slots)
    return cache


def through_safetensors(cache: RetentionCache) -> RetentionCache:
    other = used(Config((BF16, F32)))
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(cache.state_dict())))
    return other


def through_torch(cache: RetentionCache) -> RetentionCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
        through_safetensors,
        through_torch,
    ],
    ids=["deepcopy", "pickle", "safetensors", "torch"],
)
def test_a_cache_that_was_saved_goes_on(way: Any):
    config = Config((BF16, F32))
    cache = used(config)
    other = way(cache)
    assert repr(other) == repr(cache)
    slots = indices(2, 0)
    for i in range(9):
        tokens = config.tokens(i, 2, 2)
        assert torch.equal(other.step(**tokens, slots=slots), cache.step(**tokens, slots=slots))
    assert_same(other, snapshot(cache), [0, 1, 2, 3])
    cache.reset()
    assert other.positions.tolist() != cache.positions.tolist()


@pytest.mark.parametrize("formats", FORMATS)
def test_selected_slots_go_on_as_the_originals(formats: tuple[torch.dtype, torch.dtype]):
    """Also where one is selected twice: each goes its own way."""
    config = Config(formats, slots=3)
    cache, slots = config.cache(), indices(0, 1, 2)
    cache.prefill(**config.tokens(0, 3, 9), slots=slots, keep=4)
    cache.step(**config.tokens(1, 2, 1), slots=slots[:2])
    source = indices(2, 0, 0, 1)
    chosen = cache.select(source)
    assert chosen.slots == 4
    assert chosen.nbytes == Config(formats, slots=4).cache().nbytes
    assert torch.equal(chosen.positions, torch.tensor([9, 10, 10, 10]))
    for step in range(2, 9):  # a window of 5 ends among them
        new = config.tokens(step, 4, 2)
        # The originals take what the copies take, but for the one that is there twice.
        got = chosen.step(**new, slots=indices(0, 1, 2, 3))
        rest = {name: x[[0, 1, 3]] for name, x in new.items()}
        wanted = cache.step(**rest, slots=indices(2, 0, 1))
        if formats[1] == BF16:
            # States are rounded at random by the slot's number.
            torch.testing.assert_close(got[[0, 1, 3]], wanted, rtol=0.1, atol=0.1)
        else:
            assert torch.equal(got[[0, 1, 3]], wanted)


def test_slots_whose_places_need_more_than_32_bits(monkeypatch: pytest.MonkeyPatch):
    """As vllm-project/vllm#35275 had them: the last slot's state begins beyond 2^31 elements."""
    zeros = torch.zeros

    def lazy(shape: tuple[int, ...], **options: Any) -> Tensor:
        # Memory that nobody writes to is not there, so few of these gigabytes are.
        return (torch.empty if math.prod(shape) > 2**30 else zeros)(shape, **options)

    config = Config((BF16, BF16), d=128, dv=128, h=8, slots=260, window=8, most=1)
    small = dataclasses.replace(config, slots=2).cache()
    monkeypatch.setattr(pool.torch, "zeros", lazy)
    large = config.cache()
    assert large.pool.high[-1].storage_offset() > 2**31
    for seed in range(12):  # a window of 8 goes into the state
        tokens = config.tokens(seed, 1, 1)
        got = large.step(**tokens, slots=indices(config.slots - 1))
        wanted = small.step(**tokens, slots=indices(1))
        # bfloat16, and windows that end at different tokens.
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert large.pool.high[-1].abs().max() > 0
    assert large.positions.tolist() == [0] * (config.slots - 1) + [12]


def test_slots_to_select_that_are_not_there():
    cache = Config().cache()
    for wrong, message in ((indices(0, 4), "0 to 3, got 4"), (indices(-1), "got -1")):
        with pytest.raises(ValueError, match=message):
            cache.select(wrong)
    with pytest.raises(ValueError, match="slots"):
        cache.select(indices())


def test_a_cache_moves_to_another_device_with_all_it_has():
    config = Config()
    cache = config.cache()
    tokens, slots = config.tokens(0, 4, 3), config.indices(0, 1, 2, 3)
    cache.step(**tokens, slots=slots)
    before = snapshot(cache)
    assert cache.to("cpu") is cache
    for got, wanted in zip(snapshot(cache), before, strict=True):
        assert torch.equal(got, wanted)
    assert cache.to("meta").device.type == "meta"
    assert {x.device.type for x in cache.pool if x is not None} == {"meta"}
    with pytest.raises(ValueError, match="expected device meta"):
        cache.step(**tokens, slots=slots)


def test_state_dicts_that_do_not_fit():
    cache = used(Config((BF16, F32)))
    own = cache.state_dict()
    before = snapshot(cache)
    for other, kind, message in (
        (Config((BF16, BF16)), ValueError, r"state_dict: expected .*'low'.*, got "),
        (Config((F16, F32)), TypeError, r"keys: expected torch.bfloat16, got torch.float16"),
        (Config((BF16, F32), slots=3), ValueError, r"high: expected shape = \[4, .*got \[3, "),
        (
            Config((BF16, F32), window=6, most=2),
            ValueError,
            r"configuration: expected .* = \[5, 3,.*got \[6, 2",
        ),
        (Config((BF16, F32), gating=False), ValueError, r"state_dict: expected .*'log_gates'"),
    ):
        with pytest.raises(kind, match=message):
            cache.load_state_dict(used(other).state_dict())
    with pytest.raises(TypeError, match=r"cursors: expected a tensor, got list"):
        cache.load_state_dict({**own, "cursors": [0]})
    assert_same(cache, before, [0, 1, 2, 3])


# ---- as operators -------------------------------------------------------------------------------


def test_opcheck():
    config = Config((BF16, F32), ratio=2)
    tensors = used(config).pool
    slots, bounds = indices(2, -1, 0), indices(0, 2, 2, 5)
    rows, packed = ([*config.tokens(5, *lead).values()] for lead in ((3, 2), (1, 6)))
    operators = torch.ops.retention
    for operator, arguments in (
        (operators.decode_fold, (slots, config.window, 0, 2)),
        (operators.decode_step, (*rows, slots, None, config.most, config.window, 2, 0)),
        (operators.decode_step, (*packed, slots, bounds, config.most, config.window, 2, 0)),
        (operators.decode_prefill, (*rows, slots, None, 1, 2)),
        (operators.decode_prefill, (*packed, slots, bounds, 1, 2)),
        (operators.decode_copy, (slots, slots.flip(0))),
        (operators.decode_reset, (slots, torch.ones_like(slots))),
        (operators.decode_rollback, (slots, torch.ones_like(slots))),
    ):
        torch.library.opcheck(operator.default, (*tensors, *arguments))


def test_compiles_whole():
    config = Config((BF16, F32), ratio=2)
    one, other = used(config), used(config)
    slots = indices(2, -1, 0)

    def run(cache: RetentionCache, first: dict, second: dict) -> Tensor:
        out = cache.step(**first, slots=slots) + 1
        cache.rollback(slots, 1)
        cache.copy(slots, slots.flip(0))
        return cache.prefill(**second, slots=slots, keep=1) + out.sum() + cache.positions.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for i in range(3):
        arguments = config.tokens(i, 3, 2), config.tokens(i + 9, 3, 6)
        assert torch.equal(compiled(one, *arguments), run(other, *arguments))
        assert_same(one, snapshot(other), [0, 1, 2, 3])


def test_autocast_and_inference_mode():
    config = Config((BF16, F32))
    cache, other = config.cache(), config.cache()
    tokens = config.tokens(0, 4, 2)
    wide = {name: x.float().requires_grad_() for name, x in tokens.items()}
    slots = indices(0, 1, 2, 3)
    for i in range(8):
        with torch.inference_mode(i % 2 == 0), torch.autocast("cpu", dtype=BF16):
            out = cache.step(**wide, slots=slots)
            assert not out.requires_grad
        assert torch.equal(out, other.step(**tokens, slots=slots))
    assert_same(cache, snapshot(other), [0, 1, 2, 3])


def test_operators_refuse_gradients():
    config = Config()
    cache, slots = config.cache(), indices(0, 1)
    tokens = config.tokens(0, 2, 1)
    before = snapshot(cache)
    operators = torch.ops.retention
    calls = {
        "decode_step": (None, config.most, config.window, config.deg, 0),
        "decode_prefill": (None, 0, config.deg),
    }
    for wanted in tokens:
        given = {n: x.clone().requires_grad_(n == wanted) for n, x in tokens.items()}
        for name, rest in calls.items():
            arguments = (*cache.pool, *given.values(), slots, *rest)
            message = f"^{wanted}: expected .* requires no gradient, since {name} has none"
            with pytest.raises(RuntimeError, match=message):
                getattr(operators, name)(*arguments)
            assert_same(cache, before, [0, 1, 2, 3])
            with torch.no_grad():
                getattr(operators, name)(*arguments)
            cache.load_state_dict(config.cache().state_dict())
        assert not cache.step(**given, slots=slots).requires_grad
        cache.load_state_dict(config.cache().state_dict())


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"slots": 0}, ValueError, r"slots: expected an integer of at least 1, got 0"),
        ({"slots": 1.0}, TypeError, r"slots: expected an integer, got float"),
        ({"kv_heads": 0}, ValueError, r"kv_heads: .*at least 1, got 0"),
        ({"head_dim": 12}, ValueError, r"head_dim: .*multiple of 8, got 12"),
        ({"value_dim": 0}, ValueError, r"value_dim: .*at least 1, got 0"),
        ({"window": 0}, ValueError, r"window: .*at least 1, got 0"),
        (
            {"window": 3, "max_tokens_per_step": 4},
            ValueError,
            r"window: .*max_tokens_per_step = 4, got 3",
        ),
        ({"max_tokens_per_step": 0}, ValueError, r"max_tokens_per_step: .*at least 1, got 0"),
        ({"dtype": torch.int8}, TypeError, r"dtype: expected one of .*float16, got torch.int8"),
        (
            {"state_dtype": F16},
            TypeError,
            r"state_dtype: expected torch.bfloat16 or torch.float32 with torch.bfloat16",
        ),
        (
            {"dtype": F64, "state_dtype": BF16},
            TypeError,
            r"state_dtype: expected .*float64, got torch.bfloat16",
        ),
        ({"gating": 1}, TypeError, r"gating: expected a bool, got int"),
        ({"deg": 3}, ValueError, r"deg: .*even.*got 3"),
        ({"slices": 0}, ValueError, r"slices: .*at least 1, got 0"),
        ({"slices": 2.0}, TypeError, r"slices: expected an integer, got float"),
    ],
)
def test_wrong_sizes(arguments: dict, kind: type[Exception], message: str):
    given = {"slots": 2, "kv_heads": 1, "head_dim": 8, **arguments}
    for make in (RetentionCache, RetentionCache.bytes):
        with pytest.raises(kind, match=f"^{message}"):
            make(**given)


@pytest.mark.parametrize("take", ["step", "prefill"])
def test_wrong_tokens(take: str):
    config = Config((BF16, F32), ratio=2)
    cache = used(config)
    before = snapshot(cache)
    good = {**config.tokens(0, 2, 3), "slots": indices(0, 1)}
    long, wide = config.tokens(0, 2, 4), config.tokens(0, 1, 6)
    for wrong, kind, message in (
        (
            {"Q": good["Q"].float()},
            TypeError,
            r"Q: expected torch.bfloat16 as the cache, got torch.float32",
        ),
        ({"Q": good["Q"][0]}, ValueError, r"Q: expected \[n, t, hq, d\], got \[3, 4, 8\]"),
        ({"Q": [1]}, TypeError, r"Q: expected a tensor \[n, t, hq, d\], got list"),
        (
            {"Q": good["Q"][:, :, :3]},
            ValueError,
            r"Q: expected a number of heads that is a multiple of K's 2, got 3",
        ),
        ({"K": good["K"][:, :2]}, ValueError, r"K: expected .* to match Q, got"),
        (
            {"K": good["K"][:, :, :1], "V": good["V"][:, :, :1], "log_G": good["log_G"][:, :, :1]},
            ValueError,
            r"K: expected \[n, t, h, d\] = \[2, 3, 2, 8\] to match the cache, got \[2, 3, 1, 8\]",
        ),
        (
            {"V": good["V"][..., :3]},
            ValueError,
            r"V: expected \[n, t, h, dv\] = \[2, 3, 2, 4\] to match the cache",
        ),
        ({"log_G": None}, TypeError, r"log_G: expected a tensor \[b, t, h\], got NoneType"),
        ({"log_G": good["log_G"].double()}, TypeError, r"log_G: expected torch.float32"),
        ({"slots": indices(0)}, ValueError, r"slots: expected \[2\], one for each row, got \[1\]"),
        (
            {"slots": indices(0, 1).long()},
            TypeError,
            r"slots: expected torch.int32 as the cache, got torch.int64",
        ),
        ({"slots": [0, 1]}, TypeError, r"slots: expected an int32 tensor \[n\], got list"),
        (
            {"slots": indices(1, 1)},
            ValueError,
            r"slots: expected each slot at most once, got 1 twice",
        ),
        (
            {"slots": indices(0, 1).to("meta")},
            ValueError,
            r"slots: expected device cpu as the cache, got meta",
        ),
        (
            {"cu_seqlens": indices(0, 2, 3)},
            ValueError,
            r"Q: expected a batch of 1 with cu_seqlens, got 2",
        ),
        (
            {**wide, "cu_seqlens": indices(0, 3)},
            ValueError,
            r"slots: expected \[1\], one for each row, got \[2\]",
        ),
        (
            {**wide, "cu_seqlens": indices(0, 3, 2)},
            ValueError,
            r"cu_seqlens: expected values that never decrease",
        ),
        (
            {**wide, "cu_seqlens": indices(0, 3, 7)},
            ValueError,
            r"cu_seqlens: expected to end at t = 6 or before, got 7",
        ),
    ):
        with pytest.raises(kind, match=message):
            getattr(cache, take)(**{**good, **wrong})
    with pytest.raises(
        ValueError, match=r"Q: expected at most max_tokens_per_step = 3 tokens, got 4"
    ):
        cache.step(**long, slots=indices(0, 1))
    with pytest.raises(
        ValueError, match=r"cu_seqlens: .*at most max_tokens_per_step = 3 tokens, got one of 4"
    ):
        cache.step(**wide, slots=indices(0, 1), cu_seqlens=indices(0, 4, 6))
    with pytest.raises(ValueError, match=r"keep: expected at most the window of 5, got 6"):
        cache.prefill(**good, keep=6)
    with pytest.raises(ValueError, match=r"keep: expected an integer of at least 0, got -1"):
        cache.prefill(**good, keep=-1)
    plain = Config((BF16, F32), gating=False, ratio=2).cache()
    with pytest.raises(
        ValueError, match=r"log_G: expected None in a cache without gating, got a tensor"
    ):
        getattr(plain, take)(**good)
    assert_same(cache, before, [0, 1, 2, 3])


def test_wrong_slots():
    cache = used(Config((BF16, F32)))
    before = snapshot(cache)
    two = indices(0, 1)
    state, keys = cache.state(two)
    for call, kind, message in (
        (
            lambda: cache.copy(two, indices(2, 2)),
            ValueError,
            r"target: expected each slot at most once, got 2 twice",
        ),
        (
            lambda: cache.copy(two, indices(2)),
            ValueError,
            r"target: expected \[2\], one for each row, got \[1\]",
        ),
        (lambda: cache.copy(two.long(), two), TypeError, r"source: expected torch.int32"),
        (lambda: cache.reset(0), TypeError, r"slots: expected an int32 tensor \[n\], got int"),
        (lambda: cache.state(two[None]), ValueError, r"slots: expected \[n\], got \[1, 2\]"),
        (
            lambda: cache.rollback(two, 3),
            ValueError,
            r"tokens: expected 0 to 2, the tokens in the ring of slot 0, got 3",
        ),
        (
            lambda: cache.rollback(two, -1),
            ValueError,
            r"tokens: expected an integer of at least 0, got -1",
        ),
        (
            lambda: cache.rollback(two, indices(1, -1)),
            ValueError,
            r"tokens: expected 0 to \d, .* slot 1, got -1",
        ),
        (
            lambda: cache.rollback(two, indices(1)),
            ValueError,
            r"tokens: expected \[n\] = \[2\] to match slots",
        ),
        (
            lambda: cache.rollback(indices(1, 1), 1),
            ValueError,
            r"slots: expected each slot at most once",
        ),
        (lambda: cache.rollback(two, 1.0), TypeError, r"tokens: expected an integer, got float"),
        (
            lambda: cache.set_state(two, state[:1], keys, 1),
            ValueError,
            r"state: expected \[n, h, D, dv\] = \[2, 2, 64, 4\]",
        ),
        (
            lambda: cache.set_state(two, state, keys.double(), 1),
            TypeError,
            r"sum_of_keys: expected torch.float32",
        ),
        (
            lambda: cache.set_state(two, state, keys, two),
            TypeError,
            r"positions: expected torch.int64 as the cache, got torch.int32",
        ),
        (
            lambda: cache.set_state(two, state, keys, -1),
            ValueError,
            r"positions: .*at least 0, got -1",
        ),
        (
            lambda: cache.set_state(indices(1, 1), state, keys, 1),
            ValueError,
            r"slots: expected each slot at most once",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert_same(cache, before, [0, 1, 2, 3])


def test_plans_know_pools_by_their_tensors():
    """A plan is for the strides of a pool, whatever was at its place in memory before."""
    config = Config((BF16, F32))
    one, other = config.cache(), config.cache()

    def number(p: pool.Pool) -> int:
        return cuda_decoding._of_pool(tuple(p))[0]

    kept = len(cuda_decoding._known)
    assert number(one.pool) == number(one.pool) == number(other.pool)
    assert len(cuda_decoding._known) == kept + 2
    wider = one.pool._replace(keys=one.pool.keys.new_zeros(4, 2, 9, 8)[:, :, :8])
    assert wider.keys.shape == one.pool.keys.shape
    assert number(wider) != number(one.pool)
    del wider, other
    gc.collect()
    assert len(cuda_decoding._known) == kept + 1
