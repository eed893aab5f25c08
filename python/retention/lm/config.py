"""What a run is: the model's shape and how it is trained, kept as JSON beside the checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from retention.lm import files
from retention.lm.errors import UsageError

FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 2**63 - 1  # of an integer: what PyTorch takes as a size or a seed

_Config = TypeVar("_Config", "ModelConfig", "TrainConfig")


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
        parts = files.parse_json(text)
        check_type("a run", parts, dict)
        if "format" in parts and parts["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {parts['format']!r:.40}")
        check_fields("a run", parts, {"format", "model", "train", "data"})
        check_type("data", parts["data"], dict)
        check_fields("data", parts["data"], {"sha256"}, more=True)
        check_type("data: sha256", parts["data"]["sha256"], str)
        model = config_from_dict(ModelConfig, parts["model"])
        return RunConfig(model, config_from_dict(TrainConfig, parts["train"]), parts["data"])
    except ValueError as error:
        raise UsageError(f"{source}: not the configuration of a run ({error})") from None


def config_from_dict(kind: type[_Config], parts: Any) -> _Config:
    """A `ModelConfig` or `TrainConfig` from what `dataclasses.asdict` made of it and JSON kept.

    Raises:
        ValueError: for another set of fields, a value of another type, or one out of its range.
    """
    check_type(kind.__name__, parts, dict)
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    check_fields(kind.__name__, parts, set(fields))
    values = {name: _checked(name, fields[name], value) for name, value in parts.items()}
    return kind(**values)


def check_fields(what: str, parts: dict[str, Any], names: set[str], more: bool = False) -> None:
    """Raise ValueError unless `parts` has exactly these names, or these and more."""
    if missing := names - parts.keys():
        raise ValueError(f"{what}: missing {', '.join(sorted(missing))}")
    if not more and (unknown := parts.keys() - names):
        raise ValueError(f"{what}: unknown {', '.join(sorted(unknown))}"[:200])


def check_type(what: str, value: object, *kinds: type) -> None:
    """Raise ValueError unless `value` is of one of these types itself: True is no integer."""
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{what}: expected {wanted}, got {type(value).__name__}")


def check_number(what: str, value: Any, *kinds: type, least: float = 0) -> None:
    """Raise ValueError unless `value` is a finite number of one of these types, `least` or more."""
    check_type(what, value, *kinds)
    if not least <= value < (math.inf if type(value) is float else LARGEST + 1):
        raise ValueError(f"{what}: expected a number of at least {least}, got {value!r:.40}")


# The numbers that may be 0.
_MAY_BE_0 = {"warmup", "seed", "min_learning_rate", "weight_decay"}


def _checked(name: str, kind: str, value: Any) -> Any:
    """`value`, whose field has the annotation `kind`."""
    kind, _, optional = kind.partition(" | ")
    if optional and value is None:
        return None
    if kind == "tuple[str, ...]":
        check_type(name, value, list, tuple)
        for item in value:
            check_type(name, item, str)
        return tuple(value)
    if kind == "bool":
        check_type(name, value, bool)
    elif kind == "str":
        check_type(name, value, str)
        if name == "dtype" and value not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {value!r:.40}")
    else:
        check_number(name, value, *((int,) if kind == "int" else (int, float)))
        if value == 0 and name not in _MAY_BE_0:
            raise ValueError(f"{name}: expected a number above 0, got 0")
    return value
