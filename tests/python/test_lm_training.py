"""Training: it learns, and what a stop or a kill leaves goes on to the very same losses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retention.lm import checkpoint, data, devices, training
from retention.lm.config import ModelConfig, RunConfig, TrainConfig, run_config_from_json
from retention.lm.errors import UsageError
from retention.lm.run import RunFolder
from retention.lm.training import Outcome, learning_rate, train

TEXT = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i % 7, i % 7) for i in range(400))
MODEL = ModelConfig(layers=1, hidden_size=32, heads=2, kv_heads=1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.py"
    path.write_bytes(TEXT)
    return str(path)


def small(text: str, **more) -> TrainConfig:
    few = {"steps": 60, "batch_size": 4, "block_size": 32, "warmup": 5, "learning_rate": 1e-2}
    often = {"eval_every": 20, "eval_blocks": 8, "checkpoint_every": 10}
    return TrainConfig(data=(text,), **{**few, **often, **more})


def metrics(out: Path) -> list[dict]:
    """All records but the times in them."""
    records = RunFolder(out).read_metrics()
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def steps_of(out: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in sorted((out / "checkpoints").iterdir())]


def test_a_run_learns_and_leaves_its_files(text: str, tmp_path: Path, capsys):
    out = tmp_path / "run"
    assert train(MODEL, small(text), out) is Outcome.FINISHED
    records = metrics(out)
    train_losses = [x["train_loss"] for x in records if "train_loss" in x]
    validation = [x for x in records if "validation_loss" in x]
    assert [x["step"] for x in records if "train_loss" in x] == list(range(1, 61))
    assert [x["step"] for x in validation] == [20, 40, 60]
    run = run_config_from_json((out / "config.json").read_text(), out)
    # A text of one repeated line: within 60 steps far better than its bytes' frequencies.
    assert train_losses[0] > 4
    assert validation[-1]["validation_loss"] < 0.6 * run.data["byte_frequency_loss"]
    assert (run.model, run.train) == (MODEL, small(text))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert steps_of(out) == [50, 60]  # older ones are pruned
    lines = capsys.readouterr().out.splitlines()
    assert any(x.startswith("step 60/60  loss ") and "tokens/s" in x for x in lines)
    assert any(x.startswith("step 40/60  validation loss ") for x in lines)


def test_losses_are_those_of_a_plain_loop(text: str, tmp_path: Path):
    """The first steps again, with AdamW and the cosine written out here in float64's place."""
    config = small(text, steps=4, weight_decay=0.3, grad_clip=0.5)
    train(MODEL, config, tmp_path / "run")
    corpus = data.load_corpus(config.data, 32)
    model = training.make_model(MODEL, 0, torch.device("cpu"))
    moments = {name: [0.0, 0.0] for name, _ in model.named_parameters()}
    got = [x["train_loss"] for x in metrics(tmp_path / "run") if "train_loss" in x]
    for step, wanted in enumerate(got):
        tokens = data.batch(corpus, 0, step, 4, 32)
        log_p = model(tokens[:, :-1]).log_softmax(-1)
        loss = -log_p.gather(-1, tokens[:, 1:, None]).mean()
        # Four steps of float32, the second of which divides by a fresh second moment.
        assert loss.item() == pytest.approx(wanted, rel=1e-4)
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        rate = config.learning_rate * (step + 1) / 5
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad * min(1, 0.5 / norm)
                moments[name][0] = 0.9 * moments[name][0] + 0.1 * g
                moments[name][1] = 0.95 * moments[name][1] + 0.05 * g * g
                mean = moments[name][0] / (1 - 0.9 ** (step + 1))
                square = moments[name][1] / (1 - 0.95 ** (step + 1))
                if p.dim() == 2:
                    p.mul_(1 - rate * 0.3)
                p.sub_(rate * mean / (square.sqrt() + 1e-8))


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=110, warmup=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_model_is_a_function_of_its_seed_and_leaves_the_callers_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first = training.make_model(MODEL, 1, torch.device("cpu"))
    assert torch.equal(torch.rand(1), wanted)
    again = training.make_model(MODEL, 1, torch.device("cpu"))
    other = training.make_model(MODEL, 2, torch.device("cpu"))
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_modules_that_reset_themselves_make_a_new_model():
    """Any order of modules, on a device where there was nothing to draw at first."""
    config = ModelConfig(layers=3, hidden_size=64, heads=4, kv_heads=2)
    models = [training.make_model(config, 0, torch.device("cpu"))]
    for order in (list, lambda modules: reversed(list(modules))):
        with torch.device("meta"):
            model = training.make_model(config, 0, torch.device("meta"))
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, math.nan)
        for module in order(model.modules()):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        models.append(model)
    for name, fresh in models[0].named_parameters():
        for model in models:
            parameter = model.get_parameter(name)
            if parameter.dim() == 1 or name.endswith("g_proj.weight"):
                assert torch.equal(parameter, fresh), name
                continue
            wanted = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down.weight")):
                wanted *= 6**-0.5
            # 2048 draws or more: the deviation is known to within 1 / sqrt(2 * 2048) = 1.6 %.
            assert parameter.std().item() == pytest.approx(wanted, rel=0.08), name
            assert abs(parameter.mean().item()) < 0.1 * wanted, name


def test_only_matrices_decay():
    model = training.make_model(MODEL, 0, torch.device("cpu"))
    decays, stays = training.make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    assert decays["weight_decay"] == 0.1
    assert stays["weight_decay"] == 0.0
    assert {p.dim() for p in decays["params"]} == {2}
    assert {p.dim() for p in stays["params"]} == {1}
    assert len(decays["params"]) + len(stays["params"]) == len(list(model.parameters()))


def test_bfloat16_learns_with_float32_weights(text: str, tmp_path: Path):
    out = tmp_path / "run"
    train(MODEL, small(text, dtype="bfloat16", steps=40), out)
    losses = [x["train_loss"] for x in metrics(out) if "train_loss" in x]
    assert losses[-1] < 0.6 * losses[0]
    weights = load_file(out / "checkpoints" / "step-00000040" / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float32}


# ---- stopping and going on ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Metrics of a run never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.py").write_bytes(TEXT)
    train(MODEL, small(str(folder / "text.py")), folder / "run")
    return metrics(folder / "run")


@pytest.fixture
def signals() -> Iterator[None]:
    """A shell's background ignores SIGINT and nohup SIGHUP, and training would leave it so."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_in_a_process(text: str, out: Path, before: str = "") -> subprocess.Popen:
    """`train` with the configuration of `small`, after the statements in `before`."""
    code = f"""
import os, shutil, signal, sys, time
from pathlib import Path
from retention.lm import checkpoint, training
from retention.lm.config import ModelConfig, TrainConfig
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
{before}
training.train({MODEL!r}, {small(text)!r}, Path({str(out)!r}))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_killed_at_any_step_and_resumed(text: str, tmp_path: Path, whole: list[dict]):
    out = tmp_path / "run"
    # Slowed down, so that the kill comes in the middle on any machine.
    slow = "step = training._Loop._train_step\n"
    slow += "training._Loop._train_step = lambda self: time.sleep(0.05) or step(self)"
    process = run_in_a_process(text, out, slow)
    deadline = time.monotonic() + 60
    while not out.joinpath("metrics.jsonl").exists() or len(metrics(out)) < 27:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 26 <= metrics(out)[-1]["step"] < 60
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 59, "train_lo')  # a record cut off by the kill
    assert training.resume(out) is Outcome.FINISHED
    assert metrics(out) == whole


@pytest.mark.parametrize(
    ("where", "before"),
    [
        (
            "while a checkpoint's files are written",
            "save = checkpoint.save_file\n"
            "def save_file(tensors, path):\n"
            "  save(tensors, path)\n"
            "  'step-00000020' in str(path) and 'optimizer' in str(path) and die()\n"
            "checkpoint.save_file = save_file",
        ),
        (
            "between write and rename",
            "rename = os.rename\n"
            "def dying_rename(a, b):\n"
            "  str(b).endswith('/step-00000020') and die()\n"
            "  rename(a, b)\n"
            "os.rename = dying_rename",
        ),
        (
            "while an old checkpoint is removed",
            "rmtree = shutil.rmtree\n"
            "def dying_rmtree(path, **more):\n"
            "  if 'step-00000010' in str(path) and path.exists():\n"
            "    os.remove(path / 'state.json'); die()\n"
            "  rmtree(path, **more)\n"
            "shutil.rmtree = dying_rmtree",
        ),
    ],
)
def test_killed_in_a_checkpoint_and_resumed(
    text: str, tmp_path: Path, whole: list[dict], where: str, before: str
):
    out = tmp_path / "run"
    process = run_in_a_process(text, out, before)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    saved = checkpoint.newest(out / "checkpoints")
    assert saved.step == (30 if "removed" in where else 10)
    assert any(p.name.startswith(".unfinished") for p in (out / "checkpoints").iterdir())
    training.resume(out)
    assert metrics(out) == whole
    assert steps_of(out) == [50, 60]  # and nothing unfinished beside them


def test_stopped_before_the_first_checkpoint_and_resumed(text, tmp_path, whole):
    out = tmp_path / "run"
    process = run_in_a_process(text, out, "checkpoint.save = lambda *a: die()")
    process.communicate(timeout=120)
    assert not (out / "checkpoints").exists()
    training.resume(out)
    assert metrics(out) == whole


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (signal.SIGINT, Outcome.INTERRUPTED),
        (signal.SIGTERM, Outcome.TERMINATED),
        (signal.SIGHUP, Outcome.HUNG_UP),
    ],
)
def test_interrupted_saves_and_says_how_to_go_on(
    text: str,
    tmp_path: Path,
    whole: list[dict],
    monkeypatch,
    capsys,
    signals: None,
    number: int,
    outcome: Outcome,
):
    out = tmp_path / "run"
    inner = data.batch

    def interrupted(corpus, seed, step, *sizes):
        if step == 13:
            signal.raise_signal(number)
        return inner(corpus, seed, step, *sizes)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(data, "batch", interrupted)
        assert train(MODEL, small(text), out) is outcome
    assert signal.getsignal(number) is before
    assert checkpoint.newest(out / "checkpoints").step == 14  # the step under way was finished
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"stopped after step 14; go on with: retention train --out {out} --resume"
    assert training.resume(out) is Outcome.FINISHED
    assert metrics(out) == whole


def test_resuming_a_finished_run_changes_nothing(text: str, tmp_path: Path):
    out = tmp_path / "run"
    train(MODEL, small(text, steps=10), out)
    before = metrics(out)
    weights = (out / "checkpoints/step-00000010/model.safetensors").read_bytes()
    assert training.resume(out) is Outcome.FINISHED
    assert metrics(out) == before
    assert (out / "checkpoints/step-00000010/model.safetensors").read_bytes() == weights


def test_changed_data_is_not_resumed(text: str, tmp_path: Path):
    out = tmp_path / "run"
    train(MODEL, small(text, steps=10), out)
    before = (out / "metrics.jsonl").read_bytes()
    Path(text).write_bytes(TEXT + b"#")
    with pytest.raises(UsageError, match=r"--resume: the data is not what the run in"):
        training.resume(out)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    text: str, tmp_path: Path, monkeypatch, capsys
):
    out = tmp_path / "run"
    inner = training.loss_of
    calls = []

    def spoiled(model, tokens, context):
        calls.append(1)
        return inner(model, tokens) * (math.nan if len(calls) == 15 else 1)

    monkeypatch.setattr(training, "loss_of", spoiled)
    with pytest.raises(training.NonFiniteLossError) as caught:
        train(MODEL, small(text, eval_every=1000), out)
    assert str(caught.value).startswith("step 15: loss nan")
    assert f"last checkpoint: {out / 'checkpoints/step-00000010'}" in str(caught.value)
    assert metrics(out)[-1]["step"] == 14
    weights = load_file(checkpoint.newest(out / "checkpoints").path / "model.safetensors")
    assert all(x.isfinite().all() for x in weights.values())


def test_non_finite_gradient_stops_before_the_weights_change(text, tmp_path, monkeypatch):
    inner = training.loss_of

    def spoiled(model, tokens, context):
        loss = inner(model, tokens)
        # The square root's slope at 0 is infinite while its value is not.
        return loss + (model.embedding.weight.sum() * 0).sqrt()

    monkeypatch.setattr(training, "loss_of", spoiled)
    with pytest.raises(training.NonFiniteLossError, match=r"step 1: loss \d.*gradient norm nan"):
        train(MODEL, small(text), tmp_path / "run")
    assert metrics(tmp_path / "run") == []


def test_a_run_is_not_overwritten(text: str, tmp_path: Path):
    out = tmp_path / "run"
    train(MODEL, small(text, steps=10), out)
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    with pytest.raises(UsageError, match=r"--out: .* already holds a run; continue it with"):
        train(MODEL, small(text, steps=20), out)
    assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == before


def test_devices():
    assert devices.open_device("cpu").type == "cpu"
    for name in ("cuda:99", "meta", "nonsense", "cpu:x"):
        with pytest.raises(UsageError, match=f"--device: '{name}' is not available here; found"):
            devices.open_device(name)


def test_configuration_survives_json(tmp_path: Path):
    run = RunConfig(MODEL, small("/x"), {"sha256": "1"})
    assert run_config_from_json(run.to_json(), tmp_path) == run
    for broken in ("{", "[]", "{}", json.dumps({"format": 1, "model": {"x": 1}})):
        with pytest.raises(UsageError, match="not the configuration of a run"):
            run_config_from_json(broken, tmp_path)
    later = json.dumps({**json.loads(run.to_json()), "format": 2})
    with pytest.raises(UsageError, match="expected format 1, got 2"):
        run_config_from_json(later, tmp_path)


# ---- checkpoints --------------------------------------------------------------------------------


def saved(tmp_path: Path) -> tuple[torch.nn.Module, torch.optim.AdamW, Path]:
    model = training.make_model(MODEL, 0, torch.device("cpu"))
    optimizer = training.make_optimizer(model, TrainConfig())
    model(torch.arange(9)[None]).square().mean().backward()
    optimizer.step()
    return model, optimizer, checkpoint.save(tmp_path, 7, model, optimizer, {"seconds": 1.5})


def test_checkpoint_restores_model_and_optimizer(tmp_path: Path):
    model, optimizer, path = saved(tmp_path)
    read = checkpoint.read(path)
    assert (read.step, read.model_config, read.loop) == (7, MODEL, {"seconds": 1.5})
    other = training.make_model(MODEL, 1, torch.device("cpu"))
    other_optimizer = training.make_optimizer(other, TrainConfig())
    read.load_model(other)
    read.load_optimizer(other_optimizer, other)
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)
        assert optimizer.state[x].keys() == other_optimizer.state[y].keys()
        for slot, value in optimizer.state[x].items():
            assert torch.equal(value, other_optimizer.state[y][slot])


def test_unusable_checkpoints(tmp_path: Path):
    _, _, path = saved(tmp_path)
    with pytest.raises(UsageError, match="not a checkpoint"):
        checkpoint.read(tmp_path)
    other = training.make_model(ModelConfig(layers=2, hidden_size=32), 0, torch.device("cpu"))
    with pytest.raises(UsageError, match="not this model's weights"):
        checkpoint.read(path).load_model(other)
    with pytest.raises(UsageError, match="not this model's optimizer"):
        checkpoint.read(path).load_optimizer(training.make_optimizer(other, TrainConfig()), other)
    os.truncate(path / "model.safetensors", 100)
    with pytest.raises(UsageError, match=r"model.safetensors: damaged \(not what was written"):
        checkpoint.read(path).load_model(other)
    (path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model.safetensors: cannot be read: No such file"):
        checkpoint.read(path).load_model(other)
    (path / "state.json").write_text("{")
    with pytest.raises(UsageError, match=r"state.json: damaged \(not what was written"):
        checkpoint.read(path)
    (path / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match=r"SHA256SUMS: cannot be read: No such file"):
        checkpoint.read(path)
