"""A decoder-only language model over bytes, with power retention where attention would be."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retention.cache import RetentionCache
from retention.lm import devices
from retention.lm.config import ModelConfig
from retention.lm.errors import UsageError
from retention.nn import GateProjection, PowerRetention, Rotation, all_or_nothing

VOCABULARY = 256  # a token is a byte


# Every module draws its own parameters, so that `reset_parameters` of all `modules()`, in any order
# and on any device, makes a new model.


class Linear(nn.Linear):
    """Without bias. `gain` is the standard deviation of its output where its input's is 1."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0):
        self.gain = gain
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)


class Gate(GateProjection):
    """A gate that starts as its bias: the heads' memories."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class ByteEmbedding(nn.Embedding):
    """Vectors of bytes and, of vectors, the logits of bytes: both layers share their weights.

    `[b, t]` int64 to `[b, t, hidden]`, and `[..., hidden]` to `[..., 256]`.
    """

    def __init__(self, hidden_size: int):
        super().__init__(VOCABULARY, hidden_size)

    def reset_parameters(self) -> None:
        # As small as the output layer wants it; the first norm undoes that.
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Retention(PowerRetention):
    """`PowerRetention` that starts as the model's other layers do."""

    def __init__(self, config: ModelConfig):
        super().__init__(
            config.hidden_size,
            config.heads,
            config.kv_heads,
            config.head_dim,
            deg=config.deg,
            chunk_size=config.chunk_size,
            rope_theta=config.rope_theta,
        )
        self.q_proj = Linear(config.hidden_size, self.q_proj.out_features)
        self.k_proj = Linear(config.hidden_size, self.k_proj.out_features)
        self.v_proj = Linear(config.hidden_size, self.v_proj.out_features)
        self.g_proj = Gate(config.hidden_size, self.num_kv_heads)
        self.o_proj = Linear(self.o_proj.in_features, config.hidden_size, config.residual_gain)
        self.qkv_proj: Linear | None = None  # of `fuse`

    def fuse(self) -> None:
        """Queries, keys and values come of one product from now on, for steps of few tokens."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        self.qkv_proj = Linear(self.hidden_size, sum(part.out_features for part in parts))
        self.qkv_proj.weight = nn.Parameter(torch.cat([part.weight for part in parts]).detach())
        self.q_proj = self.k_proj = self.v_proj = None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.qkv_proj is None:
            return super()._project(x)
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = heads.split(sizes, dim=2)
        return query, key, value, self._log_gate(x)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, with gate and up in one product. [b, t, hidden] both ways."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.mlp_size)
        self.down = Linear(config.mlp_size, config.hidden_size, config.residual_gain)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Retention, then MLP, each normalised before and added to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_retention = nn.RMSNorm(config.hidden_size)
        self.retention = Retention(config)
        self.norm_mlp = nn.RMSNorm(config.hidden_size)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, share_start: int | None = None) -> Tensor:
        x = x + self.retention(self.norm_retention(x), share_start=share_start)
        return x + self.mlp(self.norm_mlp(x))

    def step(
        self,
        x: Tensor,
        cache: RetentionCache,
        slots: Tensor | None,
        attention_mask: Tensor | None,
        rotation: Rotation | None,
    ) -> Tensor:
        normed = self.norm_retention(x)
        out, _ = self.retention.step(normed, cache, slots, attention_mask, rotation)
        x = x + out
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Next-byte model. The output layer shares its weights with the embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        blocks = [Block(config) for _ in range(config.layers)]  # raises for sizes that make none
        self.embedding = ByteEmbedding(config.hidden_size)
        self.blocks: Any = nn.ModuleList(blocks)  # whose type has no room for that of a block
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, tokens: Tensor, share_start: int | None = None) -> Tensor:
        """Logits `[b, t, 256]` of the next byte, from bytes `[b, t]` int64.

        `share_start` is where they begin in sequences that processes share, as
        `PowerRetention.forward` has it.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, share_start)
        return self.embedding(self.norm(x))

    def init_caches(
        self, batch_size: int, switch_over_seq_len: int | None = None
    ) -> list[RetentionCache]:
        """Empty caches for `step`, one a layer, that fold `switch_over_seq_len` tokens at a
        time. Default: as `PowerRetention.init_cache` has it."""
        return [
            block.retention.init_cache(batch_size, switch_over_seq_len) for block in self.blocks
        ]

    @torch.no_grad()
    def step(
        self,
        tokens: Tensor,
        caches: list[RetentionCache],
        slots: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits after the last token of each row; the caches move on, in place.

        They move on together, and where one layer raises, none does: see `all_or_nothing`.

        Args:
            tokens: bytes `[b, t]` int64.
            caches: of `init_caches`.
            slots: int32 `[b]`, where the caches have each row's sequence; -1 for a row that is
                none. Default: row i is slot i, of caches with b slots.
            attention_mask: `[b, t]`, bool or integers, 0 where a row is padded, on either side.
                Default: no padding.

        Returns:
            `[b, 256]`. Of a row that is none, or all padding, they mean nothing.

        Raises:
            TypeError, ValueError: what `PowerRetention.step` rejects.
        """
        with all_or_nothing(caches):
            x = self.embedding(tokens)
            # All layers have the same positions.
            rotation = self.blocks[0].retention.rotation(x, caches[0], slots, attention_mask)
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block.step(x, cache, slots, attention_mask, rotation)
            return self.embedding(self.norm(_last(x, attention_mask)))

    def for_decoding(self, dtype: torch.dtype) -> LanguageModel:
        """A copy that makes steps of few tokens, under autocast to `dtype`, from fewer operations.

        It gives what this one gives up to rounding, and makes no caches. Matrices are rounded once,
        which autocast does at every step; those of gates and of the embedding, which are read in
        float32 too, are as they were.
        """
        model = copy.deepcopy(self)
        for module in model.modules():
            if isinstance(module, Retention):
                module.fuse()
        if dtype != torch.float32:
            for module in model.modules():
                if isinstance(module, Linear):
                    module.to(dtype)
        return model


def _last(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Of x `[b, t, hidden]` that of each row's last token: `[b, hidden]`."""
    if attention_mask is None:
        return x[:, -1]
    place = torch.arange(x.shape[1], device=x.device)
    last = torch.where(attention_mask != 0, place, 0).amax(1)
    return x[torch.arange(x.shape[0], device=x.device), last]


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
