"""What ends a request early, its time limit and its cancellation; and what its stages took.

The limits are looked at between layers and between tokens, and belong to the thread or task that
set them, like the observer of `attention_capture.py`. A single layer is never interrupted, so a
request may overrun by one layer's time while a prompt is read, and by one forward pass of a token
elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import RequestTimeoutError

_DEADLINE: ContextVar[float | None] = ContextVar("draftsieve_deadline", default=None)
_ASKED: ContextVar[float | None] = ContextVar("draftsieve_asked", default=None)
_CANCELLED: ContextVar[Signal | None] = ContextVar("draftsieve_cancelled", default=None)


class Signal(Protocol):
    """Such as `threading.Event`."""

    def is_set(self) -> bool:
        """Whether it was given."""
        ...


class RequestCancelledError(BaseException):
    """Nobody waits for the request any more; `worker.py` catches it, so that no caller sees it.

    No `Exception`, like asyncio's own: a cancelled compression must not fall back to the originals.
    """


def deadline_after(seconds: float | None) -> float | None:
    """The moment that many seconds after the request was made, for `until`; None for no limit."""
    if seconds is None:
        return None
    asked = _ASKED.get()
    return (time.monotonic() if asked is None else asked) + seconds


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Let `check_deadline` raise inside the block once the moment has passed."""
    token = _DEADLINE.set(deadline)
    try:
        yield
    finally:
        _DEADLINE.reset(token)


@contextmanager
def waiting(cancelled: Signal, asked: float) -> Iterator[None]:
    """Work inside the block for a caller who waits.

    Args:
        cancelled: Once it is set, `check_deadline` raises.
        asked: The moment of the request on `time.monotonic`'s clock; time in a queue counts.
    """
    tokens = _CANCELLED.set(cancelled), _ASKED.set(asked)
    try:
        yield
    finally:
        _CANCELLED.reset(tokens[0])
        _ASKED.reset(tokens[1])


def check_deadline() -> None:
    """Raise if the request around this call has used up its time, or was cancelled.

    Raises:
        RequestTimeoutError: Its time is up.
        RequestCancelledError: It was cancelled.
    """
    cancelled, deadline = _CANCELLED.get(), _DEADLINE.get()
    if cancelled is not None and cancelled.is_set():
        raise RequestCancelledError
    if deadline is not None and time.monotonic() > deadline:
        raise RequestTimeoutError(
            "The request's timeout has passed before it was done: allow more seconds, or give "
            "less to read (fewer passages) or to write (max_new_tokens)."
        )


@dataclass(slots=True)
class Clock:
    """Seconds per named stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({stage: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds per stage."""
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more
