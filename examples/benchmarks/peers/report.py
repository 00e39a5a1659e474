"""The report of our methods and the peers, on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from draftsieve.core.evaluation.records import Record
from draftsieve.core.evaluation.summary import difference, interval, markdown, table
from draftsieve.core.evaluation.tasks import NATURAL

WHOLE, OUR_WHOLE = "kvpress-none", "none"


def report(
    ours: Sequence[Record],
    peers: Sequence[Record],
    checks: Sequence[str],
    reference: str,
    survival_reference: str,
) -> str:
    """Accuracy, survival, checks.

    Args:
        ours: Records of `draftsieve eval`.
        peers: Records of the peers on the same items.
        checks: What tells whether the comparison is fair.
        reference: The method that accuracies are compared with.
        survival_reference: The method that the survival of evidence is compared with.
    """
    budgets = {record.budget for record in peers} | {1.0}
    shown = [*(record for record in ours if record.budget in budgets), *peers]
    parts = [markdown(shown, reference=reference, title="With peers").rstrip()]
    if survived := survival_table(shown, survival_reference):
        parts += ["## Evidence kept by methods on prompts", survived]
    if checks:
        parts += ["## Checks", "\n".join(f"- {line}" for line in checks)]
    return "\n\n".join(parts) + "\n"


def survival_table(records: Sequence[Record], reference: str) -> str:
    """Share of items whose evidence is kept, character for character; "" if nothing is known."""
    cells: dict[tuple[bool, int, float, str], list[Record]] = {}
    for record in records:
        if record.survived is not None:
            cell = (record.task == NATURAL, record.length, record.budget, record.method)
            cells.setdefault(cell, []).append(record)
    rows = []
    for cell, own in sorted(cells.items(), key=lambda known: known[0][:3]):
        natural, length, budget, method = cell
        base = cells.get((natural, length, budget, reference), [])
        gap = "" if method == reference else difference(own, base, lambda r: bool(r.survived))
        kind, tokens = "SQuAD" if natural else "generated", fmean(r.prompt_tokens for r in own)
        size = (kind, str(length), f"{budget:g}", method, f"{tokens:.0f}", str(len(own)))
        rows.append((*size, interval([bool(r.survived) for r in own]), gap))
    head = ("items", "length", "budget", "method", "tokens read", "n", "evidence kept")
    return table((*head, f"minus {reference}"), rows) if rows else ""


def same_answers(ours: Sequence[Record], peers: Sequence[Record]) -> list[str]:
    """Whether the target answers in kvpress's environment what it answers in ours."""
    own = {record.item: record.answer for record in ours if record.method == OUR_WHOLE}
    both = [r.answer == own[r.item] for r in peers if r.method == WHOLE and r.item in own]
    if not both:
        return []
    return [f"Without compression, kvpress gives our answer on {sum(both)} of {len(both)} items."]


def asked_and_got(answers: Sequence[dict[str, Any]]) -> list[str]:
    """How far LLMLingua missed its target before it was searched."""
    lines = []
    known = [row for row in answers if "asked" in row]
    for budget in sorted({row["budget"] for row in known}):
        own = [row for row in known if row["budget"] == budget]
        first, kept, wanted = (
            sum(row[key] for row in own) / len(own) for key in ("asked", "tokens", "wanted")
        )
        over = sum(row["tokens"] > row["wanted"] for row in own)
        lines.append(
            f"LLMLingua at {budget:g}: asked for {wanted:.0f} passage tokens it kept {first:.0f}; "
            f"searched, it kept {kept:.0f}, on {over} of {len(own)} items more than allowed."
        )
    return lines
