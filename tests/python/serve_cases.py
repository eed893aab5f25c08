"""Small models to serve, servers of them in threads, and answers from engines without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# First, since it keeps transformers offline.
import transformers_cases as cases
from retention import cli
from retention.lm.config import ModelConfig
from retention.lm.model import LanguageModel
from retention.serve import server
from retention.serve.app import Limits, create_app
from retention.serve.engine import Done, Engine, Event, Failed, Piece, Request, Settings
from retention.serve.metrics import Metrics
from retention.serve.models import FolderNetwork, Model, RunNetwork
from retention.serve.steps import Steps
from retention.serve.text import ByteText, TokenizerText

SECONDS = 60  # for what takes one, on a machine with other work

# Characters of one to four bytes, and merges that end within some of them.
TEXT = "the quick brown fox; die schöne Füchsin; η γρήγορη αλεπού; 素早い狐; 🦊🦊🦊 the end\n" * 3
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}"
    "{{ raise_exception('no developers here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes, some of which are merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def make_folder(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of transformers with that tokenizer."""
    tokenizer = make_tokenizer()
    model = cases.make_model(dtype=dtype, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def folder_model(dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: Any) -> Model:
    tokenizer = make_tokenizer()
    model = cases.make_model(dtype=dtype, vocab_size=len(tokenizer), **sizes).to(device)
    text = TokenizerText(tokenizer, frozenset({tokenizer.eos_token_id}))
    return Model("folder", FolderNetwork(model, torch.float32), text)


def run_model() -> Model:
    """Of a run of `retention train`, but for the training; logits differ, as with one."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(layers=2, hidden_size=32, heads=2)).eval()
    with torch.no_grad():
        model.norm.weight.mul_(3)
    return Model("run", RunNetwork(model, "float32", torch.float32), ByteText())


MODELS = {"folder": folder_model, "run": run_model}


@contextlib.contextmanager
def engine_of(
    model: Model, slots: int = 4, batch_invariance: bool = True, **options: Any
) -> Iterator[Engine]:
    """An engine that runs; at its end no slot is lost."""
    model.network.allocate(slots)
    engine = Engine(model, Steps(model.network, batch_invariance), **options)
    engine.start()
    try:
        yield engine
        if engine.failure is None:
            assert engine.wait_until_idle(SECONDS)
            engine.close()
            assert sorted(engine._free) == list(range(slots))
            assert (engine.slots_in_use, engine.load) == (0, 0)
            assert not engine._active
            assert not engine._waiting
    finally:
        engine.close()


class Waiting:
    """A request to an engine, and what has come of it."""

    def __init__(self, engine: Engine, *prompts: str | Sequence[int], n: int = 1, **settings: Any):
        self.engine = engine
        encoded = [engine.model.text.encode(x) if isinstance(x, str) else x for x in prompts]
        self.events: queue.Queue[Event] = queue.Queue()
        self.request = Request(encoded, Settings(**settings), n, self.events.put)
        self.texts = [""] * n * len(prompts)
        self.logprobs: list[list] = [[] for _ in self.texts]
        self.reasons: list[str | None] = [None] * len(self.texts)
        self.pieces = [0] * len(self.texts)
        engine.submit(self.request)

    def next(self) -> Event:
        event = self.events.get(timeout=SECONDS)
        if isinstance(event, Piece):
            assert self.reasons[event.choice] is None
            self.texts[event.choice] += event.text
            self.logprobs[event.choice] += event.logprobs
            self.reasons[event.choice] = event.finish_reason
            self.pieces[event.choice] += 1
        return event

    def end(self) -> Done | Failed:
        while not isinstance(event := self.next(), Done | Failed):
            pass
        assert self.events.empty()
        return event

    def result(self) -> tuple:
        """All that there is to compare, to the last bit."""
        done = self.end()
        return done, self.texts, self.logprobs, self.reasons


class Wrapped:
    """A network with something between."""

    def __init__(self, network: Any):
        self.inner = network
        self.device, self.vocabulary = network.device, network.vocabulary

    @property
    def memories(self) -> list:
        return self.inner.memories

    def slot_bytes(self) -> int:
        return self.inner.slot_bytes()

    def allocate(self, slots: int) -> None:
        self.inner.allocate(slots)

    def read(self, tokens: Tensor, slots: Tensor) -> None:
        self.inner.read(tokens, slots)

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        return self.inner.step(tokens, slots)


class Endless(Wrapped):
    """Never says token 0, which ends an answer of `folder_model`."""

    NEVER = -1e4

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        logits = super().step(tokens, slots)
        logits[:, 0] = self.NEVER
        return logits


class Scripted(Wrapped):
    """Says the same behind every prompt of one token, whatever it has computed."""

    def __init__(self, network: Any, script: Sequence[int]):
        super().__init__(network)
        self.script = script

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        logits = super().step(tokens, slots)
        positions = self.memories[0].positions
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                said = self.script[(int(positions[slot]) - 1) % len(self.script)]
                logits[row, said] = logits[row].max() + 1
        return logits


class Served:
    """A server in a thread.

    Attributes:
        url: with /v1.
        engine: of it.
    """

    def __init__(self, engine: Engine, url: str):
        self.engine = engine
        self.root = url
        self.url = f"{url}/v1"


@contextlib.contextmanager
def served(
    model: Model, limits: Limits | None = None, slots: int = 4, **options: Any
) -> Iterator[Served]:
    """At its end no slot is lost."""
    model.network.allocate(slots)
    metrics = Metrics()
    engine = Engine(model, Steps(model.network), observer=metrics, **options)
    metrics.watch(engine)
    app = create_app(engine, metrics, limits or Limits())
    bound = server.bind("127.0.0.1", 0)
    running = server.Server(app, engine, 30, lambda line: None)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await running.serve([bound])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        while not running.started and thread.is_alive():
            thread.join(0.01)
        yield Served(engine, server.url_of(bound))
        assert engine.wait_until_idle(SECONDS)
        assert engine.slots_in_use == 0
    finally:
        loops[0].call_soon_threadsafe(running.end)
        thread.join(SECONDS)
    assert not thread.is_alive()
    assert sorted(engine._free) == list(range(slots))


class Running:
    """`retention serve` in a thread, at a port of its own."""

    def __init__(self, arguments: list[str], monkeypatch: pytest.MonkeyPatch):
        self.code: int | None = None
        self.said = ""
        self.servers: list[server.Server] = []
        self.loops: list[asyncio.AbstractEventLoop] = []
        running = self

        class Seen(server.Server):
            async def serve(self, sockets: Any = None) -> None:
                running.loops.append(asyncio.get_running_loop())
                running.servers.append(self)
                running.url = server.url_of(sockets[0])
                await super().serve(sockets)

        monkeypatch.setattr(server, "Server", Seen)
        self.thread = threading.Thread(target=self._run, args=(arguments,), daemon=True)
        self.thread.start()
        while self.thread.is_alive() and not (self.servers and self.servers[0].started):
            self.thread.join(0.01)

    def _run(self, arguments: list[str]) -> None:
        self.code = cli.main([*arguments, "--port", "0", "--device", "cpu"])

    def end(self) -> None:
        for loop, running in zip(self.loops, self.servers, strict=True):
            if not loop.is_closed():
                loop.call_soon_threadsafe(running.end)
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
