"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...core.errors import (
    DraftSieveError,
    OutOfMemoryError,
    RequestTimeoutError,
    StoreError,
)

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would ask twice more


@dataclass(slots=True)
class ApiError(Exception):
    """A request that is refused, and how that is told."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _KINDS.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> Response:
        """The response; its text is ASCII, whatever the request held."""
        text = json.dumps(self.body)
        return Response(text, self.status, dict(self.headers), "application/json")


def told(error: BaseException) -> ApiError:
    """How a failure is told to the client; of what nobody foresaw only that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, str(error), code="timeout", headers=NO_RETRY)
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), code="out_of_memory", headers=NO_RETRY)
    if isinstance(error, StoreError):
        return ApiError(503, str(error), code="store")
    if isinstance(error, DraftSieveError):
        code = "context_length_exceeded" if "reads at most" in str(error) else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, UnicodeError):
        return ApiError(
            400, "The request holds text that is no Unicode (a lone surrogate): mend it."
        )
    return ApiError(500, "The server failed with an error of its own; its log has the details.")


def add_error_handlers(app: FastAPI) -> None:
    """Let every failure of an app be told in OpenAI's form."""

    async def ours(_: Request, error: Exception) -> Response:
        return told(error).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # raised while FastAPI read the body
            return error.__cause__.response()
        headers = dict(error.headers or {})
        return ApiError(error.status_code, str(error.detail), headers=headers).response()

    for kind in (ApiError, DraftSieveError, UnicodeError):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of pydantic's findings as a sentence, without what the request held."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"] if part != "body") or None
    kind, message = found["type"], str(found["msg"])
    if kind == "unsupported":
        return ApiError(400, message, found["ctx"]["param"], "unsupported_parameter")
    if kind == "json_invalid":
        return ApiError(400, f"The body is no JSON: {found.get('ctx', {}).get('error', message)}.")
    if kind == "extra_forbidden":
        return ApiError(400, f"There is no request field {place!r}.", place, "unknown_parameter")
    if place is None:
        return ApiError(400, f"The body cannot be read: {message}. Send a JSON object.")
    return ApiError(400, f"{place}: {message[:1].lower()}{message[1:]}.", place, "invalid_value")
