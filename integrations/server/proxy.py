"""A proxy in front of any OpenAI-compatible server: chat requests go on shorter, the rest as it is.

Requests pass byte for byte where nothing is shortened, answers always, as they come. A tool result
or document is shortened once, against the request of its turn, so that later turns begin with the
same bytes. The client's own key goes to the upstream and nowhere else.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from fastapi import Depends, FastAPI, Request
from starlette.responses import Response, StreamingResponse

from ... import __version__
from ...core.compressor import Compressor
from ...core.config import SpecPC
from ...core.conversation.once import OnceCompressor
from ...core.errors import ConfigError, DraftSieveError
from ...retrievers.options import SieveOptions
from .chat_bodies import Shortened, shorten_chat
from .errors import ApiError, add_error_handlers
from .extension import method_of
from .logs import log
from .metrics import Metrics
from .service import Service
from .settings import Settings
from .tenants import Tenants
from .watching import Watching, record_of

OUR_KEY = "x-draftsieve-key"
BYPASS = ("x-draftsieve-bypass", "x-headroom-bypass")
_CHAT = "chat/completions"
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
_HOP = {  # headers of a single connection (RFC 9110, 7.6.1), and what is written anew
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
}
_TENANTS = 256  # whose texts are remembered at once


class Draft(Service):
    """The draft of a proxy, and its bounds."""

    def __init__(self, settings: Settings, compressor: Compressor | None = None) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.tenants = Tenants(settings.keys, OUR_KEY)
        self.running, self.seconds, self.failure, self.options = 0, 1.0, None, None
        method = method_of(settings.method, has_draft=True)
        if not isinstance(method, SpecPC):
            raise ConfigError("A proxy shortens what is sent: its method is specpc, or unset.")
        self.method, self.sieve = method, None
        if compressor is not None:
            self.sieve = SieveOptions(compressor=compressor, method=method)

    def load(self) -> None:
        """Load the draft, unless it is there; a failure is kept, for whoever waits."""
        own = self.settings
        if self.sieve is not None:
            return
        try:
            self.sieve = SieveOptions(
                model=own.draft or "builtin:draft",
                method=self.method,
                store=own.store,
                gguf_file=own.draft_gguf_file,
                revision=own.draft_revision,
                attn_implementation=own.draft_attn_implementation,
                device=own.draft_device or own.device,
                dtype=own.dtype,
                template_options=own.template_options,
            )
        except (DraftSieveError, OSError) as error:
            self.failure = error

    @property
    def compressor(self) -> Compressor:
        """The draft.

        Raises:
            DraftSieveError: It is not loaded; requests go on whole.
        """
        if self.sieve is None:
            raise DraftSieveError("The draft is not loaded yet.")
        return self.sieve.loaded


class Proxy:
    """Sends requests on.

    Args:
        service: With settings of an upstream, and a draft.
        web: Its connections; None for new ones.
    """

    def __init__(self, service: Draft, web: httpx.AsyncClient | None = None) -> None:
        self.service, self.url = service, str(service.settings.upstream).rstrip("/")
        self.url = self.url.removesuffix("/v1")  # clients say it
        timeout = httpx.Timeout(service.settings.timeout, connect=10.0)
        self.web = web or httpx.AsyncClient(timeout=timeout, trust_env=False)
        self._once: OrderedDict[str, OnceCompressor] = OrderedDict()  # by who asks

    async def forward(self, request: Request, path: str) -> Response:
        """Send a request on, and its answer back.

        Raises:
            ApiError: The upstream cannot be reached, or does not answer in time.
        """
        body, said = await request.body(), dict[str, str]()
        chat = request.method == "POST" and path.endswith(_CHAT)
        if chat and not any(request.headers.get(name, "").lower() == "true" for name in BYPASS):
            body, said = await self._shorter(request, body)
        query = f"?{request.url.query}" if request.url.query else ""
        sent = self.web.build_request(
            request.method,
            f"{self.url}{request.url.path}{query}",
            headers=_passed(request.headers.items(), {OUR_KEY, *BYPASS, "content-length"}),
            content=body,
        )
        try:
            answer = await self.web.send(sent, stream=True)
        except httpx.TimeoutException as error:
            raise ApiError(504, "The upstream did not answer in time.", code="timeout") from error
        except httpx.HTTPError as error:
            raise ApiError(
                502,
                f"The upstream cannot be reached ({type(error).__name__}): is it running at "
                f"{self.url}?",
                code="upstream_unreachable",
            ) from error
        response = StreamingResponse(_raw(answer), answer.status_code)
        for name, value in (*_passed(answer.headers.multi_items(), set()), *said.items()):
            response.headers.append(name, value)
        return response

    async def _shorter(self, request: Request, body: bytes) -> tuple[bytes, dict[str, str]]:
        """A chat request's body as it is sent on, and headers that say what became of it."""
        try:
            asked = json.loads(body)
        except ValueError:
            return body, {}  # the upstream says what is wrong with it
        if not isinstance(asked, dict):
            return body, {}
        try:
            found = await self.service.placed(partial(self._shortened, request, asked))
        except ApiError:
            raise  # too many requests, or the client has left
        except (DraftSieveError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            return body, self._failed(request, body, error)
        record_of(request).fields |= {
            "original_tokens": found.original_tokens,
            "sent_tokens": found.tokens,
            "shortened": len(found.texts),
        }
        self.service.metrics.sent_on(found.original_tokens, found.tokens)
        said = {"x-draftsieve-tokens": f"{found.original_tokens} to {found.tokens}"}
        if found.changed:
            # lone surrogates stay escaped, as JSON must be Unicode
            body = json.dumps(found.body).encode()
        return body, said

    async def _shortened(self, request: Request, asked: Mapping[str, Any]) -> Shortened:
        once = self._once_of(request)
        timeout = self.service.settings.timeout
        work = once.compressor.worker.run(
            shorten_chat, asked, lambda question, texts: once.shorten(question, texts, timeout)
        )
        return await self.service.unless_gone(request, work)

    def _failed(self, request: Request, body: bytes, error: Exception) -> dict[str, str]:
        """Go on with the original and say so, unless the upstream could not read it.

        Raises:
            ApiError: It could not.
        """
        kind = type(error).__name__
        record_of(request).fields["fallback"] = kind
        self.service.metrics.fallbacks.inc()
        log("shortening failed", error=kind)
        limit, sieve = self.service.settings.upstream_tokens, self.service.sieve
        if limit is not None and sieve is not None:
            size = sieve.loaded.count_tokens(body.decode("utf-8", "replace"))
            if size > limit:
                raise ApiError(
                    400,
                    f"The request has about {size:,} tokens, the upstream reads at most {limit:,}, "
                    f"and shortening it failed ({kind}).",
                    code="context_length_exceeded",
                ) from error
        why = str(error) if isinstance(error, DraftSieveError) else "the proxy's log has more"
        text = f"{kind}: {why}".replace("\n", " ")[:500]
        return {"x-draftsieve-fallback": text.encode("ascii", "replace").decode()}

    def _once_of(self, request: Request) -> OnceCompressor:
        """What remembers for one tenant; without keys of ours, for one upstream key."""
        key = request.headers.get("authorization", "").encode()
        who = f"{request.state.tenant}:{hashlib.sha256(key).hexdigest()}"
        if who not in self._once:
            own = self.service
            least = own.settings.min_tokens
            self._once[who] = OnceCompressor(own.compressor, own.method, min_tokens=least)
        self._once.move_to_end(who)
        while len(self._once) > _TENANTS:
            self._once.popitem(last=False)
        return self._once[who]


def create_proxy(
    settings: Settings,
    compressor: Compressor | None = None,
    web: httpx.AsyncClient | None = None,
) -> FastAPI:
    """Build the proxy as an ASGI app.

    Args:
        settings: With an upstream.
        compressor: A loaded draft, instead of the settings'.
        web: Connections to the upstream; None for new ones.

    Raises:
        ConfigError: The method is none that shortens prompts.
    """
    service = Draft(settings, compressor)
    own = Proxy(service, web)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(asyncio.to_thread(service.load))
        yield
        await loading
        await own.web.aclose()

    def tenant(request: Request) -> None:
        request.state.tenant = service.tenants.of(request)
        record_of(request).fields["tenant"] = request.state.tenant

    app = FastAPI(title="draftsieve", version=__version__, lifespan=lifespan, docs_url=None)
    app.state.service = service
    app.add_middleware(Watching, metrics=service.metrics, most=settings.max_body_bytes)
    add_error_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The proxy runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The draft is loaded."""
        if service.sieve is None:
            raise ApiError(503, "The draft is still being loaded: ask again soon.")
        return {"status": "ready", "upstream": str(settings.upstream)}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters in Prometheus' form."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route(
        "/{path:path}",
        methods=_METHODS,
        include_in_schema=False,
        response_model=None,
        dependencies=[Depends(tenant)],
    )
    async def forward(request: Request, path: str) -> Response:
        """Everything else is the upstream's."""
        return await own.forward(request, path)

    return app


def _passed(headers: Iterable[tuple[str, str]], but: set[str]) -> list[tuple[str, str]]:
    """Headers that belong to the message, not to its connection."""
    return [(name, value) for name, value in headers if name.lower() not in _HOP | but]


async def _raw(answer: httpx.Response) -> AsyncIterator[bytes]:
    """An answer as it comes; its connection is let go of when nobody reads on."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
