"""Checkpoints: a folder each, whole or absent, whatever moment the process is killed at.

`step-00000200/` holds `model.safetensors`, `optimizer.safetensors` (each tensor named
`<parameter>/<slot>`), `state.json` (the step, the model's configuration and what else the loop
needs to go on) and `SHA256SUMS` of these three, by which damage is told (`sha256sum -c`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from retention.lm import files
from retention.lm.config import (
    ModelConfig,
    check_fields,
    check_number,
    check_type,
    config_from_dict,
)
from retention.lm.errors import UsageError, shown
from retention.lm.model import LanguageModel

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_SUMS = "SHA256SUMS"
_NAME = re.compile(r"step-([0-9]{8,})")
_SUM = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")
# Of AdamW: the moments are shaped as their parameter, the count of steps is one number.
_SLOTS = ("step", "exp_avg", "exp_avg_sq")
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


class DamagedCheckpointError(UsageError):
    """A checkpoint is not what was written, or not of this run."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk; tensors are read when asked for."""

    path: Path
    step: int
    model_config: ModelConfig
    loop: dict[str, Any]
    sums: dict[str, str]  # of each file, hexadecimal

    def check_model(self, config: ModelConfig) -> None:
        """Raise DamagedCheckpointError unless it is of a model of this configuration."""
        for field in dataclasses.fields(config):
            here, run = getattr(self.model_config, field.name), getattr(config, field.name)
            if here != run:
                raise DamagedCheckpointError(
                    f"{self.path}: of another model ({field.name}: {here}, not {run})"
                )

    def load_model(self, model: nn.Module) -> None:
        """Set the parameters of `model`; none of them where that fails.

        Raises:
            DamagedCheckpointError: unless the file is what was written, and holds just the names,
                shapes and dtypes of `model`.
            UsageError: where it cannot be read.
        """
        path = self.path / _MODEL
        with _trusted_after_checks(path):
            tensors = _load(path, self.sums)
            _check_tensors("this model's weights", tensors, model.state_dict())
        model.load_state_dict(tensors)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Set the state of `optimizer`, which must hold the parameters of `model`.

        Raises:
            DamagedCheckpointError, UsageError: as `load_model`.
        """
        path = self.path / _OPTIMIZER
        names = _names(optimizer, model)
        parameters = dict(model.named_parameters())
        with _trusted_after_checks(path):
            tensors = _load(path, self.sums)
            count = torch.empty((), dtype=torch.float32)
            wanted = {
                f"{name}/{slot}": count if slot == "step" else parameters[name]
                for name in names
                for slot in _SLOTS
            }
            if not tensors and self.loop.get("scaler"):
                wanted = {}  # a scaled loss may put off the optimizer's first step
            _check_tensors("this model's optimizer", tensors, wanted)
        state = optimizer.state_dict()
        state["state"] = {
            index: {slot: tensors[f"{name}/{slot}"] for slot in _SLOTS}
            for index, name in enumerate(names)
            if tensors
        }
        optimizer.load_state_dict(state)


def save(
    folder: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    loop: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint into `folder` and prune all but the newest `keep`.

    Written under another name, flushed to the disk, then renamed: a reader sees all of it or none.

    Raises:
        UsageError: where the disk is full or refuses; the other checkpoints are as they were.
    """
    path = path_of(folder, step)
    unfinished = folder / f"{files.UNFINISHED}{path.name}"
    try:
        with files.explained(f"--out: cannot write {path}"):
            folder.mkdir(exist_ok=True)
            _remove(unfinished)
            unfinished.mkdir()
            _write(unfinished, step, model, optimizer, loop)
            if os.path.lexists(path):
                # A damaged one, since a run begins after the last that is not.
                _remove(path)
            os.rename(unfinished, path)
            files.flush(folder)
            prune(folder, step, keep)
    except UsageError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return path


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and what a killed process left.

    Those after `step` are damaged, or the run would have gone on from them.
    """
    for leftover in folder.glob(f"{files.UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = finished(folder)
    later = [path for path in found if _step_of(path) > step]
    for old in later + found[: len(found) - len(later)][:-keep]:
        _remove(old)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` is, or would be."""
    return folder / f"step-{step:08d}"


def finished(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest last, whether damaged or not.

    Raises:
        OSError: where the folder cannot be read.
    """
    if files.status(folder) is None:
        return []
    return sorted((x for x in folder.iterdir() if _NAME.fullmatch(x.name)), key=_step_of)


def newest(
    folder: Path,
    use: Callable[[Checkpoint], object] = lambda saved: None,
    say: Callable[[str], object] = lambda line: None,
) -> Checkpoint | None:
    """The last checkpoint in `folder` that can be used, or None where there is none at all.

    Args:
        folder: of a run's checkpoints.
        use: called with each, the newest first, until it raises no DamagedCheckpointError.
        say: told of each that is damaged, where one before it is not.

    Raises:
        UsageError: where the folder cannot be read, or all checkpoints in it are damaged.
    """
    damaged: dict[Path, DamagedCheckpointError] = {}
    while True:
        with files.explained(f"cannot read {folder}"):
            paths = [path for path in finished(folder) if path not in damaged]
        if not paths:
            break
        try:
            saved = read(paths[-1])
            use(saved)
        except DamagedCheckpointError as error:
            # A process that trains may have pruned it meanwhile; then there are newer ones.
            if os.path.lexists(paths[-1]):
                damaged[paths[-1]] = error
            continue
        for reason in damaged.values():
            say(f"{reason}; taking {saved.path.name} instead")
        return saved
    if damaged:
        raise UsageError(f"{folder}: no checkpoint is whole: {next(iter(damaged.values()))}")
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        DamagedCheckpointError: where `path` is none, or not as it was written.
        UsageError: where it cannot be read.
    """
    source = path / _STATE
    with _trusted_after_checks(source):
        if files.status(source) is None:
            raise DamagedCheckpointError(f"{path}: not a checkpoint (no {_STATE})")
    with _trusted_after_checks(path / _SUMS):
        sums = {name: value for value, name in _SUM.findall(files.read(path / _SUMS).decode())}
    with _trusted_after_checks(source):
        content = files.read(source)
        _check_sum(_STATE, content, sums)
        parts = files.parse_json(content.decode())
        check_type("state", parts, dict)
        check_fields("state", parts, {"step", "model", "loop"})
        check_number("step", parts["step"], int)
        if _NAME.fullmatch(path.name) and _step_of(path) != parts["step"]:
            raise ValueError(f"step {parts['step']}, in a folder of another name")
        check_type("loop", parts["loop"], dict)
        config = config_from_dict(ModelConfig, parts["model"])
        return Checkpoint(path, parts["step"], config, parts["loop"], sums)


@contextlib.contextmanager
def _trusted_after_checks(path: Path) -> Iterator[None]:
    """Within, whatever is wrong with the file at `path` becomes an error that names it."""
    try:
        yield
    except OSError as error:
        kind = DamagedCheckpointError if error.errno in _DAMAGE else UsageError
        raise kind(f"{path}: cannot be read: {shown(error)}") from None
    except (ValueError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: damaged ({error})") from None


def _check_sum(name: str, content: bytes, sums: dict[str, str]) -> None:
    if name not in sums:
        raise ValueError(f"{_SUMS} does not have {name}")
    if hashlib.sha256(content).hexdigest() != sums[name]:
        raise ValueError(f"not what was written, by {_SUMS}")


def _load(path: Path, sums: dict[str, str]) -> dict[str, Tensor]:
    # By its bytes: a map of the file could change after the check, and safetensors opens no path
    # that is not UTF-8.
    content = files.read(path)
    _check_sum(path.name, content, sums)
    try:
        return load(content)
    except KeyError as error:
        raise ValueError(f"PyTorch has no dtype {error}") from None


def _check_tensors(what: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise ValueError unless names, shapes and dtypes are those of `wanted`."""

    def described(tensors: dict[str, Tensor], name: str) -> str:
        if name not in tensors:
            return "nothing"
        tensor = tensors[name]
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    for name in sorted(found.keys() | wanted.keys()):
        got, expected = described(found, name), described(wanted, name)
        if got != expected:
            raise ValueError(f"not {what}: {name}: expected {expected}, got {got}")


def _write(
    folder: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    loop: dict[str, Any],
) -> None:
    state = {"step": step, "model": dataclasses.asdict(model.config), "loop": loop}
    (folder / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    _save_tensors(weights, folder / _MODEL)
    _save_tensors(_optimizer_tensors(optimizer, model), folder / _OPTIMIZER)
    names = (_MODEL, _OPTIMIZER, _STATE)
    lines = []
    for name in names:
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    (folder / _SUMS).write_text("".join(lines))
    for name in names:
        # safetensors makes files that nobody else may read, whatever the umask is.
        shutil.copymode(folder / _SUMS, folder / name)
        files.flush(folder / name)
    files.flush(folder / _SUMS)
    files.flush(folder)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # It keeps the number of an OSError in its text alone.
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise OSError(str(error)) from None
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves none with a file missing."""
    if not path.name.startswith(files.UNFINISHED):
        doomed = path.with_name(f"{files.UNFINISHED}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        path = doomed
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Parameter names in the order in which the optimizer's state numbers them."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[p] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{slot}": tensor.detach().contiguous()
        for index, name in enumerate(_names(optimizer, model))
        for slot, tensor in state.get(index, {}).items()
    }
