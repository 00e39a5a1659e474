"""A request's time limit, looked at between layers and between tokens.

It belongs to the thread or task that set it, like the observer of `capture.py`. A single layer is
never interrupted, so a request may overrun its limit by one layer's time while a draft reads or a
cache is evicted, and by one forward pass elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import RequestTimeoutError

_DEADLINE: ContextVar[float | None] = ContextVar("draftsieve_deadline", default=None)


def deadline_after(seconds: float | None) -> float | None:
    """The moment that many seconds from now, for `until`; None for no limit."""
    return None if seconds is None else time.monotonic() + seconds


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Let `check_deadline` raise inside the block once the moment has passed."""
    token = _DEADLINE.set(deadline)
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def check_deadline() -> None:
    """Raise if the request around this call has used up its time.

    Raises:
        RequestTimeoutError: It has.
    """
    deadline = _DEADLINE.get()
    if deadline is not None and time.monotonic() > deadline:
        raise RequestTimeoutError(
            "The request's timeout has passed before it was done: allow more seconds, or give "
            "less to read (fewer passages) or to write (max_new_tokens)."
        )
