"""Runs of `retention train`: bytes are their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from retention.generation.base import TEMPERATURE, TOP_P, Conversation, Model, Settings, plain
from retention.generation.stream import Stream
from retention.lm import data, generation
from retention.lm.generation import Statistics
from retention.lm.model import LanguageModel

_LINE_END = b"\n"


class Run(Model):
    """That of a run's newest checkpoint, or of one checkpoint."""

    memory = "state"

    def __init__(
        self, path: Path, device: torch.device, say: Callable[[str], object], flag: str
    ) -> None:
        super().__init__(path, flag)
        self._device = device
        self._say = say
        self._model: LanguageModel | None = None

    def settled(self, settings: Settings) -> Settings:
        temperature = TEMPERATURE if settings.temperature is None else settings.temperature
        top_p = TOP_P if settings.top_p is None else settings.top_p
        return dataclasses.replace(settings, temperature=temperature, top_p=top_p)

    def check(self, prompts: Sequence[bytes]) -> None:
        """Any bytes are a prompt."""

    def load(self, settings: Settings) -> None:
        self._model = generation.load_model(self.path, self._device, self._say, self.flag)

    def generate(
        self,
        prompts: Sequence[bytes],
        settings: Settings,
        statistics: Statistics,
        limit: int | None = None,
    ) -> Iterator[list[bytes]]:
        return generation.generate(
            self._model,
            prompts,
            settings.max_new_tokens if limit is None else limit,
            settings.temperature,
            settings.top_p,
            settings.seed,
            settings.switch_over_seq_len,
            settings.dtype or "float32",
            settings.stop,
            settings.cuda_graph,
            statistics,
        )

    def conversation(self, settings: Settings, system: str | None) -> Conversation:
        return _Lines(self._model, settings, system)


class _Lines(Conversation):
    """In the plain format, in which an answer ends with its line, or where a file ends."""

    plain = True

    def __init__(self, model: LanguageModel, settings: Settings, system: str | None):
        self._settings = settings
        self._system = system
        self._text = generation.Continuation(
            model,
            settings.temperature,
            settings.top_p,
            settings.seed,
            settings.switch_over_seq_len,
            settings.dtype or "float32",
            _LINE_END + data.SEPARATOR,
            settings.cuda_graph,
        )
        self._begun = False

    def answer(self, text: bytes, statistics: Statistics) -> Stream[str]:
        # Bytes of any kind go through as they came.
        asked = text.decode("utf-8", "surrogateescape")
        new = f"\n{plain([], None, asked)}" if self._begun else plain([], self._system, asked)
        content = new.encode("utf-8", "surrogateescape")
        self._begun = True

        def work(give: Callable[[str], None], stopped: Callable[[], bool]) -> None:
            count = self._settings.max_new_tokens
            stream = self._text.go_on(content, count, statistics, stopped)
            for piece in generation.as_text(stream):
                give(piece)

        return Stream(work)

    def reset(self) -> None:
        self._text.reset()
        self._begun = False
