"""What lies in the package's folder: the files of one distribution, or an error."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable

_OTHER = re.compile(r"retention-(.+)\.dist-info")


def others(folders: Iterable[str]) -> list[str]:
    """The installations of the distribution ``retention`` that have files in the package's folder.

    Args:
        folders: where the package's modules are found, its ``__path__``.

    Returns:
        Names with versions, such as ``["retention 1.0.7"]``.
    """
    found = []
    for folder in folders:
        beside = os.path.dirname(folder)
        with contextlib.suppress(OSError):  # not a folder that can be listed, as in a zip archive
            matches = filter(None, map(_OTHER.fullmatch, os.listdir(beside)))
            versions = [x[1] for x in matches if _has_files(os.path.join(beside, x[0]), folder)]
            found += [f"retention {version}" for version in versions]
    return found


def _has_files(dist_info: str, folder: str) -> bool:
    """Whether a distribution says that it has files in the folder: an editable one has not."""
    start = f"{os.path.basename(folder)}/"
    with contextlib.suppress(OSError), open(os.path.join(dist_info, "RECORD")) as record:
        return any(line.startswith(start) for line in record)
    return False


def refuse_mixture(folders: Iterable[str]) -> None:
    """Raise where another distribution has put its files among those of this package.

    ``retention`` on PyPI is the package of the method's authors, with the same import name as that
    of ``power-retention``. pip installs the second over the first without a word. Modules of one
    then find modules of the other, and uninstalling either takes files of both, so this is an error
    and not a warning. Only the one name is looked for: reading what every installed distribution
    has in the folder takes longer than importing the package.

    Args:
        folders: where the package's modules are found, its ``__path__``.

    Raises:
        ImportError: names the other distribution, the folder, and the commands that set it right.
    """
    folders = list(folders)
    if found := others(folders):
        raise ImportError(
            f"{' and '.join(found)}, another distribution than power-retention, has files in the "
            f"same folder, {', '.join(folders)}. Keep one of them: pip uninstall --yes retention "
            "power-retention, then pip install power-retention; or install the other with pip "
            "install --target into a folder of its own",
            name="retention",
        )
