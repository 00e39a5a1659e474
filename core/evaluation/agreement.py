"""How well a draft's scores predict what the target looks at, layer by layer of the target.

The central claim of draft-based inference (arXiv 2506.08373, section 3): SpecPC's scores of passage
tokens against the target's own attention, from the rows that ask and from the rows of its answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..config import SpecPC
from ..errors import ConfigError
from ..models.loading import context_window
from ..prompt.encoder import PromptTokens
from ..specpc.chunking import Piece, spread_scores
from ..specpc.draft import asking_rows
from ..specpc.draft_scores import read_draft
from ..specpc.head_weights import read_heads
from .intervals import bootstrap_mean
from .plots import draw, empty_axes, save
from .shared import Bench
from .tasks import EvalItem

logger = logging.getLogger(__name__)
ATTENTION = "attention"  # attention.json and attention.png
ROWS = ("asking", "answer")


@dataclass(frozen=True, slots=True)
class Agreement:
    """One layer of the target against the draft: means over items, each with its 95 % interval."""

    layer: int | None  # None: the maximum over all layers
    rows: str  # whose attention: "asking" or "answer"
    budget: float  # share of the passage tokens in both top sets
    correlation: tuple[float, float, float]  # Spearman's; mean, low, high
    overlap: tuple[float, float, float]  # share of the target's top tokens that the draft has too


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's rank correlation; equal values share their mean rank.

    Args:
        first: (tokens,) float32.
        second: (tokens,) float32.

    Returns:
        In -1..1; 0 where one side is constant.
    """
    left, right = (_ranks(values) for values in (first, second))
    left, right = left - left.mean(), right - right.mean()
    scale = float(left.norm() * right.norm())
    return float(left @ right) / scale if scale else 0.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """(tokens,) float64 ranks from 0."""
    _, place, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    means: torch.Tensor = sizes.cumsum(0).double() - (sizes + 1) / 2  # one a different value
    return means[place]


def top_overlap(first: torch.Tensor, second: torch.Tensor, count: int) -> float:
    """Share of the `count` largest values of one that are among the `count` largest of the other.

    Args:
        first: (tokens,) float32.
        second: (tokens,) float32.
        count: At least 1.
    """
    sets = [
        set(values.argsort(descending=True, stable=True)[:count].tolist())
        for values in (first, second)
    ]
    return len(sets[0] & sets[1]) / count


def measure_agreement(
    bench: Bench, items: Iterable[EvalItem], budgets: Sequence[float], method: SpecPC | None = None
) -> list[Agreement]:
    """Compare the draft's scores with the attention of every layer of the target.

    The target reads the prompt with its own greedy answer behind it. A layer looks at a token as
    strongly as its strongest head and row do. Prompts beyond a model's window are left out.

    Args:
        bench: The pair.
        items: Questions over passages.
        budgets: Shares of the passage tokens, for the overlap.
        method: How the draft reads; None for the paper's settings.

    Raises:
        ConfigError: No item fits the models' windows.
    """
    correlations: dict[tuple[int | None, str], list[float]] = {}
    overlaps: dict[tuple[int | None, str, float], list[float]] = {}
    for item in items:
        pair = _scores(bench, item, method or SpecPC())
        if pair is None:
            continue
        drafted, looked = pair
        for rows, layers in looked.items():
            for index, layer in [(None, layers.amax(0)), *enumerate(layers)]:
                correlations.setdefault((index, rows), []).append(spearman(drafted, layer))
                for budget in budgets:
                    count = max(1, round(len(layer) * budget))
                    found = top_overlap(drafted, layer, count)
                    overlaps.setdefault((index, rows, budget), []).append(found)
    if not overlaps:
        raise ConfigError("No item fits the windows of both models: give a smaller length.")
    return [
        Agreement(
            index,
            rows,
            budget,
            bootstrap_mean(correlations[index, rows]),
            bootstrap_mean(values),
        )
        for (index, rows, budget), values in overlaps.items()
    ]


def _scores(
    bench: Bench, item: EvalItem, method: SpecPC
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]] | None:
    """The draft's (tokens,) and the target's (layers, tokens) scores of passage tokens."""
    case = bench.open(item)
    tokens = bench.encoder.encode(case.prompt)
    windows = context_window(bench.target), context_window(bench.draft.model)
    room = bench.generation.max_new_tokens
    if any(w is not None and max(len(tokens), len(case.tokens)) + room > w for w in windows):
        return None
    passages = ~tokens.protected
    drafted = _drafted(bench, case.tokens, tokens, method, len(item.passages))
    answer = case.answer(case.prompt, None, shared=True).text
    said = torch.tensor(bench.encoder.encode_text(answer), dtype=torch.int64)
    asking = torch.ones(asking_rows(tokens, method.window_size))
    looked = {"asking": read_heads(bench.target, tokens.ids, asking).amax(1)[:, passages]}
    if len(said):
        # the last prompt token's row gives the answer's first token, the last answer token none
        heads = read_heads(
            bench.target, torch.cat([tokens.ids, said[:-1]]), torch.ones(len(said))
        )  # (layers, heads, tokens)
        looked["answer"] = heads[:, :, : len(tokens)].amax(1)[:, passages]
    return drafted[passages], looked


def _drafted(
    bench: Bench, read: PromptTokens, tokens: PromptTokens, method: SpecPC, passages: int
) -> torch.Tensor:
    """The draft's scores of the target's tokens, carried over by characters."""
    rows = asking_rows(read, method.window_size)
    found = read_draft(bench.draft.model, [read.ids], method, lookahead_tokens=1, windows=[rows])
    scores = torch.zeros(len(tokens))
    group = [Piece(index, 0, int(tokens.end.max())) for index in range(passages)]
    spread_scores(scores, tokens, group, read, found[0].scores)
    return scores


def write_agreement(found: Sequence[Agreement], folder: Path) -> list[Path]:
    """Write attention.json and, where matplotlib is installed, attention.png."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ATTENTION}.json"
    rows = [asdict(agreement) for agreement in found]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        logger.warning('No plot: matplotlib is not installed: pip install "draftsieve[eval]"')
        return [path]
    return [path, _plot(found, folder / f"{ATTENTION}.png")]


def _plot(found: Sequence[Agreement], path: Path) -> Path:
    figure, axes = empty_axes("correlation, and share of the top tokens in common")
    for rows in ROWS:
        own = [agreement for agreement in found if agreement.rows == rows]
        once = {a.layer: a.correlation for a in own if a.layer is not None}
        points = [(float(layer), *correlation) for layer, correlation in once.items()]
        _line(axes, points, f"{rows}: rank correlation")
        for budget in sorted({agreement.budget for agreement in own}, reverse=True):
            chosen = [a for a in own if a.budget == budget and a.layer is not None]
            points = [(float(a.layer or 0), *a.overlap) for a in chosen]
            _line(axes, points, f"{rows}: top {100 * budget:g} %")
    axes.set_ylim(min(0.0, *(a.correlation[1] for a in found)) - 0.05, 1.02)
    axes.set_xlabel("layer of the target")
    return save(figure, axes, path)


def _line(axes: Any, points: Sequence[tuple[float, float, float, float]], label: str) -> None:
    if points:
        draw(axes, points, label)


def table(found: Sequence[Agreement]) -> str:
    """A markdown table, one row a layer, kind of rows and budget."""
    lines = ["| layer | rows | budget | rank correlation | top overlap |", "|---|---|---|---|---|"]
    lines += [
        f"| {'all' if a.layer is None else a.layer} | {a.rows} | {a.budget:g} | "
        f"{_interval(a.correlation)} | {_interval(a.overlap)} |"
        for a in found
    ]
    return "\n".join(lines) + "\n"


def _interval(values: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)
