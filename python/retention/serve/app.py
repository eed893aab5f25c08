"""The endpoints, over an engine."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from retention.serve.answers import Answer, Chat, Completion
from retention.serve.engine import (
    Done,
    Engine,
    Event,
    Failed,
    QueueFullError,
    Request,
    Settings,
    UnavailableError,
)
from retention.serve.guard import Guard
from retention.serve.metrics import Metrics
from retention.serve.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    first_error,
    invalid,
    shown,
)
from retention.serve.text import PromptError

# What /v1/completions generates where it is not said, as in OpenAI's API.
_COMPLETION_TOKENS = 16
_FOR_TEXT = ("/v1/completions", "/v1/chat/completions")
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        api_key: None: no key is asked for.
        max_prompt_tokens: None: any number.
        max_new_tokens: of an answer; what a chat has that does not say.
        max_body_bytes: of a request.
    """

    api_key: str | None = None
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    max_body_bytes: int = 2**22


def create_app(engine: Engine, metrics: Metrics, limits: Limits) -> FastAPI:
    """The server's endpoints.

    Args:
        engine: started by whoever calls this, and closed.
        metrics: that observe it.
        limits: of requests.
    """
    app = FastAPI(title="retention", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=limits.api_key, max_body_bytes=limits.max_body_bytes)
    _answer_errors(app, metrics)
    service = _Service(engine, metrics, limits)
    created = int(time.time())
    name = engine.model.name
    card = {"id": name, "object": "model", "created": created, "owned_by": "retention"}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await service.complete(body, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        return await service.chat(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return card

    @app.get("/health")
    async def health() -> Response:
        if engine.available:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": engine.failure or "shutting down"}, 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.page(), media_type=metrics.content_type)

    return app


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Errors of every kind have one form."""

    def answer(request: HttpRequest, error: ApiError) -> Response:
        if request.method == "POST" and request.url.path in _FOR_TEXT:
            if error.status in (400, 404, 413):
                metrics.ended("invalid")
            elif error.code in ("queue_full", "unavailable"):
                metrics.ended("rejected")
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def of_ours(request: HttpRequest, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def of_pydantic(request: HttpRequest, error: RequestValidationError) -> Response:
        return answer(request, first_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_starlette(request: HttpRequest, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no such path: {shown(request.url.path)}"
        headers = dict(error.headers or {})
        if error.status_code == 413:
            headers["Connection"] = "close"  # what is still to come is nobody's
        code = _CODES.get(error.status_code)
        return answer(request, ApiError(error.status_code, message, None, code, headers))

    @app.exception_handler(Exception)
    async def of_this_server(request: HttpRequest, error: Exception) -> Response:
        return answer(
            request, ApiError(500, "the server has an error of its own; its log says more")
        )


class _Stream(EventSourceResponse):
    """Server-sent events, at the end of which, whatever ended them, something is called."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], object]):
        super().__init__(events, sep="\n")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class _Service:
    """From bodies to the engine, and from its events to answers."""

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits):
        self._engine = engine
        self._metrics = metrics
        self._limits = limits

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        prompts = await run_in_threadpool(self._prompts, body.prompt)
        default = min(_COMPLETION_TOKENS, self._limits.max_new_tokens)
        settings = self._settings(body, "max_tokens", body.max_tokens, default, (), body.logprobs)
        return await self._answer(Completion, body, prompts, settings, http)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        prompt, stop = await run_in_threadpool(self._encoded, self._text.encode_chat, messages)
        self._check_length("messages", prompt)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        settings = self._settings(
            body,
            name,
            getattr(body, name),
            self._limits.max_new_tokens,
            stop,
            (body.top_logprobs or 0) if body.logprobs else None,
        )
        return await self._answer(Chat, body, [prompt], settings, http)

    # ---- what is asked --------------------------------------------------------------------------

    @property
    def _text(self) -> Any:
        return self._engine.model.text

    def check_model(self, name: str) -> None:
        served = self._engine.model.name
        if name != served:
            message = f"model: expected {served!r}, got {shown(name)}"
            raise ApiError(404, message, "model", "model_not_found")

    def _encoded(self, encode: Callable[[Any], Any], what: Any) -> Any:
        try:
            return encode(what)
        except PromptError as error:
            message = str(error)
            raise ApiError(400, message, message.partition(":")[0], "invalid_value") from None

    def _prompts(self, given: Any) -> list[list[int]]:
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        prompts = []
        for prompt in given:
            if isinstance(prompt, str):
                prompt = self._encoded(self._text.encode, prompt)
            else:
                self._check_tokens(prompt)
            self._check_length("prompt", prompt)
            prompts.append(prompt)
        return prompts

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        vocabulary = self._engine.model.network.vocabulary
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise invalid("prompt", f"expected tokens of 0 to {vocabulary - 1}, got {token}")

    def _check_length(self, name: str, prompt: Sequence[int]) -> None:
        most = self._limits.max_prompt_tokens
        if most is not None and len(prompt) > most:
            message = f"{name}: expected at most {most} tokens, got {len(prompt)}"
            raise ApiError(400, message, name, "context_length_exceeded")

    def _settings(
        self,
        body: CompletionRequest | ChatRequest,
        name: str,
        max_tokens: int | None,
        default: int,
        stop: tuple[str, ...],
        likeliest: int | None,
    ) -> Settings:
        if max_tokens is None:
            max_tokens = default
        if max_tokens > self._limits.max_new_tokens:
            raise invalid(name, f"expected at most {self._limits.max_new_tokens}, got {max_tokens}")
        return Settings(
            max_tokens,
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.seed,
            (*(body.stop or ()), *stop),
            likeliest,
        )

    # ---- what is answered -----------------------------------------------------------------------

    async def _answer(
        self,
        kind: type[Answer],
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        settings: Settings,
        http: HttpRequest,
    ) -> Response:
        n = body.n or 1
        most = self._engine.slots + self._engine.max_queue
        if n * len(prompts) > most:
            raise invalid("n", f"expected at most {most} choices in all, got {n * len(prompts)}")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        request = Request(prompts, settings, n, emit)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        answer = kind(
            *(self._engine.model.name, self._text, n * len(prompts)),
            *(settings.likeliest is not None, usage),
        )
        try:
            self._engine.submit(request)
        except QueueFullError:
            message = "the queue is full; try again later"
            raise ApiError(429, message, None, "queue_full", {"Retry-After": "1"}) from None
        except UnavailableError as error:
            raise ApiError(503, str(error), None, "unavailable", {"Retry-After": "1"}) from None
        close = functools.partial(self._engine.cancel, request)
        if body.stream:
            return _Stream(_chunks(answer, events), close)
        try:
            return await _whole(answer, events, http)
        finally:
            close()


async def _chunks(answer: Answer, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    for chunk in answer.first():
        yield _json(chunk)
    while True:
        event = await events.get()
        if isinstance(event, Failed):
            yield _json(_error_of(event).body())
            break
        if isinstance(event, Done):
            for chunk in answer.last(event):
                yield _json(chunk)
            break
        yield _json(answer.chunk(event))
    yield "[DONE]"


async def _whole(answer: Answer, events: asyncio.Queue[Event], http: HttpRequest) -> Response:
    collecting = asyncio.create_task(_collect(answer, events))
    leaving = asyncio.create_task(_gone(http))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return JSONResponse(collecting.result())
        return Response(status_code=499)  # to nobody
    finally:
        collecting.cancel()
        leaving.cancel()


async def _collect(answer: Answer, events: asyncio.Queue[Event]) -> dict[str, Any]:
    while True:
        event = await events.get()
        if isinstance(event, Failed):
            raise _error_of(event)
        if isinstance(event, Done):
            return answer.whole(event)
        answer.add(event)


async def _gone(http: HttpRequest) -> None:
    """Waits until the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _error_of(failed: Failed) -> ApiError:
    return ApiError(503 if failed.unavailable else 500, failed.message, None, "failed")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
