"""Cells of the report: means with intervals, paired differences, markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from .intervals import bootstrap_mean, paired_difference
from .records import Record

Cell = tuple[str, float]  # method, budget
Row = Sequence[str]


def table(head: Row, rows: Iterable[Row]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def filled(head: Row, rows: Sequence[Row]) -> str:
    """A markdown table without the columns that are empty."""
    shown = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return table([head[p] for p in shown], [[row[p] for p in shown] for row in rows])


def interval(values: Sequence[float]) -> str:
    """Mean in percent with its 95 % bootstrap interval; empty where there is nothing."""
    if not values:
        return ""
    mean, low, high = (100 * value for value in bootstrap_mean(values))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def nats(values: Sequence[float]) -> str:
    """Mean with its 95 % bootstrap interval; empty where there is nothing."""
    if not values:
        return ""
    mean, low, high = bootstrap_mean(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


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


def points_difference(
    own: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float | None]
) -> str:
    """Mean difference in points over the items for which both have a value, with its interval."""
    pairs = paired(own, base, value)
    if not pairs:
        return ""
    mean, low, high = (100 * part for part in paired_difference(*zip(*pairs, strict=True)))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def likelihood_difference(own: Sequence[Record], base: Sequence[Record]) -> str:
    """Mean difference of the reference answer's log-likelihood, as `nats_difference` shows it."""
    return nats_difference(own, base, lambda record: record.log_likelihood)


def nats_difference(
    own: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float | None]
) -> str:
    """Mean difference in nats a token over the items that both have, with its 95 % interval."""
    pairs = paired(own, base, value)
    if not pairs:
        return ""
    mean, low, high = paired_difference(*zip(*pairs, strict=True))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def paired(
    own: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float | None]
) -> list[tuple[float, float]]:
    """Both methods' values of the items that both have."""
    others = {record.item: value(record) for record in base}
    found = ((value(record), others.get(record.item)) for record in own)
    return [(mine, other) for mine, other in found if mine is not None and other is not None]


def described(records: Sequence[Record]) -> str:
    """Number and size of the items, and how often the draft alone is right."""
    items = {record.item: record for record in records}.values()
    known = [record.draft_correct for record in items if record.draft_correct is not None]
    own = f"; the draft alone answers {share(known)} % right" if known else ""
    sizes = fmean(record.full_tokens for record in items)
    return (
        f"{len(items)} items of {sizes:.0f} tokens on average{own}. "
        "Percentages with 95 % bootstrap intervals; differences are paired, item by item."
    )


def cells(records: Sequence[Record]) -> list[tuple[Cell, list[Record]]]:
    """Records by method and budget, in order of appearance, large budgets first."""
    found: dict[Cell, list[Record]] = {}
    for record in records:
        found.setdefault((record.method, record.budget), []).append(record)
    return sorted(found.items(), key=lambda cell: -cell[0][1])


def reference_at(records: Sequence[Record], name: str, budget: float) -> list[Record]:
    """The reference at the same budget, or its only one."""
    own = [record for record in records if record.method == name]
    return [record for record in own if record.budget in (budget, 1.0)]


def budget_name(budget: float) -> str:
    """How a budget is shown."""
    return "all" if budget == 1.0 else f"{budget:g}"


def mean_of(records: Sequence[Record], value: Callable[[Record], float], digits: int = 0) -> str:
    """Mean over the runs that were not refused; empty where there is none."""
    fine = [value(record) for record in records if record.error is None]
    return f"{fmean(fine):.{digits}f}" if fine else ""


def share(values: Sequence[float]) -> str:
    """Mean in percent; empty where there is nothing."""
    return f"{100 * fmean(values):.1f}" if values else ""
