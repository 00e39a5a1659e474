"""From scores to kept text: rank the units of a prompt's passages, then take what the budget holds.

The result is always measured by encoding the shortened prompt again, gap markers included, so a
budget means what it says whatever the tokenizer merges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config import SpecPC
from ..types import PromptTokens, Span
from .bm25 import bm25
from .scoring import pool
from .selection import enough, floor_first, rank
from .units import unit_spans

_ROUNDS = 12  # of the search for the most tokens that fit


@dataclass(frozen=True, slots=True)
class RankedUnits:
    """Units of passage text, the most wanted first; arrays of equal length."""

    passage: np.ndarray  # index of the passage
    start: np.ndarray  # characters of the passage's text
    end: np.ndarray
    cost: np.ndarray  # tokens
    complete: bool = True  # False where an adaptive budget has left units out


@dataclass(frozen=True, slots=True)
class KeptText:
    """What is left of every passage."""

    texts: tuple[str, ...]
    bounds: tuple[tuple[tuple[int, int], ...], ...]  # per passage, kept characters
    size: int  # in tokens, as the budget counts


def rank_units(
    texts: Sequence[str],
    tokens: PromptTokens,
    scores: torch.Tensor,
    options: SpecPC,
    question: str = "",
) -> RankedUnits:
    """Order the passages' units by the moment at which they are taken.

    Tokens and words follow the paper's order (pooled score, then neighbours); sentences and
    passages are ordered by their best token or by the mean of their tokens, mixed with BM25 where
    the options say so. Protected tokens lend nothing to their neighbours. Passages with an empty
    text take no part.

    Args:
        texts: The passages' texts.
        tokens: The prompt.
        scores: (tokens,) from the draft.
        options: Pooling, neighbours, unit, its score, floor and adaptive budget.
        question: What BM25 looks for.
    """
    competing = _competing(texts, tokens)
    scores = scores * competing
    table, unit_of = _units(texts, tokens, competing.numpy(), options)
    if options.unit in ("token", "word"):
        pooled = pool(scores, options.kernel_size, options.pool)
        limit = int(competing.sum())
        order = rank(pooled, scores, limit, options.neighbors, competing).numpy()
        units = unit_of[order]
        units = units[units >= 0]
        _, first = np.unique(units, return_index=True)
        ordered = units[np.sort(first)]
    else:
        worth = _unit_scores(unit_of, scores, len(table), options)
        if options.lexical_weight:
            words = bm25(question, [texts[index][start:end] for index, start, end in table])
            worth = _mixed(worth, np.array(words), options.lexical_weight)
        ordered = np.argsort(-worth, kind="stable")
    if options.passage_floor:
        groups = torch.from_numpy(table[ordered, 0])
        ordered = ordered[floor_first(groups, options.passage_floor).numpy()]
    count = len(ordered)
    if options.score_mass is not None:
        masses = torch.from_numpy(_sums(unit_of, scores, len(table))[ordered])
        ordered = ordered[: enough(masses, options.score_mass)]
    cost = np.bincount(unit_of[unit_of >= 0], minlength=len(table))[ordered]
    passage, start, end = table[ordered].T
    return RankedUnits(passage, start, end, cost, complete=len(ordered) == count)


def _unit_scores(
    unit_of: np.ndarray, scores: torch.Tensor, units: int, options: SpecPC
) -> np.ndarray:
    """(units,) what a sentence or passage is worth; -1 without tokens."""
    inside = unit_of >= 0
    worth = np.full(units, -1.0)
    if options.unit_score == "max":
        np.maximum.at(worth, unit_of[inside], scores.numpy()[inside])
        return worth
    sizes = np.bincount(unit_of[inside], minlength=units)
    means = _sums(unit_of, scores, units) / np.maximum(sizes, 1)
    return np.where(sizes > 0, means, worth)


def _mixed(worth: np.ndarray, words: np.ndarray, share: float) -> np.ndarray:
    """(units,) both as shares of their best, the words with `share`; -1 without tokens stays."""
    best, most = worth.max(initial=0.0), words.max(initial=0.0)
    mixed = (1 - share) * worth / (best or 1.0) + share * words / (most or 1.0)
    return np.where(worth < 0, worth, mixed)


def _sums(unit_of: np.ndarray, scores: torch.Tensor, units: int) -> np.ndarray:
    """(units,) float64 sum of the scores of each unit's tokens."""
    inside = unit_of >= 0
    return np.bincount(unit_of[inside], weights=scores.numpy()[inside], minlength=units)


def _competing(texts: Sequence[str], tokens: PromptTokens) -> torch.Tensor:
    """(tokens,) bool: the tokens of passages that still have a text."""
    has_text = torch.tensor([*(bool(text) for text in texts), False])  # the last is no passage
    competing: torch.Tensor = has_text[tokens.passage.long()] & ~tokens.protected
    return competing


def _units(
    texts: Sequence[str], tokens: PromptTokens, competing: np.ndarray, options: SpecPC
) -> tuple[np.ndarray, np.ndarray]:
    """(units, 3) passage, start, end; and (tokens,) the unit of each token, -1 for none."""
    passage, start, end = (x.numpy() for x in (tokens.passage, tokens.start, tokens.end))
    unit_of = np.full(len(tokens), -1, dtype=np.int64)
    if options.unit == "token":
        places = np.nonzero(competing)[0]
        unit_of[places] = np.arange(len(places))
        table = np.stack([passage[places], start[places], end[places]], axis=1)
        return table.astype(np.int64), unit_of
    rows: list[tuple[int, int, int]] = []
    for index, text in enumerate(texts):
        bounds = unit_spans(text, options.unit)
        places = np.nonzero(competing & (passage == index))[0]
        if not bounds or not len(places):
            continue
        ends = np.array([stop for _, stop in bounds])
        starts = np.array([begin for begin, _ in bounds])
        found = np.minimum(np.searchsorted(ends, start[places], side="right"), len(bounds) - 1)
        inside = (starts[found] < end[places]) & (ends[found] > start[places])
        unit_of[places[inside]] = len(rows) + found[inside]
        rows.extend((index, begin, stop) for begin, stop in bounds)
    return np.array(rows, dtype=np.int64).reshape(-1, 3), unit_of


def passage_scores(tokens: PromptTokens, scores: torch.Tensor, count: int) -> torch.Tensor:
    """(passages,) the best score among each one's tokens; 0 without tokens.

    Args:
        tokens: The prompt.
        scores: (tokens,) from the draft.
        count: Number of passages.
    """
    inside = tokens.passage >= 0
    best = torch.zeros(count)
    return best.scatter_reduce(0, tokens.passage[inside].long(), scores[inside], "amax")


def only_best(
    texts: Sequence[str], tokens: PromptTokens, scores: torch.Tensor, most: int | None
) -> list[str]:
    """The texts with all but the `most` best-scored passages emptied; equal ones in their order.

    Args:
        texts: The passages' texts.
        tokens: The prompt.
        scores: (tokens,) from the draft.
        most: Number of passages left; None for all.
    """
    best = passage_scores(tokens, scores, len(texts)).argsort(descending=True, stable=True)
    chosen = set(best[:most].tolist())
    return [text if index in chosen else "" for index, text in enumerate(texts)]


def fit(
    texts: Sequence[str],
    ranked: RankedUnits,
    limit: int,
    first_guess: int,
    measure: Callable[[Sequence[str]], int],
    count: Callable[[str], int],
    marker: str | None,
) -> KeptText:
    """Take as many units as possible while the shortened prompt measures at most `limit`.

    Args:
        texts: The passages' texts.
        ranked: Their units.
        limit: The budget, as `measure` counts.
        first_guess: Unit tokens to try first.
        measure: Size of the prompt with these passage texts.
        count: Tokens of one text.
        marker: Text between kept spans.
    """
    original = [count(text) for text in texts]
    if ranked.complete and (size := measure(texts)) <= limit:
        return KeptText(tuple(texts), tuple(((0, len(t)),) if t else () for t in texts), size)
    bounds = tuple(() for _ in texts)
    best = KeptText(tuple("" for _ in texts), bounds, measure(["" for _ in texts]))
    low, high, guess = 1, int(ranked.cost.sum()), first_guess
    for _ in range(_ROUNDS):
        if low > high:
            break
        guess = min(max(guess, low), high)
        tried = _keep(texts, ranked, guess, original, count, marker)
        size = measure(tried[0])
        if size <= limit:
            best, low = KeptText(*tried, size), guess + 1
        else:
            high = guess - 1
        step = limit - size
        guess = guess + step if step else low
    return best


def _keep(
    texts: Sequence[str],
    ranked: RankedUnits,
    tokens: int,
    original: Sequence[int],
    count: Callable[[str], int],
    marker: str | None,
) -> tuple[tuple[str, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """Keep the best units of `tokens` tokens in all; a passage that would grow stays whole."""
    taken = _affordable(ranked.cost, tokens)
    kept_texts, kept_bounds = [], []
    for index, text in enumerate(texts):
        mine = taken[ranked.passage[taken] == index]
        bounds = merge_spans(text, sorted(zip(ranked.start[mine], ranked.end[mine], strict=True)))
        short = join_spans(text, bounds, marker)
        if bounds and count(short) >= original[index]:
            short, bounds = text, ((0, len(text)),)
        kept_texts.append(short)
        kept_bounds.append(bounds)
    return tuple(kept_texts), tuple(kept_bounds)


def _affordable(cost: np.ndarray, tokens: int) -> np.ndarray:
    """Indices of units taken in order, skipping those that no longer fit."""
    total = np.cumsum(cost)
    whole = int(np.searchsorted(total, tokens, side="right"))
    left = tokens - (int(total[whole - 1]) if whole else 0)
    taken = list(range(whole))
    for index in range(whole, len(cost)):
        if left <= 0:
            break
        if cost[index] <= left:
            taken.append(index)
            left -= int(cost[index])
    return np.array(taken, dtype=np.int64)


def merge_spans(text: str, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join ascending spans that touch or have only whitespace between them, and trim them."""
    merged: list[tuple[int, int]] = []
    for start, end in ((int(s), int(e)) for s, e in spans):
        if merged and (start <= merged[-1][1] or text[merged[-1][1] : start].isspace()):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    trimmed = []
    for start, end in merged:
        body = text[start:end]
        lead, tail = len(body) - len(body.lstrip()), len(body) - len(body.rstrip())
        if lead < len(body):
            trimmed.append((start + lead, end - tail))
    return tuple(trimmed)


def join_spans(text: str, bounds: Sequence[tuple[int, int]], marker: str | None) -> str:
    """The kept text: `marker` (a space if None) stands where something was left out."""
    return (marker or " ").join(text[start:end] for start, end in bounds)


def scored_spans(
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
