"""Folders of transformers: any causal language model, with its tokenizer.

Steps are those of `model.generate`, which knows what each model has to be given. Tokens are drawn
as they are for a run, by a generator for each text. No code of a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

import retention.transformers  # noqa: F401  (makes its model types known)
from retention.cache import RetentionCache
from retention.generation.base import TEMPERATURE, TOP_P, Conversation, Model, Settings, plain
from retention.generation.stream import Stream
from retention.generation.text import Detokenizer
from retention.lm import devices, files
from retention.lm.errors import UsageError
from retention.lm.generation import Progress, Statistics, sample
from retention.ops.numerics import widest

_LOCAL = {"trust_remote_code": False, "local_files_only": True}
# What a folder's generation_config.json may say besides temperature and top_p.
_KEPT = (
    *("repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)
_CONTEXT = 8  # tokens in front of new ones, to see whether these go on as their text does


class Folder(Model):
    """A checkpoint of transformers, on one device.

    Raises:
        UsageError: where it is damaged, no causal language model, has no tokenizer, or what is
            asked for is of runs alone.
    """

    memory = "cache"

    def __init__(self, path: Path, device: torch.device, settings: Settings, flag: str):
        super().__init__(path, flag)
        self._device = device
        self._model: Any = None
        if settings.switch_over_seq_len is not None:
            raise UsageError(
                f"--switch-over-seq-len: of runs of `retention train` alone; {path} is a model of "
                "transformers, whose cache chooses it"
            )
        if settings.cuda_graph:
            raise UsageError(
                f"--cuda-graph: of runs of `retention train` alone; {path} is a model of "
                "transformers, whose steps are called one by one"
            )
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._config = self._read_config()
        self._tokenizer = self._read_tokenizer()
        self._sampling = self._read_sampling()
        self._vocabulary: int = self._config.get_text_config(decoder=True).vocab_size

    # ---- what lies there ------------------------------------------------------------------------

    def _read_config(self) -> Any:
        kind = files.parse_json((self.path / "config.json").read_text())["model_type"]
        if kind not in transformers.CONFIG_MAPPING:
            raise UsageError(
                f"{self.flag}: {self.path}: expected a model_type that transformers "
                f"{transformers.__version__} or retention has, got {kind!r}; no code of a "
                "checkpoint is run"
            )
        with self._explained("config.json"):
            config = transformers.AutoConfig.from_pretrained(self.path, **_LOCAL)
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UsageError(
                f"{self.flag}: {self.path}: expected a causal language model, got model_type "
                f"{kind!r}"
            )
        return config

    def _read_tokenizer(self) -> Any:
        with self._explained("the tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, **_LOCAL)
        # Where its files are missing, some classes make one that knows no text.
        if not {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}:
            raise UsageError(
                f"{self.flag}: {self.path}: cannot read the tokenizer: no vocabulary is there"
            )
        return tokenizer

    def _read_sampling(self) -> transformers.GenerationConfig:
        """What the folder says of how to generate; nothing where it says nothing."""
        with self._explained("generation_config.json"):
            if files.status(self.path / "generation_config.json") is None:
                return transformers.GenerationConfig.from_model_config(self._config)
            return transformers.GenerationConfig.from_pretrained(self.path, **_LOCAL)

    def load(self, settings: Settings) -> None:
        with self._explained("weights"):
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                self.path,
                config=self._config,
                dtype=settings.dtype or "auto",
                output_loading_info=True,
                **_LOCAL,
            )
        if missing := sorted(found["missing_keys"]):
            raise UsageError(
                f"{self.flag}: {self.path}: weights of another model: {len(missing)} are missing, "
                f"{missing[0]} the first of them"
            )
        self._model = model.to(self._device).eval()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Within, whatever transformers makes of a damaged file is one line."""
        try:
            yield
        except Exception as error:  # of no few types, for files of others
            if devices.is_out_of_memory(error):
                raise
            raise UsageError(
                f"{self.flag}: {self.path}: cannot read {what}: {_first_line(error)}"
            ) from None

    # ---- prompts --------------------------------------------------------------------------------

    def settled(self, settings: Settings) -> Settings:
        temperature, top_p = settings.temperature, settings.top_p
        theirs = self._sampling
        if temperature is None:
            temperature = TEMPERATURE if theirs.temperature is None else float(theirs.temperature)
        if top_p is None:
            top_p = TOP_P if theirs.top_p is None else float(theirs.top_p)
        return dataclasses.replace(settings, temperature=temperature, top_p=top_p)

    def check(self, prompts: Sequence[bytes]) -> None:
        self._encode(prompts)

    def text(self, content: bytes, what: str) -> str:
        """`content`, which a tokenizer takes as text alone."""
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{what}: expected UTF-8 for the tokenizer of {self.path}, got {content[:40]!r} "
                f"({error.reason})"
            ) from None

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """Of a text, behind the token that begins one where `special` and the tokenizer has it."""
        ids = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        if ids and max(ids) >= self._vocabulary:
            raise UsageError(
                f"{self.flag}: {self.path}: the tokenizer is of another model: expected tokens "
                f"below {self._vocabulary}, got {max(ids)}"
            )
        return ids

    def _encode(self, prompts: Sequence[bytes]) -> list[list[int]]:
        encoded = []
        for i, prompt in enumerate(prompts, start=1):
            ids = self.tokens(self.text(prompt, f"prompt {i} of {len(prompts)}"))
            if not ids:
                # As an empty prompt of a run starts where a file starts.
                first = [self._tokenizer.bos_token_id, *self._ends()]
                ids = [token for token in first if token is not None][:1]
            if not ids:
                raise UsageError(
                    f"prompt {i} of {len(prompts)}: expected text, since the tokenizer of "
                    f"{self.path} has no token that begins one"
                )
            encoded.append(ids)
        return encoded

    def _ends(self) -> list[int]:
        """Tokens of which any ends a text."""
        ends = self._sampling.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    # ---- generation -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[bytes],
        settings: Settings,
        statistics: Statistics,
        limit: int | None = None,
    ) -> Iterator[list[bytes]]:
        encoded = self._encode(prompts)
        statistics.each = [Progress(prompt_tokens=len(ids)) for ids in encoded]
        statistics.prompt_tokens = sum(map(len, encoded))
        texts = [Detokenizer(self._tokenizer, ids) for ids in encoded]
        draw = Draw(settings, len(encoded))
        ends = set(self._ends()) if settings.stop else set()
        count = settings.max_new_tokens if limit is None else limit

        def work(give: Callable[[list[bytes]], None], stopped: Callable[[], bool]) -> None:
            def take(new: list[list[int]]) -> None:
                pieces = []
                for text, ids, progress in zip(texts, new, statistics.each, strict=True):
                    piece = "".join(map(text.add, ids))
                    pieces.append((piece + text.end() if progress.ended else piece).encode())
                give(pieces)

            self.run(encoded, count, draw, ends.__contains__, take, statistics, stopped)

        def run() -> Iterator[list[bytes]]:
            if count:
                yield from Stream(work)  # which is closed with this

        return run()

    def conversation(self, settings: Settings, system: str | None) -> Conversation:
        return _Turns(self, settings, system)

    def run(
        self,
        prompts: list[list[int]],
        count: int,
        draw: Draw,
        ends: Callable[[int], bool],
        take: Callable[[list[list[int]]], None],
        statistics: Statistics,
        stopped: Callable[[], bool] = lambda: False,
        cache: Cache | None = None,
    ) -> Outcome:
        """Steps until all texts have `count` new tokens or have ended.

        Args:
            prompts: tokens of each text, of any lengths.
            count: at least 1.
            draw: what draws the tokens.
            ends: whether a token ends a text, of which it is no part.
            take: called with the new tokens of each text, after each step.
            statistics: filled in; `take` finds in it which texts have ended.
            stopped: asked after each step, whether to end here.
            cache: of the only prompt, of which it has seen a part.
        """
        width = max(map(len, prompts))
        pad = next(iter(self._ends()), 0)
        ids = torch.tensor([[pad] * (width - len(x)) + x for x in prompts])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
        watch = _Watch(ends, count, take, statistics, stopped)
        watch.cache = cache
        # A hook finds the cache that generate() makes.
        hook = self._model.register_forward_hook(watch.see) if cache is None else None
        self._model.generation_config = self._plan(count)
        statistics.begin()
        try:
            with devices.current(self._device), self._limited(width + count):
                self._model.generate(
                    ids.to(self._device),
                    attention_mask=mask.to(self._device),
                    logits_processor=transformers.LogitsProcessorList([draw]),
                    stopping_criteria=transformers.StoppingCriteriaList([watch]),
                    **({} if cache is None else {"cache": cache}),
                )
        finally:
            if hook is not None:
                hook.remove()
        return Outcome(watch.cache, watch.ended_by)

    def _plan(self, count: int) -> transformers.GenerationConfig:
        """For generate(): greedy, since what `Draw` leaves is one token, and without an end, which
        `_Watch` sees."""
        kept = {name: getattr(self._sampling, name, None) for name in _KEPT}
        return transformers.GenerationConfig(
            **kept, do_sample=False, num_beams=1, use_cache=True, max_new_tokens=count
        )

    @contextlib.contextmanager
    def _limited(self, length: int) -> Iterator[None]:
        """Within, a position that a model has no embedding of is an error of its own."""
        try:
            yield
        except IndexError as error:
            config = self._config.get_text_config(decoder=True)
            limit = getattr(config, "max_position_embeddings", None)
            if limit is None or length <= limit:
                raise
            raise UsageError(
                f"{self.flag}: {self.path}: the model takes no more than {limit} tokens, prompt "
                f"and new ones; expected fewer than {length} ({error})"
            ) from None

    # ---- conversations --------------------------------------------------------------------------

    def render(self, turns: list[tuple[str, str]], system: str | None, text: str) -> str:
        """A conversation by the tokenizer's template, or in the plain format."""
        if not self.has_template:
            return plain(turns, system, text)
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": text})
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template raises what it likes
            raise UsageError(
                f"{self.flag}: the chat template of {self.path} does not take this: "
                f"{_first_line(error)}"
            ) from None

    @property
    def has_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def follows(self, before: list[int], text: str) -> list[int] | None:
        """Tokens of a text that goes on behind others; None where together they would be another
        text, as with tokenizers that put a space in front of everything."""
        new = self.tokens(text, special=False)
        context = before[-_CONTEXT:]

        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

        return new if decode(context + new) == decode(context) + text else None

    def detokenizer(self, prompt: list[int]) -> Detokenizer:
        return Detokenizer(self._tokenizer, prompt)

    def ends_an_answer(self, token: int) -> bool:
        """In the plain format, an answer ends with its line too."""
        return token in self._ends() or (not self.has_template and "\n" in self.word(token))

    def word(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=True)


class Outcome(NamedTuple):
    """What steps leave behind."""

    cache: Cache | None  # it has seen all tokens but the last of each text, which may be its end
    ended_by: list[int | None]  # the token that ended each text


class Draw(transformers.LogitsProcessor):
    """Leaves of the logits of each text one token, drawn by a generator of its own."""

    def __init__(self, settings: Settings, n: int):
        self._temperature, self._top_p = settings.temperature, settings.top_p
        self._generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(n)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < torch.inf).all()):  # as NaN is not
            raise UsageError("the model's logits are no finite numbers")
        wide = widest(scores.device)
        drawn = torch.stack(
            [torch.rand((), generator=x, dtype=torch.float64) for x in self._generators]
        )
        # Below 1 in fewer bits too.
        drawn = drawn.clamp_(max=1 - torch.finfo(wide).eps / 2).to(wide).to(scores.device)
        token = sample(scores, self._temperature, self._top_p, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0)


class _Watch(transformers.StoppingCriteria):
    """Sees each step's tokens, before the model does, and says which texts have ended."""

    def __init__(
        self,
        ends: Callable[[int], bool],
        count: int,
        take: Callable[[list[list[int]]], None],
        statistics: Statistics,
        stopped: Callable[[], bool],
    ):
        self.cache: Cache | None = None
        self.ended_by: list[int | None] = [None] * len(statistics.each)
        self._ends = ends
        self._todo = count
        self._take = take
        self._statistics = statistics
        self._stopped = stopped
        self._first: float | None = None  # when the first tokens came, which are the prompt's

    def see(self, model: Any, arguments: tuple, output: Any) -> None:
        """A hook of the model's."""
        self.cache = next((x for x in output.values() if isinstance(x, Cache)), None)

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()  # waits for the device
        now = time.monotonic()
        before = self._first is None
        self._first = now if self._first is None else self._first
        self._todo -= 1
        each, whole = self._statistics.each, self._statistics
        whole.seconds = now - self._first
        new: list[list[int]] = []
        for row, (token, progress) in enumerate(zip(tokens, each, strict=True)):
            new.append([])
            if progress.ended:
                continue
            progress.seconds = whole.seconds
            if self._ends(token):
                progress.ended, self.ended_by[row] = True, token
                continue
            new[row].append(token)
            progress.tokens += 1
            progress.tokens_before += before
            progress.ended = self._todo == 0
        whole.tokens_before = sum(progress.tokens_before for progress in each)
        whole.count(1, lambda: cache_bytes(self.cache))
        self._take(new)
        stopped = self._stopped()
        done = [stopped or progress.ended for progress in each]
        return torch.tensor(done, device=input_ids.device)


def cache_bytes(cache: Cache | None) -> int:
    """Bytes that a cache holds, of tensors as long as they are now."""
    seen: set[int] = set()

    def held(x: Any) -> int:
        if id(x) in seen:
            return 0
        seen.add(id(x))
        if isinstance(x, RetentionCache):
            return x.nbytes
        if isinstance(x, Tensor):
            return x.nbytes
        if isinstance(x, (list, tuple)):
            return sum(map(held, x))
        if isinstance(x, dict):
            return sum(map(held, x.values()))
        if type(x).__module__.startswith(("transformers.", "retention.")):
            return sum(map(held, getattr(x, "__dict__", {}).values()))
        return 0

    return 0 if cache is None else held(cache.layers)


class _Turns(Conversation):
    """By the tokenizer's template, or in the plain format.

    What is kept of it: its turns; the tokens that the model was given and gave, and the text that
    these are; the cache that has seen them.
    """

    def __init__(self, folder: Folder, settings: Settings, system: str | None):
        self._folder = folder
        self._settings = settings
        self._system = system
        self.plain = not folder.has_template
        self.reset()
        folder.render([], system, "")

    def reset(self) -> None:
        self._turns: list[tuple[str, str]] = []
        self._ids: list[int] = []
        self._text = ""
        self._cache: Cache | None = None
        self._draw = Draw(self._settings, 1)

    def answer(self, text: bytes, statistics: Statistics) -> Stream[str]:
        folder = self._folder
        asked = folder.text(text, "the line")
        rendered = folder.render(self._turns, self._system, asked)
        new, before, cache = None, self._ids, self._cache
        if before and rendered.startswith(self._text):
            new = folder.follows(before, rendered[len(self._text) :])
        if new is None or cache is None:
            # The template tells what was said in another way by now.
            new, before, cache = folder.tokens(rendered, not folder.has_template), [], None
        statistics.each = [Progress(prompt_tokens=len(new))]
        statistics.prompt_tokens = len(new)
        ids = before + new
        detokenizer = folder.detokenizer(ids)
        self._cache = None  # until it is known again what it has seen

        def work(give: Callable[[str], None], stopped: Callable[[], bool]) -> None:
            answer: list[int] = []
            said: list[str] = []

            def say(piece: str) -> None:
                if piece:
                    said.append(piece)
                    give(piece)

            def take(tokens: list[list[int]]) -> None:
                answer.extend(tokens[0])
                say("".join(map(detokenizer.add, tokens[0])))

            count = self._settings.max_new_tokens
            outcome = folder.run(
                [ids], count, self._draw, folder.ends_an_answer, take, statistics, stopped, cache
            )
            say(detokenizer.end())
            self._ids, self._text = ids + answer, rendered + "".join(said)
            (end,) = outcome.ended_by
            if end is not None:
                say(folder.word(end).partition("\n")[0])
            self._turns.append((asked, "".join(said)))
            # A cache of no positions cannot tell which tokens are new to it.
            if outcome.cache is not None and not all(outcome.cache.is_linear):
                self._cache = outcome.cache

        return Stream(work)


def _first_line(error: BaseException) -> str:
    """What an error says, as far as a line goes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
