"""Batches of prompts read side by side or apart, against each prompt alone."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from draftsieve import Engine, Generation, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.compressor import Compressor
from draftsieve.core.errors import BudgetError, PromptError
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache import prefill as reading
from draftsieve.core.kv_cache.greedy import guess
from draftsieve.core.kv_cache.layers import EvictedLayer, cache_bytes
from draftsieve.core.kv_cache.prefill import similar
from draftsieve.core.prompt.encoder import PromptEncoder
from draftsieve.core.speckv.batch import start_evicted
from draftsieve.core.speckv.evict import evict
from draftsieve.core.specpc.draft_scores import read_draft

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

LENGTHS = (57, 5, 40, 30, 38)  # 5 is below the window, all but 5 beyond sliding windows of 24
SHORT = Generation(max_new_tokens=8)


@pytest.fixture(params=["apart", "together", "mixed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How prompts are read."""
    limit, padding = {"apart": (0, 0.0), "together": (10_000, 1.0), "mixed": (200, 0.3)}[
        request.param
    ]
    monkeypatch.setattr(reading, "TOGETHER", {"cpu": limit})
    monkeypatch.setattr(reading, "MOST_PADDING", padding)
    return str(request.param)


def _watched(model: PreTrainedModel) -> tuple[list[tuple[int, int]], Any]:
    """Rows and columns of each forward pass, and the hook that notes them."""
    shapes: list[tuple[int, int]] = []
    hook = model.get_decoder().register_forward_hook(
        lambda _m, _a, kwargs, _o: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes, hook


@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_readings_of_a_batch_equal_those_alone(name: str, implementation: str, way: str) -> None:
    """Rows have windows and lookaheads of their own, longer than a sliding window of 24 too."""
    model = families.build(name, implementation)
    options = SpecPC(window_size=12, starting_layer=0)
    windows, limits = (3, 12, 1, 8, 12), (1, 30, 4, 2, 30)
    prompts = [families.ids(length, seed=length)[0] for length in LENGTHS]
    shapes, hook = _watched(model)
    together = read_draft(model, prompts, options, lookahead_tokens=limits, windows=windows)
    hook.remove()
    read = [rows for rows, columns in shapes if columns > 1]
    assert read == {"apart": [1] * 5, "together": [4, 1], "mixed": [2, 1, 1, 1]}[way]
    assert {rows for rows, columns in shapes if columns == 1} == {4, 1}, "5 is less than half of 57"
    for prompt, found, window, limit in zip(prompts, together, windows, limits, strict=True):
        own = options.model_copy(update={"window_size": window})
        alone = read_draft(model, [prompt], own, lookahead_tokens=limit)[0]
        assert found.lookahead_ids.tolist() == alone.lookahead_ids.tolist()
        assert found.lookahead_ids.numel() == limit
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_greedy_answers_of_a_batch_equal_those_alone(
    name: str, implementation: str, way: str
) -> None:
    """The draft's guess and the target's decoding, both against transformers' generation."""
    model = families.build(name, implementation)
    prompts = [families.ids(length, seed=length)[0] for length in LENGTHS]
    alone = [
        model.generate(
            prompt.unsqueeze(0),
            attention_mask=torch.ones(1, prompt.numel(), dtype=torch.int64),
            max_new_tokens=8,
            do_sample=False,
        )[0, prompt.numel() :].tolist()
        for prompt in prompts
    ]
    assert [row.tolist() for row in guess(model, prompts, 8)] == alone
    steps = list(next_tokens(model, prompts, SHORT))
    assert [list(row) for row in zip(*steps, strict=True)] == alone


def test_an_end_token_stops_its_own_row_only(way: str) -> None:
    model = families.fresh("llama", "sdpa")
    prompts = [families.ids(length, seed=length)[0] for length in LENGTHS]
    free = [row.tolist() for row in guess(model, prompts, 8)]
    end = free[0][2]
    model.generation_config.eos_token_id = end
    found = [row.tolist() for row in guess(model, prompts, 8)]
    for row, whole in zip(found, free, strict=True):
        assert row == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert len(found[0]) < 8


def test_evicted_rows_side_by_side_equal_each_alone(way: str) -> None:
    model, options = families.build("llama", "sdpa"), SpecKV(window_size=4)
    prompts = [families.ids(length, seed=length)[0] for length in LENGTHS]
    guesses = [families.ids(more + 1, seed=more)[0][1:] for more in range(5)]  # 0 to 4 tokens
    capacities = [20, 30, 10, 25, 38]  # what the second and the last row have fits
    protected = [torch.arange(length) >= length - 4 for length in LENGTHS]
    start = start_evicted(model, prompts, guesses, options, capacities, protected)
    for row, (prompt, guess_, capacity, fixed) in enumerate(
        zip(prompts, guesses, capacities, protected, strict=True)
    ):
        alone = evict(model, [prompt], [guess_], options, [capacity], [fixed]).start
        for layer, own in zip(start.cache.layers, alone.cache.layers, strict=True):
            assert isinstance(layer, EvictedLayer)
            slots = min(capacity, len(prompt) - 1)
            torch.testing.assert_close(layer.keys[row, :, -slots:], own.keys[0])
            torch.testing.assert_close(layer.values[row, :, -slots:], own.values[0])
    exact = sum(t.nbytes for la in start.cache.layers for t in (la.keys, la.values))
    assert cache_bytes(start.cache) == exact == 4 * 2 * (5 * 2 * 37 * 16 * 4)  # 37 slots at most
    steps = list(next_tokens(model, prompts, SHORT, start))
    for row, (prompt, guess_, capacity, fixed) in enumerate(
        zip(prompts, guesses, capacities, protected, strict=True)
    ):
        alone = evict(model, [prompt], [guess_], options, [capacity], [fixed]).start
        expected = [token for (token,) in next_tokens(model, [prompt], SHORT, alone)]
        assert [step[row] for step in steps] == expected


def test_layers_that_look_at_anothers_keys_are_evicted_with_it(way: str) -> None:
    model = families.build_from(families.without_windows(), "sdpa")
    prompts = [families.ids(length, seed=length)[0] for length in (60, 41)]
    nothing, fixed = [prompts[0][:0]] * 2, [torch.arange(size) >= size - 4 for size in (60, 41)]
    start = start_evicted(model, prompts, nothing, SpecKV(window_size=4), [20, 20], fixed)
    steps = list(next_tokens(model, prompts, SHORT, start))
    assert len(set(map(tuple, steps))) > 1
    for row, prompt in enumerate(prompts):
        done = evict(model, [prompt], [prompt[:0]], SpecKV(window_size=4), [20], [fixed[row]])
        layers = done.entries(0)
        for later in layers[2:]:
            assert all(torch.equal(a, b) for a, b in zip(layers[1], later, strict=True))
        expected = [t for (t,) in next_tokens(model, [prompt], SHORT, done.start)]
        assert [step[row] for step in steps] == expected


def test_similar_lengths_share_a_pass() -> None:
    lengths = [100, 10, 90, 95, 9, 500]
    assert similar(lengths, 1000, 0.125) == [[5], [0, 3, 2], [1, 4]]
    assert similar(lengths, 250, 0.125) == [[5], [0, 3], [2], [1, 4]]
    assert similar(lengths, 0, 1.0) == [[5], [0], [3], [2], [1], [4]]
    assert similar([], 10, 0.5) == []


METHODS = [
    SpecPC(ratio=0.5),
    SpecPC(ratio=0.5, lookahead_tokens=4),
    SpecKV(ratio=0.5),
    SpecKVPC(specpc=SpecPC(ratio=0.7, lookahead_tokens=4), speckv=SpecKV(ratio=0.6)),
]


def _prompts() -> list[Prompt]:
    return [
        Prompt.from_question(QUESTION, TEXTS),
        Prompt.from_question("Where are tickets sold?", TEXTS[:2]),
        Prompt.from_question("Who is the oldest keeper of the garden house?", TEXTS[1:]),
        Prompt.from_messages([{"role": "user", "content": "Tell me a long story. " * 8}]),
        Prompt.from_question(QUESTION, TEXTS * 2),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_requests_equals_each_alone(method: object, way: str) -> None:
    """Texts, lookaheads, spans and scores; each request has a length of its own."""
    engine = tiny_engine()
    options = [Generation(max_new_tokens=more) for more in (8, 3, 8, 5, 1)]
    alone = [
        engine.generate(prompt, method=method, generation=own)
        for prompt, own in zip(_prompts(), options, strict=True)
    ]
    together = engine.generate_many(_prompts(), method=method, generation=options)
    for found, expected in zip(together, alone, strict=True):
        assert (found.text, found.lookahead) == (expected.text, expected.lookahead)
        assert found.usage == expected.usage
        assert (found.context is None) == (expected.context is None)
        if found.context is not None and expected.context is not None:
            assert found.context.text == expected.context.text
            assert found.context.lookahead_ids == expected.context.lookahead_ids
            scores = [
                [span.score for span in context.spans]
                for context in (found.context, expected.context)
            ]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-6)


def test_the_draft_reads_a_batch_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass a token of the lookahead for all prompts together, not for each."""
    monkeypatch.setattr(reading, "TOGETHER", {"cpu": 100_000})
    monkeypatch.setattr(reading, "MOST_PADDING", 1.0)
    engine = tiny_engine()
    assert engine.draft is not None
    shapes, hook = _watched(engine.draft)
    prompts = _prompts()[:3]
    try:
        engine.generate_many(prompts, method=SpecKV(ratio=0.5), generation=SHORT)
    finally:
        hook.remove()
    assert [rows for rows, _ in shapes] == [3] * 8
    assert [columns for _, columns in shapes[1:]] == [1] * 7


def test_one_faulty_request_of_a_batch_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine()
    long = Prompt.from_question("Why? " * 60, TEXTS)
    prompts = [_prompts()[0], long, _prompts()[2]]
    method = SpecPC(capacity=150)
    with pytest.raises(BudgetError, match="alone take"):
        engine.generate_many(prompts, method=method, generation=SHORT)
    with caplog.at_level(logging.WARNING):
        found = engine.generate_many(prompts, method=method, generation=SHORT, on_error="original")
    assert [_fallback(answer) is not None for answer in found] == [False, True, False]
    assert sum("stay whole" in record.message for record in caplog.records) == 1


def test_a_prompt_that_the_template_refuses_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The draft's template takes no earlier turns, so not even the prompt's size is known."""
    tokenizer = deepcopy(tiny_tokenizer())
    refuse = "{% if m['role'] == 'assistant' %}{{ raise_exception('one turn') }}{% endif %}"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{refuse}{{{{ m['content'] }}}}{{% endfor %}}"
    )
    compressor = Compressor(tiny_model(32, seed=1), tokenizer, progress=False)
    good = Prompt.from_question(QUESTION, TEXTS)
    turns = [("user", "Hello."), ("assistant", "Hello."), ("user", QUESTION)]
    bad = Prompt.from_messages([{"role": r, "content": c} for r, c in turns], TEXTS)
    method = SpecPC(ratio=0.5)
    with pytest.raises(PromptError):
        compressor.compress_prompts([good, bad], method)
    with caplog.at_level(logging.WARNING):
        found = compressor.compress_prompts([good, bad], method, on_error="original")
    assert found[0][1].text == compressor.compress_prompt(good, method)[1].text
    shorter, context = found[1]
    assert shorter is bad
    assert context.text == bad.documents_text
    assert [passage.text for passage in context.passages] == TEXTS
    assert "PromptError" in (context.stats.fallback or "")
    assert context.stats.passage_tokens == sum(map(compressor.count_tokens, TEXTS))
    assert [record.exc_info for record in caplog.records] == [None]


def test_a_batch_that_fails_is_read_one_by_one() -> None:
    """A draft that takes one row at a time; the second of them cannot be read at all."""
    compressor = Compressor(tiny_model(32, seed=1), tiny_tokenizer(), progress=False)
    prompts, method = _prompts()[:3], SpecPC(ratio=0.5)
    expected = [compressor.compress_prompt(prompt, method)[1].text for prompt in prompts]
    real, calls = compressor.draft.read, []

    def read(parts, *rest):  # type: ignore[no-untyped-def]
        calls.append(len(parts))
        if len(parts) > 1 or len(calls) == 3:
            raise RuntimeError("too much")
        return real(parts, *rest)

    compressor.draft.read = read  # type: ignore[method-assign]
    found = compressor.compress_prompts(prompts, method, on_error="original")
    assert calls == [3, 1, 1, 1]
    assert [context.stats.fallback for _, context in found] == [
        None,
        "RuntimeError: too much",
        None,
    ]
    assert [context.text for _, context in found][::2] == expected[::2]


@pytest.mark.parametrize("same", [True, False])
def test_prompts_are_encoded_once_where_both_models_encode_alike(
    same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_tokenizer.__wrapped__()  # as of a model that was loaded by itself
    if not same:
        other.chat_template = str(other.chat_template).replace("<|im_start|>", "<|im_start|> ")
    pair = Engine(
        tiny_model(64, seed=2),
        tiny_tokenizer(),
        draft_model=tiny_model(32, seed=1),
        draft_tokenizer=other,
    )
    calls, real = [], PromptEncoder.encode

    def encode(self: PromptEncoder, prompt: Prompt) -> Any:
        calls.append(prompt)
        return real(self, prompt)

    monkeypatch.setattr(PromptEncoder, "encode", encode)
    pair.generate(_prompts()[0], method=SpecKV(ratio=0.5), generation=SHORT)
    assert len(calls) == (1 if same else 2)


def _fallback(answer) -> str | None:  # type: ignore[no-untyped-def]
    return answer.context.stats.fallback
