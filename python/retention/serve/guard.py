"""What a request must pass before anything reads it: the key, and the limit of its size."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retention.serve.schema import ApiError

# Whoever watches the server needs no key: these say nothing of what is asked and answered.
_OPEN = ("/health", "/metrics")


class TooLarge(HTTPException):
    """A body beyond the limit, found while it was read."""

    def __init__(self, limit: int):
        super().__init__(413, f"body: expected at most {limit} bytes, got more")


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies beyond a limit.

    Args:
        app: what it stands before.
        api_key: what `Authorization: Bearer` has to say. None: no key is asked for.
        max_body_bytes: also for a body that comes in chunks, whose size is not known before.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int):
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            response = JSONResponse(refusal.body(), refusal.status, refusal.headers)
            await response(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise TooLarge(self._limit)
            return message

        await self._app(scope, limited, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._key is not None and scope["path"] not in _OPEN:
            scheme, _, key = _header(scope["headers"], b"authorization").partition(b" ")
            # In a time that does not tell how much of it was right.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                message = "api_key: expected the server's as `Authorization: Bearer KEY`"
                headers = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, message, None, "invalid_api_key", headers)
        length = _header(scope["headers"], b"content-length")
        if length.isdigit() and int(length[:20]) > self._limit:
            message = f"body: expected at most {self._limit} bytes, got {int(length[:20])}"
            # What is still to come of it is nobody's.
            return ApiError(413, message, None, "too_large", {"Connection": "close"})
        return None


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")
