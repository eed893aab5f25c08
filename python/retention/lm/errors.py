"""The errors that the command line prints as a line instead of a traceback."""

from __future__ import annotations


class UsageError(Exception):
    """Something the user asked for cannot be done. The message names it in one line."""

    exit_code = 2


class OutputError(Exception):
    """Standard output takes nothing more: its reader is gone, or its disk is full.

    Attributes:
        reason: what the write raised, an OSError, or a ValueError where the stream is closed.
    """

    def __init__(self, reason: OSError | ValueError):
        super().__init__(str(reason))
        self.reason = reason


def shown(error: BaseException) -> str:
    """What an error says, without its number and without the path, which has its own place."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
