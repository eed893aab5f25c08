"""Text of tokens, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens of a prompt that the first new ones are decoded with: some tokenizers take the space in
# front of a text away.
_CONTEXT = 8
_NOT_WHOLE = "\ufffd"


class Detokenizer:
    """Text behind a prompt, each piece as soon as its characters are whole.

    Not that of `tokenizers.decoders.DecodeStream`, which never gives what is left at the end, and
    is of the tokenizers in Rust alone.

    Args:
        tokenizer: of transformers.
        prompt: the tokens that come before.
        special: whether special tokens are part of the text. Default: no.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], special: bool = False):
        self._tokenizer = tokenizer
        self._special = special
        self._ids = list(prompt[-_CONTEXT:])
        self._start = 0  # of what the next tokens are decoded with
        self._given = len(self._ids)

    def add(self, token: int) -> str:
        """The text that is whole with this token."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(_NOT_WHOLE):
            return ""
        del self._ids[: self._start]  # a text may be long
        self._start, self._given = self._given - self._start, len(self._ids)
        return new

    def end(self) -> str:
        """What is left: characters that were cut off."""
        new = self._new()
        self._given = len(self._ids)
        return new

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._given])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
        )
