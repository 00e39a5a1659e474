"""Choosing a few heads by what they keep."""

from __future__ import annotations

import numpy as np
import torch

from draftsieve.core.compressor import Compressor
from draftsieve.core.evaluation.few_heads import (
    HeadTable,
    as_head_weights,
    choose_heads,
    read_table,
    share_kept,
)
from draftsieve.core.evaluation.tasks import make_item

from .adapters_fixtures import tiny_model, tiny_tokenizer


def _table(seed: int, evidence: tuple[int, ...], every: bool = False) -> HeadTable:
    """Ten sentences of four tokens; head (1, 0) sees even evidence, head (0, 1) odd evidence."""
    torch.manual_seed(seed)
    heads = torch.rand(2, 2, 40) * 0.1
    for number in evidence:
        head = heads[1, 0] if number % 2 == 0 else heads[0, 1]
        head[number * 4 + seed % 4] = 1.0
    sentence = torch.arange(10).repeat_interleave(4)
    return HeadTable(heads, sentence, np.full(10, 4), evidence, every)


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


def test_an_item_is_read_head_by_head() -> None:
    compressor = Compressor(tiny_model(32, seed=1), tiny_tokenizer(), progress=False)
    item = make_item("one-key", 200, 0, compressor.count_tokens)
    for apart in (False, True):
        table = read_table(compressor, item, apart)
        assert table.heads.shape[:2] == (2, 4)
        assert table.heads.shape[2] == len(table.sentence)
        assert table.cost.sum() == int((table.sentence >= 0).sum())
        assert table.evidence
    weights, _ = choose_heads([table], 1, progress=False)
    kept = as_head_weights(compressor, weights, items=1)
    assert kept.last_layer == int(torch.nonzero(weights)[0, 0])
