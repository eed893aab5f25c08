"""The loss curve."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def loss_curve(records: list[dict[str, Any]], byte_frequency_loss: float) -> bytes:
    """A PNG of the training and validation losses in `records`, over the steps.

    The dashed line is what byte frequencies alone would reach on the held-out data: what the model
    gains is the distance to it.
    """
    train = [(x["step"], x["train_loss"]) for x in records if "train_loss" in x]
    validation = [(x["step"], x["validation_loss"]) for x in records if "validation_loss" in x]
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, lw=0.8, label="training")
    if validation:
        label = f"held-out files ({validation[-1][1]:.2f})"
        axes.plot(*zip(*validation, strict=True), color="tab:red", marker="o", ms=3, label=label)
    label = f"byte frequencies ({byte_frequency_loss:.2f})"
    axes.axhline(byte_frequency_loss, color="0.35", ls="--", lw=1, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a byte)", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
