"""Checkpoints: a folder each, whole or absent, whatever moment the process is killed at.

`step-00000200/` holds `model.safetensors`, `optimizer.safetensors` (each tensor named
`<parameter>/<slot>`) and `state.json` (the step, the model's configuration and what else the loop
needs to go on).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retention.lm.config import ModelConfig, model_config_from_dict
from retention.lm.errors import UsageError
from retention.lm.model import LanguageModel

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk; tensors are read when asked for."""

    path: Path
    step: int
    model_config: ModelConfig
    loop: dict[str, Any]

    def load_model(self, model: nn.Module) -> None:
        """Set the parameters of `model`."""
        try:
            model.load_state_dict(_load(self.path / _MODEL))
        except RuntimeError as error:
            summary = str(error).splitlines()[0]
            raise UsageError(
                f"{self.path / _MODEL}: not this model's weights ({summary})"
            ) from None

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Set the state of `optimizer`, which must hold the parameters of `model`."""
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _load(self.path / _OPTIMIZER).items():
            name, _, slot = key.rpartition("/")
            slots.setdefault(name, {})[slot] = tensor
        names = _names(optimizer, model)
        if set(slots) != set(names):
            raise UsageError(f"{self.path / _OPTIMIZER}: not this model's optimizer")
        state = optimizer.state_dict()
        state["state"] = {index: slots[name] for index, name in enumerate(names)}
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
    """
    path = folder / f"step-{step:08d}"
    folder.mkdir(exist_ok=True)
    if not path.exists():
        unfinished = folder / f"{_UNFINISHED}{path.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
        save_file(weights, unfinished / _MODEL)
        save_file(_optimizer_tensors(optimizer, model), unfinished / _OPTIMIZER)
        state = {"step": step, "model": dataclasses.asdict(model.config), "loop": loop}
        (unfinished / _STATE).write_text(json.dumps(state, indent=2) + "\n")
        for file in unfinished.iterdir():
            flush(file)
        flush(unfinished)
        os.rename(unfinished, path)
        flush(folder)
    prune(folder, keep)
    return path


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed process left unfinished."""
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in _finished(folder)[:-keep]:
        # A kill halfway through a removal must not leave a checkpoint with a file missing.
        doomed = folder / f"{_UNFINISHED}{old.name}"
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The last checkpoint in `folder`, or None."""
    paths = _finished(folder)
    return read(paths[-1]) if paths else None


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises:
        UsageError: where `path` is none.
    """
    source = path / _STATE
    try:
        parts = json.loads(source.read_text())
        config = model_config_from_dict(parts["model"], source)
        return Checkpoint(path, parts["step"], config, parts["loop"])
    except OSError as error:
        raise UsageError(f"{path}: not a checkpoint ({_STATE}: {error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{source}: not the state of a checkpoint ({error})") from None


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        # Cloned: what was read may be a map of the file, and a run writes to its tensors.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Parameter names in the order in which the optimizer's state numbers them."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[p] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{slot}": tensor.detach().contiguous()
        for index, name in enumerate(_names(optimizer, model))
        for slot, tensor in state[index].items()
    }
