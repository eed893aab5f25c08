"""Files of a run: written whole or not at all, read with doubt, locked while a process trains."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retention.lm.errors import UsageError, shown

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

UNFINISHED = ".unfinished-"  # how the names of files and folders begin that are not whole yet

_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def explained(prefix: str) -> Iterator[None]:
    """Within, what the operating system refuses is a UsageError: `<prefix>: File name too long`.

    A path with a NUL byte, which Python refuses, is one too.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(f"{prefix}: {shown(error)}") from None


def status(path: Path) -> os.stat_result | None:
    """Of what is at `path`, or None where nothing is.

    `Path.exists` and its like differ between versions of Python in what else they take for nothing.

    Raises:
        OSError: where that cannot be told, in a folder that may not be searched for example.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _NOWHERE:
            return None
        raise


def require_folder(path: Path, flag: str) -> None:
    """Raises UsageError where `path`, which the option `flag` named, is none; and OSError as
    `status` does."""
    found = status(path)
    if found is None:
        raise UsageError(f"{flag}: no such folder: {path}")
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{flag}: {path} is not a folder")


def read(path: Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is something else than a file.
    """
    # Reading a pipe would wait for somebody who writes to it.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")
    return path.read_bytes()


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by `content` so that a kill or a full disk leaves the old one or the new one.

    Raises:
        OSError: where it cannot be written; the old one is as it was.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        unfinished.write_bytes(content)
        flush(unfinished)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str) -> Any:
    """What JSON says, without NaN and infinities.

    Raises:
        ValueError: where `text` is something else.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock that is the file at `path`; the operating system drops it with the process.

    Gives whether there is a lock, which some network file systems do not have.

    Raises:
        OSError: where the file cannot be written.
        BlockingIOError: where another process, or another call, holds it.
    """
    with contextlib.ExitStack() as stack:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            alone = _lock(descriptor)
            # Whoever held it may have removed it since it was opened.
            if _is_at(path, descriptor):
                break
        try:
            yield alone
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def _is_at(path: Path, descriptor: int) -> bool:
    found = status(path)
    return found is not None and os.path.samestat(found, os.fstat(descriptor))


def _lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return False
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError(error.errno, "another process holds the lock") from None
        raise
    return True
