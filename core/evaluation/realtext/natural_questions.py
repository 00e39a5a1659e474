"""Natural Questions (Kwiatkowski et al., 2019) with one gold passage each.

The selection is that of "Lost in the Middle" (arXiv 2307.03172).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tasks import Place
from .collection import Collection, Pool, RealQuestion, occurrences, read_lines

NAME = "nq"


def read_natural_questions(path: str | Path) -> Collection:
    """Read questions with their gold passages; the passages of the others serve as distractors.

    Args:
        path: One JSON object a line: question, answers, title, text.

    Raises:
        PromptError: A line has another form.
    """
    pool = Pool()
    left_out: list[tuple[str, str]] = []

    def parse(row: dict[str, Any]) -> RealQuestion | None:
        text, answers = row["text"], tuple(row["answers"])
        gold = pool.add(text, row["title"], {"title": row["title"]})
        spans = [span for answer in answers for span in occurrences(text, answer)]
        places = tuple(Place(gold, *span) for span in dict.fromkeys(spans))
        if not places:
            left_out.append((row["question"], "no accepted answer stands in its passage"))
            return None
        name = "-".join(row["question"].split())
        return RealQuestion(name, row["question"], answers, "any", places, (gold,))

    rows = read_lines(path, "a question with answers, title and text", parse)
    questions = tuple(row for row in rows if row is not None)
    return Collection(NAME, pool.passages(), questions, tuple(left_out), distractors_answer=False)
