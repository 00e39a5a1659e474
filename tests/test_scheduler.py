"""Asynchronous requests that arrive together: read in turn, decoded as one batch, each its own."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from draftsieve import Engine, Generation, Grammar, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.config import Method
from draftsieve.core.errors import OutOfMemoryError, PromptError, RequestTimeoutError
from draftsieve.core.generation.scheduler import MOST_ROWS
from draftsieve.core.types import Answer, Chunk

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

QUESTIONS = [QUESTION, "Where are tickets sold?", "What does the museum show?", "And the dogs?"]
LONG = Generation(max_new_tokens=300)


def short(tokens: int, **options: Any) -> Generation:
    return Generation(max_new_tokens=tokens, **options)


@contextmanager
def passes(engine: Engine) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of each pass of the target."""
    seen: list[tuple[int, int]] = []

    def note(_module: object, _args: object, given: dict[str, torch.Tensor]) -> None:
        seen.append(tuple(given["input_ids"].shape))  # type: ignore[arg-type]

    hook = engine.target.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


async def text_of(stream: AsyncIterator[Chunk]) -> tuple[str, Answer]:
    pieces = [chunk async for chunk in stream]
    last = pieces[-1].answer
    assert last is not None
    assert [piece.answer for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), last


async def test_what_arrives_together_is_decoded_together() -> None:
    engine = tiny_engine()
    alone = [engine.answer(q, TEXTS, generation=short(30)) for q in QUESTIONS]
    with passes(engine) as seen:
        streams = [engine.astream(q, TEXTS, generation=short(30)) for q in QUESTIONS]
        found = await asyncio.gather(*map(text_of, streams))
    assert [text for text, _ in found] == [answer.text for answer in alone]
    assert [answer.usage for _, answer in found] == [answer.usage for answer in alone]
    assert max(rows for rows, _ in seen) == 4
    readings = [rows for rows, tokens in seen if tokens > 1]
    assert sum(readings) == 4
    assert max(readings) > 1  # short prompts that wait together are read side by side
    assert len(seen) < 2 * 30


async def test_running_streams_go_on_between_two_readings() -> None:
    engine, long = tiny_engine(), TEXTS * 6
    with passes(engine) as seen:
        await asyncio.gather(*(engine.aanswer(q, long, generation=short(40)) for q in QUESTIONS))
    readings = [place for place, (_, tokens) in enumerate(seen) if tokens > 1]
    assert len(readings) == 4
    assert all(later - earlier > 1 for earlier, later in pairwise(readings))


METHODS: tuple[Method | None, ...] = (
    None,
    SpecPC(ratio=0.5, lookahead_tokens=4),
    SpecPC(ratio=0.5, positions="keep"),
    SpecKV(ratio=0.4, lookahead_tokens=4),
    SpecKV(ratio=0.4, scorer="snapkv"),
    SpecKV(ratio=0.4, lookahead_tokens=4, head_budgets="adaptive"),
    SpecKVPC(specpc=SpecPC(ratio=0.8, lookahead_tokens=4), speckv=SpecKV(ratio=0.5)),
)
OPTIONS = (
    short(25),
    short(9, temperature=1.2, top_p=0.9, seed=3),
    short(40, grammar=Grammar.regex("(The ferry|Tickets)( [a-z]+){3,9}[.]")),
    short(15, repetition_penalty=1.3),
    short(20, drafting="auto"),
)


async def test_every_request_gets_what_it_gets_alone() -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS)
    asked = [(method, options) for method in METHODS for options in OPTIONS]
    alone = [engine.answer(QUESTION, TEXTS, m, generation=o) for m, o in asked]
    own = [session.answer(QUESTION, METHODS[3], generation=options) for options in OPTIONS]

    async def ask(place: int) -> Answer:
        await asyncio.sleep(0.02 * (place * 7 % 11))  # they come while others are answered
        method, options = asked[place]
        return (await text_of(engine.astream(QUESTION, TEXTS, method, generation=options)))[1]

    with passes(engine) as seen:
        together = asyncio.gather(*map(ask, range(len(asked))))
        sessions = [
            session.aanswer(QUESTION, METHODS[3], generation=options) for options in OPTIONS
        ]
        found, remembered = await together, await asyncio.gather(*sessions)
    for (method, options), one, other in zip(asked, alone, found, strict=True):
        assert other.text == one.text, (method, options)
        assert other.usage == one.usage
        assert other.finish_reason == one.finish_reason
        assert (other.drafting is None) == (options.drafting is None)
    assert [answer.text for answer in remembered] == [answer.text for answer in own]
    assert max(rows for rows, _ in seen) > 8


async def test_evictions_beside_sliding_windows_run_apart() -> None:
    from . import families

    model = families.build("gemma3", "sdpa", len(tiny_tokenizer()))
    engine = Engine(model, tiny_tokenizer())
    methods = (None, SpecKV(ratio=0.4, scorer="snapkv"), None, SpecKV(ratio=0.4, scorer="snapkv"))
    alone = [engine.answer(QUESTION, TEXTS, m, generation=short(12)).text for m in methods]
    asked = [engine.aanswer(QUESTION, TEXTS, m, generation=short(12)) for m in methods]
    with passes(engine) as seen:
        assert [answer.text for answer in await asyncio.gather(*asked)] == alone
    assert max(rows for rows, _ in seen) == 2


async def test_answers_of_one_token_leave_before_they_join() -> None:
    engine = tiny_engine()
    alone = [engine.answer(QUESTIONS[n], TEXTS, generation=short(n or 200)).text for n in range(4)]
    running = engine.astream(QUESTIONS[0], TEXTS, generation=short(200))
    first = await anext(running)
    found = []
    for tokens in (1, 2, 3):
        answer = await engine.aanswer(QUESTIONS[tokens], TEXTS, generation=short(tokens))
        found.append(answer.text)
    text, last = await text_of(running)
    assert last.usage.completion_tokens == 200
    assert [first.text + text, *found] == alone


async def test_a_request_that_is_cancelled_disturbs_no_other() -> None:
    engine = tiny_engine()
    alone = engine.answer(QUESTIONS[1], TEXTS, generation=short(60)).text
    leaving = engine.astream(QUESTIONS[0], TEXTS, generation=LONG)
    pieces: list[str] = []

    async def stay() -> None:
        async for chunk in engine.astream(QUESTIONS[1], TEXTS, generation=short(60)):
            pieces.append(chunk.text)

    staying = asyncio.create_task(stay())
    async for _ in leaving:
        if len(pieces) > 3:
            break
    with passes(engine) as seen:
        await leaving.aclose()  # type: ignore[attr-defined]
        await staying
    assert "".join(pieces) == alone
    assert [rows for rows, _ in seen][-5:] == [1] * 5


async def test_failures_stay_with_their_own_request() -> None:
    engine = tiny_engine()
    alone = engine.answer(QUESTIONS[1], TEXTS, generation=short(40)).text
    found = await asyncio.gather(
        engine.aanswer(QUESTIONS[0], TEXTS * 20, generation=short(40)),
        engine.aanswer(QUESTIONS[1], TEXTS, generation=short(40)),
        engine.aanswer(QUESTIONS[2], TEXTS, generation=LONG.model_copy(update={"timeout": 0.05})),
        return_exceptions=True,
    )
    assert isinstance(found[0], PromptError)
    assert isinstance(found[1], Answer)
    assert found[1].text == alone
    assert isinstance(found[2], RequestTimeoutError)
    with pytest.raises(PromptError, match="reads at most"):
        await engine.aanswer_many(QUESTIONS[:2], [TEXTS, TEXTS * 20], generation=LONG)


async def test_who_runs_out_of_time_leaves_and_the_others_go_on() -> None:
    engine = tiny_engine()
    late = LONG.model_copy(update={"timeout": 0.4})
    whole = engine.answer(QUESTIONS[1], TEXTS, generation=LONG).text
    told: list[str] = []

    async def run_out() -> None:
        async for chunk in engine.astream(QUESTIONS[0], TEXTS, generation=late):
            told.append(chunk.text)

    slow = threading.Event()

    def wait(*_: object) -> None:
        slow.wait(0.01)

    hook = engine.target.register_forward_pre_hook(wait)
    try:
        running = asyncio.create_task(run_out())
        staying = asyncio.create_task(engine.aanswer(QUESTIONS[1], TEXTS, generation=LONG))
        with pytest.raises(RequestTimeoutError):
            await running
        slow.set()
        assert (await staying).text == whole
    finally:
        hook.remove()
    assert told


async def test_a_pass_that_fails_is_told_to_all_in_it_and_leaves_nothing() -> None:
    def caches() -> int:
        gc.collect()
        return sum(issubclass(type(o), DynamicCache) for o in gc.get_objects())

    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    held = caches()

    def fail(_module: object, _args: object, given: dict[str, torch.Tensor]) -> None:
        if given["input_ids"].shape[0] == 2:
            torch.empty(2**60)

    hook = engine.target.register_forward_pre_hook(fail, with_kwargs=True)
    asked = [engine.aanswer(question, TEXTS, generation=LONG) for question in QUESTIONS[:2]]
    found = await asyncio.gather(*asked, return_exceptions=True)
    hook.remove()
    assert [type(error) for error in found] == [OutOfMemoryError] * 2
    assert "answering 2 prompts" in str(found[0])
    del found
    await engine.asession(TEXTS[:1])  # the thread has got over it
    assert caches() == held
    assert (await engine.aanswer(QUESTION, TEXTS, generation=short(5))).usage.completion_tokens == 5


async def test_no_more_rows_are_decoded_at_once_than_there_may_be() -> None:
    engine = tiny_engine()
    prompt = Prompt.from_messages([{"role": "user", "content": "Hello"}])
    alone = engine.generate(prompt, generation=short(200)).text
    with passes(engine) as seen:
        found = await engine.agenerate_many([prompt] * (MOST_ROWS + 3), generation=short(200))
    assert {answer.text for answer in found} == {alone}
    assert max(rows for rows, _ in seen) == MOST_ROWS


def test_event_loops_of_several_threads_share_a_batch() -> None:
    engine = tiny_engine()
    alone = [engine.answer(q, TEXTS, generation=short(40)).text for q in QUESTIONS]

    def ask(question: str) -> str:
        return asyncio.run(engine.aanswer(question, TEXTS, generation=short(40))).text

    with passes(engine) as seen, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, QUESTIONS)) == alone
    assert max(rows for rows, _ in seen) > 1


async def test_a_stream_that_nobody_listens_to_ends() -> None:
    engine = tiny_engine()
    async for _ in engine.astream(QUESTION, TEXTS, generation=LONG):
        break
    gc.collect()
    await asyncio.sleep(0.05)
    assert await engine.asession(TEXTS)  # its turn comes once the stream is gone
    with passes(engine) as seen:
        await asyncio.sleep(0.2)
    assert seen == []
