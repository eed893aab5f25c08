"""Processes of a test: a program that imports what takes long, and copies of it, one a rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 300  # far more than it takes: processes that hang are killed


def run_worker(worker: ModuleType, folder: Path, *what: str, **environment: str) -> Path:
    """Run a module as a program, `FOLDER WHAT...`, which leaves results in the folder; returns it.
    What is written meanwhile is in `all.log`. Raises subprocess.TimeoutExpired."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's own name resolves to
    program = Path(worker.__file__).resolve()
    with (folder / "all.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, program, folder, *what],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its copies too
            process.wait()
    return folder


def run_copies(ranks: int, target: Callable[..., None], *arguments: Any) -> None:
    """In a program: `target(rank, *arguments)` in a copy of it for every rank."""
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=target, args=(rank, *arguments), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
