"""Runs over real questions, with a tiny random pair and small files of invented text."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from draftsieve.core.errors import ConfigError
from draftsieve.core.evaluation.likelihood import divergence, read_answer
from draftsieve.core.evaluation.methods import METHODS
from draftsieve.core.evaluation.realtext.suites import Suite, python_suite, real_suite
from draftsieve.core.evaluation.records import Record, read_records
from draftsieve.core.evaluation.runner import Grid, build, measure, run
from draftsieve.core.evaluation.shared import Bench
from draftsieve.core.evaluation.summary import markdown
from draftsieve.core.evaluation.tasks import EvalItem, make_item
from draftsieve.core.models.loading import LoadedModel

from .adapters_fixtures import tiny_model, tiny_tokenizer

QUESTIONS = Path(__file__).parents[1] / "examples/data/python_reference.jsonl"
METHODS_RUN = ("none", "snapkv", "specpc", "specpc-keep", "bm25-sentences")
HALF = 0.5


@cache
def bench(target: str = "tiny-target") -> Bench:
    return Bench(
        LoadedModel(tiny_model(64, seed=2), tiny_tokenizer(), target),
        LoadedModel(tiny_model(32, seed=1), tiny_tokenizer(), "tiny-draft"),
        max_new_tokens=5,
    )


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Natural Questions' form, with six ferries."""
    places = ["Onda", "Holm", "Vell", "Sirre", "Tarn", "Mola"]
    rows = [
        {
            "question": f"when does the ferry to {name} sail",
            "answers": [f"at {hour} hours", "never"],
            "title": name,
            "text": f"{name} lies far out. Its ferry sails at {hour} hours. It is seldom full.",
        }
        for hour, name in enumerate(places, 7)
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "nq_open_gold.jsonl").write_text(lines, encoding="utf-8")
    return real_suite(tmp_path, ["nq"], contexts=("bm25", "random"), questions=3)


def grid(suite: Suite, **changes: object) -> Grid:
    made = Grid(
        methods=METHODS_RUN,
        budgets=(HALF,),
        lengths=(150,),
        tasks=(),
        suite=suite,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- a run


def test_a_run_measures_what_reaches_the_target_and_what_it_makes_of_it(
    suite: Suite, tmp_path: Path
) -> None:
    found = run(bench(), grid(suite), tmp_path / "out", progress=False)
    assert {record.task for record in found} == {"nq/bm25", "nq/random"}
    assert len(found) == 2 * 3 * len(METHODS_RUN)
    for record in found:
        assert record.error is None
        assert record.log_likelihood is not None
        assert record.divergence is not None
        assert record.log_likelihood < 0
        whole = record.method == "none"
        assert (record.divergence == 0) is whole
        assert (record.survived is None) is (whole or record.method == "snapkv")
    assert read_records(tmp_path / "out" / "results.jsonl") == found
    again = run(bench(), grid(suite), tmp_path / "out", progress=False)
    assert again == found

    report = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "## nq/bm25, 150 tokens" in report
    assert "log-likelihood minus none" in report
    assert "| none | all |" in report


def test_another_suite_is_another_run(suite: Suite, tmp_path: Path) -> None:
    few = grid(suite, methods=("none",))
    run(bench(), few, tmp_path / "out", progress=False)
    other = replace(few, suite=replace(suite, questions=2))
    with pytest.raises(ConfigError, match="differs in suite"):
        run(bench(), other, tmp_path / "out", progress=False)


@pytest.mark.parametrize("name", ["snapkv", "specpc", "specpc-keep", "speckv-pc"])
def test_keeping_everything_diverges_nowhere(suite: Suite, name: str) -> None:
    item = next(build(bench(), grid(suite)))
    (record,) = measure(bench(), item, [(METHODS[name], 1.0)])
    assert record.divergence == pytest.approx(0, abs=1e-6)


def test_the_full_context_reads_the_reference_as_the_plain_model_does(suite: Suite) -> None:
    item = next(build(bench(), grid(suite)))
    case = bench().open(item)
    ids = bench().encoder.encode(item.prompt()).ids
    answer = torch.tensor(tiny_tokenizer()(item.reference, add_special_tokens=False)["input_ids"])
    plain = read_answer(bench().target, ids, answer)
    full = case.full_reading()
    assert full is not None
    assert full.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-5)
    assert divergence(plain, full) == pytest.approx(0, abs=1e-6)


def test_reading_the_reference_does_not_change_the_answer(suite: Suite) -> None:
    item = next(build(bench(), grid(suite)))
    for name in METHODS_RUN:
        said = METHODS[name].run(bench().open(item), HALF)
        plain = METHODS[name].run(bench("builtin:quiet").open(replace(item, task="plain")), HALF)
        assert (said.reading is None, plain.reading is None) == (False, True)
        assert said.text == plain.text


def test_generated_tasks_are_read_too_unless_the_pair_is_the_bundled_one() -> None:
    item = make_item("one-key", 200, 0, bench().draft.count_tokens)
    (spoken,) = measure(bench(), item, [(METHODS["none"], 1.0)])
    (exact,) = measure(bench("builtin:target"), item, [(METHODS["none"], 1.0)])
    assert spoken.log_likelihood is not None
    assert exact.log_likelihood is None


def test_long_prompts_have_no_full_reading() -> None:
    item = make_item("one-key", 1200, 0, bench().draft.count_tokens)
    (record,) = measure(bench(), item, [(METHODS["head"], 0.1)])
    assert record.log_likelihood is not None
    assert record.divergence is None


# ---------------------------------------------------------------- suites


def test_the_reference_of_this_python_is_a_suite() -> None:
    suite = python_suite(QUESTIONS, contexts=("mixed",), questions=4)
    items = list(suite.items(700, bench().draft.count_tokens, seed=3, system=None))
    assert len(items) == 4
    assert {item.task for item in items} == {"python/mixed"}
    assert items == list(suite.items(700, bench().draft.count_tokens, seed=3, system=None))


def test_contexts_that_do_not_exist_are_refused(suite: Suite) -> None:
    with pytest.raises(ConfigError, match=r"no contexts \['fusion'\].*with an embedder"):
        replace(suite, contexts=("bm25", "fusion"))
    with pytest.raises(ConfigError, match="no contexts"):
        replace(suite, contexts=())
    assert replace(suite, contexts=("fusion",), embed=lambda texts: [[1.0]] * len(texts))


# ---------------------------------------------------------------- the report


def record(item: str, method: str, budget: float, **values: object) -> Record:
    made = Record(
        item=item,
        task="nq/bm25",
        length=100,
        question_first=False,
        depth=None,
        method=method,
        budget=budget,
        answer="dawn",
        correct=True,
        recall=1.0,
        f1=1.0,
        survived=None,
        sentences_survived=None,
        full_tokens=100,
        prompt_tokens=50,
        cache_tokens=50,
        draft_seconds=0.0,
        target_seconds=0.0,
        draft_correct=True,
    )
    return replace(made, **values)  # type: ignore[arg-type]


def test_the_report_shows_differences_kinds_and_sides() -> None:
    records = []
    for item, right in (("a", True), ("b", False)):
        kind = "plain" if right else "unanswerable"
        common = {"draft_correct": right, "kind": kind}
        records += [
            record(item, "none", 1.0, log_likelihood=-1.0, divergence=0.0, **common),
            record(
                item,
                "head",
                0.5,
                answer="at dawn",
                log_likelihood=-1.5,
                divergence=0.25,
                survived=right,
                recall=float(right),
                **common,
            ),
        ]
    report = markdown(records, reference="none", title="t")
    (row,) = [line for line in report.splitlines() if line.startswith("| head")][:1]
    assert "| 50.0 [0.0, 100.0] |" in row  # answer kept
    assert "| -0.500 [-0.500, -0.500] |" in row
    assert "| 0.250 [0.250, 0.250] |" in row
    assert "| 66.7 |" in row  # the same answer, but for "at"
    assert "| head | 0.5 | 100.0 | 0.0 |" in report  # contained, by kind
    assert "plain (1) | unanswerable (1)" in report
    assert report.count("Items that the draft alone gets") == 2
    assert "refused" not in report
    kept = markdown(
        [*records, *(replace(r, method="tail", survived=True) for r in records if r.budget < 1)],
        reference="head",
        title="t",
    )
    assert "+50.0 [+0.0, +100.0]" in kept


def test_kinds_show_what_is_kept_of_marked_and_of_free_answers() -> None:
    marked = [record("a", "head", 0.5, kind="x", survived=True, words_kept=None)]
    free = [record("b", "head", 0.5, kind="y", words_kept=0.25, recall=0.0)]
    report = markdown([*marked, *free], reference="head", title="t")
    _, found = report.split("Answers kept, by kind of question:")
    assert "| method | budget | x (1) | y (1) |" in found
    assert "| head | 0.5 | 100.0 | 25.0 |" in found
    assert "answer's words kept" in report
    nothing = [replace(r, survived=None, words_kept=None) for r in (*marked, *free)]
    assert "Answers kept" not in markdown(nothing, reference="head", title="t")


def test_items_say_how_they_are_read() -> None:
    item = make_item("all-values", 300, 0, bench().draft.count_tokens)
    assert item.reference == ", ".join(item.answers)
    assert not item.real
    assert EvalItem.from_json(json.loads(json.dumps(item.as_json()))) == item
