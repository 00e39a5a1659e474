"""Blocking calls of a model for asynchronous callers: a thread for them, one after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import ParamSpec, TypeVar

from .limits import RequestCancelledError, check_deadline, waiting

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One thread and its queue: asynchronous calls of one model never run beside each other.

    Streams take turns step by step. When the caller is cancelled, its call ends at the model's
    next layer or token. Works with any number of event loops; sync calls do not pass through it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draftsieve")

    def __reduce__(self) -> tuple[type[Worker], tuple[()]]:
        return Worker, ()  # a copy has a thread of its own

    async def run(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run a call when its turn comes; the event loop stays free."""
        caller = _Caller()
        try:
            found = await self._submit(caller, partial(call, *args, **options))
        finally:
            caller.gone.set()
        assert found is not None  # a call is without a result only where it was cancelled
        return found

    async def steps(self, stream: Iterator[T]) -> AsyncIterator[T]:
        """Run each step of a generator when its turn comes; leaving early closes it."""
        caller = _Caller()
        step: asyncio.Future[T | None] | None = None
        try:
            while True:
                step = self._submit(caller, partial(next, stream, None))
                found = await asyncio.shield(step)
                if found is None:
                    return
                yield found
        finally:
            caller.gone.set()
            if step is not None:  # a generator that runs cannot be closed: wait for its step's end
                step.add_done_callback(lambda _: stream.close())  # type: ignore[attr-defined]

    def _submit(self, caller: _Caller, call: Callable[[], T | None]) -> asyncio.Future[T | None]:
        job = partial(copy_context().run, partial(_run_for, caller, call))
        return asyncio.get_running_loop().run_in_executor(self._thread, job)


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who waits for a result, since when."""

    gone: Event = field(default_factory=Event)
    asked: float = field(default_factory=time.monotonic)


def _run_for(caller: _Caller, call: Callable[[], T | None]) -> T | None:
    """The call's result, or None where the caller was gone before or while it ran."""
    try:
        with waiting(caller.gone, caller.asked):
            check_deadline()
            return call()
    except RequestCancelledError:
        return None
