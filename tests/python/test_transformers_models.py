"""Models in transformers: what they compute, load, save and refuse."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
)

import retention.transformers as rt
from retention.transformers import _requirement

# First, since it keeps transformers offline.
from transformers_cases import (
    EXACT,
    KINDS,
    SMALL,
    VOCABULARY,
    formula,
    greedy,
    make_config,
    make_model,
    tokens,
)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_formula(kind: str):
    model, ids = make_model(kind), tokens(2, 23)
    wanted = formula(model.state_dict(), model.config, ids)
    torch.testing.assert_close(model(ids).logits, wanted, **EXACT)
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, **EXACT)


@pytest.mark.parametrize("kind", ["brumby", "powercoder"])
def test_gradients_are_the_formula(kind: str):
    model, ids = make_model(kind), tokens(2, 23)
    loss = model(ids, labels=ids).loss  # with a cache, as transformers has it unless told otherwise
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters)
    logits = formula(dict(zip(names, parameters, strict=True)), model.config, ids)
    wanted_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # The library's loss is float32.
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=1e-5)
    for name, x, wanted in zip(
        names, got, torch.autograd.grad(wanted_loss, parameters), strict=True
    ):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-6, msg=name)


# ---- published checkpoints ----------------------------------------------------------------------


def write_checkpoint(folder: Path, kind: str, **more) -> tuple[dict[str, Tensor], dict]:
    """A folder as those who publish have it: its tensors and its configuration, with entries for
    code of its own, which there is none of."""
    model = make_model(kind)
    config = model.config
    weights = {name: x.bfloat16().clone() for name, x in model.state_dict().items()}
    name = config.model_type
    stored = {
        "architectures": [type(config).__name__.replace("Config", "ForCausalLM")],
        "model_type": name,
        "auto_map": {
            "AutoConfig": f"configuration_{name}.{type(config).__name__}",
            "AutoModelForCausalLM": f"modeling_{name}.{type(config).__name__[:-6]}ForCausalLM",
        },
        **{key: getattr(config, key) for key in SMALL},
        "hidden_act": config.hidden_act,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "chunk_size": 64,
        "switch_over_seq_len": 8192,
        "prefill_chunk_size": 1024,
        **more,
    }
    if name == "brumby":
        stored |= {
            "head_dim": config.head_dim,
            "rms_norm_eps": 1e-6,
            "attention_bias": config.attention_bias,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
            "tie_word_embeddings": config.tie_word_embeddings,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 40,
            "use_exp": False,
            "p": 2,
        }
    else:
        # Neither `head_dim` nor, where they are tied, a key for embeddings.
        stored |= {"norm_epsilon": 1e-5, "use_bias": config.use_bias, "hybrid_exp": "none"}
        stored |= {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1}
        if not config.tie_word_embeddings:
            stored["tie_word_embeddings"] = False
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(stored))
    return weights, stored


PUBLISHED = [kind for kind in KINDS if kind.startswith(("brumby", "powercoder"))]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_checkpoint_loads_and_generates(kind: str, tmp_path: Path):
    """Without any of its code, which would have to be asked for, and is not there."""
    weights, stored = write_checkpoint(tmp_path / "model", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == stored["architectures"][0]
    assert type(model).__module__ == "retention.transformers.modeling"
    assert model.dtype == torch.bfloat16
    names = set(model.state_dict())
    assert names - {"lm_head.weight"} == set(weights) - {"lm_head.weight"}
    for name, x in weights.items():
        assert torch.equal(model.state_dict()[name], x), name
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("lm_head.weight" not in weights)
    # A base of rotary frequencies that is the file's, not the class's.
    assert model.config.rope_parameters["rope_theta"] == 500000.0

    ids = tokens(2, 19)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    wanted = formula(weights, exact.config, ids)
    torch.testing.assert_close(exact(ids).logits, wanted, **EXACT)
    # bfloat16 from one layer to the next.
    torch.testing.assert_close(model(ids).logits.double(), wanted, rtol=0.1, atol=0.25)
    out = exact.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(out, greedy(exact, ids, 5))


def test_a_checkpoint_with_code_of_its_own_runs_none_of_it(tmp_path: Path):
    """Not even where that is allowed."""
    write_checkpoint(tmp_path / "model", "brumby")
    for name in ("configuration_brumby.py", "modeling_brumby.py"):
        (tmp_path / "model" / name).write_text("raise SystemExit('was run')")
    for allowed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=allowed)
        assert type(model) is rt.BrumbyForCausalLM


def test_published_sizes_are_the_defaults():
    """Shapes of the two checkpoints, of models that take no memory."""
    with torch.device("meta"):
        brumby = rt.BrumbyForCausalLM(rt.BrumbyConfig(num_hidden_layers=1))
        coder = rt.PowerCoderForCausalLM(rt.PowerCoderConfig(num_hidden_layers=1))
    shapes = {name: tuple(x.shape) for name, x in brumby.state_dict().items()}
    layer = "model.layers.0"
    attention = {"q": (5120, 5120), "k": (1024, 5120), "v": (1024, 5120), "g": (8, 5120)}
    assert shapes == {
        "model.embed_tokens.weight": (151936, 5120),
        **{f"{layer}.self_attn.{x}_proj.weight": shape for x, shape in attention.items()},
        f"{layer}.self_attn.o_proj.weight": (5120, 5120),
        f"{layer}.self_attn.q_norm.weight": (128,),
        f"{layer}.self_attn.k_norm.weight": (128,),
        f"{layer}.mlp.gate_proj.weight": (17408, 5120),
        f"{layer}.mlp.up_proj.weight": (17408, 5120),
        f"{layer}.mlp.down_proj.weight": (5120, 17408),
        f"{layer}.input_layernorm.weight": (5120,),
        f"{layer}.post_attention_layernorm.weight": (5120,),
        "model.norm.weight": (5120,),
        "lm_head.weight": (151936, 5120),
    }
    assert rt.BrumbyConfig().num_hidden_layers == 40
    shapes = {name: tuple(x.shape) for name, x in coder.state_dict().items()}
    both = {
        "self_attn.q_proj": (3072, 3072),
        "self_attn.k_proj": (256, 3072),
        "self_attn.v_proj": (256, 3072),
        "self_attn.g_proj": (2, 3072),
        "self_attn.o_proj": (3072, 3072),
        "mlp.c_fc": (12288, 3072),
        "mlp.c_proj": (3072, 12288),
        "input_layernorm": (3072,),
        "post_attention_layernorm": (3072,),
    }
    assert shapes == {
        "model.embed_tokens.weight": (49152, 3072),
        **{f"{layer}.{name}.weight": shape for name, shape in both.items()},
        **{f"{layer}.{name}.bias": shape[:1] for name, shape in both.items()},
        "model.norm.weight": (3072,),
        "model.norm.bias": (3072,),
        "lm_head.weight": (49152, 3072),
    }
    assert coder.config.head_dim == 128
    assert coder.lm_head.weight is coder.model.embed_tokens.weight
    assert rt.PowerCoderConfig().num_hidden_layers == 30


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("brumby", {"use_exp": True}, "use_exp: expected False, got True"),
        ("powercoder", {"hybrid_exp": "all"}, "hybrid_exp: expected 'none', got 'all'"),
    ],
)
def test_a_checkpoint_of_another_function_is_refused(kind: str, more: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_config(kind, **more)


def test_a_checkpoint_with_a_gate_for_every_query_head_is_refused(tmp_path: Path):
    weights, _ = write_checkpoint(tmp_path / "model", "brumby")
    name = "model.layers.0.self_attn.g_proj.weight"
    weights[name] = weights[name].repeat_interleave(2, 0)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_saved_is_the_same(kind: str, tmp_path: Path):
    model, ids = make_model(kind, softmax_blend=0.25 if kind == "retention" else 0), tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.config) is type(model.config)
    configs = [config.to_dict() for config in (loaded.config, model.config)]
    for config in configs:
        for name in ("_name_or_path", "dtype", "architectures"):  # where it was, and what it is
            config.pop(name)
    assert configs[0] == configs[1]
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)


def test_devices_and_dtypes_of_loading(tmp_path: Path):
    write_checkpoint(tmp_path / "model", "powercoder")
    load = AutoModelForCausalLM.from_pretrained
    ids = tokens(1, 9)
    wanted = load(tmp_path / "model", dtype=torch.float32)(ids).logits
    spread = load(tmp_path / "model", dtype=torch.float32, device_map={"": "cpu"})
    torch.testing.assert_close(spread(ids).logits, wanted)
    # One layer on the disk: hooks bring its weights for every call.
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm"), "cpu")
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers.1": "disk"}
    split = load(
        tmp_path / "model", dtype=torch.float32, device_map=where, offload_folder=tmp_path / "disk"
    )
    assert split.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    torch.testing.assert_close(split(ids).logits, wanted)
    out = split.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, spread.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_a_new_model_starts_with_a_spread_of_memories(tmp_path: Path):
    """Gates' biases, also where the model was built without memory and weights were missing."""
    config = make_config("retention", num_key_value_heads=4)
    wanted = torch.tensor([4096.0, 4096 / 2 ** (8 / 3), 4096 / 2 ** (16 / 3), 16])
    model = rt.RetentionForCausalLM(config)
    weights = {name: x for name, x in model.state_dict().items() if "g_proj" not in name}
    model.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for made in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        for layer in made.model.layers:
            gate = layer.self_attn.g_proj
            torch.testing.assert_close(1 / (1 - gate.bias.sigmoid()), wanted, rtol=1e-3, atol=0)
            # Weights are those of the initialiser's range, not of a Linear on its own.
            assert 0.2 < gate.weight.std() < 0.4


# ---- other heads --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["retention", "brumby", "powercoder"])
def test_classifiers(kind: str):
    config = make_config(kind, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    ids = tokens(2, 9)
    ids[0, 6:] = 0  # padded on the right
    mask = (ids != 0).long()
    base = AutoModel.from_config(config)
    assert type(base).__name__ == type(config).__name__.replace("Config", "Model")

    sequences = AutoModelForSequenceClassification.from_config(config).double().eval()
    hidden = sequences.model(ids, attention_mask=mask).last_hidden_state
    labels = torch.tensor([2, 0])
    got = sequences(ids, attention_mask=mask, labels=labels)
    wanted = sequences.score(hidden[[0, 1], [5, 8]])
    torch.testing.assert_close(got.logits, wanted, **EXACT)
    torch.testing.assert_close(got.loss, F.cross_entropy(wanted, labels), **EXACT)

    each = AutoModelForTokenClassification.from_config(config).double().eval()
    got = each(ids, attention_mask=mask, labels=ids % 3)
    wanted = each.score(each.model(ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(got.logits, wanted, **EXACT)
    got.loss.backward()
    assert each.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


# ---- padding and packing ------------------------------------------------------------------------


SIDES = {"left": [0, 1, 2], "right": [10, 11], "both": [0, 11], "inside": [4, 5]}


@pytest.mark.parametrize(
    ("kind", "side"),
    [
        (kind, side)
        for kind in ("retention", "no gates", "mixed", "powercoder")
        for side in SIDES
        # A window of softmax attention counts tokens that are not there.
        if (kind, side) != ("mixed", "inside")
    ],
)
def test_padding_leaves_no_trace(kind: str, side: str):
    """Of tokens, losses and gradients: huggingface/transformers#48256 and #46773."""
    model, ids = make_model(kind), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, SIDES[side]] = 0
    real = mask[0].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = model(ids[:1, real], use_cache=False).logits
    torch.testing.assert_close(got[:1, real], alone, **EXACT)
    torch.testing.assert_close(got[1:], model(ids[1:], use_cache=False).logits, **EXACT)

    parameters = list(model.parameters())
    loss = got[:1, real].square().sum()
    wanted = torch.autograd.grad(alone.square().sum(), parameters)
    for x, y in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["retention", "no gates", "mixed"])
@pytest.mark.parametrize("how", ["cu_seq_lens_q", "position_ids", "use_cache"])
def test_packed_sequences_do_not_see_each_other(kind: str, how: str):
    """As the library's own collator packs them."""
    model = make_model(kind)
    sequences = [tokens(n, seed=n) for n in (7, 1, 12, 3)]
    collate = DataCollatorWithFlattening(
        return_flash_attn_kwargs=how == "cu_seq_lens_q", return_seq_idx=how == "cu_seq_lens_q"
    )
    batch = collate([{"input_ids": x.tolist()} for x in sequences])
    if how == "cu_seq_lens_q":
        assert "cu_seq_lens_q" in batch
        batch["position_ids"] = None  # nobody has to say it twice
    batch["use_cache"] = how == "use_cache"
    out = model(**batch)
    assert out.cache is None
    wanted = [model(x[None], use_cache=False).logits[0] for x in sequences]
    torch.testing.assert_close(out.logits[0], torch.cat(wanted), **EXACT)
    # The collator has taken the first token of each sequence out of the loss.
    losses = [
        F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        for logits, ids in zip(wanted, sequences, strict=True)
    ]
    mean = sum(losses) / sum(len(x) - 1 for x in sequences)
    torch.testing.assert_close(out.loss.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [False, True], ids=["position_ids", "cu_seq_lens_q"])
def test_packing_and_padding_while_a_model_is_converted(named: bool):
    """The softmax attention of a blend sees what power retention sees."""
    model = make_model("retention", softmax_blend=0.3)
    sequences = [tokens(n, seed=n) for n in (7, 1, 12)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=named)(
        [{"input_ids": x.tolist()} for x in sequences]
    )
    if named:
        batch["position_ids"] = None
    wanted = [model(x[None], use_cache=False).logits[0] for x in sequences]
    torch.testing.assert_close(model(**batch).logits[0], torch.cat(wanted), **EXACT)
    ids = torch.stack([F.pad(sequences[0], (5, 0)), sequences[2]])
    got = model(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(got[0, 5:], wanted[0], **EXACT)
    torch.testing.assert_close(got[1], wanted[2], **EXACT)


def test_packed_rows_of_a_batch():
    model, ids = make_model("retention"), tokens(2, 10)
    positions = torch.tensor([[*range(4), *range(6)], [*range(7), *range(3)]])
    got = model(ids, position_ids=positions, use_cache=False).logits
    for row, cut in enumerate((4, 7)):
        for part in (slice(None, cut), slice(cut, None)):
            wanted = model(ids[row : row + 1, part], use_cache=False).logits
            torch.testing.assert_close(got[row : row + 1, part], wanted, **EXACT)


def test_positions_that_say_nothing_new_are_one_sequence():
    model, ids = make_model("retention"), tokens(2, 10)
    wanted = model(ids).logits
    for positions in (torch.arange(10)[None], torch.arange(10).expand(2, -1) + 3):
        out = model(ids, position_ids=positions)
        assert out.cache is not None
        torch.testing.assert_close(out.logits, wanted, **EXACT)


def test_arguments_that_contradict_each_other():
    model, ids = make_model("retention"), tokens(2, 10)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    mask = torch.ones_like(ids)
    cases = (
        ({}, "input_ids: expected these or inputs_embeds, got both or neither"),
        ({"input_ids": ids, "attention_mask": mask[:, None, None]}, r"attention_mask: .*\[2, 1, 1"),
        ({"input_ids": ids, "cu_seq_lens_q": bounds}, "cu_seq_lens_q: .* got 2 rows"),
        (
            {"input_ids": ids[:1], "attention_mask": mask[:1], "cu_seq_lens_q": bounds},
            "cu_seq_lens_q: .* 1 rows and a mask",
        ),
        (
            {"input_ids": ids[:1], "cu_seq_lens_q": bounds, "cache": model(ids).cache},
            "cache: expected a SlotCache or none with cu_seq_lens_q, got a DynamicCache",
        ),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["retention", "mixed"])
def test_gradient_checkpointing_changes_no_gradient(kind: str):
    model, ids = make_model(kind), tokens(2, 15)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    model.train()
    model.activation_checkpointing_enable()
    calls = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    out = model(ids, labels=ids)
    got = torch.autograd.grad(out.loss, parameters)
    assert len(calls) == 2 * len(model.model.layers)  # once more for each layer
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("name", ["residual_dropout", "embedding_dropout"])
def test_dropouts_are_those_of_training(name: str):
    model, ids = make_model("powercoder", **{name: 0.5}), tokens(1, 9)
    plain = make_model("powercoder")
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **EXACT)
    model.train()
    assert (model(ids).logits - plain(ids).logits).abs().max() > 0.1


def test_a_model_that_trains_makes_no_cache():
    model, ids = make_model("retention"), tokens(1, 9)
    assert model(ids).cache is not None
    model.train()
    assert model(ids, labels=ids).cache is None
    with torch.no_grad():  # as generate() of a model that was left in training
        assert model(ids).cache is not None


def test_autocast():
    """bfloat16 through and through, but for gates, states and norms."""
    model, ids = make_model("brumby", torch.float32, initializer_range=0.1), tokens(2, 15)
    wanted = model(ids).logits
    close = {"rtol": 0.05, "atol": 0.05 * wanted.abs().max().item()}  # a few roundings of 2^-9
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(ids)
        assert out.cache.layers[0].memory.dtype == torch.bfloat16
        cached = model(ids[:, :1], cache=out.cache).logits
    torch.testing.assert_close(out.logits.float(), wanted, **close)
    longer = model(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1:]
    torch.testing.assert_close(cached.float(), longer, **close)


class Quantised(nn.Module):
    """As libraries have them: integers, scales, and no `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("integers", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.integers * self.scale).to(x.dtype), self.bias)


@pytest.mark.parametrize("kind", ["retention", "powercoder"])
def test_quantised_linear_layers_are_left_alone(kind: str):
    """Gates too: they are called, and nobody reads a weight that is not there."""
    model, ids = make_model(kind, torch.float32), tokens(2, 9)
    wanted = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantised = Quantised(module)
            model.set_submodule(name, quantised)
            exact = wanted.get_submodule(name)
            exact.weight.data = (quantised.integers * quantised.scale).float()
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-4)
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, wanted.generate(ids, max_new_tokens=4, do_sample=False))


# ---- configurations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layer_types": ["power_retention"]}, "layer_types: expected one for each of num_hidden"),
        ({"layer_types": ["power_retention", "conv"]}, "layer_types: .* got 'conv'"),
        ({"softmax_types": ["power_retention"] * 2}, "softmax_types: .* got 'power_retention'"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window: expected a number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of .* = 4, got 3"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected at least 1, got 0"),
        (
            {"head_dim": None, "hidden_size": 30},
            "num_attention_heads: expected a divisor of hidden",
        ),
        ({"head_dim": 10}, "head_dim: expected a positive multiple of 8, got 10"),
        ({"degree": 3}, "deg: expected .* got 3"),
        ({"norm_type": "batch"}, "norm_type: expected one of .* got 'batch'"),
        ({"mlp_type": "none"}, "mlp_type: expected one of .* got 'none'"),
        ({"softmax_blend": 1.5}, "softmax_blend: expected 0 to 1, got 1.5"),
        ({"gating": "yes"}, "gating"),
    ],
)
def test_configurations_that_make_no_model(more: dict, message: str):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make_config("retention", **more)


def test_configurations_by_name():
    for name, kind in (
        ("retention", rt.RetentionConfig),
        ("brumby", rt.BrumbyConfig),
        ("powercoder", rt.PowerCoderConfig),
    ):
        assert type(AutoConfig.for_model(name)) is kind
    assert rt.BrumbyConfig(rms_norm_eps=0.5).norm_eps == 0.5
    stored = rt.BrumbyConfig(norm_eps=0.5).to_dict()
    assert stored["rms_norm_eps"] == 0.5
    assert "norm_eps" not in stored
    assert rt.PowerCoderConfig(norm_epsilon=0.5).norm_eps == 0.5
    assert rt.BrumbyConfig(p=4).degree == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_of_the_plans_names_a_module(kind: str):
    """Parallel plans with rules for what is not there would be passed over in silence."""
    model = make_model(kind)
    modules = dict(model.named_modules())
    generic = {re.sub(r"\.\d+\.", ".*.", name): module for name, module in modules.items()}
    assert set(model.tp_plan) <= set(generic)
    linears = {name for name, module in generic.items() if isinstance(module, nn.Linear)}
    assert linears <= set(model.tp_plan)
    assert set(model.pp_plan) <= set(modules)


# ---- the requirement ----------------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, "5.23.2", "4.57.0", "unknown"])
def test_what_is_missing_is_said_at_once(found: str | None, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        assert name == "transformers"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = f"expected transformers 5.24 or newer, got {found or 'none'}; pip install"
    with pytest.raises(ImportError, match=message):
        _requirement.check_transformers()


@pytest.mark.parametrize("found", ["5.24.0", "5.24.1.dev0", "5.30", "6.0.0rc1"])
def test_what_is_new_enough(found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    _requirement.check_transformers()


def test_the_core_does_not_import_transformers():
    code = (
        "import sys, retention, retention.cli\n"
        "print(sorted({'transformers', 'huggingface_hub', 'tokenizers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout.strip() == b"[]"


def test_weights_of_safetensors_alone(tmp_path: Path):
    """Names that are stored are the model's; tied ones are stored once."""
    make_model("powercoder").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == VOCABULARY
