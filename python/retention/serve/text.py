"""The text of tokens: from text to tokens, and back as they come, one by one."""

from __future__ import annotations

import codecs
import copy
import json
import re
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from retention.lm import data

# Tokens behind which nothing is waited for: a character of UTF-8 has no more bytes.
_LONGEST_CHARACTER = 4
# Tokens of a prompt that the first new one is decoded behind, for the space between them.
_CONTEXT = 6
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class PromptError(ValueError):
    """A prompt that makes no tokens. The message begins with the parameter's name."""


class Decoder(Protocol):
    """The text of one sequence's tokens, as they come."""

    def add(self, token: int) -> str:
        """What the next token adds: nothing, where it ends within a character."""

    def finish(self) -> str:
        """What is left: replacement characters, where the last character is not whole."""


class Text(Protocol):
    """The tokens of a model's text. Every method may be called from any thread."""

    ends: frozenset[int]  # tokens that end an answer, and are no part of it

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt. Raises PromptError where there are none."""

    def encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], tuple[str, ...]]:
        """The tokens of a conversation, up to where the answer begins; and strings that end it.
        Raises PromptError for what the model has no format for."""

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """For the tokens that follow a prompt's."""

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for by itself, which may be a part of a character."""


# ---- bytes --------------------------------------------------------------------------------------


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes((token,)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteText:
    """Of a run of `retention train`: a token is a byte.

    A conversation is each message as `role: content` and an empty line, and then `assistant:`. The
    answer ends where the model begins a message of the user.
    """

    ends = frozenset(data.SEPARATOR)

    def encode(self, text: str) -> list[int]:
        return list(text.encode() or data.SEPARATOR)

    def encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], tuple[str, ...]]:
        said = "".join(f"{message['role']}: {message['content']}\n\n" for message in messages)
        return self.encode(f"{said}assistant:"), ("\n\nuser:",)

    def decoder(self, prompt: Sequence[int]) -> _ByteDecoder:
        return _ByteDecoder()

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,))


# ---- Hugging Face's tokenizers ------------------------------------------------------------------


class _TokenizerDecoder:
    """Decodes the last few tokens again with each new one, since what a token says may depend on
    those before it: its space, and the character that it ends."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._start = 0  # of those that are decoded again
        self._read = len(self._tokens)  # whose text is out

    def add(self, token: int) -> str:
        self._tokens.append(token)
        return self._take(whole=len(self._tokens) - self._read >= _LONGEST_CHARACTER)

    def finish(self) -> str:
        return self._take(whole=True)

    def _take(self, whole: bool) -> str:
        before = self._text(self._tokens[self._start : self._read])
        after = self._text(self._tokens[self._start :])
        if not whole and after.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class TokenizerText:
    """Of a folder of transformers: its tokenizer, and its chat template.

    Args:
        tokenizer: of transformers.
        ends: tokens that end an answer, beside the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]):
        own = {tokenizer.eos_token_id} - {None}
        self.ends = ends | own
        self._encoding = tokenizer
        self._lock = threading.Lock()  # tokenizers may change what they share while they encode
        self._decoding = copy.deepcopy(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = "null" if backend is None else json.dumps(json.loads(backend.to_str())["decoder"])
        self._byte_of = _byte_of_character() if '"ByteLevel"' in decoder else None
        self._special = frozenset(tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        with self._lock:
            tokens = self._encoding(text)["input_ids"]
        if not tokens and self._encoding.bos_token_id is not None:
            tokens = [self._encoding.bos_token_id]
        if not tokens:
            raise PromptError("prompt: expected at least one token, got none")
        return tokens

    def encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], tuple[str, ...]]:
        if not self._encoding.chat_template:
            raise PromptError(
                "messages: the model's tokenizer has no chat template; use /v1/completions"
            )
        from jinja2.exceptions import TemplateError

        try:
            with self._lock:
                tokens = self._encoding.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise PromptError(f"messages: the model's chat template refuses them: {said}") from None
        if not tokens:
            raise PromptError("messages: expected at least one token, got none")
        return tokens, ()

    def decoder(self, prompt: Sequence[int]) -> _TokenizerDecoder:
        return _TokenizerDecoder(self._decoding, prompt)

    def token_bytes(self, token: int) -> bytes:
        name = self._decoding.convert_ids_to_tokens(token)
        if name is None:  # the model has more logits than the tokenizer has tokens
            return b""
        if token in self._special:
            return name.encode()
        if self._byte_of is not None and all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes.fromhex(match[1])
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """What tokenizers of bytes write for a byte, the other way around."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


# ---- stop strings -------------------------------------------------------------------------------


class StopStrings:
    """Ends a text before the first of some strings that is complete, wherever tokens end.

    What may be the beginning of one is held back until it is known.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What of the text so far may be shown now, and whether it has ended."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._strings if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        held = max((_overlap(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop`, which is longer, begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
