"""Text for standard output, whatever becomes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from retention.lm.errors import OutputError


def encodable(text: str, stream: TextIO) -> str:
    """`text` with a question mark for what the encoding of `stream` has no character for."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def write(text: str) -> None:
    """Put `text` out at once, with a question mark for what standard output cannot say.

    Raises:
        OutputError: where it takes nothing.
    """
    try:
        # A terminal may know fewer characters than UTF-8 has.
        sys.stdout.write(encodable(text, sys.stdout))
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        raise OutputError(error) from None


class LastingOutput:
    """A text stream that raises nothing: the first failure is kept, and ends all writing.

    An error in the middle of training would end it before its checkpoint, and one in the thread
    that draws a bar would reach nobody.

    Attributes:
        failed: what a write raised, or None.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.failed: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(encodable(text, self.stream)))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self.failed is None:
            try:
                act()
            except (OSError, ValueError) as error:
                self.failed = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
