"""Intervals, baselines and answer survival, on cases worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from draftsieve.core.compressor import Compressor
from draftsieve.core.config import SpecPC
from draftsieve.core.evaluation.baselines import (
    Kept,
    kept_text,
    kept_tokens,
    random_sentences,
    ranked_passages,
    ranked_sentences,
    truncation_head,
)
from draftsieve.core.evaluation.intervals import paired_difference, wilson
from draftsieve.core.evaluation.squad import (
    AcceptedAnswer,
    Article,
    Question,
    build_items,
    read_article,
    sample_questions,
)
from draftsieve.core.evaluation.survival import (
    compression,
    measure,
    survives_as_text,
    survives_at_offset,
)
from draftsieve.core.evaluation.tasks import EvalItem, Place, evidence_around

from .adapters_fixtures import QUESTION, TEXTS, tiny_model, tiny_tokenizer


@pytest.fixture
def article() -> Article:
    """Forty paragraphs of invented text, with two questions each."""
    paragraphs, questions = [], []
    for n in range(40):
        text = f"Boat {n} has {n} sails. Its captain {n} comes from port {n % 7}."
        for answer in (f"{n} sails", f"port {n % 7}"):
            start = text.index(answer)
            accepted = AcceptedAnswer(answer, start, start + len(answer))
            questions.append(Question(f"{n}-{start}", f"What of boat {n}?", n, (accepted,)))
        paragraphs.append(text)
    return Article(tuple(paragraphs), tuple(questions))


def words(text: str) -> int:
    return len(text.split())


def common_words(question: str, texts: list[str] | tuple[str, ...]) -> list[float]:
    asked = set(question.lower().split())
    return [float(len(asked & set(text.lower().split()))) for text in texts]


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_matches_published_values(
    successes: int, total: int, low: float, high: float
) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_refuses_more_successes_than_items() -> None:
    with pytest.raises(ValueError, match="between 0 and 3"):
        wilson(4, 3)


def test_paired_difference_is_centred_and_seeded() -> None:
    first, second = [True] * 60 + [False] * 40, [True] * 40 + [False] * 60
    gap, low, high = paired_difference(first, second, seed=1)
    assert gap == pytest.approx(0.2)
    # 20 of 100 items differ, all in favour of the first: sd = sqrt(0.2 * 0.8 / 100) = 0.04
    assert low == pytest.approx(0.2 - 1.96 * 0.04, abs=0.02)
    assert high == pytest.approx(0.2 + 1.96 * 0.04, abs=0.02)
    assert (gap, low, high) == paired_difference(first, second, seed=1)


def test_paired_difference_of_equal_outcomes_is_exactly_zero() -> None:
    assert paired_difference([True, False], [True, False]) == (0.0, 0.0, 0.0)


def test_paired_difference_needs_pairs() -> None:
    with pytest.raises(ValueError, match="same number of items"):
        paired_difference([True], [])


# ---------------------------------------------------------------- baselines


SENTENCES = ["Ann saw Bob. Carl met Dora today.", "Eve left."]


def test_kept_text_marks_gaps_but_not_white_space() -> None:
    text = "A b. C d. E f."
    assert kept_text(text, [(10, 14), (0, 4)]) == "A b. … E f."
    assert kept_text(text, [(0, 4), (5, 9)]) == "A b. C d."
    assert kept_tokens([text, "x"], (((0, 4), (10, 14)), ()), words) == 5


def test_ranked_sentences_take_the_best_and_pass_over_what_does_not_fit() -> None:
    question = "whom has carl met today ? eve"  # the sentences score 0, 3 (carl met + today.), 1
    best = ranked_sentences("carl met", SENTENCES, 4, words, common_words)
    assert best == (((13, 33),), ())
    assert ranked_sentences(question, SENTENCES, 6, words, common_words) == (((13, 33),), ((0, 9),))
    # 3 words: the best sentence (4 words) is passed over, the next one taken
    assert ranked_sentences(question, SENTENCES, 3, words, common_words) == ((), ((0, 9),))


def test_ranked_sentences_within_the_whole_keep_everything() -> None:
    assert ranked_sentences("x", SENTENCES, 9, words, common_words) == (((0, 33),), ((0, 9),))


def test_ranked_passages_keep_whole_texts() -> None:
    assert ranked_passages("eve", SENTENCES, 8, words, common_words) == ((), ((0, 9),))
    assert ranked_passages("carl", SENTENCES, 8, words, common_words) == (((0, 33),), ())


def test_truncation_cuts_inside_the_text_where_the_budget_ends() -> None:
    assert truncation_head(["a b c", "d e f", "g"], 4, words) == (((0, 5),), ((0, 2),), ())
    assert truncation_head(["a b c", "d"], 0, words) == ((), ())
    assert truncation_head(["a b c", "d"], 9, words) == (((0, 5),), ((0, 1),))


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 6, 9])
def test_no_baseline_exceeds_its_budget(budget: int) -> None:
    for kept in (
        ranked_sentences("carl", SENTENCES, budget, words, common_words),
        ranked_passages("carl", SENTENCES, budget, words, common_words),
        random_sentences(SENTENCES, budget, words, 3),
        truncation_head(SENTENCES, budget, words),
    ):
        assert kept_tokens(SENTENCES, kept, words) <= budget


def test_random_sentences_depend_on_the_seed_alone() -> None:
    texts = [" ".join(f"Word{i} here." for i in range(30))]
    assert random_sentences(texts, 10, words, 1) == random_sentences(texts, 10, words, 1)
    assert random_sentences(texts, 10, words, 1) != random_sentences(texts, 10, words, 2)


# ---------------------------------------------------------------- data


def test_read_article_trims_answers_and_skips_unanswerable_questions(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "who?", "answers": [{"text": " Bob ", "answer_start": 4}]},
        {"id": "2", "question": "why?", "answers": []},
    ]
    path = tmp_path / "article.json"
    content = {"data": [{"title": "t", "paragraphs": [{"context": "It's Bob .", "qas": asked}]}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    article = read_article(path)
    assert article.questions == (Question("1", "who?", 0, (AcceptedAnswer("Bob", 5, 8),)),)


def test_samples_are_seeded_and_in_order(article: Article) -> None:
    chosen = sample_questions(article, 20, seed=5)
    assert chosen == sample_questions(article, 20, seed=5)
    assert len(chosen) == 20
    places = [article.questions.index(question) for question in chosen]
    assert places == sorted(places)
    assert sample_questions(article, 10_000) == article.questions


def test_items_hold_the_gold_paragraph_and_the_best_that_fit() -> None:
    paragraphs = ("gold a b", "blue c", "blue blue sky d e", "blue sky", "f g")
    question = Question("q", "blue sky", 0, (AcceptedAnswer("gold", 0, 4),))
    article = Article(paragraphs, (question,))
    (item,) = build_items(article, [question], common_words, words, max_tokens=7)
    # 3 words are the gold's; by score: "blue blue sky d e" (5) does not fit, "blue sky" does,
    # then "blue c" fits, then nothing more
    assert {p.text for p in item.passages} == {"gold a b", "blue sky", "blue c"}
    assert item.passages[item.gold].text == "gold a b"
    assert {p.id for p in item.passages} == {"0", "1", "3"}
    assert [item] == build_items(article, [question], common_words, words, max_tokens=7)


def test_the_gold_paragraph_moves_about(article: Article) -> None:
    items = build_items(article, article.questions[:30], common_words, words, max_tokens=90)
    assert len({item.gold for item in items}) > 3


# ---------------------------------------------------------------- survival


def item(
    answers: list[AcceptedAnswer],
    text: str = "The Onda Rowers won. Onda lost.",
    need: Literal["any", "all"] = "any",
) -> EvalItem:
    """A question about the second of two passages."""
    texts = ("Onda Rowers", text)
    evidence = tuple(evidence_around(texts, Place(1, a.start, a.end)) for a in answers)
    said = tuple(answer.text for answer in answers)
    return EvalItem("i", "sport/all", 9, "Who won?", texts, said, need, evidence, None)


ROWERS = AcceptedAnswer("Onda Rowers", 4, 15)


@pytest.mark.parametrize(
    ("kept", "at_offset", "as_text"),
    [
        (((), ((0, 20),)), True, True),
        (((), ((4, 15),)), True, True),
        (((), ((4, 8), (9, 15))), True, True),  # only the space between is missing
        (((), ((4, 8), (10, 15))), False, False),
        (((), ((4, 14),)), False, False),
        ((((0, 11),), ()), False, False),  # the words stand in the wrong passage
        (((), ()), False, False),
    ],
)
def test_survival_of_one_answer(kept: Kept, at_offset: bool, as_text: bool) -> None:
    assert survives_at_offset(item([ROWERS]), kept) is at_offset
    assert survives_as_text(item([ROWERS]), kept) is as_text


def test_another_occurrence_counts_as_text_only() -> None:
    onda = AcceptedAnswer("onda", 4, 8)
    kept = ((), ((21, 31),))  # "Onda lost."
    assert not survives_at_offset(item([onda]), kept)
    assert survives_as_text(item([onda]), kept)


def test_one_accepted_answer_is_enough_unless_all_are_needed() -> None:
    answers = [ROWERS, AcceptedAnswer("lost", 26, 30)]
    for kept in (((), ((21, 31),)), ((), ((0, 20),))):
        for survives in (survives_at_offset, survives_as_text):
            assert survives(item(answers), kept)
            assert not survives(item(answers, need="all"), kept)
            assert survives(item(answers, need="all"), ((), ((0, 31),)))


def test_measure_reports_sizes_and_outcomes() -> None:
    items = [item([ROWERS]), item([AcceptedAnswer("lost", 26, 30)])]
    outcome = measure("head", lambda _, budget: ((), ((0, 20),)), items, [4, 4], words)
    assert outcome.at_offset == (True, False)
    assert outcome.as_text == (True, False)
    assert outcome.kept_tokens == (4, 4)
    assert outcome.passage_tokens == (8, 8)
    assert outcome.share == pytest.approx(0.5)


def test_measure_of_nothing_is_empty() -> None:
    outcome = measure("none", lambda *_: (), [], [], words)
    assert outcome.at_offset == ()
    assert outcome.share == 0.0


@pytest.mark.parametrize("unit", ["token", "sentence"])
def test_a_compressor_is_a_method_and_its_size_is_that_of_the_prompt(unit: str) -> None:
    compressor = Compressor(tiny_model(32, seed=3), tiny_tokenizer())
    passages = tuple(TEXTS)
    evidence = (evidence_around(passages, Place(0, 28, 33)),)
    asked = EvalItem("i", "x/all", 9, QUESTION, passages, ("seven",), "any", evidence, None)
    options = SpecPC(ratio=0.5, unit=unit, window_size=16)  # type: ignore[arg-type]
    method = compression(compressor, options)
    outcome = measure("x", method, [asked], [0], compressor.count_tokens)
    stats = compressor.compress(QUESTION, passages, options).stats
    assert stats.compressed
    # a passage's first token may merge with the space after its number in the prompt
    assert abs(outcome.kept_tokens[0] - stats.compressed_passage_tokens) <= len(passages)
    assert abs(outcome.passage_tokens[0] - stats.passage_tokens) <= len(passages)
