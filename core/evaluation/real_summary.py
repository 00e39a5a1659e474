"""The report's part on real questions: what reaches the target, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence

from .cache_table import cache_table
from .metrics import word_f1
from .records import Record
from .tables import (
    budget_name,
    cells,
    described,
    difference,
    filled,
    interval,
    likelihood_difference,
    mean_of,
    nats,
    reference_at,
    share,
    table,
)

_SIDES = {True: "right", False: "wrong"}


def real_sections(records: Sequence[Record], reference: str) -> list[str]:
    """A section for each set and context, with all items and apart by the draft's own answer.

    Args:
        records: Of one length.
        reference: The method that the others are compared with.
    """
    parts: list[str] = []
    for task in dict.fromkeys(record.task for record in records):
        own = [record for record in records if record.task == task]
        parts.append(f"## {task}, {own[0].length} tokens")
        parts += [described(own), real_table(own, reference)]
        parts += _on_the_cache(own, reference)
        if len({record.kind for record in own}) > 1:
            parts += ["Answers contained, by kind of question:", kind_table(own)]
            if _values(own, kept=True):
                parts += ["Answers kept, by kind of question:", kind_table(own, kept=True)]
        for right, word in _SIDES.items():
            if side := [record for record in own if record.draft_correct is right]:
                parts += [f"Items that the draft alone gets {word}:", real_table(side, reference)]
                parts += _on_the_cache(side, reference)
    return parts


def _on_the_cache(records: Sequence[Record], reference: str) -> list[str]:
    """A table of how far methods on the cache stray from the full one, where there are any."""
    found = cache_table(records, reference)
    return [f"Methods on the cache, in nats a token:\n\n{found}"] if found else []


def real_table(records: Sequence[Record], reference: str) -> str:
    """What reaches the target, and what it makes of it; differences are to the reference.

    "answer kept" does not depend on the target; its difference is shown where the reference is a
    method that keeps less than everything. "answer's words kept" is for references in free text
    (`answer_words.py`). The reference answer's log-likelihood and the
    divergence of what is expected at its tokens are in nats a token. "same answer" is the F1 of the
    reference method's own answer.
    """
    head = (
        "method",
        "budget",
        "tokens read",
        "answer kept",
        f"kept minus {reference}",
        "answer's words kept",
        f"log-likelihood minus {reference}",
        "KL to the full context",
        "answer contained",
        "F1",
        "exact match",
        "same answer",
        "draft s",
        "target s",
    )
    rows = []
    for (method, budget), own in cells(records):
        base = reference_at(records, reference, budget)
        said = {record.item: record.answer for record in base}
        alive = [r for r in own if r.survived is not None]
        known = [r for r in base if r.survived is not None and method != reference]
        kept_minus = difference(alive, known, lambda r: bool(r.survived))
        same = [word_f1(r.answer, said[r.item]) for r in own if r.item in said]
        rows.append(
            (
                method,
                budget_name(budget),
                mean_of(own, lambda r: r.prompt_tokens),
                interval([r.survived for r in alive if r.survived is not None]),
                kept_minus,
                interval([r.words_kept for r in own if r.words_kept is not None]),
                likelihood_difference(own, base),
                nats([r.divergence for r in own if r.divergence is not None]),
                interval([r.recall for r in own]),
                interval([r.f1 for r in own]),
                share([r.correct for r in own]),
                share(same),
                mean_of(own, lambda r: r.draft_seconds, 2),
                mean_of(own, lambda r: r.target_seconds, 2),
            )
        )
    return filled(head, rows)


def kind_table(records: Sequence[Record], *, kept: bool = False) -> str:
    """Share of answers that contain what was wanted; one column a kind of question.

    With `kept` the share that is kept, of references in free text that of their words.
    """
    kinds = list(dict.fromkeys(record.kind for record in records))
    counts = {kind: len({r.item for r in records if r.kind == kind}) for kind in kinds}
    head = ("method", "budget", *(f"{kind} ({counts[kind]})" for kind in kinds))
    rows = [
        (
            method,
            budget_name(budget),
            *(share(_values([r for r in own if r.kind == kind], kept)) for kind in kinds),
        )
        for (method, budget), own in cells(records)
    ]
    return table(head, rows)


def _values(records: Sequence[Record], kept: bool) -> list[float]:
    if not kept:
        return [record.recall for record in records]
    found = (r.words_kept if r.survived is None else r.survived for r in records)
    return [value for value in found if value is not None]
