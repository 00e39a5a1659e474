"""The scripts that run peers: file formats, budgets, skipping, records; no peer is installed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from draftsieve.core.errors import ConfigError
from draftsieve.core.evaluation.likelihood import divergence, read_answer
from draftsieve.core.evaluation.methods import METHODS
from draftsieve.core.evaluation.records import Record, read_records
from draftsieve.core.evaluation.runner import Grid
from draftsieve.core.evaluation.runner import run as evaluate
from draftsieve.core.evaluation.shared import Bench
from draftsieve.core.evaluation.tasks import EvalItem, make_items
from draftsieve.core.models.loading import load_model, load_tokenizer

from .adapters_fixtures import BUILTIN, tiny_model, tiny_tokenizer

PEERS = Path(__file__).parents[1] / "examples" / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))
import common  # noqa: E402
import environments  # noqa: E402
import reading  # noqa: E402
import report  # noqa: E402
import run as peers_run  # noqa: E402

SHARE = 0.3
STUB = """
import json, sys
prompts, model, out = sys.argv[1:4]
with open(out, "w") as file:
    for line in open(prompts):
        row = json.loads(line)
        first, *others = row["passages"]
        here = {"id": row["id"], "seconds": 0.5}
        none = {**here, "method": "kvpress-none", "budget": 1.0}
        rows = [{**none, "text": "said", "entries": len(row["ids"])}]
        for wanted in row["budgets"]:
            here["budget"] = wanted["budget"]
            rows.append({**here, "method": "cache", "text": "x", "entries": wanted["entries"]})
            kept = [[[0, len(first)]], *([] for _ in others)]
            texts = [first, *("" for _ in others)]
            rows.append({**here, "method": "prompt", "texts": texts, "kept": kept})
            rows.append({**here, "method": "refuses", "error": "ValueError: no"})
        file.writelines(json.dumps(row) + "\\n" for row in rows)
"""
KEEPS = """
import json, sys
prompts, model, out = sys.argv[1:4]
with open(out, "w") as file:
    for line in open(prompts):
        row = json.loads(line)
        here = {"id": row["id"], "budget": row["budgets"][0]["budget"], "seconds": 0.5}
        kept = [[[0, len(text)]] for text in row["passages"]]
        rows = [{**here, "method": "keeps", "texts": row["passages"], "kept": kept}]
        refused = {"method": "refuses", "error": "ValueError: no", "kept": [[] for _ in kept]}
        rows.append({**here, **refused})
        file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("entries", [1, 2, 3, 49, 506, 1015, 4099])
def test_ratios_give_the_number_of_entries_that_was_asked_for(entries: int) -> None:
    for kept in range(1, entries + 1):
        share = common.removed_share(kept, entries)
        assert int(entries * (1 - share)) == kept  # as kvpress counts
        for heads in (1, 24):
            share = common.removed_share_overall(kept, entries, heads)
            assert 0 <= share < 1
            assert int(entries * heads * share) == (entries - kept) * heads
    assert common.removed_share(entries + 5, entries) == 0
    assert common.removed_share_overall(entries + 5, entries, 24) == 0


def test_the_target_is_searched_towards_the_budget() -> None:
    assert common.next_target(100, 200, 100) < 50
    assert 100 < common.next_target(100, 80, 100) < 125
    assert common.next_target(1, 500, 100) == 1
    assert common.next_target(10, 0, 100) > 10


def test_the_fullest_size_within_the_budget_is_chosen() -> None:
    assert common.closest([120, 70, 95, 101], 100) == 2
    assert common.closest([120, 110, 130], 100) == 1


def test_joined_characters_go_back_to_their_texts() -> None:
    texts = ["First text.", "Second."]
    joined = "Asked?\n\n" + "\n\n".join(texts)
    kept = [(0, 6), (6, 8), (8, 13), (13, 19), (13, 20), (7, 13), (19, 21), (20, 22), (21, 28)]
    found = list(common.passage_spans(kept, [len(text) for text in texts], 8, 2))
    assert found == [(0, 0, 5), (0, 5, 11), (1, 0, 7)]
    assert [texts[i][a:b] for i, a, b in found] == ["First", " text.", "Second."]
    assert joined[21:28] == "Second."


# ---------------------------------------------------------------- files


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert common.read_rows(path) == []
    row = {"id": "é\n1", "method": "m", "budget": 0.25}
    common.append_row(path, row)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "2", "me')
    assert common.read_rows(path) == [row]
    common.append_row(path, {**row, "id": "2"})
    assert common.finished(common.read_rows(path)) == {("é\n1", "m", 0.25), ("2", "m", 0.25)}


def test_a_prompt_is_told_with_the_budgets_of_our_methods(pair: Path) -> None:
    bench = _bench(pair)
    (item,) = _items(bench, 1)
    row = json.loads(json.dumps(peers_run.prompt_row(bench, item, [SHARE])))
    case = bench.open(item)
    (budget,) = row["budgets"]
    assert budget["entries"] == METHODS["snapkv"].run(case, SHARE).cache_tokens
    assert budget["passage_tokens"] == case.budget(SHARE)
    behind = bench.tokenizer.decode(row["ids"][row["question_start"] :])
    assert item.question in behind
    assert item.passages[-1][-5:] not in behind
    assert row["passages"] == list(item.passages)
    assert bench.tokenizer.decode(row["reference"]) == item.reference


def test_transformers_4_gets_its_own_words(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert environments.config_4({"rope_parameters": rope, "dtype": "bfloat16"}) == {
        "rope_theta": 5e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    found = environments.config_4({"rope_parameters": scaled})
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    copy = environments.as_transformers_4(BUILTIN / "draft", tmp_path / "copy")
    told = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(told.get("extra_special_tokens"), list)
    text = "Badge AK-731 was issued to Mira."
    assert load_tokenizer(copy)(text).input_ids == load_tokenizer("builtin:draft")(text).input_ids
    assert environments.as_transformers_4(copy, tmp_path / "again") == copy


@torch.no_grad()
def test_a_reference_is_read_behind_a_cache_as_behind_the_prompt() -> None:
    model, ids = tiny_model(64, seed=2), torch.arange(40, 60)
    answer = [7, 30, 9]
    naive = read_answer(model, ids, torch.tensor(answer))
    cache = DynamicCache()
    model.get_decoder()(input_ids=ids[None, :15], past_key_values=cache)
    found = reading.expected_answer(model, cache, ids[None, 15:], 15, answer)
    assert cache.get_seq_length() == 15
    torch.testing.assert_close(found, naive.expected, atol=1e-5, rtol=1e-4)
    other = read_answer(model, ids[5:], torch.tensor(answer))
    told = reading.compared(found, other.expected, answer)
    assert told["log_likelihood"] == pytest.approx(other.log_likelihood, abs=1e-5)
    assert told["divergence"] == pytest.approx(divergence(naive, other), abs=1e-5)
    assert reading.compared(found, found, answer)["divergence"] == 0


# ---------------------------------------------------------------- peers that are not there


def test_a_peer_that_cannot_be_installed_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(environments.sys, "executable", str(tmp_path / "no-python"))
    peers_run.run_or_skip(environments.PEERS[0], tmp_path, tmp_path / "p", "model", tmp_path)
    assert "kvpress is skipped" in caplog.text
    assert "no-python cannot be started" in caplog.text


def test_a_peer_that_fails_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = _stub(tmp_path, "raise SystemExit(3)")
    peers_run.run_or_skip(peer, tmp_path, tmp_path / "p", "model", tmp_path)
    assert "stub is skipped: stub_peer.py ended with code 3" in caplog.text


# ---------------------------------------------------------------- records


def test_what_peers_wrote_stands_beside_our_records(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, results = _bench(pair), tmp_path / "results"
    grid = Grid(("none", "snapkv", "head"), (SHARE,), (400,), ("one-key",), items=2)
    ours = evaluate(bench, grid, results, progress=False)
    monkeypatch.setattr(peers_run, "PEERS", (_stub(tmp_path, STUB),))
    options = ["--results", str(results), "--budget", str(SHARE), "--environments", str(tmp_path)]
    assert peers_run.main([*options, "--survival-reference", "head"]) == 0
    shown = capsys.readouterr().out
    assert shown == (results / "peers.md").read_text(encoding="utf-8")
    found = read_records(results / "peers.jsonl")
    by_method = {r.method: r for r in found if r.item == ours[0].item}
    cache, prompt, refused = (by_method[name] for name in ("cache", "prompt", "refuses"))
    assert cache.cache_tokens == next(r for r in ours if r.method == "snapkv").cache_tokens
    assert cache.survived is None
    assert prompt.prompt_tokens < prompt.full_tokens == cache.prompt_tokens
    assert isinstance(prompt.survived, bool)
    assert (refused.correct, refused.error) == (False, "ValueError: no")
    assert cache.draft_correct is ours[0].draft_correct
    assert "| kvpress-none | all |" in shown
    assert "2 runs were refused" in shown
    assert "kvpress gives our answer on 0 of 2 items" in shown
    assert "minus head" in shown

    monkeypatch.setattr(peers_run, "PEERS", ())
    description = json.loads((results / "run.json").read_text(encoding="utf-8"))
    changed = {**description, "weights": {"target": "other", "draft": "other"}}
    (results / "run.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ConfigError, match="new folder"):
        peers_run.main(options)


def test_results_without_a_target_get_what_peers_on_prompts_keep(
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    results = tmp_path / "results"
    bench = Bench(None, load_model(str(pair / "draft"), progress=False))
    methods = ("none", "head", "bm25-sentences")
    grid = Grid(methods, (SHARE,), (400,), ("one-key",), items=2, kept_only=True)
    evaluate(bench, grid, results, progress=False)
    on_cache = replace(_stub(tmp_path / "a", STUB), name="cache")
    on_prompts = replace(_stub(tmp_path / "b", KEEPS), model="draft")
    monkeypatch.setattr(peers_run, "PEERS", (on_cache, on_prompts))
    options = ["--results", str(results), "--budget", str(SHARE)]
    options += ["--environments", str(tmp_path / "b"), "--survival-reference", "bm25-sentences"]
    assert peers_run.main(options) == 0
    assert "cache is skipped: the results are of a run without a target" in caplog.text
    found = read_records(results / "peers.jsonl")
    assert {record.method for record in found} == {"keeps", "refuses"}
    for record in found:
        assert record.answer == ""
        assert record.survived is (record.method == "keeps")
        assert (record.error is None) is (record.method == "keeps")
    shown = capsys.readouterr().out
    assert "minus bm25-sentences" in shown
    assert "accuracy" not in shown


def test_survival_is_compared_item_by_item() -> None:
    ours = [_record(f"{i}", "specpc", survived=True) for i in range(4)]
    theirs = [_record(f"{i}", "longllmlingua", survived=i == 0) for i in range(4)]
    table = report.survival_table([*ours, *theirs], "specpc")
    assert "| SQuAD | 1000 | 0.25 | specpc | 100 | 4 | 100.0 [100.0, 100.0] |  |" in table
    assert "| longllmlingua | 100 | 4 | 25.0 [" in table
    assert "| -75.0 [" in table
    assert report.survival_table([_record("0", "none", survived=None)], "specpc") == ""


def test_the_first_items_are_those_of_each_task_and_length() -> None:
    cells = [("a", 1), ("a", 1), ("b", 1), ("a", 2), ("a", 1), ("b", 1)]
    rows = [{"id": n, "task": task, "length": length} for n, (task, length) in enumerate(cells)]
    assert [row["id"] for row in peers_run.first_of_each(rows, 1)] == [0, 2, 3]
    assert [row["id"] for row in peers_run.first_of_each(rows, 2)] == [0, 1, 2, 3, 5]
    assert peers_run.first_of_each(rows, None) == rows


def test_what_llmlingua_kept_when_asked_is_told() -> None:
    rows = [
        {"budget": 0.25, "asked": a, "tokens": t, "wanted": 100} for a, t in ((150, 90), (250, 104))
    ]
    (line,) = report.asked_and_got([*rows, {"budget": 0.25, "text": "of another peer"}])
    assert "asked for 100 passage tokens it kept 200; searched, it kept 97, on 1 of 2" in line


# ---------------------------------------------------------------- material


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `target` and `draft` with tiny random models."""
    home = tmp_path_factory.mktemp("pair")
    for name, hidden, seed in (("target", 64, 2), ("draft", 32, 1)):
        tiny_model(hidden, seed).save_pretrained(home / name)
        tiny_tokenizer().save_pretrained(home / name)
    return home


def _bench(pair: Path) -> Bench:
    names = (str(pair / "target"), str(pair / "draft"))
    target, draft = (load_model(name, progress=False) for name in names)
    return Bench(target, draft, max_new_tokens=4)


def _items(bench: Bench, count: int) -> list[EvalItem]:
    return make_items(["one-key"], 400, count, bench.draft.count_tokens)


def _stub(home: Path, script: str) -> environments.Peer:
    """A peer whose environment is already there: it runs on this Python."""
    python = home / "stub" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (home / "stub.txt").write_text("nothing\n", encoding="utf-8")
    (home / "stub" / environments.STAMP).write_text("nothing\n", encoding="utf-8")
    (home / "stub_peer.py").write_text(script, encoding="utf-8")
    return environments.Peer("stub", "target", folder=home)


def _record(item: str, method: str, *, survived: bool | None) -> Record:
    return Record(
        item=item,
        task="squad",
        length=1000,
        question_first=False,
        depth=None,
        method=method,
        budget=0.25,
        answer="",
        correct=False,
        recall=0.0,
        f1=0.0,
        survived=survived,
        sentences_survived=survived,
        full_tokens=400,
        prompt_tokens=100,
        cache_tokens=100,
        draft_seconds=0.0,
        target_seconds=0.0,
        draft_correct=None,
    )
