"""Blocking work of a model for asynchronous callers: one thread with a queue, and what it tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from threading import Event
from typing import Generic, ParamSpec, TypeVar

from .limits import RequestCancelledError, check_deadline, waiting

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One thread and its queue: asynchronous work of one model never runs beside other such work.

    Works with any number of event loops; sync calls do not pass through it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draftsieve")

    def __reduce__(self) -> tuple[type[Worker], tuple[()]]:
        return Worker, ()  # a copy has a thread of its own

    async def run(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run a call when its turn comes; when the caller is cancelled, it ends at the next layer.

        Args:
            call: Looks at `check_deadline` now and then.
            args: Of the call.
            options: Of the call.
        """
        gone, asked = Event(), time.monotonic()

        def job() -> T | None:
            try:
                with waiting(gone, asked):
                    check_deadline()
                    return call(*args, **options)
            except RequestCancelledError:
                return None

        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, partial(copy_context().run, job))
        finally:
            gone.set()
        assert found is not None  # a call is without a result only where it was cancelled
        return found

    def post(self, job: Callable[[], None]) -> None:
        """Put a job that tells its results itself (`Inbox`) at the queue's end."""
        self._thread.submit(job)


class Inbox(Generic[T]):
    """What the worker's thread tells one task, of whichever event loop.

    Made by the task; `gone` is set once it no longer listens, `asked` is when it began.
    """

    def __init__(self) -> None:
        self.gone, self.asked = Event(), time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._found: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    def tell(self, found: T | BaseException | None) -> None:
        """Something that was found, what went wrong, or None for the end; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._found.put_nowait, found)
        except RuntimeError:  # the event loop has been closed
            self.gone.set()

    async def listen(self) -> AsyncIterator[T]:
        """What is told, until the end."""
        try:
            while (found := await self._found.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            self.gone.set()
