"""Answers in sentences."""

from __future__ import annotations

from typing import Literal

import pytest

from draftsieve.core.evaluation.metrics import word_f1
from draftsieve.core.evaluation.spoken import score_spoken
from draftsieve.core.evaluation.tasks import EvalItem

WEIGHT = "How much does the Thont 27 weigh?"


def asked(
    question: str, *answers: str, need: Literal["any", "all"] = "any", task: str = "nq/bm25"
) -> EvalItem:
    return EvalItem("i", task, 100, question, ("text",), answers, need, (), None)


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        (WEIGHT, "1,460 grams", "1,460 grams"),
        (WEIGHT, "1,460 grams", "The Thont 27 is 1,460 grams."),
        (WEIGHT, "1,460 grams", "According to passage [3], the answer is: 1,460 grams."),
        (WEIGHT, "1,460 grams", "Based on the provided documents, it has 1,460 grams."),
        ("When does the ferry sail?", "dawn", "The ferry does sail at dawn."),
        ("When does the ferry sail?", "at dawn", "The ferry does sail at dawn."),
        ("Was the lamp red or blue?", "red", "Red"),
        ("首都是哪里?", "北京", "首都是北京。"),
    ],
)
def test_what_leads_to_the_answer_does_not_count(question: str, answer: str, said: str) -> None:
    score = score_spoken(asked(question, "never", answer), said)
    assert (score.correct, score.recall, score.f1) == (True, 1.0, 1.0)


@pytest.mark.parametrize(
    ("said", "f1"),
    [
        ("The Thont 27 is heavy, at 1,460 grams", 2 * 2 / (4 + 2)),  # "heavy" leads nowhere
        ("1,460 grams for the Thont 27", 2 * 2 / (5 + 2)),
        ("The Thont 27", 0.0),
        ("", 0.0),
    ],
)
def test_other_words_do(said: str, f1: float) -> None:
    score = score_spoken(asked(WEIGHT, "1,460 grams"), said)
    assert not score.correct
    assert score.f1 == pytest.approx(f1)


def test_answers_are_found_as_words() -> None:
    item = asked("How many quays are there?", "4", "four")
    assert score_spoken(item, "There are 4 of them.").recall == 1
    assert score_spoken(item, "Four, I think.").recall == 1
    assert score_spoken(item, "There are 14 of them, or fourteen.").recall == 0


def test_all_of_several_answers_are_wanted() -> None:
    item = asked("What do start and step default to?", "0", "1", need="all")
    assert score_spoken(item, "They default to 1 and 0.").correct
    half = score_spoken(item, "They default to 0")
    assert (half.correct, half.recall) == (False, 0.5)
    assert half.f1 == pytest.approx(2 / 3)


def test_f1_of_scripts_without_spaces_counts_characters() -> None:
    assert word_f1("北京市", "北京") == pytest.approx(4 / 5)
    assert word_f1("「北京」。", "北京") == 1.0
