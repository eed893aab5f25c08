"""What requests of OpenAI's API say, checked: all that is not understood is an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_CHOICES = 128
MOST_LIKELIEST = 20
MOST_STOP_STRINGS = 16

# Parameters that change nothing here, whatever they are.
_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
    }
)
# Those that would, but for these values; None is always one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """A request that is answered with an error, in the form that OpenAI's API has.

    Args:
        status: of HTTP.
        message: one line, for a person.
        param: the parameter it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(param: str, message: str) -> ApiError:
    """Of a parameter that is not accepted as it is."""
    return ApiError(400, f"{param}: {message}", param, "invalid_value")


def first_error(errors: Sequence[Any]) -> ApiError:
    """What pydantic found, as one line that names the parameter and what was given."""
    error = errors[0]
    place = [str(x) for x in error["loc"] if x != "body"]
    name = ".".join(place) or "body"
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{name}: not a parameter that is known here", name, "unknown")
    if error["type"] == "missing":
        return ApiError(400, f"{name}: expected, and missing", name, "missing")
    if error["type"] == "json_invalid":
        return ApiError(400, "body: expected JSON", None, "invalid_json")
    message = error["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "expected")
    return invalid(name, f"{message}, got {shown(error.get('input'))}")


def shown(value: Any) -> str:
    """A short form of what was given, without characters that are no text."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_encodable(body: dict[str, Any]) -> None:
    """JSON may have surrogates by themselves, which no text of UTF-8 has."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise ApiError(400, "body: expected text of whole characters", None, "invalid") from None


def _tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )


def _check_prompt(value: Any) -> Any:
    several = isinstance(value, list) and bool(value)
    if (
        isinstance(value, str)
        or _tokens(value)
        or (several and all(isinstance(x, str) for x in value))
        or (several and all(map(_tokens, value)))
    ):
        return value
    raise ValueError("expected text, a list of texts, a list of tokens or a list of such lists")


def _check_stop(value: Any) -> Any:
    if value is None:
        return value
    strings = [value] if isinstance(value, str) else value
    if (
        not isinstance(strings, list)
        or len(strings) > MOST_STOP_STRINGS
        or not all(isinstance(x, str) and x for x in strings)
    ):
        raise ValueError(
            f"expected a text or a list of at most {MOST_STOP_STRINGS}, none of them empty"
        )
    return strings


def _check_content(value: Any) -> Any:
    """Text; that of several parts, where there are."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise ValueError("expected text, or a list of parts of type 'text'")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generation(_Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_check_stop)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_others(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ApiError(400, f"body: expected a JSON object, got {shown(given)}")
        _check_encodable(given)
        kept = {}
        for name, value in given.items():
            if name in _HARMLESS:
                continue
            if name not in _NEUTRAL:
                kept[name] = value
            elif value is not None and not any(
                # False is equal to 0, and neither stands for the other.
                value == x and isinstance(value, bool) == isinstance(x, bool)
                for x in _NEUTRAL[name]
            ):
                raise ApiError(
                    400,
                    f"{name}: not supported here, expected none, got {shown(value)}",
                    name,
                    "unsupported",
                )
        return kept

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "expected with stream = true alone")
        return self


class CompletionRequest(_Generation):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_check_content)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, given: Any) -> Any:
        # As clients send answers back: with all the fields that an answer could have had.
        if isinstance(given, dict) and given.get("content") is not None:
            return {name: x for name, x in given.items() if x is not None and x != []}
        return given


class ChatRequest(_Generation):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "expected with logprobs = true alone")
        return self
