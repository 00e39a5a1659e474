"""The values that flow through draftsieve, in order; all frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only retrieves needs no torch
    import torch


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved text. `id` defaults to its place ("1", "2", ...) once it is in a prompt."""

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Span:
    """Kept characters start..end (end exclusive) of a passage's ORIGINAL text, with their score."""

    passage_id: str
    start: int
    end: int
    score: float
    passage_index: int  # place of the passage in the request, from 0 (ids may repeat)


class Segment(IntEnum):
    """Where a prompt token comes from. Only PASSAGE tokens may be dropped."""

    TEMPLATE = 0  # written by the chat template
    SYSTEM = 1
    MESSAGE = 2  # earlier turns, and the text around documents
    QUESTION = 3  # the last user message without its documents
    NUMBER = 4  # "[3] " in front of a passage
    PASSAGE = 5


class TensorValue:
    """Base of frozen values that hold tensors: equal if of one class with equal fields, no hash.

    Such a class is declared with `eq=False`, as the equality that `dataclass` writes asks a whole
    tensor for its truth. Tensors are equal that agree in type, device, shape and every element.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return all(_equal(getattr(self, name), getattr(other, name)) for name in names)


def _equal(ours: Any, theirs: Any) -> bool:
    """Equality of two fields, which may be tensors, arrays or sequences of them."""
    import numpy as np
    import torch

    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        alike = (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        return alike and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return bool(ours == theirs)


@dataclass(frozen=True, slots=True, eq=False)
class DraftReading(TensorValue):
    """What the draft made of a prompt."""

    scores: torch.Tensor  # (tokens,) float32, before pooling
    lookahead_ids: torch.Tensor  # (lookahead,) int64, the draft's guessed answer
    likelihood: torch.Tensor | None = (
        None  # (passages,) log-probability of the question behind each
    )


@dataclass(frozen=True, slots=True, eq=False)
class Selection(TensorValue):
    """Kept prompt positions, always ascending."""

    indices: torch.Tensor  # (kept,) int64
    pooled_scores: torch.Tensor  # (tokens,) float32


@dataclass(frozen=True, slots=True)
class CompressionStats:
    """Sizes in draft tokens (of the whole prompt and of its passages) and seconds per stage.

    `fallback` says why the passages came back unchanged although compression was asked for, and
    `note` what was left out of the method; both are None otherwise.
    """

    prompt_tokens: int
    compressed_prompt_tokens: int
    passage_tokens: int
    compressed_passage_tokens: int
    compressed: bool
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False)
    fallback: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class PassageStats:
    """Sizes of one passage in draft tokens, and the best score among its tokens (0 if unread)."""

    tokens: int
    compressed_tokens: int
    score: float


@dataclass(frozen=True, slots=True)
class CompressedContext:
    """The result of `Compressor.compress`: passages in their order, shortened.

    `spans` and `sizes` describe every passage of the request; `passages` lacks the empty ones if
    `drop_empty` was asked for, and `indices` tells each one's place in the request.
    """

    text: str  # the numbered passages as they stand in the target's prompt
    passages: tuple[Passage, ...]
    indices: tuple[int, ...]
    spans: tuple[Span, ...]
    sizes: tuple[PassageStats, ...]
    stats: CompressionStats
    lookahead_ids: tuple[int, ...] = ()  # the draft's guessed answer, where it read in one piece


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, counted by the target's tokenizer."""

    original_prompt_tokens: int
    prompt_tokens: int  # what the target really read
    completion_tokens: int
    cache_entries: int | None = None  # KV entries a head after eviction; None: nothing evicted

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens that the target processed."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the target wants to be called, with the arguments as plain values."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Drafting:
    """What drafting did for one answer (`Generation.drafting`); it never changes the answer."""

    forwards: int = 0  # of the target, the one that read the prompt left out
    tokens: int = 0  # that those gave
    drafted: int = 0  # tokens proposed
    accepted: int = 0  # of them that the target said too
    seconds: float = 0.0  # spent on proposing
    note: str | None = None  # why nothing was drafted; None if drafting was on

    @property
    def tokens_per_forward(self) -> float:
        """1.0 is what decoding without drafts gives."""
        return self.tokens / self.forwards if self.forwards else 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target said, with the spans it was given and what they cost.

    Where the prompt has tools, `text` is what stands around their calls.
    """

    text: str
    spans: tuple[Span, ...]
    usage: Usage
    timings: Mapping[str, float]  # seconds per stage
    finish_reason: str  # "stop" (end token), "stop_string" or "length"
    lookahead: str | None = None  # the draft's guessed answer, where a method made one
    context: CompressedContext | None = None
    cache_bytes: int | None = None  # evicted cache when decoding starts: this row's share of it
    tool_calls: tuple[ToolCall, ...] = ()
    broken_calls: tuple[str, ...] = ()  # as written: cut off, or no valid JSON
    drafting: Drafting | None = None  # None: none was asked for
    fallback: str | None = None  # why the method was not applied although it was asked for


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer; the last one carries the whole `Answer`.

    A tool call comes in one piece, as soon as it is complete.
    """

    text: str
    answer: Answer | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Trace(TensorValue):
    """Every intermediate of one request on bare token ids (see DESIGN, `Engine.trace`)."""

    output_ids: torch.Tensor  # (new tokens,) int64
    draft_scores: torch.Tensor | None = None  # (tokens,) float32, before pooling
    pooled_scores: torch.Tensor | None = None  # (tokens,) float32
    kept_prompt_indices: torch.Tensor | None = None  # (kept,) int64, ascending
    lookahead_ids: torch.Tensor | None = None  # (lookahead,) int64
    kv_scores: Sequence[torch.Tensor] = field(default_factory=tuple)
    kept_kv_indices: Sequence[Sequence[torch.Tensor]] = field(default_factory=tuple)
