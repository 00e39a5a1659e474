"""The questions about Python's reference, checked against the text of the running Python."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from draftsieve.core.errors import PromptError
from draftsieve.core.evaluation.python_reference import read_reference, reference_passages
from draftsieve.core.evaluation.realtext.collection import Collection, occurrences
from draftsieve.core.evaluation.realtext.cutting import cut
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.core.specpc.units import sentence_spans

QUESTIONS = Path(__file__).parents[1] / "examples/data/python_reference.jsonl"
ROWS: dict[str, dict[str, Any]] = {
    row["id"]: row for row in map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines())
}
COMMON = {"also", "been", "being", "does", "each", "from", "have", "into", "must", "only", "other"}
COMMON |= {"some", "such", "than", "that", "their", "them", "then", "there", "they", "this"}
COMMON |= {"what", "when", "where", "which", "with"}


@pytest.fixture(scope="module")
def reference() -> Collection:
    return read_reference(QUESTIONS)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_this_python_answers_every_question(reference: Collection) -> None:
    assert reference.left_out == ()
    assert [question.id for question in reference.questions] == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_anchors_stand_in_their_topics(name: str) -> None:
    for piece in ROWS[name]["evidence"]:
        assert flat(piece["anchor"]) in flat(topics[piece["topic"]]), piece
        assert 3 <= len(piece["anchor"].split()) <= 8


def test_answers_stand_where_the_questions_say(reference: Collection) -> None:
    for question in reference.questions:
        found = [reference.passages[p.passage].text[p.start : p.end] for p in question.places]
        if question.need == "all":
            assert tuple(found) == question.answers
        else:
            wanted = {flat(answer).casefold() for answer in question.answers}
            assert {flat(text).casefold() for text in found} <= wanted
        assert {place.passage for place in question.places} == set(question.gold)


def test_what_is_asked_is_spread_over_the_reference(reference: Collection) -> None:
    kinds = Counter(question.kind for question in reference.questions)
    assert sum(kinds.values()) == 120
    assert kinds["unanswerable"] == 20
    assert kinds["paraphrased"] >= 40
    assert kinds["twice"] + kinds["both"] >= 15
    assert len({piece["topic"] for row in ROWS.values() for piece in row["evidence"]}) >= 40
    for question in reference.questions:
        pieces = {"unanswerable": 0, "both": 2}.get(question.kind)
        assert pieces is None or len(question.places) == pieces
        assert question.kind != "twice" or len(question.places) >= 2
        assert bool(question.answers) == (question.kind != "unanswerable")


def test_paraphrased_questions_share_no_word_with_their_evidence(reference: Collection) -> None:
    for question in reference.questions:
        if question.kind != "paraphrased":
            continue
        asked = set(re.findall(r"\w{4,}", question.text.casefold())) - COMMON
        for place in question.places:
            text = reference.passages[place.passage].text
            spans = [(s, e) for s, e in sentence_spans(text) if s <= place.start < e]
            said = set(re.findall(r"\w{4,}", text[slice(*spans[0])].casefold()))
            assert not asked & said, question.id


def test_words_find_the_plain_questions_and_not_the_paraphrased(reference: Collection) -> None:
    texts = [passage.text for passage in reference.passages]
    found: dict[str, list[bool]] = {"plain": [], "paraphrased": []}
    for question in reference.questions:
        if question.kind in found:
            scores = bm25(question.text, texts)
            best = sorted(range(len(texts)), key=lambda i: -scores[i])[:5]
            found[question.kind].append(not set(question.gold).isdisjoint(best))
    assert sum(found["plain"]) >= 0.9 * len(found["plain"])
    assert sum(found["paraphrased"]) <= 0.2 * len(found["paraphrased"])


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row["answer"] is None])
def test_the_reference_says_nothing_of_unanswerable_questions(name: str) -> None:
    assert ROWS[name]["absent"]
    for term in ROWS[name]["absent"]:
        assert not any(term in flat(text) for text in topics.values()), term


# ---------------------------------------------------------------- other texts


def test_a_changed_text_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    changed = {name: text.replace("null operation", "no-op") for name, text in topics.items()}
    found = read_reference(QUESTIONS, changed)
    assert [name for name, _ in found.left_out] == ["empty-body"]
    assert "is a null operation" in found.left_out[0][1]
    assert len(found.questions) == 119
    assert "1 of 120 questions" in caplog.text
    assert "empty-body" in caplog.text


def test_an_answer_that_left_the_sentence_is_noticed() -> None:
    changed = {**topics, "power": topics["power"].replace("ZeroDivisionError", "ArithmeticError")}
    changed["operator-summary"] = changed["power"]
    left_out = dict(read_reference(QUESTIONS, changed).left_out)
    assert "ZeroDivisionError" in left_out["zero-to-negative-power"]


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "x", "question": "Why?"}\n', encoding="utf-8")
    with pytest.raises(PromptError, match=r"Line 1 of .* is not a question about the reference"):
        read_reference(path)


TOPIC = """The "blorp" statement
*********************

   blorp_stmt ::= "blorp" [name]

The "blorp" statement calls the nearest blorp of the program and waits
until it has answered.  A blorp that is not there raises a self-
explaining error.  For example:

   blorp one
   blorp two

blorp.here
   Tells whether the blorp is near.


Older blorps
============

Said once, said well enough for all the topics that come to repeat it.
"""


def test_prose_is_unwrapped_and_code_is_not() -> None:
    first, second = reference_passages({"blorp": TOPIC})
    assert first.text.splitlines() == [
        'The "blorp" statement',
        "",
        '   blorp_stmt ::= "blorp" [name]',
        "",
        'The "blorp" statement calls the nearest blorp of the program and waits until it has '
        "answered.  A blorp that is not there raises a self-explaining error.  For example:",
        "",
        "   blorp one",
        "   blorp two",
        "",
        "blorp.here",
        "   Tells whether the blorp is near.",
    ]
    assert first.metadata["title"] == 'The "blorp" statement'
    assert second.metadata == {"topic": "blorp", "title": "Older blorps", "article": "blorp"}


def test_what_topics_repeat_is_kept_once() -> None:
    longer = TOPIC + "\n\nNewer blorps\n============\n\n" + "They blorp in a way of their own. " * 3
    passages = reference_passages({"all-blorps": longer, "blorp": TOPIC})
    assert [p.metadata["topic"] for p in passages] == ["blorp", "blorp", "all-blorps"]
    assert passages[-1].text.startswith("Newer blorps")


def test_passages_of_the_reference_are_short_and_lose_nothing(reference: Collection) -> None:
    sizes = sorted(len(passage.text.split()) for passage in reference.passages)
    assert sizes[len(sizes) // 2] >= 70
    assert sum(size > 120 for size in sizes) <= 0.02 * len(sizes)
    assert len({passage.id for passage in reference.passages}) == len(sizes)
    kept = flat(" ".join(passage.text for passage in reference.passages)).replace(" ", "")
    for topic in topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            if len(paragraph) > 80 and not re.search(r"[*=\-^~]{3}$", paragraph, re.MULTILINE):
                assert re.sub(r"\s", "", paragraph) in kept


# ---------------------------------------------------------------- cutting


def test_cuts_fall_between_paragraphs_then_sentences() -> None:
    text = "One two three.\n\nFour five. Six seven eight nine. Ten.\n\n  Eleven twelve."
    parts = [text[start:end] for start, end in cut(text, 5)]
    assert parts == ["One two three.\n\nFour five.", "Six seven eight nine. Ten.", "Eleven twelve."]
    assert [text[start:end] for start, end in cut(text, 100)] == [text]
    assert cut(" \n\n ", 5) == []


def test_phrases_are_found_as_words_whatever_their_spaces() -> None:
    text = "Fourteen and 14 are more than\n  4, and FOUR is 4."
    assert [text[s:e] for s, e in occurrences(text, "than 4")] == ["than\n  4"]
    assert [text[s:e] for s, e in occurrences(text, "four")] == ["FOUR"]
    assert len(list(occurrences(text, "4"))) == 2
    assert list(occurrences(text, " ")) == []
