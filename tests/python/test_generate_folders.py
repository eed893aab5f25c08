"""`retention generate` on folders of transformers, against `model.generate`; its statistics, plots
and comparisons, of runs too."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

import generation_cases as cases
from generation_cases import call
from retention import cli
from retention.generation import command, folders, plot, speed
from retention.generation.text import Detokenizer
from retention.lm.generation import Mark

KINDS = ("retention", "mixed", "brumby", "powercoder", "llama", "mistral", "gpt2", "mamba")
PROMPT = "def f(é):"
NEW = 16


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of model, whose tokens are bytes; and a run."""
    parent = tmp_path_factory.mktemp("folders")
    found = {"run": cases.train(parent)}
    for kind in KINDS:
        model = cases.make_model(kind, cases.BYTES)
        found[kind] = cases.save(parent / kind, model, cases.byte_tokenizer())
    return found


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama to be damaged."""
    return Path(shutil.copytree(made["llama"], tmp_path / "copied"))


def change(path: Path, **values: Any) -> None:
    """Keys of a file of JSON; None takes one away."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def expected(folder: Path, prompt: str, **more: Any) -> str:
    """What `model.generate` gives, with the prompt in front."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}
    out = model.generate(ids, **options)[0, ids.shape[1] :]
    return prompt + tokenizer.decode(out, skip_special_tokens=True) + "\n"


def generate(capsys: Any, folder: Path, *more: object) -> tuple[int, str, str]:
    return call(capsys, "generate", "--checkpoint", folder, "--max-new-tokens", NEW, *more)


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate_of_transformers(made: dict[str, Path], capsys, kind: str):
    code, out, err = generate(capsys, made[kind], "--prompt", PROMPT, "--temperature", 0)
    assert (code, out) == (0, expected(made[kind], PROMPT))
    assert len(set(out)) > 10
    assert re.fullmatch(rf"{NEW} tokens, [\d,.]+ tokens/s, [\d,]+ bytes of cache\n", err)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("kind", ["retention", "mixed", "llama"])
def test_several_prompts_are_each_alone(
    made: dict[str, Path], capsys, kind: str, temperature: float
):
    """Padded on the left, in float32: greedy tokens and drawn ones."""
    options = ["--temperature", temperature]
    prompts = ["a", PROMPT, "x = 1\\n", ""]
    alone = []
    for i, prompt in enumerate(prompts):
        out = generate(capsys, made[kind], "--prompt", prompt, "--seed", 5 + i, *options)[1]
        alone.append(f"==> {i + 1} of 4 <==\n{out}")
    given = [x for prompt in prompts for x in ("--prompt", prompt)]
    code, out, err = generate(capsys, made[kind], *given, "--seed", 5, *options)
    assert (code, out) == (0, "".join(alone))
    *each, whole = err.splitlines()
    assert [line.split(", ")[0] for line in each] == [f"{i}: {NEW} tokens" for i in (1, 2, 3, 4)]
    assert whole.startswith(f"{4 * NEW} tokens, ")


def test_a_text_ends_where_the_model_ends_it(capsys, copied: Path):
    """With --stop, and without the token that ends it; others go on."""
    prompts = [PROMPT, "b"]
    whole = [expected(copied, prompt) for prompt in prompts]
    # A character of the first text that is not in the second, nor earlier.
    behind = whole[0][len(PROMPT) :]
    end = next(
        x for x in behind[2:-1] if x.isascii() and behind.count(x) == 1 and x not in whole[1]
    )
    (token,) = cases.byte_tokenizer()(end).input_ids
    change(copied / "generation_config.json", eos_token_id=[2, token])
    given = [x for prompt in prompts for x in ("--prompt", prompt)]
    greedy = [*given, "--temperature", 0]
    assert generate(capsys, copied, *greedy)[1] == "".join(
        f"==> {i} of 2 <==\n{text}" for i, text in enumerate(whole, start=1)
    )
    _, out, err = generate(capsys, copied, *greedy, "--stop")
    kept = PROMPT + behind.partition(end)[0]
    assert expected(copied, PROMPT, eos_token_id=[2, token]) == f"{kept}{end}\n"
    assert out == f"==> 1 of 2 <==\n{kept}\n==> 2 of 2 <==\n{whole[1]}"
    counts = [int(line.split()[1]) for line in err.splitlines()[:2]]
    assert 0 < counts[0] < counts[1] == NEW


def test_an_empty_prompt_begins_a_text(made: dict[str, Path], capsys, copied: Path):
    """With the token that begins one, or else with that which ends one."""
    model = AutoModelForCausalLM.from_pretrained(copied)
    for name, token in (("bos_token", 1), ("eos_token", 2)):
        out = model.generate(
            torch.tensor([[token]]), do_sample=False, max_new_tokens=NEW, pad_token_id=0,
            eos_token_id=None,
        )[0, 1:]  # fmt: skip
        wanted = cases.byte_tokenizer().decode(out, skip_special_tokens=True)
        assert generate(capsys, copied, "--temperature", 0)[1] == wanted + "\n"
        change(copied / "tokenizer_config.json", **{name: None})
        for file in ("config.json", "generation_config.json"):
            change(copied / file, **{f"{name}_id": None})
    code, out, err = generate(capsys, copied)
    assert (code, out) == (2, "")
    assert "prompt 1 of 1: expected text, since the tokenizer of" in err


def test_what_the_folder_says_of_sampling(made: dict[str, Path], capsys, copied: Path):
    """What the command line says goes before it."""
    seeded = ["--prompt", PROMPT, "--seed", 3]
    usual = generate(capsys, copied, *seeded)[1]
    assert usual == generate(capsys, copied, *seeded, "--temperature", 0.8, "--top-p", 0.95)[1]
    assert usual != generate(capsys, copied, *seeded, "--top-p", 0.3)[1]
    change(copied / "generation_config.json", do_sample=True, temperature=1.5, top_p=0.3)
    theirs = generate(capsys, copied, *seeded)[1]
    assert theirs == generate(capsys, copied, *seeded, "--temperature", 1.5, "--top-p", 0.3)[1]
    assert theirs != usual
    assert usual == generate(capsys, copied, *seeded, "--temperature", 0.8, "--top-p", 0.95)[1]
    greedy = [*seeded, "--temperature", 0]
    before = generate(capsys, copied, *greedy)[1]
    change(copied / "generation_config.json", repetition_penalty=3.0)
    _, out, _ = generate(capsys, copied, *greedy)
    assert out == expected(copied, PROMPT)
    assert out != before


def test_a_dtype_is_that_of_the_weights(made: dict[str, Path], capsys):
    sizes = []
    for more in ([], ["--dtype", "bfloat16"]):
        err = generate(capsys, made["llama"], "--prompt", PROMPT, *more)[2]
        sizes.append(int(re.search(r"([\d,]+) bytes of cache", err)[1].replace(",", "")))
    length = len(PROMPT.encode()) + NEW - 1  # the last one is not read
    # Keys and values of 2 layers, 2 heads of 8 each.
    assert sizes == [2 * 2 * 2 * 8 * length * width for width in (4, 2)]


def test_characters_of_several_tokens_come_when_they_are_whole():
    tokenizer = cases.byte_tokenizer()
    text = "aé€😀 b"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    stream = Detokenizer(tokenizer, tokenizer("é").input_ids)
    pieces = [stream.add(token) for token in ids]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", " ", "b"]
    assert stream.end() == ""
    assert [stream.add(token) for token in ids[3:5]] == ["", ""]
    assert stream.end() == "\ufffd"
    assert stream.end() == ""
    # What is no character of any kind does not hold back what follows.
    stream = Detokenizer(tokenizer, [])
    assert stream.add(ids[4]) + stream.add(ids[0]) == "\ufffda"


def test_a_text_is_streamed(made: dict[str, Path], capsys, monkeypatch):
    forced = iter(cases.byte_tokenizer()("né€!").input_ids)
    monkeypatch.setattr(folders, "sample", lambda scores, *_: torch.tensor([next(forced)]))
    written: list[str] = []
    monkeypatch.setattr(command, "write", written.append)
    code = cli.main(
        ["generate", "--checkpoint", str(made["llama"]), "--max-new-tokens", "7", "--device", "cpu"]
    )
    assert code == 0
    assert written == ["", "n", "é", "€", "!", "\n"]


def test_no_new_tokens(made: dict[str, Path], capsys):
    given = ["--prompt", "a", "--prompt", "bc", "--max-new-tokens", 0, "--stats"]
    code, out, err = generate(capsys, made["llama"], *given)
    assert (code, out) == (0, "==> 1 of 2 <==\na\n==> 2 of 2 <==\nbc\n")
    assert err.endswith("llama: 3 prompt tokens, no new ones\n")


def test_an_interruption_ends_the_steps(made: dict[str, Path], capsys, monkeypatch):
    count = 0

    def write(text: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            assert cases.threads()
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "write", write)
    code, _, err = generate(capsys, made["llama"], "--max-new-tokens", 10**6)
    assert (code, err) == (130, "")
    assert not cases.threads()


# ---- statistics ---------------------------------------------------------------------------------


def read_table(err: str, name: str) -> tuple[str, list[list[float]]]:
    """The line that begins with a name, and the rows of numbers below its headings."""
    lines = err.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
    assert lines[place + 1].split()[:3] == ["tokens", "seconds", "tokens/s"]
    rows = []
    for line in lines[place + 2 :]:
        if not re.fullmatch(r"[\d,. ]+", line):
            break
        rows.append([float(cell.replace(",", "")) for cell in line.split()])
    return lines[place], rows


@pytest.mark.parametrize("kind", ["retention", "llama", "run"])
def test_statistics_add_up(made: dict[str, Path], capsys, kind: str):
    given = ["--prompt", "ab", "--prompt", "cde", "--max-new-tokens", 60]
    plain = generate(capsys, made[kind], *given)[1]
    code, out, err = generate(capsys, made[kind], *given, "--stats")
    assert (code, out) == (0, plain)  # the warm-up leaves nothing behind
    line, rows = read_table(err, kind)
    assert len(rows) == 9
    assert [rows[0][0], rows[-1][0]] == [2, 120]  # of both texts
    seconds = re.fullmatch(
        rf"{kind}: 5 prompt tokens, first token after ([\d.]+) s, then ([\d,.]+) tokens/s", line
    )
    assert float(seconds[1]) == rows[0][1] > 0
    rate = (120 - 2) / (rows[-1][1] - rows[0][1])
    # Seconds have three digits.
    assert float(seconds[2].replace(",", "")) == pytest.approx(rate, rel=0.001 / rows[-1][1] * 4)
    fixed = rows[0][3]
    if kind == "retention":
        model = AutoModelForCausalLM.from_pretrained(made[kind])
        cache = model(torch.ones(2, 3, dtype=torch.int64)).cache
        assert fixed == sum(x.memory.nbytes + x.slots.nbytes for x in cache.layers)
    before = [0, 0.0]
    for tokens, now, rate, size in rows:
        assert tokens > before[0]
        assert now >= before[1]
        low, high = now - before[1] - 0.0011, now - before[1] + 0.0011
        assert (tokens - before[0]) / high - 0.1 <= rate
        assert low <= 0 or rate <= (tokens - before[0]) / low + 0.1
        before = [tokens, now]
        # As many bytes for each of the two texts, or the same for all lengths.
        length = 3 + tokens / 2 - 1
        assert size == (2 * 2 * 2 * 2 * 8 * 4 * length if kind == "llama" else fixed) > 0


def test_stretches():
    marks = [Mark(i, i * i / 100, 7 * i) for i in range(1, 102)]
    rows = speed.stretches(marks, 4)
    assert [row.tokens for row in rows] == [1, 26, 51, 76, 101]
    for before, row in zip([(0, 0.0), *((r.tokens, r.seconds) for r in rows)], rows, strict=False):
        rate = (row.tokens - before[0]) / (row.seconds - before[1])
        assert row.tokens_per_second == pytest.approx(rate)
        assert row.state_bytes == 7 * row.tokens
    assert len(speed.stretches(marks[:2], 8)) == 2
    assert len(speed.stretches(marks[:1], 8)) == 1
    assert speed.stretches([], 8) == []


def test_marks_do_not_grow_with_the_text(made: dict[str, Path], capsys, monkeypatch):
    monkeypatch.setattr(speed, "_MARKS", 4)
    found = []
    inner = speed.table
    monkeypatch.setattr(speed, "table", lambda *x: found.append(x[2].marks) or inner(*x))
    for kind in ("llama", "run"):
        generate(capsys, made[kind], "--stats", "--max-new-tokens", 18)
        assert [mark.tokens for mark in found.pop()] == [1, 5, 9, 13, 17, 18]


# ---- plots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "svg", "PDF"])
def test_a_plot(made: dict[str, Path], capsys, tmp_path: Path, extension: str):
    target = tmp_path / f"speed.{extension}"
    target.write_text("old")
    code, _, err = generate(capsys, made["retention"], "--plot", target)
    assert (code, err.count("\n")) == (0, 1)
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}[extension]
    assert target.read_bytes().startswith(begins)
    assert os.listdir(tmp_path) == [target.name]


def test_a_plot_draws_the_marks(monkeypatch: pytest.MonkeyPatch):
    marks = {
        "one": [Mark(i, 5 + i / 10, 5) for i in range(1, 60)],
        "two": [Mark(i, i * i / 10, 5) for i in range(1, 60)],
    }
    figures: list = []
    inner = plot.FigureCanvasAgg
    monkeypatch.setattr(plot, "FigureCanvasAgg", lambda x: figures.append(x) or inner(x))
    assert plot.draw(marks, 9, "png").startswith(b"\x89PNG")
    time, rate = figures[0].axes
    for (name, taken), line in zip(marks.items(), time.lines, strict=True):
        assert line.get_label() == name
        assert line.get_xydata().tolist() == [[x.tokens, x.seconds] for x in taken]
    assert [text.get_text() for text in time.get_legend().get_texts()] == ["one", "two"]
    assert rate.lines[0].get_ydata() == pytest.approx([10] * len(rate.lines[0].get_ydata()))
    assert rate.lines[1].get_xdata()[-1] == 59
    assert "9 of the prompt" in rate.get_xlabel()


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_plot_is_written_whole_or_not_at_all(
    made: dict[str, Path], capsys, tmp_path: Path, monkeypatch, step: str
):
    target = tmp_path / "speed.png"
    target.write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*{"write_bytes": (Path, step), "replace": (os, step)}[step], full)
        code, out, err = generate(capsys, made["llama"], "--prompt", "a", "--plot", target)
    assert (code, out[0]) == (2, "a")
    assert err.endswith(f"--plot: cannot write {target}: No space left on device\n")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/speed.png", "--plot: no such folder: "),
        ("speed", "--plot: expected a file ending in one of "),
        ("speed.docx", "--plot: expected a file ending in one of "),
        ("folder.png", "folder.png: a folder"),
        ("file/speed.png", "--plot: "),
        ("x" * 300 + "/a.png", "File name too long"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "run"])
def test_a_plot_that_cannot_be_written(
    made: dict[str, Path], capsys, tmp_path: Path, kind: str, name: str, message: str
):
    """Refused before anything is generated."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    code, out, err = generate(capsys, made[kind], "--plot", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_a_plot_of_nothing_and_without_matplotlib(made: dict[str, Path], capsys, monkeypatch):
    code, out, err = generate(capsys, made["run"], "--plot", "a.png", "--max-new-tokens", 0)
    assert (code, out) == (2, "")
    assert "--plot: expected --max-new-tokens of at least 1, got 0" in err
    monkeypatch.delitem(sys.modules, "retention.generation.plot")
    monkeypatch.delattr("retention.generation.plot")
    for module in [x for x in sys.modules if x.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    code, out, err = generate(capsys, made["run"], "--plot", "a.png")
    assert (code, out) == (2, "")
    assert err.endswith(
        "--plot: needs matplotlib, not installed here: pip install 'power-retention[train]'\n"
    )


# ---- comparisons --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["a"], ["a", PROMPT]])
@pytest.mark.parametrize("kinds", [("retention", "llama"), ("mixed", "run")])
def test_two_models(
    made: dict[str, Path], capsys, tmp_path: Path, kinds: tuple[str, str], prompts: list[str]
):
    given = [x for prompt in prompts for x in ("--prompt", prompt)]
    wanted = ""
    for kind in kinds:
        text = generate(capsys, made[kind], *given)[1]
        heading = f"==> {kind} <==\n" if len(prompts) == 1 else ""
        wanted += heading + text.replace("==> ", f"==> {kind}: ")
    target = tmp_path / "speed.svg"
    more = ["--compare", made[kinds[1]], "--plot", target]
    code, out, err = generate(capsys, made[kinds[0]], *given, *more)
    assert (code, out) == (0, wanted)
    for kind in kinds:
        assert read_table(err, kind)[1][-1][0] == NEW * len(prompts)
    assert target.is_file()


def test_a_second_model_has_the_settings_of_the_first(made: dict[str, Path], capsys, copied: Path):
    """Those of the folder too."""
    alone = generate(capsys, made["run"], "--temperature", 1.5, "--top-p", 0.3)[1]
    change(copied / "generation_config.json", do_sample=True, temperature=1.5, top_p=0.3)
    out = generate(capsys, copied, "--compare", made["run"])[1]
    assert out.endswith(f"==> run <==\n{alone}")
    # Two folders of one name are told apart by where they are.
    other = Path(shutil.copytree(made["llama"], copied.parent / "other" / "copied"))
    err = generate(capsys, copied, "--compare", other)[2]
    for folder in (copied, other):
        assert read_table(err, str(folder))[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare", "nowhere"], "--compare: no such folder: nowhere"),
        (["--compare", "EMPTY"], "EMPTY: expected a run of `retention train`"),
        (["--compare", "llama", "--stop"], "--stop: not allowed with --compare"),
        (["--compare", ""], "argument --compare: expected a path, got ''"),
    ],
)
def test_what_cannot_be_compared(
    made: dict[str, Path], capsys, tmp_path: Path, more: list, message: str
):
    (tmp_path / "EMPTY").mkdir()
    names = {"EMPTY": tmp_path / "EMPTY", **made}
    code, out, err = generate(capsys, made["run"], *(names.get(x, x) for x in more))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# ---- what lies in a folder ----------------------------------------------------------------------


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def no_numbers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')


def larger_tokenizer(folder: Path) -> None:
    model = cases.make_model("llama", cases.BYTES - 200)
    model.save_pretrained(folder)


def no_causal_model(folder: Path) -> None:
    T5Config().save_pretrained(folder)


def own_code(folder: Path) -> None:
    """Which would say that it ran."""
    trap = f"open({str(folder / 'ran')!r}, 'w')\n"
    (folder / "code.py").write_text(trap)
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(folder / "config.json", model_type="own", auto_map=names)


DAMAGE = {
    "config, no JSON": (
        lambda x: (x / "config.json").write_text("{"),
        "config.json: damaged: Expecting property name",
    ),
    "config, no UTF-8": (
        lambda x: (x / "config.json").write_bytes(b'{"a": "\xff"}'),
        "config.json: damaged: 'utf-8' codec can't decode",
    ),
    "config, a list": (
        lambda x: (x / "config.json").write_text("[]"),
        "expected a run of `retention train`, one of its checkpoints or a model of transformers",
    ),
    "config, no model": (
        lambda x: change(x / "config.json", model_type=None),
        "expected a run of `retention train`, one of its checkpoints or a model of transformers",
    ),
    "config, of no size": (
        lambda x: change(x / "config.json", hidden_size=33),
        "cannot read config.json: Class validation error",
    ),
    "config, another type": (
        lambda x: change(x / "config.json", vocab_size="x"),
        "cannot read config.json: Validation error for field 'vocab_size'",
    ),
    "no config": (
        lambda x: (x / "config.json").unlink(),
        "(a config.json with a model_type), found none of them",
    ),
    "code of its own": (own_code, "has, got 'own'; no code of a checkpoint is run"),
    "an encoder": (no_causal_model, "expected a causal language model, got model_type 't5'"),
    "no tokenizer": (no_tokenizer, "cannot read the tokenizer: "),
    "no vocabulary": (no_vocabulary, "cannot read the tokenizer: no vocabulary is there"),
    "a broken tokenizer": (
        lambda x: (x / "tokenizer.json").write_text("{}"),
        "cannot read the tokenizer: ",
    ),
    "another tokenizer": (larger_tokenizer, "the tokenizer is of another model: expected tokens"),
    "generation_config": (
        lambda x: (x / "generation_config.json").write_text("{"),
        "cannot read generation_config.json: ",
    ),
    "no weights": (
        lambda x: (x / "model.safetensors").unlink(),
        "cannot read weights: Error no file named model.safetensors",
    ),
    "broken weights": (break_weights, "cannot read weights: "),
    "cut weights": (cut_weights, "cannot read weights: "),
    "other weights": (
        lambda x: change(x / "config.json", num_hidden_layers=3),
        "weights of another model: 9 are missing, model.layers.2.",
    ),
    "other sizes": (
        lambda x: change(x / "config.json", intermediate_size=48),
        "cannot read weights: ",
    ),
    "no numbers": (no_numbers, "the model's logits are no finite numbers"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder(capsys, copied: Path, damage: str):
    act, message = DAMAGE[damage]
    act(copied)
    code, out, err = generate(capsys, copied, "--prompt", "xyz")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("retention generate: error: ")
    assert message in err
    # The prompt is out by the time that the first token is none.
    assert out == ("xyz" if damage == "no numbers" else "")
    assert not (copied / "ran").exists()
    if damage != "no numbers":
        assert err.startswith(f"retention generate: error: --checkpoint: {copied}")


def test_code_of_a_checkpoint_is_not_run(capsys, copied: Path):
    """Nor asked for, where transformers knows the model without it."""
    own_code(copied)
    change(copied / "config.json", model_type="llama")
    names = {"AutoTokenizer": [None, "code.Tokenizer"]}
    change(copied / "tokenizer_config.json", auto_map=names)
    code, out, _ = generate(capsys, copied, "--prompt", PROMPT, "--temperature", 0)
    assert (code, out) == (0, expected(copied, PROMPT))
    assert not (copied / "ran").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--switch-over-seq-len", 8],
            "--switch-over-seq-len: of runs of `retention train` alone; ",
        ),
        (["--cuda-graph"], "--cuda-graph: of runs of `retention train` alone; "),
        (["--prompt", "a", "--prompt", os.fsdecode(b"\xff")], "prompt 2 of 2: expected UTF-8 for"),
        (["--prompts", "LINES"], "prompt 2 of 3: expected UTF-8 for the tokenizer of"),
    ],
)
def test_what_a_folder_cannot_do(
    made: dict[str, Path], capsys, tmp_path: Path, more: list, message: str
):
    (tmp_path / "lines").write_bytes(b"a\n\xe9\nb")
    more = [tmp_path / "lines" if x == "LINES" else x for x in more]
    code, out, err = generate(capsys, made["retention"], *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_more_tokens_than_a_model_has_positions(made: dict[str, Path], capsys):
    code, out, err = generate(capsys, made["gpt2"], "--prompt", "ab", "--max-new-tokens", 80)
    assert (code, err.count("\n")) == (2, 1)
    assert out.startswith("ab")
    assert "the model takes no more than 64 tokens, prompt and new ones" in err
    assert generate(capsys, made["gpt2"], "--prompt", "ab", "--max-new-tokens", 62)[0] == 0


def test_without_transformers(made: dict[str, Path], capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "retention.transformers", None)  # makes its import fail
    code, out, err = generate(capsys, made["llama"])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is a model of transformers: " in err
    assert generate(capsys, made["run"])[0] == 0


@pytest.mark.parametrize("what", ["run", "checkpoint", "run with a damaged config.json"])
def test_runs_are_told_from_folders(made: dict[str, Path], capsys, tmp_path: Path, what: str):
    folder = Path(shutil.copytree(made["run"], tmp_path / "run"))
    wanted = generate(capsys, folder)[1]
    if what == "checkpoint":
        folder = folder / "checkpoints" / "step-00000012"
    elif what != "run":
        (folder / "config.json").write_text("{")
    code, out, err = generate(capsys, folder)
    assert (code, out) == (0, wanted)
    assert err.endswith(" bytes of state\n")
    if what == "run":
        shutil.rmtree(folder / "checkpoints")
        assert "has no checkpoint yet" in generate(capsys, folder)[2]
