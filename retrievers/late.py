"""Passages found by a draft that has read them before: late interaction over stored keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from tqdm import tqdm

from ..core.errors import ConfigError, PromptError
from ..core.specpc.bm25 import Bm25
from ..core.specpc.stored.late import (
    BEHIND,
    best_matches,
    filled,
    late_scores,
    passage_vectors,
    question_vectors,
    rarity,
    standard,
)
from ..core.specpc.stored.late_heads import LateHeads, late_heads
from ..core.specpc.stored.passage_store import PassageStore
from ..core.types import Passage

LEXICAL_WEIGHT = 0.25  # chosen on Natural Questions, see docs/results.md
_AT_ONCE = 1 << 14  # padded tokens that are compared at once
_ROUND = 128  # passages that are taken from the store at once


class LateOptions(TypedDict, total=False):
    """The keyword arguments of `LateIndex`."""

    heads: LateHeads | None
    lexical_weight: float
    first: int | None


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Passages of similar length."""

    places: torch.Tensor  # (passages,) int64, where they stand in the index
    tokens: torch.Tensor  # (heads * width, passages, longest) float16


class LateIndex:
    """An index of passages in memory, made of what a store holds; threads may share it.

    Each question is read alone by the draft, a few dozen tokens through a part of its layers, and
    compared with every passage, or with the best by BM25. It holds them as float16: 512 bytes a
    token with SmolLM2-135M, and what padding takes.

    Args:
        passages: What can be found. Those that the store lacks are read and kept there.
        store: Of either tier.
        heads: In which to compare; None for those that the package knows of the draft.
        lexical_weight: Share of BM25 beside late interaction's 1, both in standard deviations over
            the passages that are compared; 0 for late interaction alone.
        first: Compare only the best so many by BM25; None for all.

    Raises:
        ConfigError: No heads are known for this draft, the store lacks their keys, a negative
            lexical_weight, or `first` below 1.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        store: PassageStore,
        *,
        heads: LateHeads | None = None,
        lexical_weight: float = LEXICAL_WEIGHT,
        first: int | None = None,
    ) -> None:
        found = heads or late_heads(store.draft.model)
        if found is None:
            raise ConfigError(
                "No heads are known in which this draft's keys could be compared: use "
                '"smollm2-135m", or give heads=LateHeads(...).'
            )
        if lexical_weight < 0 or (first is not None and first < 1):
            raise ConfigError(
                f"lexical_weight={lexical_weight} and first={first}: give a weight of at least 0, "
                "and at least one passage or None."
            )
        self._passages, self._store, self._heads = tuple(passages), store, found
        self._lexical_weight, self._first = lexical_weight, first
        texts = [passage.text for passage in passages]
        self._bm25 = Bm25(texts) if lexical_weight or first is not None else None
        self._words: dict[int, str] = {}
        self._holders: Counter[str] = Counter()  # passages that hold a token
        for text in texts:
            self._holders.update({self._word(token) for token in store.frame.passage(text)[0]})
        self._groups = list(_grouped(self._vectors(texts)))

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], store: PassageStore, **options: Unpack[LateOptions]
    ) -> LateIndex:
        """Index texts; their ids are their places from "1" on. Options as for the class."""
        passages = [Passage(text, str(n)) for n, text in enumerate(texts, start=1)]
        return cls(passages, store, **options)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, question: str, k: int = 5) -> list[tuple[Passage, float]]:
        """Find the passages whose keys fit a question's best.

        Args:
            question: Any text.
            k: Most passages returned.

        Returns:
            Passages with their scores, best first, equal scores in the order of indexing.

        Raises:
            PromptError: k is below 1, or the question is empty.
        """
        if k < 1:
            raise PromptError(f"k is {k}: ask for at least one passage.")
        scores = self.scores(question)
        order = torch.argsort(-scores, stable=True)[:k].tolist()
        return [(self._passages[at], float(scores[at])) for at in order if scores[at] > -torch.inf]

    def scores(self, question: str) -> torch.Tensor:
        """(passages,) float32; -inf for those that are not compared, and those without tokens.

        Raises:
            PromptError: The question is empty.
        """
        words = None if self._bm25 is None else torch.tensor(self._bm25.scores(question))
        chosen = torch.ones(len(self._passages), dtype=torch.bool)
        if words is not None and self._first is not None:
            chosen = torch.zeros_like(chosen)
            chosen[torch.argsort(-words, stable=True)[: self._first]] = True
        tail, model = self._store.frame.tail(question), self._store.draft.model
        behind = min(BEHIND, self._store.piece)
        asked = question_vectors(model, self._heads, self._store.beginning(), tail, behind)
        found = [_compared(self._heads, asked, group, chosen) for group in self._groups]
        scores = torch.full((len(self._passages),), -torch.inf)
        if not sum(len(places) for places, _ in found):
            return scores
        places = torch.cat([places for places, _ in found])
        matches = torch.cat([matches for _, matches in found], -1)
        held = [self._holders[self._word(token)] for token in tail.ids[tail.question]]
        total = late_scores(self._heads, matches, rarity(held, len(self._passages)))
        if words is not None and self._lexical_weight:
            total = total + self._lexical_weight * standard(words[places].float())
        scores[places] = total
        return scores

    def _vectors(self, texts: Sequence[str]) -> Iterator[torch.Tensor | None]:
        """(tokens, heads * width) float16 of each text; None without tokens."""
        store, begin = self._store, self._store.beginning().tokens
        store.add(texts)
        bar = tqdm(texts, "Index", disable=not store.draft.progress, leave=False)
        for start in range(0, len(texts), _ROUND):
            for entry in store.entries(texts[start : start + _ROUND], remember=False):
                bar.update()
                yield (
                    None
                    if entry is None
                    else passage_vectors(
                        store.draft.model, self._heads, store.layout, [entry], begin, store.piece
                    )[0].half()
                )
        bar.close()

    def _word(self, token: torch.Tensor) -> str:
        """A token whatever its case, and whether a space stands in front of it."""
        number = int(token)
        if number not in self._words:
            self._words[number] = self._store.draft.text(token.view(1)).strip().casefold()
        return self._words[number]


def _grouped(vectors: Iterator[torch.Tensor | None]) -> Iterator[_Group]:
    """Passages of similar length side by side."""
    found = {place: own for place, own in enumerate(vectors) if own is not None}
    order, start = sorted(found, key=lambda place: len(found[place])), 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end - start + 1) * len(found[order[end]]) <= _AT_ONCE:
            end += 1
        places, longest = order[start:end], len(found[order[end - 1]])
        stacked = torch.stack([filled(found.pop(place), longest) for place in places])
        tokens = stacked.permute(2, 0, 1).contiguous()
        yield _Group(torch.tensor(places), tokens)
        start = end


def _compared(
    heads: LateHeads, asked: torch.Tensor, group: _Group, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen passages of a group, and (opinions, question, passages) best matches."""
    inside = chosen[group.places]
    tokens = group.tokens if bool(inside.all()) else group.tokens[:, inside]
    if not bool(inside.any()):
        return group.places[inside], torch.zeros(1 + len(heads.looking), len(asked), 0)
    return group.places[inside], best_matches(heads, asked, tokens.float())
