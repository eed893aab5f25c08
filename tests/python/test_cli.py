"""The command line: what it prints, and one line and exit code 2 for what cannot be done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

import retention
from retention import cli
from retention.lm import data

TEXT = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i % 7, i % 7) for i in range(400))
SMALL = [
    *("--layers", "1", "--hidden-size", "32", "--heads", "2", "--device", "cpu", "--steps", "12"),
    *("--batch-size", "2", "--block-size", "16", "--warmup", "2", "--eval-every", "6"),
    *("--eval-blocks", "4", "--checkpoint-every", "6"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        code = cli.main([str(x) for x in arguments])
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.py").write_bytes(TEXT)
    arguments = ["train", *SMALL, "--data", str(folder / "text.py"), "--out", str(folder / "run")]
    assert cli.main(arguments) == 0
    return folder / "run"


def test_version_and_info(capsys):
    version = retention.info()["version"]
    assert call(capsys, "--version") == (0, f"retention {version}\n", "")
    code, out, err = call(capsys, "info")
    assert (code, err) == (0, "")
    assert version in out
    assert "cpu" in out


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["info"]])
def test_help(capsys, command: list[str]):
    code, out, err = call(capsys, *command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: retention")
    assert "None" not in out


def test_options_reach_the_run(run: Path):
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["layers"] == 1
    assert config["model"]["kv_heads"] is None
    assert config["train"]["block_size"] == 16
    assert config["train"]["data"] == [str(run.parent / "text.py")]
    assert config["train"]["learning_rate"] == cli.TrainConfig.learning_rate
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "metrics.jsonl", "loss.png", "checkpoints"),
    }


def test_every_field_of_the_configuration_is_an_option(capsys):
    _, out, _ = call(capsys, "train", "--help")
    fields = {*cli.ModelConfig.__dataclass_fields__, *cli.TrainConfig.__dataclass_fields__}
    missing = {x for x in fields if f"--{x.replace('_', '-')}" not in out}
    assert missing == {"rope_theta"}


def test_generate_streams_text_and_ends_with_its_figures(run: Path, capsys):
    arguments = ["--checkpoint", run, "--prompt", "déf ", "--max-new-tokens", 30, "--device", "cpu"]
    code, out, err = call(capsys, "generate", *arguments, "--temperature", 0)
    assert code == 0
    assert out.startswith("déf ")
    assert out.endswith("\n")
    assert len(out) > len("déf \n") + 10
    (line,) = err.splitlines()
    tokens, rate, size = line.split(", ")
    assert tokens == "30 tokens"
    assert rate.endswith(" tokens/s")
    assert size.endswith(" bytes of state")
    again = call(capsys, "generate", *arguments, "--temperature", 0, "--switch-over-seq-len", 3)
    assert again[1] == out
    small = int(again[2].split(", ")[-1].split()[0].replace(",", ""))
    assert small < int(size.split()[0].replace(",", ""))  # a shorter ring


def test_generate_from_several_prompts(run: Path, tmp_path: Path, capsys, monkeypatch):
    arguments = ["generate", "--checkpoint", run, "--max-new-tokens", 20, "--device", "cpu"]
    prompts = ["déf ", "", "x \\n+"]
    alone = []
    for i, prompt in enumerate(prompts):
        code, out, _ = call(capsys, *arguments, "--prompt", prompt, "--seed", 5 + i)
        assert code == 0
        assert out.startswith(prompt)
        alone.append(f"==> {i + 1} of 3 <==\n{out}")
    given = [x for prompt in prompts for x in ("--prompt", prompt)]
    code, out, err = call(capsys, *arguments, *given, "--seed", 5)
    assert (code, out) == (0, "".join(alone))
    *each, whole = err.splitlines()
    assert [line.split(", ")[0] for line in each] == [f"{i}: 20 tokens" for i in (1, 2, 3)]
    assert all(line.endswith(" tokens/s") for line in each)
    assert whole.startswith("60 tokens, ")
    assert whole.endswith(" bytes of state")

    # A line each, as it is: escapes are no escapes, and its end may be that of any system.
    lines = tmp_path / "prompts.txt"
    for content in ("déf \n\nx \\n+", "déf \r\n\r\nx \\n+\r\n"):
        lines.write_bytes(content.encode())
        code, out, _ = call(capsys, *arguments, "--prompts", lines, "--seed", 5)
        assert (code, out) == (0, "".join(alone))
        with monkeypatch.context() as patched, lines.open() as stream:
            patched.setattr(sys, "stdin", stream)
            code, out, _ = call(capsys, *arguments, "--prompts", "-", "--seed", 5)
        assert (code, out) == (0, "".join(alone))
    lines.write_bytes(b"d\xc3\xa9f ")
    code, out, err = call(capsys, *arguments, "--prompts", lines, "--seed", 5)
    assert (code, f"==> 1 of 3 <==\n{out}") == (0, alone[0])
    assert err.count("\n") == 1
    code, out, _ = call(capsys, *arguments, *given, "--max-new-tokens", 0)
    headings = "".join(f"==> {i} of 3 <==\n{x}\n" for i, x in enumerate(prompts, start=1))
    assert (code, out) == (0, headings)


def test_generate_stops_where_a_file_ends(run: Path, capsys, monkeypatch):
    arguments = ["generate", "--checkpoint", run, "--max-new-tokens", 30, "--device", "cpu"]
    arguments += ["--prompt", "def ", "--temperature", 1]
    whole = call(capsys, *arguments)[1]
    end = next(x for x in whole[5:20] if x.isascii() and x != whole[4])
    monkeypatch.setattr(data, "SEPARATOR", end.encode())
    assert call(capsys, *arguments)[1] == whole
    code, out, err = call(capsys, *arguments, "--stop")
    assert (code, out) == (0, "def " + whole[4:].partition(end)[0] + "\n")
    assert int(err.split()[0]) < 30


@pytest.mark.parametrize("stdin", [lambda: None, lambda: closed()])
def test_prompts_of_a_standard_input_that_is_closed(run: Path, capsys, monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin())
    code, out, err = call(capsys, "generate", "--checkpoint", run, "--prompts", "-")
    assert (code, out) == (2, "")
    assert err == "retention generate: error: --prompts: cannot read standard input: closed\n"


def test_an_option_not_given_is_told_from_its_default():
    options = vars(cli._parser().parse_args(["train"]))
    fields = {*cli.ModelConfig.__dataclass_fields__, *cli.TrainConfig.__dataclass_fields__}
    assert {x: options[x] for x in fields if options.get(x) is not None} == {}


def test_resume_with_the_same_options_or_none(run: Path, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert call(capsys, "train", "--out", run, "--resume")[0] == 0
    data = ["--data", run.parent / "text.py"]
    assert call(capsys, "train", *SMALL, *data, "--out", run, "--resume")[0] == 0
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", 99], "--steps: 99 differs from 12, which the run in"),
        (["--kv-heads", 1], "--kv-heads: 1 differs from the default, which"),
        (["--data", "elsewhere"], "elsewhere differs from"),
        (["--compile"], "--compile: True differs from False"),
        (["--device", "cuda:77"], "--device: 'cuda:77' is not available here; found: cpu"),
    ],
)
def test_resume_with_other_options(run: Path, capsys, more: list, message: str):
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    code, _, err = call(capsys, "train", "--out", run, "--resume", *more)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data: no such file or folder: "),
        (["--data", "EMPTY"], "holds no bytes"),
        (["--block-size", 20000], "--block-size: 20000 is longer than the data"),
        (["--device", "cuda:77"], "--device: 'cuda:77' is not available here; found: cpu"),
        (["--device", "nonsense"], "--device: 'nonsense' is not available here"),
        (["--steps", 0], "argument --steps: expected a positive integer, got '0'"),
        (["--steps", "x"], "argument --steps: expected an integer, got 'x'"),
        (["--batch-size", -1], "argument --batch-size: expected a positive integer, got '-1'"),
        (["--learning-rate", "nan"], "argument --learning-rate: expected a finite number"),
        (["--learning-rate", 0], "argument --learning-rate: expected a number above 0, got '0'"),
        (["--weight-decay", -1], "argument --weight-decay: expected a number of at least 0"),
        (["--warmup", -1], "argument --warmup: expected an integer of at least 0, got '-1'"),
        (["--seed", 2**63], "argument --seed: expected an integer below 2^63"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--deg", 3], "deg: expected a positive even integer, got 3"),
        (["--heads", 3], "num_heads: expected a divisor of hidden_size = 32"),
        (["--kv-heads", 3], "num_kv_heads: expected a divisor of num_heads = 2"),
        (["--head-dim", 12], "head_dim: expected a positive multiple of 8, got 12"),
        (["--steps", 2**63], "argument --steps: expected an integer below 2^63"),
        (["--resume"], "--out: no run in "),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--data", ""], "argument --data: expected a path, got ''"),
        (["--data", "TEXT", ""], "argument --data: expected a path, got ''"),
        (["--out", ""], "argument --out: expected a path, got ''"),
    ],
)
def test_what_cannot_be_trained(text: Path, tmp_path: Path, capsys, more: list, message: str):
    (tmp_path / "empty").write_bytes(b"")
    names = {"EMPTY": tmp_path / "empty", "TEXT": text}
    more = [names.get(x, x) for x in more]
    out = tmp_path / "deep" / "run"
    defaults = [] if "--resume" in more else [*SMALL, "--data", text]
    code, _, err = call(capsys, "train", *defaults, "--out", out, *more)
    assert code == 2
    assert message in err
    assert err.startswith("retention")
    assert err.count("\n") == 1
    assert not (tmp_path / "deep").exists()


def test_out_that_cannot_be_used(text: Path, run: Path, capsys):
    for out, message in (
        (text, "is not a folder"),
        (text / "run", "cannot write"),
        (run, "already holds a run; continue it with --resume or name another folder"),
    ):
        code, _, err = call(capsys, "train", *SMALL, "--data", text, "--out", out)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert text.read_bytes() == TEXT


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "nowhere"], "--checkpoint: no such folder: nowhere"),
        (["--checkpoint", ""], "argument --checkpoint: expected a path, got ''"),
        (["--temperature", -1], "argument --temperature: expected a number of at least 0"),
        (["--top-p", 0], "argument --top-p: expected a number above 0 and up to 1, got '0'"),
        (["--top-p", 1.5], "argument --top-p: expected a number above 0 and up to 1, got '1.5'"),
        (["--max-new-tokens", -1], "argument --max-new-tokens: expected an integer of at least 0"),
        (["--switch-over-seq-len", 0], "argument --switch-over-seq-len: expected a positive"),
        (["--device", "cuda:77"], "--device: 'cuda:77' is not available here"),
        (["--prompts", "nowhere"], "--prompts: cannot read nowhere: No such file or directory"),
        (["--prompts", "FOLDER"], "not a file"),
        (["--prompts", "EMPTY"], "empty is empty"),
        (["--prompts", ""], "argument --prompts: expected a path, got ''"),
        (["--prompts", "x", "--prompt", "y"], "argument --prompt: not allowed with argument --pro"),
        (["--device", "cpu", "--cuda-graph"], "--cuda-graph: expected a CUDA device, got cpu"),
    ],
)
def test_what_cannot_be_generated(run: Path, tmp_path: Path, capsys, more: list, message: str):
    (tmp_path / "empty").write_bytes(b"")
    names = {"EMPTY": tmp_path / "empty", "FOLDER": tmp_path}
    more = [names.get(x, x) for x in more]
    code, out, err = call(capsys, "generate", "--checkpoint", run, *more)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_benchmarks_into_no_folder(capsys):
    for option in ("--out", "--upstream"):
        code, out, err = call(capsys, "bench", "fwd", option, "")
        assert (code, out) == (2, "")
        assert err == f"retention bench: error: argument {option}: expected a path, got ''\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_no_such_command(capsys, arguments: list[str]):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("retention: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train", ["rich"]),
        ("train", ["matplotlib", "safetensors"]),
        ("generate", ["safetensors"]),
    ],
)
def test_missing_extra_says_what_to_install(
    tmp_path: Path, capsys, monkeypatch, command: str, missing: list[str]
):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, command)
    assert (code, out) == (2, "")
    assert err == (
        f"retention {command}: error: needs {' and '.join(missing)}, not installed here: "
        f"pip install 'power-retention[train]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_starts_without_any_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'safetensors']))\n"
        "from retention.cli import main; sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "retention" in done.stdout


def command(run: Path, *more: str) -> list[str]:
    """A `generate` of its own process."""
    start = [sys.executable, "-m", "retention.cli", "generate", "--device", "cpu"]
    return [*start, "--checkpoint", str(run), *more]


def test_reader_that_goes_away(run: Path):
    with subprocess.Popen(
        command(run, "--max-new-tokens", "100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""


def without_reader() -> TextIO:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def full_disk() -> TextIO:
    return open("/dev/full", "w")


def closed() -> TextIO:
    with open(os.devnull, "w") as file:
        return file


def nothing() -> None:
    """What Python has for a stream that is closed from the start."""


def commands(run: Path) -> list[list]:
    results = run.parent / "results"
    results.mkdir(exist_ok=True)
    row = {"mode": "fwd", "t": 1, "peer": "retention", "ms": 1, "low": 1, "high": 1}
    parts = {"environment": {"device": "x"}, "options": {}, "rows": [row]}
    (results / "results.json").write_text(json.dumps(parts))
    return [
        ["--version"],
        ["--help"],
        ["--cmake-dir"],
        ["info"],
        ["train", "--help"],
        ["train", "--out", run, "--resume"],
        ["generate", "--checkpoint", run, "--max-new-tokens", 3, "--device", "cpu"],
        ["bench", "compare", results, results],
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("stream", "code", "message"),
    [
        (without_reader, 1, ""),
        (full_disk, 2, "No space left on device\n"),
        (closed, 2, "retention: error: standard output is closed\n"),
        (nothing, 2, "retention: error: standard output is closed\n"),
    ],
)
def test_standard_output_that_takes_nothing(
    run: Path, capsys, monkeypatch, stream: Callable[[], TextIO | None], code: int, message: str
):
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    for arguments in commands(run):
        out = stream()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            assert cli.main([str(x) for x in arguments]) == code, arguments
        if out is not None:
            out.close()  # raises nothing: what was left in its buffer went nowhere
        err = capsys.readouterr().err
        if arguments[0] == "generate" and err.count("\n") == 2:
            err = err.split("\n", 1)[1]  # its figures came before
        assert err.endswith(message)
        assert err.count("\n") == (1 if message else 0), err
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before


@pytest.mark.parametrize("stream", [closed, nothing, without_reader])
def test_standard_error_that_takes_nothing(run: Path, capsys, monkeypatch, stream: Callable):
    err = stream()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", err)
        assert cli.main(["generate", "--checkpoint", "nowhere"]) == 2
    if err is not None:
        err.close()
    assert capsys.readouterr().out == ""


def test_training_without_a_reader_leaves_a_checkpoint(
    text: Path, tmp_path: Path, capsys, monkeypatch
):
    out = tmp_path / "run"
    arguments = ["train", *SMALL, "--data", str(text), "--out", str(out)]
    with monkeypatch.context() as patched, without_reader() as pipe:
        patched.setattr(sys, "stdout", pipe)
        assert cli.main(arguments) == 1
    assert capsys.readouterr().err == ""
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000001"]
    assert call(capsys, "train", "--out", out, "--resume")[0] == 0


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    inner = data.batch

    def stopped(corpus, seed, now, *sizes):
        if now == step:
            signal.raise_signal(number)
        return inner(corpus, seed, now, *sizes)

    monkeypatch.setattr(data, "batch", stopped)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_end_a_training(
    text: Path, tmp_path: Path, capsys, monkeypatch, name: str, code: int
):
    out = tmp_path / "run"
    number = getattr(signal, name)
    usual = {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
    before = signal.signal(number, usual)  # the shell's background ignores SIGINT, nohup SIGHUP
    try:
        with monkeypatch.context() as patched:
            stop_at(patched, 4, number)
            got, printed, err = call(capsys, "train", *SMALL, "--data", text, "--out", out)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)
    assert (got, err) == (code, "")
    assert printed.endswith(f"go on with: retention train --out {out} --resume\n")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert call(capsys, "train", "--out", out, "--resume")[0] == 0


def test_a_signal_that_is_ignored_stays_so(text: Path, tmp_path: Path, capsys, monkeypatch):
    """As under `nohup`, whose purpose is that training goes on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 4, signal.SIGHUP)
        assert call(capsys, "train", *SMALL, "--data", text, "--out", tmp_path / "run")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone(text: Path, tmp_path: Path, monkeypatch):
    """The signal comes with a terminal that takes nothing more; the checkpoint does not need it."""
    out = tmp_path / "run"
    stop_at(monkeypatch, 4, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    leader, follower = os.openpty()
    inner = data.batch

    def hung_up(corpus, seed, step, *sizes):
        if step == 3:
            os.close(leader)
        return inner(corpus, seed, step, *sizes)

    monkeypatch.setattr(data, "batch", hung_up)
    try:
        with monkeypatch.context() as patched, open(follower, "w") as terminal:
            patched.setattr(sys, "stdout", terminal)
            arguments = ["train", *SMALL, "--data", str(text), "--out", str(out)]
            assert cli.main(arguments) in (129, 2)  # the bar may be drawn before the signal comes
    finally:
        signal.signal(signal.SIGHUP, before)
    (saved,) = (out / "checkpoints").iterdir()
    assert saved.name in ("step-00000004", "step-00000005")


def test_a_path_that_is_no_text(text: Path, tmp_path: Path, capsysbinary, monkeypatch):
    """Names of files are bytes, and those that are not UTF-8 cannot be printed."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    stop_at(monkeypatch, 1, signal.SIGTERM)
    assert cli.main(["train", *SMALL, "--data", str(text), "--out", out]) == 143
    assert capsysbinary.readouterr().out.endswith(b"/? --resume\n")
    monkeypatch.undo()
    assert cli.main(["train", "--out", out, "--resume"]) == 0
    assert cli.main(["generate", "--checkpoint", out, "--max-new-tokens", "1"]) == 0


def test_other_encodings_of_the_terminal(run: Path):
    done = subprocess.run(
        command(run, "--prompt", "é€", "--max-new-tokens", "4"),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"??")
