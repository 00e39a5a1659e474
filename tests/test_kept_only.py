"""Runs without a target: what stays of a prompt, and nothing is answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsieve.core.errors import ConfigError, PromptError
from draftsieve.core.evaluation import scorers
from draftsieve.core.evaluation.baselines import ranked_passages, ranked_sentences
from draftsieve.core.evaluation.kept_summary import kept_markdown
from draftsieve.core.evaluation.methods import METHODS, EvalMethod, find_methods
from draftsieve.core.evaluation.puzzles import NOT_FOUND
from draftsieve.core.evaluation.realtext.rankings import fused
from draftsieve.core.evaluation.records import Record
from draftsieve.core.evaluation.runner import Grid, measure, run
from draftsieve.core.evaluation.shared import Bench, Case
from draftsieve.core.evaluation.tasks import EvalItem, Turn, make_item
from draftsieve.core.evaluation.text_only import EMBEDDED
from draftsieve.core.models.loading import LoadedModel
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.integrations import cli

from .adapters_fixtures import tiny_model, tiny_tokenizer

HALF = 0.5
READING = ("specpc", "specpc:unit=sentence", "specpc-keep")  # one reading serves all of them
METHODS_RUN = ("none", *READING, "bm25-sentences", "head", "specprefill", "contrastive-perplexity")


def draft() -> LoadedModel:
    return LoadedModel(tiny_model(32, seed=1), tiny_tokenizer(), "tiny-draft")


def grid(**changes: Any) -> Grid:
    options: dict[str, Any] = {
        "methods": METHODS_RUN,
        "budgets": (HALF, 0.25),
        "lengths": (300,),
        "tasks": ("one-key", "two-hop"),
        "items": 4,
        "kept_only": True,
    }
    return Grid(**{**options, **changes})


def test_it_keeps_what_a_run_with_a_target_keeps(tmp_path: Path) -> None:
    target = LoadedModel(tiny_model(64, seed=2), tiny_tokenizer(), "tiny-target")
    without = run(Bench(None, draft()), grid(), tmp_path / "kept", progress=False)
    answered = run(
        Bench(target, draft(), max_new_tokens=2),
        grid(kept_only=False),
        tmp_path / "answered",
        progress=False,
    )
    kept = {record.key: record.survived for record in without if record.method != "none"}
    assert kept == {r.key: r.survived for r in answered if r.method != "none"}
    assert len(set(kept.values())) == 2
    assert all(r.survived and r.prompt_tokens == r.full_tokens for r in without[:1])
    assert {r.answer for r in without} == {""}
    assert {r.draft_correct for r in without} == {None}
    for record in without:
        assert record.error is None
        assert record.prompt_tokens < record.full_tokens or record.method == "none"


def test_methods_of_one_reading_read_once_an_item_and_nothing_else_runs(tmp_path: Path) -> None:
    bench, calls = Bench(None, draft()), []
    model: Any = bench.draft.model
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    run(bench, grid(methods=("none", "head", *READING)), tmp_path, progress=False)
    assert len(calls) == 4
    assert bench.target is bench.draft.model


def test_what_keeps_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="snapkv, speckv-pc: what they keep is no text"):
        grid(methods=("none", "snapkv", "speckv-pc"))


def test_a_run_with_answers_is_another_run(tmp_path: Path) -> None:
    few = grid(methods=("none",), items=1)
    run(Bench(None, draft()), few, tmp_path, progress=False)
    with pytest.raises(ConfigError, match="differs in kept_only"):
        run(Bench(None, draft()), replace(few, kept_only=False), tmp_path, progress=False)


def test_a_method_that_refuses_has_kept_nothing() -> None:
    bench = Bench(None, draft())

    def refuse(case: Case, share: float) -> Any:
        raise PromptError("no")

    method = EvalMethod("refuses", "prompt", refuse, keep=refuse)
    item = make_item("one-key", 300, 0, bench.draft.count_tokens)
    (record,) = measure(bench, item, [(method, HALF)], kept_only=True)
    assert (record.survived, record.error) == (False, "PromptError: no")


def test_the_report_compares_what_is_kept_at_equal_budgets() -> None:
    bench = Bench(None, draft())
    made: list[Record] = []
    for number in range(4):
        item = make_item("one-key", 300, number, bench.draft.count_tokens)
        item = replace(item, kind="even" if number % 2 == 0 else "odd")
        pairs = [(METHODS["head"], HALF), (METHODS["none"], 1.0), (METHODS["bm25-sentences"], HALF)]
        made += measure(bench, item, pairs, kept_only=True)
    made = [
        replace(r, survived=r.kind == "even" or r.method == "bm25-sentences")
        if r.method != "none"
        else r
        for r in made
    ]
    report = kept_markdown(made, reference="bm25-sentences", title="t")
    head, bm25 = (
        [line.split(" | ") for line in report.splitlines() if line.startswith(f"| {name}")]
        for name in ("head", "bm25-sentences")
    )
    assert [row[3].split()[0] for row in head] == ["50.0", "100.0", "0.0"]  # all, even, odd
    assert [row[4].split()[0] for row in head] == ["-50.0", "+0.0", "-100.0"]
    assert {row[4] for row in bm25} == {""}
    assert "Of kind 'even', 2 items:" in report
    assert "log-likelihood" not in report


def test_the_command_loads_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(32, seed=1).save_pretrained(tmp_path / "draft")
    tiny_tokenizer().save_pretrained(tmp_path / "draft")
    out = tmp_path / "out"
    line = ["eval", "--kept-only", "--target", "nowhere/at-all", "--draft", str(tmp_path / "draft")]
    line += ["--tasks", "one-key", "--items", "1", "--length", "300"]
    line += ["--methods", "none", "head", "--out", str(out)]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert "# no target with" in shown
    assert "| none | all |" in shown
    described = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert set(described["weights"]) == {"draft"}
    assert described["kept_only"] is True
    assert not list(out.glob("*.png"))


def letters(question: str, texts: Sequence[str]) -> list[float]:
    """How many letters of the question a text has."""
    return [float(sum(text.count(letter) for letter in question)) for text in texts]


def test_an_encoder_ranks_sentences_alone_with_neighbours_fused_and_passages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def score(question: str, texts: Sequence[str]) -> list[float]:
        asked.append((question, len(texts)))
        return letters(question, texts)

    monkeypatch.setattr(scorers, "embedding", lambda name: score)
    bench = Bench(None, draft())
    item = make_item("many-keys", 400, 0, bench.draft.count_tokens)
    item = replace(item, turns=(Turn("user", "Where?"), Turn("assistant", "There.")))
    found = find_methods([f"{name}:any" for name in EMBEDDED])
    pairs = [(method, budget) for method in found for budget in (HALF, 0.25)]
    records = list(measure(bench, item, pairs, kept_only=True))
    assert all(record.error is None for record in records)
    kept = {
        method.name: method.keep(bench.open(item), HALF).kept for method in found if method.keep
    }
    count, budget = bench.draft.count_tokens, bench.open(item).budget(HALF)
    texts = item.passages
    assert kept["embedding:any"] == ranked_sentences(item.question, texts, budget, count, letters)
    assert kept["embedding-neighbors:any"] == ranked_sentences(
        item.question, texts, budget, count, letters, neighbours=1
    )
    assert kept["embedding-passages:any"] == ranked_passages(
        item.question, texts, budget, count, letters
    )
    assert kept["fusion:any"] == ranked_sentences(
        item.question, texts, budget, count, fused(bm25, letters)
    )
    whole = f"Where?\n{item.question}"
    assert kept["embedding-turns:any"] == ranked_sentences(whole, texts, budget, count, letters)
    assert len({json.dumps(own) for own in kept.values()}) > 2
    # once an item and method for both budgets, then once more for what is compared here
    assert len(asked) == 2 * len(EMBEDDED)


def test_free_answers_are_reported_by_their_words() -> None:
    item = EvalItem(
        "i",
        "mtrag/x",
        100,
        "When does it sail?",
        ("The ferry sails at dawn. The crew sleeps on board.", "The harbour is deep."),
        ("At dawn, the crew asleep on board.",),
        "any",
        (),
        None,
        kind="answerable, follow-up",
    )
    refused = replace(item, id="j", answers=(NOT_FOUND,), kind="unanswerable, alone")
    bench = Bench(None, draft())
    pairs = [(METHODS["none"], 1.0), (METHODS["head"], 0.25), (METHODS["head"], 1.0)]
    found = [r for each in (item, refused) for r in measure(bench, each, pairs, kept_only=True)]
    assert [record.words_kept for record in found[:3]][::2] == pytest.approx([1.0, 1.0])
    assert 0 < (found[1].words_kept or 0) < 1
    assert {record.words_kept for record in found[3:]} == {None}
    report = kept_markdown(found, reference="none", title="t")
    assert "answer's words kept" in report
    assert "answer kept" not in report
    assert "'answerable, follow-up', 1 items" in report
    assert "'unanswerable, alone'" not in report  # nothing had to be kept


def test_passages_from_a_store_keep_what_is_kept_of_passages_read_now() -> None:
    """The reading of the passages takes no part in the seconds."""
    bench = Bench(None, draft())
    shown = bench.open(make_item("one-key", 300, 0, bench.draft.count_tokens))
    (method,) = find_methods(["stored:codec=float16,layers=all"])
    assert method.keep is not None
    first, again = method.keep(shown, HALF), method.keep(shown, HALF)
    assert first.kept == again.kept
    assert 0 < first.prompt_tokens < len(shown.tokens)
    (fewer,) = find_methods(["stored:codec=int4,layers=all"])
    assert fewer.keep is not None
    assert fewer.keep(shown, HALF).kept
    with pytest.raises(ConfigError, match=r"no options of a store: \['codecs'\]"):
        find_methods(["stored:codecs=int8"])
