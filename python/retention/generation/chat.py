"""`retention chat`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from retention.generation import speed
from retention.generation.base import Conversation
from retention.generation.command import say, settings_of
from retention.generation.models import open_model
from retention.generation.stream import Stream
from retention.lm import devices, files
from retention.lm.errors import UsageError
from retention.lm.generation import Statistics
from retention.lm.output import write

_PROMPT = "> "
_EXIT, _RESET = b"/exit", b"/reset"


def run(options: argparse.Namespace) -> int:
    """All of `retention chat`.

    Raises:
        UsageError: for what cannot be done, and for a line that cannot be taken where lines come of
            a pipe. A terminal is told, and the conversation goes on.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("cannot read standard input: closed")
    settings = settings_of(options)
    if settings.max_new_tokens == 0:
        raise UsageError("--max-new-tokens: expected at least 1, got 0")
    device = devices.open_device(options.device or devices.default_device())
    model = open_model(options.checkpoint, device, settings, say("chat"))
    settings = model.settled(settings)
    model.load(settings)
    conversation = model.conversation(settings, options.system)
    interactive = sys.stdin.isatty()
    if interactive:
        print("/reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
    for line in _lines(interactive):
        text = line.strip()
        if text == _EXIT:
            break
        if text == _RESET:
            conversation.reset()
        elif text:
            statistics = speed.marked(settings.max_new_tokens) if options.stats else Statistics()
            try:
                _answer(conversation, text, statistics)
            except UsageError as error:
                if not interactive:
                    raise
                say("chat")(str(error))
                continue
            if options.stats:
                name = options.checkpoint.resolve().name
                sys.stderr.write(speed.table(name, model.memory, statistics))
                sys.stderr.flush()
    return 0


def _answer(conversation: Conversation, text: bytes, statistics: Statistics) -> None:
    """Print an answer as it comes. An interruption stops it, and a second one everything."""
    stream = conversation.answer(text, statistics)
    first = conversation.plain
    stopping = False
    while True:
        try:
            for piece in stream:
                write(piece.lstrip(" ") if first else piece)
                first = first and not piece.strip(" ")
            break
        except KeyboardInterrupt:
            if stopping:
                _abandon(stream)
                raise
            stopping = True
            stream.stop()
        except BaseException:
            _abandon(stream)
            raise
    write("\n")


def _abandon(stream: Stream[str]) -> None:
    with contextlib.suppress(BaseException):
        stream.close()


def _lines(interactive: bool) -> Iterator[bytes]:
    """Lines of standard input, until its end."""
    if not interactive:
        with files.explained("cannot read standard input"):
            while line := sys.stdin.buffer.readline():
                yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (the line can be edited)
    while True:
        try:
            yield os.fsencode(input(_PROMPT))
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
