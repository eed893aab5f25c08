"""Rows as tables on the terminal, as files, and as plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import forms, serving_report, shapes

Row = dict[str, Any]

# Columns of each table, by the rows' keys, with their headings.
_PASS = {
    "t": "tokens",
    "peer": "implementation",
    "ms": "ms",
    "spread": "quartiles",
    "tokens/s": "tokens/s",
    "tflops": "TFLOP/s",
    "share of ceiling": "of ceiling",
    "share of floor": "floor / time",
    "error": "error",
    "worst gradient": "of dQ, dK, dV",
    "note": "",
}
_BESIDE = "decode, beside attention"
_COLUMNS = {
    "fwd": _PASS,
    "bwd": _PASS,
    "fwd+bwd": _PASS,
    "decode": {
        "shape": "shape",
        "state": "states",
        "ms": "ms a step",
        "bytes": "moved",
        "share of copy": "of copy",
        "ms with folds": "with folds",
        "share of folds": "more",
        "ms longest": "longest",
        "longest / median": "/ median",
        "error": "error",
        "memory": "memory",
        "note": "",
    },
    _BESIDE: {
        "shape": "shape",
        "t": "context",
        "ours": "retention, ms",
        "ms": "attention, ms",
        "peer": "the fastest",
        "share of copy": "of copy",
        "speed-up": "speed-up",
        "note": "",
    },
    "context": {
        "pass": "pass",
        "peer": "implementation",
        "t": "tokens",
        "ranks": "processes",
        "ms": "ms",
        "spread": "quartiles",
        "tokens/s": "tokens/s",
        "speed-up": "speed-up",
        "share of one alone": "of one alone, weak",
        "ms of exchange": "exchange, ms",
        "share exposed": "of the time",
        "share hidden": "hidden",
        "note": "",
    },
    "components": {"t": "tokens", "part": "part", "ms": "ms", "share": "share"},
    "memory": {
        "t": "tokens",
        "peer": "implementation",
        "pass": "pass",
        "bytes": "extra memory",
        "note": "",
    },
    "host": {"part": "call of 64 tokens", "us": "us", "us before the launch": "before the launch"},
    "build": {"part": "file", "bytes": "size"},
    **shapes.COLUMNS,
    **forms.COLUMNS,
    **serving_report.COLUMNS,
}


def print_tables(results: Row, console: Console) -> None:
    """One table a mode, then what could not be measured."""
    environment, ceilings = results["environment"], results["ceilings"]
    console.print(
        f"{environment['device']}, torch {environment['torch']}, retention "
        f"{environment['retention']} ({environment['commit']})"
    )
    console.print(
        f"ceilings: {ceilings['tflops']:.4g} TFLOP/s (large product), "
        f"{ceilings['tbytes']:.3g} TB/s (large copy)"
    )
    for line in serving_report.models(results["rows"]):
        console.print(line)
    for mode, rows in _tables(results["rows"]).items():
        # Where something failed, for that and why.
        measured = "ms" if "ms" in _COLUMNS[mode] else "bytes"
        needed = (measured, "note") if any("failed" in row for row in rows) else ()
        columns = {
            key: heading
            for key, heading in _COLUMNS[mode].items()
            if key in needed
            or any(row.get(key if key != "spread" else "low") not in (None, "") for row in rows)
        }
        table = Table(title=mode, title_justify="left")
        for key, heading in columns.items():
            text = key in ("peer", "part", "pass", "note", "shape", "state", "model")
            text = text or key.startswith("fastest")
            table.add_column(heading, justify="left" if text else "right")
        for row in rows:
            cells = [_cell(key, row) for key in columns]
            if "failed" in row:
                cells[list(columns).index(measured)] = "failed"
                cells[-1] = escape(row["failed"][:60])
            table.add_row(*cells)
        console.print(table)
    for mode in ("fwd", "bwd", "fwd+bwd"):
        crossing = crossover(results["rows"], mode)
        if crossing is not None:
            console.print(f"{mode}: {crossing.text}")
    for shape, ours, theirs in _by_shape(results["rows"]):
        for row in ours:
            crossing = decode_crossover(row, theirs)
            if crossing is not None:
                console.print(f"decode, {shape}, states of {row['state']}: {crossing.text}")
    for text in forms.texts(results["rows"]):
        console.print(text)
    for name, reason in results["missing"].items():
        console.print(f"not measured: {name} ({reason})")
    if "incomplete" in results:
        console.print(f"incomplete: {results['incomplete']}", markup=False)


def _tables(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each table. What decoding is beside attention is a table of its own."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] in ("serving", "shapes", "forms"):
            continue
        if row["mode"] != "decode":
            tables.setdefault(row["mode"], []).append(row)
        elif row["peer"] == "retention":
            tables.setdefault("decode", []).append(row | {"shape": _decode_shape(row)})
    beside = [
        line for _, ours, theirs in _by_shape(rows) for line in beside_attention(ours, theirs)
    ]
    for mode, found in (("shapes", [*shapes.lines(rows)]), ("forms", [*forms.lines(rows)])):
        tables |= {mode: found} if found else {}
    return tables | ({_BESIDE: beside} if beside else {}) | serving_report.tables(rows)


def _cell(key: str, row: Row) -> str:
    if key == "spread":
        return f"{row['low']:.4g} - {row['high']:.4g}" if "low" in row else ""
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    if key in ("bytes", "memory", "budget"):
        return f"{value / 2**20:,.1f} MiB"
    if key.startswith("share"):
        return f"{value:.1%}"
    if key in ("t", "tokens/s", "tokens/s beside", "fits", "fits beside"):
        return f"{value:,.0f}"
    return f"{value:.1e}" if key in ("error", "worst gradient") else f"{value:.4g}"


class Crossover(NamedTuple):
    """From which length retention is faster than the fastest attention."""

    tokens: float | None  # None: where it is not among the lengths measured, but before or beyond
    text: str


def crossover(rows: Iterable[Row], mode: str) -> Crossover | None:
    """Between two lengths that were measured, on straight lines in logarithms. None of fewer."""
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["mode"] == mode and row.get("ms", 0) > 0:
            kind = "ours" if row["peer"] == "retention" else row["peer"].split(",")[0]
            at = times.setdefault(row["t"], {})
            at[kind] = min(row["ms"], at.get(kind, math.inf))
    ratios = [
        (t, math.log(x["attention"] / x["ours"]))
        for t, x in sorted(times.items())
        if "attention" in x and "ours" in x
    ]
    return _meeting(ratios)


def _meeting(ratios: list[tuple[int, float]]) -> Crossover | None:
    """Of lengths, in order, and the logarithms of attention's time over ours."""
    if len(ratios) < 2:
        return None
    if ratios[0][1] > 0:
        text = f"faster than attention from {ratios[0][0]:,} tokens, the fewest measured"
        return Crossover(None, text)
    if (tokens := forms.meeting(ratios)) is not None:
        return Crossover(tokens, f"faster than attention from about {tokens:,.0f} tokens")
    return Crossover(None, f"slower than attention up to {ratios[-1][0]:,} tokens")


# ---- decoding -----------------------------------------------------------------------------------


def _by_shape(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Of every shape that attention was measured at: its name, the rows of retention, one for each
    format of states, and those of attention. Without what failed, but for contexts at which all of
    attention did."""
    groups: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        if row["mode"] == "decode" and "b" in row:
            ours, theirs = groups.setdefault(_decode_shape(row), ([], []))
            if row["peer"] != "retention":
                theirs.append(row)
            elif "failed" not in row:
                ours.append(row)
    for name, (ours, theirs) in groups.items():
        if theirs:
            yield name, ours, theirs


def _decode_shape(row: Row) -> str:
    tokens = f", {row['tokens']} tokens" if row["tokens"] > 1 else ""
    return f"{forms.shape_of(row)}{tokens}"


def _fastest(theirs: Iterable[Row]) -> dict[int, Row]:
    """Attention's row of each context; one that failed where all did."""
    best: dict[int, Row] = {}
    for row in theirs:
        before = best.setdefault(row["t"], row)
        if row.get("ms", math.inf) < before.get("ms", math.inf):
            best[row["t"]] = row
    return dict(sorted(best.items()))


def beside_attention(ours: list[Row], theirs: list[Row]) -> Iterator[Row]:
    """The fastest attention at each context, and the first of our rows, folds included."""
    for row in _fastest(theirs).values():
        line = row | {"shape": _decode_shape(row)}
        if ours:
            line["ours"] = ours[0]["ms with folds"]
            if "ms" in row:
                line["speed-up"] = row["ms"] / line["ours"]
        yield line


def decode_crossover(ours: Row, theirs: list[Row]) -> Crossover | None:
    """As of passes, against our time with folds, which is the same after any context."""
    fastest = [row for row in _fastest(theirs).values() if row.get("ms", 0) > 0]
    return _meeting([(row["t"], math.log(row["ms"] / ours["ms with folds"])) for row in fastest])


# ---- files --------------------------------------------------------------------------------------


def save(results: Row, folder: Path) -> Path:
    """results.json: whole, or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    return new.replace(path)


def write(results: Row, folder: Path) -> list[Path]:
    """results.json, results.csv and the plots that the rows give."""
    written = [save(results, folder), folder / "results.csv"]
    keys = list(dict.fromkeys(key for row in results["rows"] for key in row))
    with written[1].open("w", newline="") as file:
        table = csv.DictWriter(file, keys)
        table.writeheader()
        table.writerows(results["rows"])
    return written + _plots(results, folder)


def _plots(results: Row, folder: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if "failed" not in row]
    device = results["environment"]["device"]
    title = f"{device}, {_shape(results['options'])}"
    written = []

    def save(figure, name: str, title: str = title) -> None:
        figure.suptitle(title, fontsize=9)
        figure.tight_layout()
        path = folder / f"{name}.png"
        # No date and no version: the same rows give the same file.
        figure.savefig(path, dpi=120, metadata={"Software": None})
        plt.close(figure)
        written.append(path)

    def lines(axes, chosen: list[Row], key: str, label: str, log: bool = True) -> None:
        for peer in dict.fromkeys(row["peer"] for row in chosen):
            points = sorted((r["t"], r[key]) for r in chosen if r["peer"] == peer and key in r)
            if not points:
                continue
            weight = 2.5 if peer == "retention" else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", label=peer, linewidth=weight)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if log else "linear")
        if not log:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)

    passes = [m for m in ("fwd", "bwd", "fwd+bwd") if any(r["mode"] == m for r in rows)]
    for key, label, name, log in (
        ("tokens/s", "tokens a second", "throughput", True),
        ("share of ceiling", "share of the largest product's rate", "ceiling", False),
    ):
        if not passes:
            break
        figure, panels = plt.subplots(1, len(passes), figsize=(5 * len(passes), 4), squeeze=False)
        for axes, mode in zip(panels[0], passes, strict=True):
            lines(axes, [r for r in rows if r["mode"] == mode and r["ms"] > 0], key, label, log)
            crossing = crossover(rows, mode) if key == "tokens/s" else None
            axes.set_title(f"{mode}: {crossing.text}" if crossing else mode, fontsize=8)
            if crossing and crossing.tokens:
                axes.axvline(crossing.tokens, color="black", linestyle=":", linewidth=1)
        save(figure, name)
    spread = [r for r in rows if r["mode"] == "context" and "speed-up" in r]
    if spread:
        figure, axes = plt.subplots(figsize=(5, 4))
        most = max(r["ranks"] for r in spread)
        axes.plot([1, most], [1, most], color="black", linestyle=":", linewidth=1, label="ideal")
        for key in dict.fromkeys((r["pass"], r["t"]) for r in spread):
            points = [(r["ranks"], r["speed-up"]) for r in spread if (r["pass"], r["t"]) == key]
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{key[0]}, {key[1]:,} tokens")
        axes.set_xlabel("processes")
        axes.set_ylabel("times as fast as one")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        save(figure, "context")
    if any(r["mode"] == "components" for r in rows):
        chosen = [r for r in rows if r["mode"] == "components"]
        last = [r for r in chosen if r["t"] == chosen[-1]["t"]][::-1]
        figure, axes = plt.subplots(figsize=(7, 0.3 * len(last) + 1.2))
        axes.barh([r["part"][:40] for r in last], [r["ms"] for r in last])
        axes.set_xlabel(f"ms of a forward and backward of {last[0]['t']:,} tokens")
        save(figure, "components")
    decoded = [group for group in _by_shape(rows) if group[1]]
    if decoded:
        wide = min(3, len(decoded))
        high = math.ceil(len(decoded) / wide)
        size = (5 * wide, 4 * high)
        figure, panels = plt.subplots(high, wide, figsize=size, squeeze=False)
        for axes in list(panels.flat)[len(decoded) :]:
            axes.axis("off")
        for axes, (name, ours, theirs) in zip(panels.flat, decoded, strict=False):
            axes.set_prop_cycle(color=plt.get_cmap("tab10").colors)
            for row in ours:
                # The same after any context.
                contexts = sorted({r["t"] for r in theirs})
                flat = [row["ms with folds"]] * len(contexts)
                label = f"retention, states of {row['state']}, with folds"
                axes.plot(contexts, flat, label=label, linewidth=2.5)
            lines(axes, theirs, "ms", "ms a step of a layer")
            crossing = decode_crossover(ours[0], theirs)
            axes.set_title(f"{name}\n{crossing.text}" if crossing else name, fontsize=8)
            axes.set_xlabel("tokens of context")
            if crossing and crossing.tokens:
                axes.axvline(crossing.tokens, color="black", linestyle=":", linewidth=1)
        save(figure, "decode", device)
    steps = [r for r in rows if r["mode"] == "decode" and r["peer"] == "retention" and "b" in r]
    if steps:
        figure, axes = plt.subplots(figsize=(6, 4))
        kinds = [
            f"hq{r['hq']} h{r['h']} d{r['d']}, {r['tokens']} a step, states of {r['state']}"
            for r in steps
        ]
        for kind in dict.fromkeys(kinds):
            points = sorted(
                (r["b"], r["share of copy"])
                for r, own in zip(steps, kinds, strict=True)
                if own == kind
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=kind)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sequences")
        axes.set_ylabel("share of a large copy's rate")
        axes.set_title("a step without folds", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        save(figure, "decode_copy", device)
    shapes.plot(rows, device, save)
    serving_report.plot(rows, device, save)
    return written


def _shape(options: Row) -> str:
    return (
        f"b{options['b']} hq{options['hq']} h{options['h']} d{options['d']} p{options['deg']} "
        f"chunk {options['chunk'] or 'auto'} {options['dtype']}"
        f"{' gated' if options['gated'] else ''}"
    )
