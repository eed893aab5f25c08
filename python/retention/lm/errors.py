"""The error that the command line prints as a line instead of a traceback."""

from __future__ import annotations


class UsageError(Exception):
    """Something the user asked for cannot be done. The message names it in one line."""

    exit_code = 2
