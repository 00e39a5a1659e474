"""Sets in SQuAD's form: XQuAD with paragraphs as passages, COVID-QA with articles cut into them."""

from __future__ import annotations

from pathlib import Path

from ...types import Passage
from ..squad import Question, read_article
from ..tasks import Place
from .collection import Collection, RealQuestion
from .cutting import cut


def read_squad_form(path: str | Path, name: str, words: int | None = None) -> Collection:
    """Read a file in SQuAD's form.

    Args:
        path: The file.
        name: The collection's name.
        words: Cut what the file calls a paragraph into passages of about so many words; None
            takes it whole. An answer that a cut would part leaves its question out.

    Raises:
        PromptError: The file has another form, or an answer that does not stand in its paragraph.
    """
    article = read_article(path)
    passages: list[Passage] = []
    pieces: list[list[Place]] = []  # of each paragraph
    for index, (text, title) in enumerate(zip(article.paragraphs, article.titles, strict=True)):
        spans = [(0, len(text))] if words is None else cut(text, words)
        pieces.append([Place(len(passages) + i, *span) for i, span in enumerate(spans)])
        metadata = {"title": title, "article": title if words is None else str(index)}
        for start, end in spans:
            passages.append(Passage(text[start:end], f"{name}-{len(passages)}", metadata))
    questions: list[RealQuestion] = []
    left_out: list[tuple[str, str]] = []
    for question in article.questions:
        places = _places(question, pieces[question.paragraph])
        if places:
            questions.append(_question(question, places))
        else:
            left_out.append((question.id, "its answer goes on in the next passage"))
    return Collection(name, tuple(passages), tuple(questions), tuple(left_out))


def _places(question: Question, pieces: list[Place]) -> tuple[Place, ...]:
    """The answers' characters, counted from the start of their passage."""
    return tuple(
        Place(piece.passage, answer.start - piece.start, answer.end - piece.start)
        for answer in question.answers
        for piece in pieces
        if piece.start <= answer.start and answer.end <= piece.end
    )


def _question(question: Question, places: tuple[Place, ...]) -> RealQuestion:
    answers = tuple(dict.fromkeys(answer.text for answer in question.answers))
    gold = tuple(dict.fromkeys(place.passage for place in places))
    return RealQuestion(question.id, question.text, answers, "any", places, gold)
