"""A new run against a kept one: has anything become slower?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retention.lm.errors import UsageError

Row = dict[str, Any]

# By what rows of two runs belong together. Decoding and serving have shapes of their own in a
# row, and serving and several processes have passes.
_SHAPE = ("b", "hq", "h", "d", "tokens", "state", "ranks", "pass", "form", "model", "layers")
_KEY = ("mode", "t", *_SHAPE)


def read(path: Path) -> Row:
    """The results of a run, from its file or its folder."""
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected results of `retention bench`: {error}") from None
    if not _is_of_a_run(results):
        raise UsageError(f"{path}: expected results of `retention bench --out`")
    return results


def _is_of_a_run(results: Any) -> bool:
    """Whether there is all that is read below: of rows, those of times."""

    def has(x: Any, fields: dict[str, Any]) -> bool:
        return isinstance(x, dict) and all(isinstance(x.get(k), v) for k, v in fields.items())

    number = (int, float)
    whole = {"rows": list, "options": dict, "environment": dict}
    row = {"mode": str, "t": int, "peer": str}
    times = row | {"ms": number, "low": number, "high": number}
    return has(results, whole) and all(
        has(x, times if isinstance(x, dict) and "low" in x else row)
        and all(isinstance(x.get(name, 0), (int, str)) for name in _SHAPE)
        for x in results["rows"]
    )


def compare(old: Row, new: Row, console: Console) -> bool:
    """Prints what both have measured of retention; whether nothing is slower beyond the spread.

    Slower is a time whose lower quartile is above the upper quartile of the one before. A run that
    ended early counts as far as it came.
    """
    for where, name in (("environment", "device"), *(("options", key) for key in old["options"])):
        before, after = old[where].get(name), new[where].get(name)
        if before != after and name != "lengths":
            raise UsageError(f"{name}: got {before} and {after}, which do not compare")

    def times(results: Row) -> dict[tuple[Any, ...], Row]:
        return {
            tuple(row.get(name) for name in _KEY): row
            for row in results["rows"]
            if row["peer"] == "retention" and "low" in row
        }

    for name, results in (("before", old), ("now", new)):
        if "incomplete" in results:
            console.print(f"the run {name} is incomplete: {results['incomplete']}", markup=False)
    before, after = times(old), times(new)
    both = [key for key in before if key in after]
    if not both:
        raise UsageError("the two runs have no mode and length in common")
    table = Table("mode", "shape", "tokens", "before, ms", "now, ms", "now / before", "")
    slower = 0
    for key in both:
        x, y = before[key], after[key]
        verdict = "slower" if y["low"] > x["high"] else "faster" if y["high"] < x["low"] else ""
        slower += verdict == "slower"
        ratio = f"{y['ms'] / x['ms']:.3f}" if x["ms"] else ""
        named = zip(_SHAPE, key[2:], strict=True)
        shape = " ".join(f"{name}{value}" for name, value in named if value is not None)
        times_of_both = f"{x['ms']:.4g}", f"{y['ms']:.4g}"
        table.add_row(key[0], escape(shape), f"{key[1]:,}", *times_of_both, ratio, verdict)
    console.print(table)
    console.print(f"{slower} of {len(both)} times are slower than before, beyond their spread")
    return slower == 0
