"""Items of real questions: the gold passages among others, to a number of tokens."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...prompt.messages import DEFAULT_SYSTEM
from ..puzzles import NOT_FOUND
from ..squad import Counter, Scorer
from ..tasks import EvalItem, Evidence, Place, evidence_around, mean_depth
from .collection import Collection, RealQuestion, occurrences
from .leaning import LEANING, STANDING, leans
from .rankings import ranked

logger = logging.getLogger(__name__)
Choose = Callable[[RealQuestion, random.Random], list[int]]  # passages of a context, in order


@dataclass(frozen=True, slots=True)
class Around:
    """What a context is made of besides the gold passages.

    Args:
        name: Names it in the items' tasks.
        length: Tokens of the passages, at most.
        score: Takes the others by falling score, and puts all in a seeded order; None takes the
            article around the gold passage as it stands, whole where it fits.
    """

    name: str
    length: int
    score: Scorer | None


def real_items(
    collection: Collection,
    around: Around,
    counter: Counter,
    *,
    count: int | None = None,
    seed: int = 0,
    system: str | None = DEFAULT_SYSTEM,
) -> list[EvalItem]:
    """Put each question's gold passages among others.

    Args:
        collection: Passages and questions.
        around: Which others, and how many tokens.
        counter: Token counter, the draft's.
        count: Questions to take, a seeded subset in the order of the file; None takes all.
        seed: Of the subset, of chance, and of the order of the passages.
        system: System text of the prompts.

    Returns:
        The items; a question whose gold passages alone are longer than the length has none. Items
        of questions that nothing answers expect `puzzles.NOT_FOUND`.
    """
    asked = _subset(collection.questions, count, seed)
    sizes = [counter(passage.text) for passage in collection.passages]
    choose = _among_others if around.score is not None else _in_article
    items = []
    for question in asked:
        rng = random.Random(f"{seed}:{question.id}")
        chosen = choose(collection, question, around, sizes, rng)
        if sum(sizes[index] for index in question.gold) > around.length or not chosen:
            logger.info("%s has no context of %d tokens.", question.id, around.length)
            continue
        items.append(_item(collection, question, chosen, around, seed, system))
    return items


def _among_others(
    collection: Collection,
    question: RealQuestion,
    around: Around,
    sizes: Sequence[int],
    rng: random.Random,
) -> list[int]:
    """The gold passages and the best-scored others that fit, shuffled."""
    assert around.score is not None  # the caller looked
    scores = around.score(question.text, [passage.text for passage in collection.passages])
    chosen = list(question.gold)
    total = sum(sizes[index] for index in chosen)
    for index in ranked(scores):
        if index in question.gold or total + sizes[index] > around.length:
            continue
        text = collection.passages[index].text
        if collection.distractors_answer or not _answers(question, text):
            chosen.append(index)
            total += sizes[index]
    rng.shuffle(chosen)
    return chosen


def _answers(question: RealQuestion, text: str) -> bool:
    return any(next(occurrences(text, answer), None) for answer in question.answers)


def _in_article(
    collection: Collection,
    question: RealQuestion,
    around: Around,
    sizes: Sequence[int],
    rng: random.Random,
) -> list[int]:
    """Neighbours in the article from the gold passages on, to either side by chance."""
    if not question.gold:
        return []
    article = collection.passages[question.gold[0]].metadata.get("article")
    low, high = min(question.gold), max(question.gold)
    total = sum(sizes[low : high + 1])
    open_ends = {-1, 1}
    while open_ends:
        side = rng.choice(sorted(open_ends))
        index = low - 1 if side < 0 else high + 1
        inside = 0 <= index < len(sizes) and total + sizes[index] <= around.length
        if not inside or collection.passages[index].metadata.get("article") != article:
            open_ends.discard(side)
            continue
        low, high, total = min(low, index), max(high, index), total + sizes[index]
    return list(range(low, high + 1))


def _item(
    collection: Collection,
    question: RealQuestion,
    chosen: Sequence[int],
    around: Around,
    seed: int,
    system: str | None,
) -> EvalItem:
    texts = tuple(collection.passages[index].text for index in chosen)
    evidence = tuple(
        evidence_around(texts, Place(chosen.index(place.passage), place.start, place.end))
        for place in question.places
    )
    need = question.need if question.answers else "all"
    return EvalItem(
        id=f"{collection.name}-{around.name}-{around.length}-{seed}-{question.id}",
        task=f"{collection.name}/{around.name}",
        length=around.length,
        question=question.text,
        passages=texts,
        answers=question.answers or (NOT_FOUND,),
        need=need,
        evidence=evidence,
        depth=mean_depth(texts, evidence[:1] if question.need == "any" else evidence),
        system=system,
        turns=question.turns,
        kind=question.kind or _kind(texts, evidence, need),
    )


def _kind(texts: Sequence[str], evidence: Sequence[Evidence], need: str) -> str:
    """Whether the answer can only be had from sentences that lean on others; "" without one."""
    if not evidence:
        return ""
    sentences = (e.sentence for e in evidence)
    found = [leans(texts[s.passage][s.start : s.end]) for s in sentences]
    return LEANING if (any if need == "all" else all)(found) else STANDING


def _subset(
    questions: Sequence[RealQuestion], count: int | None, seed: int
) -> Sequence[RealQuestion]:
    if count is None or count >= len(questions):
        return questions
    places = random.Random(seed).sample(range(len(questions)), count)
    return [questions[index] for index in sorted(places)]
