"""The training loop."""

from __future__ import annotations

import dataclasses
import enum
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retention.lm import checkpoint, data, devices, plot
from retention.lm.config import ModelConfig, RunConfig, TrainConfig
from retention.lm.errors import UsageError
from retention.lm.model import LanguageModel
from retention.lm.progress import TrainingProgress
from retention.lm.run import RunFolder, write_whole

_KEPT_CHECKPOINTS = 2


class Outcome(enum.Enum):
    """How a call of `train` ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class NonFiniteLossError(UsageError):
    """The loss or its gradient is no longer a number: going on would spoil the weights."""

    exit_code = 1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step that follows `step` others: linear warm-up, then half a cosine to the minimum."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = min(config.min_learning_rate, config.learning_rate)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))


def make_model(config: ModelConfig, seed: int, device: torch.device) -> LanguageModel:
    """A freshly drawn model; the same for a seed whatever was drawn before, and on any device.

    Raises:
        UsageError: for sizes that make no model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return LanguageModel(config).to(device)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from None


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that lets matrices decay, and leaves gains and biases alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean nats a byte over `tokens` `[b, t + 1]`, each predicted from those before it."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validation_loss(
    model: nn.Module, corpus: data.Corpus, config: TrainConfig, device: torch.device
) -> float:
    """Mean nats a byte over the held-out windows."""
    total, count = 0.0, 0
    blocks = data.validation_batches(
        corpus, config.eval_blocks, config.batch_size, config.block_size
    )
    for tokens in blocks:
        with devices.autocast(device, config.dtype):
            total += loss_of(model, tokens.to(device)).item() * len(tokens)
        count += len(tokens)
    return total / count


def train(model_config: ModelConfig, config: TrainConfig, out: Path) -> Outcome:
    """Train a new model into the empty folder `out`.

    Raises:
        UsageError: for anything that cannot be done; `out` is then as it was.
        NonFiniteLossError: when the loss is no longer a number; the last checkpoint is whole.
    """
    folder = RunFolder(out)
    folder.check_free()
    device = devices.open_device(config.device)
    corpus = data.load_corpus(config.data, config.block_size)
    model = make_model(model_config, config.seed, device)
    optimizer = make_optimizer(model, config)
    run = RunConfig(model_config, config, corpus.summary())
    folder.create(run)
    return _Loop(folder, run, corpus, model, optimizer, device).run()


def resume(out: Path, device_name: str | None = None) -> Outcome:
    """Go on with the run in `out`, to the losses it would have had without a stop.

    Args:
        out: the run's folder.
        device_name: where to go on. Default: the device it was started on.

    Raises:
        UsageError: where there is no run, its data has changed, or its device is not there.
        NonFiniteLossError: as for `train`.
    """
    folder = RunFolder(out)
    run = folder.read_config()
    if device_name is not None:
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, device=device_name))
    config = run.train
    device = devices.open_device(config.device)
    corpus = data.load_corpus(config.data, config.block_size)
    if corpus.sha256 != run.data["sha256"]:
        raise UsageError(
            f"--resume: the data is not what the run in {out} began with "
            f"({corpus.files} files, {len(corpus.train) + len(corpus.validation)} bytes)"
        )
    model = make_model(run.model, config.seed, device)
    optimizer = make_optimizer(model, config)
    loop = _Loop(folder, run, corpus, model, optimizer, device)
    saved = checkpoint.newest(folder.checkpoints)
    if saved is not None:
        loop.restore(saved)
    return loop.run()


class _Loop:
    """One process's share of a run: from the step it starts at to the end or a signal."""

    def __init__(
        self,
        folder: RunFolder,
        run: RunConfig,
        corpus: data.Corpus,
        model: LanguageModel,
        optimizer: torch.optim.AdamW,
        device: torch.device,
    ):
        self.folder = folder
        self.config = run.train
        self.corpus = corpus
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.step = 0
        self.seconds_before = 0.0
        # Halves underflow in the backward pass unless the loss is scaled; bfloat16 does not.
        scales = self.config.dtype == "float16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales)
        self.forward = torch.compile(model) if self.config.compile else model

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        saved.load_model(self.model)
        saved.load_optimizer(self.optimizer, self.model)
        if self.scaler.is_enabled() and saved.loop["scaler"]:
            self.scaler.load_state_dict(saved.loop["scaler"])
        self.step = saved.step
        self.seconds_before = saved.loop["seconds"]

    def run(self) -> Outcome:
        config = self.config
        self.folder.open_metrics(self.step)
        try:
            tokens_per_step = config.batch_size * config.block_size
            progress = TrainingProgress(config.steps, self.step, tokens_per_step)
            with _signals() as stop, progress:
                self._announce(progress)
                self.began = time.monotonic()
                while self.step < config.steps and not stop:
                    loss = self._train_step()
                    progress.update(self.step, loss)
                    last = self.step == config.steps
                    if last or self.step % config.eval_every == 0:
                        self._validate(progress)
                    if last or self.step % config.checkpoint_every == 0:
                        self._save()
                if self.step < config.steps:
                    return self._interrupted(progress)
                progress.note(f"done: {self.folder.path}")
            return Outcome.FINISHED
        finally:
            self.folder.close()

    def _announce(self, progress: TrainingProgress) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        corpus = self.corpus
        progress.note(
            f"{parameters:,} parameters on {self.device}; {len(corpus.train):,} bytes to train on, "
            f"{len(corpus.validation):,} held out; byte frequencies alone: "
            f"{corpus.byte_frequency_loss:.3f} nats"
        )
        if self.step:
            progress.note(f"resuming after step {self.step}")

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _train_step(self) -> float:
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = data.batch(
            self.corpus, config.seed, self.step, config.batch_size, config.block_size
        )
        with devices.autocast(self.device, config.dtype):
            loss = loss_of(self.forward, tokens.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        # One transfer for both: each would wait for the device.
        loss_value, norm_value = torch.stack((loss.detach(), norm.to(loss.dtype))).tolist()
        # The scaler itself passes over a step whose scaled gradients overflow.
        finite = math.isfinite(loss_value) and (
            math.isfinite(norm_value) or self.scaler.is_enabled()
        )
        if not finite:
            raise NonFiniteLossError(self._non_finite(loss_value, norm_value))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.folder.record(
            step=self.step,
            train_loss=loss_value,
            grad_norm=norm_value if math.isfinite(norm_value) else None,
            learning_rate=rate,
            seconds=round(self._seconds(), 3),
        )
        return loss_value

    def _non_finite(self, loss: float, norm: float) -> str:
        saved = checkpoint.newest(self.folder.checkpoints)
        kept = "no checkpoint yet" if saved is None else f"last checkpoint: {saved.path}"
        return (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; "
            f"stopped, try a lower --learning-rate ({kept})"
        )

    def _validate(self, progress: TrainingProgress) -> None:
        loss = validation_loss(self.forward, self.corpus, self.config, self.device)
        self.folder.record(step=self.step, validation_loss=loss, seconds=round(self._seconds(), 3))
        png = plot.loss_curve(self.folder.read_metrics(), self.corpus.byte_frequency_loss)
        write_whole(self.folder.plot_file, png)
        progress.note(f"step {self.step}/{self.config.steps}  validation loss {loss:.4f}")

    def _save(self) -> Path:
        self.folder.flush_metrics()
        loop = {"seconds": self._seconds(), "scaler": self.scaler.state_dict()}
        return checkpoint.save(
            self.folder.checkpoints, self.step, self.model, self.optimizer, loop, _KEPT_CHECKPOINTS
        )

    def _interrupted(self, progress: TrainingProgress) -> Outcome:
        if self.step:
            self._save()
        progress.note(
            f"stopped after step {self.step}; go on with: "
            f"retention train --out {self.folder.path} --resume"
        )
        return Outcome.INTERRUPTED


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills at the first SIGINT or SIGTERM; a second one acts as it always did.

    The step under way ends first, so that what is saved is a step's whole result.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    previous = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
