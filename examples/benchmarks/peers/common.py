"""What the peers' scripts and `run.py` agree on: lines of JSON, and budgets as the peers count.

Standard library only: it runs in every peer's environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Key = tuple[str, str, float]  # item, method, budget
REFUSALS = (ValueError, AssertionError, RuntimeError, IndexError)  # a peer gave up on one item
FILLED = 0.9  # share of a budget from which on it counts as used


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that an interruption cut off at the end is removed from it."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line, on disk when the call returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def finished(rows: Iterable[dict[str, Any]]) -> set[Key]:
    """What need not be done again."""
    return {(row["id"], row["method"], row["budget"]) for row in rows}


def removed_share(kept: int, entries: int) -> float:
    """A compression ratio r for which `int(entries * (1 - r))` is `kept`, whatever the rounding."""
    return max(0.0, 1 - (kept + 0.5) / entries) if kept < entries else 0.0


def removed_share_overall(kept: int, entries: int, heads: int) -> float:
    """As above where a peer removes `int(entries * heads * r)` over all heads of all layers."""
    removed = (entries - kept) * heads
    return (removed + 0.5) / (entries * heads) if removed > 0 else 0.0


def next_target(target: int, kept: int, budget: int) -> int:
    """What to ask for after `target` gave `kept`: in proportion, a little below the budget."""
    return max(1, round(target * (1 + FILLED) / 2 * budget / max(1, kept)))


def closest(sizes: Sequence[int], budget: int) -> int:
    """Place of the largest size within the budget, or of the smallest where none is."""
    fitting = [place for place, size in enumerate(sizes) if size <= budget]
    if fitting:
        return max(fitting, key=lambda place: sizes[place])
    return min(range(len(sizes)), key=lambda place: sizes[place])


def passage_spans(
    kept: Iterable[tuple[int, int]], lengths: Sequence[int], first: int, gap: int
) -> Iterator[tuple[int, int, int]]:
    """Characters of a joined text as characters of the texts that it was joined from.

    Args:
        kept: (start, end) in the joined text; what touches a separator or lies before is left out.
        lengths: Of the texts, in characters.
        first: Where the first one starts.
        gap: Characters between two.

    Yields:
        (text, start, end).
    """
    starts = [first + sum(lengths[:place]) + gap * place for place in range(len(lengths))]
    for start, end in kept:
        for place, (begin, length) in enumerate(zip(starts, lengths, strict=True)):
            if begin <= start and end <= begin + length:
                yield place, start - begin, end - begin
