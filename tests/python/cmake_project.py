"""Configure and build small CMake projects from tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_cmake(*arguments, env=None, unset=()):
    """Run CMake and return its completed process, with stdout and stderr as one text.

    ``env`` adds variables to the environment and ``unset`` takes variables out of it.
    """
    beside_python = Path(sys.executable).parent / "cmake"
    cmake = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake: pip install 'power-retention[test]'")
    environment = {k: v for k, v in os.environ.items() if k not in unset} | (env or {})
    result = subprocess.run(
        [cmake, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # CMake wraps its messages; one space for each run of white space undoes that.
    result.message = " ".join(result.stdout.split())
    return result
