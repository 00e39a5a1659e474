"""The drafting benchmarks: what they claim to measure without running the target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsieve import Engine
from draftsieve.core.generation.speculative.drafters.aded import AdedDrafter
from draftsieve.core.generation.speculative.drafters.lookup import LookupDrafter
from draftsieve.core.generation.speculative.drafters.store import TrigramStore
from draftsieve.core.generation.speculative.select import Drafters

from .adapters_fixtures import EXAMPLES, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The benchmark's modules, imported as the script imports them."""
    folder = str(EXAMPLES / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import drafting  # type: ignore[import-not-found]
        import drafting_cases  # type: ignore[import-not-found]
        import drafting_cost  # type: ignore[import-not-found]
        import drafting_learning  # type: ignore[import-not-found]
        import drafting_ways  # type: ignore[import-not-found]
    finally:
        sys.path.remove(folder)
    return argparse.Namespace(
        main=drafting,
        cases=drafting_cases,
        cost=drafting_cost,
        learning=drafting_learning,
        ways=drafting_ways,
    )


def tiny_pair() -> Engine:
    """A pair with room for two passages of the handbook in byte-like tokens."""
    target, draft = tiny_model(32, seed=2), tiny_model(32, seed=1)
    return Engine(target, tiny_tokenizer(), draft_model=draft)


@pytest.mark.parametrize("kind", ["aded", "lookup"])
def test_a_simulated_answer_takes_the_passes_of_a_real_one(scripts: Any, kind: str) -> None:
    engine = tiny_pair()
    store = TrigramStore()
    drafters = Drafters(tiny_tokenizer(), engine.draft, True)
    for case in scripts.cases.make_cases(engine, 3):
        case = scripts.cases.Case(case.ids[-300:], case.reference)
        real = scripts.ways.run(engine, drafters, case, kind, True)
        assert real.tokens == case.reference
        prompt = case.ids.tolist()
        drafter = AdedDrafter(store, prompt) if kind == "aded" else LookupDrafter(prompt)
        assert scripts.ways.simulate(drafter, case).forwards == real.forwards


def test_generated_answers_are_those_of_transformers(scripts: Any) -> None:
    engine = tiny_pair()
    drafters = Drafters(tiny_tokenizer(), engine.draft, True)
    (case,) = scripts.cases.make_cases(engine, 1)
    case = scripts.cases.Case(case.ids[-200:], case.reference)
    runs = {
        name: scripts.ways.run(engine, drafters, case, way, False)
        for name, way in {"plain": None, "auto": "auto", **scripts.ways.THEIRS}.items()
    }
    assert {run.tokens for run in runs.values()} == {runs["plain"].tokens}
    assert 50 <= len(runs["plain"].tokens) <= 200
    for name in ("plain", "HF plain"):
        assert runs[name].forwards == len(runs[name].tokens) - 1


def test_cases_have_the_length_and_the_share_that_are_promised(scripts: Any) -> None:
    engine = tiny_pair()
    cases = scripts.cases.make_cases(engine, 9)
    assert all(50 <= len(case.reference) <= 200 for case in cases)
    assert cases[0].reference == scripts.cases.make_cases(engine, 1)[0].reference
    words = scripts.cases.unrelated_cases(engine, 4, shuffled=True)
    assert len({case.reference for case in words}) == 4
    assert scripts.cases.distinct_share([1, 2, 3, 4] * 20) < 0.1
    assert scripts.cases.distinct_share(range(80)) == 1.0


def test_rounds_are_kept_and_found_again(scripts: Any, tmp_path: Path) -> None:
    file, run = tmp_path / "rounds.jsonl", scripts.ways.Run((1, 2), 1, 0.5, 0.1)
    scripts.main._keep(file, "replay", {"plain": [run, run], "auto": [run, run]})
    scripts.main._keep(file, "replay", {"plain": [run], "auto": [run]})  # of fewer cases
    scripts.main._keep(file, "generate", {"plain": [run, run], "auto": [run, run]})
    assert scripts.main._kept(file, "replay", 2, ["plain", "auto"]) == [
        {"plain": [run, run], "auto": [run, run]}
    ]
    assert scripts.main._kept(file, "replay", 2, ["plain"]) == []


def test_the_learning_curve_rises(scripts: Any, tmp_path: Path, capsys: Any) -> None:
    plot = tmp_path / "learning.png"
    assert scripts.learning.main(["--requests", "12", "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 1000
    assert "| last against first stretch |" in capsys.readouterr().out
    engine = Engine.load("builtin:target", device="cpu", progress=False)
    twice = scripts.cases.make_cases(engine, 3) * 2
    curve = scripts.learning.curve(twice, TrigramStore(), "best_first")
    assert all(again > first for first, again in zip(curve[:3], curve[3:], strict=True))
