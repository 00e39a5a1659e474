"""The report of our methods and the peers, on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from draftsieve.core.evaluation.kept_summary import kept_markdown
from draftsieve.core.evaluation.records import Record
from draftsieve.core.evaluation.summary import difference, interval, markdown, table
from draftsieve.core.evaluation.tasks import NATURAL, is_real

WHOLE, OUR_WHOLE = "kvpress-none", "none"


def report(
    ours: Sequence[Record],
    peers: Sequence[Record],
    checks: Sequence[str],
    reference: str,
    survival_reference: str,
    kept_only: bool = False,
) -> str:
    """Accuracy, survival, checks.

    Args:
        ours: Records of `draftsieve eval`.
        peers: Records of the peers on the same items.
        checks: What tells whether the comparison is fair.
        reference: The method that accuracies are compared with.
        survival_reference: The method that the survival of evidence is compared with.
        kept_only: Nothing was answered; then that is the only reference.
    """
    budgets = {record.budget for record in peers} | {1.0}
    shown = [*(record for record in ours if record.budget in budgets), *peers]
    if kept_only:
        parts = [kept_markdown(shown, reference=survival_reference, title="With peers").rstrip()]
    else:
        parts = [markdown(shown, reference=reference, title="With peers").rstrip()]
    if not kept_only and (survived := survival_table(shown, survival_reference)):
        parts += ["## Evidence kept by methods on prompts", survived]
    if checks:
        parts += ["## Checks", "\n".join(f"- {line}" for line in checks)]
    return "\n\n".join(parts) + "\n"


def survival_table(records: Sequence[Record], reference: str) -> str:
    """Share of items whose evidence is kept, character for character; "" if nothing is known."""
    cells: dict[tuple[str, int, float, str], list[Record]] = {}
    for record in records:
        if record.survived is not None:
            cell = (_items(record.task), record.length, record.budget, record.method)
            cells.setdefault(cell, []).append(record)
    rows = []
    for cell, own in sorted(cells.items(), key=lambda known: known[0][:3]):
        kind, length, budget, method = cell
        base = cells.get((kind, length, budget, reference), [])
        gap = "" if method == reference else difference(own, base, lambda r: bool(r.survived))
        tokens = fmean(r.prompt_tokens for r in own)
        size = (kind, str(length), f"{budget:g}", method, f"{tokens:.0f}", str(len(own)))
        rows.append((*size, interval([bool(r.survived) for r in own]), gap))
    head = ("items", "length", "budget", "method", "tokens read", "n", "evidence kept")
    return table((*head, f"minus {reference}"), rows) if rows else ""


def _items(task: str) -> str:
    """How the items of a task are called."""
    return task if is_real(task) else "SQuAD" if task == NATURAL else "generated"


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
