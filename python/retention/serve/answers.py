"""Answers in the form that OpenAI's API has, of text completions and of chats."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from retention.serve.engine import Done, Piece, TokenLogprob
from retention.serve.text import Text

# What the API has in place of less.
_LEAST_LOGPROB = -9999.0


class _Choice:
    """What one sequence has come to."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Answer:
    """One answer, whole or in chunks; `Completion` or `Chat`.

    Args:
        model: its name.
        text: of the model.
        choices: sequences.
        logprobs: whether they have log probabilities.
        usage: whether chunks end with the numbers of tokens.
    """

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, model: str, text: Text, choices: int, logprobs: bool, usage: bool):
        self._text = text
        self._logprobs = logprobs
        self._usage = usage
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [_Choice() for _ in range(choices)]

    def add(self, piece: Piece) -> None:
        """Takes what comes, for `whole`."""
        self._choices[piece.choice].add(piece)

    def whole(self, done: Done) -> dict[str, Any]:
        """All of it."""
        choices = [
            {
                "index": index,
                **self._content(choice.text),
                "logprobs": self._format(choice.logprobs) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {
            **self._head,
            "object": self.whole_object,
            "choices": choices,
            "usage": _usage(done),
        }

    def first(self) -> Iterator[dict[str, Any]]:
        """Chunks before any other."""
        yield from ()

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One piece, of one choice."""
        logprobs = self._format(piece.logprobs) if self._logprobs and piece.logprobs else None
        choice = {
            "index": piece.choice,
            **self._delta(piece),
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
        return self._chunk([choice])

    def last(self, done: Done) -> Iterator[dict[str, Any]]:
        """Chunks behind all others."""
        if self._usage:
            yield {**self._chunk([]), "usage": _usage(done)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        nothing_yet = {"usage": None} if self._usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **nothing_yet}

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _format(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError


class Completion(Answer):
    """Of `/v1/completions`."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _format(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [self._name(x.token) for x in logprobs],
            "token_logprobs": [_at_least(x.logprob) for x in logprobs],
            # The one chosen is always among them.
            "top_logprobs": [
                {
                    self._name(token): _at_least(logprob)
                    for token, logprob in (*x.likeliest, (x.token, x.logprob))
                }
                for x in logprobs
            ],
            "text_offset": [x.offset for x in logprobs],
        }

    def _name(self, token: int) -> str:
        """A token's text; of a part of a character, its bytes."""
        part = self._text.token_bytes(token)
        try:
            return part.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)


class Chat(Answer):
    """Of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self) -> Iterator[dict[str, Any]]:
        """That each choice is the assistant's."""
        for index in range(len(self._choices)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._chunk([choice])

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def _format(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._token(x.token, x.logprob),
                "top_logprobs": [self._token(*pair) for pair in x.likeliest],
            }
            for x in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        part = self._text.token_bytes(token)
        return {
            "token": part.decode("utf-8", "replace"),
            "logprob": _at_least(logprob),
            "bytes": list(part),
        }


def _at_least(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
