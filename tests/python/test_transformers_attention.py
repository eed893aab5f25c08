"""`attn_implementation="power_retention"` in models of transformers, against the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import retention.transformers

# First, since it keeps transformers offline.
from transformers_cases import EXACT, VOCABULARY, greedy, tokens

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, attention_bias=True),
    "mistral": MistralConfig(**SMALL, head_dim=8, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "starcoder2": Starcoder2Config(**SMALL),
}


def by_definition(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """(q . k)^2 over the keys that a query sees, in whatever mask the library makes of it."""
    ratio = query.shape[1] // key.shape[1]
    w = (query @ key.repeat_interleave(ratio, 1).mT).square() * (mask > -1)
    w = w / w.sum(-1, keepdim=True).clamp(min=1e-300)
    return (w @ value.repeat_interleave(ratio, 1)).transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def definition():
    """As another attention of this library."""
    ALL_ATTENTION_FUNCTIONS.register("by_definition", by_definition)
    ALL_MASK_ATTENTION_FUNCTIONS.register(
        "by_definition", lambda **arguments: eager_mask(**arguments | {"dtype": torch.float64})
    )


def make(name: str, implementation: str = "power_retention") -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=torch.float64
    ).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model, and itself by the definition."""
    return make(request.param), make(request.param, "by_definition")


def test_logits_and_gradients(pair: tuple[Any, Any]):
    ids, results = tokens(2, 21), []
    for model in pair:
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits, [x.grad for x in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    for got, wanted in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("hidden", [[0, 1], [10, 11], [5]], ids=["left", "right", "inside"])
def test_padding(pair: tuple[Any, Any], hidden: list[int]):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, hidden] = 0
    got, wanted = (model(ids, attention_mask=mask, use_cache=False).logits for model in pair)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], **EXACT)


@pytest.mark.parametrize("named", [False, True], ids=["position_ids", "cu_seq_lens_q"])
def test_packing(pair: tuple[Any, Any], named: bool):
    sequences = [tokens(n, seed=n) for n in (7, 1, 12, 3)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=named)
    batch = collate([{"input_ids": x.tolist()} for x in sequences])
    got = pair[0](**batch, use_cache=False)
    wanted = torch.cat([pair[1](x[None], use_cache=False).logits for x in sequences], dim=1)
    torch.testing.assert_close(got.logits, wanted, **EXACT)


def test_packed_rows_with_positions_of_their_own():
    model, ids = make("qwen3"), tokens(2, 10)
    positions = torch.tensor([[*range(4), *range(6)], [*range(7), *range(3)]])
    got = model(ids, position_ids=positions, use_cache=False).logits
    for row, cut in enumerate((4, 7)):
        for part in (slice(None, cut), slice(cut, None)):
            wanted = model(ids[row : row + 1, part], use_cache=False).logits
            torch.testing.assert_close(got[row : row + 1, part], wanted, **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "chunks", "beams", "static"],
)
def test_generation_with_the_models_own_cache(pair: tuple[Any, Any], options: dict):
    ids = torch.cat((tokens(1, 9), F.pad(tokens(1, 6), (3, 0))))
    arguments = {"attention_mask": (ids != 0).long(), "do_sample": False, "max_new_tokens": 8}
    got = pair[0].generate(ids, **arguments, **options)
    beams = {"num_beams": options["num_beams"]} if "num_beams" in options else {}
    wanted = pair[1].generate(ids, **arguments, **beams, use_cache=False)
    assert torch.equal(got, wanted)


def test_prompt_lookup():
    model = make("qwen3")
    ids = tokens(1, 4).repeat(1, 4)
    out = model.generate(ids, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=5)
    assert torch.equal(out, greedy(model, ids, 12))


def test_sixteen_bits():
    """As exact as one rounding of inputs is."""
    model, ids = make("qwen3"), tokens(2, 33)
    low = copy.deepcopy(model).bfloat16()
    model.load_state_dict(low.state_dict())
    got = low(ids).logits
    assert got.dtype == torch.bfloat16
    wanted = model(ids).logits
    error = (got.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 0.05


def test_it_is_another_function_than_softmax():
    ids = tokens(1, 9)
    got, other = (make("qwen3", name)(ids).logits for name in ("power_retention", "sdpa"))
    assert (got - other).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SMALL, sliding_window=64), "sliding_window: expected None .* got 64"),
        (
            Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0),
            "one that hides earlier tokens of a sequence, as a window does",
        ),
        (
            Gemma2Config(
                **SMALL, head_dim=8, attn_logit_softcapping=50.0, layer_types=["full_attention"] * 2
            ),
            "softcap: expected None",
        ),
        (
            GptOssConfig(
                **SMALL, head_dim=8, num_local_experts=2, layer_types=["full_attention"] * 2
            ),
            "s_aux: expected None",
        ),
    ],
    ids=["sliding window", "window that hides", "logit cap", "attention sink"],
)
def test_what_it_cannot_do(config: Any, message: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="power_retention").eval()
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 9), use_cache=False)


def test_dropout_of_weights():
    config = LlamaConfig(**SMALL, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="power_retention")
    model.eval()(tokens(1, 9))
    with pytest.raises(ValueError, match=r"dropout: expected 0 with power_retention, got 0\.1"):
        model.train()(tokens(1, 9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_causal": False}, "is_causal: expected True with power_retention, got False"),
        ({"position_bias": torch.zeros(1)}, "position_bias: expected None"),
        ({"dropout": 0.5}, "dropout: expected 0 with power_retention, got 0.5"),
    ],
)
def test_calls_that_it_cannot_answer(arguments: dict, message: str):
    q, module = torch.zeros(1, 2, 3, 8), torch.nn.Module()
    with pytest.raises(ValueError, match=message):
        retention.transformers.power_retention_attention(module, q, q, q, None, **arguments)


def test_bounds_of_packed_sequences_alone():
    """Where positions say nothing of them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    attend, module = retention.transformers.power_retention_attention, torch.nn.Module()
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, _ = attend(module, q, k, v, None, cu_seq_lens_q=bounds)
    for part in (slice(0, 4), slice(4, 9)):
        alone, _ = attend(module, *(x[:, :, part] for x in (q, k, v)), None)
        torch.testing.assert_close(out[:, part], alone, **EXACT)


def test_queries_of_the_last_tokens_where_nobody_made_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    module = torch.nn.Module()
    whole, _ = retention.transformers.power_retention_attention(module, q, k, v, None)
    last, weights = retention.transformers.power_retention_attention(
        module, q[:, :, 6:], k, v, None
    )
    assert weights is None
    torch.testing.assert_close(last, whole[:, 6:], **EXACT)


def test_an_encoder():
    config = BertConfig(**{**SMALL, "num_key_value_heads": None}, attention_probs_dropout_prob=0.0)
    model = BertModel(config).eval()
    model.set_attn_implementation("power_retention")
    with pytest.raises(ValueError, match="shows later tokens"):
        model(tokens(1, 9))
