"""Ranking, fitting, windows of attention and memories, each with crafted values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsieve import Prompt, SpecPC
from draftsieve.core.errors import ModelError
from draftsieve.core.kv_cache.prefix import Memory
from draftsieve.core.models.attention_capture import AttentionCall
from draftsieve.core.specpc.fitting import join_spans, merge_spans
from draftsieve.core.specpc.ranking import rank_units
from draftsieve.core.specpc.units import unit_spans

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor


def call(key: torch.Tensor, mask: Any = None, window: int | None = None) -> AttentionCall:
    """A layer that ran two queries over these keys (batch, 1, keys, 4)."""
    return AttentionCall(
        module=torch.nn.Module(),
        layer=3,
        query=torch.ones(key.shape[0], 2, 2, 4),
        key=key,
        value=key,
        mask=mask,
        scaling=0.5,
        softcap=None,
        sinks=None,
        sliding_window=window,
    )


def test_protected_tokens_lend_no_score_to_their_neighbours() -> None:
    """A sink at the start and the question must not lift the passages beside them."""
    prompt = Prompt.from_question(QUESTION, TEXTS)
    tokens = tiny_compressor().encoder.encode(prompt)
    middle = torch.nonzero(tokens.passage == 1)[4]
    scores = torch.full((len(tokens),), 0.01)
    scores[tokens.protected] = 1.0
    scores[middle] = 0.5
    method = SpecPC(ratio=0.3, kernel_size=16, neighbor_tokens=1)
    ranked = rank_units(TEXTS, tokens, scores, method)
    assert ranked.passage[0] == 1
    assert int(ranked.start[0]) == int(tokens.start[middle])
    assert set(ranked.passage[:8].tolist()) == {1}


def test_a_passage_that_would_grow_comes_back_whole() -> None:
    marker = " (something was left out at this place) "
    method = SpecPC(
        ratio=0.9, kernel_size=1, neighbor_tokens=0, gap_marker=marker, starting_layer=0
    )
    compressor = tiny_compressor()
    context = compressor.compress(QUESTION, TEXTS, method)
    whole = [p.text == text for p, text in zip(context.passages, TEXTS, strict=True)]
    assert any(whole)
    for passage, text, size in zip(context.passages, TEXTS, context.sizes, strict=True):
        assert compressor.count_tokens(passage.text) <= compressor.count_tokens(text)
        assert size.compressed_tokens <= size.tokens


def test_spans_join_over_white_space_only() -> None:
    text = "one  two, three"
    spans = merge_spans(text, [(0, 3), (5, 9), (10, 15)])
    assert spans == ((0, 15),)
    spans = merge_spans(text, [(0, 4), (10, 15)])
    assert spans == ((0, 3), (10, 15))
    assert join_spans(text, spans, " … ") == "one … three"
    assert join_spans(text, spans, None) == "one three"
    assert merge_spans(text, [(3, 5)]) == ()


def test_visible_keys_without_a_mask_are_causal_padded_and_windowed() -> None:
    padding = torch.tensor([[False, True, True, True, True], [True] * 5])
    key = torch.zeros(2, 1, 5, 4)
    view = call(key, window=2).visible(padding, rows=2)
    expected = [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert view.visible.long().tolist() == [[expected], [expected]]
    view = call(key).visible(padding)
    assert view.visible[0, 0].long().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    newest = call(key[:, :, :3], window=3).visible(padding, rows=1)
    assert (newest.first, newest.visible[0, 0].tolist()) == (2, [[True] * 3])


def test_additive_and_boolean_masks_say_the_same() -> None:
    allowed = torch.ones(1, 1, 4, 4).tril().bool()
    added = torch.zeros(1, 1, 4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min)
    key, padding = torch.zeros(1, 1, 4, 4), torch.ones(1, 4, dtype=torch.bool)
    for mask in (allowed, added):
        view = call(key, mask).visible(padding, rows=2)
        assert torch.equal(view.visible, allowed[:, :, 2:])


def test_probabilities_of_some_rows_are_those_of_all_rows() -> None:
    key = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    padding = torch.ones(1, 7, dtype=torch.bool)  # a window has left two keys behind
    whole, first = call(key).probabilities(padding)
    assert first == 2
    assert whole.shape == (1, 2, 2, 5)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 2, 2))
    assert torch.equal(call(key).probabilities(padding, rows=1)[0], whole[:, :, 1:])
    assert torch.equal(call(key).probabilities(padding, rows=2, first=1)[0], whole[:, :, :1])
    early, _ = call(key).probabilities(padding, before=5)  # of the keys at 2, 3 and 4
    assert float(early[..., 3:].max()) == 0.0
    torch.testing.assert_close(early, (whole * (early > 0)) / whole[..., :3].sum(-1, keepdim=True))


def test_a_layer_that_ran_too_few_queries_is_refused() -> None:
    key, padding = torch.zeros(1, 1, 5, 4), torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"Layer 3 .* ran 2 queries where the newest 4"):
        call(key).probabilities(padding, rows=4)


def test_a_memory_shares_only_what_is_the_same() -> None:
    memory = Memory(torch.tensor([5, 6, 7, 8]), ())
    assert memory.shared(torch.tensor([5, 6, 7, 8, 9])) == 4
    assert memory.shared(torch.tensor([5, 6, 7, 8])) == 3  # one token has to be fed
    assert memory.shared(torch.tensor([5, 6, 1, 8, 9])) == 2
    assert memory.shared(torch.tensor([5, 6, 7, 8, 9]), leave=3) == 2
    assert memory.shared(torch.tensor([1])) == 0


def scored(levels: dict[int, float]) -> tuple[Any, torch.Tensor]:
    """The three texts, with one score for each sentence's first token, in order, else 0.01."""
    tokens = tiny_compressor().encoder.encode(Prompt.from_question(QUESTION, TEXTS))
    scores = torch.full((len(tokens),), 0.01)
    places = [
        int(((tokens.passage == index) & (tokens.end > start)).nonzero()[0])
        for index, text in enumerate(TEXTS)
        for start, _ in unit_spans(text, "sentence")
    ]
    for sentence, level in levels.items():
        scores[places[sentence]] = level
    return tokens, scores


def test_a_floor_gives_every_passage_its_best_sentence_first() -> None:
    tokens, scores = scored({0: 0.9, 1: 0.8, 3: 0.3, 6: 0.2})  # two, three and two sentences
    free = rank_units(TEXTS, tokens, scores, SpecPC(ratio=0.5, unit="sentence"))
    assert free.passage[:2].tolist() == [0, 0]
    floor = rank_units(TEXTS, tokens, scores, SpecPC(ratio=0.5, unit="sentence", passage_floor=1))
    assert floor.passage[:4].tolist() == [0, 1, 2, 0]
    assert sorted(zip(free.passage, free.start, strict=True)) == sorted(
        zip(floor.passage, floor.start, strict=True)
    )


def test_a_sentence_counts_by_its_best_token_or_by_its_mean() -> None:
    tokens, scores = scored({3: 0.9})
    whole = (tokens.passage == 2) & (tokens.start < 28)
    scores[whole] = 0.5  # all of the first sentence of the last passage
    best = rank_units(TEXTS, tokens, scores, SpecPC(ratio=0.5, unit="sentence"))
    mean = rank_units(TEXTS, tokens, scores, SpecPC(ratio=0.5, unit="sentence", unit_score="mean"))
    assert best.passage[0] == 1
    assert mean.passage[0] == 2


def test_words_of_the_question_count_with_their_share() -> None:
    tokens, scores = scored({3: 0.9, 5: 0.6})  # "Children travel free." and the museum

    def order(weight: float, question: str = QUESTION) -> list[tuple[int, int]]:
        options = SpecPC(ratio=0.5, unit="sentence", lexical_weight=weight)
        ranked = rank_units(TEXTS, tokens, scores, options, question)
        return list(zip(ranked.passage.tolist(), ranked.start.tolist(), strict=True))

    assert order(0.0)[:2] == [(1, TEXTS[1].index("Children")), (2, 0)]
    assert order(1.0)[:2] == [(0, 0), (2, 0)]  # "the ferry to Holm", then "of Holm"
    assert order(0.5)[:2] == [(2, 0), (0, 0)]  # the museum has something of both
    assert order(0.3)[:2] == [(1, TEXTS[1].index("Children")), (2, 0)]
    assert order(0.5, "") == order(0.0)  # no words, so the draft alone decides
    assert set(order(0.5)) == set(order(0.0))


def test_a_compressor_asks_for_the_words_of_the_last_question() -> None:
    method = SpecPC(ratio=0.3, unit="sentence", lexical_weight=1.0)
    for question, passage in ((QUESTION, 0), ("Who needs a ticket at the harbour office?", 1)):
        context = tiny_compressor().compress(question, TEXTS, method)
        assert max(context.sizes, key=lambda size: size.compressed_tokens) is context.sizes[passage]


def test_an_adaptive_budget_stops_at_its_share_of_the_scores() -> None:
    tokens, scores = scored({})
    scores[:] = 0.0
    first = (tokens.passage == 0) & (tokens.start < 42)
    scores[first] = 1.0
    scores[(tokens.passage == 1) & (tokens.start < 10)] = 0.1
    part = SpecPC(ratio=1.0, unit="sentence", score_mass=0.5)
    ranked = rank_units(TEXTS, tokens, scores, part)
    assert (len(ranked.passage), ranked.complete) == (1, False)
    assert rank_units(TEXTS, tokens, scores, SpecPC(ratio=1.0, unit="sentence")).complete
    compressor = tiny_compressor()
    # the whole prompt would fit, and yet less is kept
    found = compressor.compress(QUESTION, TEXTS, part)
    assert found.stats.compressed
    assert found.stats.compressed_passage_tokens < found.stats.passage_tokens
    capped = compressor.compress(QUESTION, TEXTS, SpecPC(ratio=0.2, score_mass=0.99))
    assert capped.stats.compressed_passage_tokens <= round(0.2 * capped.stats.passage_tokens)
