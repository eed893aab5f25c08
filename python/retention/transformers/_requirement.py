"""The version of transformers that this package is written for."""

from __future__ import annotations

import importlib.metadata
import re

OLDEST = (5, 24)


def check_transformers() -> None:
    """Raises ImportError unless transformers is there and not older than `OLDEST`."""
    needed = ".".join(map(str, OLDEST))
    how = "pip install 'power-retention[transformers]'"
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"retention.transformers: expected transformers {needed} or newer, got none; {how}"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST:
        raise ImportError(
            f"retention.transformers: expected transformers {needed} or newer, got {found}; {how}"
        )
