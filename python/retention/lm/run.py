"""The folder of a run: `config.json`, `metrics.jsonl`, `loss.png` and `checkpoints/`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from retention.lm import checkpoint, files
from retention.lm.config import RunConfig, check_number, check_type, run_config_from_json
from retention.lm.errors import UsageError


class RunFolder:
    """Paths of a run and the two files that are rewritten whole or appended to.

    All that is refused by the disk, or is not what a run writes, is a UsageError.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.plot_file = path / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.lock_file = path / ".lock"
        self._metrics: BinaryIO | None = None

    def check_free(self) -> None:
        """Raise UsageError unless a new run may be written here.

        A run that never made a step does not count: it may have failed for its arguments.
        """
        with files.explained(f"--out: cannot read {self.path}"):
            found = files.status(self.path)
            if found is not None and not stat.S_ISDIR(found.st_mode):
                raise UsageError(f"--out: {self.path} is not a folder")
            metrics = files.status(self.metrics_file)
            if (metrics is not None and metrics.st_size) or checkpoint.finished(self.checkpoints):
                raise UsageError(
                    f"--out: {self.path} already holds a run; "
                    f"continue it with --resume or name another folder"
                )
            there = files.status(self.config_file) is not None
        if there:
            try:
                self.read_config()
            except UsageError as error:
                raise UsageError(f"--out: {self.path} is taken: {error}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Make the folder, and hold it alone: no other process can train in it.

        Gives whether that is so: some network file systems have no locks.
        """
        with contextlib.ExitStack() as stack:
            with files.explained(f"--out: cannot write {self.path}"):
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    alone = stack.enter_context(files.locked(self.lock_file))
                except BlockingIOError:
                    raise UsageError(f"--out: another process trains in {self.path}") from None
            yield alone

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration of a new run."""
        self._write(self.config_file, config.to_json().encode())

    def read_config(self) -> RunConfig:
        """The configuration of the run that is here.

        Raises:
            UsageError: where there is none.
        """
        with files.explained(f"--out: cannot read {self.config_file}"):
            if files.status(self.config_file) is None:
                raise UsageError(f"--out: no run in {self.path} (no {self.config_file.name})")
            text = files.read(self.config_file).decode()
        return run_config_from_json(text, self.config_file)

    def open_metrics(self, last_step: int) -> int:
        """Keep the records up to `last_step`, drop later ones and a half-written one, and append.

        What came after the checkpoint is computed again, to the same values. Returns the last step
        there is a record of.
        """
        kept = [(line, x["step"]) for line, x in self._records() if x["step"] <= last_step]
        self._write(self.metrics_file, b"".join(line for line, _ in kept))
        with files.explained(f"--out: cannot write {self.metrics_file}"):
            self._metrics = self.metrics_file.open("ab", buffering=0)
        return max((step for _, step in kept), default=0)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records, in order."""
        return [record for _, record in self._records()]

    def record(self, **values: Any) -> None:
        """Append one record, as a single write."""
        line = (json.dumps(values) + "\n").encode()
        with files.explained(f"--out: cannot write {self.metrics_file}"):
            # A full disk takes a part first, and says so at the next write.
            while line:
                line = line[self._metrics.write(line) :]

    def write_plot(self, png: bytes) -> None:
        """Replace the loss curve."""
        self._write(self.plot_file, png)

    def flush_metrics(self) -> None:
        """Wait until the records are on the disk: a checkpoint must not get ahead of them."""
        with files.explained(f"--out: cannot write {self.metrics_file}"):
            os.fsync(self._metrics.fileno())

    def save(self, step: int, *saved: Any) -> None:
        """Write a checkpoint: see `checkpoint.save`."""
        checkpoint.save(self.checkpoints, step, *saved)

    def open_output(self) -> TextIO:
        """Where progress is shown."""
        return sys.stdout

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _records(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Each whole line and the record that it is; a last line without an end is not whole."""
        with files.explained(f"--out: cannot read {self.metrics_file}"):
            if files.status(self.metrics_file) is None:
                return
            lines = files.read(self.metrics_file).split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                yield line + b"\n", _record(line.decode())
            except ValueError as error:
                raise UsageError(
                    f"--out: {self.metrics_file}, line {number}: not a record of a run ({error}); "
                    f"mend or remove the line"
                ) from None

    def _write(self, path: Path, content: bytes) -> None:
        with files.explained(f"--out: cannot write {path}"):
            files.write_whole(path, content)


class NoFolder(RunFolder):
    """That of a process whose run another one writes: it reads, and leaves no trace."""

    def check_free(self) -> None:
        pass

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        yield True

    def write_config(self, config: RunConfig) -> None:
        pass

    def open_metrics(self, last_step: int) -> int:
        return last_step

    def record(self, **values: Any) -> None:
        pass

    def write_plot(self, png: bytes) -> None:
        pass

    def flush_metrics(self) -> None:
        pass

    def save(self, step: int, *saved: Any) -> None:
        pass

    def open_output(self) -> TextIO:
        return io.StringIO()


def _record(line: str) -> dict[str, Any]:
    record = files.parse_json(line)
    check_type("record", record, dict)
    if "step" not in record:
        raise ValueError("no step")
    check_number("step", record["step"], int, least=1)
    for name in ("train_loss", "validation_loss"):
        if name in record:
            check_number(name, record[name], int, float, least=-float("inf"))
    return record
