"""Configurations: of new models, and of the two published families.

All three describe the same decoder, in the same names. What differs is where they start, and which
keys of published files they read.
"""

# Annotations stay what they are: `strict` checks values against them.

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

from retention.ops.symmetric_power import state_dim

RETENTION = "power_retention"
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (RETENTION, FULL, SLIDING)


@strict
class RetentionConfig(transformers.PreTrainedConfig):
    """A decoder-only model of power retention, in which layers of softmax attention may be mixed.

    Args:
        vocab_size: tokens known. Default: 32000.
        hidden_size: width of the residual stream. Default: 1024.
        intermediate_size: width of the MLPs. Default: 2816.
        num_hidden_layers: default 12.
        num_attention_heads: query heads. Default: 16.
        num_key_value_heads: key and value heads, a divisor of the query heads. Default: as many.
        head_dim: channels a head, a multiple of 8. Default: ``hidden_size / num_attention_heads``.
        layer_types: of each layer ``power_retention``, ``full_attention`` or ``sliding_attention``.
            Default: power retention in all of them.
        degree: the power, positive and even. Default: 2.
        gating: whether heads of power retention forget. Default: True.
        gate_bias: whether gates have biases. Default: True.
        attention_bias: whether queries, keys and values have biases. Default: False.
        attention_out_bias: whether what attention and retention give has one. Default: False.
        qk_norm: whether each head's queries and keys are normalised before they are rotated.
            Default: False.
        norm_type: ``rms`` or ``layer`` (with biases). Default: ``rms``.
        norm_eps: default 1e-6.
        mlp_type: ``gated``, ``down(act(gate(x)) * up(x))``, or ``plain``,
            ``c_proj(act(c_fc(x)))``. Default: ``gated``.
        mlp_bias: whether the MLP's projections have biases. Default: False.
        hidden_act: of the MLP, as transformers names it. Default: ``silu``.
        max_position_embeddings: the context that the model was trained with, which some rotary
            embeddings scale by. It limits nothing. Default: 32768.
        rope_parameters: of the rotary embedding, as transformers has them: ``rope_theta``,
            ``rope_type`` and what that takes. Default: theta 10000.
        sliding_window: tokens that layers of ``sliding_attention`` see. Default: None.
        attention_dropout: of weights of softmax attention; power retention has none. Default: 0.
        residual_dropout: of what attention, retention and MLPs give. Default: 0.
        embedding_dropout: of what tokens are embedded as. Default: 0.
        softmax_blend: how much of the softmax attention a converted model's layers of power
            retention keep: 1 is softmax alone, 0 power retention alone. Default: 0.
        softmax_types: of each layer the softmax attention that it blends with, ``full_attention``
            or ``sliding_attention``. Default: ``full_attention``.
        initializer_range: standard deviation of new weights. Default: 0.02.
        use_cache: default True.
        tie_word_embeddings: whether the output layer has the embedding's weights. Default: False.
        bos_token_id, eos_token_id, pad_token_id: default None.

    Raises:
        ValueError, huggingface_hub.errors.StrictDataclassError: for values of another type, and
            for those that no model can be made of.
    """

    model_type = "retention"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012  (transformers has it so)
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    degree: int = 2
    gating: bool = True
    gate_bias: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    mlp_type: str = "gated"
    mlp_bias: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    softmax_blend: float | int = 0.0
    softmax_types: list[str] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads: expected a divisor of hidden_size = {self.hidden_size} "
                    f"where head_dim is not given, got {self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = [RETENTION] * self.num_hidden_layers
        if self.softmax_types is None:
            self.softmax_types = [FULL] * self.num_hidden_layers
        # Which rules apply depends on the MLP, and transformers warns of those that do not.
        self.base_model_tp_plan = _tensor_parallel_plan(self.mlp_type, self.gating, self.qk_norm)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All values by name, where published files have another name by that."""
        theirs = {ours: name for name, ours in self.attribute_map.items()}
        return {theirs.get(name, name): value for name, value in super().to_dict().items()}

    def validate_architecture(self) -> None:
        """Part of the validation of `strict`: raises ValueError for what makes no model."""
        super().validate_architecture()
        for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads: expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        state_dim(self.head_dim, self.degree)  # raises for what no state can be built of
        for name, accepted in (("norm_type", ("rms", "layer")), ("mlp_type", ("gated", "plain"))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: expected one of {accepted}, got {getattr(self, name)!r}")
        if not 0 <= self.softmax_blend <= 1:
            raise ValueError(f"softmax_blend: expected 0 to 1, got {self.softmax_blend}")

    def validate_layer_type(self) -> None:
        """Part of the validation of `strict`: raises ValueError for layers that there are not."""
        for name, accepted in (("layer_types", LAYER_TYPES), ("softmax_types", (FULL, SLIDING))):
            types = getattr(self, name)
            if len(types) != self.num_hidden_layers:
                raise ValueError(
                    f"{name}: expected one for each of num_hidden_layers = "
                    f"{self.num_hidden_layers}, got {len(types)}"
                )
            for kind in types:
                if kind not in accepted:
                    raise ValueError(f"{name}: expected each of {accepted}, got {kind!r}")
            if SLIDING in types and self.sliding_window is None:
                raise ValueError(f"sliding_window: expected a number, as {name} has {SLIDING!r}")


def _tensor_parallel_plan(mlp_type: str, gating: bool, qk_norm: bool) -> dict[str, str]:
    attention, mlp = "layers.*.self_attn", "layers.*.mlp"
    inward = [f"{attention}.{x}_proj" for x in ("qkvg" if gating else "qkv")]
    inward += [
        f"{mlp}.{x}" for x in (("gate_proj", "up_proj") if mlp_type == "gated" else ("c_fc",))
    ]
    outward = [
        f"{attention}.o_proj",
        f"{mlp}.down_proj" if mlp_type == "gated" else f"{mlp}.c_proj",
    ]
    norms = [f"{attention}.{x}_norm" for x in "qk"] if qk_norm else []
    return {
        **dict.fromkeys(inward, "colwise"),
        **dict.fromkeys(outward, "rowwise"),
        **dict.fromkeys(norms, "replicated_with_grad_allreduce"),
    }


def _retention_alone(config: RetentionConfig, kwargs: dict[str, Any]) -> None:
    """What published files may say of layers, and what of it is not power retention of degree 2."""
    for name, accepted in (("use_exp", (False, None)), ("hybrid_exp", ("none", None))):
        if kwargs.get(name) not in accepted:
            raise ValueError(f"{name}: expected {accepted[0]!r}, got {kwargs[name]!r}")
    if "p" in kwargs:
        config.degree = kwargs.pop("p")
    # Their own class names the layers of power retention after the attention that it replaces.
    config.layer_types = [RETENTION] * config.num_hidden_layers


@strict
class BrumbyConfig(RetentionConfig):
    """Of Brumby, `manifestai/Brumby-14B-Base`: its sizes are the defaults.

    All arguments are those of `RetentionConfig`; `norm_eps` is called ``rms_norm_eps`` in published
    files, and may be here. ``layer_types`` of a file are passed over: every layer is power
    retention. ``chunk_size``, ``prefill_chunk_size`` and ``switch_over_seq_len``, which say how
    something is computed and not what, are not read either.

    Raises:
        ValueError: for ``use_exp``, which is another function.
    """

    model_type = "brumby"
    attribute_map = {"rms_norm_eps": "norm_eps"}  # noqa: RUF012

    vocab_size: int = 151936
    hidden_size: int = 5120
    intermediate_size: int = 17408
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    gate_bias: bool = False
    qk_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        _retention_alone(self, kwargs)
        # One key stands for all four projections, and no window is left of those there were.
        self.attention_out_bias = self.attention_bias
        self.sliding_window = None
        super().__post_init__(**kwargs)


@strict
class PowerCoderConfig(RetentionConfig):
    """Of PowerCoder, `manifestai/powercoder-3b`: its sizes are the defaults.

    Args:
        use_bias: whether all projections have biases. Default: True.

    All others are those of `RetentionConfig`; `norm_eps` is called ``norm_epsilon`` in published
    files, and may be here. Files have no ``head_dim``, which is ``hidden_size /
    num_attention_heads`` then, and no key for tied embeddings, which they are.

    Raises:
        ValueError: for a ``hybrid_exp`` that is another function than power retention.
    """

    model_type = "powercoder"
    attribute_map = {"norm_epsilon": "norm_eps"}  # noqa: RUF012

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int | None = 2
    norm_type: str = "layer"
    norm_eps: float = 1e-5
    mlp_type: str = "plain"
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.018042
    tie_word_embeddings: bool = True
    use_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        _retention_alone(self, kwargs)
        self.attention_bias = self.attention_out_bias = self.use_bias
        self.mlp_bias = self.gate_bias = self.use_bias
        super().__post_init__(**kwargs)
