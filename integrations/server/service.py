"""What all routes share: the models, who may ask, how many at once, and what is counted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar, cast

from starlette.requests import Request

from ...core.config import Quantization
from ...core.engine import Engine
from ...core.errors import DraftSieveError
from ...core.models.names import resolve
from ...core.prompt.messages import Prompt
from ...core.types import Chunk, Passage
from .._shared.options import CallOptions, EngineOptions
from .bodies import Body, passages_of
from .errors import ApiError
from .extension import Extension, method_of
from .metrics import Metrics
from .settings import Settings
from .tenants import Tenants
from .watching import record_of

T = TypeVar("T")
NO_DRAFT = "none"
_ANY = "*"
_LONGEST_RETRY = 60


class Service:
    """The models of a server and its bounds.

    Args:
        settings: Of the server.
        engine: A loaded engine, instead of the settings' models.

    Raises:
        ModelNotFoundError: There is no such model.
        ConfigError: The default method is none.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.tenants = Tenants(settings.keys)
        self.running, self.seconds = 0, 1.0  # of a request, lately
        self.failure: DraftSieveError | OSError | None = None  # why the models could not be loaded
        self.options: EngineOptions | None = None
        self._names = [settings.target or "builtin:target"]
        if settings.draft != NO_DRAFT:
            self._names.append(settings.draft or "builtin:draft")
        if engine is not None:
            self.options = self._options_of(engine)
            return
        for name in self._names:
            resolve(name)
        method_of(settings.method, has_draft=len(self._names) > 1)

    def load(self) -> None:
        """Load the models, unless they are there; a failure is kept, for whoever waits."""
        if self.options is not None:
            return
        try:
            self.options = self._options_of(None)
        except (DraftSieveError, OSError) as error:
            self.failure = error

    @property
    def loaded(self) -> EngineOptions:
        """Options of the engine that answers.

        Raises:
            ApiError: It is not loaded yet.
        """
        if self.options is None:
            why = "are still being loaded: ask again soon"
            if self.failure is not None:
                why = "could not be loaded; the server's log says why"
            headers = {"Retry-After": "5"}
            raise ApiError(503, f"The models {why}.", code="not_ready", headers=headers)
        return self.options

    def _options_of(self, engine: Engine | None) -> EngineOptions:
        own = self.settings
        draft = self._names[1] if len(self._names) > 1 else None
        has_draft = draft is not None if engine is None else engine.compressor is not None
        return EngineOptions(
            engine=engine,
            model=self._names[0],
            draft=draft,
            method=method_of(own.method, has_draft=has_draft),
            store=None if engine is not None else own.store,
            quantization=None if own.bits is None else Quantization(bits=own.bits),
            **{name: getattr(own, name) for name in _PASSED},
        )

    def model(self, asked: str | None) -> str:
        """What a response calls the model.

        Raises:
            ApiError: The request names another one.
        """
        own = self.loaded.model
        if asked in (None, own):
            return own
        if asked not in self.settings.model_names and _ANY not in self.settings.model_names:
            raise ApiError(
                404,
                f"There is no such model; this server has {own!r} (model_names gives it others).",
                "model",
                "model_not_found",
            )
        return str(asked)

    def documents(self, body: Body) -> Sequence[str | Passage]:
        """The documents of a request.

        Raises:
            ApiError: There are too many.
            PromptError: One has no text.
        """
        return passages_of(self.few(body.documents or ()))

    def few(self, documents: Sequence[T]) -> Sequence[T]:
        """The documents, if they are not too many.

        Raises:
            ApiError: They are.
        """
        most = self.settings.max_documents
        if len(documents) > most:
            raise ApiError(
                413,
                f"There are {len(documents):,} documents, the server takes {most:,}: send fewer.",
                "documents",
                "too_many_documents",
            )
        return documents

    def timeout(self, asked: Extension) -> float:
        """Seconds that a request may take."""
        return min(asked.timeout or math.inf, self.settings.timeout)

    def take(self) -> None:
        """Take a place among the running requests; `leave` gives it back.

        Raises:
            ApiError: There is none.
        """
        if self.running >= self.settings.max_requests:
            self.metrics.refused.inc()
            turns = math.ceil(self.running / 8)
            wait = min(_LONGEST_RETRY, max(1, math.ceil(self.seconds * turns)))
            raise ApiError(
                429,
                f"{self.running} requests are running or waiting, and no more may: ask again in "
                f"{wait} s.",
                code="too_many_requests",
                headers={"Retry-After": str(wait)},
            )
        self.running += 1
        self.metrics.running.set(self.running)

    def leave(self, seconds: float) -> None:
        """Give a place back.

        Args:
            seconds: That the request took.
        """
        self.running -= 1
        self.metrics.running.set(self.running)
        self.seconds += 0.2 * (seconds - self.seconds)

    async def placed(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something in a place of its own."""
        self.take()
        began = time.monotonic()
        try:
            return await work()
        finally:
            self.leave(time.monotonic() - began)

    async def ask(
        self, request: Request, prompt: Prompt, call: CallOptions
    ) -> AsyncGenerator[Chunk, None]:
        """Answer a prompt piece by piece, in a place of its own, and count what it took.

        Args:
            request: For its record.
            prompt: What is asked.
            call: Options of the core's call.
        """
        self.take()
        began, first = time.monotonic(), True
        self.metrics.waiting.inc()
        try:
            chunks = self.loaded.loaded.astream_prompt(prompt, **dict(call))
            async with aclosing(cast(AsyncGenerator[Chunk, None], chunks)):
                async for chunk in chunks:
                    if first:
                        self.metrics.first.observe(time.monotonic() - began)
                        self.metrics.waiting.dec()
                        first = False
                    if chunk.answer is not None:
                        self.metrics.answered(chunk.answer)
                        record_of(request).fields |= {
                            "method": None if call.method is None else type(call.method).__name__,
                            "original_prompt_tokens": chunk.answer.usage.original_prompt_tokens,
                            "prompt_tokens": chunk.answer.usage.prompt_tokens,
                            "completion_tokens": chunk.answer.usage.completion_tokens,
                            "fallback": chunk.answer.fallback is not None,
                        }
                    yield chunk
        finally:
            if first:
                self.metrics.waiting.dec()
            self.leave(time.monotonic() - began)

    async def unless_gone(self, request: Request, work: Awaitable[T]) -> T:
        """Wait for work, and end it when the client leaves.

        Raises:
            ApiError: The client has left; nobody reads it.
        """
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            self.metrics.left.inc()
            raise ApiError(499, "The client has left.", code="client_left")
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


_PASSED = (
    "gguf_file",
    "draft_gguf_file",
    "revision",
    "draft_revision",
    "attn_implementation",
    "draft_attn_implementation",
    "device",
    "draft_device",
    "dtype",
    "template_options",
    "max_tokens",
    "timeout",
    "on_error",
)  # settings that are `EngineOptions` by the same name


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def last(chunks: AsyncIterator[Chunk]) -> Chunk:
    """The last piece of an answer, which carries it."""
    found = None
    async for chunk in chunks:
        found = chunk
    assert found is not None  # there is always a last one
    return found
