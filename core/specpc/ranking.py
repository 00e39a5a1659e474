"""The order in which SpecPC takes what it keeps (paper Algorithm 2): of tokens, and of units.

rank the tokens of a prompt by pooled score, each with its neighbours; or the words, sentences or
passages that they make up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ..config import Pool, SpecPC
from ..prompt.encoder import PromptTokens
from ..types import TensorValue
from .bm25 import bm25
from .mixing import mixed
from .units import unit_spans

Nearness = Callable[[str, Sequence[str]], torch.Tensor]  # question, texts -> (texts,) cosines


@dataclass(frozen=True, slots=True, eq=False)
class RankedUnits(TensorValue):
    """Units of passage text, the most wanted first; arrays of equal length."""

    passage: np.ndarray  # index of the passage
    start: np.ndarray  # characters of the passage's text
    end: np.ndarray
    cost: np.ndarray  # tokens
    complete: bool = True  # False where an adaptive budget has left units out


def rank_units(
    texts: Sequence[str],
    tokens: PromptTokens,
    scores: torch.Tensor,
    options: SpecPC,
    question: str = "",
    near: Nearness | None = None,
    likelihood: torch.Tensor | None = None,
) -> RankedUnits:
    """Order the passages' units by the moment at which they are taken.

    Tokens and words follow the paper's order (pooled score, then neighbours); sentences and
    passages are ordered by their best token or by the mean of their tokens, mixed with BM25 and
    with an embedder's opinion where the options say so. Protected tokens lend nothing to their
    neighbours. Passages with an empty text take no part.

    Args:
        texts: The passages' texts.
        tokens: The prompt.
        scores: (tokens,) from the draft.
        options: Pooling, neighbours, unit, its score, floor and adaptive budget.
        question: What BM25 looks for.
        near: An embedder's opinion; None where there is none.
        likelihood: (passages,) log-probability of the question behind each; None if not read.
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
        worth = _with_opinions(worth, texts, table, options, question, near, likelihood)
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


def _with_opinions(
    worth: np.ndarray,
    texts: Sequence[str],
    table: np.ndarray,
    options: SpecPC,
    question: str,
    near: Nearness | None,
    likelihood: torch.Tensor | None,
) -> np.ndarray:
    """(units,) what the draft found mixed with what others say; see `mixed`."""
    units = [texts[index][start:end] for index, start, end in table]
    words = np.array(bm25(question, units)) if options.lexical_weight else None
    found = None
    if near is not None and options.semantic_weight:
        places = np.nonzero(worth >= 0)[0]
        found = np.zeros(len(worth))
        found[places] = near(question, [units[place] for place in places])
    likely = None
    if likelihood is not None and options.likelihood_weight and len(table):
        asked = _asked(worth, table[:, 0], options.likelihood_passages)
        inside, given = np.isin(table[:, 0], asked), likelihood.numpy()[table[:, 0]]
        likely = np.where(inside, given, given[inside].min(initial=np.inf))
    return mixed(worth, options, words, found, table[:, 0], likely)


def passages_to_ask(
    texts: Sequence[str], tokens: PromptTokens, scores: torch.Tensor, options: SpecPC
) -> list[int]:
    """Passages behind which the question's likelihood is wanted, see `likelihood_passages`.

    Args:
        texts: The passages' texts.
        tokens: The prompt.
        scores: (tokens,) from the draft.
        options: Unit, its score, and how many passages.
    """
    competing = _competing(texts, tokens)
    table, unit_of = _units(texts, tokens, competing.numpy(), options)
    worth = _unit_scores(unit_of, scores * competing, len(table), options)
    return sorted(_asked(worth, table[:, 0], options.likelihood_passages).tolist())


def _asked(worth: np.ndarray, passage: np.ndarray, most: int | None) -> np.ndarray:
    """The passages with the best units, at most so many; units without tokens do not count."""
    order = np.argsort(-worth, kind="stable")
    ranked = passage[order[worth[order] >= 0]]
    _, first = np.unique(ranked, return_index=True)
    best: np.ndarray = ranked[np.sort(first)][:most]
    return best


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
        bounds = unit_spans(text, options.unit, options.language)
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


def rank(
    pooled: torch.Tensor,
    scores: torch.Tensor,
    limit: int,
    neighbors: int,
    candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Order tokens by the moment at which SpecPC takes them.

    The `limit` best tokens by pooled score (ties: higher unpooled score, then lower index) each
    bring their neighbours, nearest first and left before right; a token counts once.

    Args:
        pooled: (tokens,) pooled scores.
        scores: (tokens,) scores before pooling.
        limit: How many tokens the caller may take at most.
        neighbors: Tokens a selected one brings, itself included, at least 1.
        candidates: (tokens,) bool, the tokens that compete; None means all.

    Returns:
        (ranked,) int64 distinct indices, best first.
    """
    count = pooled.numel()
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(pooled[by_score], descending=True, stable=True)]
    if candidates is not None:
        order = order[candidates[order]]
    offsets = neighbor_offsets(neighbors).to(pooled.device)
    spread = order[:limit, None] + offsets  # (limit, neighbors)
    ranked = distinct(spread.clamp(0, max(count - 1, 0)).reshape(-1), count)
    return ranked if candidates is None else ranked[candidates[ranked]]


def neighbor_offsets(neighbors: int) -> torch.Tensor:
    """Offsets -((n-1)//2) .. n//2 by distance, left before right at equal distance."""
    offsets = torch.arange(-((neighbors - 1) // 2), neighbors // 2 + 1)
    return offsets[torch.argsort(offsets.abs(), stable=True)]


def distinct(indices: torch.Tensor, count: int) -> torch.Tensor:
    """Drop repeats of indices in 0..count-1, keeping first appearances in order."""
    places = torch.arange(indices.numel(), device=indices.device)
    first = torch.full((count,), indices.numel(), device=indices.device)
    first = first.scatter_reduce(0, indices, places, "amin")
    found = torch.nonzero(first < indices.numel()).squeeze(1)
    return found[torch.argsort(first[found])]


def floor_first(groups: torch.Tensor, floor: int) -> torch.Tensor:
    """Move the first `floor` members of every group to the front; both parts keep their order.

    Args:
        groups: (units,) int64 group of each unit, the most wanted unit first.
        floor: Units that each group is sure of.

    Returns:
        (units,) int64 new order, as places in `groups`.
    """
    order = torch.argsort(groups, stable=True)
    _, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)  # where each one's group begins
    place = torch.empty_like(order)  # (units,) members of the own group in front of it
    place[order] = torch.arange(len(order)) - first
    return torch.argsort((place >= floor).long(), stable=True)


def enough(masses: torch.Tensor, share: float) -> int:
    """How many units, taken in order, hold at least a share of the whole mass.

    Args:
        masses: (units,) not negative, the most wanted unit first.
        share: In (0, 1].
    """
    total = masses.double().cumsum(0)
    if not len(total) or float(total[-1]) <= 0.0:
        return len(total)
    reached = torch.nonzero(total >= share * total[-1]).squeeze(1)
    return int(reached[0]) + 1


def pool(scores: torch.Tensor, kernel_size: int, how: Pool | None) -> torch.Tensor:
    """Pool scores over positions i - (k - 1) // 2 .. i + k // 2, zeros outside.

    Args:
        scores: (..., tokens) float32.
        kernel_size: Width k.
        how: "max", "mean" (borders divide by k too) or None.

    Returns:
        (..., tokens), same shape.
    """
    if how is None or kernel_size == 1:
        return scores
    left = (kernel_size - 1) // 2
    padded = functional.pad(scores, (left, kernel_size - 1 - left)).unsqueeze(-2)
    flat = padded.reshape(-1, 1, padded.shape[-1])
    pooled = (
        functional.max_pool1d(flat, kernel_size, stride=1)
        if how == "max"
        else functional.avg_pool1d(flat, kernel_size, stride=1)
    )
    return pooled.reshape(scores.shape)
