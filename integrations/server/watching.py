"""Around every request: its id, its body's size, its line in the log, its counters."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, told
from .logs import log
from .metrics import Metrics


@dataclass(slots=True)
class Record:
    """What is told of a request; `fields` are for the log and hold no text."""

    id: str = field(default_factory=lambda: uuid4().hex)
    status: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


class Watching:
    """ASGI middleware that refuses large bodies, catches what nobody foresaw, and tells.

    Args:
        app: What is watched.
        metrics: Its counters.
        most: Largest body in bytes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int) -> None:
        self.app, self.metrics, self.most = app, metrics, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record, began = Record(), time.perf_counter()
        scope.setdefault("state", {})["record"] = record

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            if int(Headers(scope=scope).get("content-length", "0") or 0) > self.most:
                raise self._too_large()
            await self.app(scope, self._counted(receive), watched_send)
        except Exception as error:
            if not isinstance(error, ApiError):
                log("failed", level=logging.ERROR, id=record.id, error=type(error).__name__)
                logging.getLogger(__name__).debug("The failure in full:", exc_info=error)
            if not record.status:
                await told(error).response()(scope, receive, watched_send)
        finally:
            self._tell(scope, record, time.perf_counter() - began)

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self.most:,} bytes: send less, or let the server take more "
            "(max_body_bytes).",
            code="body_too_large",
        )

    def _tell(self, scope: Scope, record: Record, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(record.status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log(
            "request",
            id=record.id,
            route=route,
            status=record.status,
            seconds=round(seconds, 4),
            **record.fields,
        )


def record_of(request: Request) -> Record:
    """What is told of a request."""
    record: Record = request.state.record
    return record
