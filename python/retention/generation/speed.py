"""How long a generation took, as it went on: time to the first token, and tokens a second."""

from __future__ import annotations

from typing import NamedTuple

from retention.lm.generation import Mark, Statistics

_ROWS = 8
# Marks of one generation, as a plot draws them.
_MARKS = 200
_COLUMNS = ("tokens", "seconds", "tokens/s", "bytes")


class Stretch(NamedTuple):
    """From one mark to another, the last of which it has."""

    tokens: int  # so far
    seconds: float  # so far
    tokens_per_second: float  # within
    state_bytes: int


def marked(max_new_tokens: int) -> Statistics:
    """Statistics that keep marks."""
    return Statistics(mark_every=max(1, max_new_tokens // _MARKS))


def stretches(marks: list[Mark], most: int) -> list[Stretch]:
    """At most so many stretches of about as many marks, behind that to the first token."""
    if not marks:
        return []
    places = sorted({round(i * (len(marks) - 1) / most) for i in range(most + 1)})
    rows = []
    before = Mark(0, 0.0, 0)
    for place in places:
        mark = marks[place]
        seconds = max(mark.seconds - before.seconds, 1e-9)
        rate = (mark.tokens - before.tokens) / seconds
        rows.append(Stretch(mark.tokens, mark.seconds, rate, mark.state_bytes))
        before = mark
    return rows


def table(name: str, memory: str, statistics: Statistics) -> str:
    """Lines for a terminal, of statistics with marks.

    Args:
        name: of the model.
        memory: what it remembers in, in a word.
        statistics: of its generation.
    """
    prompt = f"{statistics.prompt_tokens:,} prompt tokens"
    rows = stretches(statistics.marks, _ROWS)
    if not rows:
        return f"{name}: {prompt}, no new ones\n"
    first, last = rows[0], rows[-1]
    line = f"{name}: {prompt}, first token after {first.seconds:,.3f} s"
    if last.tokens > first.tokens:
        rate = (last.tokens - first.tokens) / max(last.seconds - first.seconds, 1e-9)
        line += f", then {rate:,.1f} tokens/s"
    columns = [(*_COLUMNS[:3], f"{memory} {_COLUMNS[3]}")]
    for row in rows:
        seconds, per_second = f"{row.seconds:,.3f}", f"{row.tokens_per_second:,.1f}"
        columns.append((f"{row.tokens:,}", seconds, per_second, f"{row.state_bytes:,}"))
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in columns
    ]
    return "\n".join([line, *lines]) + "\n"
