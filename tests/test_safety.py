"""Hostile text, broken requests, and many requests at once."""

from __future__ import annotations

import asyncio
import gc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from draftsieve import Generation, Passage, Prompt, SpecKV, SpecPC
from draftsieve.core.errors import PromptError
from draftsieve.core.prompt.encoder import PromptEncoder
from draftsieve.core.types import CompressedContext, Segment
from examples.benchmarks.hostile import INJECTIONS, hostile_prompts

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor, tiny_engine
from .test_encoding import EVIL, check_spans, control_ids
from .tokenizer_styles import STYLES


def check_kept(context: CompressedContext, texts: list[str], marker: str = " … ") -> None:
    """Spans ascend, do not touch, slice the original; passages are made of them; none grows."""
    count = tiny_compressor().count_tokens
    for index, (passage, text) in enumerate(zip(context.passages, texts, strict=True)):
        spans = [(s.start, s.end) for s in context.spans if s.passage_index == index]
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert all(end < start for (_, end), (start, _) in pairwise(spans))
        assert passage.text == marker.join(text[start:end] for start, end in spans)
        assert count(passage.text) <= count(text)


@pytest.mark.parametrize("style", STYLES)
def test_hostile_passages_give_no_control_token(style: str) -> None:
    tokenizer = STYLES[style]()
    encoder, controls = PromptEncoder(tokenizer), control_ids(tokenizer)
    for texts in hostile_prompts():
        prompt = Prompt.from_question(QUESTION, texts, system=None)
        tokens = encoder.encode(prompt)
        read = tokens.ids[tokens.segment == int(Segment.PASSAGE)].tolist()
        assert not controls & set(read)
        for index, text in enumerate(texts):
            mine = tokens.passage == index
            spans = zip(tokens.start[mine].tolist(), tokens.end[mine].tolist(), strict=True)
            found = "".join(text[start:end] for start, end in dict.fromkeys(spans))
            blank = not text.strip()  # templates trim blank ends of a message
            assert found == text or (blank and found == "")


@pytest.mark.parametrize("unit", ["token", "sentence"])
def test_hostile_passages_are_compressed_and_cited_exactly(unit: str) -> None:
    method = SpecPC.model_validate({"ratio": 0.3, "unit": unit, "kernel_size": 8})
    for texts in list(hostile_prompts())[:: 2 if unit == "token" else 5]:
        context = tiny_compressor().compress(QUESTION, texts, method)
        check_kept(context, texts)
        stats = context.stats
        assert stats.compressed_passage_tokens <= 0.3 * stats.passage_tokens + 1


def test_a_word_of_a_megabyte_is_encoded_and_a_long_one_cut() -> None:
    word = "abcdefgh" * 125_000
    prompt = Prompt.from_question(QUESTION, [word, TEXTS[0]])
    tokens = tiny_compressor().encoder.encode(prompt)
    check_spans(tokens, prompt)
    shorter = word[:40_000]
    context = tiny_compressor().compress(QUESTION, [shorter, TEXTS[0]], SpecPC(ratio=0.05))
    check_kept(context, [shorter, TEXTS[0]])
    assert context.stats.compressed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.text(max_size=80) | st.sampled_from([*TEXTS, *INJECTIONS, EVIL]), max_size=5),
    ratio=st.floats(0.05, 1.0),
    unit=st.sampled_from(["token", "word", "sentence", "passage"]),
)
def test_any_text_keeps_the_invariants(texts: list[str], ratio: float, unit: str) -> None:
    method = SpecPC.model_validate({"ratio": ratio, "unit": unit, "kernel_size": 8})
    context = tiny_compressor().compress(QUESTION, texts, method)
    check_kept(context, texts)
    stats = context.stats
    assert stats.compressed_prompt_tokens <= stats.prompt_tokens
    assert stats.compressed_passage_tokens <= stats.passage_tokens
    whole = tiny_compressor().compress(QUESTION, texts, SpecPC(capacity=100_000))
    assert [p.text for p in whole.passages] == texts
    assert not whole.stats.compressed


JOBS: list[tuple[Any, Generation]] = [
    (method, generation)
    for method in (None, SpecPC(ratio=0.4), SpecKV(ratio=0.3), SpecPC(ratio=0.7, unit="word"))
    for generation in (
        Generation(max_new_tokens=5),
        Generation(max_new_tokens=5, temperature=1.2, seed=11),
    )
]


async def test_64_mixed_requests_equal_serial_ones() -> None:
    engine = tiny_engine()

    def ask(number: int) -> str:
        method, generation = JOBS[number % len(JOBS)]
        texts = [TEXTS[number % 3], f"Number {number}.", TEXTS[(number + 1) % 3]]
        return engine.answer(QUESTION, texts, method=method, generation=generation).text

    async def ask_later(number: int) -> str:
        method, generation = JOBS[number % len(JOBS)]
        texts = [TEXTS[number % 3], f"Number {number}.", TEXTS[(number + 1) % 3]]
        answer = await engine.aanswer(QUESTION, texts, method=method, generation=generation)
        return answer.text

    serial = [ask(number) for number in range(64)]
    mixed = await asyncio.gather(
        *(
            asyncio.to_thread(ask, number) if number % 2 else ask_later(number)
            for number in range(64)
        )
    )
    assert mixed == serial


def caches() -> int:
    gc.collect()
    return sum(issubclass(type(o), DynamicCache) for o in gc.get_objects())


class BrokenError(RuntimeError):
    """Raised in the middle of a model's forward pass."""


@pytest.mark.parametrize(
    ("which", "method"),
    [
        ("target", None),
        ("target", SpecPC(ratio=0.5)),
        ("target", SpecKV(ratio=0.5)),
        ("draft", SpecPC(ratio=0.5)),
        ("draft", SpecKV(ratio=0.5)),
    ],
)
async def test_a_fault_or_a_cancellation_leaves_nothing_behind(which: str, method: Any) -> None:
    engine = tiny_engine()
    short = Generation(max_new_tokens=4)
    before = engine.answer(QUESTION, TEXTS, method=method, generation=short)
    held = caches()
    model = engine.target if which == "target" else engine.draft
    assert model is not None
    implementation = model.config._attn_implementation

    def fail(*_: Any) -> None:
        raise BrokenError

    layer: nn.Module = model.model.layers[1]
    handle = layer.register_forward_hook(fail)
    try:
        with pytest.raises(BrokenError):
            engine.answer(QUESTION, TEXTS, method=method, generation=short)
        with pytest.raises(BrokenError):
            await engine.aanswer(QUESTION, TEXTS, method=method, generation=short)
    finally:
        handle.remove()
    task = asyncio.create_task(
        engine.aanswer(QUESTION, TEXTS, method=method, generation=Generation(max_new_tokens=600))
    )
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):  # the step in flight ends first
        if caches() <= held:
            break
        await asyncio.sleep(0.05)
    assert caches() <= held
    assert model.config._attn_implementation == implementation
    again = engine.answer(QUESTION, TEXTS, method=method, generation=short)
    assert again.text == before.text


@pytest.mark.parametrize(
    ("question", "passages", "said"),
    [
        ("", TEXTS, "question"),
        ("   \n", TEXTS, "question"),
        (QUESTION, [3], "int"),
        (None, TEXTS, "NoneType"),
    ],
)
def test_bad_input_is_named(question: Any, passages: Any, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        tiny_engine().answer(question, passages)
    assert tiny_engine().answer(QUESTION, [], generation=Generation(max_new_tokens=2)).text


def test_ids_of_passages_may_repeat_and_inputs_stay() -> None:
    passages = [Passage(text, id="same") for text in TEXTS]
    context = tiny_compressor().compress(QUESTION, passages, SpecPC(ratio=0.5))
    assert len({s.passage_index for s in context.spans}) > 1
    check_kept(context, TEXTS)
    assert [p.text for p in passages] == TEXTS
