"""Kinds of real questions: two passages at once, sentences that lean on others, conversations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from draftsieve.core.evaluation.answer_words import words_kept
from draftsieve.core.evaluation.baselines import ranked_sentences
from draftsieve.core.evaluation.metrics import survival
from draftsieve.core.evaluation.puzzles import NOT_FOUND
from draftsieve.core.evaluation.realtext.collection import Collection
from draftsieve.core.evaluation.realtext.contexts import Around, real_items
from draftsieve.core.evaluation.realtext.leaning import LEANING, STANDING, leans
from draftsieve.core.evaluation.realtext.rankings import rankings
from draftsieve.core.evaluation.realtext.sets import SETS, read_set
from draftsieve.core.evaluation.realtext.suites import PUBLISHED, make_suite
from draftsieve.core.evaluation.tasks import EvalItem, Turn

ISLANDS = {"Onda": "nine", "Holm": "ten", "Vell": "six", "Sirre": "two", "Tarn": "four"}


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five islands in the form of Natural Questions; Tarn's answer stands in two places."""
    rows = [
        {
            "question": f"how many quays has {name}",
            "answers": [f"{count} quays", count] if name != "Tarn" else [count],
            "title": name,
            "text": f"{name} lies far out. It has {count} quays."
            + (" All four are full." if name == "Tarn" else ""),
        }
        for name, count in ISLANDS.items()
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / SETS["nq"].file).write_text(lines, encoding="utf-8")
    return tmp_path


def items(collection: Collection, length: int = 60) -> list[EvalItem]:
    return real_items(collection, Around("random", length, rankings()["random"]), words)


# ---------------------------------------------------------------- two passages


def test_pairs_need_what_two_passages_say(folder: Path) -> None:
    found = read_set("nq-pairs", folder)
    assert len(found.questions) == 2  # of five, one has two places
    for question in found.questions:
        first, second = question.answers
        assert question.need == "all"
        assert len(set(question.gold)) == 2
        texts = [found.passages[place.passage].text for place in question.places]
        assert [t[p.start : p.end] for t, p in zip(texts, question.places, strict=True)] == [
            first,
            second,
        ]
        assert first in texts[0]
        assert " quays has " in question.text
        assert "Tarn" not in question.text
    assert read_set("nq-pairs", folder) == found
    for item in items(found):
        whole = tuple(((0, len(text)),) for text in item.passages)
        assert survival(item, whole) == (True, True)
        for gold in {evidence.value.passage for evidence in item.evidence}:
            without = tuple(() if i == gold else spans for i, spans in enumerate(whole))
            assert survival(item, without) == (False, False)


def test_sets_made_of_others_are_asked_for_by_name(folder: Path) -> None:
    assert "nq-pairs" in SETS
    assert "nq-pairs" not in PUBLISHED
    assert set(SETS) - set(PUBLISHED) == {"nq-pairs"}
    assert [c.name for c in make_suite(["nq", "nq-pairs"], folder).collections] == [
        "nq",
        "nq-pairs",
    ]


# ---------------------------------------------------------------- leaning sentences


@pytest.mark.parametrize(
    ("sentence", "leaning"),
    [
        ("It has nine quays.", True),
        ("These were built later.", True),
        ('"Their" quays are old.', True),
        ("Onda has nine quays.", False),
        ("Thesis and theory differ.", False),
        ("Item by item it was sold.", False),
        ("Diese Stadt hat neun Kais.", True),
        ("Die Stadt hat neun Kais.", False),
        ("Sie hat neun Kais.", True),
        ("它有九个码头。", True),
        ("这座城市有九个码头。", True),
        ("城市有九个码头。", False),
        ("...", False),
        ("", False),
    ],
)
def test_a_sentence_leans_by_its_first_word(sentence: str, leaning: bool) -> None:
    assert leans(sentence) is leaning


def test_items_say_whether_what_answers_them_leans(folder: Path) -> None:
    path = folder / SETS["nq"].file
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.append({"question": "who", "answers": ["Mara"], "title": "M", "text": "Mara sails."})
    both = "Onda's quays, nine of them, are new."
    rows.append({"question": "how many", "answers": ["nine"], "title": "N", "text": both})
    text = "They number nine. Nine is enough."
    rows.append({"question": "enough", "answers": ["nine"], "title": "E", "text": text})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    kinds = {item.question: item.kind for item in items(read_set("nq", folder))}
    assert kinds["how many quays has Onda"] == LEANING
    assert kinds["who"] == STANDING
    assert kinds["enough"] == STANDING  # one of two places is enough
    pairs = items(read_set("nq-pairs", folder))
    assert {item.kind for item in pairs if "(1) who?" not in item.question} == {LEANING}


def test_neighbours_are_scored_and_not_taken() -> None:
    texts = ["Onda is old. It has quays. Fog is rare.", "Rain falls."]
    seen: list[str] = []

    def score(question: str, shown: Any) -> list[float]:
        seen.extend(shown)
        return [float("Onda" in text and "quays" in text and "rare" in text) for text in shown]

    kept = ranked_sentences("?", texts, 3, words, score, neighbours=1)
    assert seen == ["Onda is old. It has quays.", texts[0], "It has quays. Fog is rare.", texts[1]]
    assert kept == (((13, 26),), ())
    seen.clear()
    ranked_sentences("?", texts, 3, words, score)
    assert seen == ["Onda is old.", "It has quays.", "Fog is rare.", "Rain falls."]


# ---------------------------------------------------------------- conversations

TALK = {
    "task_id": "t<::>2",
    "contexts": [
        {"document_id": "a", "text": "The ferry sails at dawn. The crew sleeps on board."},
        {"document_id": "b", "text": "The harbour is deep."},
    ],
    "input": [
        {"speaker": "user", "text": "Is there a ferry?"},
        {"speaker": "agent", "text": "Yes."},
        {"speaker": "user", "text": "When?"},
    ],
    "targets": [{"speaker": "agent", "text": "The ferry departs at dawn, with the crew on board."}],
    "answerability": ["ANSWERABLE"],
}


def talk(folder: Path, **changed: Any) -> EvalItem:
    path = folder / SETS["mtrag"].file
    path.write_text(json.dumps({**TALK, **changed}), encoding="utf-8")
    (item,) = items(read_set("mtrag", folder))
    return item


def test_turns_say_what_they_are_to_the_conversation(tmp_path: Path) -> None:
    assert talk(tmp_path).kind == "answerable"
    assert talk(tmp_path, **{"Multi-Turn": ["Follow-up"]}).kind == "answerable, follow-up"
    assert talk(tmp_path, **{"Multi-Turn": ["N/A"]}).kind == "answerable, alone"
    assert talk(tmp_path).said_by_user == "Is there a ferry?\nWhen?"


def test_words_of_a_free_answer_are_counted_by_how_rare_they_are(tmp_path: Path) -> None:
    item = talk(tmp_path)
    ferry = next(i for i, text in enumerate(item.passages) if "ferry" in text)

    def kept(*spans: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(spans if i == ferry else () for i in range(len(item.passages)))

    # "ferry" was said before, "departs" and "with" stand nowhere; three sentences
    once, thrice = math.log(1 + 2.5 / 1.5), math.log(1 + 0.5 / 3.5)
    weights = {"dawn": once, "at": once, "crew": once, "on": once, "board": once, "the": thrice}
    total = sum(weights.values())
    first, second = (0, 24), (25, len(item.passages[ferry]))
    assert words_kept(item, kept(first, second)) == pytest.approx(1)
    assert words_kept(item, kept(first)) == pytest.approx(
        (weights["dawn"] + weights["at"] + weights["the"]) / total
    )
    assert words_kept(item, kept()) == 0
    assert words_kept(item, kept((0, 3))) == pytest.approx(weights["the"] / total)


def test_words_are_not_counted_where_characters_are_marked(tmp_path: Path, folder: Path) -> None:
    for item in items(read_set("nq", folder)):
        assert words_kept(item, tuple(((0, 5),) for _ in item.passages)) is None
    refused = talk(tmp_path, answerability=["UNANSWERABLE"])
    assert refused.answers == (NOT_FOUND,)
    assert words_kept(refused, tuple(((0, 5),) for _ in refused.passages)) is None
    aside = talk(tmp_path, targets=[{"speaker": "agent", "text": "Perhaps tomorrow."}])
    assert words_kept(aside, tuple(((0, 5),) for _ in aside.passages)) is None


def test_the_users_turns_are_apart_from_the_answers() -> None:
    turns = (Turn("user", "Onda?"), Turn("assistant", "An island."))
    item = EvalItem("i", "m/x", 9, "When?", ("a",), ("b",), "any", (), None, turns=turns)
    assert item.said_by_user == "Onda?\nWhen?"
