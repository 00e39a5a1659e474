"""Draft against target attention, options of SpecPC by name, and what methods share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsieve import SpecPC
from draftsieve.core.errors import ConfigError
from draftsieve.core.evaluation.agreement import (
    measure_agreement,
    spearman,
    table,
    top_overlap,
    write_agreement,
)
from draftsieve.core.evaluation.methods import GROUPS, METHODS, find_methods
from draftsieve.core.evaluation.runner import measure, run
from draftsieve.core.evaluation.shared import Bench
from draftsieve.core.models.loading import LoadedModel
from draftsieve.core.specpc.draft_scores import read_draft
from draftsieve.integrations import cli

from .adapters_fixtures import tiny_model, tiny_tokenizer
from .test_evaluation_runner import SHARE, bench, engine, item, prefills, small


def naive_spearman(first: list[float], second: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values)
            + (sum(other == value for other in values) - 1) / 2
            for value in values
        ]

    left, right = ranks(first), ranks(second)
    mean = (len(left) - 1) / 2
    top = sum((a - mean) * (b - mean) for a, b in zip(left, right, strict=True))
    scale = [sum((a - mean) ** 2 for a in side) ** 0.5 for side in (left, right)]
    return float(top / (scale[0] * scale[1]))


@pytest.mark.parametrize("seed", range(6))
def test_rank_correlation_equals_loops(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 6, (20,), generator=draw).float()  # with ties
    second = torch.randint(0, 9, (20,), generator=draw).float()
    expected = naive_spearman(first.tolist(), second.tolist())
    assert spearman(first, second) == pytest.approx(expected, abs=1e-9)
    assert spearman(first, first * 3 + 1) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    assert spearman(first, torch.zeros(20)) == 0.0


def test_overlap_counts_the_top_tokens_in_common() -> None:
    first = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.7])
    second = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7])
    assert top_overlap(first, second, 1) == 1.0
    assert top_overlap(first, second, 3) == pytest.approx(2 / 3)


def test_a_model_agrees_with_itself_where_it_reads_one_layer() -> None:
    """One layer, one kind of rows: draft and target are then the same function."""
    model = tiny_model(32, seed=1, layers=1)
    twins = Bench(
        LoadedModel(model, tiny_tokenizer(), "a"),
        LoadedModel(model, tiny_tokenizer(), "a"),
        max_new_tokens=3,
    )
    same = SpecPC(weighted_query=False, starting_layer=0)
    measured = measure_agreement(twins, [item()], (0.1, 0.5), same)
    found = {(a.rows, a.budget): a for a in measured if a.layer is None}
    assert set(found) == {(rows, b) for rows in ("asking", "answer") for b in (0.1, 0.5)}
    for budget in (0.1, 0.5):
        assert found["asking", budget].correlation[0] == pytest.approx(1.0)
        assert found["asking", budget].overlap[0] == 1.0
    assert found["answer", 0.1].correlation[0] < 0.999


def test_agreement_is_that_of_plain_attention() -> None:
    case = bench().open(item())
    tokens = case.tokens
    passages = ~tokens.protected
    answer = case.answer(case.prompt, None, shared=True).text
    said = torch.tensor(bench().encoder.encode_text(answer))
    rows = len(tokens) - 1 - int(passages.nonzero()[-1])
    drafted = read_draft(
        bench().draft.model, [tokens.ids], SpecPC(), lookahead_tokens=1, windows=[min(64, rows)]
    )[0].scores[passages]
    target = tiny_model(64, seed=2)
    target.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.cat([tokens.ids, said[:-1]])
        attention = torch.stack(target(input_ids=ids[None], output_attentions=True).attentions)
    # layers, heads, rows, keys
    rows_of = attention[:, 0, :, -len(said) :, : len(tokens)].amax((1, 2))[:, passages]
    found = measure_agreement(bench(), [item()], (SHARE,))
    own = {a.layer: a for a in found if a.rows == "answer"}
    assert list(own) == [None, 0, 1]
    expected = {None: rows_of.amax(0), 0: rows_of[0], 1: rows_of[1]}
    for layer, agreement in own.items():
        assert agreement.correlation[0] == pytest.approx(
            spearman(drafted, expected[layer]), abs=1e-3
        )
        count = round(int(passages.sum()) * SHARE)
        overlap = top_overlap(drafted, expected[layer], count)
        assert agreement.overlap[0] == pytest.approx(overlap, abs=0.02)


def test_the_report_is_written_and_drawn(tmp_path: Path) -> None:
    found = measure_agreement(bench(), [item()], (0.1, 0.5))
    assert table(found).count("\n") == 2 + len(found)
    paths = write_agreement(found, tmp_path)
    assert [path.name for path in paths] == ["attention.json", "attention.png"]
    assert len(json.loads(paths[0].read_text())) == len(found) == 12
    assert paths[1].stat().st_size > 5000
    with pytest.raises(ConfigError, match="No item fits"):
        measure_agreement(bench(), [], (0.1,))


def test_the_command_compares_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hidden, seed in (("target", 64, 2), ("draft", 32, 1)):
        tiny_model(hidden, seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    options = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    options += ["--length", "300", "--budget", "0.25", "--items", "1", "--no-progress"]
    options += ["--tasks", "one-key", "--max-new-tokens", "3", "--attention"]
    assert cli.main(["eval", *options, "--out", str(tmp_path / "out")]) == 0
    assert "| all | asking | 0.25 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "attention.json").is_file()
    assert not (tmp_path / "out" / "results.jsonl").exists()


# ---------------------------------------------------------------- methods by options


def test_options_of_specpc_make_a_method() -> None:
    preset = "specpc:unit=sentence,lookahead_tokens=16,lexical_weight=0.25"
    (method,) = find_methods([preset])
    case = bench().open(item())
    named = METHODS["specpc-2026-11"].run(case, SHARE)
    assert method.run(case, SHARE).kept == named.kept
    assert method.name == preset
    (kept,) = find_methods(["specpc:positions=keep"])
    assert kept.run(case, SHARE).text == METHODS["specpc-keep"].run(case, SHARE).text
    for wrong in ("specpc:unit=line", "specpc:nothing=1", "specpc:"):
        with pytest.raises(ConfigError, match="no options of SpecPC"):
            find_methods([wrong])


def test_every_improvement_runs_or_says_what_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = small(methods=("none", "improvements"), items=1, tasks=("many-keys",))
    records = run(bench(), grid, tmp_path, progress=False)
    found = {record.method for record in records}
    lacking = {name for name in GROUPS["improvements"] if "calibrated" in name}
    assert len(lacking) == 2
    assert found == {"none", *GROUPS["improvements"]} - lacking
    assert not [record for record in records if record.error]
    assert "head_weights" in caplog.text


def test_the_engines_answer_with_old_positions_is_the_evaluations() -> None:
    case = bench().open(item())
    method = SpecPC(ratio=SHARE, positions="keep")
    generation = bench().generation
    alone = engine().answer(item().question, item().passages, method=method, generation=generation)
    done = METHODS["specpc-keep"].run(case, SHARE)
    assert done.text.rstrip("\ufffd") == alone.text  # the engine leaves a broken character out
    assert done.prompt_tokens == alone.usage.prompt_tokens


def test_lookaheads_of_the_target_share_the_full_prefill() -> None:
    names: Any = ("none", "oracle", "laq", "snapkv")
    cells = [(METHODS[name], budget) for name in names for budget in (0.2, 0.5)]
    with prefills(bench().target) as answered:
        records = list(measure(bench(), item(), cells))
    assert len([size for size in answered if size > 300]) == 1
    assert all(record.error is None for record in records)


def test_readings_are_shared_by_options_that_do_not_change_them() -> None:
    names = ("specpc", "specpc-keep", "specpc:unit=sentence,unit_score=mean", "specpc:pool=mean")
    cells = [(method, 0.3) for method in find_methods([*names, "specpc:passage_floor=1"])]
    with prefills(bench().draft.model) as read:
        records = list(measure(bench(), item(), cells))
    assert len(records) == 5
    assert len(read) == 2  # the draft's own answer, and one reading
