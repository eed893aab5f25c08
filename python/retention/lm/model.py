"""A decoder-only language model over bytes, with power retention where attention would be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retention.lm import devices
from retention.lm.config import ModelConfig
from retention.lm.errors import UsageError
from retention.nn import PowerRetention, RetentionCache

VOCABULARY = 256  # a token is a byte


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, with gate and up in one product. [b, t, hidden] both ways."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Retention, then MLP, each normalised before and added to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_retention = nn.RMSNorm(config.hidden_size)
        self.retention = PowerRetention(
            config.hidden_size,
            config.heads,
            config.kv_heads,
            config.head_dim,
            deg=config.deg,
            chunk_size=config.chunk_size,
            rope_theta=config.rope_theta,
        )
        self.norm_mlp = nn.RMSNorm(config.hidden_size)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.retention(self.norm_retention(x))
        return x + self.mlp(self.norm_mlp(x))

    def step(self, x: Tensor, cache: RetentionCache) -> Tensor:
        out, _ = self.retention.step(self.norm_retention(x), cache)
        x = x + out
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Next-byte model. The output layer shares its weights with the embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self._initialise()

    def _initialise(self) -> None:
        # Products start at unit variance; what is added to the residual stream starts small enough
        # that its sum over all layers does too. The embedding is as small as the output layer it
        # doubles as wants it; the first norm undoes that.
        for name, parameter in self.named_parameters():
            if name.endswith("g_proj.weight"):
                nn.init.zeros_(parameter)  # the gate starts as its bias: the heads' memories
            elif parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down.weight")):
                    std *= (2 * len(self.blocks)) ** -0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[b, t, 256]` of the next byte, from bytes `[b, t]` int64."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def init_caches(self, batch_size: int, switch_over_seq_len: int) -> list[RetentionCache]:
        """Empty caches for `step`, one a layer, with rings of `switch_over_seq_len` tokens."""
        return [
            block.retention.init_cache(batch_size, switch_over_seq_len) for block in self.blocks
        ]

    @torch.no_grad()
    def step(self, tokens: Tensor, caches: list[RetentionCache]) -> Tensor:
        """Logits `[b, 256]` after the last of `tokens` `[b, t]`; the caches move on, in place."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, cache)
        return F.linear(self.norm(x[:, -1]), self.embedding.weight)


def new_model(config: ModelConfig) -> LanguageModel:
    """A model with fresh weights, on the CPU.

    Raises:
        UsageError: for sizes that make no model, or one for which there is no memory.
    """
    try:
        return LanguageModel(config)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UsageError(
            f"out of memory for a model of --layers {config.layers} and "
            f"--hidden-size {config.hidden_size}"
        ) from None
