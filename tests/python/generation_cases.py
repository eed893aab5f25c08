"""Small models with tokenizers, in folders, for the tests of `retention generate` and `chat`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

# First, since it keeps transformers offline.
import transformers_cases as cases
from retention import cli
from retention.generation.stream import Stream

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<model>"]
BYTES = len(SPECIAL) + 256
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ: "


def byte_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """A byte is a token."""
    words = {word: i for i, word in enumerate(SPECIAL)}
    stands_for = decoders.ByteLevel().decode
    for character in sorted(
        pre_tokenizers.ByteLevel.alphabet(), key=lambda x: (stands_for([x]), x)
    ):
        words[character] = len(words)
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, **more)


def letter_tokenizer(
    characters: str = LETTERS, in_front: str = "", **more: Any
) -> PreTrainedTokenizerFast:
    """A character is a token: any of them are whole text. Some tokenizers put one in front."""
    words = {word: i for i, word in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if in_front:
        tokenizer.normalizer = normalizers.Prepend(in_front)
    tokenizer.decoder = decoders.Fuse()
    return finished(tokenizer, **more)


def finished(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[3:], **{**names, **more}
    )


def make_model(kind: str, vocabulary: int, **more: Any) -> Any:
    """Of `transformers_cases`, or of transformers; in float32."""
    sizes = {**cases.SMALL, "vocab_size": vocabulary, **more}
    if kind in cases.KINDS:
        return cases.make_model(kind, torch.float32, vocab_size=vocabulary, **more)
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=5)).eval()
    if kind == "mamba":
        config = MambaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        return MambaForCausalLM(config).eval()
    assert kind == "gpt2"
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line, on a CPU."""
    capsys.readouterr()
    code = cli.main([*map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def threads() -> list[threading.Thread]:
    """Those of streams that still work."""
    return [x for x in threading.enumerate() if x.name == Stream.__name__]


SMALL_RUN = [
    *("--layers", "1", "--hidden-size", "32", "--heads", "2", "--device", "cpu", "--steps", "12"),
    *("--batch-size", "2", "--block-size", "16", "--warmup", "2", "--eval-every", "6"),
    *("--eval-blocks", "4", "--checkpoint-every", "6"),
]
TEXT = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i % 7, i % 7) for i in range(400))


def train(folder: Path) -> Path:
    """A run of a few steps."""
    (folder / "text.py").write_bytes(TEXT)
    arguments = ["--data", str(folder / "text.py"), "--out", str(folder / "run")]
    assert cli.main(["train", *SMALL_RUN, *arguments]) == 0
    return folder / "run"
