"""`retention chat`: turn by turn, from a cache, what one conversation without a cache gives."""

from __future__ import annotations

import builtins
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generation_cases as cases
from generation_cases import call
from retention import cli
from retention.generation import chat, folders, runs
from retention.generation.base import Conversation
from retention.generation.stream import Stream
from retention.lm import data, generation
from retention.lm.config import ModelConfig
from retention.lm.errors import OutputError
from retention.lm.model import LanguageModel

TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}: "
    "{% elif m.role == 'user' %}<user>{{ m.content }}<model>"
    "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
# Tells what was said in another way each time.
COUNTING = "<bos>{{ 'n' * messages | length }}" + TEMPLATE.removeprefix("<bos>")
PICKY = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}<bos>"
KINDS = ("retention", "mixed", "powercoder", "llama", "mistral", "mamba")
NEW = 12
TURNS = ["hello there", "And you", "why"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of model, with a template; one without; and a run."""
    parent = tmp_path_factory.mktemp("chat")
    tokenizer = cases.letter_tokenizer(chat_template=TEMPLATE)
    found = {"run": cases.train(parent)}
    for kind in KINDS:
        found[kind] = cases.save(parent / kind, talkative(kind, len(tokenizer)), tokenizer)
    lines = cases.letter_tokenizer(cases.LETTERS + "\n")
    found["plain"] = cases.save(parent / "plain", talkative("retention", len(lines)), lines)
    return found


def talkative(kind: str, vocabulary: int) -> Any:
    """A model that says letters: what is printed of an answer is all of it."""
    model = cases.make_model(kind, vocabulary)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[: len(cases.SPECIAL)] = weight[len(cases.SPECIAL) + cases.LETTERS.index(" ")] = 0
    return model


@pytest.fixture
def say(capsys, monkeypatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`retention chat` with lines on standard input: exit code, answers and standard error."""

    def run(folder: Path, lines: list[str | bytes], *more: object) -> tuple[int, str, str]:
        content = b"".join(x if isinstance(x, bytes) else f"{x}\n".encode() for x in lines)
        (tmp_path / "lines").write_bytes(content)
        options = ["--temperature", 0, "--max-new-tokens", NEW, *more]
        with monkeypatch.context() as patched, (tmp_path / "lines").open() as stream:
            patched.setattr(sys, "stdin", stream)
            return call(capsys, "chat", "--checkpoint", folder, *options)

    return run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens models were given, call by call."""
    widths: list[int] = []
    inner = torch.nn.Embedding.forward

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        widths.append(ids.shape[1])
        return inner(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return widths


def without_a_cache(
    folder: Path,
    turns: list[str],
    render: Callable[[list[tuple[str, str]], str], str],
    lines: bool = False,
) -> tuple[list[str], list[list[int]]]:
    """Greedy answers by whole forward passes, each over all that was said; and those tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said: list[tuple[str, str]] = []
    given = []
    for turn in turns:
        ids = tokenizer(render(said, turn), add_special_tokens=False).input_ids
        given.append(ids)
        answer: list[int] = []
        while len(answer) < NEW:
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            text = tokenizer.decode([token])
            if text == "<eos>" or (lines and "\n" in text):
                break
            answer.append(token)
        said.append((turn, tokenizer.decode(answer)))
    return [answer for _, answer in said], given


def by_template(said: list[tuple[str, str]], turn: str) -> str:
    return "<bos>" + "".join(f"<user>{a}<model>{b}<eos>" for a, b in said) + f"<user>{turn}<model>"


def by_lines(said: list[tuple[str, str]], turn: str) -> str:
    return "".join(f"User: {a}\nAssistant:{b}\n" for a, b in said) + f"User: {turn}\nAssistant:"


def shown(answers: list[str]) -> str:
    assert not re.search("[<> ]", "".join(answers))
    return "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_turns_are_one_conversation(made: dict[str, Path], say, read: list[int], kind: str):
    """And each turn reads what is new alone."""
    code, out, err = say(made[kind], TURNS)
    assert (code, err) == (0, "")
    widths, read[:] = list(read), []
    answers, given = without_a_cache(made[kind], TURNS, by_template)
    assert out == shown(answers)
    assert len({*answers}) == 3
    firsts = [width for width in widths if width > 1]
    tokenizer = AutoTokenizer.from_pretrained(made[kind])
    assert firsts[0] == len(given[0])
    for first, before, answer, now in zip(firsts[1:], given, answers, given[1:], strict=False):
        # Of an answer the cache has not seen the last token, unless it is its end.
        held = len(before) + len(tokenizer(answer).input_ids)
        assert first - (len(now) - held) in (0, 1)
    assert len(firsts) == 3


def test_an_answer_ends_where_the_model_ends_it(made: dict[str, Path], say, tmp_path: Path):
    """Then its end is the template's, and not read twice."""
    folder = Path(shutil.copytree(made["retention"], tmp_path / "ends"))
    ends = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = without_a_cache(folder, TURNS[:1], by_template)[0][0]
    # The end is as likely as what would be the fifth token.
    fifth = ends(first).input_ids[4]
    with torch.no_grad():
        head = model.lm_head.weight
        head[ends.eos_token_id] = head[fifth] * 1.5
    model.save_pretrained(folder)
    answers, _ = without_a_cache(folder, TURNS, by_template)
    assert any(len(ends(x).input_ids) < NEW for x in answers[:2])
    assert say(folder, TURNS)[1] == shown(answers)


def test_a_template_that_changes_what_came_before(
    made: dict[str, Path], say, read: list[int], tmp_path: Path
):
    """All of it is read again."""
    tokenizer = cases.letter_tokenizer(chat_template=COUNTING)
    folder = Path(shutil.copytree(made["retention"], tmp_path / "counting"))
    tokenizer.save_pretrained(folder)

    def render(said: list[tuple[str, str]], turn: str) -> str:
        return f"<bos>{'n' * (2 * len(said) + 1)}" + by_template(said, turn).removeprefix("<bos>")

    out = say(folder, TURNS)[1]
    widths, read[:] = list(read), []
    answers, given = without_a_cache(folder, TURNS, render)
    assert out == shown(answers)
    assert [width for width in widths if width > 1] == [len(ids) for ids in given]


def test_a_cache_that_counts_no_tokens(made: dict[str, Path], say, monkeypatch):
    """That of a Mamba: all is read again, into a new one."""
    inner, caches = folders.Folder.run, []

    def run(self: folders.Folder, *arguments: Any) -> folders.Outcome:
        caches.append(arguments[-1])
        return inner(self, *arguments)

    monkeypatch.setattr(folders.Folder, "run", run)
    answers, _ = without_a_cache(made["mamba"], TURNS, by_template)
    assert len({*answers}) == 3
    assert say(made["mamba"], TURNS)[1] == shown(answers)
    assert caches == [None] * 3


def test_a_tokenizer_that_puts_something_in_front(
    made: dict[str, Path], say, read: list[int], tmp_path: Path
):
    """Of the pieces of a text, of which the model then says other text: all is read again."""
    folder = Path(shutil.copytree(made["plain"], tmp_path / "front"))
    tokenizer = cases.letter_tokenizer(cases.LETTERS + "\n", in_front="x")
    tokenizer.save_pretrained(folder)
    out = say(folder, TURNS)[1]
    widths, read[:] = list(read), []
    answers, given = without_a_cache(folder, TURNS, by_lines, lines=True)
    assert out == shown(answers)
    assert [width for width in widths if width > 1] == [len(ids) for ids in given]


def test_without_a_template(made: dict[str, Path], say, read: list[int]):
    """Lines, of which the model's own end ends its answer."""
    folder = made["plain"]
    turns = [*TURNS, "one", "two", "three"]
    out = say(folder, turns)[1]
    widths, read[:] = list(read), []
    # The tokenizer has no word of its own for the beginning.
    answers, given = without_a_cache(folder, turns, by_lines, lines=True)
    assert out == shown(answers)
    firsts = [width for width in widths if width > 1]
    assert firsts[0] == len(given[0])
    assert max(firsts[1:]) < len(given[1])


def test_an_answer_is_a_line(made: dict[str, Path], say, tmp_path: Path):
    """Also where more might come."""
    folder = Path(shutil.copytree(made["plain"], tmp_path / "ends"))
    tokenizer = cases.letter_tokenizer(cases.LETTERS + "\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = without_a_cache(folder, TURNS[:1], by_lines, lines=True)[0][0]
    fifth = tokenizer(first).input_ids[4]
    with torch.no_grad():
        head = model.lm_head.weight
        head[tokenizer("\n").input_ids[0]] = head[fifth] * 1.5
    model.save_pretrained(folder)
    answers, _ = without_a_cache(folder, TURNS, by_lines, lines=True)
    assert any(len(x) < NEW for x in answers[:2])
    assert say(folder, TURNS)[1] == shown(answers)


@pytest.fixture
def random_model(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """In the run's place: one of which every byte that came before changes what it says."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(layers=2, hidden_size=32, heads=2)).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(8)
    monkeypatch.setattr(generation, "load_model", lambda *arguments: model)
    return model


def follows(model: LanguageModel, text: bytes, count: int = NEW) -> bytes:
    """Greedy bytes behind a text that is read anew."""
    stream = generation.generate(model, [text], count, temperature=0)
    return b"".join(piece for (piece,) in stream)


@pytest.mark.parametrize("kind", ["long", "a line", "a file"])
def test_a_run(made: dict[str, Path], say, monkeypatch, random_model: LanguageModel, kind: str):
    """Bytes as they came; an answer ends with its line, or where a file does."""
    turns = [b"d\xc3\xa9f f1(x):", b"\xff", b"return"]
    text = b"abc\nUser: " + turns[0] + b"\nAssistant:"
    end = follows(random_model, text)[4:5]
    if kind == "a line":
        monkeypatch.setattr(runs, "_LINE_END", end)
    elif kind == "a file":
        monkeypatch.setattr(data, "SEPARATOR", end)
    inner, widths = LanguageModel.step, []

    def step(self: LanguageModel, tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        widths.append(tokens.shape[1])
        return inner(self, tokens, *more)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "step", step)
        code, out, err = say(made["run"], [turn + b"\n" for turn in turns], "--system", "abc")
    assert (code, err) == (0, "")
    answers, firsts = [], [len(text) - 1]  # the last byte is a step
    for i, turn in enumerate(turns):
        new = b"\nUser: " + turn + b"\nAssistant:"
        if i:
            text += new
            # What was not given a step yet is read too: the last byte of an answer that was long.
            firsts.append(len(new) - (len(answers[-1]) < NEW))
        answer = follows(random_model, text)
        answers.append(answer if kind == "long" else answer.partition(end)[0])
        text += answers[-1]
    assert (len(answers[0]) < NEW) == (kind != "long")
    assert not any(set(x) & {*b"\n\0 "} for x in answers)
    assert out == "".join(x.decode("utf-8", "replace") + "\n" for x in answers)
    assert [width for width in widths if width > 1] == firsts


def test_sampling_and_commands(made: dict[str, Path], say):
    """What is drawn goes on with the seed, and /reset begins it again, as the conversation."""
    for kind in ("retention", "plain", "run"):
        drawn = ["--temperature", 1.0, "--seed", 4]
        code, out, _ = say(made[kind], ["a", "", "  a ", "/reset", "a", "a", "/exit", "a"], *drawn)
        lines = out.splitlines() if kind != "run" else out.split("\n")[:-1]
        assert code == 0
        assert len(lines) == 4
        assert lines[:2] == lines[2:]
        assert lines[0] != lines[1]
        assert say(made[kind], ["a", "a"], *drawn)[1].split("\n")[:-1] == lines[:2]
        assert say(made[kind], ["a"], *drawn, "--seed", 5)[1] != f"{lines[0]}\n"
        # What is said before all is part of it, after /reset too.
        system = say(made[kind], ["a", "/reset", "a"], *drawn, "--system", "xyz")[1].split("\n")
        assert system[0] == system[1] != lines[0]


def test_system_text_goes_through_the_template(made: dict[str, Path], say):
    def render(said: list[tuple[str, str]], turn: str) -> str:
        return by_template(said, turn).replace("<bos>", "<bos>abc: ")

    answers, _ = without_a_cache(made["llama"], TURNS, render)
    assert say(made["llama"], TURNS, "--system", "abc")[1] == shown(answers)


def test_an_answer_is_streamed(made: dict[str, Path], say, monkeypatch):
    for kind in ("retention", "run"):
        written: list[str] = []
        monkeypatch.setattr(chat, "write", written.append)
        say(made[kind], ["hello"])
        assert written[-1] == "\n"
        assert len(written) > 3
        assert max(map(len, written)) == 1


def interrupted(monkeypatch: pytest.MonkeyPatch, *places: int) -> None:
    """Ctrl-C behind these pieces of text, counted from 1."""
    inner, written = chat.write, []

    def write(text: str) -> None:
        inner(text)
        written.append(text)
        if len(written) in places:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write", write)


MANY = 80  # tokens, far more than are made before an interruption is seen


@pytest.mark.parametrize("kind", ["retention", "llama", "plain"])
def test_an_interruption_stops_an_answer(made: dict[str, Path], say, monkeypatch, kind: str):
    """And the conversation goes on behind what was said."""
    interrupted(monkeypatch, 3)
    folder = made[kind]
    code, out, err = say(folder, ["hello", "and"], "--max-new-tokens", MANY)
    assert (code, err) == (0, "")
    first, second, _ = out.split("\n")
    assert 3 <= len(first) < MANY // 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    render = by_lines if kind == "plain" else by_template
    ids = tokenizer(render([("hello", first)], "and"), add_special_tokens=False).input_ids
    more = {"do_sample": False, "max_new_tokens": MANY, "pad_token_id": 0, "eos_token_id": None}
    said = model.generate(torch.tensor([ids]), **more)[0, len(ids) :]
    assert second == tokenizer.decode(said).partition("\n")[0]


def test_an_interruption_of_a_run(
    made: dict[str, Path], say, monkeypatch, random_model: LanguageModel
):
    interrupted(monkeypatch, 3)
    inner, answers = generation.Continuation.go_on, []

    def go_on(self: generation.Continuation, text: bytes, *more: Any) -> Iterator[bytes]:
        answers.append(b"")
        for piece in inner(self, text, *more):
            answers[-1] += piece
            yield piece

    monkeypatch.setattr(generation.Continuation, "go_on", go_on)
    monkeypatch.setattr(runs, "_LINE_END", b"")
    monkeypatch.setattr(data, "SEPARATOR", b"")
    assert say(made["run"], ["hello", "and"], "--max-new-tokens", MANY)[0] == 0
    assert 3 <= len(answers[0]) < MANY // 2
    text = b"User: hello\nAssistant:%b\nUser: and\nAssistant:" % answers[0]
    assert answers[1:] == [follows(random_model, text, MANY)]


@pytest.mark.parametrize("kind", ["plain", "llama", "run"])
def test_the_space_behind_a_colon_is_not_printed(
    made: dict[str, Path], say, monkeypatch, kind: str
):
    """Which comes with answers in the plain format alone."""
    answer = "  a  b"
    tokenizer = cases.letter_tokenizer(cases.LETTERS)
    forced = iter([*tokenizer(answer).input_ids, tokenizer.eos_token_id])
    monkeypatch.setattr(folders, "sample", lambda *_: torch.tensor([next(forced)]))
    pieces = [letter.encode() for letter in answer]
    monkeypatch.setattr(generation.Continuation, "go_on", lambda *_: pieces)
    shown = answer if kind == "llama" else answer.lstrip(" ")
    assert say(made[kind], ["hello"])[1] == f"{shown}\n"


class Endless(Conversation):
    """Which gives another piece after it was asked to stop."""

    plain = False

    def answer(self, text: bytes, statistics: generation.Statistics) -> Stream[str]:
        def work(give: Callable[[str], None], stopped: Callable[[], bool]) -> None:
            give("x")
            while not stopped():
                time.sleep(0.001)
            give("y")
            time.sleep(0.3)

        return Stream(work)

    def reset(self) -> None:
        pass


def test_a_second_interruption_ends_it_all(capsys, monkeypatch):
    interrupted(monkeypatch, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        chat._answer(Endless(), b"", generation.Statistics())
    assert capsys.readouterr().out == "xy"
    assert not cases.threads()


def test_a_reader_that_goes_away(made: dict[str, Path], say, monkeypatch):
    def write(text: str) -> None:
        assert cases.threads()
        raise OutputError(BrokenPipeError())

    monkeypatch.setattr(chat, "write", write)
    # As when the process ends; capsys has a standard output that is none of its files.
    monkeypatch.setattr(cli, "_discard", lambda stream: None)
    assert say(made["retention"], ["hello"], "--max-new-tokens", 10**6) == (1, "", "")
    assert not cases.threads()


class Terminal:
    """Standard input that is one, as far as the command asks."""

    closed = False

    def isatty(self) -> bool:
        return True


def test_on_a_terminal(made: dict[str, Path], capsys, monkeypatch, say):
    """Ctrl-C at the prompt begins a new line, Ctrl-D ends, and a bad line is not the end."""
    wanted = say(made["retention"], ["hello", "and"])[1].splitlines()
    lines = iter(["hello", KeyboardInterrupt, os.fsdecode(b"\xff"), "and", EOFError])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", typed)
    options = ["--temperature", 0, "--max-new-tokens", NEW]
    code, out, err = call(capsys, "chat", "--checkpoint", made["retention"], *options)
    assert (code, out) == (0, f"{wanted[0]}\n\n{wanted[1]}\n\n")
    explained, refused = err.splitlines()
    assert explained == "/reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer"
    assert refused.startswith("retention chat: the line: expected UTF-8 for the tokenizer of ")


def test_statistics_of_each_answer(made: dict[str, Path], say):
    for kind, memory in (("retention", "cache"), ("run", "state")):
        code, out, err = say(made[kind], ["hello", "and"], "--stats", "--max-new-tokens", 3)
        assert code == 0
        lines = err.splitlines()
        heads = [line for line in lines if line.startswith(f"{kind}: ")]
        assert len(heads) == out.count("\n") == 2
        assert lines[1].split() == ["tokens", "seconds", "tokens/s", memory, "bytes"]
    tokens = [int(head.split()[1]) for head in heads]
    assert tokens[0] == len(b"User: hello\nAssistant:")


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ([b"\xff\n"], [], "the line: expected UTF-8 for the tokenizer of"),
        (["a"], ["--max-new-tokens", 0], "--max-new-tokens: expected at least 1, got 0"),
        (["a"], ["--checkpoint", "nowhere"], "--checkpoint: no such folder: nowhere"),
        (["a"], ["--cuda-graph"], "--cuda-graph: of runs of `retention train` alone; "),
        (["a"], ["--switch-over-seq-len", 4], "--switch-over-seq-len: of runs of"),
        (["a"], ["--checkpoint", "PICKY", "--system", "x"], "does not take this: No system."),
    ],
)
def test_what_cannot_be_said(
    made: dict[str, Path], say, tmp_path: Path, lines: list, more: list, message: str
):
    folder = Path(shutil.copytree(made["retention"], tmp_path / "picky"))
    cases.letter_tokenizer(chat_template=PICKY).save_pretrained(folder)
    more = [folder if x == "PICKY" else x for x in more]
    code, out, err = say(made["retention"], lines, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("retention chat: error: ")
    assert message in err


def test_a_template_that_refuses_a_later_turn(made: dict[str, Path], say, tmp_path: Path):
    """What was said before stays printed."""
    template = (
        "{% if messages | length > 2 %}{{ raise_exception('Enough.') }}{% endif %}" + TEMPLATE
    )
    folder = Path(shutil.copytree(made["retention"], tmp_path / "short"))
    cases.letter_tokenizer(chat_template=template).save_pretrained(folder)
    code, out, err = say(folder, ["hello", "and"])
    assert (code, out) == (2, say(made["retention"], ["hello"])[1])
    assert err.endswith("does not take this: Enough.\n")


def test_a_standard_input_that_is_closed(made: dict[str, Path], capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = call(capsys, "chat", "--checkpoint", made["run"])
    assert (code, out) == (2, "")
    assert err == "retention chat: error: cannot read standard input: closed\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(cli.main(["chat", "--help"]))
    captured = capsys.readouterr()
    assert (end.value.code, captured.err) == (0, "")
    assert captured.out.startswith("usage: retention chat")
    assert "None" not in captured.out


def test_a_stream():
    """In order, to an end or an error, and no further than asked."""
    assert list(Stream(lambda give, stopped: [give(i) for i in range(5)])) == [0, 1, 2, 3, 4]

    def fail(give: Callable[[int], None], stopped: Callable[[], bool]) -> None:
        give(1)
        raise ValueError("what")

    stream = Stream(fail)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="what"):
        next(stream)
    assert list(stream) == []

    def endless(give: Callable[[int], None], stopped: Callable[[], bool]) -> None:
        while not stopped():
            give(1)

    stream = Stream(endless)
    next(stream)
    stream.close()
    assert not stream._thread.is_alive()
