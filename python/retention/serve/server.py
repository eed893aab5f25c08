"""The server's socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from retention.lm.errors import UsageError, shown
from retention.serve.engine import Engine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# For answers to reach their clients, after the engine has ended.
_SECONDS_TO_SEND = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, of which `Server` makes one that listens; port 0 is any that is
    free.

    Raises:
        UsageError: where that cannot be.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host, --port: cannot bind {host}:{port}: {shown(error)}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Ends in steps: no request is taken any more, and is told so; what waits or runs goes on, for
    so many seconds at most; then the sockets close.

    Args:
        app: of `create_app`.
        engine: its engine, which is started, and closed at the end.
        shutdown_seconds: how long what runs may go on.
        say: told what ends.
    """

    def __init__(
        self, app: Any, engine: Engine, shutdown_seconds: float, say: Callable[[str], object]
    ):
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_SECONDS_TO_SEND,
            )
        )
        self._engine = engine
        self._shutdown_seconds = shutdown_seconds
        self._say = say
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.start()
        watching = asyncio.create_task(self._watch_engine())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()
            await asyncio.to_thread(self._engine.close)

    def end(self) -> None:
        """Begins to end; the second time it ends at once. In the thread of the event loop."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        else:
            self.should_exit = True
            self._ending.cancel()

    async def _end(self) -> None:
        self._engine.drain()
        load = self._engine.load
        if load:
            self._say(f"finishing {load} answers, for at most {self._shutdown_seconds:g} seconds")
        try:
            idle = await asyncio.to_thread(
                self._engine.wait_until_idle, self._shutdown_seconds if load else 0
            )
            if not idle:
                self._say(f"{self._engine.load} answers are cut off")
        finally:
            self.should_exit = True
            self._engine.close()

    async def _watch_engine(self) -> None:
        """Without an engine there is no server: what keeps it running starts it anew."""
        while self._engine.failure is None:
            await asyncio.sleep(0.2)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would close the sockets at once, and raise the signal again at the end.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
