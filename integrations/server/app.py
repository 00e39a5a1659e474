"""`create_app`: the server as an ASGI app, for uvicorn and for whoever else runs such apps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from starlette.responses import Response

from ... import __version__
from ...core.engine import Engine
from .completions import completions
from .compression import compression
from .errors import add_error_handlers
from .logs import log
from .models import models
from .originals import Originals
from .proxy import create_proxy
from .service import Service
from .settings import Settings
from .watching import Watching, record_of


def create_app(settings: Settings | None = None, engine: Engine | None = None) -> FastAPI:
    """Build the app. Its models are loaded when it starts; `/ready` says when they are there.

    Args:
        settings: None for those of the environment. With an upstream the app is a proxy in front
            of it.
        engine: A loaded engine, instead of the settings' models.

    Returns:
        The app; `app.state.service` has the models and counters.

    Raises:
        ModelNotFoundError: There is no such model.
        ConfigError: An option is invalid.
    """
    settings = settings or Settings()
    if settings.upstream is not None:
        return create_proxy(settings)
    service = Service(settings, engine)
    originals = Originals(
        settings.originals,
        max_bytes=settings.originals_bytes,
        max_seconds=settings.originals_seconds,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service))
        yield
        await loading
        originals.close()

    def tenant(request: Request) -> None:
        request.state.tenant = service.tenants.of(request)
        record_of(request).fields["tenant"] = request.state.tenant

    app = FastAPI(title="draftsieve", version=__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Watching, metrics=service.metrics, most=service.settings.max_body_bytes)
    add_error_handlers(app)
    for router in (completions(service), compression(service, originals), models(service)):
        app.include_router(router, dependencies=[Depends(tenant)])

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The models are loaded."""
        return {"status": "ready", "model": service.loaded.model}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters in Prometheus' form."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _load(service: Service) -> None:
    await asyncio.to_thread(service.load)
    if service.failure is not None:
        log("loading failed", error=type(service.failure).__name__)
