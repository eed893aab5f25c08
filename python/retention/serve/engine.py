"""Continuous batching: requests wait for slots, prompts are read in pieces between steps, and all
sequences that have read theirs go on together.

One thread owns the model. `submit`, `cancel`, `drain` and `close` may be called from any other, and
a request's events are given to its `emit` in the model's.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from retention.lm import devices
from retention.serve.models import Model, empty_slot
from retention.serve.sampling import GREEDY, NOT_FINITE, Draw
from retention.serve.steps import Row, Steps, Taken
from retention.serve.text import Decoder, StopStrings

_logger = logging.getLogger("retention.serve")

# What reading a piece of a prompt costs at least, as a part of what an iteration may read.
_LEAST_PIECE = 1 / 8


class QueueFullError(Exception):
    """As many sequences wait as may."""


class UnavailableError(Exception):
    """The engine takes nothing: it is shutting down, or has failed."""


@dataclass(frozen=True)
class Settings:
    """How each sequence of a request goes on.

    Attributes:
        max_tokens: at least 1; that which ends an answer counts too.
        temperature: 0 for the likeliest token, always.
        top_p: above 0, up to 1.
        seed: of what is drawn for the request's first sequence; each next one has the next seed.
            None: another one every time.
        stop: strings, none of them empty, before the first of which an answer ends.
        likeliest: how many tokens have their log probabilities beside that chosen; None: no log
            probabilities at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    likeliest: int | None = None


class TokenLogprob(NamedTuple):
    """A token of an answer, and how likely it was."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    offset: int  # characters of the answer before it


class Piece(NamedTuple):
    """What a sequence's text goes on with. The last one of a sequence has a reason."""

    choice: int  # the sequence's place in its request
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None  # "stop" or "length"


class Done(NamedTuple):
    """All sequences have ended."""

    prompt_tokens: int
    completion_tokens: int


class Failed(NamedTuple):
    """The request has ended before its sequences have."""

    message: str
    unavailable: bool = False  # whether it is the engine that ended


Event = Piece | Done | Failed


class Observer:
    """Is told what happens, by several threads. This one does nothing with it."""

    def first_token(self, seconds: float) -> None:
        """A sequence has its first token, so long after it was submitted."""

    def next_token(self, seconds: float) -> None:
        """Another token, so long after the one before."""

    def read(self, tokens: int) -> None:
        """Tokens of prompts have been read."""

    def ended(self, outcome: str) -> None:
        """Of a request: "finished", "cancelled" or "failed"."""


class Request:
    """Prompts, and what is to be generated behind them.

    Args:
        prompts: tokens of each, at least one; `n` sequences behind each.
        settings: of all sequences.
        n: sequences of a prompt.
        emit: gets every event, in the engine's thread: pieces, then one that is `Done` or `Failed`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        n: int,
        emit: Callable[[Event], object],
    ):
        self.prompts = prompts
        self.settings = settings
        self.n = n
        self.emit = emit
        self.cancelled = False
        self.ended = False
        self.running = n * len(prompts)  # sequences that have not ended
        self.completion_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, however many sequences go on behind it."""
        return sum(map(len, self.prompts))


@dataclass(eq=False)
class _Sequence:
    request: Request
    choice: int
    tokens: list[int]  # the prompt's, then new ones
    generator: torch.Generator
    submitted: float
    decoder: Decoder
    stop: StopStrings
    slot: int | None = None
    prompt: int = 0  # tokens of it
    fed: int = 0  # tokens that the memory has seen
    text: int = 0  # characters decoded
    shown: int = 0  # characters given
    logprobs: deque[TokenLogprob] = field(default_factory=deque)
    last: float = 0.0  # when its newest token came
    draw: Draw | None = None  # of a step that has not succeeded yet

    @property
    def reads(self) -> bool:
        """Whether there is more of the prompt to read; its last token is stepped."""
        return self.fed < self.prompt - 1

    @property
    def repeats(self) -> bool:
        """Whether its next tokens are known, since its memory was lost."""
        return self.fed < len(self.tokens) - 1

    def next_draw(self) -> Draw:
        """Of the next step. Drawn once, also where the step is taken again."""
        settings = self.request.settings
        if settings.temperature == 0 or self.repeats:
            return GREEDY
        if self.draw is None:
            drawn = torch.rand(1, generator=self.generator, dtype=torch.float64).item()
            self.draw = Draw(settings.temperature, settings.top_p, drawn)
        return self.draw


class Engine:
    """Takes requests while it runs.

    Args:
        model: whose network has its memory allocated.
        steps: of that network.
        max_queue: sequences that may wait for a slot.
        prefill_tokens: of prompts, read in one iteration: a running sequence waits for no more.
            Also the length of the pieces that a prompt is read in.
        observer: is told what happens. Default: nobody is.

    Attributes:
        failure: why the engine has ended by itself, or None.
    """

    def __init__(
        self,
        model: Model,
        steps: Steps,
        max_queue: int = 256,
        prefill_tokens: int = 512,
        observer: Observer | None = None,
    ):
        self.model = model
        self.steps = steps
        self.slots = steps.slots
        self.max_queue = max_queue
        self.prefill_tokens = prefill_tokens
        self.failure: str | None = None
        self._observer = observer or Observer()
        self._lock = threading.Condition()
        # Guarded by the lock:
        self._inbox: deque[_Sequence] = deque()
        self._load = 0  # sequences submitted that have not ended
        self._draining = False
        self._closed: str | None = None  # what is said to those that have not ended
        # The thread's own:
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []  # those with a slot
        self._reading: deque[_Sequence] = deque()  # of them, those with more of a prompt to read
        self._free = list(range(self.slots))[::-1]
        self._thread = threading.Thread(target=self._run, name="retention-engine", daemon=True)

    # ---- from any thread ------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request's sequences. Its `emit` is called from now on.

        Raises:
            QueueFullError: where they do not fit into what may wait.
            UnavailableError: while the engine is shutting down, or after it failed.
        """
        now = time.monotonic()
        settings = request.settings
        seed = secrets.randbits(62) if settings.seed is None else settings.seed
        sequences = []
        for i in range(request.running):
            prompt = request.prompts[i // request.n]
            # Of the CPU, so that a seed means the same on every device; and each sequence's own, so
            # that it means the same beside whatever others.
            generator = torch.Generator().manual_seed((seed + i) % 2**63)
            sequences.append(
                _Sequence(
                    request,
                    i,
                    list(prompt),
                    generator,
                    now,
                    self.model.text.decoder(prompt),
                    StopStrings(settings.stop),
                    prompt=len(prompt),
                )
            )
        with self._lock:
            if self._closed is not None or self._draining:
                raise UnavailableError(self.failure or "the server is shutting down")
            if self._load + len(sequences) > self.slots + self.max_queue:
                raise QueueFullError
            self._load += len(sequences)
            self._inbox.extend(sequences)
            self._lock.notify_all()

    def cancel(self, request: Request) -> None:
        """Ends a request whose answer nobody waits for: its slots are free at the next iteration,
        and it gets no more events. Nothing where it has ended."""
        with self._lock:
            request.cancelled = True
            self._lock.notify_all()

    @property
    def load(self) -> int:
        """Sequences that wait or run."""
        with self._lock:
            return self._load

    @property
    def slots_in_use(self) -> int:
        return self.slots - len(self._free)

    @property
    def available(self) -> bool:
        """Whether requests are taken."""
        with self._lock:
            return self._closed is None and not self._draining

    def drain(self) -> None:
        """From now on no request is taken. Those that wait or run go on."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()

    def wait_until_idle(self, seconds: float | None = None) -> bool:
        """Waits until nothing waits or runs. Whether that is so."""
        with self._lock:
            return self._lock.wait_for(lambda: self._load == 0, seconds)

    def close(self, reason: str = "the server is shutting down") -> None:
        """Ends all requests, and the thread."""
        with self._lock:
            self._closed = self._closed or reason
            self._lock.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with devices.current(self.model.network.device):
                while self._take_orders():
                    self._iterate()
        except BaseException as error:
            _logger.exception("the engine has failed")
            self.failure = f"the engine has failed: {_one_line(error)}"
            with self._lock:
                self._closed = self.failure
        with self._lock:  # nothing comes any more
            self._waiting.extend(self._inbox)
            self._inbox.clear()
        for sequence in [*self._active, *self._waiting]:
            self._fail(sequence.request, self._closed, unavailable=True)
        self._sweep()

    def _take_orders(self) -> bool:
        """What other threads want; waits where there is nothing to do. Whether to go on."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._closed is not None or self._inbox or self._waiting or self._active
            )
            self._waiting.extend(self._inbox)
            self._inbox.clear()
            going_on = self._closed is None
        if going_on:
            self._sweep()
        return going_on

    def _sweep(self) -> None:
        """Sequences of requests that have ended or are cancelled leave."""
        for sequences in (self._active, self._waiting):
            for sequence in [x for x in sequences if x.request.cancelled or x.request.ended]:
                if not sequence.request.ended:
                    sequence.request.ended = True
                    self._observer.ended("cancelled")
                sequences.remove(sequence)
                self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        if sequence.slot is not None:
            self._free.append(sequence.slot)
            sequence.slot = None
        with self._lock:
            self._load -= 1
            self._lock.notify_all()

    def _iterate(self) -> None:
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._active.append(sequence)
            self._begin(sequence)
        self._read_prompts()
        ready = [x for x in self._active if not x.reads and not x.request.ended]
        most = self.steps.sizes[-1]
        for start in range(0, len(ready), most):
            self._step(ready[start : start + most])
        self._sweep()

    def _begin(self, sequence: _Sequence) -> None:
        """A sequence in an empty slot: nothing of it is read."""
        empty_slot(self.model.network, sequence.slot, sequence.tokens[: sequence.prompt])
        sequence.fed = 0
        if sequence.reads:
            self._reading.append(sequence)

    # ---- prompts --------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Pieces of prompts, of one sequence after another, as many as an iteration may read.

        Every piece is read by itself, and where it begins and ends is the prompt's matter alone:
        what a memory holds then depends on nothing else.
        """
        left = float(self.prefill_tokens)
        while self._reading:
            sequence = self._reading[0]
            if sequence.slot is None or sequence.request.ended or not sequence.reads:
                self._reading.popleft()
                continue
            stop = min(sequence.fed + self.prefill_tokens, sequence.prompt - 1)
            left -= max(stop - sequence.fed, self.prefill_tokens * _LEAST_PIECE)
            if left < 0:
                return
            self._read(sequence, stop)
            self._reading.rotate(-1)

    def _read(self, sequence: _Sequence, stop: int) -> None:
        device = self.model.network.device
        piece = sequence.tokens[sequence.fed : stop]
        try:
            self.model.network.read(
                torch.tensor([piece], device=device),
                torch.tensor([sequence.slot], dtype=torch.int32, device=device),
            )
        except Exception as error:
            self._failed(sequence, error)
            return
        sequence.fed = stop
        self._observer.read(len(piece))

    # ---- steps ----------------------------------------------------------------------------------

    def _step(self, sequences: Sequence[_Sequence]) -> None:
        rows = [
            Row(x.slot, x.tokens[x.fed], x.next_draw(), x.request.settings.likeliest)
            for x in sequences
        ]
        try:
            taken = self.steps.take(rows)
        except Exception as error:
            if len(sequences) == 1:
                self._failed(sequences[0], error)
                return
            _raise_fatal(error)
            _logger.warning("a step of %d sequences failed: %s", len(rows), _one_line(error))
            self._restore(sequences)
            # By itself each shows whether it was to blame.
            for sequence in sequences:
                if not sequence.request.ended and not sequence.reads:
                    self._step([sequence])
            return
        for sequence, token in zip(sequences, taken, strict=True):
            if not sequence.request.ended:
                self._advance(sequence, token)

    def _restore(self, sequences: Sequence[_Sequence]) -> None:
        """Sequences whose memory a failed step has lost read what they are again, from the start.
        They come to the same bits, for they do what they did before."""
        positions = torch.stack([memory.positions for memory in self.model.network.memories])
        for sequence in sequences:
            if (positions[:, sequence.slot] != sequence.fed).any():
                self._begin(sequence)

    def _advance(self, sequence: _Sequence, taken: Taken) -> None:
        """A sequence has its next token."""
        known = sequence.repeats
        sequence.fed += 1
        if known:
            return
        sequence.draw = None
        request, text = sequence.request, self.model.text
        settings = request.settings
        if taken.token == NOT_FINITE:
            self._fail(request, "the model's logits are no finite numbers")
            return
        now = time.monotonic()
        if sequence.last:
            self._observer.next_token(now - sequence.last)
        else:
            self._observer.first_token(now - sequence.submitted)
        sequence.last = now
        request.completion_tokens += 1
        sequence.tokens.append(taken.token)
        if taken.token in text.ends:
            self._finish(sequence, "stop", "")
            return
        if taken.logprob is not None:
            logprob = TokenLogprob(taken.token, taken.logprob, taken.likeliest, sequence.text)
            sequence.logprobs.append(logprob)
        added = sequence.decoder.add(taken.token)
        sequence.text += len(added)
        shown, stopped = sequence.stop.add(added)
        if stopped:
            self._finish(sequence, "stop", shown, cut=True)
        elif len(sequence.tokens) - sequence.prompt >= settings.max_tokens:
            self._finish(sequence, "length", shown)
        else:
            self._show(sequence, shown)

    def _finish(self, sequence: _Sequence, reason: str, text: str, cut: bool = False) -> None:
        if not cut:
            last, stopped = sequence.stop.add(sequence.decoder.finish())
            text += last
            if stopped:
                reason, cut = "stop", True
            else:
                text += sequence.stop.finish()
        request = sequence.request
        self._show(sequence, text, reason, everything=not cut)
        self._active.remove(sequence)
        self._release(sequence)
        request.running -= 1
        if request.running == 0 and not request.ended:
            request.ended = True
            self._observer.ended("finished")
            self._emit(request, Done(request.prompt_tokens, request.completion_tokens))

    def _show(
        self, sequence: _Sequence, text: str, reason: str | None = None, everything: bool = False
    ) -> None:
        sequence.shown += len(text)
        logprobs, held = [], sequence.logprobs
        while held and (everything or held[0].offset < sequence.shown):
            logprobs.append(held.popleft())
        if text or logprobs or reason:
            self._emit(sequence.request, Piece(sequence.choice, text, logprobs, reason))

    # ---- ends -----------------------------------------------------------------------------------

    def _failed(self, sequence: _Sequence, error: Exception) -> None:
        """What raised was this sequence's alone."""
        _raise_fatal(error)
        _logger.error("a request failed", exc_info=error)
        self._fail(sequence.request, f"the model failed on this request: {_one_line(error)}")

    def _fail(self, request: Request, message: str, unavailable: bool = False) -> None:
        """A request has ended; its sequences leave with the next sweep."""
        if request.ended:
            return
        request.ended = True
        self._observer.ended("cancelled" if request.cancelled else "failed")
        self._emit(request, Failed(message, unavailable))

    def _emit(self, request: Request, event: Event) -> None:
        if request.cancelled:
            return
        try:
            request.emit(event)
        except Exception:  # of whoever waits: then nobody does
            _logger.exception("an event reached nobody")
            request.cancelled = True


def _raise_fatal(error: Exception) -> None:
    """Raises it again where the device does nothing more in this process."""
    if isinstance(error, torch.AcceleratorError):
        raise error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
