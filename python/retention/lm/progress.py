"""What one sees of a run: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from retention.lm.output import LastingOutput

_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHING = 0.95


class TrainingProgress:
    """Step, loss, tokens a second and the time left, of a run of `steps` steps.

    A context manager. The rate is measured from the first step of this process, so a resumed run
    does not count what another process did.
    """

    def __init__(self, steps: int, done: int, tokens_per_step: int, stream: TextIO | None = None):
        self.steps = steps
        self.first = done
        self.done = done
        self.tokens_per_step = tokens_per_step
        self.output = LastingOutput(stream or sys.stdout)
        self.console = Console(file=cast(TextIO, self.output), highlight=False, soft_wrap=True)
        self.began = self.last_line = time.monotonic()
        self.smoothed: float | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=self.steps, completed=self.done, numbers="")
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def failed(self) -> OSError | ValueError | None:
        """Why nothing can be seen any more: the reader of a pipe went away, or a terminal."""
        return self.output.failed

    @property
    def tokens_per_second(self) -> float:
        """Trained on, by the clock, validation and checkpoints included."""
        seconds = time.monotonic() - self.began
        return (self.done - self.first) * self.tokens_per_step / max(seconds, 1e-9)

    def update(self, step: int, loss: float) -> None:
        """One more step is done."""
        self.done = step
        before = loss if self.smoothed is None else self.smoothed
        self.smoothed = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        numbers = f"loss {self.smoothed:.3f}  {self.tokens_per_second:,.0f} tokens/s"
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif step == self.steps or now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (now - self.began) / (step - self.first) * (self.steps - step)
            self.console.print(f"step {step}/{self.steps}  {numbers}  {_clock(left)} left")

    def note(self, line: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        self.console.print(line, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
