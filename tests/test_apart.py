"""Readings that stop early, and readings in which passages do not see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from draftsieve import Compressor, Prompt, SpecPC
from draftsieve.core.errors import ConfigError, ModelError
from draftsieve.core.models.loading import fingerprint
from draftsieve.core.prompt.encoder import PromptTokens
from draftsieve.core.specpc.apart import passage_blocks
from draftsieve.core.specpc.draft_scores import read_scores
from draftsieve.core.specpc.head_weights import HeadWeights
from draftsieve.core.types import Segment

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor, tiny_model, tiny_tokenizer

APART = SpecPC(ratio=0.5, passages_apart=True)


def _tokens(texts: list[str]) -> PromptTokens:
    return tiny_compressor().encoder.encode(Prompt.from_question(QUESTION, texts))


def _compressor(layers: int = 4) -> Compressor:
    model = tiny_model(32, seed=1, layers=layers)
    return Compressor(model, tiny_tokenizer(), progress=False)


def test_blocks_are_passages_with_what_stands_in_front_of_them() -> None:
    tokens = _tokens(TEXTS)
    blocks = passage_blocks(tokens)
    assert len(blocks) == len(TEXTS)
    assert int(tokens.segment[blocks[0][0]]) == int(Segment.NUMBER)
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    for index, (start, stop) in enumerate(blocks):
        inside = tokens.passage[start:stop]
        assert set(inside.tolist()) <= {index, -1}
        assert int((inside == index).sum()) == int((tokens.passage == index).sum())
    assert passage_blocks(_tokens([])) == []


def test_a_single_passage_apart_is_the_ordinary_reading() -> None:
    tokens, model = _tokens(TEXTS[:1]), tiny_compressor().model
    together = read_scores(model, tokens, SpecPC(ratio=0.5), 8)
    apart = read_scores(model, tokens, APART, 8)
    torch.testing.assert_close(apart.scores, together.scores, rtol=1e-4, atol=1e-6)
    assert apart.lookahead_ids.numel() == 0


def test_passages_apart_do_not_see_each_other() -> None:
    """Against one pass with a mask of our own: blocks see the beginning and themselves."""
    tokens = _tokens(TEXTS)
    model = tiny_model(32, seed=1)
    model.set_attn_implementation("eager")
    blocks = passage_blocks(tokens)
    begin, tail, size = blocks[0][0], blocks[-1][1], len(tokens)
    allowed = torch.ones(size, size).tril().bool()
    positions = torch.arange(size)
    for start, stop in blocks:
        allowed[start:stop, begin:start] = False
        positions[start:stop] = torch.arange(begin, begin + stop - start)
    longest = max(stop - start for start, stop in blocks)
    positions[tail:] = torch.arange(begin + longest, begin + longest + size - tail)
    mask = torch.zeros(1, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        attentions = model(
            input_ids=tokens.ids[None],
            attention_mask=mask,
            position_ids=positions[None],
            output_attentions=True,
        ).attentions
    weights = torch.arange(8) / 7
    rows = torch.stack([layer[0, :, -8:] for layer in attentions[1:]])  # the upper layers
    expected = (rows * weights[:, None]).amax(dim=(0, 1, 2))
    found = read_scores(tiny_model(32, seed=1), tokens, APART, 8).scores
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("apart", [False, True])
def test_layers_above_the_last_head_that_counts_do_not_run(apart: bool, tmp_path: Path) -> None:
    compressor = _compressor()
    heads = torch.zeros(4, 4)
    heads[1, 2], heads[0, 1] = 2.0, 1.0
    path = HeadWeights(heads, -1.0, fingerprint(compressor.model)).save(tmp_path / "few.json")
    method = SpecPC(ratio=0.5, head_weights=path, passages_apart=apart)
    ran: list[int] = []
    layers = compressor.model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))  # type: ignore[misc]
        for i, layer in enumerate(layers)
    ]
    tokens = _tokens(TEXTS)
    found = compressor.draft.read([tokens], method, [1])[0]
    for hook in hooks:
        hook.remove()
    assert set(ran) == {0}  # of layer 1 only queries, keys and values
    heads_above = replace(HeadWeights.load(path), heads=heads + 0.0)
    heads_above.heads[3, 0] = 1e-12  # counts for nothing, but has all layers run
    full = heads_above.save(tmp_path / "full.json")
    other = _compressor()
    whole = other.draft.read([tokens], method.model_copy(update={"head_weights": full}), [1])[0]
    torch.testing.assert_close(found.scores, whole.scores, rtol=1e-5, atol=1e-7)


def test_compressing_apart_keeps_the_budget_and_answers_errors() -> None:
    compressor = _compressor()
    context = compressor.compress(QUESTION, TEXTS, APART)
    assert 0 < context.stats.compressed_passage_tokens <= context.stats.passage_tokens // 2 + 1
    with pytest.raises(ConfigError, match="lookahead_tokens is 8"):
        SpecPC(passages_apart=True, lookahead_tokens=8)
    with pytest.raises(ModelError, match="full attention"):
        read_scores(families.build("gemma2", "eager"), _tokens(TEXTS), APART, 8)


# ---------------------------------------------------------------- the question behind each passage


def test_the_question_is_read_behind_each_passage_alone() -> None:
    """Against a plain pass over the beginning, one passage and the question."""
    texts = [*TEXTS, "One more, so that lengths differ a little: the kiln of the harbour burns."]
    tokens, model = _tokens(texts), tiny_model(32, seed=1)
    method = APART.model_copy(update={"likelihood_weight": 0.5})
    reading = read_scores(model, tokens, method, 8)
    plain = read_scores(model, tokens, APART, 8)
    torch.testing.assert_close(reading.scores, plain.scores, rtol=1e-4, atol=1e-6)
    assert plain.likelihood is None
    blocks = passage_blocks(tokens)
    begin, tail = blocks[0][0], blocks[-1][1]
    question = torch.nonzero(tokens.segment == int(Segment.QUESTION)).squeeze(1)
    assert reading.likelihood is not None
    assert len(reading.likelihood) == len(texts)
    for (start, stop), found in zip(blocks, reading.likelihood.tolist(), strict=True):
        places = [*range(begin), *range(start, stop), *range(tail, int(question[-1]) + 1)]
        ids = tokens.ids[places].unsqueeze(0)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        wanted = [
            float(logits[place - 1, ids[0, place]])
            for place in range(len(places))
            if places[place] in question.tolist()
        ]
        assert found == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_passages_without_text_are_not_asked_about() -> None:
    prompt = Prompt.from_question(QUESTION, TEXTS)
    texts = [TEXTS[0], *([""] * (len(TEXTS) - 1))]
    tokens = tiny_compressor().encoder.encode(prompt.with_texts(texts))
    reading = read_scores(
        tiny_compressor().model, tokens, APART.model_copy(update={"likelihood_weight": 1.0}), 8
    )
    assert reading.likelihood is not None
    assert torch.isfinite(reading.likelihood).tolist() == [True]


def test_the_whole_path_with_shares_for_passages() -> None:
    """Also in a prompt beyond the draft's window, which is read in groups."""
    compressor = _compressor()
    method = SpecPC(
        ratio=0.5,
        unit="sentence",
        passages_apart=True,
        passage_weight=0.5,
        likelihood_weight=0.5,
    )
    context = compressor.compress(QUESTION, TEXTS, method)
    assert 0 < context.stats.compressed_passage_tokens < context.stats.passage_tokens
    long = [f"{number} {text}" for number in range(30) for text in TEXTS]
    grouped = compressor.compress(QUESTION, long, method)
    assert grouped.stats.prompt_tokens > (compressor.draft.context_window or 0)
    assert grouped.stats.fallback is None
    assert grouped.stats.compressed_passage_tokens <= grouped.stats.passage_tokens / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood_weight": 0.5}, "set passages_apart=True"),
        ({"likelihood_weight": 0.5, "passages_apart": True, "unit": "token"}, "passages_apart"),
        ({"passage_weight": 0.5, "unit": "passage"}, 'set it to "sentence"'),
    ],
)
def test_shares_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpecPC(**{"unit": "sentence", **options})
