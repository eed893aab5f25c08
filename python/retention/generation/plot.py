"""The time that generations take, over their tokens."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retention.generation import speed
from retention.lm.generation import Mark

_STRETCHES = 20


def formats() -> list[str]:
    """What a plot can be written as: extensions of files, without the dot."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())


def draw(marks: dict[str, list[Mark]], prompt_tokens: int, extension: str) -> bytes:
    """Cumulative time, and below it tokens a second, of one or several models.

    Args:
        marks: of each model's name those of its generation.
        prompt_tokens: how many came before, for the axis.
        extension: one of `formats`.
    """
    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    time, rate = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for name, taken in marks.items():
        time.plot([x.tokens for x in taken], [x.seconds for x in taken], label=name)
        # The first one is the prompt's.
        rows = speed.stretches(taken, _STRETCHES)[1:]
        rate.plot([x.tokens for x in rows], [x.tokens_per_second for x in rows], label=name)
    time.set(ylabel="seconds since the prompt", ylim=(0, None))
    time.legend()
    rate.set(ylabel="tokens/s", ylim=(0, None), xlim=(0, None))
    rate.set_xlabel(f"new tokens, behind {prompt_tokens:,} of the prompt")
    for axes in (time, rate):
        axes.grid(alpha=0.25)
    content = io.BytesIO()
    figure.savefig(content, format=extension)
    return content.getvalue()


def extension(path: Path) -> str:
    """That of a file, as `draw` takes it."""
    return path.suffix.removeprefix(".").lower()
