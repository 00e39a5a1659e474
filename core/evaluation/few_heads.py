"""Chooses the few heads of a draft that look at the evidence of a question.

A handful of heads says as much as all of them, and nothing above the last one need be computed
(`SpecPC.head_weights`). Heads are taken greedily: at each step the one with which most questions
keep a sentence that answers them, at a share of the passages' tokens, ranked as SpecPC ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from ..specpc.mixing import mixed
from ..specpc.units import sentence_spans
from .tasks import EvalItem

SHARES = (0.25, 0.125, 0.0625)
RANKING = SpecPC.preset("2026-12", semantic_weight=0.0)  # how sentences are ranked


@dataclass(frozen=True, slots=True, eq=False)
class HeadTable:
    """What every head sees of one item's sentences."""

    heads: np.ndarray  # (layers, heads, sentences) float32, mean attention a token
    passage: np.ndarray  # (sentences,) index of each one's passage
    cost: np.ndarray  # (sentences,) tokens
    evidence: np.ndarray  # numbers of the sentences that the answer needs
    every: bool  # all of them are needed, not one

    def kept(self, scores: np.ndarray, shares: Sequence[float]) -> float:
        """Share of the budgets at which the evidence stays, by (sentences,) scores of at least 0.

        Sentences are ranked by `RANKING`, and taken in order while they fit.
        """
        worth = np.where(self.cost > 0, scores, -1.0)
        order = np.argsort(-mixed(worth, RANKING, None, None, self.passage), kind="stable")
        cost, total = self.cost[order], int(self.cost.sum())
        wins = 0
        for share in shares:
            taken = order[affordable(cost, max(1, round(total * share)))]
            held = np.isin(self.evidence, taken)
            wins += bool(len(held)) and bool(held.all() if self.every else held.any())
        return wins / len(shares)


def read_table(compressor: Compressor, item: EvalItem, apart: bool = True) -> HeadTable:
    """Read one item.

    Args:
        compressor: The draft.
        item: With evidence.
        apart: Read the passages apart, see `SpecPC.passages_apart`.
    """
    tokens = compressor.encoder.encode(item.prompt())
    rows = asking_rows(tokens, RANKING.window_size)
    weights = row_weights(torch.tensor([rows]), rows, RANKING.weighted_query)[0]
    found = read_heads(compressor.model, tokens if apart else tokens.ids, weights, "mean")
    bounds = [
        (index, *span) for index, text in enumerate(item.passages) for span in sentence_spans(text)
    ]
    sentence = _sentences(bounds, tokens)
    inside = sentence >= 0
    cost = torch.bincount(sentence[inside], minlength=len(bounds))
    sums = torch.zeros(*found.shape[:2], len(bounds))
    sums.index_add_(2, sentence[inside], found[..., inside])
    evidence = [
        number
        for part in item.evidence
        for number, (index, start, end) in enumerate(bounds)
        if index == part.value.passage and start < part.value.end and end > part.value.start
    ]
    return HeadTable(
        (sums / cost.clamp(min=1)).numpy(),
        np.array([index for index, _, _ in bounds]),
        cost.numpy(),
        np.unique(np.array(evidence, dtype=np.int64)),
        item.need == "all",
    )


def read_tables(
    compressor: Compressor,
    items: Iterable[EvalItem],
    apart: bool = True,
    folder: Path | None = None,
    progress: bool = True,
) -> list[HeadTable]:
    """Read items that have evidence; those whose prompt the draft cannot read are left out.

    Args:
        compressor: The draft.
        items: Questions over passages.
        apart: As for `read_table`.
        folder: Keeps what was read, one file an item, so that an interrupted run goes on.
        progress: Show a bar.
    """
    window = compressor.draft.context_window
    useful = [item for item in items if item.evidence]
    found = []
    for item in tqdm(useful, "Draft reads", disable=not progress):
        file = folder and folder / f"{item.id.replace('/', '_')}.npz"
        if file is not None and file.is_file():
            found.append(_load(file))
            continue
        if window is not None and len(compressor.encoder.encode(item.prompt())) > window:
            continue
        found.append(read_table(compressor, item, apart))
        if file is not None:
            _save(found[-1], file)
    return found


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
        (layers, heads) float32 weights, 0 for heads that were not taken, else the inverse of the
        head's spread over sentences; and the share of items and budgets that keep their evidence
        after each step.
    """
    spread = np.mean([table.heads.std(-1) for table in tables], axis=0)  # (layers, heads)
    scale = 1.0 / np.maximum(spread, 1e-12)
    weights = torch.zeros(spread.shape)
    sums = [np.zeros(table.heads.shape[-1]) for table in tables]
    curve: list[float] = []
    for _ in tqdm(range(most), "Heads", disable=not progress):
        wins = np.full(spread.shape, -1.0)
        for place in np.argwhere(weights.numpy() == 0):
            layer, head = place
            wins[layer, head] = np.mean(
                [
                    table.kept(total + scale[layer, head] * table.heads[layer, head], shares)
                    for table, total in zip(tables, sums, strict=True)
                ]
            )
        layer, head = np.unravel_index(wins.argmax(), wins.shape)
        weights[layer, head] = float(scale[layer, head])
        for number, table in enumerate(tables):
            sums[number] = sums[number] + scale[layer, head] * table.heads[layer, head]
        curve.append(float(wins.max()))
    return weights, curve


def share_kept(
    tables: Sequence[HeadTable], weights: torch.Tensor, shares: Sequence[float] = SHARES
) -> list[float]:
    """Share of items that keep their evidence by weighted heads, for each budget."""
    scores = [np.tensordot(weights.numpy(), table.heads, axes=2) for table in tables]
    return [
        float(np.mean([t.kept(found, [share]) for t, found in zip(tables, scores, strict=True)]))
        for share in shares
    ]


def held_out(
    tables: Sequence[HeadTable], most: int, folds: int = 4, progress: bool = True
) -> list[float]:
    """What heads keep of items that had no part in choosing them, for each of `SHARES`.

    Args:
        tables: Of all items.
        most: Number of heads.
        folds: Parts; each is judged by heads chosen on the others.
        progress: Show bars.
    """
    found = np.zeros(len(SHARES))
    for fold in range(folds):
        taught = [table for place, table in enumerate(tables) if place % folds != fold]
        checked = tables[fold::folds]
        weights, _ = choose_heads(taught, most, progress=progress)
        found += np.array(share_kept(checked, weights)) * len(checked) / len(tables)
    return [float(share) for share in found]


def as_head_weights(compressor: Compressor, weights: torch.Tensor, **about: object) -> HeadWeights:
    """The chosen heads as head weights; scores are compared, so the bias is 0."""
    model = compressor.model
    return HeadWeights(weights, 0.0, fingerprint(model), about, norms_of(model), "mean")


def _sentences(bounds: Sequence[tuple[int, int, int]], tokens: PromptTokens) -> torch.Tensor:
    """(tokens,) int64, the sentence of each token; -1 for none."""
    sentence = torch.full((len(tokens),), -1, dtype=torch.int64)
    for number, (index, start, end) in enumerate(bounds):
        inside = (tokens.passage == index) & (tokens.start < end) & (tokens.end > start)
        sentence[inside & (sentence < 0)] = number
    return sentence


def _save(table: HeadTable, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.stem}.part.npz")
    np.savez_compressed(
        part,
        heads=table.heads,
        passage=table.passage,
        cost=table.cost,
        evidence=table.evidence,
        every=table.every,
    )
    part.replace(file)


def _load(file: Path) -> HeadTable:
    with np.load(file, allow_pickle=False) as row:
        return HeadTable(
            row["heads"], row["passage"], row["cost"], row["evidence"], bool(row["every"])
        )
