"""Small models for the tests of `retention.transformers`, and what they should compute."""

from __future__ import annotations

import math
import os
from typing import Any

# Before the import of what would ask a server for names that it does not know.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

import retention
import retention.transformers as rt

# float64 on both sides: the order of a few hundred sums.
EXACT = {"rtol": 1e-9, "atol": 1e-9}

VOCABULARY = 61

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # logits that differ: greedy tokens are then no matter of rounding
}
KINDS = {
    "retention": (rt.RetentionConfig, {"head_dim": 16}),
    "no gates": (rt.RetentionConfig, {"gating": False}),
    "degree 4": (rt.RetentionConfig, {"degree": 4, "norm_type": "layer", "mlp_bias": True}),
    "mixed": (
        rt.RetentionConfig,
        {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "power_retention", "sliding_attention"],
            "sliding_window": 5,
            "attention_bias": True,
        },
    ),
    "brumby": (rt.BrumbyConfig, {"head_dim": 16}),
    "brumby, biases, tied": (
        rt.BrumbyConfig,
        {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "powercoder": (rt.PowerCoderConfig, {}),
    "powercoder, no biases, untied": (
        rt.PowerCoderConfig,
        {"use_bias": False, "tie_word_embeddings": False},
    ),
}


def make_config(kind: str = "retention", **more: Any) -> rt.RetentionConfig:
    cls, options = KINDS[kind]
    return cls(**{**SMALL, **options, **more})


def make_model(
    kind: str = "retention", dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any
) -> rt.RetentionForCausalLM:
    """With parameters at random, those of norms and biases too."""
    config = make_config(kind, **more)
    torch.manual_seed(seed)
    model = rt.RetentionForCausalLM(config).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "g_proj" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """None of them is 0, which is padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: Tensor, count: int) -> Tensor:
    """The tokens that follow, from whole forward passes without a cache."""
    ids = prompt
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def formula(
    weights: dict[str, Tensor], config: rt.RetentionConfig, ids: Tensor, blend: float | None = None
) -> Tensor:
    """Logits [b, t, vocabulary] of a checkpoint's tensors, by what SERVING models are defined as:
    float64, one layer after another, `retention.reference` for power retention."""
    w = {name: x.double() for name, x in weights.items()}
    d = config.head_dim
    blend = config.softmax_blend if blend is None else blend

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm_type == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def rotated(x: Tensor) -> Tensor:
        theta = config.rope_parameters["rope_theta"]
        # float32 numbers, as in all of transformers.
        frequency = (1 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)).double()
        angle = torch.arange(x.shape[1])[:, None, None] * frequency
        pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def softmax(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        ratio, t = q.shape[2] // k.shape[2], q.shape[1]
        k, v = k.repeat_interleave(ratio, 2), v.repeat_interleave(ratio, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d)
        age = torch.arange(t)[:, None] - torch.arange(t)
        hidden = (age < 0) | (age >= (window or t))
        weight = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weight, v)

    def act(x: Tensor) -> Tensor:
        if config.hidden_act == "silu":
            return x * x.sigmoid()
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(config.layer_types):
        layer = f"model.layers.{i}"
        y = norm(f"{layer}.input_layernorm", x)
        q, k, v = (linear(f"{layer}.self_attn.{n}_proj", y).unflatten(-1, (-1, d)) for n in "qkv")
        if config.qk_norm:
            q, k = norm(f"{layer}.self_attn.q_norm", q), norm(f"{layer}.self_attn.k_norm", k)
        q, k = rotated(q), rotated(k)
        kept = config.softmax_types[i] if kind == "power_retention" else kind
        window = config.sliding_window if kept == "sliding_attention" else None
        if kind == "power_retention":
            gate = linear(f"{layer}.self_attn.g_proj", y).sigmoid().log() if config.gating else None
            out = retention.reference(q, k, v, gate, deg=config.degree)
            if blend:
                out = (1 - blend) * out + blend * softmax(q, k, v, window)
        else:
            out = softmax(q, k, v, window)
        x = x + linear(f"{layer}.self_attn.o_proj", out.flatten(2))
        y = norm(f"{layer}.post_attention_layernorm", x)
        if config.mlp_type == "gated":
            up = act(linear(f"{layer}.mlp.gate_proj", y)) * linear(f"{layer}.mlp.up_proj", y)
            x = x + linear(f"{layer}.mlp.down_proj", up)
        else:
            x = x + linear(f"{layer}.mlp.c_proj", act(linear(f"{layer}.mlp.c_fc", y)))
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return norm("model.norm", x) @ head.mT
