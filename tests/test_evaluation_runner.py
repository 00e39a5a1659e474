"""The evaluation's runner, methods and report, with a tiny random pair."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from draftsieve import Engine, Generation, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import ConfigError, MissingExtraError, ModelNotFoundError
from draftsieve.core.evaluation import plots, scorers, specprefill, surprise
from draftsieve.core.evaluation.baselines import (
    kept_text,
    kept_tokens,
    truncation_middle,
    truncation_tail,
)
from draftsieve.core.evaluation.intervals import bootstrap_mean
from draftsieve.core.evaluation.methods import GROUPS, METHODS, find_methods
from draftsieve.core.evaluation.plots import by_depth, write_plots
from draftsieve.core.evaluation.records import Record, read_records
from draftsieve.core.evaluation.runner import Grid, measure, run
from draftsieve.core.evaluation.shared import Bench
from draftsieve.core.evaluation.summary import (
    accuracy_table,
    draft_table,
    markdown,
    natural_table,
    overview,
)
from draftsieve.core.evaluation.tasks import EvalItem, make_item
from draftsieve.core.models.loading import LoadedModel
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.core.types import Segment
from draftsieve.integrations import cli
from draftsieve.retrievers.bm25 import Bm25Index

from .adapters_fixtures import QUESTION, TEXTS, tiny_model, tiny_tokenizer

SHARE = 0.3
FEW = ("none", "speckv", "specpc", "head")


@cache
def bench() -> Bench:
    return Bench(
        LoadedModel(tiny_model(64, seed=2), tiny_tokenizer(), "tiny-target"),
        LoadedModel(tiny_model(32, seed=1), tiny_tokenizer(), "tiny-draft"),
        max_new_tokens=5,
    )


@cache
def engine() -> Engine:
    return Engine(
        tiny_model(64, seed=2),
        tiny_tokenizer(),
        draft_model=tiny_model(32, seed=1),
        draft_tokenizer=tiny_tokenizer(),
    )


@cache
def item() -> EvalItem:
    return make_item("many-keys", 500, 0, bench().draft.count_tokens)


def small(**changes: Any) -> Grid:
    options: dict[str, Any] = {
        "methods": FEW,
        "budgets": (SHARE,),
        "lengths": (400,),
        "tasks": ("many-keys", "two-hop"),
        "items": 2,
    }
    return Grid(**{**options, **changes})


def squad_file(folder: Path) -> Path:
    """The three texts in SQuAD's format, with one question."""
    asked = {"id": "q1", "question": QUESTION, "answers": [{"text": "seven", "answer_start": 28}]}
    paragraphs = [{"context": t, "qas": [asked] if t == TEXTS[0] else []} for t in TEXTS]
    path = folder / "data.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


@contextmanager
def prefills(model: Any) -> Iterator[list[int]]:
    """Sizes of all passes of a model over more than a few tokens."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[1] > 100:
            seen.append(ids.shape[1])

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_budget(name: str) -> None:
    (method,) = find_methods([name])
    case = bench().open(item())
    done = method.run(case, SHARE)
    budget = case.budget(SHARE)
    fixed = len(case.tokens) - case.passage_tokens
    assert done.text
    assert done.draft_seconds >= 0
    assert done.target_seconds > 0
    if name == "none":
        assert (done.prompt_tokens, done.cache_tokens) == (len(case.tokens),) * 2
        return
    assert 0 < done.cache_tokens <= fixed + budget
    assert done.cache_tokens >= fixed / 2 + 0.5 * budget
    if method.kind == "cache":
        assert done.kept is None
        assert done.prompt_tokens == len(case.tokens)
        assert done.cache_tokens == fixed + budget
        return
    assert done.kept is not None
    limit = 2 * budget if method.kind == "both" else budget
    kept = sum(end - start for spans in done.kept for start, end in spans)
    assert 0 < kept < sum(map(len, item().passages))
    if "keep" not in name and name != "specprefill":
        assert done.prompt_tokens <= fixed + limit


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("none", None),
        ("speckv", SpecKV(ratio=SHARE)),
        ("snapkv", SpecKV(ratio=SHARE, scorer="snapkv")),
        ("laq", SpecKV(ratio=SHARE, scorer="laq")),
        ("oracle", SpecKV(ratio=SHARE, scorer="oracle")),
        ("h2o", SpecKV(ratio=SHARE, scorer="h2o")),
        ("specpc", SpecPC(ratio=SHARE)),
        (
            "speckv-pc",
            SpecKVPC(specpc=SpecPC(ratio=2 * SHARE, lookahead_tokens=8), speckv=SpecKV(ratio=0.5)),
        ),
    ],
)
def test_shared_readings_change_no_answer(name: str, method: Any) -> None:
    case = bench().open(item())
    case.draft_answer()
    for other in ("none", "speckv", "speckv-pc"):
        METHODS[other].run(case, 0.6)
    done = METHODS[name].run(case, SHARE)
    alone = engine().answer(
        item().question,
        item().passages,
        method=method,
        generation=Generation(max_new_tokens=5),
    )
    assert done.text == alone.text
    assert done.cache_tokens == (alone.usage.cache_entries or alone.usage.prompt_tokens)


def test_readings_and_prefill_are_made_once_an_item() -> None:
    cells = [(METHODS[n], b) for n in ("none", "speckv", "snapkv", "specpc") for b in (0.2, 0.5)]
    with prefills(bench().draft.model) as read, prefills(bench().target) as answered:
        records = list(measure(bench(), item(), cells))
    assert len(read) == 2  # one guess for the draft's own answer and SpecKV, one reading for SpecPC
    full = [size for size in answered if size >= len(bench().open(item()).tokens) - 1]
    assert len(full) == 1
    assert all(record.draft_seconds > 0 for record in records if record.method == "speckv")


def test_keeping_everything_in_place_is_the_plain_model() -> None:
    case = bench().open(item())
    whole = tuple(((0, len(text)),) for text in item().passages)
    assert case.answer_in_place(whole)[0] == METHODS["none"].run(case, 1.0).text
    assert case.answer_in_place(whole)[1] == len(case.tokens)


def test_names_groups_and_missing_needs(caplog: pytest.LogCaptureFixture) -> None:
    names = [method.name for method in find_methods(["snapkv", "table", "none"])]
    assert names[0] == "snapkv"
    assert sorted(names) == sorted(GROUPS["table"])
    with pytest.raises(ConfigError, match="no method 'nothing'"):
        find_methods(["nothing"])
    (missing,) = find_methods(["embedding:./not-there"])
    assert missing.check is not None
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        missing.check(bench())


# ---------------------------------------------------------------- baselines


def words(text: str) -> int:
    return len(text.split())


def test_truncation_keeps_the_end_or_both_ends() -> None:
    texts = ["a b c d", "e f g h", "i j k l"]
    tail = truncation_tail(texts, 6, words)
    assert [kept_text(t, s).split() for t, s in zip(texts, tail, strict=True)] == [
        [],
        ["g", "h"],
        ["i", "j", "k", "l"],
    ]
    middle = truncation_middle(texts, 7, words)
    shown = [kept_text(t, s) for t, s in zip(texts, middle, strict=True)]
    assert (shown[0], shown[1], shown[2]) == ("a b c", "", "j k l")
    assert kept_tokens(texts, middle, words) <= 7
    assert truncation_middle(texts, 99, words) == tuple(((0, 7),) for _ in texts)


def test_bm25_ranks_as_the_retriever_does() -> None:
    sentences = [s + "." for text in TEXTS for s in text.split(". ")]
    own = bm25(QUESTION, sentences)
    found = Bm25Index.from_texts(sentences).search(QUESTION, len(sentences))
    theirs = {passage.text: score for passage, score in found}
    assert own == pytest.approx([theirs[sentence] for sentence in sentences], rel=1e-5)
    assert bm25("nothing alike", ["a b"]) == [0.0]


@pytest.mark.parametrize("score", [scorers.tfidf, scorers.lsa])
def test_vectors_find_the_sentence(score: Any) -> None:
    found = score(QUESTION, TEXTS)
    assert found.index(max(found)) == 0
    assert found == score(QUESTION, TEXTS)
    assert score("no such word", ["one two", "three"]) == pytest.approx([0.0, 0.0])


def test_embeddings_of_a_named_encoder_rank_texts(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(tmp_path)
    found = scorers.embedding(str(tmp_path))(TEXTS[1], TEXTS)
    assert found.index(max(found)) == 1
    assert found[1] == pytest.approx(1.0, abs=1e-5)  # padding does not count


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[eval\]"'):
        scorers.tfidf("a", ["b"])


def test_surprise_is_the_models_loss_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bench().draft.model
    ids = torch.tensor(bench().draft.encoder.encode_text(TEXTS[0]))
    monkeypatch.setattr(surprise, "BLOCK", 7)
    found = surprise.token_surprise(model, ids)
    with torch.no_grad():
        loss = model(input_ids=ids[None], labels=ids[None]).loss
    assert found[0] == 0
    assert float(found[1:].mean()) == pytest.approx(float(loss), rel=1e-4)


def test_contrast_compares_the_same_tokens() -> None:
    draft = bench().draft
    tokens, scores = surprise.contrast(draft.model, draft.encoder, item())
    assert scores[tokens.protected].abs().max() == 0
    assert (scores[~tokens.protected] != 0).float().mean() > 0.9


def test_highest_tokens_are_joined_and_fit() -> None:
    case = bench().open(item())
    scores = torch.rand(len(case.tokens), generator=torch.Generator().manual_seed(1))
    count = bench().draft.count_tokens
    kept, texts = surprise.keep_highest(item().passages, case.tokens, scores, 60, count)
    assert 50 <= sum(map(count, texts)) <= 60
    best = int((scores * ~case.tokens.protected).argmax())
    bounds = int(case.tokens.start[best]), int(case.tokens.end[best])
    assert bounds in kept[int(case.tokens.passage[best])]


def test_specprefill_scores_are_those_of_plain_attention() -> None:
    model = tiny_model(32, seed=1, layers=3)
    ids = torch.tensor(bench().draft.encoder.encode_text(" ".join(TEXTS)))
    found = specprefill.read(model, ids, lookahead=3)
    model.set_attn_implementation("eager")
    fed, rows = ids, []
    with torch.no_grad():
        for _ in range(3):
            out = model(input_ids=fed[None], output_attentions=True)
            attention = torch.stack(out.attentions)[:, 0, :, -1, : len(ids)]  # layers, heads, keys
            padded = torch.nn.functional.pad(attention, (6, 6)).unfold(-1, 13, 1).mean(-1)
            rows.append((padded, attention))
            fed = torch.cat([fed, out.logits[0, -1:].argmax(-1)])
    for padded, attention in rows:
        assert padded.shape == attention.shape
    # the lookahead's own keys take a part of the softmax: renormalise over the prompt
    expected = torch.stack(
        [(padded / attention.sum(-1, keepdim=True)).amax(dim=(0, 1)) for padded, attention in rows]
    ).mean(0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_specprefill_keeps_whole_chunks_within_the_budget() -> None:
    case = bench().open(item())
    scores = torch.zeros(len(case.tokens))
    place = int((~case.tokens.protected).nonzero()[90])
    scores[place] = 1.0
    kept = specprefill.keep_chunks(case.tokens, scores, 70)
    assert bool(kept[case.tokens.protected].all())
    assert bool(kept[place])
    assert 32 < int((kept & ~case.tokens.protected).sum()) <= 70


# ---------------------------------------------------------------- runs


def test_a_run_writes_everything_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert TEXTS[0][28:33] == "seven"
    grid = small(data=squad_file(tmp_path), natural=1)
    records = run(bench(), grid, tmp_path, progress=False)
    assert len(records) == 3 * len(FEW)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [row["task"] for row in items] == ["many-keys", "two-hop", "squad"]
    assert {row["id"] for row in items} == {record.item for record in records}
    table = (tmp_path / "table.md").read_text()
    assert "## 400 tokens" in table
    assert "## Natural text, 400 tokens" in table
    assert read_records(tmp_path / "results.jsonl") == records

    # cut off in the middle of a line: that record is measured again, and nothing else
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with prefills(bench().target) as answered:
        again = run(bench(), grid, tmp_path, progress=False)
    assert len(answered) <= 1
    same = {"draft_seconds": 0.0, "target_seconds": 0.0}
    assert [replace(r, **same) for r in again] == [replace(r, **same) for r in records]

    # a new budget needs only its own runs, what was measured stays as it is
    wider = run(bench(), replace(grid, budgets=(SHARE, 0.6)), tmp_path, progress=False)
    assert len(wider) == 3 * (2 * len(FEW) - 1)
    assert {r.key: r for r in again}.items() <= {r.key: r for r in wider}.items()
    with pytest.raises(ConfigError, match="differs in seed"):
        run(bench(), replace(grid, seed=1), tmp_path, progress=False)
    trained = Bench(
        LoadedModel(tiny_model(64, seed=5), tiny_tokenizer(), "tiny-target"),
        LoadedModel(tiny_model(32, seed=1), tiny_tokenizer(), "tiny-draft"),
        max_new_tokens=5,
    )
    with pytest.raises(ConfigError, match="differs in weights"):
        run(trained, grid, tmp_path, progress=False)


def test_questions_may_come_first_and_a_bar_shows_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("none", "speckv", "specpc", "specpc-keep", "bm25-sentences")
    grid = small(methods=methods, tasks=("many-keys",), items=1, question_first=True)
    records = run(bench(), grid, tmp_path)
    assert {record.method for record in records} == set(methods)
    assert all(record.question_first and record.error is None for record in records)
    item = json.loads((tmp_path / "items.jsonl").read_text())
    prompt = EvalItem.from_json(item).prompt()
    tokens = bench().draft.encoder.encode(prompt)
    first = (tokens.segment == int(Segment.QUESTION)).nonzero().max()
    assert bool(first < (tokens.segment == int(Segment.PASSAGE)).nonzero().min())
    assert f"{len(methods)}/{len(methods)}" in capsys.readouterr().err


def test_prompts_beyond_a_window_are_wrong_answers(tmp_path: Path) -> None:
    grid = small(lengths=(1300,), items=1, tasks=("many-keys",), methods=("none", "head"))
    records = run(bench(), grid, tmp_path, progress=False)
    none = next(record for record in records if record.method == "none")
    assert none.error is not None
    assert "reads at most 1024" in none.error
    assert (none.correct, none.draft_correct) == (False, None)
    assert next(record for record in records if record.method == "head").error is None
    assert "1 runs were refused" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (1.5,)}, r"shares in \(0, 1\]"),
        ({"lengths": ()}, "at least one length"),
        ({"tasks": ()}, "nothing to measure"),
        ({"reference": "laq"}, "'laq' is not among the methods"),
    ],
)
def test_grids_that_measure_nothing_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(bench(), small(**changes), tmp_path, progress=False)


def test_methods_without_their_needs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)
    grid = small(methods=("none", "tfidf-sentences"), items=1)
    with caplog.at_level(logging.WARNING):
        records = run(bench(), grid, tmp_path, progress=False)
    assert {record.method for record in records} == {"none"}
    assert "tfidf-sentences is skipped" in caplog.text


# ---------------------------------------------------------------- report


def record(number: int, method: str, correct: bool, **changes: Any) -> Record:
    made = Record(
        item=f"i{number}",
        task="many-keys",
        length=1000,
        question_first=False,
        depth=number / 10,
        method=method,
        budget=0.25 if method != "none" else 1.0,
        answer="",
        correct=correct,
        recall=float(correct),
        f1=0.5,
        survived=None,
        sentences_survived=None,
        full_tokens=1000,
        prompt_tokens=300,
        cache_tokens=200,
        draft_seconds=0.25,
        target_seconds=1.0,
        draft_correct=number % 2 == 0,
    )
    return replace(made, **changes)


def cells_of(table: str, method: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    row = next(line for line in lines if line[0] == method)
    return dict(zip(lines[0], row, strict=True))


def test_accuracy_is_paired_and_split_by_the_draft() -> None:
    records = [record(n, "none", True) for n in range(10)]
    records += [record(n, "snapkv", n % 2 == 0) for n in range(10)]
    shown = cells_of(accuracy_table(records, "none"), "snapkv")
    assert shown["accuracy"].startswith("50.0 [")
    gap, low, high = bootstrap_mean([-float(n % 2) for n in range(10)])
    assert shown["minus none"] == f"{100 * gap:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    apart = draft_table(records, "none").splitlines()
    assert apart[0].count("draft right (5)") == apart[0].count("draft wrong (5)") == 1
    row = next(line for line in apart if line.startswith("| snapkv"))
    right, gap_right, wrong, gap_wrong = (cell.strip() for cell in row.split("|")[3:7])
    assert (right, wrong) == ("100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]")
    assert (gap_right, gap_wrong) == ("+0.0 [+0.0, +0.0]", "-100.0 [-100.0, -100.0]")
    assert "draft right (5)" in markdown(records, reference="none", title="x")
    unknown = [replace(r, draft_correct=None) for r in records]
    assert "draft right" not in markdown(unknown, reference="none", title="x")
    assert (shown["tokens read"], shown["cache entries"]) == ("300", "200")
    assert cells_of(accuracy_table(records, "none"), "none")["minus none"] == ""
    only_half = [r for r in records if r.method == "none" or int(r.item[1:]) < 4]
    assert cells_of(accuracy_table(only_half, "none"), "snapkv")["minus none"].startswith("-50.0")


def test_lengths_stand_side_by_side() -> None:
    records = [record(n, "none", True, length=length) for n in range(4) for length in (1000, 2000)]
    records += [record(n, "head", n < 2, budget=0.25) for n in range(4)]
    records += [record(n, "head", n < 1, budget=0.25, length=2000) for n in range(4)]
    text = {"task": "squad", "length": 2000, "survived": True, "budget": 0.25}
    records += [record(n + 10, "head", False, **text) for n in range(4)]
    shown = cells_of(overview(records, "none"), "head")
    assert (shown["1000"][:4], shown["2000"][:4]) == ("50.0", "25.0")
    assert shown["2000, minus none"].startswith("-75.0 [")
    assert shown["2000, answer kept in text"].startswith("100.0")
    assert "1000, answer kept in text" not in shown  # nothing to show
    assert "## All lengths" in markdown(records, reference="none", title="x")
    one = [r for r in records if r.length == 1000]
    assert "## All lengths" not in markdown(one, reference="none", title="x")


def test_natural_text_has_its_own_table() -> None:
    records = [
        record(n, "head", False, task="squad", survived=n < 3, sentences_survived=n < 1)
        for n in range(4)
    ]
    shown = cells_of(natural_table(records, "none"), "head")
    assert shown["answer kept"].startswith("75.0")
    assert shown["sentence kept"].startswith("25.0")
    assert shown["F1"].startswith("50.0 [50.0, 50.0]")
    report = markdown(records, reference="none", title="x")
    assert "## Natural text, 1000 tokens" in report
    assert "## 1000 tokens" not in report


def test_depths_are_counted_in_bins() -> None:
    found = by_depth([record(n, "none", n < 4) for n in range(10)])
    assert [place for place, *_ in found] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [accuracy for _, accuracy, *_ in found] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert by_depth([record(0, "none", True, depth=None)]) == []
    assert by_depth([record(0, "none", True, depth=1.0)])[0][0] == 0.9


def test_lines_of_one_colour_differ_in_their_markers() -> None:
    _, axes = plots.empty_axes()
    for number in range(24):
        plots.draw(axes, [(0.5, 0.5, 0.4, 0.6)], str(number))
    lines = [container.lines[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 24


def test_plots_are_written_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = [record(n, "none", True) for n in range(10)]
    for budget in (0.25, 0.125):
        records += [record(n, "snapkv", n % 3 == 0, budget=budget) for n in range(10)]
    names = {path.name for path in write_plots(records, tmp_path)}
    assert names == {
        "accuracy_budget_1000.png",
        "accuracy_depth_1000_0.25.png",
        "accuracy_depth_1000_0.125.png",
    }
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert write_plots(records, tmp_path) == []
    assert 'pip install "draftsieve[eval]"' in caplog.text


def test_bootstrap_intervals_are_seeded_and_cover_the_mean() -> None:
    values = [1.0] * 30 + [0.0] * 70
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=0.015)
    assert bootstrap_mean(values) == (mean, low, high)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])


# ---------------------------------------------------------------- command line


def test_the_command_measures_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, hidden, seed in (("target", 64, 2), ("draft", 32, 1)):
        tiny_model(hidden, seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    options = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    options += ["--length", "300", "--budget", "0.25", "--items", "1", "--no-progress"]
    options += ["--methods", "none", "snapkv", "--tasks", "one-key", "--max-new-tokens", "3"]
    assert cli.main(["eval", *options, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "table.md").read_text()
    assert "| snapkv | 0.25 |" in printed
    item = json.loads((tmp_path / "out" / "items.jsonl").read_text())
    assert item["system"].startswith("Answer the question using only the passages. Give only")

    data = ["--tasks", "none", "--data", str(squad_file(tmp_path)), "--data-items", "1"]
    assert cli.main(["eval", *options, *data, "--out", str(tmp_path / "own")]) == 0
    assert "## Natural text, 300 tokens" in capsys.readouterr().out

    suite = ["--tasks", "none", "--suite", "python", "--data-items", "1", "--contexts", "random"]
    assert cli.main(["eval", *options, *suite, "--out", str(tmp_path / "python")]) == 0
    shown = capsys.readouterr().out
    assert "## python/random, 300 tokens" in shown
    assert "| snapkv | 0.25 |" in shown
    assert "evidence kept" not in shown  # no generated tasks beside it

    assert cli.main(["eval", *options, "--seed", "3", "--out", str(tmp_path / "out")]) == 2
    assert "holds the results of another run" in capsys.readouterr().err
    assert cli.main(["eval", "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert {*METHODS, "many-keys", "embedding:MODEL"} <= set(listed)
