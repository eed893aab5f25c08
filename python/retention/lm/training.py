"""The training loop."""

from __future__ import annotations

import dataclasses
import enum
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retention.lm import checkpoint, data, devices, plot
from retention.lm import context as processes
from retention.lm.config import (
    ModelConfig,
    RunConfig,
    TrainConfig,
    check_fields,
    check_number,
    check_type,
)
from retention.lm.context import ALONE, Context
from retention.lm.errors import OutputError, UsageError
from retention.lm.model import LanguageModel, new_model
from retention.lm.progress import TrainingProgress
from retention.lm.run import NoFolder, RunFolder

_KEPT_CHECKPOINTS = 2


class Outcome(enum.IntEnum):
    """How a call of `train` ended, as the exit code of its process."""

    FINISHED = 0
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


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
        return new_model(config).to(device)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that lets matrices decay, and leaves gains and biases alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def loss_of(model: Callable[..., Tensor], tokens: Tensor, context: Context = ALONE) -> Tensor:
    """Mean nats a byte over `tokens` `[b, t + 1]`, each predicted from those before it; of that
    mean, this process's part, where several share the sequences."""
    before, after = tokens[:, :-1], tokens[:, 1:]
    if context.ranks == 1:
        return F.cross_entropy(model(before).float().flatten(0, 1), after.flatten())
    mine = context.share(after.shape[1])
    logits = model(before[:, mine], mine.start).float().flatten(0, 1)
    total = F.cross_entropy(logits, after[:, mine].flatten(), reduction="sum")
    return total / after.numel()


@torch.no_grad()
def validation_loss(
    model: Callable[..., Tensor],
    corpus: data.Corpus,
    config: TrainConfig,
    device: torch.device,
    context: Context = ALONE,
) -> float:
    """Mean nats a byte over the held-out windows."""
    total, count = 0.0, 0
    blocks = data.validation_batches(
        corpus, config.eval_blocks, config.batch_size, config.block_size
    )
    for tokens in blocks:
        with devices.autocast(device, config.dtype):
            loss = loss_of(model, tokens.to(device), context)
        context.add(loss)
        total += loss.item() * len(tokens)
        count += len(tokens)
    return total / count


def train(
    model_config: ModelConfig, config: TrainConfig, out: Path, context_parallel: int = 1
) -> Outcome:
    """Train a new model into the empty folder `out`.

    Args:
        model_config, config: what fixes every loss.
        out: the run's folder, which the first process alone writes.
        context_parallel: processes that share every sequence, of which this is one. It is no part
            of the run, which any number can go on with.

    Raises:
        UsageError: for anything that cannot be done; what was in `out` is then as it was. From the
            first step on, for a full disk or too little memory; the last checkpoint is whole.
        NonFiniteLossError: when the loss is no longer a number; the last checkpoint is whole.
        OutputError: when standard output takes no more; a checkpoint of the last step is there.
    """
    with processes.opened(context_parallel, config.device) as (context, device_name):
        folder = RunFolder(out) if context.rank == 0 else NoFolder(out)
        folder.check_free()
        device = devices.open_device(device_name)
        corpus = data.load_corpus(config.data, config.block_size)
        model = make_model(model_config, config.seed, device)
        optimizer = make_optimizer(model, config)
        run = RunConfig(model_config, config, corpus.summary())
        with folder.locked() as alone:
            folder.check_free()  # another process may have been faster
            folder.write_config(run)
            loop = _Loop(folder, run, corpus, model, optimizer, device, context)
            return loop.run(alone)


def resume(out: Path, device_name: str | None = None, context_parallel: int = 1) -> Outcome:
    """Go on with the run in `out`, to the losses it would have had without a stop.

    A damaged checkpoint is left out, and said to be, where the one before it is whole.

    Args:
        out: the run's folder.
        device_name: where to go on. Default: the device it was started on.
        context_parallel: as for `train`, whatever it was before.

    Raises:
        UsageError: where there is no run, its data has changed, its device is not there, or its
            files are damaged; and as for `train`.
        NonFiniteLossError, OutputError: as for `train`.
    """
    folder = RunFolder(out)
    run = folder.read_config()
    if device_name is not None:
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, device=device_name))
    config = run.train
    with processes.opened(context_parallel, config.device) as (context, device_name):
        device = devices.open_device(device_name)
        corpus = data.load_corpus(config.data, config.block_size)
        if corpus.sha256 != run.data["sha256"]:
            raise UsageError(
                f"--resume: the data is not what the run in {out} began with "
                f"({corpus.files} files, {len(corpus.train) + len(corpus.validation)} bytes)"
            )
        if context.rank > 0:
            folder = NoFolder(out)
        with folder.locked() as alone:
            # Before a model is made of sizes that may be damaged.
            checkpoint.newest(folder.checkpoints, lambda saved: saved.check_model(run.model))
            model = make_model(run.model, config.seed, device)
            optimizer = make_optimizer(model, config)
            loop = _Loop(folder, run, corpus, model, optimizer, device, context)
            loop.restore()
            return loop.run(alone)


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
        context: Context,
    ):
        self.folder = folder
        self.context = context
        context.join(model)
        self.config = run.train
        self.corpus = corpus
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.step = 0
        self.saved = 0  # the step of the last checkpoint
        self.notes: list[str] = []  # what is to be said before the first step
        self.seconds_before = 0.0
        # Halves underflow in the backward pass unless the loss is scaled; bfloat16 does not.
        scales = self.config.dtype == "float16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales)
        self.forward = torch.compile(model) if self.config.compile else model

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is any."""

        def use(saved: checkpoint.Checkpoint) -> None:
            saved.check_model(self.model.config)
            seconds, scaler = self._checked(saved)
            saved.load_model(self.model)
            saved.load_optimizer(self.optimizer, self.model)
            if self.scaler.is_enabled() and scaler:
                self.scaler.load_state_dict(scaler)
            self.step = self.saved = saved.step
            self.seconds_before = seconds

        checkpoint.newest(self.folder.checkpoints, use, self.notes.append)

    def _checked(self, saved: checkpoint.Checkpoint) -> tuple[float, dict[str, float]]:
        """What a checkpoint keeps of the loop: seconds, and the scaler's state, which may be {}."""
        try:
            check_fields("loop", saved.loop, {"seconds", "scaler"})
            seconds, scaler = saved.loop["seconds"], saved.loop["scaler"]
            check_number("seconds", seconds, int, float)
            check_type("scaler", scaler, dict)
            if scaler and self.scaler.is_enabled():
                check_fields("scaler", scaler, set(self.scaler.state_dict()))
                for name, value in scaler.items():
                    check_number(name, value, int, float)
        except ValueError as error:
            raise checkpoint.DamagedCheckpointError(f"{saved.path}: damaged ({error})") from None
        return seconds, scaler

    def run(self, alone: bool) -> Outcome:
        """Train to the last step, or until a signal or a closed standard output.

        Args:
            alone: whether the folder is locked, as it should be.
        """
        config = self.config
        if not alone:
            self.notes.append(f"{self.folder.path} cannot be locked: train there only once")
        recorded = self.folder.open_metrics(self.step)
        if recorded < self.step:
            self.notes.append(
                f"{self.folder.metrics_file}: records after step {recorded} are missing"
            )
        try:
            tokens_per_step = config.batch_size * config.block_size
            progress = TrainingProgress(
                config.steps, self.step, tokens_per_step, self.folder.open_output()
            )
            with _signals() as stop, progress:
                self._announce(progress)
                self.began = time.monotonic()
                # One step is made even where nobody listens, so that there is a checkpoint.
                while self.step < config.steps and not self._ends(progress, stop):
                    loss = self._train_step()
                    progress.update(self.step, loss)
                    last = self.step == config.steps
                    if last or self.step % config.eval_every == 0:
                        self._validate(progress)
                    if last or self.step % config.checkpoint_every == 0:
                        self._save()
                if self.step < config.steps:
                    self._stopped(progress)
                else:
                    progress.note(f"done: {self.folder.path}")
            if self.step < config.steps and stop:
                return Outcome(128 + stop[0])
            if progress.failed:
                raise OutputError(progress.failed)
            return Outcome.FINISHED
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            raise UsageError(
                f"out of memory after step {self.step}; try a smaller --batch-size or "
                f"--block-size ({self._kept()})"
            ) from None
        finally:
            self.folder.close()

    def _ends(self, progress: TrainingProgress, stop: list[int]) -> bool:
        """Whether a signal or a closed output ends the run here, in this process or another one."""
        no_output = 256 if progress.failed and self.step else 0
        reason = self.context.largest(stop[0] if stop else no_output, self.device)
        if reason not in (0, 256) and not stop:
            stop.append(reason)
        return reason != 0

    def _announce(self, progress: TrainingProgress) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        corpus = self.corpus
        progress.note(
            f"{parameters:,} parameters on {self.device}; {len(corpus.train):,} bytes to train on, "
            f"{len(corpus.validation):,} held out; byte frequencies alone: "
            f"{corpus.byte_frequency_loss:.3f} nats"
        )
        for line in self.notes:
            progress.note(line)
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
            loss = loss_of(self.forward, tokens.to(self.device), self.context)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        self.context.add(loss, *(p.grad for p in self.model.parameters()))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        # One transfer for both: each would wait for the device.
        loss_value, norm_value = torch.stack((loss, norm.to(loss.dtype))).tolist()
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
        return (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; "
            f"stopped, try a lower --learning-rate ({self._kept()})"
        )

    def _kept(self) -> str:
        if not self.saved:
            return "no checkpoint yet"
        return f"last checkpoint: {checkpoint.path_of(self.folder.checkpoints, self.saved)}"

    def _validate(self, progress: TrainingProgress) -> None:
        loss = validation_loss(self.forward, self.corpus, self.config, self.device)
        self.folder.record(step=self.step, validation_loss=loss, seconds=round(self._seconds(), 3))
        png = plot.loss_curve(self.folder.read_metrics(), self.corpus.byte_frequency_loss)
        self.folder.write_plot(png)
        progress.note(f"step {self.step}/{self.config.steps}  validation loss {loss:.4f}")

    def _save(self) -> None:
        self.folder.flush_metrics()
        loop = {"seconds": self._seconds(), "scaler": self.scaler.state_dict()}
        self.folder.save(self.step, self.model, self.optimizer, loop, _KEPT_CHECKPOINTS)
        self.saved = self.step

    def _stopped(self, progress: TrainingProgress) -> None:
        if self.step != self.saved:
            self._save()
        progress.note(
            f"stopped after step {self.step}; go on with: "
            f"retention train --out {self.folder.path} --resume"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills at the first SIGINT, SIGTERM or SIGHUP; a second acts as it always did.

    The step under way ends first, so that what is saved is a step's whole result. A signal that is
    ignored from the start, as `nohup` and a shell's background have it, stays so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
