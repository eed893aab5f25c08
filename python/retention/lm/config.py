"""What a run is: the model's shape and how it is trained, kept as JSON beside the checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from retention.lm.errors import UsageError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a `LanguageModel`. None means what it means to `retention.nn.PowerRetention`."""

    layers: int = 4
    hidden_size: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    deg: int = 2
    chunk_size: int | None = None
    rope_theta: float = 10000.0

    @property
    def mlp_size(self) -> int:
        """Inner width of the gated MLP: 8/3 of the hidden size, a multiple of 32."""
        return -(-self.hidden_size * 8 // 3 // 32) * 32

    @property
    def residual_gain(self) -> float:
        """Gain of what is added to the residual stream: its 2 * layers sums have unit variance."""
        return (2 * self.layers) ** -0.5


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. With a `ModelConfig` and the data's bytes it fixes every loss."""

    data: tuple[str, ...] | None = None  # absolute paths; None: Python's standard library
    steps: int = 1200
    batch_size: int = 8
    block_size: int = 256
    learning_rate: float = 3e-3
    min_learning_rate: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_every: int = 100
    eval_blocks: int = 128
    checkpoint_every: int = 100
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that a run folder's `config.json` holds."""

    model: ModelConfig
    train: TrainConfig
    # From `data.Corpus.summary`: what was read, so that a resumed run can tell that it changed.
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        parts = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(parts, indent=2) + "\n"


def run_config_from_json(text: str, source: Path) -> RunConfig:
    """The inverse of `RunConfig.to_json`; `source` is named where `text` is something else."""
    try:
        parts = json.loads(text)
        if parts["format"] != FORMAT:
            raise UsageError(f"{source}: expected format {FORMAT}, got {parts['format']}")
        train = dict(parts["train"])
        train["data"] = None if train["data"] is None else tuple(train["data"])
        return RunConfig(ModelConfig(**parts["model"]), TrainConfig(**train), parts["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{source}: not the configuration of a run ({error})") from None


def model_config_from_dict(parts: dict[str, Any], source: Path) -> ModelConfig:
    """A model's configuration as a checkpoint carries it."""
    try:
        return ModelConfig(**parts)
    except TypeError as error:
        raise UsageError(f"{source}: not the configuration of a model ({error})") from None
