"""Running an app with uvicorn until it is told to end."""

from __future__ import annotations

import asyncio
import socket

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
    with logging_lines(settings.log_format), _listening(settings.host, settings.port) as place:
        url = f"http://{_shown(settings.host)}:{place.getsockname()[1]}"
        log("listening", url=url, target=settings.target, draft=settings.draft)
        asyncio.run(Server(config, service).serve([place]))
    if service.failure is not None:
        raise service.failure


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"The server cannot listen at {_shown(host)}:{port} ({error}): give another --host or "
            "--port, or end what listens there."
        ) from error


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
