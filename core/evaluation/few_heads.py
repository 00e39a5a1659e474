"""Chooses the few heads of a draft that look at the evidence of a question.

A handful of heads says as much as all of them, and nothing above the last one need be computed
(`SpecPC.head_weights`). Heads are taken greedily: at each step the one with which most questions
keep a sentence that answers them, at a share of the passages' tokens, by the sum of the chosen
heads' attention, each as a multiple of its own spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..compressor import Compressor
from ..config import SpecPC
from ..models.loading import fingerprint
from ..prompt.encoder import PromptTokens
from ..specpc.draft import asking_rows
from ..specpc.draft_scores import row_weights
from ..specpc.fitting import affordable
from ..specpc.head_weights import HeadWeights, norms_of, read_heads
from ..specpc.units import sentence_spans
from .tasks import EvalItem

SHARES = (0.25, 0.125, 0.0625)


@dataclass(frozen=True, slots=True, eq=False)
class HeadTable:
    """What every head sees of one item's sentences."""

    heads: torch.Tensor  # (layers, heads, tokens) float32, of passage tokens
    sentence: torch.Tensor  # (tokens,) int64, the sentence of each, -1 for none
    cost: np.ndarray  # (sentences,) tokens
    evidence: tuple[int, ...]  # sentences that the answer needs
    every: bool  # all of them are needed, not one


def read_table(compressor: Compressor, item: EvalItem, apart: bool = False) -> HeadTable:
    """Read one item.

    Args:
        compressor: The draft.
        item: With evidence.
        apart: Read the passages apart, see `SpecPC.passages_apart`.
    """
    tokens = compressor.encoder.encode(item.prompt())
    rows = asking_rows(tokens, SpecPC().window_size)
    weights = row_weights(torch.tensor([rows]), rows, SpecPC().weighted_query)[0]
    found = read_heads(compressor.model, tokens if apart else tokens.ids, weights)
    places = torch.nonzero(~tokens.protected).squeeze(1)
    sentence, bounds = _sentences(item, tokens)
    sentence = sentence[places]
    cost = np.bincount(sentence[sentence >= 0].numpy(), minlength=len(bounds))
    evidence = []
    for part in item.evidence:
        place = part.value
        evidence += [
            number
            for number, (index, start, end) in enumerate(bounds)
            if index == place.passage and start < place.end and end > place.start
        ]
    return HeadTable(
        found[..., places], sentence, cost, tuple(dict.fromkeys(evidence)), item.need == "all"
    )


def choose_heads(
    tables: Sequence[HeadTable], most: int, shares: Sequence[float] = SHARES, progress: bool = True
) -> tuple[torch.Tensor, list[float]]:
    """Take heads greedily.

    Args:
        tables: Of the items that teach.
        most: Number of heads.
        shares: Of the passages' tokens that may stay.
        progress: Show a bar.

    Returns:
        (layers, heads) float32 weights, 0 for heads that were not taken; and the share of items
        and budgets that keep their evidence after each step.
    """
    spread = torch.stack([table.heads.std(-1) for table in tables]).mean(0).clamp(min=1e-8)
    weights = torch.zeros_like(spread)
    sums = [torch.zeros(table.heads.shape[-1]) for table in tables]
    curve: list[float] = []
    for _ in tqdm(range(most), "Heads", disable=not progress):
        wins = torch.zeros_like(spread)
        for table, total in zip(tables, sums, strict=True):
            scores = total + table.heads / spread.unsqueeze(-1)  # (layers, heads, tokens)
            wins += _kept(table, scores, shares)
        wins[weights > 0] = -1.0
        layer, head = divmod(int(wins.argmax()), wins.shape[1])
        weights[layer, head] = 1.0 / spread[layer, head]
        for place, table in enumerate(tables):
            sums[place] = sums[place] + table.heads[layer, head] / spread[layer, head]
        curve.append(float(wins.max()) / len(tables))
    return weights, curve


def share_kept(
    tables: Sequence[HeadTable], weights: torch.Tensor, shares: Sequence[float] = SHARES
) -> list[float]:
    """Share of items that keep their evidence by weighted heads, for each budget."""
    found = torch.zeros(len(shares))
    for table in tables:
        scores = (table.heads * weights.unsqueeze(-1)).sum((0, 1))[None, None]
        found += torch.tensor([float(_kept(table, scores, [share])) for share in shares])
    return (found / len(tables)).tolist()


def as_head_weights(compressor: Compressor, weights: torch.Tensor, **about: object) -> HeadWeights:
    """The chosen heads as a file of head weights; scores are compared, so the bias is 0."""
    model = compressor.model
    return HeadWeights(weights, 0.0, fingerprint(model), about, norms_of(model))


def _sentences(
    item: EvalItem, tokens: PromptTokens
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """(tokens,) the sentence of each token, and (passage, start, end) of each sentence."""
    bounds = [
        (index, *span) for index, text in enumerate(item.passages) for span in sentence_spans(text)
    ]
    sentence = torch.full((len(tokens),), -1, dtype=torch.int64)
    for number, (index, start, end) in enumerate(bounds):
        inside = (tokens.passage == index) & (tokens.start < end) & (tokens.end > start)
        sentence[inside & (sentence < 0)] = number
    return sentence, bounds


def _kept(table: HeadTable, scores: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """(layers, heads) share of the budgets at which the evidence stays, by (..., tokens) scores."""
    inside = table.sentence >= 0
    count = len(table.cost)
    flat = scores[..., inside].flatten(0, 1)  # (all heads, tokens)
    best = torch.full((flat.shape[0], count), -1.0)
    best = best.scatter_reduce(
        1, table.sentence[inside].expand(flat.shape[0], -1), flat, "amax", include_self=True
    )
    order = best.argsort(dim=1, descending=True, stable=True).numpy()
    total = int(table.cost.sum())
    wins = np.zeros(len(order))
    for row, ranked in enumerate(order):
        cost = table.cost[ranked]
        for share in shares:
            taken = set(ranked[affordable(cost, max(1, round(total * share)))].tolist())
            held = [number in taken for number in table.evidence]
            wins[row] += bool(held) and (all(held) if table.every else any(held))
    return torch.from_numpy(wins / len(shares)).float().reshape(scores.shape[:-1])
