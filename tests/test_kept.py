"""Ranking, fitting, windows of attention and memories, each with crafted values."""

from __future__ import annotations

import torch

from draftsieve import Prompt, SpecPC
from draftsieve.core.capture import visible_keys
from draftsieve.core.kept import join_spans, merge_spans, rank_units
from draftsieve.core.memory import Memory

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor

LAYER = torch.nn.Module()


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
    view = visible_keys(LAYER, key, None, padding, rows=2, sliding_window=2)
    expected = [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert view.visible.long().tolist() == [[expected], [expected]]
    view = visible_keys(LAYER, key, None, padding, rows=2, sliding_window=None)
    assert view.visible[0, 0].long().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    newest = visible_keys(LAYER, key[:, :, :3], None, padding, rows=1, sliding_window=3)
    assert (newest.first, newest.visible[0, 0].tolist()) == (2, [[True] * 3])


def test_additive_and_boolean_masks_say_the_same() -> None:
    allowed = torch.ones(1, 1, 4, 4).tril().bool()
    added = torch.zeros(1, 1, 4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min)
    key, padding = torch.zeros(1, 1, 4, 4), torch.ones(1, 4, dtype=torch.bool)
    for mask in (allowed, added):
        view = visible_keys(LAYER, key, mask, padding, rows=2, sliding_window=None)
        assert torch.equal(view.visible, allowed[:, :, 2:])


def test_a_memory_shares_only_what_is_the_same() -> None:
    memory = Memory(torch.tensor([5, 6, 7, 8]), ())
    assert memory.shared(torch.tensor([5, 6, 7, 8, 9])) == 4
    assert memory.shared(torch.tensor([5, 6, 7, 8])) == 3  # one token has to be fed
    assert memory.shared(torch.tensor([5, 6, 1, 8, 9])) == 2
    assert memory.shared(torch.tensor([5, 6, 7, 8, 9]), leave=3) == 2
    assert memory.shared(torch.tensor([1])) == 0
