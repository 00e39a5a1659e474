"""`Request`: one prompt on its way; every stage reads what the ones before it have found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .config import Generation, SpecKV
from .kv_cache.prefix import Memory
from .prompt.encoder import PromptTokens
from .prompt.messages import Prompt
from .runtime.limits import Clock, deadline_after
from .types import CompressedContext, DraftReading

if TYPE_CHECKING:
    from .generation.decode import Row
    from .generation.speculative.select import DraftPlan
    from .specpc.chunking import Piece
    from .specpc.fitting import Budget


GREEDY = Generation()


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way. Fields stand in the order in which the stages fill them in.

    Args:
        prompt: As it was asked.
        generation: How it is to be answered; its timeout counts from here on.
        memories: What the models already know of the prompt's beginning (sessions).
    """

    prompt: Prompt
    generation: Generation = field(default=GREEDY)
    memories: Memories | None = None
    clock: Clock = field(default_factory=Clock)  # seconds a stage
    deadline: float | None = field(init=False)
    note: str | None = None  # what had to be left out of SpecPC's method
    fallback: str | None = None  # why a method was not applied although it was asked for
    # 1. SpecPC, in the draft's tokens (`specpc/pipeline.py`)
    draft_tokens: PromptTokens | None = None  # of `prompt`
    budget: Budget | None = None
    lookahead_tokens: int = 1  # that the draft guesses
    groups: Sequence[Sequence[Piece]] = ()  # several where the prompt exceeds the draft's window
    parts: Sequence[PromptTokens] = ()  # what the draft reads: the prompt, or one for each group
    reading: DraftReading | None = None
    shorter: Prompt = field(init=False)  # what the target reads
    context: CompressedContext | None = None  # what was kept; None: nothing was to be shortened
    # 2. the target's tokens (`generation/pipeline.py`)
    tokens: PromptTokens = field(init=False)  # of what the target reads
    original: PromptTokens = field(init=False)  # of `prompt`
    positions: torch.Tensor | None = None  # (tokens,) of kept tokens; None: 0, 1, 2, ...
    # 3. SpecKV (`generation/eviction.py`)
    eviction: EvictionPlan | None = None
    # 4. decoding
    row: Row = field(init=False)  # its answer as it comes
    drafts: DraftPlan | None = None  # None: no drafting
    cache_bytes: int | None = None  # of the evicted cache when decoding starts

    def __post_init__(self) -> None:
        self.deadline, self.shorter = deadline_after(self.generation.timeout), self.prompt

    @property
    def ids(self) -> torch.Tensor:
        """(tokens,) int64 that the target reads."""
        return self.tokens.ids

    @property
    def draft_guess(self) -> torch.Tensor | None:
        """(guessed,) int64 of the draft's tokens, where SpecPC's reading has left an answer."""
        ids = () if self.context is None else self.context.lookahead_ids
        return torch.tensor(ids) if ids else None

    @property
    def target_memory(self) -> Memory | None:
        """What the target knows of the prompt's beginning; requests with one run alone."""
        return None if self.memories is None else self.memories.target

    @property
    def protected(self) -> torch.Tensor:
        """(tokens,) bool: KV entries that always stay."""
        plan = self.eviction
        return torch.ones_like(self.ids, dtype=torch.bool) if plan is None else plan.protected


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


def earliest(requests: Iterable[Request]) -> float | None:
    """The deadline of a batch is its first member's."""
    return min((r.deadline for r in requests if r.deadline is not None), default=None)
