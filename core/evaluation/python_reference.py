"""Questions about Python's language reference, the text that each Python carries with itself.

The text is `pydoc_data.topics`, what `help("with")` shows; only the questions are this project's.
Where a Python's text says something in other words, the questions concerned are left out by name.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..specpc.units import sentence_spans
from ..types import Passage
from .realtext.collection import Collection, RealQuestion, occurrences, read_lines
from .realtext.cutting import cut
from .tasks import Place

logger = logging.getLogger(__name__)
NAME = "python"
_FORM = "a question about the reference (id, question, answer, variants, kind, evidence)"
_WIDTH = 70  # where Sphinx breaks the lines of the topics
_SAID = 60  # a paragraph this long is kept once, in the shortest topic that has it
_UNDERLINE = re.compile(r"^(.+)\n([*=\-^~])\2{2,}$", re.MULTILINE)
_CODE = re.compile(r"^\s*(>>>|\.\.\.|\||\+--)|::=", re.MULTILINE)


def read_reference(path: str | Path, topics: Mapping[str, str] | None = None) -> Collection:
    """Read the questions and the running Python's language reference.

    Args:
        path: `python_reference.jsonl`; one object a line: id, question, answer (null where the
            reference does not say it), variants, kind, and evidence, a list of objects with the
            topic, an anchor (a few words of the sentence) and, where all pieces are needed, the
            piece's own answer. "absent" words, which the whole reference lacks, are for tests.
        topics: Another Python's texts, as `pydoc_data.topics.topics`.

    Returns:
        Passages of at most about 120 words, with topic and title as metadata, and the questions
        whose evidence this Python's text has. The others are in `left_out`, and are logged.

    Raises:
        PromptError: The file has another form.
    """
    passages = reference_passages(_topics() if topics is None else topics)
    rows = read_lines(path, _FORM, lambda row: (str(row["id"]), _question(row, passages)))
    questions = tuple(found for _, found in rows if isinstance(found, RealQuestion))
    left_out = tuple((name, found) for name, found in rows if isinstance(found, str))
    if left_out:
        logger.warning(
            "%d of %d questions cannot be asked of Python %s's reference, whose text differs: %s",
            len(left_out),
            len(rows),
            platform.python_version(),
            ", ".join(f"{name} ({reason})" for name, reason in left_out),
        )
    return Collection(NAME, passages, questions, left_out)


def reference_passages(topics: Mapping[str, str]) -> tuple[Passage, ...]:
    """Cut the topics into passages; what several topics have in common is kept once."""
    said: set[str] = set()
    passages: list[Passage] = []
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for title, section in _sections(topics[topic], said):
            for start, end in cut(section):
                metadata = {"topic": topic, "title": title, "article": topic}
                passages.append(Passage(section[start:end], f"{topic}-{len(passages)}", metadata))
    return tuple(passages)


def _topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics

    return topics


# ---------------------------------------------------------------- the text


def _sections(topic: str, said: set[str]) -> Iterator[tuple[str, str]]:
    """Title and text of the sections that say something new."""
    marked = _UNDERLINE.sub("\n\0\\1\n", topic)
    for section in marked.split("\0"):
        first, *rest = [_unwrapped(p) for p in re.split(r"\n[ \t]*\n", section) if p.strip()] or [
            ""
        ]
        new = [p for p in rest if len(p) < _SAID or p not in said]
        if any(len(p) >= _SAID for p in new):
            said.update(new)
            yield first, "\n\n".join([first, *new])


def _unwrapped(paragraph: str) -> str:
    """A paragraph's prose on one line, a term in front of it on its own; code stays as it is."""
    lines = [line.rstrip() for line in paragraph.strip("\n").splitlines()]
    if _CODE.search(paragraph):
        return "\n".join(lines)
    for head in (0, 1):
        if all(_broken(*pair) for pair in pairwise(lines[head:])) and len(lines) > head + 1:
            prose = lines[head]
            for line in lines[head + 1 :]:
                prose += ("" if re.search(r"\w-$", prose) else " ") + line.strip()
            return "\n".join([*lines[:head], prose])
    return "\n".join(lines)


def _broken(line: str, after: str) -> bool:
    """Whether the line ends because the next word had no room, so that both are prose."""
    if not line or not after.strip():
        return False
    word = after.split()[0]
    found = re.match(r"\W*\w+-(?=\w)", word)
    space = 0 if line[-1] == "-" else 2 if line[-1] in ".!?" else 1
    return len(line) + space + len(found.group() if found else word) > _WIDTH


# ---------------------------------------------------------------- the questions


def _question(row: dict[str, Any], passages: Sequence[Passage]) -> RealQuestion | str:
    """The question with its places, or the reason why this text cannot answer it."""
    evidence, answer = row["evidence"], row["answer"]
    accepted = () if answer is None else (answer, *row["variants"])
    apart = any("answer" in piece for piece in evidence)
    places: dict[Place, None] = {}
    for piece in evidence:
        wanted = (piece["answer"],) if apart else accepted
        found = _places(passages, piece["topic"], piece["anchor"], wanted)
        if not found:
            return f"no {' or '.join(map(repr, wanted))} near {piece['anchor']!r}"
        places |= dict.fromkeys(found[:1] if apart else found)
    return RealQuestion(
        id=row["id"],
        text=row["question"],
        answers=tuple(piece["answer"] for piece in evidence) if apart else accepted,
        need="all" if apart else "any",
        places=tuple(places),
        gold=tuple(dict.fromkeys(place.passage for place in places)),
        kind=row["kind"],
    )


def _places(
    passages: Sequence[Passage], topic: str, anchor: str, answers: Sequence[str]
) -> list[Place]:
    """Where an answer stands in a sentence that the anchor touches; the topic's passages first."""
    order = sorted(range(len(passages)), key=lambda i: passages[i].metadata["topic"] != topic)
    return [
        Place(index, *span)
        for index in order
        for first, last in occurrences(passages[index].text, anchor)
        for span in _nearest(passages[index].text, first, last, answers)
    ]


def _nearest(text: str, first: int, last: int, answers: Sequence[str]) -> list[tuple[int, int]]:
    """The answer closest to the anchor at first..last, within the anchor's own sentences."""
    spans = [(s, e) for s, e in sentence_spans(text) if s < last and e > first]
    start, end = min(s for s, _ in spans), max(e for _, e in spans)
    found = [
        (begin, stop)
        for answer in answers
        for begin, stop in occurrences(text, answer)
        if start <= begin and stop <= end
    ]
    return sorted(found, key=lambda span: max(first - span[1], span[0] - last))[:1]
