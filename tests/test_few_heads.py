"""Choosing a few heads by what they keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftsieve.core.compressor import Compressor
from draftsieve.core.evaluation.few_heads import (
    RANKING,
    HeadTable,
    as_head_weights,
    choose_heads,
    held_out,
    read_table,
    read_tables,
    share_kept,
)
from draftsieve.core.evaluation.tasks import make_item
from draftsieve.core.specpc.draft import asking_rows
from draftsieve.core.specpc.head_weights import HeadWeights, read_heads
from draftsieve.core.specpc.units import sentence_spans

from .adapters_fixtures import tiny_model, tiny_tokenizer


def _table(seed: int, evidence: tuple[int, ...], every: bool = False) -> HeadTable:
    """Ten sentences of ten passages; head (1, 0) sees even evidence, head (0, 1) odd evidence."""
    heads = np.random.default_rng(seed).random((2, 2, 10)) * 0.1
    for number in evidence:
        head = heads[1, 0] if number % 2 == 0 else heads[0, 1]
        head[number] = 1.0
    return HeadTable(heads, np.arange(10), np.full(10, 4), np.array(evidence, dtype=int), every)


def test_the_heads_that_see_the_evidence_are_taken_and_no_others_help() -> None:
    even = [_table(seed, (2 * (seed % 5),)) for seed in range(20)]
    odd = [_table(seed, (2 * (seed % 5) + 1,)) for seed in range(20, 30)]
    weights, curve = choose_heads([*even, *odd], 2, shares=(0.1,), progress=False)
    assert torch.nonzero(weights).tolist() == [[0, 1], [1, 0]]
    assert curve[0] >= 20 / 30  # the head of the many comes first
    assert curve[1] == 1.0
    assert share_kept([*even, *odd], weights, (0.1,)) == [1.0]
    assert share_kept(odd, weights * torch.tensor([[0.0, 0.0], [1.0, 0.0]]), (0.1,))[0] < 0.5


def test_all_sentences_are_needed_where_the_item_says_so() -> None:
    both = _table(3, (2, 4), every=True)
    one = torch.zeros(2, 2)
    one[1, 0] = 1.0
    assert share_kept([both], one, (0.1, 0.2)) == [0.0, 1.0]
    assert share_kept([_table(3, (2, 4))], one, (0.1,)) == [1.0]
    assert share_kept([_table(3, ())], one, (1.0,)) == [0.0]  # nothing that answers


def test_heads_are_judged_by_the_ranking_of_the_preset() -> None:
    """The best of a passage lifts its other sentences above single good ones elsewhere."""
    passage, cost = np.array([0, 0, 1, 1, 2]), np.array([4, 4, 4, 4, 0])
    table = HeadTable(np.zeros((1, 1, 5)), passage, cost, np.array([1]), False)
    scores = np.array([0.9, 0.05, 0.06, 0.06, 9.0])
    assert table.kept(scores, (0.5,)) == 1.0
    assert np.argsort(-scores[:4])[:2].tolist() != [0, 1]
    assert table.kept(scores, (0.25, 0.5)) == 0.5


def test_an_item_is_read_head_by_head() -> None:
    compressor = Compressor(tiny_model(32, seed=1), tiny_tokenizer(), progress=False)
    item = make_item("one-key", 200, 0, compressor.count_tokens)
    for apart in (False, True):
        table = read_table(compressor, item, apart)
        assert table.heads.shape == (2, 4, len(table.cost))
        assert len(table.passage) == len(table.cost)
        assert len(table.evidence)
        tokens = compressor.encoder.encode(item.prompt())
        asking = torch.ones(asking_rows(tokens, RANKING.window_size))
        weights = torch.arange(len(asking)) / (len(asking) - 1)
        found = read_heads(compressor.model, tokens if apart else tokens.ids, weights, "mean")
        bounds = [
            (i, *span) for i, text in enumerate(item.passages) for span in sentence_spans(text)
        ]
        index, start, end = bounds[3]
        inside = (tokens.passage == index) & (tokens.start < end) & (tokens.end > start)
        assert table.cost[3] == int(inside.sum())
        assert table.heads[:, :, 3] == pytest.approx(found[..., inside].mean(-1).numpy(), rel=1e-4)


def test_readings_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    compressor = Compressor(tiny_model(32, seed=1), tiny_tokenizer(), progress=False)
    kinds = ("one-key", "unanswerable", "one-key")
    items = [
        make_item(kind, 200, number, compressor.count_tokens) for number, kind in enumerate(kinds)
    ]
    first = read_tables(compressor, items, folder=tmp_path, progress=False)
    assert len(first) == len(list(tmp_path.iterdir())) == 2  # nothing answers the second
    next(tmp_path.iterdir()).unlink()
    again = read_tables(compressor, items, folder=tmp_path, progress=False)
    for one, other in zip(first, again, strict=True):
        assert one.heads == pytest.approx(other.heads)
        assert one.evidence.tolist() == other.evidence.tolist()


def test_held_out_items_are_judged_by_heads_of_the_others() -> None:
    even = [_table(seed, (2 * (seed % 5),)) for seed in range(8)]
    assert held_out(even, 1, folds=2, progress=False) == [1.0, 1.0, 0.0]  # the last holds none


def test_few_heads_are_saved_and_read_again(tmp_path: Path) -> None:
    compressor = Compressor(tiny_model(32, seed=1), tiny_tokenizer(), progress=False)
    weights = torch.zeros(2, 4)
    weights[1, 2] = 3.0
    saved = as_head_weights(compressor, weights, items=7).save(tmp_path / "few.json")
    found = HeadWeights.load(saved)
    assert found.rows == "mean"
    assert found.last_layer == 1
    assert found.fit(compressor.model)
    sums = torch.tensor([0.0, 0.5, 2.0])
    assert torch.equal(found.scores(sums), sums)  # no link: scores are compared
