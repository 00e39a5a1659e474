"""What a request gives back: its text in chunks, and the answer with its provenance."""

from __future__ import annotations

from ..prompt.tool_calls import ToolReader, parse_tool_calls
from ..request import Request
from ..types import Answer, Chunk, Usage


class AnswerChunks:
    """One request's answer in pieces; tool calls are told from text.

    Args:
        request: It is being decoded.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._text = request, ""
        self._tools = ToolReader(_calls_first(request)) if request.prompt.tools else None

    def of(self, piece: str) -> list[Chunk]:
        """What can be told once this text has been said: one chunk, or none yet."""
        self._text += piece
        said, calls = (piece, ()) if self._tools is None else self._tools.push(piece)
        return [Chunk(said, tool_calls=calls)] if said or calls else []

    def last(self) -> Chunk:
        """The rest, with the answer."""
        rest = "" if self._tools is None else self._tools.close()
        return Chunk(rest, answer_of(self._request, self._text))


def answer_of(request: Request, text: str) -> Answer:
    """What a request that has been decoded gives back."""
    plan, tools = request.eviction, request.prompt.tools
    parts = parse_tool_calls(text, _calls_first(request)) if tools else (text, (), ())
    said, calls, broken = parts
    entries = None if plan is None else plan.capacity
    return Answer(
        text=said,
        spans=() if request.context is None else request.context.spans,
        usage=Usage(len(request.original), len(request.tokens), request.row.text.tokens, entries),
        timings=dict(request.clock.seconds),
        finish_reason=request.row.text.finish_reason or "length",
        lookahead=None if plan is None else plan.text,
        context=request.context,
        cache_bytes=request.cache_bytes if plan is not None else None,
        tool_calls=calls,
        broken_calls=broken,
        drafting=None if request.drafts is None else request.drafts.tally.value(),
        fallback=request.fallback,
    )


def _calls_first(request: Request) -> bool:
    """Tool calls stand at the answer's beginning or nowhere."""
    grammar = request.generation.grammar
    return grammar is not None and grammar.calls_first
