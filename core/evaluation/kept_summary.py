"""The report of a run without a target: what each method keeps of what answers."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Record
from .tables import (
    budget_name,
    cells,
    described,
    difference,
    interval,
    mean_of,
    reference_at,
    table,
)


def kept_markdown(records: Sequence[Record], *, reference: str, title: str) -> str:
    """The whole report: a section for each task and length, and one over all tasks of a length.

    Args:
        records: Of one run.
        reference: The method that the others are compared with, item by item.
        title: What was measured.
    """
    parts = [f"# {title}"]
    for length in sorted({record.length for record in records}):
        here = [record for record in records if record.length == length]
        tasks = list(dict.fromkeys(record.task for record in here))
        if len(tasks) > 1:
            parts += [f"## All of {length} tokens", described(here), kept_table(here, reference)]
        for task in tasks:
            own = [record for record in here if record.task == task]
            parts += [f"## {task}, {length} tokens", described(own), kept_table(own, reference)]
            parts += _by_kind(own, reference)
    if refused := sum(record.error is not None for record in records):
        parts.append(f"{refused} runs were refused by their method and count as nothing kept.")
    return "\n\n".join(parts) + "\n"


def kept_table(records: Sequence[Record], reference: str) -> str:
    """Share of items whose answer is kept, with intervals and differences at equal budget."""
    head = (
        "method",
        "budget",
        "tokens left",
        "answer kept",
        f"minus {reference}",
        "sentence kept",
        "draft s",
    )
    rows = []
    for (method, budget), own in cells(records):
        base = reference_at(records, reference, budget)
        alive, known = ([r for r in side if _asked(r)] for side in (own, base))
        rows.append(
            (
                method,
                budget_name(budget),
                mean_of(own, lambda r: r.prompt_tokens),
                interval([bool(r.survived) for r in alive]),
                "" if method == reference else difference(alive, known, lambda r: bool(r.survived)),
                interval([bool(r.sentences_survived) for r in alive]),
                mean_of(own, lambda r: r.draft_seconds, 2),
            )
        )
    return table(head, rows)


def _by_kind(records: Sequence[Record], reference: str) -> list[str]:
    kinds = list(dict.fromkeys(record.kind for record in records))
    parts: list[str] = []
    for kind in kinds if len(kinds) > 1 else ():
        own = [record for record in records if record.kind == kind]
        items = len({record.item for record in own})
        parts += [f"Of kind {kind or 'other'!r}, {items} items:", kept_table(own, reference)]
    return parts


def _asked(record: Record) -> bool:
    """Whether something had to be kept; a refused run kept nothing."""
    return record.survived is not None
