"""Describes what a compression kept: passages, spans, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..config import SpecPC
from ..prompt.encoder import PromptTokens
from ..prompt.messages import Prompt
from ..request import Request
from ..types import CompressedContext, CompressionStats, PassageStats, Span
from .ranking import passage_scores

Bounds = Sequence[Sequence[tuple[int, int]]]  # per passage, kept characters


def describe(
    request: Request, method: SpecPC, after: PromptTokens, bounds: Bounds
) -> CompressedContext:
    """Put a compression's result together.

    Args:
        request: Encoded, read where that was needed, with its shorter prompt.
        method: For `drop_empty` and what was left out of it.
        after: Tokens of the shorter prompt.
        bounds: Kept characters.
    """
    before, shorter, reading = request.draft_tokens, request.shorter, request.reading
    assert before is not None  # it was encoded
    notes = [request.note, no_embedder(method)]
    ids = [passage.id or "" for passage in request.prompt.passages]
    scores = None if reading is None else reading.scores
    best = torch.zeros(len(ids)) if scores is None else passage_scores(before, scores, len(ids))
    sizes = zip(_sizes(before, len(ids)), _sizes(after, len(ids)), best.tolist(), strict=True)
    indices = tuple(
        i for i, p in enumerate(shorter.passages) if p.text.strip() or not method.drop_empty
    )
    return CompressedContext(
        text=shorter.documents_text,
        passages=tuple(shorter.passages[i] for i in indices),
        indices=indices,
        spans=_scored_spans(ids, bounds, before, scores),
        sizes=tuple(PassageStats(*size) for size in sizes),
        stats=CompressionStats(
            prompt_tokens=len(before),
            compressed_prompt_tokens=len(after),
            passage_tokens=int((~before.protected).sum()),
            compressed_passage_tokens=int((~after.protected).sum()),
            compressed=len(after) < len(before),
            seconds=dict(request.clock.seconds),
            note=None if reading is None else " ".join(filter(None, notes)) or None,
        ),
        lookahead_ids=() if reading is None else tuple(reading.lookahead_ids.tolist()),
    )


def unchanged(request: Request, method: SpecPC) -> CompressedContext:
    """A context in which every passage is whole because nothing had to go."""
    assert request.draft_tokens is not None  # it was encoded
    return describe(request, method, request.draft_tokens, _whole(request.prompt))


def no_embedder(method: SpecPC) -> str | None:
    """What is left out of a method where an embedder is missing; None where nothing is."""
    if not method.semantic_weight or method.embedder is not None:
        return None
    return (
        f"semantic_weight={method.semantic_weight} has no effect without an embedder: give one, "
        "a function from texts to vectors or a folder in sentence-transformers' form."
    )


def failed(prompt: Prompt, count: Callable[[str], int], error: Exception) -> CompressedContext:
    """The originals of a prompt that could not be compressed, perhaps not even encoded.

    Args:
        prompt: As it was asked.
        count: Tokens of a text; the prompt's size is given as that of its passages.
        error: What went wrong.
    """
    sizes = [count(passage.text) for passage in prompt.passages]
    ids = [passage.id or "" for passage in prompt.passages]
    pairs = zip(ids, _whole(prompt), strict=True)
    total = sum(sizes)
    return CompressedContext(
        text=prompt.documents_text,
        passages=prompt.passages,
        indices=tuple(range(len(sizes))),
        spans=tuple(
            Span(name, *bounds, 0.0, i) for i, (name, own) in enumerate(pairs) for bounds in own
        ),
        sizes=tuple(PassageStats(size, size, 0.0) for size in sizes),
        stats=CompressionStats(
            total, total, total, total, False, fallback=f"{type(error).__name__}: {error}"
        ),
    )


def _whole(prompt: Prompt) -> list[list[tuple[int, int]]]:
    return [[(0, len(p.text))] if p.text else [] for p in prompt.passages]


def _sizes(tokens: PromptTokens, count: int) -> list[int]:
    """Tokens of each passage."""
    inside = tokens.passage[tokens.passage >= 0].long()
    return torch.bincount(inside, minlength=count).tolist()


def _scored_spans(
    ids: Sequence[str],
    bounds: Sequence[Sequence[tuple[int, int]]],
    tokens: PromptTokens,
    scores: torch.Tensor | None,
) -> tuple[Span, ...]:
    """Spans with the best score among their tokens; 0 where the draft was not asked."""
    passage, start, end = (x.numpy() for x in (tokens.passage, tokens.start, tokens.end))
    values = np.zeros(len(tokens)) if scores is None else scores.numpy()
    spans = []
    for index, (name, kept) in enumerate(zip(ids, bounds, strict=True)):
        mine = np.nonzero(passage == index)[0]
        for first, last in kept:
            inside = mine[(start[mine] < last) & (end[mine] > first)]
            score = float(values[inside].max()) if len(inside) else 0.0
            spans.append(Span(name, first, last, score, index))
    return tuple(spans)
