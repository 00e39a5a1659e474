"""The report's part on methods on the cache: how far the target strays from its full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .intervals import ratio_of_means
from .records import Record
from .tables import (
    budget_name,
    cells,
    likelihood_difference,
    mean_of,
    nats,
    nats_difference,
    paired,
    reference_at,
    table,
)

_Value = Callable[[Record], float | None]


def cache_table(records: Sequence[Record], reference: str) -> str:
    """Divergences from the full cache, in nats a token; one row a method and budget.

    First over the target's own greedy answer to the whole prompt, what it would have said; then
    over the reference answer. Each is shown as a difference to the reference method and as a share
    of its mean, where that keeps less than everything. Empty where nothing is known.

    Args:
        records: Of one set of items.
        reference: The method that the others are compared with.
    """
    known = [record for record in records if record.own_divergence is not None]
    if all(record.method == "none" for record in known):
        return ""
    parts = f"minus {reference}", f"times {reference}"
    compared = parts if reference != "none" else ()
    head = (
        "method",
        "budget",
        "entries",
        *("KL, own answer", *compared),
        *("KL, reference answer", *compared),
        "log-likelihood minus none",
        *([f"minus {reference}"] if compared else []),
    )
    rows = []
    for (method, budget), own in cells(known):
        base = reference_at(known, reference, budget) if method != reference else []
        full = reference_at(known, "none", budget)
        row = [method, budget_name(budget), mean_of(own, lambda r: r.cache_tokens)]
        for value in (_own, _given):
            row.append(nats([found for r in own if (found := value(r)) is not None]))
            if compared:
                row += [nats_difference(own, base, value), _times(own, base, value)]
        row.append(likelihood_difference(own, full))
        row += [likelihood_difference(own, base)] if compared else []
        rows.append(row)
    return table(head, rows)


def _own(record: Record) -> float | None:
    return record.own_divergence


def _given(record: Record) -> float | None:
    return record.divergence


def _times(own: Sequence[Record], base: Sequence[Record], value: _Value) -> str:
    """Mean as a share of the other mean, with its 95 % interval over the items of both."""
    pairs = paired(own, base, value)
    if not pairs or not any(other for _, other in pairs):
        return ""
    mean, low, high = ratio_of_means(*zip(*pairs, strict=True))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
