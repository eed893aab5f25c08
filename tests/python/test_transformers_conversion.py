"""Conversion of softmax transformers: what they were, what they become, and the way there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import retention.transformers as rt
from retention import cli
from retention.transformers import conversion

# First, since it keeps transformers offline.
from transformers_cases import EXACT, SMALL, formula, greedy, tokens

# All is float64, but for what the library computes in float32 itself: norms, cosines and sines.
LIBRARY = {"rtol": 1e-4, "atol": 1e-4}

BASE: dict[str, Any] = {**SMALL, "bos_token_id": None, "eos_token_id": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SOURCES = {
    "llama": LlamaConfig(**BASE),
    "llama, biases, scaled": LlamaConfig(
        **BASE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**BASE, head_dim=8, sliding_window=None),
    "mistral, window": MistralConfig(**BASE, head_dim=16, sliding_window=6),
    "qwen2": Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen2, windows": Qwen2Config(
        **BASE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**BASE, head_dim=16, rope_parameters={"rope_theta": 1e6}),
    "starcoder2": Starcoder2Config(**BASE, residual_dropout=0.1, embedding_dropout=0.1),
    "starcoder2, window": Starcoder2Config(**BASE, use_bias=False, sliding_window=6),
}


def make(name: str, dtype: torch.dtype = torch.float64, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(SOURCES[name]), dtype=dtype, attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("name", SOURCES)
def test_a_converted_model_is_what_it_was(name: str):
    """All of its projections, norms and MLPs, with a blend of 1."""
    source, ids = make(name), tokens(2, 25)
    wanted = source(ids, use_cache=False).logits
    modules = dict(source.named_modules())
    converted = rt.convert(source)
    assert isinstance(converted, rt.RetentionForCausalLM)
    torch.testing.assert_close(converted(ids, use_cache=False).logits, wanted, **LIBRARY)
    torch.testing.assert_close(converted(ids).logits, wanted, **LIBRARY)
    for key, module in converted.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or "norm" in key:
            assert ("g_proj" in key) or module is modules[key], key
    assert set(converted.config.layer_types) == {"power_retention"}
    tied = converted.lm_head.weight is converted.model.embed_tokens.weight
    assert tied == SOURCES[name].tie_word_embeddings


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [name for name in SOURCES if "scaled" not in name])
def test_logits_of_a_blend_are_the_formula(name: str, blend: float):
    converted, ids = rt.convert(make(name), blend=blend), tokens(2, 21)
    torch.manual_seed(1)
    for layer in converted.model.layers:  # gates that depend on the token
        nn.init.normal_(layer.self_attn.g_proj.weight, std=0.3)
    wanted = formula(converted.state_dict(), converted.config, ids)
    torch.testing.assert_close(converted(ids).logits, wanted, **LIBRARY)
    # As it is when it was saved and loaded, with norms of ours.
    loaded = rt.RetentionForCausalLM(converted.config).double().eval()
    loaded.load_state_dict(converted.state_dict())
    torch.testing.assert_close(loaded(ids).logits, wanted, **EXACT)


def test_other_attentions_blend_as_well():
    ids = tokens(2, 21)
    eager, fused = (rt.convert(make("qwen3", implementation=x)) for x in ("eager", "sdpa"))
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, fused(ids).logits, **EXACT)
    weights = eager(ids, output_attentions=True).attentions
    assert len(weights) == 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 21).double(), **EXACT)


@pytest.mark.parametrize("name", ["qwen3", "qwen2, windows"])
def test_some_layers_alone(name: str):
    source, ids = make(name), tokens(2, 21)
    types = source.config.layer_types
    wanted = source(ids, use_cache=False).logits
    converted = rt.convert(source, layers=[1], gating=False)
    assert converted.config.layer_types == [types[0], "power_retention"]
    assert converted.config.softmax_types == types
    assert not any("g_proj" in name for name, _ in converted.named_parameters())
    torch.testing.assert_close(converted(ids).logits, wanted, **LIBRARY)
    rt.set_blend(converted, 0.0)
    wanted = formula(converted.state_dict(), converted.config, ids)
    torch.testing.assert_close(converted(ids).logits, wanted, **LIBRARY)
    out = converted.generate(ids, do_sample=False, max_new_tokens=9)
    assert torch.equal(out, greedy(converted, ids, 9))


def test_gates_of_a_converted_model_start_with_memories_alone():
    gate = rt.convert(make("qwen3", torch.bfloat16)).model.layers[0].self_attn.g_proj
    assert gate.weight.dtype == torch.bfloat16
    assert not gate.weight.any()
    memories = 1 / (1 - gate.bias.float().sigmoid())
    torch.testing.assert_close(memories, torch.tensor([4096.0, 16.0]), rtol=0.05, atol=0)


def test_what_a_model_is_set_to_stays():
    source = make("llama").train()
    source.activation_checkpointing_enable()
    source.generation_config.max_new_tokens = 3
    converted = rt.convert(source)
    assert converted.training
    assert converted.is_activation_checkpointing
    assert converted.dtype == torch.float64
    assert converted.generate(tokens(1, 4), do_sample=False).shape == (1, 7)


class Wrapped(nn.Module):
    """Around a projection, as adapters are."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.bias = inner, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def test_wrapped_projections_stay_wrapped():
    source, ids = make("llama"), tokens(1, 9)
    for layer in source.model.layers:
        layer.self_attn.q_proj = Wrapped(layer.self_attn.q_proj)
        layer.mlp.down_proj = Wrapped(layer.mlp.down_proj)
    wanted = source(ids).logits
    converted = rt.convert(source)
    assert isinstance(converted.model.layers[0].self_attn.q_proj, Wrapped)
    torch.testing.assert_close(converted(ids).logits, wanted, **LIBRARY)


def test_what_cannot_be_converted():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    odd = AutoModelForCausalLM.from_config(LlamaConfig(**BASE | {"hidden_size": 48}))
    partial = make("llama")
    partial.config.rope_parameters["partial_rotary_factor"] = 0.5
    cases: tuple[tuple[Any, dict, type[Exception], str], ...] = (
        (gpt2, {}, TypeError, "model: expected a Llama or Mistral .* got .*GPT2LMHeadModel"),
        (make("llama").model, {}, TypeError, "causal language modelling, got .*LlamaModel"),
        (odd, {}, ValueError, "model: head_dim: expected a positive multiple of 8, got 12"),
        (partial, {}, ValueError, "one rotary embedding of all channels"),
        (make("llama"), {"layers": [2]}, ValueError, "layers: expected numbers from 0 to 1, got 2"),
        (make("llama"), {"layers": [-1]}, ValueError, "layers: expected numbers .* got -1"),
        (make("llama"), {"layers": ["0"]}, ValueError, "layers: expected numbers .* got '0'"),
        (make("llama"), {"blend": 1.5}, ValueError, "blend: expected 0 to 1, got 1.5"),
    )
    for model, arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            rt.convert(model, **arguments)
    with pytest.raises(TypeError, match=r"model: expected one of convert\(\)"):
        rt.set_blend(make("llama"), 0.5)
    with pytest.raises(ValueError, match="blend: expected 0 to 1, got -1"):
        rt.set_blend(rt.convert(make("llama")), -1)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="share: expected more than 0 and at most 1"):
            rt.BlendSchedule(share)


# ---- training -----------------------------------------------------------------------------------


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.blends: list[float] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.blends.append(model.config.softmax_blend)


def test_a_schedule_takes_the_blend_to_nothing(tmp_path: Path):
    converted, seen = rt.convert(make("qwen3", torch.float32)), Seen()
    ids = tokens(4, 12)
    batch = [{"input_ids": x, "labels": x} for x in ids]
    before = converted(ids, labels=ids).loss
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=converted,
        args=arguments,
        train_dataset=batch * 10,
        callbacks=[rt.BlendSchedule(share=0.5), seen],
    )
    trainer.train()
    torch.testing.assert_close(seen.blends, [1.0, 0.8, 0.6, 0.4, 0.2] + [0.0] * 5)
    evaluated = trainer.evaluate(batch)
    assert evaluated["eval_loss"] == pytest.approx(
        converted.eval()(ids, labels=ids).loss.item(), rel=1e-4
    )
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.softmax_blend == 0
    assert loaded(ids, labels=ids).loss < before - 0.5
    cache = loaded(ids, use_cache=True).cache
    assert all(layer.softmax is None for layer in cache.layers)  # nothing of it is left


def test_what_ends_with_softmax_attention_is_saved_without():
    schedule, model = rt.BlendSchedule(share=1.0), rt.convert(make("qwen3"))
    assert [schedule.blend(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]

    class State:
        global_step = max_steps = 4

    schedule.on_train_end(None, State(), None, model=model)
    assert model.config.softmax_blend == 0


# ---- folders ------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    make("qwen3", torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    return folder


def test_a_folder_is_converted(source: Path, tmp_path: Path):
    out, ids = tmp_path / "new" / "out", tokens(1, 9)
    written = rt.convert_checkpoint(source, out, layers=[0], blend=0.5)
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer.json", "vocab.txt"}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.layer_types == ["power_retention", "full_attention"]
    assert loaded.config.softmax_blend == 0.5
    assert loaded.state_dict().keys() == written.state_dict().keys()
    wanted = formula(loaded.state_dict(), loaded.config, ids)
    torch.testing.assert_close(loaded.double()(ids).logits, wanted, **EXACT)


def test_a_folder_is_written_whole_or_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.shutil, "copy2", no_space)
    with pytest.raises(OSError, match="No space"):
        rt.convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(x) for x in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    out.mkdir()  # an empty one may be there
    code, shown, _ = call(capsys, "convert", source, out, "--layers", 1, "--no-gating")
    assert code == 0
    count = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert shown == (f"{out}: 1 of 2 layers are power retention, {count:,} parameters, blend 1\n")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "retention"
    assert config["gating"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere"),
        (["source", "source"], "out: expected a folder that is not there yet, got"),
        (["source", "out", "--layers", "7"], "layers: expected numbers from 0 to 1, got 7"),
        (["source", "out", "--blend", "2"], "blend: expected 0 to 1, got 2.0"),
    ],
)
def test_a_command_that_cannot_be_done(
    arguments: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(capsys, "convert", *arguments)
    assert code == 2
    assert error.startswith("retention convert: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_without_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cli, "_importable", lambda name: False)
    code, _, error = call(capsys, "convert", "a", "b")
    assert code == 2
    assert "needs transformers, not installed here: pip install 'power-retention[transf" in error
