"""Calls of many shapes beside the fastest attention, one line each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from .problem import Problem

Row = dict[str, Any]

PASSES = ("fwd", "fwd+bwd")


class Shape(NamedTuple):
    """Of a call, with chunks as the library chooses them."""

    b: int
    t: int
    hq: int
    h: int
    d: int

    def of(self, p: Problem) -> Problem:
        """A problem of this shape, and otherwise like ``p``."""
        return dataclasses.replace(p, **self._asdict(), chunk=None)


# What models train on, and a long sequence.
PRESETS = {
    "cuda": (
        Shape(16, 1024, 16, 16, 64),
        Shape(16, 2048, 16, 16, 64),
        Shape(16, 4096, 16, 16, 64),
        Shape(8, 8192, 12, 12, 64),
        Shape(4, 4096, 32, 8, 128),
        Shape(4, 8192, 32, 8, 128),
        Shape(4, 16384, 32, 8, 128),
        Shape(1, 2048, 8, 8, 64),
        Shape(1, 65536, 8, 8, 64),
        Shape(1, 65536, 32, 8, 64),
    ),
    "cpu": (
        Shape(4, 512, 4, 4, 32),
        Shape(1, 2048, 4, 4, 64),
        Shape(1, 2048, 8, 2, 64),
        Shape(1, 8192, 4, 4, 64),
    ),
}
QUICK = (Shape(2, 64, 2, 2, 16), Shape(1, 128, 4, 2, 16))

COLUMNS = {
    "shapes": {
        "shape": "shape",
        "ours": "forward, ms",
        "theirs": "attention, ms",
        "fastest": "the fastest",
        "speed-up": "speed-up",
        "ours of both": "both passes, ms",
        "theirs of both": "attention, ms",
        "fastest of both": "the fastest",
        "speed-up of both": "speed-up",
        "note": "",
    }
}


def name_of(row: Row) -> str:
    return f"b{row['b']} t{row['t']} hq{row['hq']} h{row['h']} d{row['d']}"


def lines(rows: Iterable[Row]) -> Iterator[Row]:
    """One a shape: our times, those of the fastest attention, and how many times as fast we are."""
    by_shape: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] == "shapes":
            by_shape.setdefault(name_of(row), []).append(row)
    for shape, own in by_shape.items():
        line: Row = {"shape": shape}
        for pass_, suffix in zip(PASSES, ("", " of both"), strict=True):
            done = [row for row in own if row["pass"] == pass_ and "ms" in row]
            ours = next((row for row in done if row["peer"] == "retention"), None)
            others = [row for row in done if row["peer"] != "retention"]
            fastest = min(others, key=lambda row: row["ms"], default=None)
            if ours is not None:
                line["ours" + suffix] = ours["ms"]
            if fastest is not None:
                line["theirs" + suffix] = fastest["ms"]
                line["fastest" + suffix] = fastest["peer"].removeprefix("attention, ")
            if ours is not None and fastest is not None:
                line["speed-up" + suffix] = fastest["ms"] / ours["ms"]
        failed = [f"{row['peer']}: {row['failed']}" for row in own if "failed" in row]
        yield line | {"note": "; ".join(dict.fromkeys(failed))}


def plot(rows: list[Row], device: str, save: Callable[[Any, str, str], None]) -> None:
    """shapes.png: how many times as fast as the fastest attention, where both were measured."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    drawn = [line for line in lines(rows) if "speed-up" in line or "speed-up of both" in line][::-1]
    if not drawn:
        return
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(drawn) + 1.4))
    for key, label, place in (
        ("speed-up", "forward", 0.2),
        ("speed-up of both", "both passes", -0.2),
    ):
        # From 1, on a scale on which half and twice are as long.
        values = [line.get(key, math.nan) for line in drawn]
        places = [i + place for i in range(len(drawn))]
        widths = [value - 1 for value in values]
        axes.barh(places, widths, height=0.38, left=1, label=label)
    axes.set_yticks(range(len(drawn)), [line["shape"] for line in drawn], fontsize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the fastest attention")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    save(figure, "shapes", device)
