"""One decoder for all configurations of this package, and its heads."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from retention.functional import power_retention
from retention.nn import GateProjection, Rotation, log_gates, rotate, rotation
from retention.ops.numerics import widest
from retention.transformers.cache import SlotCache
from retention.transformers.configuration import (
    RETENTION,
    SLIDING,
    BrumbyConfig,
    PowerCoderConfig,
    RetentionConfig,
)

# Of a layer's softmax attention the mask's name, where the layer blends with it: its keys are
# another layer's of the cache.
_BLENDED = "blended "

_old_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


class RetentionRMSNorm(nn.RMSNorm):
    """In the wider dtype of input and weight: under autocast projections give fewer bits than
    weights have, which PyTorch's own would take another way, and warn of."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)


def make_norm(config: RetentionConfig, size: int) -> nn.Module:
    kind = RetentionRMSNorm if config.norm_type == "rms" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


class RetentionRotaryEmbedding(nn.Module):
    """Of positions `[b, t]` cosines and sines for `retention.nn.rotate`."""

    inv_freq: Tensor  # [head_dim / 2] float32
    original_inv_freq: Tensor

    def __init__(self, config: RetentionConfig):
        super().__init__()
        self.config = config
        # What transformers' rotary embeddings that grow with the sequence read and write.
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        if self.rope_type == "default":
            frequencies, self.attention_scaling = self.compute_default_rope_parameters(config)
        else:
            frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: RetentionConfig, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """Frequencies, and what cosines and sines are multiplied by. transformers calls this too,
        for a model that was built without memory."""
        # In float32, from which trained models have them.
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        # At long positions a float32 product is off by a good part of a turn.
        exact = widest(x.device)
        angles = position_ids[..., None].to(exact) * self.inv_freq.to(x.device, exact)
        angles = torch.remainder(angles, 2 * torch.pi)
        cos, sin = rotation(angles, torch.promote_types(x.dtype, torch.float32))
        return cos * self.attention_scaling, sin * self.attention_scaling


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: RetentionConfig):
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias)
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """`c_proj(act(c_fc(x)))`."""

    def __init__(self, config: RetentionConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in the open, for `attn_implementation="eager"`, which shows its weights.

    Args:
        query: `[b, hq, t, d]`.
        key, value: `[b, h, n, d]`.
        attention_mask: `[b, 1, t, n]`, added to the scores.

    Returns:
        `[b, t, hq, d]` and the weights `[b, hq, t, n]`.
    """
    ratio = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(ratio, dim=1), value.repeat_interleave(ratio, dim=1)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = F.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class RetentionAttention(nn.Module):
    """A layer's power retention or softmax attention, or while a model is converted both, with its
    projections: modules of these names, which are called, and whose weights are not read."""

    def __init__(self, config: RetentionConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.head_dim = config.head_dim
        retains = self.layer_type == RETENTION
        softmax_type = config.softmax_types[layer_idx] if retains else self.layer_type
        # These four are what transformers' attention functions look for.
        self.is_causal = True
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window if softmax_type == SLIDING else None

        width = config.hidden_size
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_out_bias)
        self.g_proj = (
            GateProjection(width, config.num_key_value_heads, bias=config.gate_bias)
            if retains and config.gating
            else None
        )
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        softmax_mask: Tensor | None = None,
        sequence_starts: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer's tokens read of each other and, from a cache, of those before.

        Args:
            hidden_states: `[b, t, hidden_size]`.
            position_embeddings: of `RetentionRotaryEmbedding`.
            attention_mask: `[b, t]`, 0 where a row is padded, for power retention.
            softmax_mask: as transformers makes it for the attention that is configured.
            sequence_starts: bool `[b, t]`, where packed sequences start, if `cu_seq_lens_q` is not
                given, which says the same.
            cache: of transformers, or a `SlotCache`; changed in place.
            cu_seq_lens_q: int32 `[n + 1]`, where packed sequences, b = 1, begin and end.

        Returns:
            `[b, t, hidden_size]`, and the weights of softmax attention where that gives them.
        """
        heads = (-1, self.head_dim)  # of a tensor-parallel model's there are fewer here
        query = self.q_proj(hidden_states).unflatten(-1, heads)  # [b, t, hq, d]
        key = self.k_proj(hidden_states).unflatten(-1, heads)  # [b, t, h, d]
        value = self.v_proj(hidden_states).unflatten(-1, heads)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        # Under autocast a norm may give more bits than a projection.
        query = rotate(query, position_embeddings).to(value.dtype)
        key = rotate(key, position_embeddings).to(value.dtype)

        weights = keys_and_values = None
        blend = self.config.softmax_blend if self.layer_type == RETENTION else 1
        if self.layer_type == RETENTION:
            out, keys_and_values = self._retain(
                hidden_states, query, key, value, attention_mask, sequence_starts, cache, **kwargs
            )
        elif cache is not None:
            keys_and_values = cache.update(
                key.transpose(1, 2), value.transpose(1, 2), self.layer_idx
            )
        if blend:
            if keys_and_values is None:
                keys_and_values = key.transpose(1, 2), value.transpose(1, 2)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention
            )
            softmax, weights = attend(
                self,
                query.transpose(1, 2),
                *keys_and_values,
                softmax_mask,
                dropout=self.config.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
            out = softmax if self.layer_type != RETENTION else out.lerp(softmax, blend)
        return self.o_proj(out.flatten(2)), weights

    def _retain(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sequence_starts: Tensor | None,
        cache: Cache | None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What queries read, [b, t, hq, d]; and keys and values for a blend, of a cache's."""
        gate = None if self.g_proj is None else log_gates(self.g_proj, hidden_states)  # [b, t, h]
        if attention_mask is not None:
            # A token without a key and without a decay leaves no trace.
            padding = (attention_mask == 0)[..., None]
            key = key.masked_fill(padding[..., None], 0)
            gate = gate if gate is None else gate.masked_fill(padding, 0)
        if sequence_starts is not None:
            if gate is None:
                wide = torch.promote_types(key.dtype, torch.float32)
                gate = key.new_zeros(key.shape[:3], dtype=wide)
            # A gate of -inf ends what came before.
            gate = gate.masked_fill(sequence_starts[..., None], -torch.inf)
        if cache is None:
            degree = self.config.degree
            out = power_retention(query, key, value, gate, deg=degree, cu_seqlens=cu_seq_lens_q)
            return cast(Tensor, out), None
        return cache.update(
            key,
            value,
            self.layer_idx,
            query_states=query,
            log_gates=gate,
            degree=self.config.degree,
            cu_seqlens=cu_seq_lens_q,
            blend=self.config.softmax_blend > 0,
        )


class RetentionDecoderLayer(GradientCheckpointingLayer):
    """Retention or attention, then MLP, each normalised before and added to its input."""

    def __init__(self, config: RetentionConfig, layer_idx: int):
        super().__init__()
        self.self_attn = RetentionAttention(config, layer_idx)
        self.mlp = GatedMLP(config) if config.mlp_type == "gated" else PlainMLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.dropout = config.residual_dropout

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(out, self.dropout, self.training)


class RetentionPreTrainedModel(PreTrainedModel):
    config_class = RetentionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetentionDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = False  # drafts can be taken back
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": RetentionDecoderLayer,
        "attentions": RetentionAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GateProjection) and module.bias is not None:
            # Built without memory, a module loses what its constructor had set.
            initialization.copy_(module.bias, module.initial_bias())


class RetentionModel(RetentionPreTrainedModel):
    """The decoder without a head, of any configuration of this package."""

    def __init__(self, config: RetentionConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [RetentionDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = RetentionRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last layer's hidden states `[b, t, hidden_size]`, normalised, and the cache.

        Args:
            input_ids: `[b, t]`; or `inputs_embeds` `[b, t, hidden_size]`.
            attention_mask: `[b, n]`, n at least t, 0 where a row is padded, on either side, of
                which the last t are those of the tokens. Default: no padding.
            position_ids: `[b, t]` or `[1, t]`. Default: they go on from what the cache has seen.
                Without a mask and a cache, a sequence starts wherever they do not go on by 1: so
                packed sequences are told apart.
            cache: of transformers, or a `SlotCache`; changed in place.
            use_cache: whether to make a `DynamicCache` where there is none; packed sequences, and a
                model that trains, have none. Default: the configuration's.
            cu_seq_lens_q: int32 `[n + 1]`, where packed sequences, b = 1, begin and end.

        Raises:
            ValueError: for arguments that contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected these or inputs_embeds, got both or neither")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        self._check(inputs_embeds, attention_mask, cache, cu_seqlens)
        starts = None
        if cache is None and cu_seqlens is None and attention_mask is None:
            starts = _sequence_starts(position_ids, inputs_embeds)
        trains = self.training and torch.is_grad_enabled()
        if use_cache and cache is None and not trains and starts is None and cu_seqlens is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, cache, cu_seqlens)
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = self.create_masks_for_generate(
                self.config, inputs_embeds, attention_mask, cache, position_ids
            )

        hidden_states = F.dropout(inputs_embeds, self.config.embedding_dropout, self.training)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[RETENTION],
                softmax_mask=masks.get(_softmax_mask(self.config, i)),
                sequence_starts=starts,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None
        )

    @staticmethod
    def _check(
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask: expected [b, t], 0 where a row is padded, since power retention "
                f"has no mask of pairs, got {list(attention_mask.shape)}"
            )
        slots = isinstance(cache, SlotCache)
        if slots and attention_mask is not None:
            raise ValueError(
                "attention_mask: expected None with a SlotCache, whose rows are of one length, or "
                "packed with cu_seq_lens_q, got a mask"
            )
        if cu_seqlens is None:
            return
        if inputs_embeds.shape[0] != 1 or attention_mask is not None:
            raise ValueError(
                "cu_seq_lens_q: expected one row of packed sequences without an attention_mask, "
                f"got {inputs_embeds.shape[0]} rows"
                + ("" if attention_mask is None else " and a mask")
            )
        if cache is not None and not slots:
            raise ValueError(
                "cache: expected a SlotCache or none with cu_seq_lens_q, got a "
                f"{type(cache).__name__}, whose rows are whole"
            )

    @staticmethod
    def create_masks_for_generate(
        config: RetentionConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """A mask for every kind of attention that layers have. transformers' generate() asks for
        them where it compiles steps, so that they are made outside."""
        arguments = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "cache": cache,
            "position_ids": position_ids,
        }
        masks = {RETENTION: create_recurrent_attention_mask(**arguments)}
        for i in range(config.num_hidden_layers):
            name = _softmax_mask(config, i)
            if name is not None and name not in masks:
                sliding = name.endswith(SLIDING)
                make = create_sliding_window_causal_mask if sliding else create_causal_mask
                masks[name] = make(**arguments, layer_idx=i)
        return masks


def _softmax_mask(config: RetentionConfig, layer: int) -> str | None:
    """The name of the mask of a layer's softmax attention; None where it has none."""
    if config.layer_types[layer] != RETENTION:
        return config.layer_types[layer]
    return _BLENDED + config.softmax_types[layer] if config.softmax_blend else None


def _sequence_starts(position_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """Where sequences that are packed in rows start, bool [b, t]; None where there is one a row."""
    if position_ids is None:
        return None
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    if not torch.compiler.is_compiling() and not starts.any():
        return None
    return starts.expand(inputs_embeds.shape[:2])


def _positions(inputs_embeds: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where tokens are that nobody said it of: [b, t] or [1, t]."""
    place = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(place.device)
        row = torch.searchsorted(bounds[1:], place.to(bounds.dtype), right=True)
        row = row.clamp(max=len(bounds) - 2)  # tokens behind the last sequence are nobody's
        seen = cache.positions[row] if isinstance(cache, SlotCache) else 0
        return (place - bounds[row] + seen)[None]
    if isinstance(cache, SlotCache):
        return cache.positions[:, None] + place
    return place[None] + (0 if cache is None else cache.get_seq_length())


class RetentionForCausalLM(RetentionPreTrainedModel, GenerationMixin):
    """The decoder with a language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: RetentionConfig):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(*arguments: Any, **named: Any) -> dict[str, Tensor | None]:
        """As the decoder's."""
        return RetentionModel.create_masks_for_generate(*arguments, **named)

    @_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[b, t, vocab_size]`, and of `labels` `[b, t]` the loss of each next token, -100
        for those that do not count. All other arguments are those of `RetentionModel`.

        Args:
            logits_to_keep: how many last tokens to have logits of; 0 for all; or their places.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RetentionForSequenceClassification(
    GenericForSequenceClassification, RetentionPreTrainedModel
):
    """A class for each sequence, read from its last token."""


class RetentionForTokenClassification(GenericForTokenClassification, RetentionPreTrainedModel):
    """A class for each token."""


# The same classes for the two published families: a checkpoint names its own, and each knows its
# configuration.


class BrumbyModel(RetentionModel):
    config_class = BrumbyConfig


class BrumbyForCausalLM(RetentionForCausalLM):
    config_class = BrumbyConfig


class BrumbyForSequenceClassification(RetentionForSequenceClassification):
    config_class = BrumbyConfig


class BrumbyForTokenClassification(RetentionForTokenClassification):
    config_class = BrumbyConfig


class PowerCoderModel(RetentionModel):
    config_class = PowerCoderConfig


class PowerCoderForCausalLM(RetentionForCausalLM):
    config_class = PowerCoderConfig


class PowerCoderForSequenceClassification(RetentionForSequenceClassification):
    config_class = PowerCoderConfig


class PowerCoderForTokenClassification(RetentionForTokenClassification):
    config_class = PowerCoderConfig


_HEADS = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
for _kind, *_models in (
    (
        RetentionConfig,
        *(RetentionModel, RetentionForCausalLM),
        *(RetentionForSequenceClassification, RetentionForTokenClassification),
    ),
    (
        BrumbyConfig,
        *(BrumbyModel, BrumbyForCausalLM),
        *(BrumbyForSequenceClassification, BrumbyForTokenClassification),
    ),
    (
        PowerCoderConfig,
        *(PowerCoderModel, PowerCoderForCausalLM),
        *(PowerCoderForSequenceClassification, PowerCoderForTokenClassification),
    ),
):
    AutoConfig.register(_kind.model_type, _kind, exist_ok=True)
    for _auto, _model in zip(_HEADS, _models, strict=True):
        _auto.register(_kind, _model, exist_ok=True)
