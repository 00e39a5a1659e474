"""Running an app with uvicorn until it is told to end."""

from __future__ import annotations

import asyncio

import uvicorn

from .app import create_app
from .logs import log, logging_lines
from .service import Service
from .settings import Settings


class Server(uvicorn.Server):
    """uvicorn's server, which also ends when the models cannot be loaded."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def on_tick(self, counter: int) -> bool:
        """Asked by uvicorn ten times a second whether to end."""
        return await super().on_tick(counter) or self._service.failure is not None


def serve(settings: Settings) -> None:
    """Serve until a signal comes; running answers are finished first.

    Raises:
        ModelNotFoundError: There is no such model.
        DraftSieveError: The models cannot be loaded.
        ConfigError: An option is invalid.
        OSError: The address is not free.
    """
    app = create_app(settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    with logging_lines(settings.log_format):
        sockets = [config.bind_socket()]
        host, port = sockets[0].getsockname()[:2]
        log("listening", url=f"http://{host}:{port}", target=settings.target, draft=settings.draft)
        asyncio.run(Server(config, service).serve(sockets))
    if service.failure is not None:
        raise service.failure
