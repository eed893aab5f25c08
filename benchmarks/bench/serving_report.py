"""Of serving: its tables, what either model does in the same memory, and its plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

STEPS, FIRST, MEMORY = (
    "serving",
    "serving, time to the first token",
    "serving, in the same memory",
)
COLUMNS: dict[str, dict[str, str]] = {
    STEPS: {
        "t": "context",
        "b": "batch",
        "peer": "implementation",
        "state": "states",
        "ms": "ms a step",
        "ms mean": "mean",
        "ms a layer": "of a layer",
        "tokens/s": "tokens/s",
        "share of copy": "of copy",
        "share of weights": "weights",
        "memory": "a sequence",
        "note": "",
    },
    FIRST: {
        "t": "prompt",
        "peer": "implementation",
        "state": "states",
        "ms": "ms",
        "tokens/s": "tokens/s",
        "note": "",
    },
    MEMORY: {
        "t": "context",
        "budget": "memory",
        "state": "states",
        "fits": "retention, fit",
        "b": "batch",
        "tokens/s": "tokens/s",
        "fits beside": "softmax, fit",
        "b beside": "batch",
        "tokens/s beside": "tokens/s",
        "peer": "the fastest",
        "speed-up": "speed-up",
    },
}


def models(rows: Iterable[Row]) -> list[str]:
    """A line for each model that was served."""
    served = dict.fromkeys(
        (row["model"], row["layers"]) for row in rows if row["mode"] == "serving"
    )
    return [f"serving: sizes of {model}, {layers} layers" for model, layers in served]


def tables(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each table, of those that have any."""
    rows = [row for row in rows if row["mode"] == "serving"]
    found = {
        STEPS: [row for row in rows if row["pass"] == "decode"],
        FIRST: [row for row in rows if row["pass"] != "decode"],
        MEMORY: same_memory(rows),
    }
    return {name: table for name, table in found.items() if table}


def same_memory(rows: Iterable[Row]) -> list[Row]:
    """For each context and format of states: the most tokens a second of either model, of the
    batches whose sequences fit into the memory that both are given.

    Returns:
        Rows with, of retention and (``beside``) of softmax attention: ``fits``, sequences that
        fit; ``b``, that of the batches measured; ``tokens/s``; and ``speed-up``, ours over theirs.
        Those of contexts at which both were measured.
    """
    steps = [x for x in rows if x["mode"] == "serving" and x["pass"] == "decode"]
    steps = [x for x in steps if "failed" not in x and x["b"] * x["memory"] <= x["budget"]]
    lines = []
    for model, t in dict.fromkeys((x["model"], x["t"]) for x in steps):
        here = [x for x in steps if (x["model"], x["t"]) == (model, t)]
        theirs = [x for x in here if x["peer"] != "retention"]
        for state in dict.fromkeys(x["state"] for x in here if x["peer"] == "retention"):
            ours = [x for x in here if x["peer"] == "retention" and x["state"] == state]
            if not theirs:
                continue
            best, beside = (max(x, key=lambda row: row["tokens/s"]) for x in (ours, theirs))
            lines.append(
                {
                    "model": model,
                    "t": t,
                    "budget": best["budget"],
                    "state": state,
                    "fits": best["budget"] // best["memory"],
                    "b": best["b"],
                    "tokens/s": best["tokens/s"],
                    "fits beside": best["budget"] // beside["memory"],
                    "b beside": beside["b"],
                    "tokens/s beside": beside["tokens/s"],
                    "peer": beside["peer"],
                    "speed-up": best["tokens/s"] / beside["tokens/s"],
                }
            )
    return lines


def plot(rows: Iterable[Row], device: str, save: Callable[[Any, str, str], None]) -> None:
    """Tokens a second over the context, then in the same memory, and times to a first token.

    Args:
        rows: of a run, without what failed.
        device: its name.
        save: takes a figure, its name and its title.
    """
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["mode"] == "serving"]
    for model, layers in dict.fromkeys((row["model"], row["layers"]) for row in rows):
        own = [row for row in rows if (row["model"], row["layers"]) == (model, layers)]
        figure, panels = plt.subplots(1, 3, figsize=(15, 4))
        _batches(panels[0], [x for x in own if x["pass"] == "decode"])
        _memory(panels[1], same_memory(own))
        _first_tokens(panels[2], [x for x in own if x["pass"] != "decode"])
        for axes in panels:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("tokens of context")
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
        save(figure, f"serving_{model}", f"{device}, sizes of {model}, {layers} layers")


def _batches(axes: Any, steps: list[Row]) -> None:
    """Ours solid, the fastest softmax attention dashed; a colour for each batch."""
    asked = [x for x in steps if "largest" not in x]
    colors = {b: f"C{i}" for i, b in enumerate(sorted({x["b"] for x in asked}))}
    states = list(dict.fromkeys(x["state"] for x in asked if x["peer"] == "retention"))
    for b, color in colors.items():
        for state, line in [*zip(states, ("-", "-."), strict=False), ("", "--")]:
            best: dict[int, float] = {}
            for x in asked:
                if (x["b"], x["state"]) == (b, state):
                    best[x["t"]] = max(x["tokens/s"], best.get(x["t"], 0.0))
            if best:
                label = f"batch {b}, {f'retention, {state}' if state else 'softmax'}"
                points = zip(*sorted(best.items()), strict=True)
                axes.plot(*points, line, marker="o", color=color, label=label)
    axes.set_ylabel("tokens a second")
    axes.set_title("steps of a batch", fontsize=8)


def _memory(axes: Any, lines: list[Row]) -> None:
    for i, state in enumerate(dict.fromkeys(x["state"] for x in lines)):
        own = sorted((x["t"], x["tokens/s"]) for x in lines if x["state"] == state)
        label = f"retention, {state}"
        axes.plot(*zip(*own, strict=True), "-", marker="o", color=f"C{i}", label=label)
    beside = sorted({(x["t"], x["tokens/s beside"]) for x in lines})
    if beside:
        axes.plot(*zip(*beside, strict=True), "--", marker="o", color="black", label="softmax")
        budget = lines[0]["budget"] / 2**30
        axes.set_title(f"the most that {budget:.4g} GiB of sequences give", fontsize=8)
    axes.set_ylabel("tokens a second")


def _first_tokens(axes: Any, first: list[Row]) -> None:
    def kind(row: Row) -> str:
        return ", ".join(x for x in (row["peer"], row["state"], row.get("note", "")) if x)

    for name in dict.fromkeys(kind(x) for x in first):
        points = sorted((x["t"], x["ms"] / 1e3) for x in first if kind(x) == name)
        line = "-" if name.startswith("retention") else "--"
        axes.plot(*zip(*points, strict=True), line, marker="o", label=name)
    axes.set_ylabel("seconds")
    axes.set_title("to the first token of one prompt", fontsize=8)
