"""Which kind of model lies in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from retention.generation.base import Model, Settings
from retention.generation.runs import Run
from retention.lm import files
from retention.lm.errors import UsageError


def open_model(
    path: Path,
    device: torch.device,
    settings: Settings,
    say: Callable[[str], object] = lambda line: None,
    flag: str = "--checkpoint",
) -> Model:
    """The model in a folder: of a run of `retention train`, of one of its checkpoints, or of
    transformers, which has a `config.json` with a `model_type`.

    Args:
        path: the folder.
        device: where the model is to be.
        settings: of how it is to generate, as far as that can be refused now.
        say: told of a run's checkpoints that are damaged, where one before them is not.
        flag: the option that named the folder, for errors.

    Raises:
        UsageError: where there is none of these, or transformers is missing.
    """
    with files.explained(f"{flag}: cannot read {path}"):
        files.require_folder(path, flag)
        is_checkpoint = files.status(path / "state.json") is not None
        has_checkpoints = files.status(path / "checkpoints") is not None
        has_config = files.status(path / "config.json") is not None
    config: object = {}
    damage: UsageError | None = None
    if has_config and not is_checkpoint:
        try:
            with files.explained(f"{flag}: {path / 'config.json'}: damaged"):
                config = files.parse_json(files.read(path / "config.json").decode())
        except UsageError as error:
            damage = error
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        return _of_transformers(path, device, settings, flag)
    is_run = isinstance(config, dict) and {"model", "train"} <= config.keys()
    if is_checkpoint or has_checkpoints or is_run:
        return Run(path, device, say, flag)
    if damage is not None:
        raise damage
    raise UsageError(
        f"{flag}: {path}: expected a run of `retention train`, one of its checkpoints or a model "
        "of transformers (a config.json with a model_type), found none of them"
    )


def _of_transformers(path: Path, device: torch.device, settings: Settings, flag: str) -> Model:
    try:
        import retention.transformers  # noqa: F401  (says what is missing)
    except ImportError as error:
        raise UsageError(f"{flag}: {path} is a model of transformers: {error}") from None
    from retention.generation.folders import Folder

    return Folder(path, device, settings, flag)
