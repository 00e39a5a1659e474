"""One line a request on stderr: who, what, how long; never a text."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

ACCESS = logging.getLogger("draftsieve.server")


class _Line(logging.Formatter):
    """A record as JSON, or as words."""

    def __init__(self, form: Literal["json", "text"]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if self._form == "json":
            return json.dumps(told, ensure_ascii=True, default=str)
        return " ".join(f"{name}={value}" for name, value in told.items())


@contextmanager
def logging_lines(form: Literal["json", "text"]) -> Iterator[None]:
    """Write what the server and uvicorn log as lines on stderr while the block runs."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line(form))
    loggers = [ACCESS, logging.getLogger("uvicorn")]
    before = [(each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
        each.propagate = False
    try:
        yield
    finally:
        for each, (level, propagate) in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate


def log(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with fields; none of them may hold a text of a request."""
    ACCESS.log(level, event, extra={"fields": fields})
