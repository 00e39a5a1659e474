"""`/v1/models`, and what a server of this kind does not have."""

from __future__ import annotations

import time
from typing import Any, NoReturn

from fastapi import APIRouter

from .errors import ApiError
from .service import Service


def models(service: Service) -> APIRouter:
    """The routes that say what there is."""
    router, created = APIRouter(), int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "draftsieve",
            "max_model_len": service.loaded.loaded.context_window,
        }

    @router.get("/v1/models")
    async def listed() -> dict[str, Any]:
        """The target, by all its names."""
        others = [name for name in service.settings.model_names if name != "*"]
        names = dict.fromkeys([service.loaded.model, *others])
        return {"object": "list", "data": [described(name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        """One of them."""
        return described(service.model(name))

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings() -> NoReturn:
        """Refused."""
        raise ApiError(
            400,
            "This server makes no embeddings: its models answer and compress. Ask a server of an "
            "embedding model.",
            code="unsupported_endpoint",
        )

    return router
