"""Transformers of softmax attention made into models of power retention."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from retention.nn import GateProjection
from retention.ops import checks
from retention.transformers.configuration import FULL, RETENTION, SLIDING, RetentionConfig
from retention.transformers.modeling import RetentionForCausalLM, RetentionRotaryEmbedding

_SOURCES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Starcoder2")
# What configurations have in common, by name.
_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "use_cache", "tie_word_embeddings", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# Files of a checkpoint that are made anew; tokenizers and all others are copied.
_WRITTEN = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*.py",
)


def convert(
    model: Any,
    layers: Iterable[int] | None = None,
    gating: bool = True,
    blend: float = 1.0,
) -> RetentionForCausalLM:
    """Power retention in place of a model's attention, which it starts from.

    Embeddings, projections, norms and MLPs are the given model's own modules, whatever wraps them,
    and its rotary embedding goes on; each head gets a gate beside them, `g_proj`, which starts with
    a memory of its own, from 4096 tokens to 16, whatever the token. With a `blend` of 1 the model
    computes what it was; `BlendSchedule` takes it down to 0 while it is trained, where softmax
    attention is no longer computed.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3 or StarCoder2 for causal language modelling. Its
            modules belong to the result afterwards.
        layers: numbers of the layers to convert, counted from 0; the others keep their attention.
            Default: all.
        gating: whether heads forget. Default: True.
        blend: how much of the converted layers' output is softmax attention's. Default: 1.

    Returns:
        A model of type ``retention``, in the same mode, on the same device, of the same dtype.

    Raises:
        TypeError: for another kind of model.
        ValueError: for layers that there are not, a `blend` outside of 0 to 1, and a model whose
            heads or rotary embedding are none that power retention has.
    """
    kinds: Any = tuple(getattr(transformers, f"{name}ForCausalLM") for name in _SOURCES)
    if not isinstance(model, kinds):
        raise TypeError(
            f"model: expected a {' or '.join(_SOURCES)}, for causal language modelling, got "
            f"{checks.describe(model)}"
        )
    _check_blend(blend)
    config = _configuration(model, layers, gating, blend)
    with torch.device("meta"):
        converted = RetentionForCausalLM(config)
    for name, module in list(converted.named_modules()):
        if next(module.parameters(recurse=False), None) is None:
            continue
        if isinstance(module, GateProjection):
            key = model.get_submodule(name.replace("g_proj", "k_proj"))
            module = _gate(module, key)
        else:
            module = model.get_submodule(name)
        converted.set_submodule(name, module)
    device = converted.model.embed_tokens.weight.device
    converted.model.rotary_emb = RetentionRotaryEmbedding(config).to(device)
    converted.generation_config = copy.deepcopy(model.generation_config)
    if model.is_activation_checkpointing:
        converted.activation_checkpointing_enable()
    return converted.train(model.training)


def _configuration(
    model: transformers.PreTrainedModel, layers: Iterable[int] | None, gating: bool, blend: float
) -> RetentionConfig:
    """That of the converted model."""
    source = model.config
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    count = source.num_hidden_layers
    chosen = set(range(count) if layers is None else layers)
    for layer in chosen:
        if not isinstance(layer, int) or not 0 <= layer < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer!r}")
    rope = copy.deepcopy(source.rope_parameters)
    if "rope_theta" not in rope or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"model: expected one rotary embedding of all channels of a head, got {rope}"
        )
    window = getattr(source, "sliding_window", None)
    types = getattr(source, "layer_types", None) or [FULL if window is None else SLIDING] * count
    options: dict[str, Any] = {name: getattr(source, name) for name in _COMMON}
    options |= {
        "head_dim": attention.head_dim,
        "layer_types": [RETENTION if i in chosen else kind for i, kind in enumerate(types)],
        "softmax_types": types,
        "softmax_blend": blend,
        "sliding_window": window,
        "gating": gating,
        "attention_bias": attention.q_proj.bias is not None,
        "attention_out_bias": attention.o_proj.bias is not None,
        "qk_norm": hasattr(attention, "q_norm"),
        "norm_type": "layer" if isinstance(model.model.norm, nn.LayerNorm) else "rms",
        "norm_eps": getattr(source, "rms_norm_eps", None) or source.norm_epsilon,
        "mlp_type": "gated" if hasattr(mlp, "gate_proj") else "plain",
        "mlp_bias": (mlp.down_proj if hasattr(mlp, "down_proj") else mlp.c_proj).bias is not None,
        "rope_parameters": rope,
        "residual_dropout": getattr(source, "residual_dropout", 0.0),
        "embedding_dropout": getattr(source, "embedding_dropout", 0.0),
        "dtype": model.dtype,
    }
    try:
        return RetentionConfig(**options, attn_implementation=source._attn_implementation)
    except StrictDataclassError as error:
        raise ValueError(f"model: {error.__cause__}") from None


def _gate(planned: GateProjection, key: nn.Module) -> GateProjection:
    """Beside a key projection, on its device, and of a dtype that can be trained."""
    like = next(key.parameters())
    dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
    gate = GateProjection(
        planned.in_features, planned.out_features, device=like.device, dtype=dtype
    )
    nn.init.zeros_(gate.weight)
    return gate


def set_blend(model: nn.Module, blend: float) -> None:
    """How much of a converted model's output is softmax attention's from now on.

    Args:
        model: of `convert`, or what wraps it.
        blend: from 1, softmax attention, to 0, power retention alone.

    Raises:
        TypeError: for a model without a `retention.transformers.RetentionConfig`.
        ValueError: for a blend outside of 0 to 1.
    """
    configs = [m.config for m in model.modules() if isinstance(m, RetentionForCausalLM)]
    if not configs:
        raise TypeError(f"model: expected one of convert(), got {checks.describe(model)}")
    _check_blend(blend)
    for config in configs:
        config.softmax_blend = blend


def _check_blend(blend: float) -> None:
    if not 0 <= blend <= 1:
        raise ValueError(f"blend: expected 0 to 1, got {blend}")


class BlendSchedule(transformers.TrainerCallback):
    """Takes a converted model from softmax attention to power retention while `Trainer` trains it.

    Args:
        share: the part of all steps in which the blend falls from 1 to 0, in a straight line; the
            rest trains power retention alone. Above 0 and at most 1. Default: 0.5.

    Raises:
        ValueError: for another share.
    """

    def __init__(self, share: float = 0.5):
        if not 0 < share <= 1:
            raise ValueError(f"share: expected more than 0 and at most 1, got {share}")
        self.share = share

    def blend(self, step: int, steps: int) -> float:
        """In step ``step`` of ``steps``, counted from 0."""
        return max(0.0, 1.0 - step / max(1.0, self.share * steps))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_blend(kwargs["model"], self.blend(state.global_step, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is saved afterwards is the model as it will be used.
        set_blend(kwargs["model"], self.blend(state.global_step, state.max_steps))


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    layers: Iterable[int] | None = None,
    gating: bool = True,
    blend: float = 1.0,
) -> RetentionForCausalLM:
    """`convert` from one folder to another, with its tokenizer and whatever else lies there.

    Args:
        source: a folder that `transformers.AutoModelForCausalLM` loads.
        out: a folder that is not there yet, or is empty. Either all of it is written or nothing.
        layers, gating, blend: as in `convert`.

    Returns:
        The model that was written, as ``AutoModelForCausalLM.from_pretrained(out)`` loads it.

    Raises:
        FileExistsError: for an `out` that has something in it.
        OSError: where files cannot be read or written.
        TypeError, ValueError: as in `convert`.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"source: expected a folder with a config.json, got {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: expected a folder that is not there yet, got {out}")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    converted = convert(model, layers, gating, blend)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        unfinished = Path(folder) / out.name
        converted.save_pretrained(unfinished)
        for path in source.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in _WRITTEN):
                shutil.copy2(path, unfinished)
        unfinished.replace(out)  # an empty folder gives way
    return converted
