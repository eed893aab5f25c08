"""The memory of many sequences that are decoded: slots of a pool, laid out as the kernels have it.

The Python mirror of ``include/retention/kernel/decode_pool.hpp``. Per slot and key head there are
the state, into which old tokens were folded, and a ring of the recent ones, which are read one by
one. Under a model of 16 bits a float32 state is two planes: ``high``, its bits rounded to their
upper half, which is a bfloat16, and ``low``, the bits less those of the high plane. A step reads
the high plane alone; a fold reads and writes both, and loses nothing. A state of the high plane
alone is rounded at random when it is written, without bias. Under models of float32 and float64
the state is whole, in their dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retention.ops import checks
from retention.ops.symmetric_power import state_dim


class Pool(NamedTuple):
    """The tensors of a pool. What is not within a slot's ring or state may hold anything."""

    high: Tensor  # [slots, h, D, dv], bfloat16: the high plane; float32 or float64: the whole state
    low: Tensor | None  # likewise, int16; None where `high` is all there is
    key_sum: Tensor  # [slots, h, D], float32 or float64
    keys: Tensor  # [slots, h, ring, d], in the model's dtype
    values: Tensor  # [slots, h, ring, dv], likewise
    log_gates: Tensor | None  # [slots, h, ring], as key_sum; None without gates
    cursors: Tensor  # [slots, 4] int64, of which each is the 32 bytes of a C++ `Cursor`
    # [slots, h + 1] int32, zeros before and after every call: blocks of a step count each other
    # there. Nothing of a slot's is in them, and calls at the same time cannot share them.
    arrivals: Tensor

    def remembered(self) -> dict[str, Tensor]:
        """All that there is of slots, by name: the contents, then the cursors."""
        tensors = self._asdict()
        del tensors["arrivals"]
        return {name: x for name, x in tensors.items() if x is not None}

    def contents(self) -> list[Tensor]:
        """What slots hold, without their cursors."""
        return list(self.remembered().values())[:-1]


CURSOR_INTEGERS = 4  # of 64 bits
# Which of them is what; the first has the start and, in its upper half, the length.
START_AND_LENGTH, FOLDED, SEEN = 0, 2, 3


class Cursor(NamedTuple):
    """Where slots are, by field; each [n]."""

    start: Tensor  # int32, the place of the ring's oldest token
    length: Tensor  # int32, tokens in the ring
    phase: Tensor  # int32: windows end where `folded` is this one, modulo the window
    folded: Tensor  # int64, tokens in the state; with none it is empty, whatever its memory holds
    seen: Tensor  # int64, tokens in all: folded + length, but for states from elsewhere


def unpack(cursors: Tensor) -> Cursor:
    """Rows of :attr:`Pool.cursors`, [n, 4], as views."""
    start, length, phase, *_ = cursors.view(torch.int32).unbind(1)
    _, _, folded, seen = cursors.unbind(1)
    return Cursor(start, length, phase, folded, seen)


def in_integers(cursors: Tensor) -> list[tuple[int, int, int, int, int]]:
    """The fields of each row, in the order of :class:`Cursor`. A device has to be waited for."""
    return [
        (first & 0xFFFFFFFF, first >> 32, phase & 0xFFFFFFFF, folded, seen)
        for first, phase, folded, seen in cursors.tolist()
    ]


def pack(cursor: Cursor) -> Tensor:
    """The inverse of :func:`unpack`: int64 [n, 4]."""
    first = cursor.start + (cursor.length.long() << 32)
    return torch.stack((first, cursor.phase.long(), cursor.folded, cursor.seen), dim=1)


@dataclass(frozen=True)
class Layout:
    """The sizes that decide a pool's tensors."""

    slots: int
    kv_heads: int
    head_dim: int
    value_dim: int
    ring: int  # tokens it can hold
    deg: int
    gating: bool
    dtype: torch.dtype  # of the model: keys and values
    state_dtype: torch.dtype

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that there is, by its name in :class:`Pool`."""
        wide = checks.state_dtype(self.dtype)
        rows = (self.slots, self.kv_heads, state_dim(self.head_dim, self.deg))
        ring = (self.slots, self.kv_heads, self.ring)
        whole = self.state_dtype == self.dtype and self.state_dtype != torch.bfloat16
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "high": ((*rows, self.value_dim), wide if whole else torch.bfloat16)
        }
        if not whole and self.state_dtype != torch.bfloat16:
            tensors["low"] = ((*rows, self.value_dim), torch.int16)
        tensors["key_sum"] = (rows, wide)
        tensors["keys"] = ((*ring, self.head_dim), self.dtype)
        tensors["values"] = ((*ring, self.value_dim), self.dtype)
        if self.gating:
            tensors["log_gates"] = (ring, wide)
        tensors["cursors"] = ((self.slots, CURSOR_INTEGERS), torch.int64)
        tensors["arrivals"] = ((self.slots, self.kv_heads + 1), torch.int32)
        return tensors

    @classmethod
    def of(cls, p: Pool, deg: int) -> Layout:
        """That of these tensors, where they are a pool's."""
        slots, h, ring, d = p.keys.shape
        state_dtype = p.high.dtype if p.low is None else torch.float32
        gating = p.log_gates is not None
        dv = p.high.shape[3]
        return cls(slots, h, d, dv, ring, deg, gating, p.keys.dtype, state_dtype)

    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    def allocate(self, device: torch.device | str | None) -> Pool:
        """A pool of zeros: every slot is empty."""
        # Tensors made in inference mode could never be written to outside of it.
        with torch.inference_mode(False):
            tensors = {
                name: torch.zeros(shape, dtype=dtype, device=device)
                for name, (shape, dtype) in self.tensors().items()
            }
        return Pool(**{**dict.fromkeys(Pool._fields), **tensors})


# ---- a state's two planes -----------------------------------------------------------------------


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers of two planes."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low
    return bits.view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 numbers as two planes: the bits rounded to their upper half, ties up, and what that
    left. NaN is (NaN, 0): rounding would make a number of some."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    nan = x.isnan()
    high, low = high.masked_fill(nan, 0x7FC0), low.masked_fill(nan, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def round_at_random(x: Tensor, random: Tensor) -> Tensor:
    """float32 numbers as bfloat16, rounded away from 0 with the probability of what is cut off, by
    ``random``, integers of 16 bits. Infinities and NaN stay."""
    rounded = ((x.view(torch.int32) + random.to(torch.int32)) >> 16).to(torch.int16)
    return torch.where(x.isfinite(), rounded.view(torch.bfloat16), split(x)[0])


def random_bits(slots: Tensor, folded: Tensor, shape: torch.Size) -> Tensor:
    """16 random bits for each element of states [n, h, D, dv]: int64 of that shape.

    A function of the slot, [n], the tokens folded before, [n], and the element's place in its slot,
    so that runs repeat. Elements share a number of 32 bits with a neighbour.
    """
    place = torch.arange(math.prod(shape[1:]), device=slots.device)
    slots, folded = slots.long()[:, None], folded[:, None]
    x = (place & ~1) * _signed(0x9E3779B97F4A7C15) ^ folded << 20 ^ slots << 44
    # The finaliser of SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number
    # Generators, 2014), in integers with a sign.
    x = (x ^ _shifted_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted_right(x, 27)) * _signed(0x94D049BB133111EB)
    return (_shifted_right(x, 32) >> 16 * (place & 1) & 0xFFFF).view(shape)


def _signed(x: int) -> int:
    return x - 2**64


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """As of integers without a sign."""
    return x >> bits & (1 << 64 - bits) - 1
