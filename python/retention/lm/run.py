"""The folder of a run: `config.json`, `metrics.jsonl`, `loss.png` and `checkpoints/`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from retention.lm import checkpoint
from retention.lm.config import RunConfig, run_config_from_json
from retention.lm.errors import UsageError


class RunFolder:
    """Paths of a run and the two files that are rewritten whole or appended to."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.plot_file = path / "loss.png"
        self.checkpoints = path / "checkpoints"
        self._metrics: TextIO | None = None

    def check_free(self) -> None:
        """Raise UsageError unless a new run may be written here."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out: {self.path} is not a folder")
        for taken in (self.config_file, self.metrics_file, self.checkpoints):
            if taken.exists():
                raise UsageError(
                    f"--out: {self.path} already holds a run; "
                    f"continue it with --resume or name another folder"
                )

    def create(self, config: RunConfig) -> None:
        """Make the folder and write the configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_file, config.to_json().encode())
        except OSError as error:
            raise UsageError(f"--out: cannot write {self.path}: {error.strerror}") from None

    def read_config(self) -> RunConfig:
        """The configuration of the run that is here.

        Raises:
            UsageError: where there is none.
        """
        try:
            text = self.config_file.read_text()
        except OSError:
            raise UsageError(f"--out: no run in {self.path} ({self.config_file.name})") from None
        return run_config_from_json(text, self.config_file)

    def open_metrics(self, last_step: int) -> None:
        """Keep the records up to `last_step`, drop later ones and a half-written one, and append.

        What came after the checkpoint is computed again, to the same values.
        """
        kept = [json.dumps(x) + "\n" for x in self.read_metrics() if x["step"] <= last_step]
        write_whole(self.metrics_file, "".join(kept).encode())
        self._metrics = self.metrics_file.open("a")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records, in order."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    records.append(json.loads(line))
        return records

    def record(self, **values: Any) -> None:
        """Append one record, as a single write."""
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()

    def flush_metrics(self) -> None:
        """Wait until the records are on the disk: a checkpoint must not get ahead of them."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by `content` so that a kill leaves the old one or the new one."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_bytes(content)
    checkpoint.flush(unfinished)
    os.replace(unfinished, path)
    checkpoint.flush(path.parent)
