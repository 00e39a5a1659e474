"""Runs without a target: what stays of a prompt, and nothing is answered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsieve.core.errors import ConfigError, PromptError
from draftsieve.core.evaluation.kept_summary import kept_markdown
from draftsieve.core.evaluation.methods import METHODS, EvalMethod
from draftsieve.core.evaluation.records import Record
from draftsieve.core.evaluation.runner import Grid, measure, run
from draftsieve.core.evaluation.shared import Bench, Case
from draftsieve.core.evaluation.tasks import make_item
from draftsieve.core.models.loading import LoadedModel
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
