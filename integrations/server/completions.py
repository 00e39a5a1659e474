"""`/v1/chat/completions` and `/v1/completions`: read the body, ask the core once, write it down."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from ...core.errors import PromptError
from ...core.prompt.messages import Prompt
from ...core.types import Chunk
from .._shared.options import CallOptions
from .._shared.tools import grammar_of, schema_of, tools_of
from .answers import Kind, Reply, error_event
from .bodies import Body, ChatBody, CompletionBody
from .errors import told
from .extension import method_of
from .service import Service, last


def completions(service: Service) -> APIRouter:
    """The routes of a service that answer."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation; `documents` and document blocks are compressed."""
        spoken = {
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None,
            "tool_choice": body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "response_format": body.response_format,
        }
        prompt = Prompt.from_messages(
            [message.model_dump(exclude_none=True) for message in body.messages],
            service.documents(body),
            tools_of(spoken),
            schema_of(spoken),
        )
        return await _answer(service, request, body, prompt, spoken, "chat.completion")

    @router.post("/v1/completions", response_model=None)
    async def text(request: Request, body: CompletionBody) -> Response:
        """Answer one prompt, which the model's chat template takes as a user message."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1:
            raise PromptError(f"There are {len(prompts)} prompts: send one a request.")
        spoken = {"response_format": body.response_format}
        messages = [{"role": "user", "content": prompts[0]}]
        prompt = Prompt.from_messages(messages, service.documents(body), schema=schema_of(spoken))
        return await _answer(service, request, body, prompt, spoken, "text_completion")

    return router


async def _answer(
    service: Service,
    request: Request,
    body: Body,
    prompt: Prompt,
    spoken: Mapping[str, Any],
    kind: Kind,
) -> Response:
    """One core call, told as a whole or as a stream."""
    model, call = service.model(body.model), _call(service, body, spoken)
    usage = body.stream_options is not None and body.stream_options.include_usage
    reply = Reply(kind, model, call.method, usage)
    chunks = service.ask(request, prompt, call)
    if not body.stream:
        async with aclosing(chunks):
            answer = (await service.unless_gone(request, last(chunks))).answer
        assert answer is not None  # the last chunk carries it
        return JSONResponse(reply.whole(answer))
    # what fails before the first token is told by the status
    first = await service.unless_gone(request, anext(chunks))
    return EventStream(_events(reply, first, chunks), chunks, service)


def _call(service: Service, body: Body, spoken: Mapping[str, Any]) -> CallOptions:
    """The options of the core's call: the server's, changed by the request's."""
    options, asked = service.loaded, body.draftsieve
    given = {**body.decoding, "timeout": service.timeout(asked)}
    if asked.asks:
        has_draft = options.loaded.compressor is not None
        given["method"] = method_of(asked, has_draft=has_draft)
    if asked.on_error is not None:
        given["on_error"] = asked.on_error
    return options.call_options(given, grammar_of(spoken))


async def _events(
    reply: Reply, first: Chunk, chunks: AsyncGenerator[Chunk, None]
) -> AsyncGenerator[str, None]:
    """The events of a stream; a failure in its middle is one of them."""
    for event in (*reply.first(), *reply.events(first)):
        yield event
    try:
        async for chunk in chunks:
            for event in reply.events(chunk):
                yield event
    except Exception as error:  # noqa: BLE001 - the status has been sent
        yield error_event(told(error).body)


class EventStream(StreamingResponse):
    """Server-sent events that end the work behind them when the client leaves.

    Args:
        events: What is sent.
        chunks: Where they come from.
        service: Counts who left.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        chunks: AsyncGenerator[Chunk, None],
        service: Service,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._chunks, self._service = events, chunks, service

    async def stream_response(self, send: Send) -> None:
        """Send all events, or as many as the client waits for."""
        whole = False
        try:
            async with aclosing(self._chunks), aclosing(self._events):
                await super().stream_response(send)
            whole = True
        finally:
            if not whole:
                self._service.metrics.left.inc()
