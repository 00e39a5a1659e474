"""Answer survival: does what a compressor keeps still hold the answer?

No model has to answer anything: a question's answers stand at known characters of its passages,
and they are either kept or not. Methods are compared at equal size, counted in draft tokens of the
kept passage text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .baselines import Kept, kept_text, kept_tokens
from .metrics import survival
from .squad import Counter
from .tasks import EvalItem

if TYPE_CHECKING:
    from ..compressor import Compressor
    from ..config import SpecPC
    from ..types import CompressedContext

Method = Callable[[EvalItem, int], Kept]  # an item and its budget in tokens -> what is kept


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one method did, item by item."""

    name: str
    at_offset: tuple[bool, ...]  # the answer is kept where it is marked
    as_text: tuple[bool, ...]  # the answer's text can be read in the right passage
    kept_tokens: tuple[int, ...]
    passage_tokens: tuple[int, ...]
    seconds: float

    @property
    def share(self) -> float:
        """Kept tokens as a share of all passage tokens."""
        return sum(self.kept_tokens) / max(1, sum(self.passage_tokens))


def survives_at_offset(item: EvalItem, kept: Kept) -> bool:
    """Whether all characters are kept of one place that answers, or of each that is needed."""
    found = survival(item, kept)
    return found is not None and found[0]


def survives_as_text(item: EvalItem, kept: Kept) -> bool:
    """Whether the answer can be read anywhere in the kept text of the right passage.

    Case and white space do not count, so this is true wherever `survives_at_offset` is.
    """
    shown = [_folded(kept_text(t, own)) for t, own in zip(item.passages, kept, strict=True)]
    answers = (_folded(answer) for answer in item.answers)
    if item.need == "any":
        gold = {evidence.value.passage for evidence in item.evidence}
        return any(answer in shown[place] for answer in answers for place in gold)
    places = (evidence.value.passage for evidence in item.evidence)
    return all(a in shown[p] for a, p in zip(answers, places, strict=True))


def measure(
    name: str, method: Method, items: Iterable[EvalItem], budgets: Sequence[int], count: Counter
) -> Outcome:
    """Run one method over the items.

    Args:
        name: The method's name in the report.
        method: Called once an item.
        items: Questions with their contexts and evidence.
        budgets: Tokens that may be kept, item by item.
        count: Token counter of the draft, the same for all methods.
    """
    rows: list[tuple[bool, bool, int, int]] = []
    seconds = 0.0
    for item, budget in zip(items, budgets, strict=True):
        texts = item.passages
        began = time.perf_counter()
        kept = method(item, budget)
        seconds += time.perf_counter() - began
        size = kept_tokens(texts, kept, count)
        whole = sum(count(text) for text in texts)
        rows.append((survives_at_offset(item, kept), survives_as_text(item, kept), size, whole))
    at_offset, as_text, sizes, wholes = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Outcome(name, at_offset, as_text, sizes, wholes, seconds)


def compression(compressor: Compressor, options: SpecPC) -> Method:
    """A compressor as a method; its options decide the budget, so that the given one is unused."""

    def method(item: EvalItem, budget: int) -> Kept:
        context = compressor.compress(item.question, item.passages, options)
        return kept_spans(context, len(item.passages))

    return method


def kept_spans(context: CompressedContext, passages: int) -> Kept:
    """The kept characters of every passage of a request, in the request's order."""
    return tuple(
        tuple(sorted((s.start, s.end) for s in context.spans if s.passage_index == index))
        for index in range(passages)
    )


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
