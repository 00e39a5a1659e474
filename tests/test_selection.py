"""Scoring and selection, pure functions against loops."""

from __future__ import annotations

import pytest
import torch

from draftsieve import Engine, SpecPC
from draftsieve.core.models.attention_capture import attention_probabilities
from draftsieve.core.specpc.draft_scores import reduce_rows, row_weights
from draftsieve.core.specpc.fitting import token_budget
from draftsieve.core.specpc.ranking import (
    distinct,
    enough,
    floor_first,
    neighbor_offsets,
    pool,
    rank,
)
from draftsieve.core.specpc.selection import select

from . import families


def naive_selection(scores: list[float], options: SpecPC) -> list[int]:
    """SEMANTICS, "SpecPC selection", with lists; ties by unpooled score, then index."""
    count, capacity = len(scores), options.capacity or 0
    k, how = options.kernel_size, options.pool
    pooled = []
    for i in range(count):
        places = range(i - (k - 1) // 2, i + k // 2 + 1)
        values = [scores[j] if 0 <= j < count else 0.0 for j in places]
        merged = {"max": max(values), "mean": sum(values) / k, None: scores[i]}
        pooled.append(merged[how])
    if capacity >= count:
        return list(range(count))
    window = min(options.window_size, capacity)
    kept = list(range(count - window, count))
    order = sorted(range(count), key=lambda i: (-pooled[i], -scores[i], i))[:capacity]
    n = options.neighbors
    offsets = sorted(range(-((n - 1) // 2), n // 2 + 1), key=lambda d: (abs(d), d))
    for i in order:
        for d in offsets:
            place = min(max(i + d, 0), count - 1)
            if place not in kept:
                kept.append(place)
    return sorted(kept[:capacity])


@pytest.mark.parametrize("seed", range(30))
def test_selection_equals_loops(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: object) -> object:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    # eighths, so that ties and sums are exact
    scores = torch.randint(0, 60, (int(pick(5, 40, 90)),), generator=draw).float() / 8
    options = SpecPC.model_validate(
        {
            "capacity": pick(1, 7, 16, 33, 90),
            "window_size": pick(1, 4, 16),
            "kernel_size": pick(1, 2, 4, 8),
            "pool": pick("max", "mean", None),
            "neighbor_tokens": pick(None, 0, 1, 2, 5),
        }
    )
    assert select(scores, options).indices.tolist() == naive_selection(scores.tolist(), options)


def test_a_capacity_below_the_window_keeps_the_newest_tokens() -> None:
    kept = select(torch.rand(100), SpecPC(capacity=20, window_size=64)).indices
    assert kept.tolist() == list(range(80, 100))


@pytest.mark.parametrize("length", [1, 3, 20])
def test_prompts_shorter_than_the_window(length: int) -> None:
    engine = Engine(
        families.build("llama", "sdpa"), None, draft_model=families.build("qwen2", "sdpa")
    )
    trace = engine.trace(families.ids(length), SpecPC(capacity=8, window_size=64), 4)
    assert trace.kept_prompt_indices is not None
    assert trace.kept_prompt_indices.tolist() == list(range(max(0, length - 8), length))
    assert len(trace.output_ids) == 4


def test_budgets_become_integers_in_one_way() -> None:
    assert token_budget(SpecPC(capacity=7), 100) == 7
    assert [token_budget(SpecPC(ratio=r), 10) for r in (0.01, 0.25, 0.26, 1.0)] == [1, 2, 3, 10]
    assert select(torch.rand(50), SpecPC(ratio=0.5, window_size=4)).indices.numel() == 25


def test_neighbours_are_nearest_first() -> None:
    assert neighbor_offsets(1).tolist() == [0]
    assert neighbor_offsets(4).tolist() == [0, -1, 1, 2]
    assert neighbor_offsets(5).tolist() == [0, -1, 1, -2, 2]


def test_distinct_keeps_first_appearances() -> None:
    assert distinct(torch.tensor([3, 1, 3, 0, 1]), 5).tolist() == [3, 1, 0]


def test_rank_stays_inside_its_candidates() -> None:
    scores = torch.tensor([9.0, 1.0, 5.0, 2.0, 8.0])
    allowed = torch.tensor([False, True, True, True, False])
    assert rank(scores, scores, 5, 3, allowed).tolist() == [2, 1, 3]


def test_row_weights() -> None:
    lengths = torch.tensor([5, 2, 1])
    weights = row_weights(lengths, 3, weighted=True)
    assert weights.tolist() == [[0.0, 0.5, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert row_weights(lengths, 3, weighted=False).tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_attention_probabilities_equal_a_plain_softmax() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8)
    visible = torch.rand(2, 1, 3, 10) > 0.3
    sinks = torch.randn(4)
    found = attention_probabilities(query, key, visible, 0.4, softcap=3.0, sinks=sinks)
    for b in range(2):
        for h in range(4):
            logits = torch.tanh(query[b, h] @ key[b, h // 2].T * 0.4 / 3.0) * 3.0
            logits = logits.masked_fill(~visible[b, 0], float("-inf"))
            whole = torch.cat([logits, sinks[h].expand(3, 1)], dim=-1).softmax(-1)
            torch.testing.assert_close(found[b, h], whole[:, :-1])
    weights = torch.rand(2, 3)
    expected = (found * weights[:, None, :, None]).flatten(1, 2)
    torch.testing.assert_close(reduce_rows(found, weights, "max"), expected.amax(1))
    torch.testing.assert_close(reduce_rows(found, weights, "mean"), expected.sum(1))


def test_pooling_divides_by_the_kernel_at_the_borders_too() -> None:
    found = pool(torch.tensor([4.0, 0.0, 0.0]), 2, "mean")
    assert found.tolist() == [2.0, 0.0, 0.0]
    assert pool(torch.tensor([4.0, 0.0, 0.0]), 3, "max").tolist() == [4.0, 4.0, 0.0]


@pytest.mark.parametrize("seed", range(8))
def test_every_group_is_sure_of_its_floor(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 4, (25,), generator=draw)
    for floor in range(4):
        counts, first, later = dict.fromkeys(range(4), 0), [], []
        for place, group in enumerate(groups.tolist()):
            (first if counts[group] < floor else later).append(place)
            counts[group] += 1
        assert floor_first(groups, floor).tolist() == first + later
    assert floor_first(groups[:0], 1).tolist() == []


@pytest.mark.parametrize("seed", range(8))
def test_enough_is_the_shortest_beginning_with_the_share(seed: int) -> None:
    # eighths, so that sums are exact
    draw = torch.Generator().manual_seed(seed)
    masses = torch.randint(0, 9, (12,), generator=draw).float() / 8
    for share in (0.1, 0.5, 0.75, 1.0):
        expected = next(
            count
            for count in range(1, 13)
            if float(masses[:count].sum()) >= share * float(masses.sum())
        )
        assert enough(masses, share) == expected
    assert enough(torch.zeros(3), 0.5) == 3
    assert enough(masses[:0], 0.5) == 0
