"""Text from a trained model, a byte at a time, from a state that does not grow."""

from __future__ import annotations

import codecs
import dataclasses
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from retention.lm import checkpoint, data, devices, files
from retention.lm.errors import UsageError
from retention.lm.model import LanguageModel, new_model
from retention.lm.run import RunFolder


@dataclasses.dataclass
class Statistics:
    """Of one generation; filled in while it runs."""

    tokens: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    state_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def load_model(
    path: Path, device: torch.device, say: Callable[[str], object] = lambda line: None
) -> LanguageModel:
    """The model of a checkpoint; `path` is one, or a run's folder (then its newest).

    Args:
        path: the folder.
        device: where the model is to be.
        say: told of each checkpoint of a run that is damaged, where one before it is not.

    Raises:
        UsageError: where there is none, or none that is whole.
    """
    runs = RunFolder(path)
    with files.explained(f"--checkpoint: cannot read {path}"):
        found = files.status(path)
        if found is None:
            raise UsageError(f"--checkpoint: no such folder: {path}")
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(f"--checkpoint: {path} is not a folder")
        is_run = files.status(runs.config_file) is not None
    models: list[LanguageModel] = []

    def use(saved: checkpoint.Checkpoint) -> None:
        model = new_model(saved.model_config)
        saved.load_model(model)
        models.append(model)

    if checkpoint.newest(runs.checkpoints, use, say) is None:
        if is_run:
            raise UsageError(f"--checkpoint: the run in {path} has no checkpoint yet")
        use(checkpoint.read(path))
    return models[-1].to(device).eval()


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """The next byte `[b]` from logits `[b, 256]`.

    Temperature 0 takes the likeliest. Otherwise it is drawn from the smallest set of bytes whose
    probabilities reach `top_p`, the likeliest always among them. Drawn on the CPU, so that a seed
    means the same on every device.
    """
    logits = logits.detach().to("cpu", torch.float32)
    if temperature == 0:
        return logits.argmax(-1)
    # At most 0, so that no temperature makes an infinity that is not a probability of 0.
    below = (logits - logits.amax(-1, keepdim=True)).double()
    probability = (below / temperature).softmax(-1).float()
    probability, byte = probability.sort(dim=-1, descending=True, stable=True)
    masked = probability.cumsum(-1) - probability >= top_p
    masked[..., 0] = False
    drawn = torch.multinomial(probability.masked_fill(masked, 0), 1, generator=generator)
    return byte.gather(-1, drawn)[:, 0]


def generate(
    model: LanguageModel,
    prompt: bytes,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    switch_over_seq_len: int = 512,
    dtype: str = "float32",
    statistics: Statistics | None = None,
) -> Iterator[int]:
    """Bytes that follow `prompt`, as they come.

    Args:
        model: from `load_model`.
        prompt: may be empty: then the model starts where a file starts.
        max_new_tokens: how many.
        temperature, top_p: of `sample`.
        seed: of what is drawn.
        switch_over_seq_len: tokens kept in each layer's ring before they are folded into its state.
        dtype: "float32", "bfloat16" or "float16", of the products and of the ring.
        statistics: filled in while it runs.

    Raises:
        UsageError: where the model's weights, or products in `dtype`, give no finite numbers.
    """
    statistics = Statistics() if statistics is None else statistics
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt or data.SEPARATOR)], device=device)
    statistics.prompt_tokens = tokens.shape[1]
    began = time.monotonic()
    with devices.autocast(device, dtype):
        caches = model.init_caches(1, switch_over_seq_len)
    for _ in range(max_new_tokens):
        # Entered for each byte: a generator must not leave autocast on in its caller meanwhile.
        with devices.autocast(device, dtype):
            logits = model.step(tokens, caches)
        if not logits.isfinite().all():
            raise UsageError("the model's logits are no finite numbers")
        byte = sample(logits, temperature, top_p, generator)
        statistics.tokens += 1
        statistics.seconds = time.monotonic() - began
        statistics.state_bytes = sum(cache.nbytes for cache in caches)
        yield int(byte)
        tokens = byte[:, None].to(device)


def as_text(stream: Iterator[int]) -> Iterator[str]:
    """Pieces of text from bytes, each as soon as its last byte is there.

    What is not UTF-8 comes out as the replacement character, also a character cut off at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in stream:
        if piece := decoder.decode(bytes([byte])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
