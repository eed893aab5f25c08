"""docs/transformers.md does what it says, on small models under the names that it has."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# First, since it keeps transformers offline.
import transformers_cases as cases
from retention import cli

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
CHARACTERS = "\n !\"'()*+,-./0123456789:=[]_abcdefghijklmnopqrstuvwxyz"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token."""
    vocabulary = {character: i for i, character in enumerate(["<pad>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the page's models are."""
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= cases.VOCABULARY
    cases.make_model("powercoder", torch.bfloat16).save_pretrained(tmp_path / "powercoder-3b")
    Qwen3ForCausalLM(Qwen3Config(**cases.SMALL, head_dim=8)).save_pretrained(tmp_path / "qwen3")
    for name in ("powercoder-3b", "qwen3"):
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    # What somebody types to the page's `retention chat`.
    (tmp_path / "lines").write_text("def f(x):\n/exit\n")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "lines").open())
    yield tmp_path
    sys.stdin.close()


# What the page's Trainer is told is for machines with a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_page_is_one_program(folder: Path, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    commands = 0
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            if program == "retention":
                assert cli.main(arguments) == 0, line
                commands += 1
    assert commands == 5
    shown = capsys.readouterr().out
    assert "2 of 2 layers are power retention" in shown
    assert names["model"].config.model_type == "powercoder"
    assert "tensor([10,  4])" in shown  # characters of two prompts, and a token more
    assert names["cache"].positions.tolist() == [0, 4]
    # What each part leaves behind.
    assert (folder / "runs" / "own" / "model" / "model.safetensors").is_file()
    assert "==> 1 of 2 <==\ndef add(a, b):" in shown
    assert "==> qwen3 <==\ndef " in shown
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "qwen3-retention" / "tokenizer.json").is_file()
    assert re.search(r"^\d+ bytes a sequence$", shown, re.MULTILINE)
    assert "\n0.0\n" in shown
