"""Generated tasks: each is checked against its own passages, by other means than it was made."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from draftsieve.core.errors import ConfigError, PromptError
from draftsieve.core.evaluation.metrics import Score, normalised, score_answer, survival, word_f1
from draftsieve.core.evaluation.puzzles import NOT_FOUND, TASKS, attributes, natural_sentences
from draftsieve.core.evaluation.squad import AcceptedAnswer, Article, Question, read_article
from draftsieve.core.evaluation.tasks import EvalItem, Place, make_item, make_items, natural_items
from draftsieve.core.evaluation.world import names
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.core.types import Segment

from .adapters_fixtures import tiny_compressor

WORLD = Path(__file__).parents[1] / "core" / "evaluation" / "world"


@cache
def article() -> Article:
    """Paragraphs of invented text, each with a question that has two accepted answers."""
    paragraphs = tuple(
        f"The port of {name} lies north. Its pilot {name} Orr has {n} boats. Few go there."
        for n, name in enumerate(["Onda", "Holm", "Vell", "Sirre", "Tarn", "Mola", "Rill", "Esk"])
    )
    questions = []
    for place, text in enumerate(paragraphs):
        name = text.split()[3]
        answers = []
        for said in (f"{name} Orr", "Orr"):
            start = text.index(said)
            answers.append(AcceptedAnswer(said, start, start + len(said)))
        questions.append(Question(name, f"Who is the pilot of {name}?", place, tuple(answers)))
    return Article(paragraphs, tuple(questions))


def words(text: str) -> int:
    return len(text.split())


def item_of(task: str, number: int = 0, length: int = 250) -> EvalItem:
    return make_item(task, length, number, words, seed=7)


def read(item: EvalItem, place: Place) -> str:
    return item.passages[place.passage][place.start : place.end]


def sentences_of(item: EvalItem) -> list[str]:
    return [part for text in item.passages for part in re.split(r"(?<=[.?!]) ", text)]


def asked_entity(item: EvalItem) -> tuple[str, list[str]]:
    """Who is asked about, and all statements that would answer the question, as patterns."""
    found: list[tuple[str, list[str]]] = []
    for attribute in (attribute for kind in attributes().values() for attribute in kind):
        for form in (*attribute.questions, *attribute.distant):
            if match := re.fullmatch(re.escape(form).replace(r"\{e\}", "(.+)"), item.question):
                found.append((match[1], attribute.statements))
    assert found, item.question
    entity, statements = min(found, key=lambda pair: len(pair[0]))
    forms = [re.escape(statement.replace("{e}", entity)) for statement in statements]
    return entity, [form.replace(r"\{v\}", ".+") for form in forms]


def stating(item: EvalItem, forms: list[str]) -> list[str]:
    return [s for s in sentences_of(item) if any(re.fullmatch(form, s) for form in forms)]


# ---------------------------------------------------------------- all tasks


@pytest.mark.parametrize("task", TASKS)
def test_items_fill_their_length_and_are_seeded(task: str) -> None:
    for number in range(3):
        item = item_of(task, number)
        size = words(" ".join(f"[{i}] {text}" for i, text in enumerate(item.passages)))
        assert 200 <= size + words(item.question) + 1 <= 250
        assert item == item_of(task, number)
        assert all(text.strip() == text and text for text in item.passages)
    assert item_of(task).passages != make_item(task, 250, 0, words, seed=8).passages


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"frequent-words", "unanswerable"}))
def test_evidence_marks_the_answers(task: str) -> None:
    for number in range(3):
        item = item_of(task, number)
        values = [read(item, evidence.value) for evidence in item.evidence]
        for evidence in item.evidence:
            assert read(item, evidence.value) in read(item, evidence.sentence)
        if task == "which-passage":
            assert item.answers == (f"[{item.evidence[0].value.passage + 1}]",)
        else:
            assert set(item.answers) <= set(values)
        if task not in ("two-hop", "three-hop"):
            assert len(values) == max(len(item.answers), 1)
        assert item.depth is not None
        assert 0 <= item.depth <= 1


@pytest.mark.parametrize("task", ["two-hop", "unanswerable"])
def test_items_come_back_from_json(task: str) -> None:
    item = item_of(task)
    assert EvalItem.from_json(json.loads(json.dumps(item.as_json()))) == item


def test_tasks_are_taken_in_turn() -> None:
    items = make_items(["one-key", "two-hop"], 150, 5, words)
    assert [item.task for item in items] == ["one-key", "two-hop", "one-key", "two-hop", "one-key"]
    assert len({item.id for item in items}) == 5
    assert items[0] == make_items(["one-key"], 150, 1, words)[0]


def test_needles_stand_at_all_depths() -> None:
    depths = sorted(item_of("many-keys", n, length=900).depth or 0.0 for n in range(10))
    assert depths == pytest.approx([(place + 0.5) / 10 for place in range(10)], abs=0.09)
    assert [item_of("many-keys", n, length=900).depth for n in range(10)] != depths


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigError, match="no task \\['nothing'\\]"):
        make_items(["one-key", "nothing"], 200, 1, words)
    with pytest.raises(ConfigError, match="length=9 cannot hold"):
        make_item("three-hop", 9, 0, words)


# ---------------------------------------------------------------- one by one


@pytest.mark.parametrize("task", ["one-key", "many-keys", "all-values"])
def test_the_asked_fact_is_stated_once_a_value(task: str) -> None:
    for number in range(4):
        item = item_of(task, number)
        entity, forms = asked_entity(item)
        stated = stating(item, forms)
        assert len(stated) == len(item.answers)
        assert all(any(answer in sentence for sentence in stated) for answer in item.answers)
        assert all(entity in sentence for sentence in stated)


def test_many_keys_hide_the_fact_among_its_like() -> None:
    item = item_of("many-keys")
    entity, forms = asked_entity(item)
    others = [form.replace(re.escape(entity), ".+") for form in forms]
    assert len(stating(item, others)) >= 6


@pytest.mark.parametrize("number", range(4))
def test_unanswerable_questions_have_no_answer_in_the_passages(number: int) -> None:
    item = item_of("unanswerable", number)
    _, forms = asked_entity(item)
    assert not stating(item, forms)
    assert item.answers == (NOT_FOUND,)
    assert item.evidence == ()
    assert item.depth is None


@pytest.mark.parametrize(("task", "hops"), [("two-hop", 2), ("three-hop", 3)])
def test_chains_lead_from_the_question_to_the_answer(task: str, hops: int) -> None:
    for number in range(4):
        item = item_of(task, number)
        values = [read(item, evidence.value) for evidence in item.evidence]
        sentences = [read(item, evidence.sentence) for evidence in item.evidence]
        assert len(values) == hops
        assert (values[-1],) == item.answers
        named = re.findall(r"[A-Z]\w+", sentences[0])
        assert any(name in item.question for name in named)
        for before, after in zip(values, sentences[1:], strict=False):
            assert before in after
        assert not any(value in item.question for value in values)
        assert item.question.count(" of ") >= hops - 1


def test_variables_resolve_to_the_answer() -> None:
    item = item_of("variables")
    held: dict[str, str] = {}
    for name, other, number in re.findall(
        r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", " ".join(item.passages)
    ):
        held[name] = number or other
    wanted = re.findall(r"\d+", item.question)[0]
    found = set()
    for name in held:
        value = name
        while value in held:
            value = held[value]
        if value == wanted:
            found.add(name)
    assert found == set(item.answers)
    assert len(found) == 4


def test_frequent_words_are_the_most_frequent() -> None:
    item = item_of("frequent-words")
    counted = Counter(re.findall(r"\w+", " ".join(item.passages).replace("List:", "")))
    best = counted.most_common(4)
    assert {word for word, _ in best[:3]} == set(item.answers)
    assert best[2][1] >= 2 * best[3][1]


def test_quotations_go_on_as_the_passages_do() -> None:
    item = item_of("quotation")
    begun = re.findall(r'"(.+) \.\.\."', item.question)[0]
    assert f"{begun} {item.answers[0]}" in " ".join(item.passages)
    assert len(item.answers[0].split()) >= 2


# ---------------------------------------------------------------- the world


def test_names_are_held_out_of_training() -> None:
    item = item_of("many-keys")
    entity, _ = asked_entity(item)
    roots = [w for w in entity.split() if w.lower() not in _common_words() and w.isalpha()]
    assert roots
    assert all(names.is_held_out(root) for root in roots)
    assert [names.is_held_out(root) for root in ("Lomeron", "Tavik")] == [False, True]


def _common_words() -> set[str]:
    lists = ("projects", "companies", "devices", "places")
    return {word.lower() for name in lists for word in names.words(name)}


def test_natural_sentences_are_many_and_distinct() -> None:
    sentences = natural_sentences()
    assert len(sentences) == len(set(sentences)) == 600
    assert all(7 <= words(sentence) <= 15 for sentence in sentences)


# ---------------------------------------------------------------- prompts


def test_the_question_stands_before_or_behind_the_passages() -> None:
    encoder = tiny_compressor().encoder
    behind = make_item("one-key", 60, 0, words)
    before = make_item("one-key", 60, 0, words, question_first=True)
    assert before.passages == behind.passages
    assert before.id != behind.id
    for item, first in ((behind, False), (before, True)):
        tokens = encoder.encode(item.prompt())
        question = (tokens.segment == int(Segment.QUESTION)).nonzero()
        passages = (tokens.segment == int(Segment.PASSAGE)).nonzero()
        assert len(question)
        assert bool(question.max() < passages.min()) is first
        kept = item.prompt().with_texts([""] * len(item.passages))
        assert item.question in tiny_compressor().tokenizer.decode(encoder.encode(kept).ids)


def test_natural_items_mark_answers_and_sentences() -> None:
    items = natural_items(article(), 40, 6, words, bm25, seed=1)
    assert len({item.id for item in items}) == 6
    for item in items:
        assert item.need == "any"
        assert {read(item, e.value) for e in item.evidence} == set(item.answers)
        for evidence in item.evidence:
            assert read(item, evidence.value) in read(item, evidence.sentence)
            assert len(read(item, evidence.sentence)) > evidence.value.end - evidence.value.start
        assert sum(map(words, item.passages)) <= 40


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": [{"paragraphs": [{"qas": []}]}]}', "no"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(PromptError, match=r"data\.json' is not in SQuAD's format"):
        read_article(path)


# ---------------------------------------------------------------- metrics


def made(answers: tuple[str, ...], need: str = "all") -> EvalItem:
    return EvalItem("i", "t", 9, "q?", ("some text",), answers, need, (), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "correct", "recall"),
    [
        ("Holm", True, 1.0),
        (" the holm. ", True, 1.0),
        ("It is Holm", False, 1.0),
        ("Hol", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_single_answers(said: str, correct: bool, recall: float) -> None:
    score = score_answer(made(("Holm",)), said)
    assert (score.correct, score.recall) == (correct, recall)


@pytest.mark.parametrize(
    ("said", "correct", "recall"),
    [
        ("4,500 crowns, Holm and Room 7", True, 1.0),
        ("Room 7, 4,500 crowns, Holm", True, 1.0),
        ("Holm, Room 7", False, 2 / 3),
        ("4,500 crowns, Holm, Room 7, Rill", False, 1.0),
        ("Holm, Holm, Room 7", False, 2 / 3),
    ],
)
def test_several_answers_in_any_order(said: str, correct: bool, recall: float) -> None:
    score = score_answer(made(("Holm", "Room 7", "4,500 crowns")), said)
    assert (score.correct, score.recall) == (correct, pytest.approx(recall))


def test_alternatives_count_by_squads_measures() -> None:
    item = made(("the Denver Broncos", "Broncos"), "any")
    assert score_answer(item, "Denver Broncos!").correct
    assert score_answer(item, "the Broncos").f1 == 1.0
    close = score_answer(item, "Broncos team")
    assert (close.correct, close.recall) == (False, 1.0)
    assert close.f1 == pytest.approx(2 / 3)
    assert word_f1("", "") == 1.0
    assert word_f1("x", "") == 0.0


def test_answers_to_chains_may_name_the_way() -> None:
    item = replace(made(("Room 7",)), task="two-hop")
    for said in ("Room 7", "Mara Velint: Room 7", "Holm: Mara Velint: the Room 7."):
        assert score_answer(item, said) == Score(True, 1.0, 1.0)
    assert not score_answer(item, "Room 7: Mara Velint").recall
    assert not score_answer(made(("Room 7",)), "Mara Velint: Room 7").correct


def test_passage_numbers_keep_their_brackets() -> None:
    assert score_answer(made(("[1]",)), "[1]").correct
    assert not score_answer(made(("[1]",)), "[12]").correct
    assert normalised('"The Lamp".') == "lamp"


def test_survival_needs_all_or_any_of_the_evidence() -> None:
    item = item_of("two-hop")
    whole = tuple(((0, len(text)),) for text in item.passages)
    assert survival(item, whole) == (True, True)
    first = item.evidence[0].value
    kept = list[tuple[tuple[int, int], ...]]([()] * len(item.passages))
    kept[first.passage] = ((first.start, first.end),)
    assert survival(item, tuple(kept)) == (False, False)
    natural = natural_items(article(), 40, 1, words, bm25)[0]
    value = natural.evidence[0].value
    kept = [()] * len(natural.passages)
    kept[value.passage] = ((value.start, value.end),)
    assert survival(natural, tuple(kept)) == (True, False)
    assert survival(item_of("unanswerable"), whole) is None
