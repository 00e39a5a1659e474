"""One request on its way through the engine, from a prepared prompt to the answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..config import Generation, SpecKV
from ..kv_cache.prefix import Memory
from ..prompt.tool_calls import parse_tool_calls
from ..runtime.clock import Clock
from ..types import Answer, CompressedContext, Usage
from .decode import RowText
from .speculative.select import DraftPlan


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt on its way through the engine."""

    ids: torch.Tensor  # (tokens,) what the target reads
    original_tokens: int
    context: CompressedContext | None
    options: Generation
    clock: Clock
    row: RowText
    eviction: EvictionPlan | None
    memory: Memory | None  # of the prompt's beginning; requests with one run alone
    reads_tools: bool  # the answer may hold tool calls
    deadline: float | None
    drafts: DraftPlan | None  # None: no drafting
    positions: torch.Tensor | None = None  # (tokens,) of kept tokens; None: 0, 1, 2, ...
    sizes: dict[str, int] = field(default_factory=dict)  # bytes, filled in on the way

    @property
    def protected(self) -> torch.Tensor:
        """(tokens,) bool: KV entries that always stay."""
        plan = self.eviction
        return torch.ones_like(self.ids, dtype=torch.bool) if plan is None else plan.protected

    @property
    def calls_first(self) -> bool:
        """Tool calls stand at the answer's beginning or nowhere."""
        return self.options.grammar is not None and self.options.grammar.calls_first

    def answer(self, text: str) -> Answer:
        entries = None if self.eviction is None else self.eviction.capacity
        parts = parse_tool_calls(text, self.calls_first) if self.reads_tools else (text, (), ())
        said, calls, broken = parts
        return Answer(
            text=said,
            spans=() if self.context is None else self.context.spans,
            usage=Usage(self.original_tokens, self.ids.numel(), self.row.tokens, entries),
            timings=dict(self.clock.seconds),
            finish_reason=self.row.finish_reason or "length",
            lookahead=None if self.eviction is None else self.eviction.text,
            context=self.context,
            cache_bytes=None if entries is None else self.sizes.get("cache"),
            tool_calls=calls,
            broken_calls=broken,
            drafting=None if self.drafts is None else self.drafts.tally.value(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class EvictionPlan:
    """What SpecKV needs for one request."""

    method: SpecKV
    capacity: int
    lookahead: torch.Tensor  # (guessed,) int64, the target's tokens
    text: str
    protected: torch.Tensor  # (tokens,) bool


@dataclass(frozen=True, slots=True)
class Memories:
    """What both models know of a session's documents."""

    target: Memory
    draft: Memory | None
