"""Who asks: API keys, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from pydantic import SecretStr
from starlette.requests import Request

from .errors import ApiError

NOBODY = "default"  # the tenant of a server without keys


class Tenants:
    """The keys of a server.

    Args:
        keys: By the names of their tenants; without any everybody is one tenant.
        header: A header that holds nothing but the key; None for OpenAI's `Authorization`.
    """

    def __init__(self, keys: Mapping[str, SecretStr], header: str | None = None) -> None:
        self._header = header
        self._digests = {name: _digest(key.get_secret_value()) for name, key in keys.items()}

    def of(self, request: Request) -> str:
        """The tenant of a request.

        Raises:
            ApiError: There are keys, and it carries none of them.
        """
        if not self._digests:
            return NOBODY
        if self._header is not None:
            given = _digest(request.headers.get(self._header, ""))
        else:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            given = _digest(key.strip() if kind.lower() == "bearer" else "")
        found = [name for name, known in self._digests.items() if hmac.compare_digest(known, given)]
        if not found:
            raise ApiError(
                401,
                "The API key is missing or unknown: send it as "
                f"`{self._header or 'Authorization: Bearer'} KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
