"""`retention generate`."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from retention.generation import speed
from retention.generation.base import Model, Settings
from retention.generation.models import open_model
from retention.lm import devices, files, generation
from retention.lm.errors import UsageError
from retention.lm.generation import Statistics
from retention.lm.output import write

_STANDARD_INPUT = Path("-")


def settings_of(options: argparse.Namespace) -> Settings:
    """What the options say of how to generate."""
    return Settings(
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
        options.stop,
        options.dtype,
        options.switch_over_seq_len,
        options.cuda_graph,
    )


def say(command: str) -> Callable[[str], None]:
    """What tells on standard error of something that was passed over."""
    return lambda line: print(f"retention {command}: {line}", file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    """All of `retention generate`.

    Raises:
        UsageError: for what cannot be done. What the command line and the folders can be refused
            for comes before anything is generated.
    """
    settings = settings_of(options)
    if options.compare is not None and options.stop:
        raise UsageError("--stop: not allowed with --compare, whose texts are equally long")
    plot = None if options.plot is None else _Plot(options.plot, settings)
    if options.prompts is None:
        prompts = [os.fsencode(prompt) for prompt in options.prompt or [""]]
    else:
        prompts = _lines(options.prompts)
    device = devices.open_device(options.device or devices.default_device())
    # Both before either is read: the first one's text is not to come before such an error.
    models = [open_model(options.checkpoint, device, settings, say("generate"))]
    if options.compare is not None:
        models.append(open_model(options.compare, device, settings, say("generate"), "--compare"))
    for model in models:
        model.check(prompts)
    settings = models[0].settled(settings)
    names = _names(models)
    timed = options.stats or plot is not None or len(models) > 1
    marks = {}
    for name in names:
        model = models.pop(0)
        statistics = speed.marked(settings.max_new_tokens) if timed else Statistics()
        model.load(settings)
        if timed:
            model.warm_up(prompts, settings)
        _generate(model, prompts, settings, statistics, name if len(names) > 1 else None)
        marks[name] = statistics.marks
        print(f"{statistics}, {statistics.state_bytes:,} bytes of {model.memory}", file=sys.stderr)
        if options.stats or len(names) > 1:
            sys.stderr.write(speed.table(name, model.memory, statistics))
        del model
        if models:
            gc.collect()  # the next one needs the memory
    if plot is not None:
        plot.write(marks, statistics.prompt_tokens)
    return 0


def _generate(
    model: Model,
    prompts: Sequence[bytes],
    settings: Settings,
    statistics: Statistics,
    name: str | None,
) -> None:
    """Print what follows the prompts: one text as it comes, several in order."""
    stream = model.generate(prompts, settings, statistics)
    if len(prompts) == 1:
        if name is not None:
            write(f"==> {name} <==\n")
        write(prompts[0].decode("utf-8", "replace"))
        for piece in generation.as_text(pieces[0] for pieces in stream):
            write(piece)
        write("\n")
        return
    prefix = "" if name is None else f"{name}: "
    for i, text in enumerate(generation.whole_texts(prompts, stream, statistics), start=1):
        heading = f"==> {prefix}{i} of {len(prompts)} <=="
        write(f"{heading}\n{text.decode('utf-8', 'replace')}\n")
    for i, progress in enumerate(statistics.each, start=1):
        print(f"{i}: {progress}", file=sys.stderr)


def _names(models: Sequence[Model]) -> list[str]:
    """Of folders, their last parts where these differ."""
    short = [model.path.resolve().name for model in models]
    return short if len({*short}) == len(short) else [str(model.path) for model in models]


class _Plot:
    """The file that --plot names, which can be written as far as can be told before.

    Raises:
        UsageError: where it cannot.
    """

    def __init__(self, path: Path, settings: Settings):
        try:
            from retention.generation import plot
        except ImportError:
            raise UsageError(
                "--plot: needs matplotlib, not installed here: pip install 'power-retention[train]'"
            ) from None
        self._path = path
        self._plot = plot
        if settings.max_new_tokens == 0:
            raise UsageError("--plot: expected --max-new-tokens of at least 1, got 0")
        if plot.extension(path) not in plot.formats():
            raise UsageError(
                f"--plot: expected a file ending in one of {', '.join(plot.formats())}, got {path}"
            )
        with files.explained(f"--plot: cannot write {path}"):
            if files.status(path.parent) is None:
                raise UsageError(f"--plot: no such folder: {path.parent}")
            if path.is_dir():
                raise ValueError("a folder")
            if not path.parent.is_dir():
                raise ValueError(f"{path.parent} is not a folder")
            if not os.access(path.parent, os.W_OK):
                raise ValueError("Permission denied")

    def write(self, marks: dict[str, list[generation.Mark]], prompt_tokens: int) -> None:
        """Draw it, whole or not at all."""
        content = self._plot.draw(marks, prompt_tokens, self._plot.extension(self._path))
        with files.explained(f"--plot: cannot write {self._path}"):
            files.write_whole(self._path, content)


def _lines(path: Path) -> list[bytes]:
    """The lines of the file that --prompts names, without their ends."""
    name = "standard input" if path == _STANDARD_INPUT else str(path)
    with files.explained(f"--prompts: cannot read {name}"):
        if path != _STANDARD_INPUT:
            content = files.read(path)
        elif sys.stdin is None or sys.stdin.closed:
            raise ValueError("closed")
        else:
            content = sys.stdin.buffer.read()
    if not content:
        raise UsageError(f"--prompts: {name} is empty")
    return content.splitlines()
