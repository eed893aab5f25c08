"""Models that serving is measured with: of power retention, and of softmax attention beside it.

Weights are random, made where they are to be. transformers is imported when a model is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from retention.lm.errors import UsageError

MODELS = ("powercoder", "brumby", "small")

# Sizes with which a CPU takes a step in a millisecond.
_SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# What both models have alike.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "tie_word_embeddings"),
)
_NEEDS = ("transformers", "safetensors")
_MOST_WEIGHTS = 0.7  # of a device's free memory, unless layers are asked for


def check_installed() -> None:
    """Raises UsageError where a package is missing that serving needs, or too old."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"serving: needs {' and '.join(missing)}, not installed here: pip install "
            "'power-retention[bench,serve]'"
        )
    try:
        importlib.import_module("retention.transformers")
    except ImportError as error:
        raise UsageError(f"serving: {error}") from None


@dataclass(frozen=True)
class Pair:
    """Two models of the same sizes, but for gates.

    Attributes:
        name: one of `MODELS`.
        layers: of both.
        whole: layers that the model has where none are left out.
        retention, softmax: configurations.
    """

    name: str
    layers: int
    whole: int
    retention: Any
    softmax: Any

    @property
    def note(self) -> str:
        return "" if self.layers == self.whole else f"{self.layers} of {self.whole} layers"

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of the larger of the two, of which nothing is allocated."""
        models = (build(config, "meta", dtype) for config in (self.retention, self.softmax))
        return max(parameter_bytes(model) for model in models)


def configurations(name: str, layers: int | None) -> Pair:
    """The models of a name, with so many of their layers, or all by default.

    Raises:
        UsageError: for more layers than there are.
    """
    from transformers import Qwen3Config, Starcoder2Config

    from retention.transformers import BrumbyConfig, PowerCoderConfig

    ours, theirs = {
        "powercoder": (PowerCoderConfig, Starcoder2Config),
        "brumby": (BrumbyConfig, Qwen3Config),
        "small": (BrumbyConfig, Qwen3Config),
    }[name]
    sizes = _SMALL if name == "small" else {}
    whole = ours(**sizes).num_hidden_layers
    if layers is not None and layers > whole:
        raise UsageError(f"--layers: expected at most the {whole} of {name}, got {layers}")
    config = ours(**{**sizes, "num_hidden_layers": layers or whole})
    shared = {key: getattr(config, key) for key in _SHARED}
    shared |= {"bos_token_id": None, "eos_token_id": None}  # nothing begins or ends here
    if theirs is Starcoder2Config:  # its heads' channels are those of the hidden size
        shared |= {"norm_epsilon": config.norm_eps, "use_bias": config.use_bias}
    else:
        shared |= {"rms_norm_eps": config.norm_eps, "head_dim": config.head_dim}
    return Pair(name, layers or whole, whole, config, theirs(**shared))


def fitting(name: str, layers: int | None, dtype: torch.dtype, free: int | None) -> Pair:
    """Likewise; where it is not said how many layers, as many as fit.

    Args:
        name, layers: as `configurations` has them.
        dtype: of weights.
        free: bytes that are free on the device; None: all layers fit.

    Raises:
        UsageError: for more layers than there are, and where not even one fits.
    """
    pair = configurations(name, layers)
    room = None if free is None else _MOST_WEIGHTS * free
    if layers is not None or room is None or pair.weight_bytes(dtype) <= room:
        return pair
    one, two = (configurations(name, count).weight_bytes(dtype) for count in (1, 2))
    if one > room:
        raise UsageError(
            f"--model: {name} takes {one:,} bytes with one layer, and {free:,} are free"
        )
    return configurations(name, 1 + int((room - one) // (two - one)))


def build(config: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A model with random weights, which are drawn on the device itself."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def parameter_bytes(model: Any) -> int:
    """Of all weights; those that two layers share once."""
    return sum(x.nbytes for x in model.parameters())


def read_bytes(model: Any) -> int:
    """Of the weights that a step reads: all, but of embeddings that are no output layer a few
    rows."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embeddings.weight is output.weight
    return parameter_bytes(model) - (0 if tied else embeddings.weight.nbytes)
