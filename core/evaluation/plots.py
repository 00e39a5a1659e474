"""Accuracy against budget and against the depth of the needle; left out without matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .intervals import bootstrap_mean
from .records import Record
from .tasks import NATURAL

logger = logging.getLogger(__name__)
DEPTH_BINS = 5
_STYLES = (("o", "-"), ("s", "--"), ("^", ":"))  # one more for each round of the ten colours


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write `accuracy_budget_LENGTH.png` and `accuracy_depth_LENGTH_BUDGET.png`.

    Args:
        records: Of one run; natural text is not plotted.
        folder: Where the pictures go.

    Returns:
        The files; none, with a logged message, where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        logger.warning('No plots: matplotlib is not installed: pip install "draftsieve[eval]"')
        return []
    written = []
    generated = [record for record in records if record.task != NATURAL]
    for length in sorted({record.length for record in generated}):
        own = [record for record in generated if record.length == length]
        budgets = sorted({record.budget for record in own if record.budget < 1})
        if len(budgets) > 1:
            written.append(_against_budget(own, budgets, length, folder))
        needles = [record for record in own if record.depth is not None]
        for budget in budgets if needles else []:
            chosen = [record for record in needles if record.budget in (budget, 1.0)]
            written.append(_against_depth(chosen, length, budget, folder))
    return written


def by_depth(records: Sequence[Record]) -> list[tuple[float, float, float, float]]:
    """(middle of the bin, accuracy, low, high) for each bin of depth that has items."""
    bins: list[list[bool]] = [[] for _ in range(DEPTH_BINS)]
    for record in records:
        if record.depth is not None:
            bins[min(int(record.depth * DEPTH_BINS), DEPTH_BINS - 1)].append(record.correct)
    return [
        ((place + 0.5) / DEPTH_BINS, *bootstrap_mean(hits))
        for place, hits in enumerate(bins)
        if hits
    ]


def _against_budget(
    records: Sequence[Record], budgets: Sequence[float], length: int, folder: Path
) -> Path:
    figure, axes = empty_axes()
    for method in dict.fromkeys(record.method for record in records):
        own = [record for record in records if record.method == method]
        points = [
            (budget, *bootstrap_mean([r.correct for r in own if r.budget == budget]))
            for budget in sorted({record.budget for record in own})
        ]
        if points[0][0] == 1.0:  # it has no budget: a level
            axes.axhline(points[0][1], color="black", linestyle=":", label=method)
        else:
            draw(axes, points, method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(budgets), [f"{budget:g}" for budget in budgets])
    axes.set_xlabel("share of the passages' tokens kept")
    axes.set_title(f"{length} tokens")
    return save(figure, axes, folder / f"accuracy_budget_{length}.png")


def _against_depth(records: Sequence[Record], length: int, budget: float, folder: Path) -> Path:
    figure, axes = empty_axes()
    for method in dict.fromkeys(record.method for record in records):
        draw(axes, by_depth([r for r in records if r.method == method]), method)
    axes.set_xlim(0, 1)
    axes.set_xlabel("depth of the evidence (0: start of the passages)")
    axes.set_title(f"{length} tokens, budget {budget:g}")
    return save(figure, axes, folder / f"accuracy_depth_{length}_{budget:g}.png")


def empty_axes(label: str = "share of right answers") -> tuple[Any, Any]:
    """A figure that needs no screen and leaves matplotlib's global state alone.

    Args:
        label: Of the vertical axis, a share.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return figure, axes


def draw(axes: Any, points: Sequence[tuple[float, float, float, float]], label: str) -> None:
    """A line through (place, mean, low, high), at least one, with error bars."""
    places, means, low, high = zip(*points, strict=True)
    below = [max(0.0, mean - end) for mean, end in zip(means, low, strict=True)]
    above = [max(0.0, end - mean) for mean, end in zip(means, high, strict=True)]
    marker, line = _STYLES[len(axes.containers) // 10 % len(_STYLES)]
    style = {"marker": marker, "linestyle": line, "capsize": 2}
    axes.errorbar(places, means, yerr=(below, above), label=label, **style)


def save(figure: Any, axes: Any, path: Path) -> Path:
    """Write the picture with its legend; returns its path."""
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    return path
