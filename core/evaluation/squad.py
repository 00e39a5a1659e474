"""Questions over paragraphs in the format of SQuAD v1.1 (arXiv 1606.05250)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..types import Passage

Counter = Callable[[str], int]  # text -> tokens
Scorer = Callable[[str, Sequence[str]], Sequence[float]]  # question, texts -> one score a text


@dataclass(frozen=True, slots=True)
class AcceptedAnswer:
    """An answer text and the characters start..end of the paragraph where it stands."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the paragraph that answers it, and the answers its annotators gave."""

    id: str
    text: str
    paragraph: int
    answers: tuple[AcceptedAnswer, ...]


@dataclass(frozen=True, slots=True)
class Article:
    """Paragraphs and the questions about them; `titles` has one entry a paragraph."""

    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]
    titles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """A question with a context to compress; `gold` is the place of the answering passage."""

    question: Question
    passages: tuple[Passage, ...]
    gold: int


def read_article(path: str | Path) -> Article:
    """Read every paragraph and question of a SQuAD file; unanswerable questions are left out.

    Raises:
        PromptError: The file has another form.
    """
    try:
        return _read_article(json.loads(Path(path).read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PromptError(
            f"{str(path)!r} is not in SQuAD's format, a JSON object with "
            f'"data" -> "paragraphs" -> "context" and "qas": {type(error).__name__} {error}.'
        ) from error


def _read_article(content: Any) -> Article:
    paragraphs: list[str] = []
    questions: list[Question] = []
    titles: list[str] = []
    pairs = [(part, entry) for part in content["data"] for entry in part["paragraphs"]]
    for part, entry in pairs:
        context = entry["context"]
        for raw in entry["qas"]:
            given = sorted({(a["text"], a["answer_start"]) for a in raw["answers"]})
            accepted = tuple(_accepted(context, *answer) for answer in given)
            if accepted:
                name, text = str(raw["id"]), raw["question"]
                questions.append(Question(name, text, len(paragraphs), accepted))
        paragraphs.append(context)
        titles.append(part.get("title") or context.partition("\n")[0])
    return Article(tuple(paragraphs), tuple(questions), tuple(titles))


def _accepted(context: str, text: str, start: int) -> AcceptedAnswer:
    """An answer without the white space around it, where it stands closest to where it shall."""
    if not context.startswith(text, start):  # published offsets may be a few characters off
        found = [match.start() for match in re.finditer(re.escape(text), context)]
        if not found:
            raise ValueError(f"the answer {text!r} does not stand in its paragraph")
        start = min(found, key=lambda place: abs(place - start))
    first = start + len(text) - len(text.lstrip())
    return AcceptedAnswer(text.strip(), first, first + len(text.strip()))


def sample_questions(article: Article, count: int, seed: int = 0) -> tuple[Question, ...]:
    """A seeded subset of the questions, in the order of the file."""
    if count >= len(article.questions):
        return article.questions
    chosen = random.Random(seed).sample(range(len(article.questions)), count)
    return tuple(article.questions[index] for index in sorted(chosen))


def build_items(
    article: Article,
    questions: Sequence[Question],
    score: Scorer,
    count: Counter,
    *,
    max_tokens: int = 1800,
    seed: int = 0,
) -> list[Item]:
    """Put each question's paragraph among the paragraphs that a retriever ranks highest.

    Args:
        article: Where the paragraphs come from.
        questions: Questions of that article.
        score: The retriever: the higher a paragraph's score, the earlier it is taken.
        count: Token counter, the draft's.
        max_tokens: The paragraphs of one item hold at most this many tokens (unless the gold
            paragraph alone is longer); paragraphs that do not fit are passed over.
        seed: Seed of the order of the passages, so that rank and place tell nothing.
    """
    sizes = [count(paragraph) for paragraph in article.paragraphs]
    items = []
    for question in questions:
        scores = score(question.text, article.paragraphs)
        chosen = _fill(question.paragraph, scores, sizes, max_tokens)
        random.Random(f"{seed}:{question.id}").shuffle(chosen)
        passages = tuple(Passage(article.paragraphs[i], id=str(i)) for i in chosen)
        items.append(Item(question, passages, chosen.index(question.paragraph)))
    return items


def _fill(gold: int, scores: Sequence[float], sizes: Sequence[int], max_tokens: int) -> list[int]:
    """The gold paragraph and the best-scored others that fit."""
    chosen, total = [gold], sizes[gold]
    for index in sorted(range(len(sizes)), key=lambda i: -scores[i]):
        if index != gold and total + sizes[index] <= max_tokens:
            chosen.append(index)
            total += sizes[index]
    return chosen
