"""What disks and users do to the files of a run: a line and exit code 2, and no run is lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from retention import cli
from retention.lm import checkpoint, data, files, plot, training
from retention.lm.run import RunFolder

TEXT = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i % 7, i % 7) for i in range(40))
TINY = [
    *("--layers", "1", "--hidden-size", "16", "--heads", "2", "--device", "cpu", "--steps", "6"),
    *("--batch-size", "1", "--block-size", "8", "--warmup", "2", "--eval-every", "100"),
    *("--eval-blocks", "1", "--checkpoint-every", "2"),
]
NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, and no time for drawing, compiling and waiting for the disk."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plot, "loss_curve", lambda *given: b"png")
        patched.setattr(torch, "compile", lambda model: model)
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that any user may enter, with a text in it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "text.py").write_bytes(TEXT)
        yield Path(name)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that ended, with checkpoints after steps 4 and 6."""
    assert train(folder, folder / "whole") == (0, "")
    return folder / "whole"


def call(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(x) for x in arguments])
    return code, err.getvalue()


def train(folder: Path, out: Path, *more: object) -> tuple[int, str]:
    return call("train", *TINY, "--data", folder / "text.py", "--out", out, *more)


def resume(out: Path) -> tuple[int, str]:
    return call("train", "--out", out, "--resume")


def generate(path: Path) -> tuple[int, str]:
    return call(
        *("generate", "--checkpoint", path, "--max-new-tokens", 2, "--temperature", 0),
        *("--device", "cpu"),
    )


def refused(result: tuple[int, str], *texts: str) -> None:
    """Exit code 2 and one line with these texts in it."""
    code, err = result
    assert code == 2, err
    assert err.startswith("retention ")
    assert ": error: " in err
    assert err.count("\n") == 1
    for text in texts:
        assert text in err


def losses(out: Path) -> list[tuple[int, float]]:
    return [(x["step"], x["train_loss"]) for x in RunFolder(out).read_metrics() if "grad_norm" in x]


def weights(out: Path, step: int = 6) -> dict[str, bytes]:
    path = checkpoint.path_of(out / "checkpoints", step)
    return {name: x.numpy().tobytes() for name, x in load_file(path / "model.safetensors").items()}


def contents(out: Path) -> dict[Path, bytes]:
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def seal(path: Path) -> None:
    """Make the sums of a checkpoint those of its files, as whoever writes them by hand can."""
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(path.iterdir())
        if file.name != "SHA256SUMS"
    ]
    (path / "SHA256SUMS").write_text("".join(lines))


# ---- damage -------------------------------------------------------------------------------------

CHECKPOINTS = ("checkpoints/step-00000004", "checkpoints/step-00000006")
PARTS = ("model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")
FILES = (
    *("config.json", "metrics.jsonl"),
    *(f"{folder}/{part}" for folder in CHECKPOINTS for part in PARTS),
)
VALUES = (None, True, -1, 0, 3, 1.5, 2**70, 10**400, math.nan, math.inf, "x", "", [], {}, ["x"])


def change_json(path: Path, draw: Callable) -> None:
    """Another type or value somewhere, a field gone or new, or the fields in another order."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    index = draw(st.integers(0, len(lines) - 1))
    try:
        top = json.loads(lines[index])
    except ValueError:
        return  # of two damages the second
    inside = top
    while isinstance(inside, dict) and inside:
        key = draw(st.sampled_from(sorted(inside)))
        if isinstance(inside[key], dict) and draw(st.booleans()):
            inside = inside[key]
            continue
        how = draw(st.sampled_from(["value", "gone", "new", "order"]))
        if how == "value":
            inside[key] = draw(st.sampled_from(VALUES))
        elif how == "gone":
            del inside[key]
        elif how == "new":
            inside["new"] = 1
        else:
            items = draw(st.permutations(list(inside.items())))
            inside.clear()
            inside.update(items)
        break
    lines[index] = json.dumps(top)
    path.write_text("\n".join(lines) + "\n")


def change_tensors(path: Path, draw: Callable) -> None:
    """Entries in another order, of another name, shape or dtype, gone or new."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return  # of two damages the second
    if not tensors:
        return
    name = draw(st.sampled_from(sorted(tensors)))
    other = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["swap", "shape", "flat", "dtype", "bytes", "gone", "new", "empty"]))
    tensor = tensors[name]
    if how == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    elif how == "shape":
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]])
    elif how == "flat":
        tensors[name] = tensor.reshape(1, -1)
    elif how == "dtype":
        tensors[name] = tensor.to(
            draw(st.sampled_from([torch.float64, torch.float16, torch.int32]))
        )
    elif how == "bytes":
        tensors[name] = tensor.reshape(-1, 1).view(torch.uint8)
    elif how == "gone":
        del tensors[name]
    elif how == "new":
        tensors["new"] = torch.zeros(3)
    else:
        tensors = {}
    path.unlink()
    save_file(tensors, path)


def damage(path: Path, draw: Callable) -> None:
    """Do something to a file."""
    content = path.read_bytes()
    how = draw(
        st.sampled_from(["truncate", "flip", "fill", "append", "gone", "inside", "encoding"])
    )
    if how == "truncate":
        path.write_bytes(content[: draw(st.integers(0, max(0, len(content) - 1)))])
    elif how == "flip" and content:
        changed = bytearray(content)
        changed[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
        path.write_bytes(changed)
    elif how == "fill":
        path.write_bytes(draw(st.sampled_from([b"\0", b"[", b"\xff", b"{}"])) * 5000)
    elif how == "append":
        path.write_bytes(content + draw(st.sampled_from([b"x", b"\n", b"{}\n", b'{"step": '])))
    elif how == "gone":
        path.unlink()
        if draw(st.booleans()):
            path.mkdir()
    elif how == "encoding" and path.suffix != ".safetensors":
        path.write_bytes(
            content.decode("latin-1").encode(draw(st.sampled_from(["utf-16", "cp037"])))
        )
    elif path.suffix == ".safetensors":
        change_tensors(path, draw)
    elif path.suffix.startswith(".json"):
        change_json(path, draw)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_damaged_files(folder: Path, whole: Path, drawn: st.DataObject):
    out = folder / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    chosen = drawn.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
    for name in chosen:
        damage(out / name, drawn.draw)
    sealed = drawn.draw(st.booleans())
    if sealed:
        for name in CHECKPOINTS:
            with contextlib.suppress(OSError):  # a folder in a file's place
                seal(out / name)
    before = contents(out)
    code, err = generate(out)
    if code:
        refused((code, err))
    assert contents(out) == before
    code, err = resume(out)
    if code == 1 and sealed:  # weights that were changed are no weights to go on from
        assert "gradient norm" in err
    elif code:
        refused((code, err))
        assert contents(out) == before
    elif not sealed and not any(name.startswith(("config", "metrics")) for name in chosen):
        assert losses(out) == losses(whole)
        assert weights(out) == weights(whole)
        assert checkpoint.newest(out / "checkpoints").step == 6


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_fallback_to_the_checkpoint_before(
    folder: Path, whole: Path, tmp_path: Path, capsys, part: str, how: str
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    path = out / CHECKPOINTS[1] / part
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[:-1])
    code, err = generate(out)
    assert code == 0
    if part in ("model.safetensors", "state.json"):  # which it needs
        assert err.startswith(f"retention generate: {out / CHECKPOINTS[1]}")
        assert "taking step-00000004 instead\n" in err
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"{out / CHECKPOINTS[1]}" in printed
    assert "taking step-00000004 instead\nresuming after step 4\n" in printed
    assert losses(out) == losses(whole)
    assert weights(out) == weights(whole)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}


def test_a_damaged_checkpoint_does_not_count_among_those_kept(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch
):
    """Stopped between the whole one and the damaged one: the whole one stays."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    os.truncate(out / CHECKPOINTS[1] / "state.json", 3)
    inner = data.batch

    def interrupted(corpus, seed, step, *sizes):
        signal.raise_signal(signal.SIGTERM)
        return inner(corpus, seed, step, *sizes)

    with monkeypatch.context() as patched:
        patched.setattr(data, "batch", interrupted)
        assert resume(out) == (143, "")
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000004", "step-00000005"}
    assert resume(out) == (0, "")
    assert weights(out) == weights(whole)


def test_all_checkpoints_damaged(whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in CHECKPOINTS:
        os.truncate(out / name / "optimizer.safetensors", 1000)
    before = contents(out)
    refused(resume(out), "no checkpoint is whole", CHECKPOINTS[1], "not what was written")
    assert contents(out) == before
    assert generate(out)[0] == 0  # which needs no optimizer
    for name in CHECKPOINTS:
        os.truncate(out / name / "model.safetensors", 1000)
    refused(generate(out), "no checkpoint is whole", CHECKPOINTS[1], "not what was written")
    refused(generate(out / CHECKPOINTS[0]), "model.safetensors", "not what was written")


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a checkpoint, or its state, as somebody would who knows the format."""
    if path.suffix == ".json":
        parts = json.loads(path.read_text())
        change(parts)
        path.write_text(json.dumps(parts))
    else:
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path)
    seal(path.parent)


GAIN = "blocks.0.norm_mlp.weight"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "optimizer.safetensors",
            lambda x: x.update({f"{GAIN}/exp_avg": torch.zeros(3)}),
            f"not this model's optimizer: {GAIN}/exp_avg: expected float32 [16], got float32 [3]",
        ),
        (
            "optimizer.safetensors",
            lambda x: x.update({f"{GAIN}/exp_avg_sq": torch.zeros(16, dtype=torch.float64)}),
            f"{GAIN}/exp_avg_sq: expected float32 [16], got float64 [16]",
        ),
        (
            "optimizer.safetensors",
            lambda x: x.update({f"{GAIN}/step": torch.zeros(1)}),
            f"{GAIN}/step: expected float32 [], got float32 [1]",
        ),
        (
            "optimizer.safetensors",
            lambda x: x.pop(f"{GAIN}/exp_avg"),
            f"{GAIN}/exp_avg: expected float32 [16], got nothing",
        ),
        (
            "optimizer.safetensors",
            lambda x: x.update(new=torch.zeros(1)),
            "new: expected nothing, got float32 [1]",
        ),
        (
            "model.safetensors",
            lambda x: x.update({GAIN: torch.zeros(17)}),
            f"not this model's weights: {GAIN}: expected float32 [16], got float32 [17]",
        ),
        (
            "model.safetensors",
            lambda x: x.update({GAIN: torch.zeros(16, dtype=torch.float16)}),
            f"{GAIN}: expected float32 [16], got float16 [16]",
        ),
        (
            "model.safetensors",
            lambda x: x.update({GAIN: torch.zeros(16, dtype=torch.int32)}),
            f"{GAIN}: expected float32 [16], got int32 [16]",
        ),
        ("state.json", lambda x: x.update(step=5), "step 5, in a folder of another name"),
        ("state.json", lambda x: x.update(step=True), "step: expected int, got bool"),
        ("state.json", lambda x: x.pop("loop"), "state: missing loop"),
        ("state.json", lambda x: x["loop"].pop("scaler"), "loop: missing scaler"),
        ("state.json", lambda x: x["loop"].update(seconds="1"), "seconds: expected int or float"),
        ("state.json", lambda x: x["model"].update(deg=4), "of another model (deg: 4, not 2)"),
        ("state.json", lambda x: x["model"].update(layers=2.0), "layers: expected int, got float"),
        ("state.json", lambda x: x["model"].update(x=1), "ModelConfig: unknown x"),
    ],
)
def test_what_a_checkpoint_holds_is_checked(
    whole: Path, tmp_path: Path, capsys, part: str, change: Callable, message: str
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    rewrite(out / CHECKPOINTS[1] / part, change)
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert message in printed
    assert "taking step-00000004 instead" in printed
    assert weights(out) == weights(whole)
    shutil.rmtree(out)
    shutil.copytree(whole, out)
    for name in CHECKPOINTS:
        rewrite(out / name / part, change)
    before = contents(out)
    refused(resume(out), message if "folder of" not in message else "step 5")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "not the configuration of a run (Expecting"),
        ("config.json", b"[]", "a run: expected dict, got list"),
        ("config.json", b"[" * 100_000, "nested too deeply"),
        ("config.json", b'{"format": 1}', "a run: missing data, model, train"),
        ("config.json", '{"format": 1}'.encode("utf-16"), "can't decode byte 0xff"),
        ("config.json", b"\xe9", "can't decode byte 0xe9"),
        ("metrics.jsonl", b"[1]\n", "line 1: not a record of a run (record: expected dict, got"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n', "line 2: not a record of a run (Unterminated"),
        ("metrics.jsonl", b'{"step": 1}\n\xff\n', "line 2: not a record of a run ('utf-8' codec"),
        ("metrics.jsonl", b'{"train_loss": 1}\n', "line 1: not a record of a run (no step)"),
        ("metrics.jsonl", b'{"step": "1"}\n', "step: expected int, got str"),
        ("metrics.jsonl", b'{"step": 1, "train_loss": NaN}\n', "NaN is not a finite number"),
        ("metrics.jsonl", b'{"step": 1, "train_loss": null}\n', "train_loss: expected int or flo"),
        ("metrics.jsonl", b'{"step": 1, "validation_loss": 1e999}\n', "validation_loss: expected"),
        ("metrics.jsonl", b'{"step": 1}\n'.decode().encode("utf-16"), "line 1: not a record"),
    ],
)
def test_damaged_text_files(whole: Path, tmp_path: Path, name: str, content: bytes, message: str):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / name).write_bytes(content)
    before = contents(out)
    refused(resume(out), name, message)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"layers": "1"}, "layers: expected int, got str"),
        ("model", {"heads": 0}, "heads: expected a number above 0, got 0"),
        ("model", {"kv_heads": -1}, "kv_heads: expected a number of at least 0, got -1"),
        ("model", {"rope_theta": None}, "rope_theta: expected int or float, got NoneType"),
        ("model", {"head_dim": 16}, "of another model (head_dim: None, not 16)"),
        ("train", {"data": "text.py"}, "data: expected list or tuple, got str"),
        ("train", {"data": [1]}, "data: expected str, got int"),
        ("train", {"data": [""]}, "--data: no such file or folder: ''"),
        ("train", {"data": ["a\0b"]}, "--data: cannot read 'a\\x00b': embedded null byte"),
        ("train", {"steps": 1.0}, "steps: expected int, got float"),
        ("train", {"batch_size": 2**63}, "batch_size: expected a number of at least 0, got 92233"),
        ("train", {"learning_rate": math.inf}, "Infinity is not a finite number"),
        ("train", {"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got"),
        ("train", {"device": 1}, "device: expected str, got int"),
        ("train", {"device": "\0"}, "--device: '\\x00' is not available here"),
        ("train", {"compile": 1}, "compile: expected bool, got int"),
        ("data", {"sha256": 1}, "sha256: expected str, got int"),
        ("data", {"sha256": "1"}, "--resume: the data is not what the run in"),
    ],
)
def test_values_of_the_configuration(
    whole: Path, tmp_path: Path, section: str, values: dict[str, object], message: str
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    parts = json.loads((out / "config.json").read_text())
    parts[section].update(values)
    (out / "config.json").write_text(json.dumps(parts))
    before = contents(out)
    refused(resume(out), message)
    assert contents(out) == before


def test_lost_records_are_told(whole: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert f"{out / 'metrics.jsonl'}: records after step 3 are missing" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == b"".join(lines[:3])


def test_a_checkpoint_before_the_optimizer_has_a_state(tmp_path: Path):
    """A loss scaled too far puts off the first step of the optimizer, and then there is none."""
    model = training.make_model(cli.ModelConfig(layers=1, hidden_size=32), 0, torch.device("cpu"))
    optimizer = training.make_optimizer(model, cli.TrainConfig())
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"scaler": {"scale": 1.0}})
    checkpoint.read(path).load_optimizer(optimizer, model)
    assert not optimizer.state
    path = checkpoint.save(tmp_path, 2, model, optimizer, {"scaler": {}})
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"float32 .*, got nothing"):
        checkpoint.read(path).load_optimizer(optimizer, model)


def test_a_checkpoint_pruned_while_it_is_read(whole: Path, tmp_path: Path):
    """What a process that trains removes meanwhile is not damaged."""
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    said: list[str] = []
    later = tmp_path / "checkpoints/step-00000008"

    def use(saved: checkpoint.Checkpoint) -> None:
        if saved.step == 6:
            saved.path.rename(later)
            rewrite(later / "state.json", lambda x: x.update(step=8))
            saved.load_model(torch.nn.Linear(1, 1))

    assert checkpoint.newest(tmp_path / "checkpoints", use, said.append).step == 8
    assert said == []


# ---- what disks and permissions refuse ----------------------------------------------------------


class FullDisk:
    """A disk that takes so many writes more, then a part of the next one, and then nothing."""

    def __init__(self, patched: pytest.MonkeyPatch, writes: int):
        self.left = writes
        for module, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace")):
            patched.setattr(module, name, self.refusing(getattr(module, name)))
        for name in ("write_bytes", "write_text"):
            patched.setattr(Path, name, self.half(getattr(Path, name)))
        patched.setattr(checkpoint, "save_file", self.saving(checkpoint.save_file))
        patched.setattr(RunFolder, "open_metrics", self.opening(RunFolder.open_metrics))

    def full(self) -> bool:
        self.left -= 1
        return self.left < 0

    def refusing(self, inner: Callable) -> Callable:
        def act(*given, **more):
            if self.full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))
            return inner(*given, **more)

        return act

    def half(self, inner: Callable) -> Callable:
        def write(path, content, *more):
            if self.full():
                inner(path, content[: len(content) // 2], *more)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return inner(path, content, *more)

        return write

    def saving(self, inner: Callable) -> Callable:
        def save(tensors, path):
            inner(tensors, path)
            if self.full():
                os.truncate(path, 100)
                text = f"{os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})"
                raise SafetensorError(f"Error while serializing: I/O error: {text}")

        return save

    def opening(self, inner: Callable) -> Callable:
        def open_metrics(run, last_step):
            last = inner(run, last_step)
            run._metrics = File(run._metrics, self)
            return last

        return open_metrics


class File:
    """An unbuffered file on a `FullDisk`."""

    def __init__(self, file: io.FileIO, disk: FullDisk):
        self.file, self.disk = file, disk
        self.fileno, self.close = file.fileno, file.close

    def write(self, content: bytes) -> int:
        if self.disk.left == 0:
            self.disk.left -= 1
            return self.file.write(content[:7])
        if self.disk.full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)


def test_a_disk_that_is_full_at_any_write(folder: Path, whole: Path):
    out = folder / "full"
    writes = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patched:
            disk = FullDisk(patched, writes)
            result = train(folder, out)
        if disk.left >= 0:
            break
        refused(result, "--out: cannot write ", ": No space left on device")
        leftovers = [p.name for p in out.rglob(".*")]
        assert not leftovers, (writes, leftovers)
        begun = losses(out) if out.exists() else []
        assert begun == losses(whole)[: len(begun)]
        # Half of a first record is a step that was made.
        if begun or ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
            assert resume(out) == (0, "")
        else:
            assert train(folder, out) == (0, "")
        assert losses(out) == losses(whole)
        assert weights(out) == weights(whole)
        writes += 1 if writes < 20 else 9
    assert result == (0, "")
    assert writes > 60  # three checkpoints of a dozen each, and the other files


def test_a_file_that_the_system_refuses(folder: Path):
    """A limit that the kernel holds, also against the writer of safetensors."""
    out = folder / "limited"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        result = train(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(result, f"--out: cannot write {out / 'checkpoints/step-00000002'}: File too large")
    assert list((out / "checkpoints").iterdir()) == []
    assert resume(out) == (0, "")


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may do everything, whatever the mode of a file is."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def modes(bits: dict[Path, int]) -> Iterator[None]:
    before = {path: stat.S_IMODE(path.stat().st_mode) for path in bits}
    for path in bits:
        path.chmod(bits[path])
    try:
        with ordinary_user():
            yield
    finally:
        for path in reversed(bits):
            path.chmod(before[path])


def test_folders_that_may_not_be_written_or_searched(folder: Path, whole: Path):
    closed = folder / "closed"
    shutil.copytree(whole, closed / "run")
    (closed / "text.py").write_bytes(TEXT)
    denied = ": Permission denied"
    with modes({closed: 0o555}):
        refused(train(folder, closed / "new"), f"--out: cannot write {closed / 'new'}{denied}")
        refused(train(folder, closed / "a/b"), f"--out: cannot write {closed / 'a/b'}{denied}")
    with modes({closed / "run": 0o555}):
        refused(resume(closed / "run"), f"--out: cannot write {closed / 'run'}{denied}")
        assert generate(closed / "run")[0] == 0
    for bits in (0o000, 0o444):
        with modes({closed: bits}):
            run = closed / "run"
            refused(train(folder, run), f"--out: cannot read {run}{denied}")
            refused(resume(run), f"--out: cannot read {run / 'config.json'}{denied}")
            refused(generate(run), f"--checkpoint: cannot read {run}{denied}")
            for path in (closed / "text.py", closed):
                result = call("train", *TINY, "--data", path, "--out", folder / "none")
                refused(result, "--data: cannot read ", str(closed), denied)
    with modes({closed / "run/checkpoints": 0o000, closed / "run": 0o777}):
        refused(resume(closed / "run"), "checkpoints", denied)
        refused(generate(closed / "run"), "checkpoints", denied)
    with modes({closed / "run" / CHECKPOINTS[1]: 0o000}):
        refused(generate(closed / "run" / CHECKPOINTS[1]), CHECKPOINTS[1], denied)
    # What may not be read is not damaged: no other checkpoint is taken in its place.
    for part in ("model.safetensors", "state.json", "SHA256SUMS"):
        with modes({closed / "run" / CHECKPOINTS[1] / part: 0o000}):
            refused(generate(closed / "run"), part, denied)
    for name in ("config.json", "metrics.jsonl"):
        with modes({closed / "run" / name: 0o000, closed / "run": 0o777}):
            refused(resume(closed / "run"), f"--out: cannot read {closed / 'run' / name}{denied}")
    assert not (folder / "none").exists()


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_paths_that_are_too_long(folder: Path, name: str):
    path = folder / name
    long = ": File name too long"
    refused(train(folder, path), f"--out: cannot read {path}{long}")
    refused(resume(path), f"--out: cannot read {path}", long)
    refused(generate(path), f"--checkpoint: cannot read {path}{long}")
    result = call("train", *TINY, "--data", path, "--out", folder / "none")
    refused(result, "--data: cannot read ", long)


def test_things_that_are_no_files(folder: Path, whole: Path, tmp_path: Path):
    """A pipe in a file's place would be waited for, and a loop of links leads nowhere."""
    (tmp_path / "loop").symlink_to("loop")
    refused(train(folder, tmp_path / "loop"), "--out: cannot write ", "File exists")
    refused(generate(tmp_path / "loop"), "--checkpoint: no such folder: ")
    refused(generate(folder / "text.py"), "--checkpoint: ", " is not a folder")
    result = call("train", *TINY, "--data", tmp_path / "loop", "--out", tmp_path / "none")
    refused(result, "--data: no such file or folder: ")
    out = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl"):
        shutil.copytree(whole, out)
        (out / name).unlink()
        os.mkfifo(out / name)
        refused(resume(out), f"{out / name}", "not a file")
        shutil.rmtree(out)
    for part in PARTS:
        shutil.copytree(whole, out)
        (out / CHECKPOINTS[1] / part).unlink()
        os.mkfifo(out / CHECKPOINTS[1] / part)
        assert resume(out) == (0, "")
        assert weights(out) == weights(whole)
        shutil.rmtree(out)
    shutil.copytree(whole, out)
    shutil.rmtree(out / CHECKPOINTS[1])
    (out / CHECKPOINTS[1]).write_bytes(b"")
    assert resume(out) == (0, "")
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(folder: Path, umask: int):
    out = folder / "masked"
    shutil.rmtree(out, ignore_errors=True)
    before = os.umask(umask)
    try:
        assert train(folder, out) == (0, "")
    finally:
        os.umask(before)
    for path in [out, *out.rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


# ---- folders that are taken ---------------------------------------------------------------------


def test_a_run_that_never_made_a_step_can_be_started_again(folder: Path, whole: Path):
    out = folder / "memory"
    inner = training.loss_of

    def starved(model, tokens, context):
        if len(tokens) > 1:
            return torch.empty(2**50)  # which no machine has
        return inner(model, tokens, context)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "loss_of", starved)
        result = train(folder, out, "--batch-size", 3)
        refused(result, "out of memory after step 0; try a smaller --batch-size", "no checkpoint")
        refused(resume(out), "out of memory after step 0")
        assert train(folder, out) == (0, "")
    assert json.loads((out / "config.json").read_text())["train"]["batch_size"] == 1
    assert losses(out) == losses(whole)
    refused(train(folder, out), "already holds a run; continue it with --resume")


@pytest.mark.parametrize(
    "more",
    [
        ["--hidden-size", 2**40],
        ["--hidden-size", 2**62],
        ["--batch-size", 2**50],
        ["--batch-size", 2**62],
        ["--eval-blocks", 2**62, "--batch-size", 2**45],
    ],
)
def test_sizes_beyond_all_memory(folder: Path, more: list):
    out = folder / "beyond"
    refused(train(folder, out, *more), "out of memory")
    assert train(folder, out) == (0, "")
    shutil.rmtree(out)


def test_generating_beyond_all_memory(whole: Path):
    refused(
        call("generate", "--checkpoint", whole, "--device", "cpu", "--switch-over-seq-len", 2**50),
        "out of memory",
    )


@pytest.mark.parametrize("content", [b'{"architectures": ["x"]}', b"{", b""])
def test_a_configuration_of_something_else_is_not_overwritten(
    folder: Path, tmp_path: Path, content: bytes
):
    (tmp_path / "config.json").write_bytes(content)
    refused(train(folder, tmp_path), f"--out: {tmp_path} is taken: ", "config.json: not the conf")
    assert contents(tmp_path) == {Path("config.json"): content}


def test_two_trainings_in_one_folder(folder: Path, whole: Path, monkeypatch):
    out = folder / "two"
    inner = data.batch
    results = []

    def other(corpus, seed, step, *sizes):
        if step == 3:
            results.extend([resume(out), train(folder, out)])
        return inner(corpus, seed, step, *sizes)

    monkeypatch.setattr(data, "batch", other)
    assert train(folder, out) == (0, "")
    refused(results[0], f"--out: another process trains in {out}")
    refused(results[1], f"--out: {out} already holds a run")
    assert losses(out) == losses(whole)
    assert resume(out) == (0, "")
    assert not (out / ".lock").exists()


def test_a_second_start_before_the_first_step(folder: Path, whole: Path, monkeypatch):
    out = folder / "second"
    inner = data.batch
    results = []

    def other(corpus, seed, step, *sizes):
        if step == 0 and not results:
            results.append(None)
            results[0] = train(folder, out)
        return inner(corpus, seed, step, *sizes)

    monkeypatch.setattr(data, "batch", other)
    assert train(folder, out) == (0, "")
    refused(results[0], f"--out: another process trains in {out}")
    assert losses(out) == losses(whole)


def test_a_lock_dies_with_its_process(tmp_path: Path):
    path = tmp_path / ".lock"
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print(True, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"True\n"
            with pytest.raises(BlockingIOError), files.locked(path):
                pass
        finally:
            process.kill()
    assert path.exists()  # SIGKILL leaves the file, but not the lock
    with files.locked(path) as alone:
        assert alone
    assert not path.exists()


def test_a_lock_whose_file_was_removed_meanwhile(tmp_path: Path, monkeypatch):
    """Opened, then removed by whoever held it: a lock on it would keep nobody out."""
    path = tmp_path / ".lock"
    inner = files._lock
    late: list[bool] = []

    def removed(descriptor: int) -> bool:
        if not late:
            late.append(True)
            path.unlink()
        return inner(descriptor)

    monkeypatch.setattr(files, "_lock", removed)
    with files.locked(path), pytest.raises(BlockingIOError), files.locked(path):
        pass


def test_where_there_are_no_locks(folder: Path, monkeypatch):
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", none)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(
            ["train", *TINY, "--data", str(folder / "text.py"), "--out", str(folder / "unlocked")]
        )
    assert code == 0
    assert f"{folder / 'unlocked'} cannot be locked: train there only once" in out.getvalue()
