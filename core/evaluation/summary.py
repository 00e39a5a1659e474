"""Records as a markdown report: accuracy with intervals, paired differences, costs, survival."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from .intervals import bootstrap_mean, paired_difference
from .records import Record
from .tasks import NATURAL

Cell = tuple[str, float]  # method, budget
Row = Sequence[str]


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
        generated = [record for record in own if record.task != NATURAL]
        natural = [record for record in own if record.task == NATURAL]
        if generated:
            parts += [f"## {length} tokens", _described(generated)]
            parts += [accuracy_table(generated, reference), "Share of right answers by task:"]
            parts.append(task_table(generated))
            if any(record.draft_correct is not None for record in generated):
                parts.append("Apart by the draft's own answer to the whole prompt:")
                parts.append(draft_table(generated, reference))
        if natural:
            parts += [f"## Natural text, {length} tokens", _described(natural)]
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
    for (method, budget), own in _cells(records):
        row = [method, _budget(budget)]
        for length in lengths:
            here = [r for r in own if r.length == length]
            mine = [r for r in here if r.task != NATURAL]
            base = [r for r in _reference(records, reference, budget) if r.length == length]
            row.append(interval([r.correct for r in mine]))
            row.append("" if method == reference else difference(mine, base, lambda r: r.correct))
            kept = [r.survived for r in here if r.task == NATURAL]
            row.append(interval([found for found in kept if found is not None]))
        rows.append(row)
    shown = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return table([head[p] for p in shown], [[row[p] for p in shown] for row in rows])


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
    for (method, budget), own in _cells(records):
        base = _reference(records, reference, budget)
        rows.append(
            (
                method,
                _budget(budget),
                _mean(own, lambda r: r.prompt_tokens),
                _mean(own, lambda r: r.cache_tokens),
                interval([r.correct for r in own]),
                "" if method == reference else difference(own, base, lambda r: r.correct),
                _share([r.recall for r in own]),
                _share([r.survived for r in own if r.survived is not None]),
                _mean(own, lambda r: r.draft_seconds, 2),
                _mean(own, lambda r: r.target_seconds, 2),
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
    for (method, budget), own in _cells(records):
        row = [method, _budget(budget)]
        for right, found in sides.items():
            mine = [record for record in own if record.draft_correct is right]
            base = _reference(found, reference, budget)
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
            _budget(budget),
            *(_share([r.correct for r in own if r.task == task]) for task in tasks),
        )
        for (method, budget), own in _cells(records)
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
    for (method, budget), own in _cells(records):
        base = _reference(records, reference, budget)
        alive = [r for r in own if r.survived is not None]
        rows.append(
            (
                method,
                _budget(budget),
                _mean(own, lambda r: r.prompt_tokens),
                interval([bool(r.survived) for r in alive]),
                interval([bool(r.sentences_survived) for r in alive]),
                interval([r.correct for r in own]),
                interval([r.f1 for r in own]),
                "" if method == reference else difference(own, base, lambda r: r.f1),
                _mean(own, lambda r: r.draft_seconds, 2),
                _mean(own, lambda r: r.target_seconds, 2),
            )
        )
    return table(head, rows)


def table(head: Row, rows: Iterable[Row]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def interval(values: Sequence[float]) -> str:
    """Mean in percent with its 95 % bootstrap interval; empty where there is nothing."""
    if not values:
        return ""
    mean, low, high = (100 * value for value in bootstrap_mean(values))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def difference(
    own: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float]
) -> str:
    """Mean difference in points over the items that both have, with its 95 % interval."""
    others = {record.item: value(record) for record in base}
    pairs = [(value(r), others[r.item]) for r in own if r.item in others]
    if not pairs:
        return ""
    first, second = zip(*pairs, strict=True)
    mean, low, high = (100 * value for value in paired_difference(first, second))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _described(records: Sequence[Record]) -> str:
    items = {record.item: record for record in records}.values()
    known = [record.draft_correct for record in items if record.draft_correct is not None]
    own = f"; the draft alone answers {_share(known)} % right" if known else ""
    sizes = fmean(record.full_tokens for record in items)
    return (
        f"{len(items)} items of {sizes:.0f} tokens on average{own}. "
        "Percentages with 95 % bootstrap intervals; differences are paired, item by item."
    )


def _cells(records: Sequence[Record]) -> list[tuple[Cell, list[Record]]]:
    """Records by method and budget, in order of appearance, large budgets first."""
    found: dict[Cell, list[Record]] = {}
    for record in records:
        found.setdefault((record.method, record.budget), []).append(record)
    return sorted(found.items(), key=lambda cell: -cell[0][1])


def _reference(records: Sequence[Record], name: str, budget: float) -> list[Record]:
    """The reference at the same budget, or its only one."""
    own = [record for record in records if record.method == name]
    return [record for record in own if record.budget in (budget, 1.0)]


def _budget(budget: float) -> str:
    return "all" if budget == 1.0 else f"{budget:g}"


def _mean(records: Sequence[Record], value: Callable[[Record], float], digits: int = 0) -> str:
    fine = [value(record) for record in records if record.error is None]
    return f"{fmean(fine):.{digits}f}" if fine else ""


def _share(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f}" if values else ""
