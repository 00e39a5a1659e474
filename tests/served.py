"""A real server in a thread, on 127.0.0.1 and a free port."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from draftsieve import Engine
from draftsieve.integrations.server import Settings, create_app
from draftsieve.integrations.server.service import Service


@dataclass
class Served:
    """Where a server listens, and what it is made of."""

    url: str
    app: FastAPI
    server: uvicorn.Server
    web: httpx.Client

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def sync(self, **options: Any) -> OpenAI:
        given = {"api_key": "none", "max_retries": 0, **options}
        return OpenAI(base_url=f"{self.url}/v1", http_client=self.web, **given)

    def aio(self, **options: Any) -> AsyncOpenAI:
        web = httpx.AsyncClient(trust_env=False)
        given = {"api_key": "none", "max_retries": 0, **options}
        return AsyncOpenAI(base_url=f"{self.url}/v1", http_client=web, **given)

    def counted(self, name: str) -> float:
        """A counter's value, its labels added up."""
        lines = self.web.get("/metrics").text.splitlines()
        values = [line for line in lines if line.partition(" ")[0].partition("{")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in values)


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[Served]:
    """Serve an engine until the block ends."""
    app = create_app(Settings(**settings), engine)
    with socket.create_server(("127.0.0.1", 0)) as place:
        config = uvicorn.Config(app, log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = Thread(target=asyncio.run, args=(server.serve([place]),), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=120) as web:
                yield Served(url, app, server, web)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def wait_for(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
