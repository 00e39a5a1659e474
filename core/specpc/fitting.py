"""Under the budget: take as many ranked units as it holds, measured by encoding again.

The result is always measured by encoding the shortened prompt, gap markers included, so a budget
means what it says whatever the tokenizer merges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import SpecPC
from ..errors import BudgetError
from ..prompt.encoder import PromptTokens
from .ranking import RankedUnits

_ROUNDS = 12  # of the search for the most tokens that fit


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit in draft tokens: of the whole prompt (`capacity`), or of its passages (`ratio`)."""

    limit: int
    whole_prompt: bool

    @classmethod
    def of(cls, method: SpecPC, tokens: PromptTokens) -> Budget:
        """The integer budget of this prompt."""
        passage_tokens = int((~tokens.protected).sum())
        return cls(token_budget(method, passage_tokens), method.ratio is None)

    def measure(self, tokens: PromptTokens) -> int:
        """Size of a prompt as this budget counts."""
        return len(tokens) if self.whole_prompt else int((~tokens.protected).sum())

    def first_guess(self, tokens: PromptTokens) -> int:
        """Passage tokens that fit if nothing but them changes."""
        return self.limit - (int(tokens.protected.sum()) if self.whole_prompt else 0)

    def require_room(self, fixed: int) -> None:
        """Raise `BudgetError` where the prompt without passages exceeds the capacity."""
        if self.whole_prompt and fixed > self.limit:
            raise BudgetError(
                f"capacity={self.limit}, but the question, system text and template alone take "
                f"{fixed} draft tokens. Raise the capacity, or give a ratio of the passages."
            )


def token_budget(options: SpecPC, count: int) -> int:
    """The one place where a budget becomes an integer: `capacity`, or a share of `count`."""
    if options.ratio is None:
        assert options.capacity is not None  # the options' validator sets one of the two
        return options.capacity
    return max(1, round(count * options.ratio))


@dataclass(frozen=True, slots=True)
class KeptText:
    """What is left of every passage."""

    texts: tuple[str, ...]
    bounds: tuple[tuple[tuple[int, int], ...], ...]  # per passage, kept characters
    size: int  # in tokens, as the budget counts


def fit(
    texts: Sequence[str],
    ranked: RankedUnits,
    limit: int,
    first_guess: int,
    measure: Callable[[Sequence[str]], int],
    count: Callable[[str], int],
    marker: str | None,
) -> KeptText:
    """Take as many units as possible while the shortened prompt measures at most `limit`.

    Args:
        texts: The passages' texts.
        ranked: Their units.
        limit: The budget, as `measure` counts.
        first_guess: Unit tokens to try first.
        measure: Size of the prompt with these passage texts.
        count: Tokens of one text.
        marker: Text between kept spans.
    """
    original = [count(text) for text in texts]
    if ranked.complete and (size := measure(texts)) <= limit:
        return KeptText(tuple(texts), tuple(((0, len(t)),) if t else () for t in texts), size)
    bounds = tuple(() for _ in texts)
    best = KeptText(tuple("" for _ in texts), bounds, measure(["" for _ in texts]))
    low, high, guess = 1, int(ranked.cost.sum()), first_guess
    for _ in range(_ROUNDS):
        if low > high:
            break
        guess = min(max(guess, low), high)
        tried = _keep(texts, ranked, guess, original, count, marker)
        size = measure(tried[0])
        if size <= limit:
            best, low = KeptText(*tried, size), guess + 1
        else:
            high = guess - 1
        step = limit - size
        guess = guess + step if step else low
    return best


def _keep(
    texts: Sequence[str],
    ranked: RankedUnits,
    tokens: int,
    original: Sequence[int],
    count: Callable[[str], int],
    marker: str | None,
) -> tuple[tuple[str, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """Keep the best units of `tokens` tokens in all; a passage that would grow stays whole."""
    taken = affordable(ranked.cost, tokens)
    kept_texts, kept_bounds = [], []
    for index, text in enumerate(texts):
        mine = taken[ranked.passage[taken] == index]
        bounds = merge_spans(text, sorted(zip(ranked.start[mine], ranked.end[mine], strict=True)))
        short = join_spans(text, bounds, marker)
        if bounds and count(short) >= original[index]:
            short, bounds = text, ((0, len(text)),)
        kept_texts.append(short)
        kept_bounds.append(bounds)
    return tuple(kept_texts), tuple(kept_bounds)


def affordable(cost: np.ndarray, tokens: int) -> np.ndarray:
    """Indices of units taken in order, skipping those that no longer fit."""
    total = np.cumsum(cost)
    whole = int(np.searchsorted(total, tokens, side="right"))
    left = tokens - (int(total[whole - 1]) if whole else 0)
    taken = list(range(whole))
    for index in range(whole, len(cost)):
        if left <= 0:
            break
        if cost[index] <= left:
            taken.append(index)
            left -= int(cost[index])
    return np.array(taken, dtype=np.int64)


def merge_spans(text: str, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join ascending spans that touch or have only whitespace between them, and trim them."""
    merged: list[tuple[int, int]] = []
    for start, end in ((int(s), int(e)) for s, e in spans):
        if merged and (start <= merged[-1][1] or text[merged[-1][1] : start].isspace()):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    trimmed = []
    for start, end in merged:
        body = text[start:end]
        lead, tail = len(body) - len(body.lstrip()), len(body) - len(body.rstrip())
        if lead < len(body):
            trimmed.append((start + lead, end - tail))
    return tuple(trimmed)


def join_spans(text: str, bounds: Sequence[tuple[int, int]], marker: str | None) -> str:
    """The kept text: `marker` (a space if None) stands where something was left out."""
    return (marker or " ").join(text[start:end] for start, end in bounds)
