"""The report of a run without a target: what each method keeps of what answers."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Record
from .tables import (
    budget_name,
    cells,
    described,
    filled,
    interval,
    mean_of,
    points_difference,
    reference_at,
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
    """What is kept of the answers, with intervals and differences at equal budget.

    "answer kept" is the share of items whose marked answer is kept; "answer's words kept" that of
    `answer_words.py`, for references in free text.
    """
    less = f"minus {reference}"
    head = ["method", "budget", "tokens left", "answer kept", less, "sentence kept"]
    head += ["answer's words kept", less, "draft s"]
    rows = []
    for (method, budget), own in cells(records):
        base = [] if method == reference else reference_at(records, reference, budget)
        rows.append(
            (
                method,
                budget_name(budget),
                mean_of(own, lambda r: r.prompt_tokens),
                interval([r.survived for r in own if r.survived is not None]),
                points_difference(own, base, lambda r: r.survived),
                interval([r.sentences_survived for r in own if r.sentences_survived is not None]),
                interval([r.words_kept for r in own if r.words_kept is not None]),
                points_difference(own, base, lambda r: r.words_kept),
                mean_of(own, lambda r: r.draft_seconds, 2),
            )
        )
    return filled(head, rows)


def _by_kind(records: Sequence[Record], reference: str) -> list[str]:
    kinds = list(dict.fromkeys(record.kind for record in records))
    parts: list[str] = []
    for kind in kinds if len(kinds) > 1 else ():
        own = [record for record in records if record.kind == kind]
        if all(record.survived is None and record.words_kept is None for record in own):
            continue  # nothing had to be kept
        items = len({record.item for record in own})
        parts += [f"Of kind {kind or 'other'!r}, {items} items:", kept_table(own, reference)]
    return parts
