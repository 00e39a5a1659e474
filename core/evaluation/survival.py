"""Answer survival: does what a compressor keeps still hold the answer?

No model has to answer anything: a question's accepted answers stand at known characters of one
passage, and they are either kept or not. Methods are compared at equal size, counted in draft
tokens of the kept passage text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..specpc.fitting import merge_spans
from .baselines import Kept, kept_text, kept_tokens
from .squad import Counter, Item

if TYPE_CHECKING:
    from ..compressor import Compressor
    from ..config import SpecPC
    from ..types import CompressedContext

Method = Callable[[Item, int], Kept]  # an item and its budget in tokens -> what is kept


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one method did, item by item."""

    name: str
    at_offset: tuple[bool, ...]  # an accepted answer is kept where its annotator marked it
    as_text: tuple[bool, ...]  # an accepted answer's text can be read in the right passage
    kept_tokens: tuple[int, ...]
    passage_tokens: tuple[int, ...]
    seconds: float

    @property
    def share(self) -> float:
        """Kept tokens as a share of all passage tokens."""
        return sum(self.kept_tokens) / max(1, sum(self.passage_tokens))


def survives_at_offset(item: Item, kept: Kept) -> bool:
    """Whether all characters of one accepted occurrence are kept."""
    spans = merge_spans(item.passages[item.gold].text, sorted(kept[item.gold]))
    return any(
        any(start <= answer.start and answer.end <= end for start, end in spans)
        for answer in item.question.answers
    )


def survives_as_text(item: Item, kept: Kept) -> bool:
    """Whether an accepted answer can be read anywhere in the kept text of the right passage.

    Case and white space do not count, so this is true wherever `survives_at_offset` is.
    """
    text = _folded(kept_text(item.passages[item.gold].text, kept[item.gold]))
    return any(_folded(answer.text) in text for answer in item.question.answers)


def measure(
    name: str, method: Method, items: Iterable[Item], budgets: Sequence[int], count: Counter
) -> Outcome:
    """Run one method over the items.

    Args:
        name: The method's name in the report.
        method: Called once an item.
        items: Questions with their contexts.
        budgets: Tokens that may be kept, item by item.
        count: Token counter of the draft, the same for all methods.
    """
    rows: list[tuple[bool, bool, int, int]] = []
    seconds = 0.0
    for item, budget in zip(items, budgets, strict=True):
        texts = [passage.text for passage in item.passages]
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

    def method(item: Item, budget: int) -> Kept:
        context = compressor.compress(item.question.text, item.passages, options)
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
