"""Describes what a compression kept: passages, spans, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..config import SpecPC
from ..prompt.encoder import PromptTokens
from ..prompt.messages import Prompt
from ..types import CompressedContext, CompressionStats, PassageStats, Span
from .ranking import passage_scores

Bounds = Sequence[Sequence[tuple[int, int]]]  # per passage, kept characters


def describe(
    prompt: Prompt,
    shorter: Prompt,
    tokens: PromptTokens,
    after: PromptTokens,
    bounds: Bounds,
    scores: torch.Tensor | None,
    seconds: Mapping[str, float],
    method: SpecPC | None,
    fallback: str | None = None,
) -> CompressedContext:
    """Put a compression's result together.

    Args:
        prompt: As it was asked.
        shorter: With the kept texts.
        tokens: Of `prompt`.
        after: Of `shorter`.
        bounds: Kept characters.
        scores: (tokens,) of `prompt`; None where the draft was not asked.
        seconds: Per stage.
        method: For `drop_empty`; None keeps empty passages.
        fallback: Why nothing was compressed although it was asked for.
    """
    ids = [passage.id or "" for passage in prompt.passages]
    best = torch.zeros(len(ids)) if scores is None else passage_scores(tokens, scores, len(ids))
    sizes = tuple(
        PassageStats(before, now, score)
        for before, now, score in zip(
            _sizes(tokens, len(ids)), _sizes(after, len(ids)), best.tolist(), strict=True
        )
    )
    keep_empty = method is None or not method.drop_empty
    indices = tuple(i for i, p in enumerate(shorter.passages) if keep_empty or p.text.strip())
    return CompressedContext(
        text=shorter.documents_text,
        passages=tuple(shorter.passages[i] for i in indices),
        indices=indices,
        spans=_scored_spans(ids, bounds, tokens, scores),
        sizes=sizes,
        stats=CompressionStats(
            prompt_tokens=len(tokens),
            compressed_prompt_tokens=len(after),
            passage_tokens=int((~tokens.protected).sum()),
            compressed_passage_tokens=int((~after.protected).sum()),
            compressed=len(after) < len(tokens),
            seconds=dict(seconds),
            fallback=fallback,
        ),
    )


def unchanged(
    prompt: Prompt,
    tokens: PromptTokens,
    *,
    seconds: Mapping[str, float] | None = None,
    method: SpecPC | None = None,
    fallback: str | None = None,
) -> CompressedContext:
    """A context in which every passage is whole."""
    bounds = [[(0, len(p.text))] if p.text else [] for p in prompt.passages]
    times = seconds or {}
    return describe(prompt, prompt, tokens, tokens, bounds, None, times, method, fallback)


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
