"""Text from a trained model, of one or many prompts, from states that do not grow.

A step of all sequences stays on the device, from the bytes before to those drawn. On a CUDA device
it is a graph, replayed for each byte, and the host reads bytes in blocks while it goes on.
"""

from __future__ import annotations

import codecs
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from retention.lm import checkpoint, data, devices, files
from retention.lm.errors import UsageError
from retention.lm.model import LanguageModel, new_model
from retention.lm.run import RunFolder
from retention.ops.numerics import widest

# Steps that a device is given at once, by its type. On others each byte is read as it comes.
_STEPS_AT_ONCE = {"cuda": 32}
# Bytes of prompts, padding counted, that the model takes at once.
_PROMPT_BYTES = 2**16
_WARM_UP_STEPS = 2
_NOT_FINITE = -1  # in a byte's place


@dataclasses.dataclass
class Progress:
    """Of one prompt, or of several together."""

    prompt_tokens: int = 0
    tokens: int = 0  # new ones
    seconds: float = 0.0  # that these took: the prompt, and the capture of a graph, come before
    ended: bool = False
    tokens_before: int = 0  # those of the new ones that came with the prompt, not in `seconds`

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - self.tokens_before) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.tokens_per_second:,.1f} tokens/s"


class Mark(NamedTuple):
    """How far a generation has come, as the host sees it."""

    tokens: int  # new ones, of all prompts
    seconds: float  # since the prompts were given to the model
    state_bytes: int


@dataclasses.dataclass
class Statistics(Progress):
    """Of one generation; filled in while it runs."""

    state_bytes: int = 0
    each: list[Progress] = dataclasses.field(default_factory=list)  # one for each prompt
    # Steps from one mark to the next, besides those at the first and the last; 0: no marks.
    mark_every: int = 0
    marks: list[Mark] = dataclasses.field(default_factory=list)
    began: float = 0.0  # by time.monotonic(), when the prompts were given to the model
    _steps: int = 0
    _marked: int = 0

    def begin(self) -> None:
        """The prompts are given to the model now."""
        self.began = time.monotonic()

    def count(self, steps: int, state_bytes: Callable[[], int] | None = None) -> None:
        """So many steps more are done, and `each` has their tokens.

        `state_bytes` is asked where there is a mark. Default: they are what they were.
        """
        now = time.monotonic()
        self.tokens = sum(progress.tokens for progress in self.each)
        self.ended = all(progress.ended for progress in self.each)
        self._steps += steps
        due = not self.marks or self._steps - self._marked >= self.mark_every
        marking = self.mark_every > 0 and (due or self.ended)
        if state_bytes is not None and (marking or self.ended):
            self.state_bytes = state_bytes()
        if not marking or (self.marks and self.tokens == self.marks[-1].tokens):
            return  # or it is the step that only showed that all have ended
        self._marked = self._steps
        self.marks.append(Mark(self.tokens, now - self.began, self.state_bytes))


def load_model(
    path: Path,
    device: torch.device,
    say: Callable[[str], object] = lambda line: None,
    flag: str = "--checkpoint",
) -> LanguageModel:
    """The model of a checkpoint; `path` is one, or a run's folder (then its newest).

    Args:
        path: the folder.
        device: where the model is to be.
        say: told of each checkpoint of a run that is damaged, where one before it is not.
        flag: the option that named the folder, for errors.

    Raises:
        UsageError: where there is none, or none that is whole.
    """
    runs = RunFolder(path)
    with files.explained(f"{flag}: cannot read {path}"):
        files.require_folder(path, flag)
        is_run = files.status(runs.config_file) is not None
    models: list[LanguageModel] = []

    def use(saved: checkpoint.Checkpoint) -> None:
        model = new_model(saved.model_config)
        saved.load_model(model)
        models.append(model)

    if checkpoint.newest(runs.checkpoints, use, say) is None:
        if is_run:
            raise UsageError(f"{flag}: the run in {path} has no checkpoint yet")
        try:
            use(checkpoint.read(path))
        except checkpoint.DamagedCheckpointError as error:
            raise UsageError(f"{flag}: {error}") from None
    return models[-1].to(device).eval()


def sample(logits: Tensor, temperature: float, top_p: float, drawn: Tensor) -> Tensor:
    """The next byte `[b]` int64 from logits `[b, 256]`, on their device and without waiting for it.

    Temperature 0 takes the likeliest. Otherwise it is one of the smallest set of bytes whose
    probabilities reach `top_p`, the likeliest always among them: that at which the sum of
    probabilities, the largest first, passes `drawn` of the set's.

    Args:
        logits: `[b, 256]`. Where they are not finite, the byte is any.
        temperature: at least 0.
        top_p: above 0, up to 1.
        drawn: `[b]`, at least 0 and below 1: uniform, for bytes with their probabilities.
    """
    if temperature == 0:
        return logits.argmax(-1)
    limits = torch.finfo(widest(logits.device))
    return sample_warm(logits, min(max(temperature, limits.tiny), limits.max), top_p, drawn)


def sample_warm(
    logits: Tensor, temperature: float | Tensor, top_p: float | Tensor, drawn: Tensor
) -> Tensor:
    """`sample` at temperatures above 0, which may differ from row to row, as `top_p` may.

    Args:
        logits, drawn: as `sample` has them.
        temperature: normal and finite in the device's widest dtype; one, or `[b, 1]` of that dtype.
        top_p: one, or `[b, 1]` of that dtype.
    """
    wide = widest(logits.device)
    # As they came: of fewer bits, a device sorts them faster.
    logits, token = logits.sort(dim=-1, descending=True, stable=True)
    logits = logits.to(wide)
    # At most 0, so that no temperature makes an infinity that is not a probability of 0.
    below = logits - logits[:, :1]
    reached = (below / temperature).softmax(-1).cumsum(-1)
    # The set ends where top_p is reached; rounding may have it that it never is.
    last = (reached[:, :-1] < top_p).sum(-1, keepdim=True)
    place = torch.searchsorted(
        reached, drawn.to(wide)[:, None] * reached.gather(-1, last), right=True
    )
    return token.gather(-1, torch.minimum(place, last))[:, 0]


@dataclasses.dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_p: float
    seed: int
    stop: bytes  # any of these ends a text


class _Steps:
    """Steps of n sequences, with all that they read and write on the device.

    Attributes:
        device: the model's.
        sampling: how bytes are drawn, and where a text ends.
        block: most steps that `take` takes.
        caches: of the model, with n slots.
    """

    def __init__(
        self,
        model: LanguageModel,
        n: int,
        switch_over_seq_len: int | None,
        dtype: str,
        sampling: _Sampling,
        cuda_graph: bool,
    ):
        self.device = next(model.parameters()).device
        self._model = model.for_decoding(getattr(torch, dtype))
        self._dtype = dtype
        self.sampling = sampling
        self._seed(n)
        self.block = _STEPS_AT_ONCE.get(self.device.type, 1)
        with devices.autocast(self.device, dtype):
            self.caches = model.init_caches(n, switch_over_seq_len)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._token = zeros(n, dtype=torch.int64)
        self._slots = zeros(n, dtype=torch.int32) - 1
        self._drawn = zeros(self.block, n, dtype=widest(self.device))
        self._bytes = zeros(self.block, n, dtype=torch.int16)
        self._place = zeros(1, dtype=torch.int64)  # of the step in its block
        self._run = self._step
        if cuda_graph:
            with devices.current(self.device):
                self._run = self._captured()

    def _seed(self, n: int) -> None:
        seed = self.sampling.seed
        self._generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]

    def reset(self) -> None:
        """Nothing was seen, and nothing was drawn."""
        for cache in self.caches:
            cache.reset()
        self._seed(len(self._token))

    def unread(self) -> list[bytes]:
        """Of each sequence the last byte, which its cache has not seen; nothing where one ended it
        that is no part of it."""
        pairs = zip(self._token.tolist(), self._slots.tolist(), strict=True)
        return [bytes([byte]) if slot >= 0 else b"" for byte, slot in pairs]

    def read(self, tokens: Tensor, slots: Tensor, attention_mask: Tensor | None) -> None:
        """Bytes `[b, t]` of prompts go into caches, as `LanguageModel.step` has them."""
        with devices.autocast(self.device, self._dtype):
            self._model.step(tokens, self.caches, slots, attention_mask)

    def begin(self, last: Tensor) -> None:
        """All sequences go on behind these bytes, `[n]`, which the caches have not seen."""
        self._token.copy_(last)
        self._slots.copy_(torch.arange(len(last)))
        self._place.zero_()

    def take(self, count: int) -> Callable[[], Tensor]:
        """The next `count` steps, at most `block`, and what waits for their bytes: int16
        `[count, n]`."""
        with devices.current(self.device):
            self._draw(count)
            for _ in range(count):
                self._run()
            self._place.zero_()
            if self.device.type != "cuda":
                taken = self._bytes[:count].cpu().clone()
                return lambda: taken
            read = torch.empty(count, len(self._token), dtype=torch.int16, pin_memory=True)
            read.copy_(self._bytes[:count], non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def wait() -> Tensor:
            done.synchronize()
            return read

        return wait

    def _draw(self, count: int) -> None:
        # By generators of the CPU, so that a seed means the same on every device, and each
        # sequence's own, so that it means the same beside whatever others.
        if self.sampling.temperature == 0:
            return
        each = [torch.rand(count, generator=x, dtype=torch.float64) for x in self._generators]
        # Below 1 in fewer bits too.
        most = 1 - torch.finfo(self._drawn.dtype).eps / 2
        drawn = torch.stack(each, dim=1).clamp_(max=most).to(self._drawn.dtype)
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()
        self._drawn[:count].copy_(drawn, non_blocking=True)

    @torch.no_grad()
    def _step(self) -> None:
        """The next byte of every sequence. Nothing waits for the device, and no tensor that
        outlasts the step is a new one."""
        # Entered for each step: a generator must not leave autocast on in its caller meanwhile.
        with devices.autocast(self.device, self._dtype):
            logits = self._model.step(self._token[:, None], self.caches, self._slots)
        drawn = self._drawn.index_select(0, self._place)[0]
        byte = sample(logits, self.sampling.temperature, self.sampling.top_p, drawn)
        broken = (logits * 0).sum(-1) != 0  # as NaN is, of infinities too
        shown = byte.to(self._bytes.dtype).masked_fill(broken, _NOT_FINITE)
        self._bytes.index_copy_(0, self._place, shown[None])
        self._token.copy_(byte)
        for end in self.sampling.stop:
            self._slots.masked_fill_(byte == end, -1)
        self._place.add_(1)

    def _captured(self) -> Callable[[], None]:
        # Of rows that are none, so that no cache has seen anything.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay


def generate(
    model: LanguageModel,
    prompts: Sequence[bytes],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    switch_over_seq_len: int | None = None,
    dtype: str = "float32",
    stop: bool = False,
    cuda_graph: bool | None = None,
    statistics: Statistics | None = None,
) -> Iterator[list[bytes]]:
    """Bytes that follow prompts, as they come: of each prompt those since the last time.

    What follows a prompt does not depend on the others, up to rounding. On a CUDA device bytes come
    32 at a time, elsewhere one by one.

    Args:
        model: from `load_model`.
        prompts: one or more, of any lengths. Behind an empty one the model starts where a file
            starts.
        max_new_tokens: how many for each.
        temperature, top_p: of `sample`.
        seed: of what is drawn behind the first prompt. Each next one has the next seed.
        switch_over_seq_len: tokens kept in each layer's ring before they are folded into its state.
            Default: chosen by the cache.
        dtype: "float32", "bfloat16" or "float16", of the products and of the ring.
        stop: whether a text ends where the model begins another file. It is padding from then on.
        cuda_graph: whether steps are replays of a CUDA graph. Default: on a CUDA device.
        statistics: filled in while it runs.

    Raises:
        ValueError: for no prompts.
        UsageError: for a graph on another device; later, where the model's weights, or products in
            `dtype`, give no finite numbers.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    cuda_graph = _captures(model, cuda_graph)
    prompts = [prompt or data.SEPARATOR for prompt in prompts]
    sampling = _Sampling(temperature, top_p, seed, data.SEPARATOR if stop else b"")
    statistics = Statistics() if statistics is None else statistics

    def run() -> Iterator[list[bytes]]:
        steps = _Steps(model, len(prompts), switch_over_seq_len, dtype, sampling, cuda_graph)
        yield from _go_on(steps, prompts, max_new_tokens, statistics)

    _prepare(statistics, prompts)
    return run()


class Continuation:
    """One text that goes on, turn by turn, from caches that are kept between the turns.

    Args:
        model, temperature, top_p, seed, switch_over_seq_len, dtype, cuda_graph: of `generate`.
        stop: bytes of which any ends a turn, and is no part of the text.

    Raises:
        UsageError: as `generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        switch_over_seq_len: int | None = None,
        dtype: str = "float32",
        stop: bytes = b"",
        cuda_graph: bool | None = None,
    ):
        cuda_graph = _captures(model, cuda_graph)
        sampling = _Sampling(temperature, top_p, seed, stop)
        self._steps = _Steps(model, 1, switch_over_seq_len, dtype, sampling, cuda_graph)
        self._unread = b""  # at the end of the text

    def go_on(
        self,
        text: bytes,
        max_new_tokens: int,
        statistics: Statistics | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[bytes]:
        """Bytes that follow all that came before and `text`, as they come.

        Args:
            text: at least a byte. Only this is read: what came before is in the caches.
            max_new_tokens, statistics: of `generate`.
            stopped: asked between steps, whether to end here; what is in the caches by then is
                given still.
        """
        statistics = Statistics() if statistics is None else statistics
        text = self._unread + text
        _prepare(statistics, [text])
        for (piece,) in _go_on(self._steps, [text], max_new_tokens, statistics, stopped):
            yield piece
        (self._unread,) = self._steps.unread()

    def reset(self) -> None:
        """There is no text, and its seed begins again."""
        self._steps.reset()
        self._unread = b""


def _captures(model: LanguageModel, cuda_graph: bool | None) -> bool:
    """Whether steps are a graph: what was asked for, or the default."""
    device = next(model.parameters()).device
    if cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph: expected a CUDA device, got {device}")
    return device.type == "cuda" if cuda_graph is None else cuda_graph


def _prepare(statistics: Statistics, prompts: list[bytes]) -> None:
    statistics.each = [Progress(prompt_tokens=len(prompt)) for prompt in prompts]
    statistics.prompt_tokens = sum(map(len, prompts))


def _go_on(
    steps: _Steps,
    prompts: list[bytes],
    max_new_tokens: int,
    statistics: Statistics,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[bytes]]:
    """What follows prompts that have a byte at least, behind what the caches have seen."""
    statistics.state_bytes = sum(cache.nbytes for cache in steps.caches)
    statistics.begin()
    _read_prompts(steps, [prompt[:-1] for prompt in prompts])
    steps.begin(torch.tensor([prompt[-1] for prompt in prompts]))
    yield from _collect(steps, max_new_tokens, statistics, stopped)


def _read_prompts(steps: _Steps, prompts: list[bytes]) -> None:
    """Prompts go into the caches, in pieces where they are long."""
    rest = {slot: prompt for slot, prompt in enumerate(prompts) if prompt}
    while rest:
        width = min(max(map(len, rest.values())), max(1, _PROMPT_BYTES // len(rest)))
        pieces = [prompt[:width] for prompt in rest.values()]
        padded = bytearray(b"".join(piece.ljust(width, b"\0") for piece in pieces))
        tokens = torch.frombuffer(padded, dtype=torch.uint8).view(-1, width).to(steps.device)
        slots = torch.tensor([*rest], dtype=torch.int32, device=steps.device)
        mask = None
        if any(len(piece) < width for piece in pieces):
            lengths = torch.tensor([*map(len, pieces)], device=steps.device)
            mask = torch.arange(width, device=steps.device) < lengths[:, None]
        steps.read(tokens.long(), slots, mask)
        rest = {slot: prompt[width:] for slot, prompt in rest.items() if len(prompt) > width}


def _collect(
    steps: _Steps, max_new_tokens: int, statistics: Statistics, stopped: Callable[[], bool]
) -> Iterator[list[bytes]]:
    """The bytes of all steps, as `generate` gives them."""
    began = time.monotonic()
    ahead = 1 if steps.block > 1 else 0  # blocks that the device has to do while one is read
    waiting: deque[Callable[[], Tensor]] = deque()
    todo = max_new_tokens
    while todo or waiting:
        if stopped():
            todo = 0
        if todo:
            count = min(todo, steps.block)
            waiting.append(steps.take(count))
            todo -= count
        if todo and len(waiting) <= ahead:
            continue
        if not waiting:
            break
        taken = waiting.popleft()().mT.tolist()
        statistics.seconds = time.monotonic() - began
        last = not todo and not waiting
        pieces = []
        for new, progress in zip(taken, statistics.each, strict=True):
            pieces.append(_take(new, progress, steps.sampling.stop, last, statistics.seconds))
        statistics.count(max(len(new) for new in taken))
        yield pieces
        if statistics.ended:
            break


def _take(new: list[int], progress: Progress, stop: bytes, last: bool, seconds: float) -> bytes:
    """What of a sequence's next bytes, which may be the last ones, belongs to its text."""
    if progress.ended:
        return b""
    progress.ended = last
    ends = {*stop}
    if end := [i for i, byte in enumerate(new) if byte in ends]:
        new = new[: end[0]]
        progress.ended = True
    if _NOT_FINITE in new:
        raise UsageError("the model's logits are no finite numbers")
    progress.tokens += len(new)
    progress.seconds = seconds
    return bytes(new)


def as_text(stream: Iterable[bytes]) -> Iterator[str]:
    """Pieces of text from bytes, each as soon as its last byte is there.

    What is not UTF-8 comes out as the replacement character, also a character cut off at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for new in stream:
        if piece := decoder.decode(new):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def whole_texts(
    prompts: Sequence[bytes], stream: Iterable[list[bytes]], statistics: Statistics
) -> Iterator[bytes]:
    """Texts, their prompts in front, in the order of these: each when it and all before it have
    ended.

    Args:
        prompts, statistics: what `generate` was given.
        stream: what it gives.
    """
    texts = [bytearray(prompt) for prompt in prompts]
    whole = 0
    for pieces in stream:
        for text, piece in zip(texts, pieces, strict=True):
            text += piece
        while whole < len(texts) and statistics.each[whole].ended:
            yield bytes(texts[whole])
            whole += 1
    yield from map(bytes, texts[whole:])
