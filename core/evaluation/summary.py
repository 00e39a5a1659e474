"""Records as a markdown report: accuracy with intervals, paired differences, costs, survival."""

from __future__ import annotations

from collections.abc import Sequence

from .real_summary import real_sections, real_table
from .records import Record
from .tables import (
    budget_name,
    cells,
    described,
    difference,
    filled,
    interval,
    mean_of,
    reference_at,
    share,
    table,
)
from .tasks import NATURAL, is_real


def markdown(records: Sequence[Record], *, reference: str, title: str) -> str:
    """The whole report.

    Args:
        records: Of one run.
        reference: The method that the others are compared with, item by item.
        title: What was measured.
    """
    parts = [f"# {title}"]
    lengths = sorted({record.length for record in records})
    if len(lengths) > 1:
        parts += ["## All lengths", overview(records, reference)]
    for length in lengths:
        own = [record for record in records if record.length == length]
        generated = [record for record in own if _generated(record)]
        natural = [record for record in own if record.task == NATURAL]
        real = [record for record in own if is_real(record.task)]
        if generated:
            parts += [f"## {length} tokens", described(generated)]
            parts += [accuracy_table(generated, reference), "Share of right answers by task:"]
            parts.append(task_table(generated))
            if any(record.draft_correct is not None for record in generated):
                parts.append("Apart by the draft's own answer to the whole prompt:")
                parts.append(draft_table(generated, reference))
            if any(record.log_likelihood is not None for record in generated):
                parts.append(real_table(generated, reference))
        if real:
            parts += real_sections(real, reference)
        if natural:
            parts += [f"## Natural text, {length} tokens", described(natural)]
            parts.append(natural_table(natural, reference))
        if refused := sum(record.error is not None for record in own):
            parts.append(f"{refused} runs were refused by their method and count as wrong.")
    return "\n\n".join(parts) + "\n"


def overview(records: Sequence[Record], reference: str) -> str:
    """All lengths side by side: exact match, the paired difference, and what natural text keeps."""
    lengths = sorted({record.length for record in records})
    head = ["method", "budget"]
    for length in lengths:
        head += [f"{length}", f"{length}, minus {reference}", f"{length}, answer kept in text"]
    rows = []
    for (method, budget), own in cells(records):
        row = [method, budget_name(budget)]
        for length in lengths:
            here = [r for r in own if r.length == length]
            mine = [r for r in here if _generated(r)]
            base = [r for r in reference_at(records, reference, budget) if r.length == length]
            row.append(interval([r.correct for r in mine]))
            row.append("" if method == reference else difference(mine, base, lambda r: r.correct))
            kept = [r.survived for r in here if not _generated(r)]
            row.append(interval([found for found in kept if found is not None]))
        rows.append(row)
    return filled(head, rows)


def accuracy_table(records: Sequence[Record], reference: str) -> str:
    """Exact match with intervals, and what it cost; one row a method and budget."""
    head = (
        "method",
        "budget",
        "tokens read",
        "cache entries",
        "accuracy",
        f"minus {reference}",
        "answers found",
        "evidence kept",
        "draft s",
        "target s",
    )
    rows = []
    for (method, budget), own in cells(records):
        base = reference_at(records, reference, budget)
        rows.append(
            (
                method,
                budget_name(budget),
                mean_of(own, lambda r: r.prompt_tokens),
                mean_of(own, lambda r: r.cache_tokens),
                interval([r.correct for r in own]),
                "" if method == reference else difference(own, base, lambda r: r.correct),
                share([r.recall for r in own]),
                share([r.survived for r in own if r.survived is not None]),
                mean_of(own, lambda r: r.draft_seconds, 2),
                mean_of(own, lambda r: r.target_seconds, 2),
            )
        )
    return table(head, rows)


def draft_table(records: Sequence[Record], reference: str) -> str:
    """Exact match where the draft answers right by itself, and where it does not."""
    sides = {
        right: [record for record in records if record.draft_correct is right]
        for right in (True, False)
    }
    head = ["method", "budget"]
    for right, found in sides.items():
        count = len({record.item for record in found})
        head += [f"draft {'right' if right else 'wrong'} ({count})", f"minus {reference}"]
    rows = []
    for (method, budget), own in cells(records):
        row = [method, budget_name(budget)]
        for right, found in sides.items():
            mine = [record for record in own if record.draft_correct is right]
            base = reference_at(found, reference, budget)
            same = method == reference
            row.append(interval([r.correct for r in mine]))
            row.append("" if same else difference(mine, base, lambda r: r.correct))
        rows.append(row)
    return table(head, rows)


def task_table(records: Sequence[Record]) -> str:
    """Exact match by task; one column a task."""
    tasks = list(dict.fromkeys(record.task for record in records))
    counts = {task: len({r.item for r in records if r.task == task}) for task in tasks}
    head = ("method", "budget", *(f"{task} ({counts[task]})" for task in tasks))
    rows = [
        (
            method,
            budget_name(budget),
            *(share([r.correct for r in own if r.task == task]) for task in tasks),
        )
        for (method, budget), own in cells(records)
    ]
    return table(head, rows)


def natural_table(records: Sequence[Record], reference: str) -> str:
    """Survival of answers, and exact match and F1 by SQuAD's measures."""
    head = (
        "method",
        "budget",
        "tokens read",
        "answer kept",
        "sentence kept",
        "exact match",
        "F1",
        f"F1 minus {reference}",
        "draft s",
        "target s",
    )
    rows = []
    for (method, budget), own in cells(records):
        base = reference_at(records, reference, budget)
        alive = [r for r in own if r.survived is not None]
        rows.append(
            (
                method,
                budget_name(budget),
                mean_of(own, lambda r: r.prompt_tokens),
                interval([bool(r.survived) for r in alive]),
                interval([bool(r.sentences_survived) for r in alive]),
                interval([r.correct for r in own]),
                interval([r.f1 for r in own]),
                "" if method == reference else difference(own, base, lambda r: r.f1),
                mean_of(own, lambda r: r.draft_seconds, 2),
                mean_of(own, lambda r: r.target_seconds, 2),
            )
        )
    return table(head, rows)


def _generated(record: Record) -> bool:
    return record.task != NATURAL and not is_real(record.task)
