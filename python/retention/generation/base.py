"""What a model of either kind is asked for, and what it can do."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from retention.generation.stream import Stream
from retention.lm.generation import Statistics

# Where neither the command line nor the model says another.
TEMPERATURE, TOP_P = 0.8, 0.95
# Tokens of the generation before the one that is timed.
WARM_UP_TOKENS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate: the options of the command line.

    Attributes:
        max_new_tokens: of each text, or of each answer.
        temperature, top_p: None where the model is to choose.
        seed: of what is drawn for the first text; each next one has the next seed.
        stop: whether a text ends where its model ends it.
        dtype: "float32", "bfloat16" or "float16"; None: the model's own.
        switch_over_seq_len: tokens kept before they are folded into a state. None: the cache's
            choice.
        cuda_graph: whether steps are replays of a captured graph. None: the model's choice.
    """

    max_new_tokens: int = 500
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    stop: bool = False
    dtype: str | None = None
    switch_over_seq_len: int | None = None
    cuda_graph: bool | None = None


class Conversation(abc.ABC):
    """Turns of a user and a model, of which each reads only what is new.

    Attributes:
        plain: whether it is in the plain format, in which a space may come before an answer.
    """

    plain: bool

    @abc.abstractmethod
    def answer(self, text: bytes, statistics: Statistics) -> Stream[str]:
        """The model's answer to the user's next turn, as it comes.

        Where it is stopped, the conversation goes on behind what was given until then.

        Raises:
            UsageError: for a turn that the model cannot take, which then was never there.
        """

    @abc.abstractmethod
    def reset(self) -> None:
        """Nothing was said yet, and nothing drawn."""


class Model(abc.ABC):
    """A model in a folder. What the folder and the settings are checked for comes first, before
    the weights are read.

    Attributes:
        path: the folder.
        flag: the option that named it, for errors.
        memory: what it remembers in, in a word.
    """

    memory: str

    def __init__(self, path: Path, flag: str):
        self.path = path
        self.flag = flag

    @abc.abstractmethod
    def settled(self, settings: Settings) -> Settings:
        """`settings` with a temperature and a share of probabilities."""

    @abc.abstractmethod
    def check(self, prompts: Sequence[bytes]) -> None:
        """Raises UsageError for prompts that the model cannot take."""

    @abc.abstractmethod
    def load(self, settings: Settings) -> None:
        """Read the weights."""

    @abc.abstractmethod
    def generate(
        self,
        prompts: Sequence[bytes],
        settings: Settings,
        statistics: Statistics,
        limit: int | None = None,
    ) -> Iterator[list[bytes]]:
        """UTF-8, or what should be, that follows prompts: of each what came since the last time.

        Args:
            prompts: one or more, of any lengths.
            settings: of `settled`.
            statistics: filled in while it runs.
            limit: tokens after which to end, though memory is that of `settings`. Default: none.
        """

    @abc.abstractmethod
    def conversation(self, settings: Settings, system: str | None) -> Conversation:
        """A new one, whose answers end where the model ends them.

        Raises:
            UsageError: for a `system` text that the model cannot take.
        """

    def warm_up(self, prompts: Sequence[bytes], settings: Settings) -> None:
        """Generate a little, as it will be: what happens only once is over then."""
        limit = min(WARM_UP_TOKENS, settings.max_new_tokens)
        for _ in self.generate(prompts, settings, Statistics(), limit):
            pass


def plain(turns: Sequence[tuple[str, str]], system: str | None, text: str) -> str:
    """A conversation for a model that has no template of its own, up to where it answers.

    A line each: what the system says, then `User: ...` and `Assistant: ...` in turn.
    """
    lines = [] if system is None else [f"{system}\n"]
    lines += [f"User: {asked}\nAssistant:{answered}\n" for asked, answered in turns]
    return "".join([*lines, f"User: {text}\nAssistant:"])
