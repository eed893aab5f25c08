"""What a function gives, one by one, while it runs in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Stream(Iterator[T], Generic[T]):
    """What `work` gives, in order.

    An interruption reaches the thread that reads, and never the middle of a step, after which a
    cache would hold tokens in some layers only.

    Args:
        work: called in a thread with two functions: one to give something, and one to ask whether
            it should end early. What it raises is raised by the iterator.
    """

    def __init__(self, work: Callable[[Callable[[T], None], Callable[[], bool]], object]):
        self._given: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._over = False
        # A daemon, so that a process which has to end does not wait for a long prompt.
        self._thread = threading.Thread(
            target=self._run, args=(work,), name=type(self).__name__, daemon=True
        )
        self._thread.start()

    def _run(self, work: Callable) -> None:
        end: BaseException | None = None
        try:
            work(lambda item: self._given.put((item,)), self._stopped.is_set)
        except BaseException as error:
            end = error
        self._given.put(end)

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        item = self._given.get()
        if isinstance(item, tuple):
            return item[0]
        self._over = True
        self._thread.join()
        if item is not None:
            raise item
        raise StopIteration

    def stop(self) -> None:
        """Ask for an early end. What is given until then can still be read."""
        self._stopped.set()

    def close(self) -> None:
        """Ask for an early end, and wait for it."""
        self.stop()
        self._thread.join()
