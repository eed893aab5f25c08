"""From which length on chunks are faster than the quadratic form, and are taken."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from .problem import Problem

Row = dict[str, Any]

PASSES = ("fwd", "bwd")
FORMS = ("quadratic", "chunks")
# Of the length up to which the library takes the quadratic form.
_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
_TOKENS = 64  # lengths are multiples of
_LONGEST = 2**20


class Heads(NamedTuple):
    """Of a call of any length."""

    b: int
    hq: int
    h: int
    d: int

    def of(self, p: Problem, t: int, chunk: int | None) -> Problem:
        """A problem of this shape, and otherwise like ``p``."""
        return dataclasses.replace(p, **self._asdict(), t=t, chunk=chunk)


PRESETS = {
    "cuda": (
        Heads(16, 16, 16, 32),
        Heads(16, 16, 16, 64),
        Heads(4, 32, 8, 64),
        Heads(4, 8, 8, 128),
        Heads(4, 32, 8, 128),
    ),
    "cpu": (Heads(1, 4, 4, 32), Heads(1, 4, 4, 64), Heads(1, 8, 2, 64)),
}
QUICK = (Heads(1, 2, 2, 8),)

COLUMNS = {
    "forms": {
        "pass": "pass",
        "shape": "shape",
        "t": "tokens",
        "quadratic": "quadratic, ms",
        "chunks": "chunks, ms",
        "speed-up": "quadratic / chunks",
        "chunk": "a chunk",
        "note": "",
    }
}


class Choice(NamedTuple):
    """The library's."""

    until: int  # tokens: the longest sequence in the quadratic form
    chunk: int  # tokens of a chunk of longer ones

    @classmethod
    def of(cls, chunk_of: Callable[[int], int]) -> Choice:
        """What ``chunk_of`` a length implies: as many as there are, up to some length."""
        until, beyond = 1, _LONGEST
        while beyond - until > 1:
            t = (until + beyond) // 2
            until, beyond = (t, beyond) if chunk_of(t) >= t else (until, t)
        return cls(until, chunk_of(_LONGEST))

    def lengths(self) -> list[int]:
        """Some around the one that was chosen, in which there are chunks."""
        around = (round(self.until * x / _TOKENS) * _TOKENS for x in _FACTORS)
        return sorted({max(t, self.chunk + _TOKENS) for t in around})


def shape_of(row: Row) -> str:
    return f"b{row['b']} hq{row['hq']} h{row['h']} d{row['d']}"


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["mode"] == "forms":
            groups.setdefault((row["pass"], shape_of(row)), []).append(row)
    return groups


def lines(rows: Iterable[Row]) -> Iterator[Row]:
    """One of each pass, shape and length."""
    for (pass_, shape), group in _groups(rows).items():
        for t in sorted({row["t"] for row in group}):
            own = [row for row in group if row["t"] == t]
            line: Row = {"pass": pass_, "shape": shape, "t": t}
            line |= {row["form"]: row["ms"] for row in own if "ms" in row}
            line["chunk"] = max(row["chunk"] for row in own if row["form"] == "chunks")
            # Gradients of few tokens may seem to take no time.
            if all(line.get(form, 0) > 0 for form in FORMS):
                line["speed-up"] = line["quadratic"] / line["chunks"]
            failed = [f"{row['form']}: {row['failed']}" for row in own if "failed" in row]
            yield line | {"note": "; ".join(failed)}


def texts(rows: list[Row]) -> Iterator[str]:
    """For each pass and shape: from where on chunks are faster, and are taken."""
    found = list(lines(rows))
    for (pass_, shape), group in _groups(rows).items():
        ratios = [
            (line["t"], math.log(line["speed-up"]))
            for line in found
            if (line["pass"], line["shape"]) == (pass_, shape) and "speed-up" in line
        ]
        if len(ratios) < 2:
            continue
        faster = meeting(ratios)
        if faster is not None:
            where = f"from about {faster:,.0f} tokens"
        else:
            where = "everywhere" if ratios[0][1] > 0 else f"nowhere up to {ratios[-1][0]:,} tokens"
        taken = f"taken from {group[0]['until'] + 1:,}"
        yield f"forms, {pass_}, {shape}: chunks are faster {where}; {taken}"


def meeting(ratios: list[tuple[int, float]]) -> float | None:
    """Between which of these lengths a logarithm becomes positive, on a straight line of
    logarithms; None where none does."""
    for (t, before), (u, after) in itertools.pairwise(ratios):
        if before <= 0 < after:
            return t * (u / t) ** (before / (before - after))
    return None
