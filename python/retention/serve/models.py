"""What the server asks of a model: its memory in slots, prompts into them, and steps."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from retention.cache import RetentionCache
from retention.lm import devices, files, generation
from retention.lm.errors import UsageError
from retention.lm.model import VOCABULARY, LanguageModel
from retention.nn import GateProjection, all_or_nothing
from retention.serve.text import ByteText, Text, TokenizerText


class Network(Protocol):
    """The part of a model that computes. One thread at a time may call it.

    Attributes:
        device: where it is.
        vocabulary: tokens that it has logits of.
        memories: of every layer, after `allocate`.
    """

    device: torch.device
    vocabulary: int
    memories: list[RetentionCache]

    def slot_bytes(self) -> int:
        """Bytes of one sequence's memory, of which nothing is allocated."""

    def allocate(self, slots: int) -> None:
        """All memory of so many sequences."""

    def read(self, tokens: Tensor, slots: Tensor) -> None:
        """Tokens `[1, t]` go into the memory of slots, int32 `[1]`. Where it raises, that is as it
        was, or the slot is empty."""

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Logits `[b, vocabulary]` after the next token, `[b, 1]`, of each of slots, int32 `[b]`;
        -1 is padding. Where it raises, no sequence has taken its token."""


class Model(NamedTuple):
    """A model to serve."""

    name: str
    network: Network
    text: Text


class RunNetwork:
    """A run of `retention train`."""

    def __init__(self, model: LanguageModel, dtype: str, state_dtype: torch.dtype):
        self.device = next(model.parameters()).device
        self.vocabulary = VOCABULARY
        self.memories: list[RetentionCache] = []
        self._model = model
        self._decoding = model.for_decoding(getattr(torch, dtype))
        self._dtype = dtype
        self._state_dtype = state_dtype

    def slot_bytes(self) -> int:
        return _bytes_of_a_slot(lambda slots: self._make(slots, "meta"))

    def allocate(self, slots: int) -> None:
        self.memories = self._make(slots, self.device)

    def _make(self, slots: int, device: torch.device | str) -> list[RetentionCache]:
        with devices.autocast(self.device, self._dtype):
            return [
                block.retention.init_cache(
                    slots,
                    device=device,
                    dtype=getattr(torch, self._dtype),
                    max_tokens_per_step=1,
                    state_dtype=self._state_dtype,
                )
                for block in self._model.blocks
            ]

    def read(self, tokens: Tensor, slots: Tensor) -> None:
        self.step(tokens, slots)

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        with devices.autocast(self.device, self._dtype):
            return self._decoding.step(tokens, self.memories, slots)


class FolderNetwork:
    """A model of `retention.transformers`."""

    def __init__(self, model: Any, state_dtype: torch.dtype):
        self.device = model.device
        self.vocabulary = model.config.vocab_size
        self.memories: list[RetentionCache] = []
        for module in model.modules():
            if isinstance(module, GateProjection):
                # Once, instead of in every step: it computes in float32 or wider.
                module.to(torch.promote_types(module.weight.dtype, torch.float32))
        self._model = model
        self._state_dtype = state_dtype

    def slot_bytes(self) -> int:
        return _bytes_of_a_slot(lambda slots: self._make(slots, "meta").memories)

    def allocate(self, slots: int) -> None:
        self._cache = self._make(slots, self.device)
        self.memories = self._cache.memories

    def _make(self, slots: int, device: torch.device | str) -> Any:
        from retention.transformers import SlotCache

        return SlotCache(
            self._model.config,
            slots,
            dtype=self._model.dtype,
            state_dtype=self._state_dtype,
            device=device,
        )

    @torch.no_grad()
    def read(self, tokens: Tensor, slots: Tensor) -> None:
        with all_or_nothing(self.memories):
            self._cache.rows = slots
            self._model.model(tokens, cache=self._cache)

    @torch.no_grad()
    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        with all_or_nothing(self.memories):
            self._cache.rows = slots
            return self._model(tokens, cache=self._cache).logits[:, -1]


def _bytes_of_a_slot(make: Callable[[int], Sequence[RetentionCache]]) -> int:
    one, two = (sum(memory.nbytes for memory in make(slots)) for slots in (1, 2))
    return two - one


def empty_slot(network: Network, slot: int, prompt: Sequence[int]) -> None:
    """A slot has seen nothing, and is for the sequence that begins with these tokens.

    The prompt alone decides where windows end, not the slot: so a sequence is the same one, to
    the last bit, in every slot, and different ones do not fold in the same step.
    """
    number = zlib.crc32(repr(list(prompt)).encode())
    slots = torch.tensor([slot], dtype=torch.int32, device=network.device)
    for memory in network.memories:
        memory.reset(slots, number)


# ---- from files ---------------------------------------------------------------------------------


def load(
    path: Path | str,
    device: torch.device,
    dtype: str | None = None,
    state_dtype: torch.dtype = torch.float32,
    name: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Model:
    """The model of a folder: a run of `retention train`, one of its checkpoints, or a checkpoint of
    `retention.transformers`.

    Args:
        path: the folder.
        device: where the model is to be.
        dtype: "float32", "bfloat16" or "float16". Default: a checkpoint of transformers has its
            own, a run float32.
        state_dtype: of states, float32 (default) or bfloat16.
        name: what it is called. Default: as the folder.
        say: told of damaged checkpoints of a run.

    Raises:
        UsageError: for a folder with no such model.
    """
    path = Path(path)
    with files.explained(f"--model: cannot read {path}"):
        if not path.is_dir():
            there = "is not a folder" if path.exists() else "no such folder"
            raise UsageError(f"--model: {path}: {there}")
    name = name or path.resolve().name
    if _is_of_transformers(path):
        return _load_folder(path, device, dtype, state_dtype, name)
    model = generation.load_model(path, device, say, flag="--model")
    try:
        network = RunNetwork(model, dtype or "float32", state_dtype)
        network.slot_bytes()
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model: {path}: {error}") from None
    return Model(name, network, ByteText())


def _is_of_transformers(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _load_folder(
    path: Path, device: torch.device, dtype: str | None, state_dtype: torch.dtype, name: str
) -> Model:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        import retention.transformers  # noqa: F401  (makes the model types known)
    except ImportError as error:
        raise UsageError(f"--model: {path} is a checkpoint of transformers: {error}") from None
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if dtype is None else getattr(torch, dtype), local_files_only=True
        )
        network = FolderNetwork(model.to(device).eval(), state_dtype)
        network.slot_bytes()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"--model: {path}: {' '.join(str(error).split())}") from None
    ends = model.generation_config.eos_token_id
    ends = frozenset([ends] if isinstance(ends, int) else ends or ())
    return Model(name, network, TokenizerText(tokenizer, ends))
